// Matrix products with W kept in 4 bits: y = x W^T, and for the backward pass dx = dy W.
//
// The fast versions never hold W in 16 bits: a panel of W is unpacked into a core's own cache, used, and overwritten.
//   forward   a task is a strip of rows of W and a range of rows of x: C^T (strip, rows) += W panel * x^T
//   backward  a task is a strip of columns of W and a range of rows of dy: C (rows, strip) += dy * W panel
// Both run the same tile: A row-major (its elements are broadcast) times B in panels of NB columns.  Sums are float32.

#ifndef VN_MATMUL_H
#define VN_MATMUL_H
#include "common.h"
#include "dequantize.h"

namespace veneer {
namespace scalar {

inline float weight(const veneer_weight &w, const float *absmax, int64_t i, int dtype) {
    const int code = i % 2 ? w.codes[i / 2] & 15 : w.codes[i / 2] >> 4;
    return rounded_to(w.levels[code] * absmax[i / w.block], dtype);
}

// y (N, O) = x (N, D) W^T for rows [first, last) of W.
inline bool matmul_rows(const veneer_weight &w, const float *absmax, const void *x, int dtype, int64_t n, void *y,
                        int64_t first, int64_t last) {
    float *row = scratch_of<float>(PANEL, w.cols);
    if (!row) return false;
    for (int64_t o = first; o < last; o++) {
        for (int64_t d = 0; d < w.cols; d++) row[d] = weight(w, absmax, o * w.cols + d, dtype);
        for (int64_t i = 0; i < n; i++) {
            float sums[8] = {};  // eight partial sums, so that a compiler may use whatever lanes it has
            for (int64_t d = 0; d < w.cols; d += 8)  // D is a multiple of 32
                for (int64_t j = 0; j < 8; j++) sums[j] += row[d + j] * load_as_float(x, dtype, i * w.cols + d + j);
            const float s = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
            store_float(y, dtype, i * w.rows + o, s);
        }
    }
    return true;
}

// dx (N, D) = dy (N, O) W for columns [first, last) of W.
inline bool matmul_columns(const veneer_weight &w, const float *absmax, const void *dy, int dtype, int64_t n, void *dx,
                           int64_t first, int64_t last) {
    const int64_t width = last - first;
    float *row = scratch_of<float>(PANEL, width), *sums = scratch_of<float>(SUMS, n * width);
    if (!row || !sums) return false;
    std::memset(sums, 0, size_t(n * width) * sizeof(float));
    for (int64_t o = 0; o < w.rows; o++) {
        for (int64_t d = 0; d < width; d++) row[d] = weight(w, absmax, o * w.cols + first + d, dtype);
        for (int64_t i = 0; i < n; i++) {
            const float g = load_as_float(dy, dtype, i * w.rows + o);
            for (int64_t d = 0; d < width; d++) sums[i * width + d] += g * row[d];
        }
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < width; d++) store_float(dx, dtype, i * w.cols + first + d, sums[i * width + d]);
    return true;
}

// `decode` is a phase that fills absmax, of 0 tasks if it is filled already.
inline bool matmul(const veneer_weight &w, const float *absmax, const Phase &decode, const void *x, int dtype,
                   int64_t n, void *y, int threads) {
    const int64_t step = rows_per_task(w.rows, threads);
    const auto multiply = [&, step](int64_t i) {
        return matmul_rows(w, absmax, x, dtype, n, y, i * step, least(w.rows, (i + 1) * step));
    };
    return run_phases(threads, {decode, phase(ceil_div(w.rows, step), multiply)});
}

inline bool matmul_backward(const veneer_weight &w, const float *absmax, const Phase &decode, const void *dy, int dtype,
                            int64_t n, void *dx, int threads) {
    constexpr int64_t WIDTH = 64;
    const auto multiply = [&](int64_t i) {
        return matmul_columns(w, absmax, dy, dtype, n, dx, i * WIDTH, least(w.cols, (i + 1) * WIDTH));
    };
    return run_phases(threads, {decode, phase(ceil_div(w.cols, WIDTH), multiply)});
}

}  // namespace scalar

// ---- the blocking, for any kernel K with: T (element), PAIR (consecutive elements of the sum taken together),
// NB (columns of a panel of B), DEPTH (of the sum, taken at a time), SPAN (of DEPTH, between two looks ahead), and the
// functions used below.

constexpr int64_t HEIGHT = 6;    // rows of the usual tile
constexpr int64_t ROWS = 24;     // A has room for a multiple of this many rows: every tile's height divides it
constexpr int64_t STRIP = 126;   // rows of W a forward task unpacks at a time, by DEPTH columns: a third of a core's cache
constexpr int64_t TOKENS = 528;  // rows of x in one task
constexpr int64_t AHEAD = 4;     // rows of codes fetched into cache before they are unpacked
constexpr int64_t CACHED = 64;   // rows of W that stay in cache while one panel after another takes its columns
constexpr int64_t SKEW = 32;     // elements between rows of A beyond their length: rows then fall into different sets

inline void prefetch(const void *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(p) + i);
}

