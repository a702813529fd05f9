// Four float32 lanes of AArch64's NEON, and every kernel built on them.
#pragma once
#include "kernels.h"

#define VN_ISA neon
#define VN_LOWER scalar
#define VN_FN

namespace veneer {
namespace neon {

constexpr int W = 4;
constexpr int NV = 4;  // vectors of a tile of the matrix product: 6 x 4 accumulators of 32 registers
typedef float32x4_t F;
typedef uint32x4_t I;

VN_INLINE F load(const float *p) { return vld1q_f32(p); }
VN_INLINE void store(float *p, F v) { vst1q_f32(p, v); }
VN_INLINE F set1(float v) { return vdupq_n_f32(v); }
VN_INLINE F zero() { return vdupq_n_f32(0.f); }
VN_INLINE I zero_i() { return vdupq_n_u32(0); }
VN_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
VN_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
VN_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
VN_INLINE float sum(F v) { return vaddvq_f32(v); }

VN_INLINE void transpose(F r[4]) {
    const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

VN_INLINE F load_half(const uint16_t *p, int dtype) {
    const uint16x4_t h = vld1_u16(p);
    if (dtype == VENEER_F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

VN_INLINE F load_any(const void *x, int dtype, int64_t i) {
    return dtype == VENEER_F32 ? load(static_cast<const float *>(x) + i)
                               : load_half(static_cast<const uint16_t *>(x) + i, dtype);
}

// float32 lanes -> the bits of bfloat16 in the upper half of each lane, the lower half of no meaning.
VN_INLINE I round_bf16(F v) {
    const I u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
}

VN_INLINE void store_half(uint16_t *p, F v, int dtype) {
    vst1_u16(p, dtype == VENEER_F16 ? vreinterpret_u16_f16(vcvt_f16_f32(v)) : vshrn_n_u32(round_bf16(v), 16));
}

// 16 levels times absmax, rounded to dtype, as 64 bytes: what each code stands for in this block.
struct Table {
    uint8x16x4_t bytes;
};

VN_INLINE Table scaled_table(const float *levels, float absmax, int dtype) {
    Table t;
    for (int i = 0; i < 4; i++) {
        F v = mul(load(levels + 4 * i), set1(absmax));
        if (dtype == VENEER_F16) v = vcvt_f32_f16(vcvt_f16_f32(v));
        if (dtype == VENEER_BF16) v = vreinterpretq_f32_u32(vandq_u32(round_bf16(v), vdupq_n_u32(0xffff0000u)));
        t.bytes.val[i] = vreinterpretq_u8_f32(v);
    }
    return t;
}

VN_INLINE F look_up(const Table &t, uint8x16_t code_of_each_byte) {
    static const uint8_t within[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const uint8x16_t index = vorrq_u8(vshlq_n_u8(code_of_each_byte, 2), vld1q_u8(within));
    return vreinterpretq_f32_u8(vqtbl4q_u8(t.bytes, index));
}

// The low four bits of each lane -> its value.
VN_INLINE F look_up(const Table &t, I code) {
    const I index = vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(code, vdupq_n_u32(15)), 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(t.bytes, vreinterpretq_u8_u32(index)));
}

VN_INLINE I load_words(const uint8_t *p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
template <int BLOCKS> VN_INLINE F spread(const float *p) { return set1(p[0]); }  // a step is no longer than a block
template <int BITS> VN_INLINE I shift_right(I v) { return vshlq_u32(v, vdupq_n_s32(-BITS)); }

// 4 bytes -> 8 weights in order.
VN_INLINE void unpack(const uint8_t *codes, const Table &t, F &first, F &second) {
    static const uint8_t spread[32] = {0, 0, 0, 0, 4, 4, 4, 4, 1, 1, 1, 1, 5, 5, 5, 5,
                                       2, 2, 2, 2, 6, 6, 6, 6, 3, 3, 3, 3, 7, 7, 7, 7};
    uint32_t word;
    std::memcpy(&word, codes, 4);
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
    const uint8x8_t high = vshr_n_u8(bytes, 4), low = vand_u8(bytes, vdup_n_u8(15));
    const uint8x16_t nibbles = vcombine_u8(vext_u8(high, high, 4), vdup_n_u8(0));
    const uint8x16_t both = vreinterpretq_u8_u32(vsetq_lane_u32(vget_lane_u32(vreinterpret_u32_u8(low), 0),
                                                                vreinterpretq_u32_u8(nibbles), 1));
    first = look_up(t, vqtbl1q_u8(both, vld1q_u8(spread)));
    second = look_up(t, vqtbl1q_u8(both, vld1q_u8(spread + 16)));
}

VN_INLINE I max_abs_bits(I top, F v) {
    return vmaxq_u32(top, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffffu)));
}

VN_INLINE uint32_t max_of(I v) { return vmaxvq_u32(v); }

// 8 numbers of 16 bits -> the largest of their magnitudes, as bits, in each 16 bits of `top`.
VN_INLINE I max_abs_halves(I top, const uint16_t *p) {
    return vreinterpretq_u32_u16(vmaxq_u16(vreinterpretq_u16_u32(top), vandq_u16(vld1q_u16(p), vdupq_n_u16(0x7fff))));
}

VN_INLINE uint32_t max_of_halves(I v) { return vmaxvq_u16(vreinterpretq_u16_u32(v)); }

struct Intervals {
    const float *bounds;
    uint8x16_t order;
    static constexpr bool apart = true;  // for any bounds
};

VN_INLINE Intervals intervals_of(const float *bounds, const uint8_t *order) { return {bounds, vld1q_u8(order)}; }

// How many bounds are below each lane.
VN_INLINE I interval(F v, const Intervals &q) {
    I below = zero_i();
    for (int i = 0; i < 15; i++) below = vsubq_u32(below, vcltq_f32(set1(q.bounds[i]), v));
    return below;
}

// Two vectors of intervals -> 4 bytes of codes.
VN_INLINE void store_codes(uint8_t *to, I a, I b, const Intervals &q) {
    const uint8x8_t below = vmovn_u16(vcombine_u16(vmovn_u32(a), vmovn_u32(b)));
    const uint16x4_t codes = vreinterpret_u16_u8(vqtbl1_u8(q.order, below));  // even | odd << 8
    const uint16x4_t pairs = vorr_u16(vshl_n_u16(codes, 4), vshr_n_u16(codes, 8));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(pairs, pairs));
    const uint32_t word = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    std::memcpy(to, &word, 4);
}

}  // namespace neon
}  // namespace veneer

#include "kernels.h"  // every operation once more, for these lanes

#undef VN_ISA
#undef VN_LOWER
#undef VN_FN
