// AdamW with 8-bit state: moments as codes of 256 levels and one absmax per block of 256, a step over one flat buffer.
//   m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr decay) p - size m / (sqrt(v) root + eps)      size = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
// Then m and v are quantized anew: absmax is their block's largest magnitude, the code of x is how many of the 255
// midpoints of neighboring levels are below x / absmax.

#ifndef VN_ADAMW8_H
#define VN_ADAMW8_H
#include "common.h"

namespace veneer {

constexpr int64_t BLOCK8 = 256;

struct AdamW8 {
    const veneer_adamw8 *how;
    float *values;
    const float *gradients;
    uint8_t *codes1, *codes2;
    float *absmax1, *absmax2;
};

inline float inverse8(float absmax) { return 1.f / (absmax > 1e-38f ? absmax : 1e-38f); }

namespace scalar {

inline uint8_t code8(const veneer_map8 &map, float x) {
    int below = 0;
    for (int step = 128; step; step /= 2) below += (map.bounds[below + step - 1] < x) * step;
    return uint8_t(below);
}

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

inline float encode8(const veneer_map8 &map, const float *x, uint8_t *codes) {
    float top = 0.f;
    for (int64_t i = 0; i < BLOCK8; i++) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    const float inverse = inverse8(top);
    for (int64_t i = 0; i < BLOCK8; i++) codes[i] = code8(map, x[i] * inverse);
    return top;
}

// Blocks [first, last).
inline void adamw8(const AdamW8 &a, int64_t first, int64_t last) {
    float m[BLOCK8], v[BLOCK8];
    for (int64_t b = first; b < last; b++) {
        adamw8_block(a, b, m, v);
        a.absmax1[b] = encode8(a.how->map1, m, a.codes1 + b * BLOCK8);
        a.absmax2[b] = encode8(a.how->map2, v, a.codes2 + b * BLOCK8);
    }
}

}  // namespace scalar
}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

// The same codes without a search.  Within a decade the levels are evenly spaced, so the code is a line, rounded up and
// held within the decade; which decade is a count of 8 starts.  Where the line comes within DOUBT of a whole number,
// rounding might decide: those lanes are searched for.
constexpr float DOUBT = 1.f / 4096;

struct Coder {
    const veneer_map8 &map;
    Decades decades;
    Row slope, offset, most;

    VN_FN explicit Coder(const veneer_map8 &m)
        : map(m), decades(m.lines + 1), slope(row(m.lines + 16)), offset(row(m.lines + 32)), most(row(m.lines + 48)) {}

    template <bool SIGNED> VN_FN inline void encode(const float *x, float absmax, uint8_t *codes) const {
        const float inverse = inverse8(absmax);
        const F by = set1(inverse);
        uint32_t doubtful[BLOCK8 / W];
        for (int64_t i = 0; i < BLOCK8; i += W) {
            const F scaled = mul(load(x + i), by), t = SIGNED ? magnitude(scaled) : scaled;
            // a tie goes to the lower level, on either side of 0
            const I decade = decades.of(SIGNED ? next_if_negative(t, scaled) : t);
            const F line = add(mul(t, look_up(slope, decade)), look_up(offset, decade));
            const F code = smaller(ceiling(line), look_up(most, decade));
            store_codes8<SIGNED>(codes + i, code, scaled);
            doubtful[i / W] = near_whole(line, DOUBT);
        }
        for (int64_t i = 0; i < BLOCK8; i += W)
            for (uint32_t left = doubtful[i / W]; left; left &= left - 1) {
                const int64_t at = i + __builtin_ctz(left);
                codes[at] = scalar::code8(map, x[at] * inverse);
            }
    }
};

VN_FN inline void adamw8(const AdamW8 &a, int64_t first, int64_t last) {
    const veneer_adamw8 h = *a.how;  // a copy: nothing written here is part of it
    const Levels levels1(h.map1.levels), levels2(h.map2.levels);
    const Coder coder1(h.map1), coder2(h.map2);
    alignas(64) float m[BLOCK8], v[BLOCK8];
    for (int64_t b = first; b < last; b++) {
        const int64_t at = b * BLOCK8;
        levels1.decode(a.codes1 + at, m);
        levels2.decode(a.codes2 + at, v);
        const F absmax1 = set1(a.absmax1[b]), absmax2 = set1(a.absmax2[b]);
        I top1 = zero_i(), top2 = zero_i();
        for (int64_t i = 0; i < BLOCK8; i += W) {
            const F g = load(a.gradients + at + i);
            const F m1 = add(mul(mul(load(m + i), absmax1), set1(h.beta1)), mul(g, set1(h.rest1)));
            const F v1 = add(mul(mul(load(v + i), absmax2), set1(h.beta2)), mul(mul(g, set1(h.rest2)), g));
            const F change = divide(m1, add(mul(root(v1), set1(h.root)), set1(h.eps)));
            store(a.values + at + i, subtract(mul(load(a.values + at + i), set1(h.keep)), mul(change, set1(h.size))));
            store(m + i, m1);
            store(v + i, v1);
            top1 = max_abs_bits(top1, m1);
            top2 = max_abs_bits(top2, v1);
        }
        a.absmax1[b] = float_of(max_of(top1));
        a.absmax2[b] = float_of(max_of(top2));
        coder1.encode<true>(m, a.absmax1[b], a.codes1 + at);
        coder2.encode<false>(v, a.absmax2[b], a.codes2 + at);
    }
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
