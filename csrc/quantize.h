// Quantize: x -> 4-bit codes and one absmax per block of G; and absmax -> 8-bit codes (double quantization).
// Bit-identical to bitsandbytes 0.50 on the CPU: in whole blocks v = x * (1 / max(absmax, 1e-38)); in a last, shorter
// block v = x / absmax with an absmax of at least 1e-38, which is also what is stored.

#ifndef VN_QUANTIZE_H
#define VN_QUANTIZE_H
#include "common.h"

namespace veneer {

struct Quantize {
    const void *x;
    int dtype;
    int64_t n, block;
    const float *bounds;   // 15, rising: the code of v is order[how many bounds are below v]
    const uint8_t *order;  // 16
    uint8_t *codes;
    float *absmax;
};

constexpr float LEAST_ABSMAX = 1e-38f;

namespace scalar {

inline int code_of(const Quantize &q, float v) {
    v = v < -1.f ? -1.f : v > 1.f ? 1.f : v;
    int below = 0;
    for (int i = 0; i < 15; i++) below += q.bounds[i] < v;
    return q.order[below];
}

// Quantize blocks [first, last).  Returns the first block with a NaN or an infinity, or -1.
inline int64_t quantize(const Quantize &q, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        const int64_t begin = b * q.block, end = least(q.n, begin + q.block);
        const bool whole = end - begin == q.block;
        float top = 0.f;
        for (int64_t i = begin; i < end; i++) {
            const float a = std::fabs(load_as_float(q.x, q.dtype, i));
            if (!(a <= 3.4028234663852886e38f)) return b;
            top = a > top ? a : top;
        }
        const float divisor = top > LEAST_ABSMAX ? top : LEAST_ABSMAX, inverse = 1.f / divisor;
        q.absmax[b] = whole ? top : divisor;
        for (int64_t i = begin; i < end; i += 2) {
            const float v0 = load_as_float(q.x, q.dtype, i);
            const float v1 = i + 1 < end ? load_as_float(q.x, q.dtype, i + 1) : 0.f;
            const int c0 = code_of(q, whole ? v0 * inverse : v0 / divisor);
            const int c1 = code_of(q, whole ? v1 * inverse : v1 / divisor);
            q.codes[i / 2] = uint8_t(c0 << 4 | c1);
        }
    }
    return -1;
}

// `count` values of at most LANES, scaled -> the nearest of 256 rising levels; a tie goes to the lower.  Side by side
// and without branches, so that the searches overlap.
constexpr int64_t LANES = 16;

inline void nearest_levels(const float *c, int64_t count, float inverse, const float *levels, uint8_t *codes) {
    float v[LANES] = {};
    int right[LANES] = {};  // the first level that is not below v
    for (int64_t i = 0; i < count; i++) {
        const float scaled = c[i] * inverse;
        v[i] = scaled < -1.f ? -1.f : scaled > 1.f ? 1.f : scaled;
    }
    for (int step = 128; step; step /= 2)
        for (int64_t i = 0; i < LANES; i++) right[i] += (levels[right[i] + step - 1] < v[i]) * step;
    for (int64_t i = 0; i < count; i++) {
        const int left = right[i] - (right[i] > 0);
        const bool upper = std::fabs(levels[right[i]] - v[i]) < std::fabs(v[i] - levels[left]);
        codes[i] = uint8_t(upper ? right[i] : left);
    }
}

// Nested blocks [first, last) of centered absmax -> codes and their own absmax; a block of zeros gets code 0.
inline void encode_absmax(const float *c, int64_t n, int64_t nested_block, const float *levels, uint8_t *codes,
                          float *nested_absmax, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        const int64_t begin = b * nested_block, end = least(n, begin + nested_block);
        float top = 0.f;
        for (int64_t i = begin; i < end; i++) top = std::fabs(c[i]) > top ? std::fabs(c[i]) : top;
        nested_absmax[b] = top;
        if (top == 0.f) {
            std::memset(codes + begin, 0, size_t(end - begin));
            continue;
        }
        const float inverse = 1.f / top;
        for (int64_t i = begin; i < end; i += LANES)
            nearest_levels(c + i, least(LANES, end - i), inverse, levels, codes + i);
    }
}

}  // namespace scalar
}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

// The same with W values at a time; a short last block and blocks of no multiple of 2 W are left to the meaning.
// Nothing is clamped: what the rounding of 1 / absmax puts beyond 1 is beyond all bounds anyway.
VN_FN inline int64_t quantize(const Quantize &q, int64_t first, int64_t last) {
    const Intervals intervals = intervals_of(q.bounds, q.order);
    for (int64_t b = first; b < last; b++) {
        const int64_t begin = b * q.block, end = begin + q.block;
        if (end > q.n || q.block % (2 * W)) {
            if (scalar::quantize(q, b, b + 1) >= 0) return b;
            continue;
        }
        I top = zero_i();
        for (int64_t i = begin; i < end; i += W) top = max_abs_bits(top, load_any(q.x, q.dtype, i));
        const uint32_t bits = max_of(top);
        if (bits >= 0x7f800000u) return b;
        const float absmax = float_of(bits);
        q.absmax[b] = absmax;
        const F inverse = set1(1.f / (absmax > LEAST_ABSMAX ? absmax : LEAST_ABSMAX));
        for (int64_t i = begin; i < end; i += 2 * W) {
            const F v0 = mul(load_any(q.x, q.dtype, i), inverse), v1 = mul(load_any(q.x, q.dtype, i + W), inverse);
            store_codes(q.codes + i / 2, interval(v0, intervals), interval(v1, intervals), intervals);
        }
    }
    return -1;
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
