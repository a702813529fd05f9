// Eight float32 lanes of AVX2 with FMA and F16C (x86-64-v3), and every kernel built on them.
#pragma once
#include "kernels.h"

#define VN_ISA avx2
#define VN_LOWER scalar
#define VN_FN __attribute__((target("avx2,fma,f16c")))

namespace veneer {
namespace avx2 {

constexpr int W = 8;
constexpr int NV = 2;  // vectors of a tile of the matrix product: 6 x 2 accumulators of 16 registers
typedef __m256 F;
typedef __m256i I;

VN_FN VN_INLINE F load(const float *p) { return _mm256_loadu_ps(p); }
VN_FN VN_INLINE void store(float *p, F v) { _mm256_storeu_ps(p, v); }
VN_FN VN_INLINE F set1(float v) { return _mm256_set1_ps(v); }
VN_FN VN_INLINE F zero() { return _mm256_setzero_ps(); }
VN_FN VN_INLINE I zero_i() { return _mm256_setzero_si256(); }
VN_FN VN_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
VN_FN VN_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
VN_FN VN_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

VN_FN VN_INLINE float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

VN_FN VN_INLINE void transpose(F r[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

VN_FN VN_INLINE F load_half(const uint16_t *p, int dtype) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    if (dtype == VENEER_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

VN_FN VN_INLINE F load_any(const void *x, int dtype, int64_t i) {
    return dtype == VENEER_F32 ? load(static_cast<const float *>(x) + i)
                               : load_half(static_cast<const uint16_t *>(x) + i, dtype);
}

// float32 lanes -> the bits of bfloat16 in the upper half of each lane, the lower half cleared.
VN_FN VN_INLINE I round_bf16(F v) {
    const I u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const I r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_and_si256(r, _mm256_set1_epi32(int(0xffff0000u)));
}

VN_FN VN_INLINE void store_half(uint16_t *p, F v, int dtype) {
    __m128i h;
    if (dtype == VENEER_F16) {
        h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        const I u = _mm256_srli_epi32(round_bf16(v), 16);
        h = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), h);
}

// 16 levels times absmax, rounded to dtype: what each code stands for in this block.
struct Table {
    F low, high;  // codes 0-7 and 8-15
};

VN_FN VN_INLINE F rounded(F v, int dtype) {
    if (dtype == VENEER_F32) return v;
    if (dtype == VENEER_BF16) return _mm256_castsi256_ps(round_bf16(v));
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

VN_FN VN_INLINE Table scaled_table(const float *levels, float absmax, int dtype) {
    const F a = set1(absmax);
    return {rounded(mul(load(levels), a), dtype), rounded(mul(load(levels + 8), a), dtype)};
}

// The low four bits of each lane -> its value; the other bits of `code` may be anything.
VN_FN VN_INLINE F look_up(const Table &t, I code) {
    const F low = _mm256_permutevar8x32_ps(t.low, code), high = _mm256_permutevar8x32_ps(t.high, code);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}

VN_FN VN_INLINE I load_words(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const I *>(p)); }
// BLOCKS numbers, each in its share of the lanes.
template <int BLOCKS> VN_FN VN_INLINE F spread(const float *p) {
    return BLOCKS == 1 ? set1(p[0]) : _mm256_blend_ps(set1(p[0]), set1(p[BLOCKS - 1]), 0xf0);
}
template <int BITS> VN_FN VN_INLINE I shift_right(I v) { return _mm256_srli_epi32(v, BITS); }

// 8 bytes -> 16 weights in order.
VN_FN VN_INLINE void unpack(const uint8_t *codes, const Table &t, F &first, F &second) {
    const I bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes)));
    const F even = look_up(t, _mm256_srli_epi32(bytes, 4)), odd = look_up(t, bytes);
    const F a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    first = _mm256_permute2f128_ps(a, b, 0x20);
    second = _mm256_permute2f128_ps(a, b, 0x31);
}

VN_FN VN_INLINE I max_abs_bits(I top, F v) {
    return _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
}

VN_FN VN_INLINE uint32_t max_of(I v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(m));
}

// 16 numbers of 16 bits -> the largest of their magnitudes, as bits, in each 16 bits of `top`.
VN_FN VN_INLINE I max_abs_halves(I top, const uint16_t *p) {
    const I v = _mm256_loadu_si256(reinterpret_cast<const I *>(p));
    return _mm256_max_epu16(top, _mm256_and_si256(v, _mm256_set1_epi16(0x7fff)));
}

VN_FN VN_INLINE uint32_t max_of_halves(I v) {
    return max_of(_mm256_max_epu32(_mm256_srli_epi32(v, 16), _mm256_and_si256(v, _mm256_set1_epi32(0xffff))));
}

