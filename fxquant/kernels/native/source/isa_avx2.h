// 256 bits without dot products of bytes: pixels and weights are widened to 16 bits, whose products in pairs (vpmaddwd) are
// exact for any weights. vpmaddubsw, which adds two products of bytes in 16 bits, saturates; a quarter faster, it is for layers
// whose weights cannot make it do so, but for a few that are then multiplied by halves.
#pragma once
#include "isa_256_bits.h"

namespace fxquant {

inline bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

using Operand = uint16_t;
constexpr bool PAIRS_OF_BYTES = true;
constexpr int CENTRE = 0;
using Weight = int16_t;
constexpr int BLOCKS_TOGETHER = 1;
constexpr int PIXELS_FOR[5] = {0, 6, 0, 0, 0};
constexpr int PIXELS_AT_ONCE[5] = {}, FOURS_AT_ONCE[5] = {};
constexpr int FOURS_IN_TURNS = 0;

inline Vector dot(Vector acc, Vector x, Vector weight) { return dot_words(acc, x, weight); }
inline Vector dot_in_pairs(Vector acc, Vector x, Vector weight) {
    const Vector pairs = {{_mm256_maddubs_epi16(x.half[0], weight.half[0]), _mm256_maddubs_epi16(x.half[1], weight.half[1])}};
    return dot_words(acc, pairs, each16(1));
}
inline Vector dot_bytes(Vector acc, Vector x, const int8_t* weight) {
    const __m256i byte = _mm256_set1_epi16(0xFF);
    const Vector even = {{_mm256_and_si256(x.half[0], byte), _mm256_and_si256(x.half[1], byte)}};
    const Vector odd = {{_mm256_srli_epi16(x.half[0], 8), _mm256_srli_epi16(x.half[1], 8)}};
    return dot_words(dot_words(acc, even, load(weight)), odd, load(weight + 64));
}

}  // namespace fxquant
