// AdamW with 8-bit state: moments as codes of 256 levels and one absmax per block of 256, a step over one flat buffer.
//   m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr decay) p - size m / (sqrt(v) root + eps)      size = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
// Then m and v are quantized anew: absmax is their block's largest magnitude, the code of x is how many of the 255
// midpoints of neighboring levels are below x / absmax.

#include "dynamic.h"  // outside the guard: its lanes come before those below

#ifndef VN_ADAMW8_H
#define VN_ADAMW8_H

namespace veneer {

struct AdamW8 {
    const veneer_adamw8 *how;
    float *values;
    const float *gradients;
    uint8_t *codes1, *codes2;
    float *absmax1, *absmax2;
};

namespace scalar {

// The step of one block's values; m and v, each in 256 numbers, are decoded and brought up to date.
inline void adamw8_block(const AdamW8 &a, int64_t b, float *m, float *v) {
    const veneer_adamw8 &h = *a.how;
    const float rest1 = h.rest1, rest2 = h.rest2;
    const int64_t at = b * BLOCK8;
    for (int64_t i = 0; i < BLOCK8; i++) {
        const float g = a.gradients[at + i];
        m[i] = h.map1.levels[a.codes1[at + i]] * a.absmax1[b] * h.beta1 + g * rest1;
        v[i] = h.map2.levels[a.codes2[at + i]] * a.absmax2[b] * h.beta2 + g * rest2 * g;
        const float change = m[i] / (std::sqrt(v[i]) * h.root + h.eps);
        a.values[at + i] = a.values[at + i] * h.keep - change * h.size;
    }
}

// Blocks [first, last).
inline void adamw8(const AdamW8 &a, int64_t first, int64_t last) {
    float m[BLOCK8], v[BLOCK8];
    for (int64_t b = first; b < last; b++) {
        adamw8_block(a, b, m, v);
        a.absmax1[b] = encode8(a.how->map1, m, BLOCK8, a.codes1 + b * BLOCK8);
        a.absmax2[b] = encode8(a.how->map2, v, BLOCK8, a.codes2 + b * BLOCK8);
    }
}

}  // namespace scalar
}  // namespace veneer
#endif

#if defined(VN_ISA) && defined(VN_X86)  // with NEON the scalar functions run
namespace veneer {
namespace VN_ISA {

// The moments of a block between their step and their encoding.
struct Fresh {
    alignas(64) float m[BLOCK8], v[BLOCK8];
    I top1, top2;
    F closest1, closest2;
    float inverse1, inverse2;
};

struct Stepper {
    const AdamW8 a;
    const veneer_adamw8 h;  // a copy: nothing written here is part of it
    const Levels levels1, levels2;
    const Coder coder1, coder2;

    VN_FN explicit Stepper(const AdamW8 &given)
        : a(given), h(*given.how), levels1(h.map1.levels), levels2(h.map2.levels), coder1(given.how->map1),
          coder2(given.how->map2) {}

    // Numbers i ... i + ROUND - 1 of block b.
    VN_FN VN_INLINE void update(int64_t b, int64_t i, Fresh &f) const {
        const int64_t at = b * BLOCK8 + i;
        levels1.decode(a.codes1 + at, f.m + i);
        levels2.decode(a.codes2 + at, f.v + i);
        VN_UNROLL for (int q = 0; q < 4; q++) {
            float *m = f.m + i + q * W, *v = f.v + i + q * W, *values = a.values + at + q * W;
            const F g = load(a.gradients + at + q * W);
            const F m1 = add(mul(mul(load(m), set1(a.absmax1[b])), set1(h.beta1)), mul(g, set1(h.rest1)));
            const F v1 = add(mul(mul(load(v), set1(a.absmax2[b])), set1(h.beta2)), mul(mul(g, set1(h.rest2)), g));
            const F change = divide(m1, add(mul(root(v1), set1(h.root)), set1(h.eps)));
            store(values, subtract(mul(load(values), set1(h.keep)), mul(change, set1(h.size))));
            store(m, m1);
            store(v, v1);
            f.top1 = max_abs_bits(f.top1, m1);
            f.top2 = max_abs_bits(f.top2, v1);
        }
    }

    VN_FN VN_INLINE void measure(int64_t b, Fresh &f) const {
        a.absmax1[b] = float_of(max_of(f.top1));
        a.absmax2[b] = float_of(max_of(f.top2));
        f.inverse1 = inverse8(a.absmax1[b]);
        f.inverse2 = inverse8(a.absmax2[b]);
    }

    VN_FN VN_INLINE void encode(int64_t b, int64_t i, Fresh &f) const {
        const int64_t at = b * BLOCK8 + i;
        f.closest1 = coder1.encode<true>(f.m + i, f.inverse1, a.codes1 + at, f.closest1);
        f.closest2 = coder2.encode<false>(f.v + i, f.inverse2, a.codes2 + at, f.closest2);
    }

    VN_FN VN_INLINE void search(int64_t b, const Fresh &f) const {
        if (doubtful(f.closest1)) coder1.search<true>(f.m, f.inverse1, a.codes1 + b * BLOCK8);
        if (doubtful(f.closest2)) coder2.search<false>(f.v, f.inverse2, a.codes2 + b * BLOCK8);
    }
};

// A block is updated while the one before it is encoded: the first waits for the divider, the second does not need it.
VN_FN inline void adamw8(const AdamW8 &a, int64_t first, int64_t last) {
    const Stepper s(a);
    Fresh fresh[2];
    for (int64_t b = first; b <= last; b++) {
        Fresh &now = fresh[b & 1], &before = fresh[~b & 1];
        now.top1 = now.top2 = zero_i();
        now.closest1 = now.closest2 = set1(0.5f);
        if (b == first)
            for (int64_t i = 0; i < BLOCK8; i += ROUND) s.update(b, i, now);
        else if (b < last)
            for (int64_t i = 0; i < BLOCK8; i += ROUND) {
                s.update(b, i, now);
                s.encode(b - 1, i, before);
            }
        else
            for (int64_t i = 0; i < BLOCK8; i += ROUND) s.encode(b - 1, i, before);
        if (b > first) s.search(b - 1, before);
        if (b < last) s.measure(b, now);
    }
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