// Memory that a later step uses, fetched into the second cache a few lines at a time while tiles are computed: `rows`
// pieces of `bytes` each, `stride` bytes apart, in all but the first `wait` of `calls` calls.  These are hints, which
// may point beyond what there is.
template <bool WRITE = false> class Ahead {
  public:
    Ahead(const void *from, int64_t stride, int64_t bytes, int64_t rows, int64_t calls, int64_t wait = 0)
        : at_(static_cast<const char *>(from)), stride_(stride), bytes_(bytes), rows_(bytes > 0 ? rows : 0),
          share_(ceil_div(rows * (bytes / 64 + 1), calls - wait)), wait_(wait) {}

    VN_INLINE void fetch() {
        if (wait_-- > 0) return;
        for (int64_t i = 0; i < share_ && rows_ > 0; i++) {
            __builtin_prefetch(at_ + done_, WRITE, 2);
            done_ += 64;
            if (done_ >= bytes_) done_ = 0, at_ += stride_, rows_--;
        }
    }

  private:
    const char *at_;
    int64_t stride_, bytes_, rows_, share_, wait_, done_ = 0;
};

// Rows of a strip, at most STRIP and a multiple of HEIGHT: of a few numbers of strips the one with which no thread has
// more to do than it must.
inline int64_t even_strip(int64_t rows, int threads) {
    int64_t best = STRIP, least_rows = INT64_MAX;  // of the thread with the most
    for (int64_t turns = ceil_div(rows, STRIP * threads), last = turns + 4; turns < last; turns++) {
        const int64_t strip = round_up(ceil_div(rows, turns * threads), HEIGHT);
        const int64_t most = ceil_div(ceil_div(rows, strip), threads) * strip;
        if (most < least_rows) best = strip, least_rows = most;
    }
    return best;
}

// `later` is the row of W that this thread is likely to go on with.
template <class K>
bool forward_task(const veneer_weight &w, const float *absmax, const typename K::T *packed, int dtype, void *y,
                  int64_t r0, int64_t r1, int64_t n0, int64_t n1, int64_t later) {
    const int64_t rows = round_up(r1 - r0, ROWS), lda = K::DEPTH + SKEW, ldc = round_up(n1 - n0, K::NB), depth = w.cols;
    const int64_t size = sizeof(typename K::T), size_y = dtype == VENEER_F32 ? 4 : 2;
    typename K::T *a = scratch_of<typename K::T>(PANEL, rows * lda);
    float *c = scratch_of<float>(SUMS, rows * ldc);
    if (!a || !c) return false;
    for (int64_t k0 = 0; k0 < depth; k0 += K::DEPTH) {
        const int64_t kc = least(K::DEPTH, depth - k0);
        for (int64_t r = 0; r < rows; r++) {
            if (r0 + r + AHEAD < r1) prefetch(w.codes + ((r0 + r + AHEAD) * depth + k0) / 2, kc / 2);
            if (r0 + r < r1)
                K::unpack_row(w, absmax, (r0 + r) * depth + k0, kc, dtype, a + r * lda);
            else if (k0 == 0)
                std::memset(a + r * lda, 0, size_t(lda) * sizeof(typename K::T));
        }
        const bool last = k0 + kc == depth;
        const int64_t calls = ceil_div(r1 - r0, HEIGHT) * ceil_div(kc, K::SPAN), next_k = last ? 0 : k0 + kc;
        const int64_t next_r = last ? later : r0, next_c = least(K::DEPTH, depth - next_k);
        Ahead<> codes(w.codes + (next_r * depth + next_k) / 2, depth / 2, next_c / 2,
                      least(r1 - r0, w.rows - next_r), calls);
        Ahead<true> out(static_cast<char *>(y) + (n0 * w.rows + r0) * size_y, w.rows * size_y,
                        (r1 - r0) * size_y, n1 - n0, calls);
        for (int64_t j = n0; j < n1; j += K::NB) {
            const bool end = j + K::NB >= n1;
            Ahead<> panel(packed + (end ? n0 * depth + next_k * K::NB : (j + K::NB) * depth + k0 * K::NB), 0,
                          kc * K::NB * size, 1, calls);
            K::tiles(a, lda, r1 - r0, packed + (j * depth + k0 * K::NB), kc, c + (j - n0), ldc, least(K::NB, n1 - j),
                     k0 == 0, [&] {
                         panel.fetch();
                         if (end) codes.fetch();
                         if (end && last) out.fetch();
                     });
        }
    }
    K::store_transposed(c, ldc, r1 - r0, n1 - n0, y, n0 * w.rows + r0, w.rows, dtype);
    return true;
}

