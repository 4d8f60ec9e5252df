// 64 bytes at a time: requantization, tables, sums of two grids. Every rule is that of fxquant's integer forms, to the bit.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "tensor.h"

namespace fxquant {

inline __mmask64 first(int64_t count) { return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1; }

// The first bytes of a vector. Stores under a mask take many times as long as others, so whole quarters are stored plainly.
inline void store(uint8_t* to, __m512i v, int count) {
    if (count >= 64) return _mm512_storeu_si512(to, v);
    if (count >= 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(v));
        v = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 1)), to += 32, count -= 32;
    }
    if (count >= 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(v));
        v = _mm512_castsi128_si512(_mm512_extracti32x4_epi32(v, 1)), to += 16, count -= 16;
    }
    if (count >= 8) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(v));
        v = _mm512_castsi128_si512(_mm_srli_si128(_mm512_castsi512_si128(v), 8)), to += 8, count -= 8;
    }
    if (count > 0) _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), _mm512_castsi512_si128(v));
}

// round(acc * number) + zero point of 16 sums by 16 numbers: the fused multiply-add leaves a whole number in the low bits.
inline __m512i rescale(__m512i acc, const float* number, __m512 magic) {
    return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(number), magic));
}

inline __m512i rescale(__m512i acc, const double* number, __m512d magic) {
    const __m256i low = _mm512_castsi512_si256(acc), high = _mm512_extracti64x4_epi64(acc, 1);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512d a = _mm512_fmadd_pd(_mm512_cvtepi32_pd(low), _mm512_loadu_pd(number), magic);
    const __m512d b = _mm512_fmadd_pd(_mm512_cvtepi32_pd(high), _mm512_loadu_pd(number + 8), magic);
    return _mm512_permutex2var_epi32(_mm512_castpd_si512(a), even, _mm512_castpd_si512(b));
}

// floor((acc * q + r) / 2^s) of 16 numbers; a product has up to 62 bits, so even and odd lanes go separate ways.
struct Multiplier {
    __m512i q[2], r[2], s[2];

    explicit Multiplier(const int64_t* constants) {
        for (int odd = 0; odd < 2; odd++) {
            q[odd] = _mm512_loadu_si512(constants + 24 * odd);
            r[odd] = _mm512_loadu_si512(constants + 24 * odd + 8);
            s[odd] = _mm512_loadu_si512(constants + 24 * odd + 16);
        }
    }
    __m512i operator()(__m512i acc) const {
        __m512i even = _mm512_mul_epi32(acc, q[0]);
        __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64(acc, 32), q[1]);
        even = _mm512_srav_epi64(_mm512_add_epi64(even, r[0]), s[0]);
        odd = _mm512_srav_epi64(_mm512_add_epi64(odd, r[1]), s[1]);
        return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
    }
};

// Four vectors of 16 numbers as 64 saturated bytes. "Woven" numbers come as unpacking bytes twice leaves them: vector j has
// the channels 16 L + 4 j + (0..3) of each lane L.
inline __m512i pack_woven(const __m512i v[4]) {
    return _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
}

inline __m512i pack(const __m512i v[4]) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, pack_woven(v));
}

// The same of numbers of 16 bits, whatever the upper half of their 32 is.
inline __m512i low_words(const uint16_t order[32], const __m512i v[4]) {
    const __m512i from = _mm512_load_si512(order);
    return _mm512_packus_epi16(_mm512_permutex2var_epi16(v[0], from, v[1]), _mm512_permutex2var_epi16(v[2], from, v[3]));
}

alignas(64) static const uint16_t WOVEN_WORDS[32] = {0,  2,  4,  6,  32, 34, 36, 38, 8,  10, 12, 14, 40, 42, 44, 46,
                                                     16, 18, 20, 22, 48, 50, 52, 54, 24, 26, 28, 30, 56, 58, 60, 62};
alignas(64) static const uint16_t WORDS[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                               32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};

inline __m512i pack_woven_words(const __m512i v[4]) { return low_words(WOVEN_WORDS, v); }

inline __m512i pack_words(const __m512i v[4]) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), low_words(WORDS, v));
}

// The ways from sums to numbers (see Requantization), for a block of 16 channels.
enum Rule { FLOAT32, FLOAT64, INTEGERS };

inline Rule rule_of(const Step& s) { return s.flags & TIES ? INTEGERS : s.flags & IN_FLOAT64 ? FLOAT64 : FLOAT32; }

template <Rule RULE>
struct Rescaling {
    using Constant = std::conditional_t<RULE == FLOAT32, float, std::conditional_t<RULE == FLOAT64, double, int64_t>>;
    static constexpr int A_BLOCK = RULE == INTEGERS ? 48 : 16;
    const Constant* constants;
    double magic;

    Rescaling(const Step& s, int64_t block)
        : constants(static_cast<const Constant*>(s.out.constants) + A_BLOCK * block), magic(s.out.magic) {}
    __m512i operator()(__m512i acc, int block) const {
        const Constant* own = constants + A_BLOCK * block;
        if constexpr (RULE == FLOAT32) {
            return rescale(acc, own, _mm512_set1_ps(static_cast<float>(magic)));
        } else if constexpr (RULE == FLOAT64) {
            return rescale(acc, own, _mm512_set1_pd(magic));
        } else {
            return Multiplier(own)(acc);
        }
    }
    static __m512i bytes(const __m512i v[4]) { return RULE == FLOAT32 ? pack_words(v) : pack(v); }
    static __m512i woven_bytes(const __m512i v[4]) { return RULE == FLOAT32 ? pack_woven_words(v) : pack_woven(v); }
};

