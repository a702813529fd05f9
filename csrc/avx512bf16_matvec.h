// Decoding with bfloat16 dot products: a few rows of x against codes that are read once.
// The scalar reference is scalar::matmul (matmul.h).
#pragma once
#include "avx512bf16.h"

#define VN_ISA avx512bf16
#define VN_FN __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))

namespace veneer {
namespace avx512bf16 {

// One row of x (D) -> chunks of 128 as four vectors of 32: vector s holds, at j, what meets nibble s of word j of the
// codes: 4 j + 1, 4 j, 4 j + 3, 4 j + 2.  Zeros beyond D.
VN_FN inline void permute_x(const void *rows, int, int64_t begin, int64_t d, uint16_t *to) {
    const uint16_t *x = static_cast<const uint16_t *>(rows) + begin;
    static const uint16_t within[4] = {1, 0, 3, 2};
    alignas(64) uint16_t each_fourth[32];  // in two vectors of 32: 16 of them
    for (int j = 0; j < 32; j++) each_fourth[j] = uint16_t(4 * (j % 16));
    const I index = loadu(each_fourth);
    for (int64_t k = 0; k < d; k += 128, to += 128) {
        I part[4];
        for (int i = 0; i < 4; i++) {
            const int64_t left = d - k - 32 * i;
            const __mmask32 there = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
            part[i] = _mm512_maskz_loadu_epi16(there, x + k + 32 * i);
        }
        for (int s = 0; s < 4; s++) {
            const I at = _mm512_add_epi16(index, _mm512_set1_epi16(int16_t(within[s])));
            const I low = _mm512_permutex2var_epi16(part[0], at, part[1]);
            const I high = _mm512_permutex2var_epi16(part[2], at, part[3]);
            _mm512_storeu_si512(to + 32 * s, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
        }
    }
}

// R rows of W, `apart` rows from each other, against N rows of permuted x, in chunks of 128 weights.  The levels
// themselves are looked up, rounded to bfloat16, and each chunk's sums are then multiplied by the absmax of its blocks
// in float32: as exact as rounding level * absmax, and cheap.  Each row is read front to back, and the R of them lie far
// apart: so many streams for prefetching hardware to follow, which is faster than one, and than rows side by side.
// G is 32, 64, or 128 for that and more; lanes [16 b / BLOCKS, 16 (b + 1) / BLOCKS) of a chunk's sums are block b's.
template <int G, int R, int N> struct RowSums {
    static constexpr int BLOCKS = G == 32 ? 4 : G == 64 ? 2 : 1;
    F sums[R][N];

    VN_FN VN_INLINE void clear() {
        VN_UNROLL for (int r = 0; r < R; r++)
            VN_UNROLL for (int i = 0; i < N; i++) sums[r][i] = _mm512_setzero_ps();
    }

    VN_FN VN_INLINE void add(int r, I codes, I levels, const float *const absmax[BLOCKS], const uint16_t *x,
                             int64_t ldx) {
        const I n0 = _mm512_permutexvar_epi16(codes, levels);  // the fifth bit of an index does not matter
        const I n1 = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), levels);
        const I n2 = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), levels);
        const I n3 = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), levels);
        F scale = _mm512_set1_ps(*absmax[0]);
        VN_UNROLL for (int b = 1; b < BLOCKS; b++)
            scale = _mm512_mask_broadcastss_ps(scale, __mmask16(0xffffu << (16 / BLOCKS * b)), _mm_load_ss(absmax[b]));
        VN_UNROLL for (int i = 0; i < N; i++) {
            const uint16_t *xi = x + i * ldx;
            const F even = dot_pairs(dot_pairs(_mm512_setzero_ps(), n0, loadu(xi)), n1, loadu(xi + 32));
            const F odd = dot_pairs(dot_pairs(_mm512_setzero_ps(), n2, loadu(xi + 64)), n3, loadu(xi + 96));
            sums[r][i] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, sums[r][i]);
        }
    }
};

// Bytes of codes of a row fetched ahead of their use, with a hint that they are used once: what runs between two
// products then finds its own memory in cache still.
constexpr int64_t FETCHED = 2048;

