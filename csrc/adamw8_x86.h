// What the optimizer's kernel needs of x86's lanes beyond avx2.h, avx512.h and avx512bf16.h, and its builds on them.
#pragma once
#include "adamw8.h"  // first without VN_ISA: its meaning; again below, for each set of lanes
#include "avx2.h"
#include "avx512.h"
#include "avx512bf16.h"

#define VN_ISA avx2
#define VN_FN __attribute__((target("avx2,fma,f16c")))

namespace veneer {
namespace avx2 {

VN_FN VN_INLINE F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
VN_FN VN_INLINE F divide(F a, F b) { return _mm256_div_ps(a, b); }
VN_FN VN_INLINE F root(F v) { return _mm256_sqrt_ps(v); }
VN_FN VN_INLINE F smaller(F a, F b) { return _mm256_min_ps(a, b); }
VN_FN VN_INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
VN_FN VN_INLINE F ceiling(F v) { return _mm256_ceil_ps(v); }
VN_FN VN_INLINE F magnitude(F v) { return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }

// The next larger number where `sign` is negative.
VN_FN VN_INLINE F next_if_negative(F v, F sign) {
    return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(v), _mm256_srai_epi32(_mm256_castps_si256(sign), 31)));
}

// How many of 8 rising starts are below each lane.
struct Decades {
    F start[8];
    VN_FN explicit Decades(const float *starts) {
        for (int i = 0; i < 8; i++) start[i] = set1(starts[i]);
    }
    VN_FN VN_INLINE I of(F v) const {
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

VN_FN VN_INLINE uint32_t near_whole(F v, float distance) {
    const F off = magnitude(subtract(v, _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(off, set1(distance), _CMP_LT_OQ)));
}

template <bool SIGNED> VN_FN VN_INLINE void store_codes8(uint8_t *to, F code, F sign) {
    I c = _mm256_cvtps_epi32(code);
    if (SIGNED) {
        const I minus = _mm256_srai_epi32(_mm256_castps_si256(sign), 31);
        c = _mm256_add_epi32(_mm256_sub_epi32(_mm256_xor_si256(c, minus), minus), _mm256_set1_epi32(127));
        c = _mm256_max_epi32(c, zero_i());
    }
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm_packus_epi16(words, words));
}

struct Levels {
    const float *levels;
    VN_FN explicit Levels(const float *l) : levels(l) {}
    VN_FN VN_INLINE void decode(const uint8_t *codes, float *out) const {
        for (int64_t i = 0; i < BLOCK8; i += W)
            store(out + i, _mm256_i32gather_ps(levels, _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                                                           reinterpret_cast<const __m128i *>(codes + i))), 4));
    }
};

}  // namespace avx2
}  // namespace veneer

#include "adamw8.h"
#undef VN_ISA
#undef VN_FN

#define VN_ISA avx512
#define VN_FN __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

namespace veneer {
namespace avx512 {

VN_FN VN_INLINE F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
VN_FN VN_INLINE F divide(F a, F b) { return _mm512_div_ps(a, b); }
VN_FN VN_INLINE F root(F v) { return _mm512_sqrt_ps(v); }
VN_FN VN_INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
VN_FN VN_INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
VN_FN VN_INLINE F ceiling(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
VN_FN VN_INLINE F magnitude(F v) { return _mm512_abs_ps(v); }

VN_FN VN_INLINE F next_if_negative(F v, F sign) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_srli_epi32(_mm512_castps_si512(sign), 31)));
}

// How many of 8 rising starts are below each lane, none of which is below 2^-31 or twice in one power of two: a table
// by exponent has how many are below all its numbers, and the one among them, if any.
struct Decades {
    F first, second;
    I below, below_second;
    VN_FN explicit Decades(const float *starts) {
        float start[32];
        int32_t count[32];
        for (int e = 0; e < 32; e++) {
            const float low = float_of(uint32_t(96 + e) << 23);
            int n = 0;
            while (n < 8 && starts[n] < low) n++;
            count[e] = n;
            start[e] = n < 8 && starts[n] < 2 * low ? starts[n] : float_of(0x7f800000u);
        }
        first = load(start), second = load(start + 16);
        below = _mm512_loadu_si512(count), below_second = _mm512_loadu_si512(count + 16);
    }
    VN_FN VN_INLINE I of(F v) const {
        const I exponent = _mm512_srli_epi32(_mm512_castps_si512(larger(v, set1(0x1p-31f))), 23);  // its low 5 bits count
        const F start = _mm512_permutex2var_ps(first, exponent, second);
        const I n = _mm512_permutex2var_epi32(below, exponent, below_second);
        return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(v, start, _CMP_GT_OQ), n, _mm512_set1_epi32(1));
    }
};

struct Row {
    F values;
};
VN_FN VN_INLINE Row row(const float *p) { return {load(p)}; }
VN_FN VN_INLINE F look_up(const Row &r, I at) { return _mm512_permutexvar_ps(at, r.values); }

VN_FN VN_INLINE uint32_t near_whole(F v, float distance) {
    const F off = magnitude(_mm512_reduce_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_cmp_ps_mask(off, set1(distance), _CMP_LT_OQ);
}

template <bool SIGNED> VN_FN VN_INLINE void store_codes8(uint8_t *to, F code, F sign) {
    if (SIGNED) code = _mm512_or_ps(code, _mm512_and_ps(sign, set1(-0.f)));
    I c = _mm512_cvtps_epi32(code);
    if (SIGNED) c = _mm512_max_epi32(_mm512_add_epi32(c, _mm512_set1_epi32(127)), zero_i());
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtepi32_epi8(c));
}

struct Levels {
    const float *levels;
    VN_FN explicit Levels(const float *l) : levels(l) {}
    VN_FN VN_INLINE void decode(const uint8_t *codes, float *out) const {
        for (int64_t i = 0; i < BLOCK8; i += W)
            store(out + i, _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                                                   reinterpret_cast<const __m128i *>(codes + i))), levels, 4));
    }
};

}  // namespace avx512
}  // namespace veneer

#include "adamw8.h"
#undef VN_ISA
#undef VN_FN

#define VN_ISA vbmi
#define VN_FN __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))

namespace veneer {
namespace vbmi {

using namespace avx512;
using avx512::F;
using avx512::I;
using avx512::W;

struct Levels {
    avx512bf16::Planes planes;
    VN_FN explicit Levels(const float *l) { avx512bf16::make_planes(l, planes); }
    VN_FN VN_INLINE void decode(const uint8_t *codes, float *out) const {
        for (int64_t i = 0; i < BLOCK8; i += 64) {
            F v[4];
            avx512bf16::look_up_levels(planes, avx512bf16::loadu(codes + i), v);
            for (int q = 0; q < 4; q++) store(out + i + 16 * q, v[q]);
        }
    }
};

}  // namespace vbmi
}  // namespace veneer

#include "adamw8.h"
#undef VN_ISA
#undef VN_FN
