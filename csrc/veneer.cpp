// The C ABI: checks its arguments, picks the table of the instruction set, splits the work into tasks.  No arithmetic.
#include "veneer.h"

#include "kernels.h"
#ifdef VN_X86
#include <cpuid.h>

#include "avx512bf16_matvec.h"
#endif
#ifdef VN_ARM
#include "neon.h"
#endif

using namespace veneer;

namespace {

bool whole_bytes_of(int dtype) { return dtype == VENEER_F32 || dtype == VENEER_BF16 || dtype == VENEER_F16; }

bool aligned(const void *p, size_t to) { return p && reinterpret_cast<uintptr_t>(p) % to == 0; }

bool aligned_as(const void *p, int dtype) { return aligned(p, dtype == VENEER_F32 ? 4 : 2); }

bool block_ok(int64_t block) { return block >= 2 && block <= (1 << 30) && (block & (block - 1)) == 0; }

bool weight_ok(const veneer_weight *w) {
    if (!w || !w->codes || !aligned(w->levels, 4) || w->rows < 0 || w->cols < 1 || !block_ok(w->block)) return false;
    if (w->absmax) return aligned(w->absmax, 4);
    return w->absmax_codes && aligned(w->nested_absmax, 4) && aligned(w->nested_levels, 4) && w->nested_block > 0;
}

bool product_ok(const veneer_weight *w, const void *x, int dtype, int64_t n, const void *y) {
    return weight_ok(w) && n >= 1 && w->rows >= 1 && w->block >= 32 && w->cols % w->block == 0 &&
           (dtype == VENEER_F32 || dtype == VENEER_BF16) && aligned_as(x, dtype) && aligned_as(y, dtype);
}

constexpr int64_t DECODED = 1 << 13;  // blocks of a decoding task

// Decodes absmax into `out`, a task at a time; nothing to do for a plain absmax.
struct Decode {
    const veneer_weight *w;
    void (*decode)(const veneer_weight &, int64_t, int64_t, float *);
    float *out;

    bool operator()(int64_t i) const {
        decode(*w, i * DECODED, least(n_blocks(*w), (i + 1) * DECODED), out + i * DECODED);
        return true;
    }
};

// A weight's float32 absmax: as given, or in this thread's scratch once the phase has run.
struct Absmax {
    Decode decode;
    const float *values;

    Absmax(const Kernels &k, const veneer_weight &w)
        : decode{&w, k.decode_absmax, w.absmax ? nullptr : scratch_of<float>(SCALES, n_blocks(w))},
          values(w.absmax ? w.absmax : decode.out) {}
    Phase phase() const { return veneer::phase(decode.out ? ceil_div(n_blocks(*decode.w), DECODED) : 0, decode); }
};

const float *as_float(const void *x, int dtype, int64_t count) {
    if (dtype == VENEER_F32) return static_cast<const float *>(x);
    float *out = scratch_of<float>(PACKED, count);
    for (int64_t i = 0; out && i < count; i++) out[i] = load_as_float(x, dtype, i);
    return out;
}

#ifdef VN_X86
// CPUID itself, for the two that older compilers have no name for.
bool has_bf16_products() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

// By instruction set, null where this machine or this build has none.  Looked up once: CPUID costs microseconds in a
// virtual machine.
struct Tables {
    const Kernels *of[VENEER_ISAS] = {};

    Tables() {
        of[VENEER_SCALAR] = &scalar::KERNELS;
#ifdef VN_X86
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
            of[VENEER_AVX2] = &avx2::KERNELS;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            of[VENEER_AVX512] = &avx512::KERNELS;
        if (of[VENEER_AVX512] && __builtin_cpu_supports("avx512vbmi") && has_bf16_products())
            of[VENEER_AVX512BF16] = &avx512bf16::KERNELS;
#endif
#ifdef VN_ARM
        of[VENEER_NEON] = &neon::KERNELS;
#endif
    }
};

const Kernels *kernels_of(int isa) {
    static const Tables tables;
    return isa >= 0 && isa < VENEER_ISAS ? tables.of[isa] : nullptr;
}

bool map_ok(const veneer_map8 &m) { return aligned(m.levels, 4) && aligned(m.bounds, 4) && aligned(m.lines, 4); }

int status(bool good) { return good ? VENEER_OK : VENEER_NO_MEMORY; }

}  // namespace

extern "C" {

int veneer_abi(void) { return VENEER_ABI; }

int veneer_has(int isa) { return kernels_of(isa) != nullptr; }

void veneer_use_pool(void *gomp_parallel) { pool().store(reinterpret_cast<GompParallel>(gomp_parallel)); }

int veneer_quantize(int isa, int threads, const void *x, int dtype, int64_t n, int64_t block, const float *bounds,
                    const uint8_t *order, uint8_t *codes, float *absmax, int64_t *bad) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (!whole_bytes_of(dtype) || !aligned_as(x, dtype) || n < 1 || !block_ok(block) || !aligned(bounds, 4) || !order ||
        !codes || !aligned(absmax, 4) || !bad)
        return VENEER_BAD_ARGUMENT;
    const Quantize q{x, dtype, n, block, bounds, order, codes, absmax};
    const int64_t blocks = ceil_div(n, block), step = ceil_div(1 << 16, block);
    std::atomic<int64_t> worst{blocks};
    parallel(threads, ceil_div(blocks, step), [&](int64_t i) {
        const int64_t found = k->quantize(q, i * step, least(blocks, (i + 1) * step));
        for (int64_t now = worst.load(); found >= 0 && found < now && !worst.compare_exchange_weak(now, found);) {
        }
        return true;
    });
    *bad = worst.load() == blocks ? -1 : worst.load();
    return VENEER_OK;
}

