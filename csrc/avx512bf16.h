// AVX-512 with bfloat16 dot products (and VBMI): the matrix products of bfloat16 rows, and decoding of 8-bit numbers.
// The rest comes from avx512.h.  The scalar reference of each function is in matmul.h, dequantize.h or dynamic.h.
#pragma once
#include "avx512.h"

#define VN_FN __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))

namespace veneer {
namespace avx512bf16 {

using namespace avx512;  // what is defined here too hides theirs
using avx512::F;
using avx512::I;
using avx512::W;
using avx512::transpose;

VN_FN VN_INLINE I loadu(const void *p) { return _mm512_loadu_si512(p); }
VN_FN VN_INLINE F dot_pairs(F sums, I a, I b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
VN_FN VN_INLINE __m256i to_bf16(F v) { return (__m256i)_mm512_cvtneps_pbh(v); }
VN_FN VN_INLINE I to_bf16(F low, F high) { return (I)_mm512_cvtne2ps_pbh(high, low); }

// ---- absmax from 8-bit codes: 64 at a time.  The 256 levels are kept as four planes of bytes, each in four registers.

struct Planes {
    I plane[4][4];
};

VN_FN inline void make_planes(const float *levels, Planes &planes) {
    alignas(64) uint8_t bytes[4][256];
    for (int i = 0; i < 256; i += 16)
        for (int p = 0; p < 4; p++) {
            const I byte = _mm512_srl_epi32(loadu(levels + i), _mm_cvtsi32_si128(8 * p));
            _mm_store_si128(reinterpret_cast<__m128i *>(bytes[p] + i), _mm512_cvtepi32_epi8(byte));
        }
    for (int p = 0; p < 4; p++)
        for (int q = 0; q < 4; q++) planes.plane[p][q] = loadu(bytes[p] + 64 * q);
}

// 64 codes -> 64 levels in order.
VN_FN VN_INLINE void look_up_levels(const Planes &planes, I codes, F out[4]) {
    // four codes of every sixteen side by side, as the bytes of their levels come together below
    codes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
    const __mmask64 upper = _mm512_movepi8_mask(codes);  // codes of 128 and more
    I byte[4];
    for (int p = 0; p < 4; p++) {
        const I low = _mm512_permutex2var_epi8(planes.plane[p][0], codes, planes.plane[p][1]);
        const I high = _mm512_permutex2var_epi8(planes.plane[p][2], codes, planes.plane[p][3]);
        byte[p] = _mm512_mask_blend_epi8(upper, low, high);
    }
    const I a = _mm512_unpacklo_epi8(byte[0], byte[1]), b = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const I c = _mm512_unpacklo_epi8(byte[2], byte[3]), d = _mm512_unpackhi_epi8(byte[2], byte[3]);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, c));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, c));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(b, d));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(b, d));
}

// Codes fetched ahead of use: a matrix-vector product comes for a row's at a time, too rarely for hardware to do so.
constexpr int64_t FETCHED_ABSMAX = 128;

VN_FN inline void decode_absmax(const veneer_weight &w, const Planes &planes, int64_t first, int64_t last, float *out) {
    const F offset = _mm512_set1_ps(w.nested_offset);
    for (int64_t i = first; i < last;) {
        const int64_t nest = i / w.nested_block, end = least(last, (nest + 1) * w.nested_block);
        const F scale = _mm512_set1_ps(w.nested_absmax[nest]);
        for (; i < end; i += 64) {
            const int64_t left = end - i;
            const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
            _mm_prefetch(reinterpret_cast<const char *>(w.absmax_codes + i + FETCHED_ABSMAX), _MM_HINT_T0);
            F v[4];
            look_up_levels(planes, _mm512_maskz_loadu_epi8(there, w.absmax_codes + i), v);
            for (int q = 0; q < 4; q++)
                _mm512_mask_storeu_ps(out + (i - first) + 16 * q, __mmask16(there >> (16 * q)),
                                      _mm512_add_ps(_mm512_mul_ps(v[q], scale), offset));
        }
        i = end;
    }
}

VN_FN inline void decode_absmax(const veneer_weight &w, int64_t first, int64_t last, float *out) {
    Planes planes;
    make_planes(w.nested_levels, planes);
    decode_absmax(w, planes, first, last, out);
}

// 256 levels of an 8-bit number, looked up in registers instead of gathered from memory.
struct Levels {
    Planes planes;
    VN_FN explicit Levels(const float *l) { make_planes(l, planes); }
    VN_FN VN_INLINE void decode(const uint8_t *codes, float *out) const {
        F v[4];
        look_up_levels(planes, loadu(codes), v);
        for (int q = 0; q < 4; q++) store(out + 16 * q, v[q]);
    }
};

// ---- unpacking to bfloat16

// 16 levels times absmax in bfloat16, twice over: indexed by five bits of which the fifth does not matter.
VN_FN VN_INLINE I scaled_table(F levels, float absmax) {
    return _mm512_broadcast_i64x4(to_bf16(_mm512_mul_ps(levels, _mm512_set1_ps(absmax))));
}

