// Dequantize: W = levels[code] * absmax in float32, rounded to the wanted type; and absmax from its 8-bit codes.

#ifndef VN_DEQUANTIZE_H
#define VN_DEQUANTIZE_H
#include "common.h"

namespace veneer {

inline int64_t n_blocks(const veneer_weight &w) { return ceil_div(w.rows * w.cols, w.block); }

namespace scalar {

// absmax of blocks [first, last) -> out[0 ...]
inline void decode_absmax(const veneer_weight &w, int64_t first, int64_t last, float *out) {
    for (int64_t i = first; i < last;) {
        const int64_t nest = i / w.nested_block, end = least(last, (nest + 1) * w.nested_block);
        for (; i < end; i++) {
            const float nested = w.nested_levels[w.absmax_codes[i]] * w.nested_absmax[nest];
            out[i - first] = nested + w.nested_offset;  // two roundings, as the format has it: never fused
        }
    }
}

// Weights [begin, end) of the flattened W -> out[0 ...] in dtype; begin is even.
inline void dequantize(const veneer_weight &w, const float *absmax, int64_t begin, int64_t end, void *out, int dtype) {
    for (int64_t i = begin; i < end; i++) {
        const int code = i % 2 ? w.codes[i / 2] & 15 : w.codes[i / 2] >> 4;
        store_float(out, dtype, i - begin, w.levels[code] * absmax[i / w.block]);
    }
}

}  // namespace scalar
}  // namespace veneer
#endif

#ifdef VN_ISA
namespace veneer {
namespace VN_ISA {

// `count` weights of one block, the first of them even, as the float32 values they have in `dtype`.
VN_FN VN_INLINE void unpack_piece(const uint8_t *codes, const float *levels, float absmax, int64_t count, float *out,
                                  int dtype) {
    const Table table = scaled_table(levels, absmax, dtype);
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        F first, second;
        unpack(codes + i / 2, table, first, second);
        store(out + i, first);
        store(out + i + W, second);
    }
    for (; i < count; i++) {
        const int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
        out[i] = rounded_to(levels[code] * absmax, dtype);
    }
}

// Weights [begin, end) as float32 values rounded to dtype; begin is even.
VN_FN inline void unpack_range(const veneer_weight &w, const float *absmax, int64_t begin, int64_t end, float *out,
                               int dtype) {
    for (int64_t i = begin; i < end;) {
        const int64_t b = i / w.block, stop = least(end, (b + 1) * w.block);
        unpack_piece(w.codes + i / 2, w.levels, absmax[b], stop - i, out + (i - begin), dtype);
        i = stop;
    }
}

VN_FN inline void dequantize(const veneer_weight &w, const float *absmax, int64_t begin, int64_t end, void *out,
                             int dtype) {
    if (dtype == VENEER_F32) return unpack_range(w, absmax, begin, end, static_cast<float *>(out), dtype);
    alignas(64) float piece[4096];
    for (int64_t i = begin; i < end; i += 4096) {
        const int64_t count = least(4096, end - i);
        unpack_range(w, absmax, i, i + count, piece, dtype);
        uint16_t *to = static_cast<uint16_t *>(out) + (i - begin);
        int64_t j = 0;
        for (; j + W <= count; j += W) store_half(to + j, load(piece + j), dtype);
        for (; j < count; j++) store_float(to, dtype, j, piece[j]);
    }
}

}  // namespace VN_ISA
}  // namespace veneer
#endif
