// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL: x86-64-v4), and every kernel built on them.
#pragma once
#include "common.h"
#include "dequantize.h"  // each first without VN_ISA: its meaning; again below, for these lanes
#include "matmul.h"
#include "matvec.h"
#include "quantize.h"
#include "segments.h"

#define VN_ISA avx512
#define VN_FN __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

namespace veneer {
namespace avx512 {

constexpr int W = 16;
constexpr int NV = 4;  // vectors of a tile of the matrix product: 6 x 4 accumulators of 32 registers
typedef __m512 F;
typedef __m512i I;

VN_FN VN_INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
VN_FN VN_INLINE void store(float *p, F v) { _mm512_storeu_ps(p, v); }
VN_FN VN_INLINE F set1(float v) { return _mm512_set1_ps(v); }
VN_FN VN_INLINE F zero() { return _mm512_setzero_ps(); }
VN_FN VN_INLINE I zero_i() { return _mm512_setzero_si512(); }
VN_FN VN_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
VN_FN VN_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
VN_FN VN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
VN_FN VN_INLINE float sum(F v) { return _mm512_reduce_add_ps(v); }

VN_FN VN_INLINE void transpose(I r[16]) {  // 16 x 16 of 32 bits
    I t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const I a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const I c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

VN_FN VN_INLINE void transpose(F r[16]) {
    I t[16];
    for (int i = 0; i < 16; i++) t[i] = _mm512_castps_si512(r[i]);
    transpose(t);
    for (int i = 0; i < 16; i++) r[i] = _mm512_castsi512_ps(t[i]);
}

VN_FN VN_INLINE F load_half(const uint16_t *p, int dtype) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    if (dtype == VENEER_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

VN_FN VN_INLINE F load_any(const void *x, int dtype, int64_t i) {
    return dtype == VENEER_F32 ? load(static_cast<const float *>(x) + i)
                               : load_half(static_cast<const uint16_t *>(x) + i, dtype);
}

// float32 lanes -> the bits of bfloat16 in the upper half of each lane, the lower half of no meaning.
VN_FN VN_INLINE I round_bf16(F v) {
    const I u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
}

VN_FN VN_INLINE void store_half(uint16_t *p, F v, int dtype) {
    const __m256i h = dtype == VENEER_F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                          : _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), h);
}

// 16 levels times absmax, rounded to dtype: what each code stands for in this block.
struct Table {
    F values;
};

VN_FN VN_INLINE Table scaled_table(const float *levels, float absmax, int dtype) {
    const F v = mul(load(levels), set1(absmax));
    if (dtype == VENEER_F32) return {v};
    if (dtype == VENEER_BF16)
        return {_mm512_castsi512_ps(_mm512_and_si512(round_bf16(v), _mm512_set1_epi32(int(0xffff0000u))))};
    return {_mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// The low four bits of each lane -> its value.
VN_FN VN_INLINE F look_up(const Table &t, I code) { return _mm512_permutexvar_ps(code, t.values); }

VN_FN VN_INLINE I load_words(const uint8_t *p) { return _mm512_loadu_si512(p); }
// BLOCKS numbers, each in its share of the lanes.
template <int BLOCKS> VN_FN VN_INLINE F spread(const float *p) {
    F v = set1(p[0]);
    VN_UNROLL for (int b = 1; b < BLOCKS; b++)
        v = _mm512_mask_broadcastss_ps(v, __mmask16(0xffffu << (16 / BLOCKS * b)), _mm_load_ss(p + b));
    return v;
}
template <int BITS> VN_FN VN_INLINE I shift_right(I v) { return _mm512_srli_epi32(v, BITS); }

// 16 bytes -> 32 weights in order.
VN_FN VN_INLINE void unpack(const uint8_t *codes, const Table &t, F &first, F &second) {
    const I bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
    const F even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), t.values);
    const F odd = _mm512_permutexvar_ps(bytes, t.values);
    const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const I high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    first = _mm512_permutex2var_ps(even, low, odd);
    second = _mm512_permutex2var_ps(even, high, odd);
}

VN_FN VN_INLINE I max_abs_bits(I top, F v) {
    return _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}

VN_FN VN_INLINE uint32_t max_of(I v) { return uint32_t(_mm512_reduce_max_epi32(v)); }

// 32 numbers of 16 bits -> the largest of their magnitudes, as bits, in each 16 bits of `top`.
VN_FN VN_INLINE I max_abs_halves(I top, const uint16_t *p) {
    return _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff)));
}

VN_FN VN_INLINE uint32_t max_of_halves(I v) {
    return max_of(_mm512_max_epu32(_mm512_srli_epi32(v, 16), _mm512_and_si512(v, _mm512_set1_epi32(0xffff))));
}

// [-1, 1] in 32 cells, each of which holds at most one bound: the cell says which, and the codes on its two sides.
struct Intervals {
    F bound[2];  // infinity in a cell without one
    I codes[2];  // of what is not above the bound; 256 times that of what is
    bool apart = true;  // whether no cell holds two
};

VN_FN VN_INLINE I cell_of(F v) { return _mm512_cvttps_epi32(fma(v, set1(15.99f), set1(16.f))); }

VN_FN VN_INLINE Intervals intervals_of(const float *bounds, const uint8_t *order) {
    alignas(64) int32_t cell[16], codes[32];
    alignas(64) float bound[32];
    _mm512_store_si512(cell, cell_of(_mm512_maskz_loadu_ps(0x7fff, bounds)));
    Intervals q;
    for (int c = 0, below = 0; c < 32; c++) {
        const bool here = below < 15 && cell[below] == c;
        bound[c] = here ? bounds[below] : 3.4028234663852886e38f;
        codes[c] = order[below] | order[below + here] << 8;
        below += here;
        q.apart &= c < 31 ? below == 15 || cell[below] > c : below == 15;
    }
    for (int i = 0; i < 2; i++) q.bound[i] = load(bound + 16 * i), q.codes[i] = _mm512_load_si512(codes + 16 * i);
    return q;
}

// The code of each lane in its lowest 8 bits, the others of no meaning.  The cell's rounding cannot be wrong: it is the
// same for v and for the bound, and rises with both.
VN_FN VN_INLINE I interval(F v, const Intervals &q) {
    const I cell = cell_of(v), codes = _mm512_permutex2var_epi32(q.codes[0], cell, q.codes[1]);
    const __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutex2var_ps(q.bound[0], cell, q.bound[1]), v, _CMP_LT_OQ);
    return _mm512_mask_srli_epi32(codes, above, codes, 8);
}

// 16 codes -> 8 bytes in the low bytes of 64-bit lanes.
VN_FN VN_INLINE I pairs_of(I code) {
    return _mm512_or_si512(_mm512_slli_epi32(code, 4), _mm512_srli_epi64(code, 32));
}

VN_FN VN_INLINE void store_codes(uint8_t *to, I a, I b, const Intervals &) {
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm512_cvtepi64_epi8(pairs_of(a)));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to + 8), _mm512_cvtepi64_epi8(pairs_of(b)));
}

}  // namespace avx512
}  // namespace veneer

#include "dequantize.h"
#include "matmul.h"
#include "matvec.h"
#include "quantize.h"
#include "segments.h"

#undef VN_ISA
#undef VN_FN
