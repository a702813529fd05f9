// Matrix-vector products for decoding: y (N, O) = x (N, D) W^T for N of at most 16, bounded by reading W once.
// The meaning is scalar::matmul (matmul.h).

#ifndef VN_MATVEC_H
#define VN_MATVEC_H
#include "common.h"
#include "dequantize.h"

namespace veneer {

constexpr int64_t FEW = 16;  // the largest N for which W is unpacked into registers instead of panels
constexpr int64_t FEW_LANES = 8;  // the same for float32 lanes, which unpack W again for every 4 rows

// What one task needs: rows of W, and x as the kernel wants it (see each).
struct Vectors {
    const veneer_weight *w;
    const float *absmax;  // null: decode it from its 8-bit codes on the way
    const void *x;
    int dtype;
    int64_t n;
    void *y;
};

}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

// N rows of x against `count` unpacked weights at a time; sums (N, W) are added to.
template <int N>
VN_FN VN_INLINE void dot_piece(const uint8_t *codes, const Table &table, int64_t count, const float *x, int64_t ldx,
                               F *sums) {
    for (int64_t k = 0; k < count; k += 2 * W) {
        F first, second;
        unpack(codes + k / 2, table, first, second);
        for (int i = 0; i < N; i++) {
            sums[2 * i] = fma(first, load(x + i * ldx + k), sums[2 * i]);
            sums[2 * i + 1] = fma(second, load(x + i * ldx + k + W), sums[2 * i + 1]);
        }
    }
}

template <int N> VN_FN inline void dot_row(const Vectors &v, const float *x, int64_t row, int64_t at) {
    const veneer_weight &w = *v.w;
    F sums[2 * N];
    for (int i = 0; i < 2 * N; i++) sums[i] = zero();
    const uint8_t *codes = w.codes + row * w.cols / 2;
    __builtin_prefetch(codes + 4096);
    for (int64_t k = 0; k < w.cols; k += w.block) {
        const int64_t b = (row * w.cols + k) / w.block;
        float absmax;
        if (v.absmax)
            absmax = v.absmax[b];
        else
            scalar::decode_absmax(w, b, b + 1, &absmax);
        __builtin_prefetch(codes + k / 2 + 2048);
        dot_piece<N>(codes + k / 2, scaled_table(w.levels, absmax, v.dtype), w.block, x + k, w.cols, sums);
    }
    for (int i = 0; i < N; i++)
        store_float(v.y, v.dtype, (at + i) * w.rows + row, sum(add(sums[2 * i], sums[2 * i + 1])));
}

// Rows [first, last) of W; v.x is float32 (N, D).  G is a multiple of 2 W.
VN_FN inline void matvec(const Vectors &v, int64_t first, int64_t last) {
    const float *x = static_cast<const float *>(v.x);
    for (int64_t row = first; row < last; row++) {
        int64_t i = 0;
        for (; i + 4 <= v.n; i += 4) dot_row<4>(v, x + i * v.w->cols, row, i);
        for (; i + 2 <= v.n; i += 2) dot_row<2>(v, x + i * v.w->cols, row, i);
        for (; i < v.n; i++) dot_row<1>(v, x + i * v.w->cols, row, i);
    }
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
