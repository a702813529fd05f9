// Quantize: x -> 4-bit codes and one absmax per block of G.
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
        const float divisor = at_least(top), inverse = 1.f / divisor;
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

}  // namespace scalar
}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

// The bits of the largest magnitude of x[begin ... end - 1], 2 W at a time: magnitudes rise with their bits, and so do
// those of 16 bits as they are.
VN_FN VN_INLINE uint32_t top_bits(const Quantize &q, int64_t begin, int64_t end) {
    I top = zero_i();
    if (q.dtype == VENEER_F32) {
        for (int64_t i = begin; i < end; i += W) top = max_abs_bits(top, load(static_cast<const float *>(q.x) + i));
        return max_of(top);
    }
    for (int64_t i = begin; i < end; i += 2 * W) top = max_abs_halves(top, static_cast<const uint16_t *>(q.x) + i);
    const uint16_t half = uint16_t(max_of_halves(top));
    return bits_of(q.dtype == VENEER_BF16 ? from_bf16(half) : from_f16(half));
}

constexpr int64_t GROUP = 32;  // blocks whose absmax are found before any is used: finding one takes long, many little

// absmax of `count` whole blocks, and what they are multiplied by; returns the first that is not finite, or -1.
VN_FN inline int64_t measure(const Quantize &q, int64_t first, int64_t count, float *inverse) {
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = top_bits(q, (first + i) * q.block, (first + i + 1) * q.block);
        if (bits >= 0x7f800000u) return first + i;
        q.absmax[first + i] = inverse[i] = float_of(bits);
    }
    for (int64_t i = 0; i < count; i++) inverse[i] = 1.f / at_least(inverse[i]);
    return -1;
}

// The same with W values at a time; the scalar code takes a short last block, and blocks not a multiple of 2 W.
// Nothing is clamped: what the rounding of 1 / absmax puts beyond 1 is beyond all bounds anyway.
VN_FN inline int64_t quantize(const Quantize &q, int64_t first, int64_t last) {
    const Intervals intervals = intervals_of(q.bounds, q.order);
    const int64_t whole = q.block % (2 * W) || !intervals.apart ? first : least(last, q.n / q.block);
    const int64_t group = q.block < 256 ? GROUP : 1;  // a group stays in cache
    float inverse[GROUP];
    for (int64_t b = first; b < whole; b += group) {
        const int64_t count = least(group, whole - b), bad = measure(q, b, count, inverse);
        if (bad >= 0) return bad;
        for (int64_t k = 0; k < count; k++)
            for (int64_t i = (b + k) * q.block; i < (b + k + 1) * q.block; i += 2 * W) {
                const F v0 = mul(load_any(q.x, q.dtype, i), set1(inverse[k]));
                const F v1 = mul(load_any(q.x, q.dtype, i + W), set1(inverse[k]));
                store_codes(q.codes + i / 2, interval(v0, intervals), interval(v1, intervals), intervals);
            }
    }
    return scalar::quantize(q, whole > first ? whole : first, last);
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