template <class K>
bool matmul(const veneer_weight &w, const float *absmax, const Phase &decode, const void *x, int dtype, int64_t n,
            void *y, int threads) {
    const int64_t depth = w.cols, panels = ceil_div(n, K::NB), chunks = ceil_div(depth, K::DEPTH);
    typename K::T *packed = scratch_of<typename K::T>(PACKED, panels * K::NB * depth);
    if (!packed) return false;
    const auto pack = [=](int64_t i) {
        const int64_t p = i / chunks, k0 = i % chunks * K::DEPTH, k1 = least(depth, k0 + K::DEPTH);
        K::pack_panel(x, dtype, p * K::NB, n, depth, k0, k1, packed + (p * depth + k0) * K::NB);
        return true;
    };
    const int64_t tokens = round_up(ceil_div(n, ceil_div(n, TOKENS)), K::NB), parts = ceil_div(n, tokens);
    const int64_t strip = even_strip(w.rows, threads), strips = ceil_div(w.rows, strip);
    const auto multiply = [=, &w](int64_t i) {
        const int64_t r0 = i / parts * strip, n0 = i % parts * tokens, later = (i + threads) / parts * strip;
        return forward_task<K>(w, absmax, packed, dtype, y, r0, least(w.rows, r0 + strip), n0, least(n, n0 + tokens),
                               later);
    };
    return run_phases(threads, {decode, phase(panels * chunks, pack), phase(strips * parts, multiply)});
}

