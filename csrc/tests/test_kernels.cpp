// Every instruction set of this machine against the scalar reference, and that against a few numbers by hand.
// Buffers are exactly as long as the ABI says, so that a sanitizer sees every byte read or written beyond them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../veneer.h"

namespace {

int failures = 0;

void expect(bool good, const char *what, const char *isa, long a = 0, long b = 0, long c = 0) {
    if (good) return;
    failures++;
    std::printf("FAILED %s, %s (%ld, %ld, %ld)\n", what, isa, a, b, c);
}

const char *const NAMES[VENEER_ISAS] = {"scalar", "avx2", "avx512", "avx512bf16", "neon"};

const float LEVELS[16] = {-1.f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.09105004f, 0.f,
                          0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.f};

// Exactly n elements on the heap.
template <class T> struct Buffer {
    std::unique_ptr<T[]> data;
    size_t n;
    explicit Buffer(size_t n_) : data(new T[n_ ? n_ : 1]()), n(n_) {}
    T *get() const { return data.get(); }
    T &operator[](size_t i) const { return data[i]; }
    bool same_as(const Buffer &other) const { return std::memcmp(get(), other.get(), n * sizeof(T)) == 0; }
};

std::mt19937 rng(1);

float bf16_to_float(uint16_t h) {
    const uint32_t u = uint32_t(h) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

uint16_t float_to_bf16(float f) {  // towards zero: any bfloat16 will do as an input
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return uint16_t(u >> 16);
}

// n random numbers in dtype; float16 ones as bits of small normal numbers.
Buffer<uint8_t> numbers(size_t n, int dtype) {
    std::normal_distribution<float> normal;
    Buffer<uint8_t> out(n * (dtype == VENEER_F32 ? 4 : 2));
    for (size_t i = 0; i < n; i++) {
        const float v = normal(rng);
        if (dtype == VENEER_F32) std::memcpy(out.get() + 4 * i, &v, 4);
        const uint16_t h = dtype == VENEER_BF16 ? float_to_bf16(v) : uint16_t((rng() & 0x8fff) | 0x2000);
        if (dtype != VENEER_F32) std::memcpy(out.get() + 2 * i, &h, 2);
    }
    return out;
}

float number_at(const Buffer<uint8_t> &x, int dtype, size_t i) {
    float f;
    uint16_t h;
    if (dtype == VENEER_F32) {
        std::memcpy(&f, x.get() + 4 * i, 4);
        return f;
    }
    std::memcpy(&h, x.get() + 2 * i, 2);
    return bf16_to_float(h);
}

// Two ways of adding up `terms` products of numbers around 1, as a share of what such a sum is.
bool close(const Buffer<uint8_t> &got, const Buffer<uint8_t> &want, int dtype, int64_t terms) {
    double error = 0, size = 0;
    for (size_t i = 0; i < got.n / (dtype == VENEER_F32 ? 4 : 2); i++) {
        const double a = number_at(got, dtype, i), b = number_at(want, dtype, i);
        error += (a - b) * (a - b);
        size += b * b > 0.1 * double(terms) ? b * b : 0.1 * double(terms);
    }
    return std::sqrt(error / size) < (dtype == VENEER_F32 ? 2e-6 : 1e-2);
}

struct Weight {
    Buffer<uint8_t> codes, absmax_codes;
    Buffer<float> absmax, nested_absmax, nested_levels;
    veneer_weight w;

    Weight(int64_t rows, int64_t cols, int64_t block, bool nested)
        : codes((rows * cols + 1) / 2),
          absmax_codes(nested ? (rows * cols + block - 1) / block : 0),
          absmax((rows * cols + block - 1) / block),
          nested_absmax((absmax.n + 255) / 256),
          nested_levels(256) {
        std::uniform_real_distribution<float> uniform(0.1f, 1.f);
        for (size_t i = 0; i < codes.n; i++) codes[i] = uint8_t(rng());
        for (size_t i = 0; i < absmax_codes.n; i++) absmax_codes[i] = uint8_t(rng());
        for (size_t i = 0; i < absmax.n; i++) absmax[i] = uniform(rng);
        for (size_t i = 0; i < nested_absmax.n; i++) nested_absmax[i] = uniform(rng);
        for (int i = 0; i < 256; i++) nested_levels[i] = float(i - 127) / 128.f;
        w = {codes.get(), nested ? nullptr : absmax.get(), nested ? absmax_codes.get() : nullptr, nested_absmax.get(),
             nested_levels.get(), LEVELS, 1.5f, 256, rows, cols, block};
    }
};

void test_reference() {  // x = [-1, .5, 2], absmax 2: -0.5, 0.25, 1 -> codes 2, 10, 15, and 7 to fill the byte
    const float x[3] = {-1.f, .5f, 2.f};
    float bounds[15], absmax = 0;
    uint8_t order[16], codes[2];
    for (int i = 0; i < 16; i++) order[i] = uint8_t(i);
    for (int i = 0; i < 15; i++) bounds[i] = (LEVELS[i] + LEVELS[i + 1]) / 2;
    int64_t bad = 0;
    const int code = veneer_quantize(VENEER_SCALAR, 1, x, VENEER_F32, 3, 64, bounds, order, codes, &absmax, &bad);
    expect(code == 0 && bad == -1 && absmax == 2.f && codes[0] == 0x2a && codes[1] == 0xf7, "quantize by hand", "scalar");
    const veneer_weight w = {codes, &absmax, nullptr, nullptr, nullptr, LEVELS, 0, 256, 1, 3, 64};
    float out[3];
    expect(veneer_dequantize(VENEER_SCALAR, 1, &w, out, VENEER_F32) == 0 && out[0] == 2 * LEVELS[2] &&
               out[1] == 2 * LEVELS[10] && out[2] == 2.f,
           "dequantize by hand", "scalar");
}

void test_quantize(int isa) {
    float bounds[15];
    uint8_t order[16];
    for (int i = 0; i < 16; i++) order[i] = uint8_t(15 - i);
    for (int i = 0; i < 15; i++) bounds[i] = (LEVELS[i] + LEVELS[i + 1]) / 2;
    for (int dtype : {VENEER_F32, VENEER_BF16, VENEER_F16})
        for (int64_t n : {1, 31, 64, 97, 4096, 70001})
            for (int64_t block : {2, 32, 64, 4096}) {
                const Buffer<uint8_t> x = numbers(n, dtype);
                Buffer<uint8_t> a((n + 1) / 2), b((n + 1) / 2);
                Buffer<float> am((n + block - 1) / block), bm(am.n);
                int64_t bad = 0;
                veneer_quantize(VENEER_SCALAR, 1, x.get(), dtype, n, block, bounds, order, a.get(), am.get(), &bad);
                veneer_quantize(isa, 2, x.get(), dtype, n, block, bounds, order, b.get(), bm.get(), &bad);
                expect(bad == -1 && a.same_as(b) && am.same_as(bm), "quantize", NAMES[isa], n, block, dtype);
            }
    Buffer<float> x(200), absmax(4);
    Buffer<uint8_t> codes(100);
    for (size_t i = 0; i < x.n; i++) x[i] = 1;
    x[130] = NAN;
    x[199] = INFINITY;
    int64_t bad = -1;
    veneer_quantize(isa, 1, x.get(), VENEER_F32, 200, 64, bounds, order, codes.get(), absmax.get(), &bad);
    expect(bad == 2, "quantize names the first block that is not finite", NAMES[isa], bad);
}

void test_dequantize(int isa) {
    for (bool nested : {false, true})
        for (int64_t rows : {1, 7, 260})
            for (int64_t cols : {1, 33, 64, 192})
                for (int64_t block : {32, 64, 4096})
                    for (int dtype : {VENEER_F32, VENEER_BF16, VENEER_F16}) {
                        const Weight w(rows, cols, block, nested);
                        const size_t size = size_t(rows * cols) * (dtype == VENEER_F32 ? 4 : 2);
                        Buffer<uint8_t> a(size), b(size);
                        expect(veneer_dequantize(VENEER_SCALAR, 1, &w.w, a.get(), dtype) == 0, "dequantize", "scalar");
                        expect(veneer_dequantize(isa, 2, &w.w, b.get(), dtype) == 0 && a.same_as(b), "dequantize",
                               NAMES[isa], rows, cols, block);
                    }
    for (int64_t n : {1, 63, 64, 257, 20000}) {
        const Weight w(1, n * 32, 32, true);
        Buffer<float> a(n), b(n);
        veneer_decode_absmax(VENEER_SCALAR, 1, &w.w, a.get());
        expect(veneer_decode_absmax(isa, 2, &w.w, b.get()) == 0 && a.same_as(b), "decode absmax", NAMES[isa], n);
    }
}

void test_products(int isa) {
    for (bool nested : {false, true})
        for (int dtype : {VENEER_F32, VENEER_BF16})
            for (int64_t rows : {1, 67})
                for (int64_t cols : {64, 96, 576})
                    for (int64_t n : {1, 2, 7, 17, 33, 65}) {
                        const Weight w(rows, cols, cols % 64 ? 32 : 64, nested);
                        const Buffer<uint8_t> x = numbers(n * cols, dtype), dy = numbers(n * rows, dtype);
                        const size_t size = dtype == VENEER_F32 ? 4 : 2;
                        Buffer<uint8_t> y(n * rows * size), z(n * rows * size), dx(n * cols * size), dz(n * cols * size);
                        veneer_matmul(VENEER_SCALAR, 1, &w.w, x.get(), dtype, n, y.get());
                        veneer_matmul_backward(VENEER_SCALAR, 1, &w.w, dy.get(), dtype, n, dx.get());
                        expect(veneer_matmul(isa, 3, &w.w, x.get(), dtype, n, z.get()) == 0 && close(z, y, dtype, cols),
                               "matmul", NAMES[isa], rows, cols, n);
                        expect(veneer_matmul_backward(isa, 3, &w.w, dy.get(), dtype, n, dz.get()) == 0 &&
                                   close(dz, dx, dtype, rows),
                               "matmul backward", NAMES[isa], rows, cols, n);
                    }
    for (int64_t n : {9, 24, 31, 49})  // each width of a tile, each tail of rows and of lanes
        for (int dtype : {VENEER_F32, VENEER_BF16}) {
            const Weight w(n + 186, 288, 32, true);
            const int64_t rows = w.w.rows, cols = w.w.cols, size = dtype == VENEER_F32 ? 4 : 2;
            const Buffer<uint8_t> x = numbers(n * cols, dtype), dy = numbers(n * rows, dtype);
            Buffer<uint8_t> y(n * rows * size), z(n * rows * size), dx(n * cols * size), dz(n * cols * size);
            veneer_matmul(VENEER_SCALAR, 1, &w.w, x.get(), dtype, n, y.get());
            veneer_matmul(isa, 2, &w.w, x.get(), dtype, n, z.get());
            veneer_matmul_backward(VENEER_SCALAR, 1, &w.w, dy.get(), dtype, n, dx.get());
            veneer_matmul_backward(isa, 2, &w.w, dy.get(), dtype, n, dz.get());
            expect(close(z, y, dtype, cols) && close(dz, dx, dtype, rows), "tails", NAMES[isa], rows, n, dtype);
        }
    const Weight large(260, 1216, 64, true);  // several strips, and more rows of W than one panel holds
    const Weight tall(1100, 128, 128, false);
    for (const Weight *w : {&large, &tall}) {
        const int64_t n = 90, rows = w->w.rows, cols = w->w.cols;
        const Buffer<uint8_t> x = numbers(n * cols, VENEER_BF16), dy = numbers(n * rows, VENEER_BF16);
        Buffer<uint8_t> y(n * rows * 2), z(n * rows * 2), dx(n * cols * 2), dz(n * cols * 2);
        veneer_matmul(VENEER_SCALAR, 1, &w->w, x.get(), VENEER_BF16, n, y.get());
        veneer_matmul(isa, 2, &w->w, x.get(), VENEER_BF16, n, z.get());
        veneer_matmul_backward(VENEER_SCALAR, 1, &w->w, dy.get(), VENEER_BF16, n, dx.get());
        veneer_matmul_backward(isa, 2, &w->w, dy.get(), VENEER_BF16, n, dz.get());
        expect(close(z, y, VENEER_BF16, cols) && close(dz, dx, VENEER_BF16, rows), "large products", NAMES[isa], rows, cols);
    }
}

void test_segments(int isa) {
    for (int64_t r : {1, 5, 16, 40}) {
        const int64_t n = 9, d = 100, o = 70;
        const Buffer<uint8_t> x = numbers(n * d, VENEER_F32), a = numbers(2 * r * d, VENEER_F32),
                              b = numbers(2 * o * r, VENEER_F32);
        const float scale[2] = {0.5f, 2.f};
        const int64_t starts[5] = {0, 3, 3, 7, 9}, slots[4] = {1, 0, -1, 0};
        Buffer<uint8_t> y(n * o * 4), z(n * o * 4);
        const auto *fa = reinterpret_cast<const float *>(a.get()), *fb = reinterpret_cast<const float *>(b.get());
        veneer_lora_segments(VENEER_SCALAR, 1, x.get(), VENEER_F32, n, d, o, r, fa, fb, scale, starts, slots, 4, y.get());
        veneer_lora_segments(isa, 2, x.get(), VENEER_F32, n, d, o, r, fa, fb, scale, starts, slots, 4, z.get());
        expect(close(z, y, VENEER_F32, d * r), "segments", NAMES[isa], r);
        for (int64_t i = 3 * o; i < 7 * o; i++) expect(number_at(z, VENEER_F32, i) == 0, "no slot", NAMES[isa], i);
    }
}

// 8-bit numbers: two steps of AdamW over an odd number of blocks, and absmax encoded, with the tables of a map of 256
// even levels in [0, 1]: every code is in doubt or a search, so the lines may be anything that finds decade 0.
void test_dynamic(int isa) {
    constexpr int64_t blocks = 67, n = 256 * blocks;
    float levels[256], bounds[255], lines[64] = {};
    for (int i = 0; i < 256; i++) levels[i] = float(i) / 255.f;
    for (int i = 0; i < 255; i++) bounds[i] = (levels[i] + levels[i + 1]) / 2;
    for (int i = 1; i < 16; i++) lines[i] = 3e38f;
    const veneer_map8 map{levels, bounds, lines};
    const veneer_adamw8 how{map, map, 0.9f, 0.99f, 0.1f, 0.01f, 1e-2f, 1.f, 1e-8f, 0.999f};
    const Buffer<uint8_t> g = numbers(n, VENEER_F32);
    Buffer<uint8_t> values[2] = {Buffer<uint8_t>(n * 4), Buffer<uint8_t>(n * 4)};
    Buffer<uint8_t> codes1[2] = {Buffer<uint8_t>(n), Buffer<uint8_t>(n)}, codes2[2] = {Buffer<uint8_t>(n), Buffer<uint8_t>(n)};
    Buffer<uint8_t> absmax1[2] = {Buffer<uint8_t>(blocks * 4), Buffer<uint8_t>(blocks * 4)};
    Buffer<uint8_t> absmax2[2] = {Buffer<uint8_t>(blocks * 4), Buffer<uint8_t>(blocks * 4)};
    for (int k = 0; k < 2; k++) {
        std::memset(values[k].get(), 0, n * 4), std::memset(absmax1[k].get(), 0, blocks * 4);
        std::memset(absmax2[k].get(), 0, blocks * 4), std::memset(codes1[k].get(), 0, n), std::memset(codes2[k].get(), 0, n);
        for (int t = 0; t < 2; t++)
            veneer_adamw8_step(k ? isa : int(VENEER_SCALAR), 2, &how, blocks, reinterpret_cast<float *>(values[k].get()),
                               reinterpret_cast<const float *>(g.get()), codes1[k].get(), codes2[k].get(),
                               reinterpret_cast<float *>(absmax1[k].get()), reinterpret_cast<float *>(absmax2[k].get()));
    }
    expect(!std::memcmp(absmax1[0].get(), absmax1[1].get(), blocks * 4), "adamw8 absmax", NAMES[isa]);
    expect(!std::memcmp(absmax2[0].get(), absmax2[1].get(), blocks * 4), "adamw8 absmax", NAMES[isa]);
    const auto *centered = reinterpret_cast<const float *>(g.get());
    for (int64_t count : {n, n - 100, int64_t(3)})
        for (int block : {256, 96}) {
            Buffer<uint8_t> codes[2] = {Buffer<uint8_t>(count), Buffer<uint8_t>(count)};
            Buffer<float> nested[2] = {Buffer<float>((count + block - 1) / block), Buffer<float>((count + block - 1) / block)};
            for (int k = 0; k < 2; k++)
                veneer_encode_absmax(k ? isa : int(VENEER_SCALAR), 2, centered, count, block, &map, codes[k].get(), nested[k].get());
            expect(codes[0].same_as(codes[1]) && nested[0].same_as(nested[1]), "encoded absmax", NAMES[isa], count, block);
        }
    expect(veneer_adamw8_step(isa, 1, nullptr, 1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) ==
               VENEER_BAD_ARGUMENT, "adamw8 without anything", NAMES[isa]);
}

void test_refusals() {
    const Weight w(4, 64, 64, false);
    float x[64] = {}, y[4];
    expect(veneer_matmul(77, 1, &w.w, x, VENEER_F32, 1, y) == VENEER_BAD_ISA, "unknown isa", "any");
    expect(veneer_matmul(0, 1, &w.w, x, VENEER_F16, 1, y) == VENEER_BAD_ARGUMENT, "float16 rows", "any");
    expect(veneer_matmul(0, 1, nullptr, x, VENEER_F32, 1, y) == VENEER_BAD_ARGUMENT, "no weight", "any");
    expect(veneer_matmul(0, 1, &w.w, nullptr, VENEER_F32, 1, y) == VENEER_BAD_ARGUMENT, "no x", "any");
    expect(veneer_matmul(0, 1, &w.w, reinterpret_cast<char *>(x) + 2, VENEER_F32, 1, y) == VENEER_BAD_ARGUMENT,
           "misaligned x", "any");
    veneer_weight odd = w.w;
    odd.block = 48;
    expect(veneer_dequantize(0, 1, &odd, x, VENEER_F32) == VENEER_BAD_ARGUMENT, "block of 48", "any");
    odd = w.w;
    odd.block = 128;
    expect(veneer_matmul(0, 1, &odd, x, VENEER_F32, 1, y) == VENEER_BAD_ARGUMENT, "half a block a row", "any");
    odd = w.w;
    odd.absmax = nullptr;
    expect(veneer_dequantize(0, 1, &odd, x, VENEER_F32) == VENEER_BAD_ARGUMENT, "no absmax", "any");
}

// Stands in for libgomp's GOMP_parallel.
void run_threads(void (*work)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; i++) team.emplace_back(work, data);
    work(data);
    for (std::thread &t : team) t.join();
}

}  // namespace

int main() {
    test_reference();
    test_refusals();
    for (bool threads : {false, true}) {
        veneer_use_pool(threads ? reinterpret_cast<void *>(run_threads) : nullptr);
        for (int isa = VENEER_SCALAR + 1; isa < VENEER_ISAS; isa++) {
            if (!veneer_has(isa)) continue;
            std::printf("%s%s\n", NAMES[isa], threads ? ", threads" : "");
            if (!threads) test_quantize(isa);
            if (!threads) test_dequantize(isa);
            test_products(isa);
            test_segments(isa);
            test_dynamic(isa);
        }
    }
    std::printf("%s\n", failures ? "FAILED" : "ok");
    return failures ? 1 : 0;
}
