// The C ABI of veneer's CPU kernels: 4-bit weights with one absmax per block.  No torch, no Python, no C++ in it.
//
// Letters: N rows of x, D in, O out, G weights per block, R rank, S adapters.  A weight W (O, D) is kept row-major:
//   codes   two to a byte, the earlier weight in the HIGH nibble
//   absmax  one per G consecutive weights of the flattened W: float32, or (double quantization) one byte each:
//           absmax[i] = nested_levels[absmax_codes[i]] * nested_absmax[i / nested_block] + nested_offset
//   weight  levels[code] * absmax in float32, then rounded to the wanted type (nearest, ties to even)
// Tables are given by the caller, so that each constant is written once, in Python.
#ifndef VENEER_H
#define VENEER_H

#include <stdint.h>

#if defined(__GNUC__)
#define VENEER_API __attribute__((visibility("default")))
#else
#define VENEER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define VENEER_ABI 2

// Instruction sets; all implement the same functions.
enum { VENEER_SCALAR = 0, VENEER_AVX2 = 1, VENEER_AVX512 = 2, VENEER_AVX512BF16 = 3, VENEER_NEON = 4, VENEER_ISAS = 5 };
// Number types of x, y and dequantized weights.
enum { VENEER_F32 = 0, VENEER_BF16 = 1, VENEER_F16 = 2 };
// What calls return: 0 or more is success.
enum { VENEER_OK = 0, VENEER_BAD_ISA = -1, VENEER_BAD_ARGUMENT = -2, VENEER_NO_MEMORY = -3 };

typedef struct {
    const uint8_t *codes;         // (O * D + 1) / 2 bytes
    const float *absmax;          // one per block, or null if double-quantized
    const uint8_t *absmax_codes;  // one per block, or null if plain
    const float *nested_absmax;   // one per nested_block blocks
    const float *nested_levels;   // 256
    const float *levels;          // 16, by code
    float nested_offset;
    int32_t nested_block;         // blocks per nested absmax
    int64_t rows, cols, block;    // O, D, G
} veneer_weight;

// 256 levels of an 8-bit number, and how to find one's code.
typedef struct {
    const float *levels;  // 256, rising
    const float *bounds;  // 255: the midpoints of neighbors
    const float *lines;   // 4 x 16, by decade of |x|, 0 to 8: start, slope, offset, last level (dynamic.h)
} veneer_map8;

typedef struct {
    veneer_map8 map1, map2;      // of the first moment, signed (level 127 is 0), and of the second (level 0 is 0)
    float beta1, beta2;          // decay of the moments
    float rest1, rest2;          // 1 - beta1, 1 - beta2
    float size, root, eps, keep; // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), and 1 - lr * decay
} veneer_adamw8;

VENEER_API int veneer_abi(void);
// 1 if this machine and this build have the instruction set, else 0.
VENEER_API int veneer_has(int isa);
// Hand over the address of libgomp's GOMP_parallel (or null): kernels then run in the caller's own OpenMP pool.
VENEER_API void veneer_use_pool(void *gomp_parallel);

// x (n) -> codes ((n + 1) / 2), absmax (ceil(n / G)).  bounds (15) rising, order (16): code of the i-th interval.
// bad[0] becomes the first block that holds a NaN or an infinity, or -1; the outputs are then not to be used.
VENEER_API int veneer_quantize(int isa, int threads, const void *x, int dtype, int64_t n, int64_t block,
                               const float *bounds, const uint8_t *order, uint8_t *codes, float *absmax, int64_t *bad);
// absmax (n) less its mean -> one byte each, by a signed map, and a float32 absmax per nested_block of them.
VENEER_API int veneer_encode_absmax(int isa, int threads, const float *centered, int64_t n, int64_t nested_block,
                                    const veneer_map8 *map, uint8_t *codes, float *nested_absmax);
// The float32 absmax of every block: (ceil(O * D / G)).
VENEER_API int veneer_decode_absmax(int isa, int threads, const veneer_weight *w, float *out);
// W (O, D) in dtype.
VENEER_API int veneer_dequantize(int isa, int threads, const veneer_weight *w, void *out, int dtype);
// y (N, O) = x (N, D) W^T; x and y in dtype (float32 or bfloat16), W rounded to it, sums in float32.  For few rows,
// 16 of bfloat16 with AVX-512-BF16 and 8 else, lanes sum up levels times x (the levels in bfloat16 with the first) and
// multiply by absmax afterwards: other bits, no less exact.
// Needs D to be a multiple of G, G a power of two of at least 32.
VENEER_API int veneer_matmul(int isa, int threads, const veneer_weight *w, const void *x, int dtype, int64_t n, void *y);
// dx (N, D) = dy (N, O) W, under the same conditions.
VENEER_API int veneer_matmul_backward(int isa, int threads, const veneer_weight *w, const void *dy, int dtype, int64_t n,
                                      void *dx);
// y[n] = scale[slot] * B[slot] A[slot] x[n] for the rows of each segment, 0 where the slot is -1; starts (segments + 1)
// rising from 0 to N, slots (segments).  a (S, R, D), b (S, O, R), scale (S) float32; x, y in dtype; sums in float32.
VENEER_API int veneer_lora_segments(int isa, int threads, const void *x, int dtype, int64_t n, int64_t d, int64_t o,
                                    int64_t r, const float *a, const float *b, const float *scale,
                                    const int64_t *starts, const int64_t *slots, int64_t segments, void *y);
// One AdamW step over `blocks` blocks of 256: values and gradients (256 * blocks), state as codes and an absmax a block.
// Gradients are finite.
VENEER_API int veneer_adamw8_step(int isa, int threads, const veneer_adamw8 *how, int64_t blocks, float *values,
                                  const float *gradients, uint8_t *codes1, uint8_t *codes2, float *absmax1,
                                  float *absmax2);

#ifdef __cplusplus
}
#endif
#endif