int veneer_encode_absmax(int isa, int threads, const float *centered, int64_t n, int64_t nested_block,
                         const veneer_map8 *map, uint8_t *codes, float *nested_absmax) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (!aligned(centered, 4) || n < 1 || nested_block < 1 || !map || !map_ok(*map) || !codes ||
        !aligned(nested_absmax, 4))
        return VENEER_BAD_ARGUMENT;
    const EncodeAbsmax e{map, centered, n, nested_block, codes, nested_absmax};
    const int64_t blocks = ceil_div(n, nested_block), step = ceil_div(1 << 14, nested_block);
    return status(parallel(threads, ceil_div(blocks, step), [&](int64_t i) {
        k->encode_absmax(e, i * step, least(blocks, (i + 1) * step));
        return true;
    }));
}

int veneer_decode_absmax(int isa, int threads, const veneer_weight *w, float *out) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (!weight_ok(w) || w->absmax || !aligned(out, 4)) return VENEER_BAD_ARGUMENT;
    const Decode decode{w, k->decode_absmax, out};
    return status(parallel(threads, ceil_div(n_blocks(*w), DECODED), decode));
}

int veneer_dequantize(int isa, int threads, const veneer_weight *w, void *out, int dtype) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (!weight_ok(w) || !whole_bytes_of(dtype) || !aligned_as(out, dtype)) return VENEER_BAD_ARGUMENT;
    const Absmax absmax(*k, *w);
    if (!absmax.values) return VENEER_NO_MEMORY;
    constexpr int64_t CHUNK = 1 << 16;  // even, so that every task starts at a byte
    const int64_t n = w->rows * w->cols, size = dtype == VENEER_F32 ? 4 : 2;
    const auto unpack = [&](int64_t i) {
        void *to = static_cast<char *>(out) + i * CHUNK * size;
        k->dequantize(*w, absmax.values, i * CHUNK, least(n, (i + 1) * CHUNK), to, dtype);
        return true;
    };
    return status(run_phases(threads, {absmax.phase(), phase(ceil_div(n, CHUNK), unpack)}));
}

int veneer_matmul(int isa, int threads, const veneer_weight *w, const void *x, int dtype, int64_t n, void *y) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (!product_ok(w, x, dtype, n, y)) return VENEER_BAD_ARGUMENT;
    const Products &p = dtype == VENEER_F32 ? k->f32 : k->bf16;
    if (threads < 1) threads = 1;
    if (n <= p.few) return status(p.matvec(*w, x, dtype, n, y, threads));
    const Absmax absmax(*k, *w);
    return status(absmax.values && p.matmul(*w, absmax.values, absmax.phase(), x, dtype, n, y, threads));
}

int veneer_matmul_backward(int isa, int threads, const veneer_weight *w, const void *dy, int dtype, int64_t n,
                           void *dx) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (!product_ok(w, dy, dtype, n, dx)) return VENEER_BAD_ARGUMENT;
    const Products &p = dtype == VENEER_F32 ? k->f32 : k->bf16;
    if (threads < 1) threads = 1;
    const Absmax absmax(*k, *w);
    return status(absmax.values && p.matmul_backward(*w, absmax.values, absmax.phase(), dy, dtype, n, dx, threads));
}

int veneer_lora_segments(int isa, int threads, const void *x, int dtype, int64_t n, int64_t d, int64_t o, int64_t r,
                         const float *a, const float *b, const float *scale, const int64_t *starts,
                         const int64_t *slots, int64_t segments, void *y) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (n < 1 || d < 1 || o < 1 || r < 1 || segments < 1 || (dtype != VENEER_F32 && dtype != VENEER_BF16) ||
        !aligned_as(x, dtype) || !aligned_as(y, dtype) || !aligned(a, 4) || !aligned(b, 4) || !aligned(scale, 4) ||
        !aligned(starts, 8) || !aligned(slots, 8))
        return VENEER_BAD_ARGUMENT;
    float *t = scratch_of<float>(SUMS, n * r);
    const float *xf = as_float(x, dtype, n * d);
    if (!t || !xf) return VENEER_NO_MEMORY;
    const Segments g{n, d, o, r, xf, a, b, scale, starts, slots, segments, t, y, dtype};
    return status(k->lora_segments(g, threads));
}

int veneer_adamw8_step(int isa, int threads, const veneer_adamw8 *how, int64_t blocks, float *values,
                       const float *gradients, uint8_t *codes1, uint8_t *codes2, float *absmax1, float *absmax2) {
    const Kernels *k = kernels_of(isa);
    if (!k) return VENEER_BAD_ISA;
    if (!how || !map_ok(how->map1) || !map_ok(how->map2) || blocks < 0 || !aligned(values, 4) ||
        !aligned(gradients, 4) || !codes1 || !codes2 || !aligned(absmax1, 4) || !aligned(absmax2, 4))
        return VENEER_BAD_ARGUMENT;
    // Blocks of a task: a thread's prefetching runs on into the next task, whose numbers another may be writing, so
    // tasks are long: of 64 blocks two threads took 1.4 times as long.  At least 8 for each thread, for balance.
    const int64_t task = least(4096, ceil_div(blocks, 8 * int64_t(threads > 1 ? threads : 1)));
    const AdamW8 a{how, values, gradients, codes1, codes2, absmax1, absmax2};
    return status(parallel(threads, task ? ceil_div(blocks, task) : 0, [&](int64_t i) {
        k->adamw8(a, i * task, least(blocks, (i + 1) * task));
        return true;
    }));
}

}  // extern "C"
