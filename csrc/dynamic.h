// Dynamic 8-bit numbers: a block's largest magnitude, and each number's code relative to it: how many of the 255
// midpoints of neighboring levels are below x / absmax.  AdamW's moments are kept so, and, with double quantization,
// the absmax of 4-bit weights.

#ifndef VN_DYNAMIC_H
#define VN_DYNAMIC_H
#include "common.h"

namespace veneer {

constexpr int64_t BLOCK8 = 256;

inline float inverse8(float absmax) { return 1.f / at_least(absmax); }

// Absmax less their mean, to be encoded in blocks with an absmax of their own.
struct EncodeAbsmax {
    const veneer_map8 *map;
    const float *centered;
    int64_t n, block;
    uint8_t *codes;
    float *nested_absmax;
};

namespace scalar {

inline uint8_t code8(const veneer_map8 &map, float x) {
    int below = 0;
    for (int step = 128; step; step /= 2) below += (map.bounds[below + step - 1] < x) * step;
    return uint8_t(below);
}

// `count` numbers of one block; returns their absmax.
inline float encode8(const veneer_map8 &map, const float *x, int64_t count, uint8_t *codes) {
    float top = 0.f;
    for (int64_t i = 0; i < count; i++) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    const float inverse = inverse8(top);
    for (int64_t i = 0; i < count; i++) codes[i] = code8(map, x[i] * inverse);
    return top;
}

// Blocks [first, last); a block of zeros gets code 0, not that of 0, as bitsandbytes writes it.
inline void encode_absmax(const EncodeAbsmax &e, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        const int64_t begin = b * e.block, count = least(e.n - begin, e.block);
        e.nested_absmax[b] = encode8(*e.map, e.centered + begin, count, e.codes + begin);
        if (e.nested_absmax[b] == 0.f) std::memset(e.codes + begin, 0, size_t(count));
    }
}

}  // namespace scalar
}  // namespace veneer
#endif

#if defined(VN_ISA) && defined(VN_X86)  // with NEON the scalar functions run
namespace veneer {
namespace VN_ISA {

// The same codes without a search.  Within a decade the levels are evenly spaced, so the code is a line, rounded down,
// of |x| held within the decade; which decade is a count of 8 starts.  Where the line comes within DOUBT of a whole
// number, rounding might decide: a block that has such numbers is gone through again, and they are searched for.
// The line rises with |x| however it is rounded, so it is right everywhere if it is on both sides of every midpoint.
constexpr float DOUBT = 1.f / 32768;
constexpr int64_t ROUND = 4 * W;  // numbers whose codes are read and written at once

VN_FN VN_INLINE uint32_t doubtful(F line) { return near_whole(line, DOUBT); }

struct Coder {
    const veneer_map8 &map;
    Decades decades;
    Row slope, offset, most;

    VN_FN explicit Coder(const veneer_map8 &m)
        : map(m), decades(m.lines + 1), slope(row(m.lines + 16)), offset(row(m.lines + 32)), most(row(m.lines + 48)) {}

    template <bool SIGNED> VN_FN VN_INLINE F line(F scaled) const {
        const I decade = decades.of<SIGNED>(scaled);
        const F held = smaller(SIGNED ? magnitude(scaled) : scaled, look_up(most, decade));
        return fma(held, look_up(slope, decade), look_up(offset, decade));
    }

    template <bool SIGNED> VN_FN VN_INLINE F encode(const float *x, float inverse, uint8_t *codes, F closest) const {
        I whole[4];
        VN_UNROLL for (int q = 0; q < 4; q++) {
            const F scaled = mul(load(x + q * W), set1(inverse)), code = line<SIGNED>(scaled);
            closest = closer(closest, code);
            whole[q] = truncate(SIGNED ? with_sign(code, scaled) : code);
        }
        store_codes8<SIGNED>(codes, whole);
        return closest;
    }

    template <bool SIGNED> VN_FN inline void search(const float *x, float inverse, uint8_t *codes) const {
        for (int64_t i = 0; i < BLOCK8; i += W)
            for (uint32_t left = doubtful(line<SIGNED>(mul(load(x + i), set1(inverse)))); left; left &= left - 1) {
                const int64_t at = i + __builtin_ctz(left);
                codes[at] = scalar::code8(map, x[at] * inverse);
            }
    }
};

VN_FN VN_INLINE float absmax8(const float *x) {
    I top = zero_i();
    for (int64_t i = 0; i < BLOCK8; i += W) top = max_abs_bits(top, load(x + i));
    return float_of(max_of(top));
}

// The same for full blocks of 256 that are not all zeros; the scalar code takes the others.
VN_FN inline void encode_absmax(const EncodeAbsmax &e, int64_t first, int64_t last) {
    const Coder coder(*e.map);
    for (int64_t b = first; b < last; b++) {
        const float *x = e.centered + b * e.block;
        uint8_t *codes = e.codes + b * e.block;
        const bool whole = e.block == BLOCK8 && (b + 1) * e.block <= e.n;
        const float absmax = whole ? absmax8(x) : 0.f, inverse = inverse8(absmax);
        if (absmax == 0.f) {
            scalar::encode_absmax(e, b, b + 1);
            continue;
        }
        F closest = set1(0.5f);
        for (int64_t i = 0; i < BLOCK8; i += ROUND)
            closest = coder.encode<true>(x + i, inverse, codes + i, closest);
        if (doubtful(closest)) coder.search<true>(x, inverse, codes);
        e.nested_absmax[b] = absmax;
    }
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