// 16 bytes -> 32 weights in order: two bytes to each 8 of a register, then their four nibbles to the low ends of words.
VN_FN VN_INLINE I unpack(const uint8_t *codes, I table) {
    const I bytes = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
    const I nibbles = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008000c00000004), bytes);
    return _mm512_permutexvar_epi16(nibbles, table);
}

// Weights [begin, end), both multiples of 32, and of 64 where a block is that long.
VN_FN inline void unpack_range(const veneer_weight &w, const float *absmax, int64_t begin, int64_t end, uint16_t *out) {
    const F levels = _mm512_loadu_ps(w.levels);
    const int shift = __builtin_ctzll(uint64_t(w.block));
    const int64_t step = w.block == 32 ? 32 : 64;
    for (int64_t i = begin; i < end; i += step, out += step) {
        const I table = scaled_table(levels, absmax[i >> shift]);
        _mm512_storeu_si512(out, unpack(w.codes + i / 2, table));
        if (step == 64) _mm512_storeu_si512(out + 32, unpack(w.codes + i / 2 + 16, table));
    }
}

// 32 weights of each of two rows -> 32 pairs.  The table has the upper row's levels, then the lower one's: a fifth bit
// of an index chooses between them.
VN_FN VN_INLINE void unpack_pairs(const uint8_t *above, const uint8_t *below, I table, uint16_t *to) {
    const I bytes = _mm512_castsi256_si512(_mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(above))),
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(below)), 1));
    // A byte of each row to each 8 of a register, then their four nibbles, the rows in turn, to the low ends of words.
    const I spread = _mm512_set_epi64(0x1707, 0x1606, 0x1505, 0x1404, 0x1303, 0x1202, 0x1101, 0x1000);
    const I shifts = _mm512_set1_epi64(0x00080000000c0004);
    for (int i = 0; i < 2; i++) {
        const I both = _mm512_permutexvar_epi8(_mm512_add_epi8(spread, _mm512_set1_epi64(0x0808 * i)), bytes);
        const I nibbles = _mm512_multishift_epi64_epi8(shifts, both);
        const I index = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), _mm512_set1_epi32(0x100000), 0xea);
        _mm512_storeu_si512(to + 32 * i, _mm512_permutexvar_epi16(index, table));  // (nibbles & 15) | the fifth bit
    }
}

// ---- matrix products

// C (M, 16 V) += A (M, depth) B; B's panel is (depth / 2, 64, 2).  Each SPAN of the depth, `meanwhile` is called.
template <int M, int V, int64_t SPAN, class Meanwhile>
VN_FN inline void tile(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t depth, float *c, int64_t ldc,
                       bool first, const Meanwhile &meanwhile) {
    F sums[M][V];
    VN_UNROLL for (int m = 0; m < M; m++)
        VN_UNROLL for (int v = 0; v < V; v++)
            sums[m][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + m * ldc + 16 * v);
    for (int64_t k0 = 0; k0 < depth; k0 += SPAN) {
        meanwhile();
        for (int64_t k = k0, end = least(depth, k0 + SPAN); k < end; k += 2, b += 128) {
            I columns[V];
            VN_UNROLL for (int v = 0; v < V; v++) columns[v] = loadu(b + 32 * v);
            VN_UNROLL for (int m = 0; m < M; m++) {
                int32_t pair;
                std::memcpy(&pair, a + m * lda + k, 4);
                const I row = _mm512_set1_epi32(pair);
                VN_UNROLL for (int v = 0; v < V; v++) sums[m][v] = dot_pairs(sums[m][v], row, columns[v]);
            }
        }
    }
    VN_UNROLL for (int m = 0; m < M; m++)
        VN_UNROLL for (int v = 0; v < V; v++) _mm512_storeu_ps(c + m * ldc + 16 * v, sums[m][v]);
}

struct Product {
    typedef uint16_t T;
    static constexpr int64_t PAIR = 2, NB = 64, DEPTH = 1024, SPAN = 32;

