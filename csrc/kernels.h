// The table of an instruction set: one function pointer per operation.  Each unit (avx2.h, avx512.h,
// avx512bf16_matvec.h, neon.h) copies the table of the next lower instruction set, VN_LOWER, and replaces what it has.
#include "adamw8.h"
#include "dequantize.h"
#include "matmul.h"
#include "matvec.h"
#include "quantize.h"
#include "segments.h"

#ifndef VN_KERNELS_H
#define VN_KERNELS_H

namespace veneer {

// The matrix products for one number type of x.  The last two take W's absmax in float32 and the phase that fills it.
struct Products {
    int64_t few;  // the most rows of x that `matvec` takes
    bool (*matvec)(const veneer_weight &, const void *x, int dtype, int64_t n, void *y, int threads);
    bool (*matmul)(const veneer_weight &, const float *, const Phase &, const void *x, int dtype, int64_t n, void *y,
                   int threads);
    bool (*matmul_backward)(const veneer_weight &, const float *, const Phase &, const void *dy, int dtype, int64_t n,
                            void *dx, int threads);
};

// [first, last) counts blocks; in dequantize, weights.
struct Kernels {
    int64_t (*quantize)(const Quantize &, int64_t first, int64_t last);
    void (*dequantize)(const veneer_weight &, const float *absmax, int64_t first, int64_t last, void *out, int dtype);
    void (*encode_absmax)(const EncodeAbsmax &, int64_t first, int64_t last);
    void (*decode_absmax)(const veneer_weight &, int64_t first, int64_t last, float *out);
    void (*adamw8)(const AdamW8 &, int64_t first, int64_t last);
    bool (*lora_segments)(const Segments &, int threads);
    Products f32, bf16;
};

namespace scalar {

constexpr Products PRODUCTS = {0, nullptr, matmul, matmul_backward};
constexpr Kernels KERNELS = {quantize, dequantize,         encode_absmax, decode_absmax,
                             adamw8,   lora_segments<dot>, PRODUCTS,      PRODUCTS};

}  // namespace scalar
}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

constexpr Kernels table() {
    Kernels k = VN_LOWER::KERNELS;
    k.quantize = quantize;
    k.dequantize = dequantize;
#ifdef VN_X86
    k.encode_absmax = encode_absmax;
    k.adamw8 = adamw8;
#endif
    k.lora_segments = lora_segments<dot>;
    k.f32 = k.bf16 = {FEW_LANES, over_rows<float, STEP, permute_x, matvec>, matmul<Product>, matmul_backward<Product>};
    return k;
}

constexpr Kernels KERNELS = table();

}  // namespace VN_ISA
}  // namespace veneer
#endif
