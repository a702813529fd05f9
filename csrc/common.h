// What every kernel uses: number types, scratch memory, and the caller's thread pool.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "veneer.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define VN_X86 1
#include <immintrin.h>
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define VN_ARM 1
#include <arm_neon.h>
#endif

#define VN_INLINE inline __attribute__((always_inline))
// Before a loop over sums that are to stay in registers: without it a compiler may keep them in memory.
#if defined(__clang__)
#define VN_UNROLL _Pragma("unroll")
#else
#define VN_UNROLL _Pragma("GCC unroll 32")
#endif

namespace veneer {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- number types: the reference of each conversion

inline uint32_t bits_of(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

inline float float_of(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// float32 -> bfloat16, nearest, ties to even.  Never given a NaN: quantize refuses them.
inline uint16_t to_bf16(float f) {
    uint32_t u = bits_of(f);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }

// float32 -> IEEE half, nearest, ties to even, with subnormals and infinity.
inline uint16_t to_f16(float f) {
    const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u, abs = u & 0x7fffffffu;
    if (abs >= 0x47800000u) return uint16_t(sign | (abs > 0x7f800000u ? 0x7e00u : 0x7c00u));  // too large, inf, NaN
    if (abs < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
        const float scaled = float_of(abs) + 0.5f;  // float32's spacing in [0.5, 1) is 2^-24, so this rounds
        return uint16_t(sign | (bits_of(scaled) - 0x3f000000u));
    }
    const uint32_t rounded = abs + 0xfffu + ((abs >> 13) & 1u);
    return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

inline float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, abs = h & 0x7fffu;
    if (abs >= 0x7c00u) return float_of(sign | 0x7f800000u | ((abs & 0x3ffu) << 13));
    if (abs < 0x400u) return float_of(sign | bits_of(float(abs) * 5.9604644775390625e-08f));  // 2^-24
    return float_of(sign | ((abs << 13) + 0x38000000u));
}

inline float load_as_float(const void *x, int dtype, int64_t i) {
    if (dtype == VENEER_F32) return static_cast<const float *>(x)[i];
    const uint16_t h = static_cast<const uint16_t *>(x)[i];
    return dtype == VENEER_BF16 ? from_bf16(h) : from_f16(h);
}

inline void store_float(void *y, int dtype, int64_t i, float v) {
    if (dtype == VENEER_F32)
        static_cast<float *>(y)[i] = v;
    else
        static_cast<uint16_t *>(y)[i] = dtype == VENEER_BF16 ? to_bf16(v) : to_f16(v);
}

// W's value in dtype, as the float32 it stands for.
inline float rounded_to(float v, int dtype) {
    return dtype == VENEER_F32 ? v : dtype == VENEER_BF16 ? from_bf16(to_bf16(v)) : from_f16(to_f16(v));
}

// ---- blocks

constexpr float LEAST_ABSMAX = 1e-38f;  // what a block is divided by at least

inline float at_least(float absmax) { return absmax > LEAST_ABSMAX ? absmax : LEAST_ABSMAX; }

// ---- scratch: one growing buffer per thread and purpose, freed when the thread ends.  Each has pages of its own, as
// prefetching hardware does not leave a page.  Side by side, one thread's reading to the end of x took lines from under
// the other's writing: an eighth of the time of a matrix-vector product, where cores share no cache.

enum Purpose { PACKED, SCALES, PANEL, SUMS, PURPOSES };

class Scratch {
  public:
    static constexpr int64_t PAGE = 4096;

    ~Scratch() {
        for (int i = 0; i < PURPOSES; i++) std::free(buffer_[i]);
    }
    // At least `bytes` bytes, contents undefined; null if there is no memory.
    void *get(Purpose purpose, int64_t bytes) {
        if (bytes > size_[purpose]) {
            std::free(buffer_[purpose]);
            const int64_t rounded = round_up(bytes, PAGE);
            if (posix_memalign(&buffer_[purpose], PAGE, size_t(rounded)) != 0) buffer_[purpose] = nullptr;
            size_[purpose] = buffer_[purpose] ? rounded : 0;
        }
        return buffer_[purpose];
    }

  private:
    void *buffer_[PURPOSES] = {};
    int64_t size_[PURPOSES] = {};
};

inline Scratch &scratch() {
    static thread_local Scratch mine;
    return mine;
}

template <class T> T *scratch_of(Purpose purpose, int64_t count) {
    return static_cast<T *>(scratch().get(purpose, count * int64_t(sizeof(T))));
}

// ---- threads: the caller's OpenMP pool, entered through libgomp's stable entry point

typedef void (*GompParallel)(void (*)(void *), void *, unsigned, unsigned);
inline std::atomic<GompParallel> &pool() {
    static std::atomic<GompParallel> entry{nullptr};
    return entry;
}

// Tasks 0 ... count - 1 of one kind; a task returns false when it has no memory.
struct Phase {
    int64_t count;
    bool (*run)(const void *task, int64_t i);
    const void *task;
};

template <class Task> Phase phase(int64_t count, const Task &task) {
    return {count, [](const void *t, int64_t i) { return (*static_cast<const Task *>(t))(i); }, &task};
}

struct Team {
    const Phase *phases;
    int count;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> good{true};

    // Take the next task until there is none; a task starts when all those of earlier phases are done.  Tasks are taken
    // in order, so whatever is waited for is being worked on by a thread that waits for nothing later.
    void work() {
        int p = 0;
        for (int64_t i, before = 0; (i = next.fetch_add(1, std::memory_order_relaxed)) >= 0;) {
            while (p < count && i - before >= phases[p].count) before += phases[p++].count;
            if (p == count) return;
            while (done.load(std::memory_order_acquire) < before) std::this_thread::yield();
            if (!phases[p].run(phases[p].task, i - before)) good.store(false, std::memory_order_relaxed);
            done.fetch_add(1, std::memory_order_release);
        }
    }
};

// Run the phases one after another with up to `threads` threads, in one parallel region: entering and leaving one costs
// milliseconds where a core is shared.  Tasks are taken one at a time, so that a thread that loses its core delays one
// task, not its share of all of them.
template <int N> bool run_phases(int threads, const Phase (&phases)[N]) {
    Team team{phases, N};
    int64_t widest = 1;
    for (const Phase &p : phases) widest = p.count > widest ? p.count : widest;
    const GompParallel enter = pool().load(std::memory_order_relaxed);
    const auto work = [](void *t) { static_cast<Team *>(t)->work(); };
    if (threads > 1 && widest > 1 && enter)
        enter(work, &team, unsigned(least(threads, widest)), 0);
    else
        team.work();
    return team.good.load();
}

// Rows of a task: a few tasks for each thread, as memory takes a microsecond to get going; in multiples of 4 rows.
inline int64_t rows_per_task(int64_t rows, int threads) {
    const int64_t even = round_up(ceil_div(rows, int64_t(threads) * 4), 4);
    return even < 16 ? 16 : even;
}

template <class Task> bool parallel(int threads, int64_t count, const Task &task) {
    return run_phases(threads, {phase(count, task)});
}

}  // namespace veneer