    // Rows [n0, n0 + 64) of x, columns [k0, k1) -> (k / 2, 64, 2), zeros beyond row n.  k0 and k1 are multiples of 32.
    VN_FN static void pack_panel(const void *x, int, int64_t n0, int64_t n, int64_t depth, int64_t k0, int64_t k1,
                                 uint16_t *to) {
        const uint16_t *from = static_cast<const uint16_t *>(x);
        for (int64_t j = 0; j < 64; j += 16)
            for (int64_t k = k0; k < k1; k += 32) {
                I r[16];
                for (int i = 0; i < 16; i++)
                    r[i] = n0 + j + i < n ? loadu(from + (n0 + j + i) * depth + k) : _mm512_setzero_si512();
                transpose(r);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + ((k - k0) / 2 + i) * 128 + 2 * j, r[i]);
            }
    }

    VN_FN static void pack_row(const void *x, int, int64_t at, int64_t count, uint16_t *to, int64_t padded) {
        std::memcpy(to, static_cast<const uint16_t *>(x) + at, size_t(count) * 2);
        std::memset(to + count, 0, size_t(padded - count) * 2);
    }

    VN_FN static void unpack_row(const veneer_weight &w, const float *absmax, int64_t begin, int64_t count, int,
                                 uint16_t *to) {
        unpack_range(w, absmax, begin, begin + count, to);
    }

    // Rows [o0, o0 + oc) of W, columns [c0, c0 + width) -> (oc / 2, 64, 2), with a row of zeros below an odd last one.
    // width is 32 or 64; columns beyond it are left as they are.
    VN_FN static void unpack_columns(const veneer_weight &w, const float *absmax, int64_t o0, int64_t oc, int64_t c0,
                                     int64_t width, int, uint16_t *to) {
        const F levels = _mm512_loadu_ps(w.levels);
        const int shift = __builtin_ctzll(uint64_t(w.block));
        for (int64_t o = o0; o < o0 + oc; o += 2, to += 128) {
            const int64_t above = o * w.cols + c0, below = o + 1 < w.rows ? above + w.cols : above;
            const int64_t later = above + 4 * AHEAD * w.cols;
            prefetch_row(w, absmax, later, shift);
            prefetch_row(w, absmax, later + w.cols, shift);
            I table = _mm512_setzero_si512();
            for (int64_t j = 0; j < width; j += 32) {
                if (j == 0 || w.block == 32) {
                    const float lower = below == above ? 0.f : absmax[(below + j) >> shift];
                    table = to_bf16(_mm512_mul_ps(levels, _mm512_set1_ps(absmax[(above + j) >> shift])),
                                    _mm512_mul_ps(levels, _mm512_set1_ps(lower)));
                }
                unpack_pairs(w.codes + (above + j) / 2, w.codes + (below + j) / 2, table, to + 2 * j);
            }
        }
    }

    // A hint, for weights that may lie beyond W.
    VN_FN static VN_INLINE void prefetch_row(const veneer_weight &w, const float *absmax, int64_t at, int shift) {
        prefetch(w.codes + at / 2, 1);
        prefetch(absmax + (at >> shift), 1);
    }

    template <int M, int V, class Meanwhile>
    VN_FN static void tiles_of(const uint16_t *a, int64_t lda, int64_t rows, const uint16_t *b, int64_t depth, float *c,
                               int64_t ldc, bool first, const Meanwhile &meanwhile) {
        for (int64_t r = 0; r < rows; r += M)
            tile<M, V, SPAN>(a + r * lda, lda, b, depth, c + r * ldc, ldc, first, meanwhile);
    }

    template <class Meanwhile>
    VN_FN static void tiles(const uint16_t *a, int64_t lda, int64_t rows, const uint16_t *b, int64_t depth, float *c,
                            int64_t ldc, int64_t width, bool first, const Meanwhile &meanwhile) {
        if (width > 48) return tiles_of<6, 4>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
        if (width > 32) return tiles_of<8, 3>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
        if (width > 16) return tiles_of<12, 2>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
        tiles_of<24, 1>(a, lda, rows, b, depth, c, ldc, first, meanwhile);
    }

    // Two rows of 16 -> 16 pairs in bfloat16.
    VN_FN static VN_INLINE I round_pairs(F above, F below) {
        const I in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(in_turn, to_bf16(above, below));
    }

    // y is written in lines of a cache as far as there are whole ones: 32 rows of C at a time, from a line's start on.
    VN_FN static void store_transposed(const float *c, int64_t ldc, int64_t rows, int64_t n, void *y, int64_t at,
                                       int64_t ldy, int) {
        uint16_t *to = static_cast<uint16_t *>(y) + at;
        const int64_t before = int64_t(reinterpret_cast<uintptr_t>(to) % 64 / 2);
        for (int64_t i0 = 0; i0 < n; i0 += 16)
            for (int64_t r0 = -before; r0 < rows; r0 += 32) {
                const auto row = [=](int64_t r) VN_FN {
                    return r < 0 || r >= rows ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * ldc + i0);
                };
                I pairs[16];
                VN_UNROLL for (int i = 0; i < 16; i++) pairs[i] = round_pairs(row(r0 + 2 * i), row(r0 + 2 * i + 1));
                transpose(pairs);
                const uint32_t from = r0 < 0 ? ~0u << -r0 : ~0u;
                const __mmask32 there = rows - r0 >= 32 ? from : from & ((1u << (rows - r0)) - 1);
                VN_UNROLL for (int i = 0; i < 16; i++)
                    if (i0 + i < n) _mm512_mask_storeu_epi16(to + (i0 + i) * ldy + r0, there, pairs[i]);
            }
    }

    VN_FN static void store_row(const float *c, int64_t count, void *y, int64_t at, int) {
        uint16_t *to = static_cast<uint16_t *>(y) + at;
        for (int64_t i = 0; i < count; i += 32) {
            const __mmask32 there = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
            const F low = _mm512_maskz_loadu_ps(__mmask16(there), c + i);
            const F high = _mm512_maskz_loadu_ps(__mmask16(there >> 16), c + i + 16);
            _mm512_mask_storeu_epi16(to + i, there, to_bf16(low, high));
        }
    }
};

}  // namespace avx512bf16
}  // namespace veneer

#undef VN_FN
