// Matrix-vector products for decoding: y (N, O) = x (N, D) W^T for N of at most 16, bounded by reading W once.
// The scalar reference is scalar::matmul (matmul.h).

#ifndef VN_MATVEC_H
#define VN_MATVEC_H
#include "common.h"
#include "dequantize.h"

namespace veneer {

constexpr int64_t FEW = 16;  // the largest N for which W is unpacked into registers instead of panels
constexpr int64_t FEW_LANES = 8;  // the same for float32 lanes, which look W up again for every 4 rows

// What one task needs: rows of W, and x as the kernel wants it (see each).
struct Vectors {
    const veneer_weight *w;
    const float *absmax;  // null: decode it from its 8-bit codes on the way
    const void *x;        // permuted
    int dtype;
    int64_t n;
    void *y;
};

// All rows of W, by an instruction set's two functions: one permutes a row of x (to T, padded to STEP), one computes a
// task's rows of W.
template <class T, int64_t STEP, void (*PERMUTE)(const void *, int, int64_t, int64_t, T *),
          bool (*MATVEC)(const Vectors &, int64_t, int64_t)>
bool over_rows(const veneer_weight &w, const void *x, int dtype, int64_t n, void *y, int threads) {
    const int64_t ldx = round_up(w.cols, STEP), step = rows_per_task(w.rows, threads);
    T *permuted = scratch_of<T>(PACKED, n * ldx);
    if (!permuted) return false;
    for (int64_t i = 0; i < n; i++) PERMUTE(x, dtype, i * w.cols, w.cols, permuted + i * ldx);
    const Vectors v{&w, w.absmax, permuted, dtype, n, y};
    return parallel(threads, ceil_div(w.rows, step),
                    [&v, step](int64_t i) { return MATVEC(v, i * step, least(v.w->rows, (i + 1) * step)); });
}

}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

constexpr int64_t STEP = 8 * W;  // weights whose codes fill a register

// One row of x (D) -> steps of eight vectors: vector s holds, at j, what meets nibble s of word j of the codes: element
// 8 j + 1, 8 j, 8 j + 3, 8 j + 2 and so on.  Zeros beyond D.
template <int DTYPE> inline void permute_row(const void *x, int64_t begin, int64_t d, float *to) {
    for (int64_t k = 0; k < d; k += STEP, to += STEP) {
        const int64_t words = least(W, (d - k) / 8);  // D is a multiple of 32
        for (int64_t j = 0; j < words; j++)
            for (int s = 0; s < 8; s++) to[s * W + j] = load_as_float(x, DTYPE, begin + k + 8 * j + (s ^ 1));
        for (int64_t j = words; j < W; j++)
            for (int s = 0; s < 8; s++) to[s * W + j] = 0.f;
    }
}

inline void permute_x(const void *x, int dtype, int64_t begin, int64_t d, float *to) {
    if (dtype == VENEER_F32) return permute_row<VENEER_F32>(x, begin, d, to);
    permute_row<VENEER_BF16>(x, begin, d, to);
}

// R rows of W against N rows of permuted x, a step at a time: levels times x, summed by words of eight weights, times
// the absmax of their blocks.
template <int R, int N> struct StepSums {
    F totals[R][N], sums[R][N];

    VN_FN VN_INLINE void clear() {
        VN_UNROLL for (int r = 0; r < R; r++)
            VN_UNROLL for (int i = 0; i < N; i++) totals[r][i] = zero();
    }

    // Nibble S of each word.
    template <int S>
    VN_FN VN_INLINE void add_nibbles(const I *codes, const Table &levels, const float *x, int64_t ldx) {
        F v[R];
        VN_UNROLL for (int r = 0; r < R; r++) v[r] = look_up(levels, shift_right<4 * S>(codes[r]));
        VN_UNROLL for (int i = 0; i < N; i++) {
            const F xi = load(x + i * ldx + S * W);
            VN_UNROLL for (int r = 0; r < R; r++) sums[r][i] = S ? fma(v[r], xi, sums[r][i]) : mul(v[r], xi);
        }
    }

    VN_FN VN_INLINE void add(const I *codes, const Table &levels, const F *absmax, const float *x, int64_t ldx) {
        add_nibbles<0>(codes, levels, x, ldx);
        add_nibbles<1>(codes, levels, x, ldx);
        add_nibbles<2>(codes, levels, x, ldx);
        add_nibbles<3>(codes, levels, x, ldx);
        add_nibbles<4>(codes, levels, x, ldx);
        add_nibbles<5>(codes, levels, x, ldx);
        add_nibbles<6>(codes, levels, x, ldx);
        add_nibbles<7>(codes, levels, x, ldx);
        VN_UNROLL for (int r = 0; r < R; r++)
            VN_UNROLL for (int i = 0; i < N; i++) totals[r][i] = fma(sums[r][i], absmax[r], totals[r][i]);
    }
};