// `later` is the column of W that this thread is likely to go on with.
template <class K>
bool backward_task(const veneer_weight &w, const float *absmax, const typename K::T *packed, int64_t lda, int dtype,
                   void *dx, int64_t c0, int64_t c1, int64_t n0, int64_t n1, int64_t later) {
    const int64_t rows = round_up(n1 - n0, ROWS), ldc = round_up(c1 - c0, K::NB), height = round_up(w.rows, K::PAIR);
    const int64_t size_y = dtype == VENEER_F32 ? 4 : 2;
    typename K::T *b = scratch_of<typename K::T>(PANEL, ldc * K::DEPTH);
    float *c = scratch_of<float>(SUMS, rows * ldc);
    if (!b || !c) return false;
    for (int64_t o0 = 0; o0 < height; o0 += K::DEPTH) {
        const int64_t oc = least(K::DEPTH, height - o0);
        for (int64_t o = o0; o < o0 + oc; o += CACHED)
            for (int64_t j = c0; j < c1; j += K::NB)
                K::unpack_columns(w, absmax, o, least(CACHED, o0 + oc - o), j, least(K::NB, c1 - j), dtype,
                                  b + (j - c0) * oc + (o - o0) * K::NB);
        const bool last = o0 + oc == height;
        const int64_t calls = ceil_div(c1 - c0, K::NB) * (rows / HEIGHT) * ceil_div(oc, K::SPAN), wait = calls * 3 / 4;
        const int64_t next_o = last ? 0 : o0 + oc, next_rows = least(K::DEPTH, w.rows - next_o);
        const int64_t next = next_o * w.cols + (last ? later : c0);
        Ahead<> codes(w.codes + next / 2, w.cols / 2, (c1 - c0) / 2, next_rows, calls, wait);
        Ahead<> scales(absmax + next / w.block, w.cols / w.block * 4, 4, next_rows, calls, wait);
        Ahead<true> out(static_cast<char *>(dx) + (n0 * w.cols + c0) * size_y, w.cols * size_y, (c1 - c0) * size_y,
                        n1 - n0, calls, wait);
        for (int64_t j = c0; j < c1; j += K::NB)
            K::tiles(packed + n0 * lda + o0, lda, rows, b + (j - c0) * oc, oc, c + (j - c0), ldc, least(K::NB, c1 - j),
                     o0 == 0, [&] {
                         codes.fetch();
                         scales.fetch();
                         if (last) out.fetch();
                     });
    }
    for (int64_t i = 0; i < n1 - n0; i++) K::store_row(c + i * ldc, c1 - c0, dx, (n0 + i) * w.cols + c0, dtype);
    return true;
}

template <class K>
bool matmul_backward(const veneer_weight &w, const float *absmax, const Phase &decode, const void *dy, int dtype,
                     int64_t n, void *dx, int threads) {
    const int64_t tokens = round_up(ceil_div(n, ceil_div(n, TOKENS)), ROWS), parts = ceil_div(n, tokens);
    const int64_t lda = round_up(w.rows, K::PAIR) + SKEW, padded = parts * tokens;
    typename K::T *packed = scratch_of<typename K::T>(PACKED, padded * lda);
    if (!packed) return false;
    const auto pack = [=, &w](int64_t i) {
        for (int64_t r = i * ROWS; r < (i + 1) * ROWS; r++) {
            if (r < n)
                K::pack_row(dy, dtype, r * w.rows, w.rows, packed + r * lda, lda);
            else
                std::memset(packed + r * lda, 0, size_t(lda) * sizeof(typename K::T));
        }
        return true;
    };
    int64_t strip = 2 * K::NB < 128 ? 128 : 2 * K::NB;
    if (w.cols < 4 * threads * strip) strip = 64;
    const int64_t strips = ceil_div(w.cols, strip);
    const auto multiply = [=, &w](int64_t i) {
        const int64_t c0 = i / parts * strip, n0 = i % parts * tokens, later = (i + threads) / parts * strip;
        return backward_task<K>(w, absmax, packed, lda, dtype, dx, c0, least(w.cols, c0 + strip), n0,
                                least(n, n0 + tokens), later);
    };
    return run_phases(threads, {decode, phase(padded / ROWS, pack), phase(strips * parts, multiply)});
}

}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

