// 256 bits with dot products of bytes (AVX-VNNI).
#pragma once
#include "isa_256_bits.h"

namespace fxquant {

// There is no name for it in all compilers' __builtin_cpu_supports: fxquant/processor.py has asked.
inline bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

using Operand = uint8_t;
constexpr bool PAIRS_OF_BYTES = false;
constexpr int CENTRE = 0;
using Weight = int8_t;
constexpr int BLOCKS_TOGETHER = 1;
constexpr int PIXELS_FOR[5] = {0, 6, 0, 0, 0};
constexpr int PIXELS_AT_ONCE[5] = {}, FOURS_AT_ONCE[5] = {};
constexpr int FOURS_IN_TURNS = 0;

inline Vector dot(Vector acc, Vector x, Vector weight) {
    return {{_mm256_dpbusd_avx_epi32(acc.half[0], x.half[0], weight.half[0]),
             _mm256_dpbusd_avx_epi32(acc.half[1], x.half[1], weight.half[1])}};
}
inline Vector dot_bytes(Vector acc, Vector x, const int8_t* weight) { return dot(acc, x, load(weight)); }

}  // namespace fxquant