// The bounds by the steps of a binary search: 1, 2, 4 and 8 of them.
struct Intervals {
    F step[4];
    __m128i order;
    static constexpr bool apart = true;  // for any bounds
};

VN_FN VN_INLINE Intervals intervals_of(const float *bounds, const uint8_t *order) {
    Intervals q;
    for (int s = 0; s < 4; s++) {
        float at[8] = {};
        for (int k = 0; k < 1 << s; k++) at[k] = bounds[(2 * k + 1) * (8 >> s) - 1];
        q.step[s] = load(at);
    }
    q.order = _mm_loadu_si128(reinterpret_cast<const __m128i *>(order));
    return q;
}

// How many bounds are below each lane.
VN_FN VN_INLINE I interval(F v, const Intervals &q) {
    I below = zero_i();
    for (const F &step : q.step) {
        const F bound = _mm256_permutevar8x32_ps(step, below);
        below = _mm256_sub_epi32(_mm256_add_epi32(below, below),
                                 _mm256_castps_si256(_mm256_cmp_ps(bound, v, _CMP_LT_OQ)));
    }
    return below;
}

// Two vectors of intervals -> 8 bytes of codes.
VN_FN VN_INLINE void store_codes(uint8_t *to, I a, I b, const Intervals &q) {
    const I words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i codes = _mm_shuffle_epi8(q.order, bytes);
    const __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110));  // 16 * even + odd
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm_packus_epi16(pairs, pairs));
}

// ---- 8-bit numbers

VN_FN VN_INLINE F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
VN_FN VN_INLINE F divide(F a, F b) { return _mm256_div_ps(a, b); }
VN_FN VN_INLINE F root(F v) { return _mm256_sqrt_ps(v); }
VN_FN VN_INLINE F smaller(F a, F b) { return _mm256_min_ps(a, b); }
VN_FN VN_INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
VN_FN VN_INLINE I truncate(F v) { return _mm256_cvttps_epi32(v); }
VN_FN VN_INLINE F magnitude(F v) { return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }

VN_FN VN_INLINE F with_sign(F v, F sign) { return _mm256_or_ps(v, _mm256_and_ps(sign, set1(-0.f))); }

// How many of 8 rising starts are below each lane's magnitude, or at it where the lane is negative: a tie goes to the
// lower level, on either side of 0.
struct Decades {
    F start[8];
    VN_FN explicit Decades(const float *starts) {
        for (int i = 0; i < 8; i++) start[i] = set1(starts[i]);
    }
    template <bool SIGNED> VN_FN VN_INLINE I of(F v) const {
        if (SIGNED)  // the next larger magnitude where it is negative
            v = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(magnitude(v)),
                                                     _mm256_srai_epi32(_mm256_castps_si256(v), 31)));
        I below = zero_i();
        for (const F &s : start)
            below = _mm256_sub_epi32(below, _mm256_castps_si256(_mm256_cmp_ps(v, s, _CMP_GT_OQ)));
        return below;
    }
};

// 16 numbers, looked up by lanes of 0 ... 15.
struct Row {
    F low, high;
};
VN_FN VN_INLINE Row row(const float *p) { return {load(p), load(p + 8)}; }
VN_FN VN_INLINE F look_up(const Row &r, I at) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(r.low, at), _mm256_permutevar8x32_ps(r.high, at),
                            _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}

VN_FN VN_INLINE F from_whole(F v) {
    return magnitude(subtract(v, _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
}
// Of two lanes' distances from a whole number the smaller, the first being one already.
VN_FN VN_INLINE F closer(F closest, F v) { return smaller(closest, from_whole(v)); }
VN_FN VN_INLINE uint32_t near_whole(F v, float distance) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(from_whole(v), set1(distance), _CMP_LT_OQ)));
}

template <bool SIGNED> VN_FN VN_INLINE void store_codes8(uint8_t *to, const I c[4]) {
    I low = _mm256_packs_epi32(c[0], c[1]), high = _mm256_packs_epi32(c[2], c[3]);
    const I none = _mm256_set1_epi16(SIGNED ? 127 : 0);  // code of 0
    low = _mm256_add_epi16(low, none), high = _mm256_add_epi16(high, none);
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<I *>(to), _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
}

struct Levels {
    const float *levels;
    VN_FN explicit Levels(const float *l) : levels(l) {}
    VN_FN VN_INLINE void decode(const uint8_t *codes, float *out) const {
        for (int64_t i = 0; i < 4 * W; i += W)
            store(out + i, _mm256_i32gather_ps(levels, _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                                                           reinterpret_cast<const __m128i *>(codes + i))), 4));
    }
};

}  // namespace avx2
}  // namespace veneer

#include "kernels.h"  // every operation once more, for these lanes

#undef VN_ISA
#undef VN_LOWER
#undef VN_FN
