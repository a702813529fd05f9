// What 8-bit numbers need of x86's lanes beyond avx2.h, avx512.h and avx512bf16.h, and the kernels built on them.
#pragma once
#include "adamw8.h"  // each first without VN_ISA: its meaning; again below, for each set of lanes
#include "avx2.h"
#include "avx512.h"
#include "avx512bf16.h"
#include "dynamic.h"

#define VN_ISA avx2
#define VN_FN __attribute__((target("avx2,fma,f16c")))

namespace veneer {
namespace avx2 {

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

#include "dynamic.h"
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

#include "dynamic.h"
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
        F v[4];
        avx512bf16::look_up_levels(planes, avx512bf16::loadu(codes), v);
        for (int q = 0; q < 4; q++) store(out + 16 * q, v[q]);
    }
};

}  // namespace vbmi
}  // namespace veneer

#include "dynamic.h"
#include "adamw8.h"
#undef VN_ISA
#undef VN_FN