// Rows row ... row + R - 1 of W with their absmax (R, D / G) against N rows of permuted x from `at` on.  A step has
// BLOCKS blocks, or is part of one.
template <int BLOCKS, int R, int N>
VN_FN inline void dot_rows(const Vectors &v, const Table &levels, const float *absmax, int64_t row, int64_t at) {
    const int64_t d = v.w->cols, ldx = round_up(d, STEP), whole = d - d % STEP, per_row = d / v.w->block;
    const int shift = __builtin_ctzll(uint64_t(v.w->block));
    const uint8_t *codes = v.w->codes + row * d / 2;
    const float *x = static_cast<const float *>(v.x) + at * ldx;
    StepSums<R, N> sums;
    sums.clear();
    I words[R];
    F scales[R];
    for (int64_t k = 0; k < whole; k += STEP) {
        VN_UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *from = codes + (r * d + k) / 2;
            __builtin_prefetch(from + 2048);
            words[r] = load_words(from);
            scales[r] = spread<BLOCKS>(absmax + r * per_row + (k >> shift));
        }
        sums.add(words, levels, scales, x + k, ldx);
    }
    if (whole < d) {  // beyond the rest x is 0
        for (int r = 0; r < R; r++) {
            uint8_t rest[STEP / 2] = {};
            float own[BLOCKS] = {};
            std::memcpy(rest, codes + (r * d + whole) / 2, size_t(d - whole) / 2);
            for (int64_t b = whole >> shift; b < per_row; b++) own[b - (whole >> shift)] = absmax[r * per_row + b];
            words[r] = load_words(rest);
            scales[r] = spread<BLOCKS>(own);
        }
        sums.add(words, levels, scales, x + whole, ldx);
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++)
            store_float(v.y, v.dtype, (at + i) * v.w->rows + row + r, sum(sums.totals[r][i]));
}

template <int BLOCKS, int R>
VN_FN inline void all_x(const Vectors &v, const Table &levels, float *decoded, int64_t row) {
    const int64_t per_row = v.w->cols / v.w->block;
    if (decoded) scalar::decode_absmax(*v.w, row * per_row, (row + R) * per_row, decoded);
    const float *absmax = decoded ? decoded : v.absmax + row * per_row;
    int64_t i = 0;
    for (; i + 4 <= v.n; i += 4) dot_rows<BLOCKS, R, 4>(v, levels, absmax, row, i);
    for (; i + 2 <= v.n; i += 2) dot_rows<BLOCKS, R, 2>(v, levels, absmax, row, i);
    for (; i < v.n; i++) dot_rows<BLOCKS, R, 1>(v, levels, absmax, row, i);
}

template <int BLOCKS> VN_FN inline bool matvec_rows(const Vectors &v, int64_t first, int64_t last) {
    const Table levels = scaled_table(v.w->levels, 1.f, VENEER_F32);
    float *decoded = v.absmax ? nullptr : scratch_of<float>(SUMS, 2 * (v.w->cols / v.w->block));
    if (!v.absmax && !decoded) return false;
    int64_t row = first;
    for (; row + 2 <= last; row += 2) all_x<BLOCKS, 2>(v, levels, decoded, row);
    if (row < last) all_x<BLOCKS, 1>(v, levels, decoded, row);
    return true;
}

// Rows [first, last) of W; v.x is permuted, (N, D rounded up to STEP).  G is at least 32.
VN_FN inline bool matvec(const Vectors &v, int64_t first, int64_t last) {
    if constexpr (STEP / 32 >= 4)
        if (v.w->block == STEP / 4) return matvec_rows<4>(v, first, last);
    if constexpr (STEP / 32 >= 2)
        if (v.w->block == STEP / 2) return matvec_rows<2>(v, first, last);
    return matvec_rows<1>(v, first, last);
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
