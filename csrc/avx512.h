// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL: x86-64-v4), and every kernel built on them.
#pragma once
#include "avx2.h"

#define VN_ISA avx512
#define VN_LOWER avx2
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

// ---- 8-bit numbers

VN_FN VN_INLINE F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
VN_FN VN_INLINE F divide(F a, F b) { return _mm512_div_ps(a, b); }
VN_FN VN_INLINE F root(F v) { return _mm512_sqrt_ps(v); }
VN_FN VN_INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
VN_FN VN_INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
VN_FN VN_INLINE I truncate(F v) { return _mm512_cvttps_epi32(v); }
VN_FN VN_INLINE F magnitude(F v) { return _mm512_abs_ps(v); }

VN_FN VN_INLINE F with_sign(F v, F sign) {
    const I bit = _mm512_set1_epi32(int(0x80000000u)), signs = _mm512_castps_si512(sign);  // v | (sign & bit)
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v), signs, bit, 0xf8));
}

// How many of 8 rising starts are below each lane's magnitude, or at it where the lane is negative: a tie goes to the
// lower level, on either side of 0.  No start is below 2^-31 or twice in one power of two: a table by exponent has how
// many are below all its numbers, and the one among them, if any.  A number is compared as its bits turned left, the
// exponent then the upper byte and the sign the lowest bit.
struct Decades {
    I first, second, below, below_second;
    VN_FN explicit Decades(const float *starts) {
        uint32_t start[32], count[32];
        for (int e = 0; e < 32; e++) {
            const float low = float_of(uint32_t(96 + e) << 23);
            uint32_t n = 0;
            while (n < 8 && starts[n] < low) n++;
            count[e] = n;
            start[e] = n < 8 && starts[n] < 2 * low ? 2 * bits_of(starts[n]) : 0xffffffffu;
        }
        first = _mm512_loadu_si512(start), second = _mm512_loadu_si512(start + 16);
        below = _mm512_loadu_si512(count), below_second = _mm512_loadu_si512(count + 16);
    }
    template <bool SIGNED> VN_FN VN_INLINE I of(F v) const {
        const I bits = _mm512_castps_si512(v), turned = SIGNED ? _mm512_rol_epi32(bits, 1) : _mm512_slli_epi32(bits, 1);
        const I within = _mm512_max_epu32(turned, _mm512_set1_epi32(96 << 24));
        const I exponent = _mm512_srli_epi32(within, 24);  // its low 5 bits count
        const I start = _mm512_permutex2var_epi32(first, exponent, second);
        const I n = _mm512_permutex2var_epi32(below, exponent, below_second);
        return _mm512_mask_add_epi32(n, _mm512_cmpgt_epu32_mask(within, start), n, _mm512_set1_epi32(1));
    }
};

struct Row {
    F values;
};
VN_FN VN_INLINE Row row(const float *p) { return {load(p)}; }
VN_FN VN_INLINE F look_up(const Row &r, I at) { return _mm512_permutexvar_ps(at, r.values); }

VN_FN VN_INLINE F from_whole(F v) { return _mm512_reduce_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Of two lanes' distances from a whole number the smaller, the first being one already.
VN_FN VN_INLINE F closer(F closest, F v) { return _mm512_range_ps(closest, from_whole(v), 10); }
VN_FN VN_INLINE uint32_t near_whole(F v, float distance) {
    return _mm512_cmp_ps_mask(magnitude(from_whole(v)), set1(distance), _CMP_LT_OQ);
}

template <bool SIGNED> VN_FN VN_INLINE void store_codes8(uint8_t *to, const I c[4]) {
    I low = _mm512_packs_epi32(c[0], c[1]), high = _mm512_packs_epi32(c[2], c[3]);
    const I none = _mm512_set1_epi16(SIGNED ? 127 : 0);  // code of 0
    low = _mm512_add_epi16(low, none), high = _mm512_add_epi16(high, none);
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}

struct Levels {
    const float *levels;
    VN_FN explicit Levels(const float *l) : levels(l) {}
    VN_FN VN_INLINE void decode(const uint8_t *codes, float *out) const {
        for (int64_t i = 0; i < 4 * W; i += W)
            store(out + i, _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                                                   reinterpret_cast<const __m128i *>(codes + i))), levels, 4));
    }
};

}  // namespace avx512
}  // namespace veneer

#include "kernels.h"  // every operation once more, for these lanes

#undef VN_ISA
#undef VN_LOWER
#undef VN_FN