// C (M, V * W) += A (M, depth) B, with B's panel NB wide.
template <int M, int V, class Meanwhile>
VN_FN inline void tile(const float *a, int64_t lda, const float *b, int64_t nb, int64_t depth, float *c, int64_t ldc,
                       bool first, const Meanwhile &meanwhile) {
    meanwhile();
    F sums[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums[m][v] = first ? zero() : load(c + m * ldc + v * W);
    for (int64_t k = 0; k < depth; k++) {
        F columns[V];
        for (int v = 0; v < V; v++) columns[v] = load(b + k * nb + v * W);
        for (int m = 0; m < M; m++) {
            const F row = set1(a[m * lda + k]);
            for (int v = 0; v < V; v++) sums[m][v] = fma(row, columns[v], sums[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(c + m * ldc + v * W, sums[m][v]);
}

// Lanes [0, count) of v as elements of y; all of them where there is room.
VN_FN VN_INLINE void store_lanes(F v, int64_t count, void *y, int dtype, int64_t at) {
    if (count >= W) {
        if (dtype == VENEER_F32) return store(static_cast<float *>(y) + at, v);
        return store_half(static_cast<uint16_t *>(y) + at, v, dtype);
    }
    float lanes[W];
    store(lanes, v);
    for (int64_t i = 0; i < count; i++) store_float(y, dtype, at + i, lanes[i]);
}

// The matrix product in float32 lanes; x in float32 or bfloat16, both computed as float32.
struct Product {
    typedef float T;
    static constexpr int64_t PAIR = 1, NB = NV * W, DEPTH = 256, SPAN = DEPTH;

    // Rows [n0, n0 + NB) of x, columns [k0, k1) -> (k, NB), zeros beyond row n.  k0 and k1 are multiples of 32.
    VN_FN static void pack_panel(const void *x, int dtype, int64_t n0, int64_t n, int64_t depth, int64_t k0, int64_t k1,
                                 float *to) {
        for (int64_t j = 0; j < NB; j += W)
            for (int64_t k = k0; k < k1; k += W) {
                F r[W];
                for (int i = 0; i < W; i++)
                    r[i] = n0 + j + i < n ? load_any(x, dtype, (n0 + j + i) * depth + k) : zero();
                transpose(r);
                for (int i = 0; i < W; i++) store(to + (k - k0 + i) * NB + j, r[i]);
            }
    }

    VN_FN static void pack_row(const void *x, int dtype, int64_t at, int64_t count, float *to, int64_t padded) {
        for (int64_t k = 0; k < padded; k++) to[k] = k < count ? load_as_float(x, dtype, at + k) : 0.f;
    }

    VN_FN static void unpack_row(const veneer_weight &w, const float *absmax, int64_t begin, int64_t count, int dtype,
                                 float *to) {
        unpack_range(w, absmax, begin, begin + count, to, dtype);
    }

    VN_FN static void unpack_columns(const veneer_weight &w, const float *absmax, int64_t o0, int64_t oc, int64_t c0,
                                     int64_t width, int dtype, float *to) {
        for (int64_t o = 0; o < oc; o++, to += NB) {
            const int64_t begin = (o0 + o) * w.cols + c0;
            unpack_range(w, absmax, begin, begin + width, to, dtype);
            for (int64_t j = width; j < NB; j++) to[j] = 0.f;
        }
    }

    // As tall a tile as registers allow, for the vectors there are.
    template <int V, class Meanwhile>
    VN_FN static void tiles_of(const float *a, int64_t lda, int64_t rows, const float *b, int64_t depth, float *c,
                               int64_t ldc, bool first, const Meanwhile &meanwhile) {
        constexpr int M = HEIGHT * NV / V;
        for (int64_t r = 0; r < rows; r += M)
            tile<M, V>(a + r * lda, lda, b, NB, depth, c + r * ldc, ldc, first, meanwhile);
    }

    template <class Meanwhile>
    VN_FN static void tiles(const float *a, int64_t lda, int64_t rows, const float *b, int64_t depth, float *c,
                            int64_t ldc, int64_t width, bool first, const Meanwhile &meanwhile) {
        if (width <= W) return tiles_of<1>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
        if constexpr (NV == 4) {
            if (width > 3 * W) return tiles_of<4>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
            if (width > 2 * W) return tiles_of<3>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
        }
        tiles_of<2>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
    }

    VN_FN static void store_transposed(const float *c, int64_t ldc, int64_t rows, int64_t n, void *y, int64_t at,
                                       int64_t ldy, int dtype) {
        for (int64_t i0 = 0; i0 < n; i0 += W)
            for (int64_t r0 = 0; r0 < rows; r0 += W) {
                F r[W];
                for (int i = 0; i < W; i++) r[i] = r0 + i < rows ? load(c + (r0 + i) * ldc + i0) : zero();
                transpose(r);
                for (int i = 0; i < W && i0 + i < n; i++)
                    store_lanes(r[i], rows - r0, y, dtype, at + (i0 + i) * ldy + r0);
            }
    }

    VN_FN static void store_row(const float *c, int64_t count, void *y, int64_t at, int dtype) {
        for (int64_t i = 0; i < count; i += W) store_lanes(load(c + i), count - i, y, dtype, at + i);
    }
};

}  // namespace VN_ISA
}  // namespace veneer
#endif