// Rows row, row + apart, ... of W (R of them) against N rows of x; absmax (R, lda), the first row's own first.
template <int G, int R, int N>
VN_FN inline void dot_rows(const Vectors &v, const float *absmax, int64_t lda, int64_t row, int64_t apart, int64_t at,
                           I levels) {
    typedef RowSums<G, R, N> Sums;
    const veneer_weight &w = *v.w;
    const int64_t d = w.cols, ldx = round_up(d, 128), whole = d / 128, stride = apart * d / 2;
    const uint8_t *codes = w.codes + row * d / 2;
    const uint16_t *x = static_cast<const uint16_t *>(v.x) + at * ldx;
    const int shift = __builtin_ctzll(uint64_t(w.block));
    const float *scales[Sums::BLOCKS];
    Sums sums;
    sums.clear();
    for (int64_t c = 0; c < whole; c++)
        VN_UNROLL for (int r = 0; r < R; r++) {
            _mm_prefetch(reinterpret_cast<const char *>(codes + r * stride + c * 64 + FETCHED), _MM_HINT_NTA);
            VN_UNROLL for (int b = 0; b < Sums::BLOCKS; b++)
                scales[b] = absmax + r * lda + (G == 128 ? (c * 128) >> shift : c * Sums::BLOCKS + b);
            sums.add(r, loadu(codes + r * stride + c * 64), levels, scales, x + c * 128, ldx);
        }
    if (whole * 128 < d)  // the rest has codes of 0 whose x is 0: any absmax will do
        VN_UNROLL for (int r = 0; r < R; r++) {
            VN_UNROLL for (int b = 0; b < Sums::BLOCKS; b++)
                scales[b] = absmax + r * lda + least((whole * 128 + b * G) >> shift, (d - 1) >> shift);
            const __mmask64 there = (1ull << (d - whole * 128) / 2) - 1;
            sums.add(r, _mm512_maskz_loadu_epi8(there, codes + r * stride + whole * 64), levels, scales,
                     x + whole * 128, ldx);
        }
    uint16_t *y = static_cast<uint16_t *>(v.y);
    VN_UNROLL for (int r = 0; r < R; r++)
        VN_UNROLL for (int i = 0; i < N; i++)
            y[(at + i) * w.rows + row + r * apart] = veneer::to_bf16(_mm512_reduce_add_ps(sums.sums[r][i]));
}

// Rows [first, last) of W against N rows of x from `at` on, R rows at a time as far as they go.  `decoded` has room for
// the absmax of R rows, or is null if W has them in float32.
template <int G, int R, int N>
VN_FN inline void stream_rows(const Vectors &v, const Planes &planes, float *decoded, int64_t first, int64_t last,
                              int64_t at, I levels) {
    const int64_t per_row = v.w->cols / v.w->block, apart = (last - first) / R;
    const int64_t lda = decoded ? per_row : apart * per_row;
    for (int64_t row = first; row < first + apart; row++) {
        for (int64_t r = 0, from = row * per_row; decoded && r < R; r++, from += apart * per_row)
            decode_absmax(*v.w, planes, from, from + per_row, decoded + r * lda);
        const float *absmax = decoded ? decoded : v.absmax + row * per_row;
        dot_rows<G, R, N>(v, absmax, lda, row, apart, at, levels);
    }
    if (R > 1) stream_rows<G, 1, N>(v, planes, decoded, first + R * apart, last, at, levels);
}

template <int G> VN_FN inline bool matvec_rows(const Vectors &v, int64_t first, int64_t last) {
    const veneer_weight &w = *v.w;
    const I levels = _mm512_broadcast_i64x4(to_bf16(_mm512_loadu_ps(w.levels)));
    Planes planes;
    float *decoded = nullptr;
    if (!v.absmax) {
        make_planes(w.nested_levels, planes);
        decoded = scratch_of<float>(SUMS, 4 * (w.cols / w.block));
        if (!decoded) return false;
    }
    int64_t at = 0;  // up to 16 sums, which stay in registers
    for (; at + 4 <= v.n; at += 4) stream_rows<G, 4, 4>(v, planes, decoded, first, last, at, levels);
    for (; at + 2 <= v.n; at += 2) stream_rows<G, 4, 2>(v, planes, decoded, first, last, at, levels);
    for (; at < v.n; at++) stream_rows<G, 4, 1>(v, planes, decoded, first, last, at, levels);
    return true;
}

// Rows [first, last) of W; v.x is bfloat16, permuted, (N, D rounded up to 128).
VN_FN inline bool matvec(const Vectors &v, int64_t first, int64_t last) {
    if (v.w->block == 32) return matvec_rows<32>(v, first, last);
    if (v.w->block == 64) return matvec_rows<64>(v, first, last);
    return matvec_rows<128>(v, first, last);
}

}  // namespace avx512bf16
}  // namespace veneer

#include "adamw8.h"  // with the Levels of this instruction set

namespace veneer {
namespace avx512bf16 {

constexpr Kernels table() {
    Kernels k = avx512::KERNELS;
    k.encode_absmax = encode_absmax;
    k.decode_absmax = decode_absmax;
    k.adamw8 = adamw8;
    k.bf16 = {FEW, over_rows<uint16_t, 128, permute_x, matvec>, matmul<Product>, matmul_backward<Product>};
    return k;
}

constexpr Kernels KERNELS = table();

}  // namespace avx512bf16
}  // namespace veneer

#undef VN_ISA
#undef VN_FN