// The opposite of pack_woven.
inline void weave(__m512i bytes, __m512i v[4]) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi8(bytes, zero), high = _mm512_unpackhi_epi8(bytes, zero);
    v[0] = _mm512_unpacklo_epi16(low, zero), v[1] = _mm512_unpackhi_epi16(low, zero);
    v[2] = _mm512_unpacklo_epi16(high, zero), v[3] = _mm512_unpackhi_epi16(high, zero);
}

inline __m512i clamp(__m512i bytes, __m512i low, __m512i high) {
    return _mm512_min_epu8(_mm512_max_epu8(bytes, low), high);
}

static const uint8_t NO_TABLE[256] = {};

struct Table {
    __m512i part[4];

    explicit Table(const uint8_t* table) {
        for (int i = 0; i < 4; i++) part[i] = _mm512_loadu_si512(table + 64 * i);
    }
    __m512i operator()(__m512i index) const {
        const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
        const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    }
};

// (a q0 + b q1 + c) >> s of bytes, exactly, in 32 bits: with q = 2^16 h + l the products with h and l are summed apart, and
// floor((2^16 H + L) / 2^s) = floor((H + floor(L / 2^16)) / 2^(s - 16)).
struct Sum {
    __m512i high, low, constant_high, constant_low, least, most;
    __m128i shift;

    explicit Sum(const Addition& add) {
        uint32_t halves[2][2];
        for (int i = 0; i < 2; i++) {
            halves[1][i] = add.q[i] & 0xFFFF;
            halves[0][i] = static_cast<uint32_t>((static_cast<int64_t>(add.q[i]) - static_cast<int16_t>(halves[1][i])) >> 16);
        }
        high = _mm512_set1_epi32(static_cast<int32_t>((halves[0][0] & 0xFFFF) | (halves[0][1] << 16)));
        low = _mm512_set1_epi32(static_cast<int32_t>(halves[1][0] | (halves[1][1] << 16)));
        constant_high = _mm512_set1_epi32(static_cast<int32_t>(add.constant >> 16));
        constant_low = _mm512_set1_epi32(static_cast<int32_t>(add.constant & 0xFFFF));
        shift = _mm_cvtsi32_si128(add.shift - 16);
        least = _mm512_set1_epi8(static_cast<char>(add.low)), most = _mm512_set1_epi8(static_cast<char>(add.high));
    }
    __m512i one(__m512i pairs) const {
        const __m512i h = _mm512_dpwssd_epi32(constant_high, pairs, high);
        const __m512i l = _mm512_dpwssd_epi32(constant_low, pairs, low);
        return _mm512_sra_epi32(_mm512_add_epi32(h, _mm512_srai_epi32(l, 16)), shift);
    }
    __m512i operator()(__m512i a, __m512i b) const {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i a0 = _mm512_unpacklo_epi8(a, zero), a1 = _mm512_unpackhi_epi8(a, zero);
        const __m512i b0 = _mm512_unpacklo_epi8(b, zero), b1 = _mm512_unpackhi_epi8(b, zero);
        const __m512i v[4] = {one(_mm512_unpacklo_epi16(a0, b0)), one(_mm512_unpackhi_epi16(a0, b0)),
                              one(_mm512_unpacklo_epi16(a1, b1)), one(_mm512_unpackhi_epi16(a1, b1))};
        return clamp(pack_woven(v), least, most);
    }
};

// The same in 64 bits, for a q that is too close to 2^31 for two halves of 16 bits.
inline __m512i wide_sum(const Addition& add, __m512i a, __m512i b) {
    alignas(64) uint8_t in[2][64], out[64];
    _mm512_store_si512(in[0], a), _mm512_store_si512(in[1], b);
    const __m512i q0 = _mm512_set1_epi64(add.q[0]), q1 = _mm512_set1_epi64(add.q[1]);
    for (int k = 0; k < 64; k += 8) {
        const __m512i x = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in[0] + k)));
        const __m512i y = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in[1] + k)));
        __m512i sum = _mm512_add_epi64(_mm512_mul_epi32(x, q0), _mm512_mul_epi32(y, q1));
        sum = _mm512_sra_epi64(_mm512_add_epi64(sum, _mm512_set1_epi64(add.constant)), _mm_cvtsi32_si128(add.shift));
        sum = _mm512_min_epi64(_mm512_max_epi64(sum, _mm512_set1_epi64(add.low)), _mm512_set1_epi64(add.high));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + k), _mm512_cvtepi64_epi8(sum));
    }
    return _mm512_load_si512(out);
}

// What happens to 64 bytes once they are requantized.
struct Finish {
    __m512i low, high;
    bool looks_up, adds;
    Table table;
    Sum sum;

    explicit Finish(const Step& step)
        : low(_mm512_set1_epi8(static_cast<char>(step.out.low))),
          high(_mm512_set1_epi8(static_cast<char>(step.out.high))),
          looks_up(step.out.table != nullptr),
          adds(step.flags & ADDS),
          table(looks_up ? step.out.table : NO_TABLE),
          sum(step.add) {}
    __m512i operator()(__m512i bytes) const {
        bytes = clamp(bytes, low, high);
        return looks_up ? table(bytes) : bytes;
    }
    __m512i operator()(__m512i bytes, const uint8_t* other) const {
        bytes = (*this)(bytes);
        return adds ? sum(bytes, _mm512_loadu_si512(other)) : bytes;
    }
};

}  // namespace fxquant
