// Batched LoRA: rows that use different adapters.  Rows with one adapter stand together in a segment.
//   y[n] = scale[s] * B[s] (A[s] x[n])   for n in [starts[i], starts[i + 1]), s = slots[i];   y[n] = 0 where s is -1
// Source: Punica, arXiv:2310.18547 (segmented gather of matrix-vector products).

#ifndef VN_SEGMENTS_H
#define VN_SEGMENTS_H
#include "common.h"

namespace veneer {

struct Segments {
    int64_t n, d, o, r;
    const float *x, *a, *b, *scale;  // x (N, D) as float32
    const int64_t *starts, *slots;
    int64_t count;
    float *t;  // (N, R): A x, times the scale
    void *y;
    int dtype;
};

namespace scalar {

inline float dot(const float *a, const float *b, int64_t n) {
    float s = 0.f;
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

}  // namespace scalar

// Row j of A for every row of segment i, then row j of B; with the dot product of an instruction set.
template <float (*DOT)(const float *, const float *, int64_t)> void shrink(const Segments &g, int64_t i, int64_t j) {
    const int64_t s = g.slots[i];
    for (int64_t n = g.starts[i]; n < g.starts[i + 1]; n++)
        g.t[n * g.r + j] = s < 0 ? 0.f : g.scale[s] * DOT(g.a + (s * g.r + j) * g.d, g.x + n * g.d, g.d);
}

template <float (*DOT)(const float *, const float *, int64_t)> void expand(const Segments &g, int64_t i, int64_t j) {
    const int64_t s = g.slots[i];
    for (int64_t n = g.starts[i]; n < g.starts[i + 1]; n++) {
        const float v = s < 0 ? 0.f : DOT(g.b + (s * g.o + j) * g.r, g.t + n * g.r, g.r);
        store_float(g.y, g.dtype, n * g.o + j, v);
    }
}

template <float (*DOT)(const float *, const float *, int64_t)> bool lora_segments(const Segments &g, int threads) {
    constexpr int64_t CHUNK = 256;
    const int64_t chunks = ceil_div(g.o, CHUNK);
    const auto in = [&g](int64_t k) {
        shrink<DOT>(g, k / g.r, k % g.r);
        return true;
    };
    const auto out = [&g, chunks](int64_t k) {
        const int64_t j0 = k % chunks * CHUNK;
        for (int64_t j = j0; j < least(g.o, j0 + CHUNK); j++) expand<DOT>(g, k / chunks, j);
        return true;
    };
    return run_phases(threads, {phase(g.count * g.r, in), phase(g.count * chunks, out)});
}

}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

VN_FN inline float dot(const float *a, const float *b, int64_t n) {
    F s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        s0 = fma(load(a + i), load(b + i), s0);
        s1 = fma(load(a + i + W), load(b + i + W), s1);
        s2 = fma(load(a + i + 2 * W), load(b + i + 2 * W), s2);
        s3 = fma(load(a + i + 3 * W), load(b + i + 3 * W), s3);
    }
    for (; i + W <= n; i += W) s0 = fma(load(a + i), load(b + i), s0);
    float s = sum(add(add(s0, s1), add(s2, s3)));
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
