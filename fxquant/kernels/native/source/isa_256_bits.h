// What instruction sets of 256 bits have in common: all but how sums are made. What each operation means is told in isa_plain.h.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fxquant {

struct Vector {
    __m256i half[2];
};
struct Floats {
    __m256 half[2];
};
struct Doubles {
    __m256d half[2];
};

inline void pause() { _mm_pause(); }

// Without it GCC spills half of a tile's sums.
inline void keep(Vector& v) {
    asm volatile("" : "+x"(v.half[0]));
    asm volatile("" : "+x"(v.half[1]));
}
inline void keep(Floats& v) {
    asm volatile("" : "+x"(v.half[0]));
    asm volatile("" : "+x"(v.half[1]));
}

#define FXQUANT_EACH_HALF(NAME, INSTRUCTION) \
    inline Vector NAME(Vector a, Vector b) { return {{INSTRUCTION(a.half[0], b.half[0]), INSTRUCTION(a.half[1], b.half[1])}}; }

// ---- memory

inline const __m256i* at256(const void* from, int index = 0) { return static_cast<const __m256i*>(from) + index; }
inline __m256i both(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }
inline __m128i low128(__m256i v) { return _mm256_castsi256_si128(v); }
inline __m128i high128(__m256i v) { return _mm256_extracti128_si256(v, 1); }
inline __m128i load128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline void store128(void* to, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(to), v); }

inline Vector load(const void* from) { return {{_mm256_loadu_si256(at256(from)), _mm256_loadu_si256(at256(from, 1))}}; }
inline Vector load_first(const void* from, int64_t count) {
    if (count >= 64) return load(from);
    alignas(32) uint8_t bytes[64] = {};
    if (count > 0) std::memcpy(bytes, from, count);
    return load(bytes);
}
inline Floats load_floats(const float* from) { return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}}; }
// All bits of the first numbers of eight.
inline __m256i first_eight(int64_t count) {
    const int most = static_cast<int>(std::min<int64_t>(std::max<int64_t>(count, 0), 8));
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(most), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load_floats_first(const float* from, int64_t count) {
    if (count >= 16) return load_floats(from);
    return {{_mm256_maskload_ps(from, first_eight(count)), _mm256_maskload_ps(from + 8, first_eight(count - 8))}};
}
inline Doubles load_doubles(const double* from) { return {{_mm256_loadu_pd(from), _mm256_loadu_pd(from + 4)}}; }
inline Doubles load_doubles_first(const double* from, int64_t count) {
    if (count >= 8) return load_doubles(from);
    const __m256i mask = first_eight(count);
    return {{_mm256_maskload_pd(from, _mm256_cvtepi32_epi64(low128(mask))),
             _mm256_maskload_pd(from + 4, _mm256_cvtepi32_epi64(high128(mask)))}};
}
inline Vector widen(const uint8_t* from, int64_t count) {
    alignas(16) uint8_t bytes[16] = {};
    if (count > 0 && count < 16) std::memcpy(bytes, from, count);
    const __m128i v = load128(count >= 16 ? from : bytes);
    return {{_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))}};
}
inline Vector widen_to_words(const uint8_t* from, int64_t count) {
    alignas(32) uint8_t bytes[32] = {};
    if (count > 0 && count < 32) std::memcpy(bytes, from, count);
    const uint8_t* at = count >= 32 ? from : bytes;
    return {{_mm256_cvtepu8_epi16(load128(at)), _mm256_cvtepu8_epi16(load128(at + 16))}};
}

inline void store(void* to, Vector v) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), v.half[0]);
    _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, v.half[1]);
}
inline void store_first(uint8_t* to, Vector v, int64_t count) {
    if (count >= 64) return store(to, v);
    __m256i left = v.half[0];
    if (count >= 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), left);
        left = v.half[1], to += 32, count -= 32;
    }
    __m128i rest = low128(left);
    if (count >= 16) {
        store128(to, rest);
        rest = high128(left), to += 16, count -= 16;
    }
    if (count >= 8) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), rest);
        rest = _mm_srli_si128(rest, 8), to += 8, count -= 8;
    }
    if (count <= 0) return;
    uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(rest));
    for (; count > 0; count--, bytes >>= 8) *to++ = static_cast<uint8_t>(bytes);
}
inline void store_floats(float* to, Floats v) {
    _mm256_storeu_ps(to, v.half[0]);
    _mm256_storeu_ps(to + 8, v.half[1]);
}
inline void store_floats_first(float* to, Floats v, int64_t count) {
    if (count >= 16) return store_floats(to, v);
    _mm256_maskstore_ps(to, first_eight(count), v.half[0]);
    _mm256_maskstore_ps(to + 8, first_eight(count - 8), v.half[1]);
}

template <int PARTS>
inline Vector load_parts(const uint8_t* const* at) {
    if constexpr (PARTS == 1) return load(at[0]);
    if constexpr (PARTS == 2) return {{_mm256_loadu_si256(at256(at[0])), _mm256_loadu_si256(at256(at[1]))}};
    return {{both(load128(at[0]), load128(at[1 % PARTS])), both(load128(at[2 % PARTS]), load128(at[3 % PARTS]))}};
}
template <int PARTS, int PART>
inline Vector part(Vector v) {
    const __m256i half = v.half[PART * 2 / PARTS];
    return {{PARTS == 4 && PART % 2 ? _mm256_castsi128_si256(high128(half)) : half, v.half[1]}};
}

inline void store_triples(uint8_t* to, Vector a, Vector b, Vector c, int count) {
    alignas(32) uint8_t bytes[64];
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    for (int i = 0; i < 2; i++) {
        const __m256i q = _mm256_or_si256(a.half[i], _mm256_or_si256(_mm256_slli_epi32(b.half[i], 8), _mm256_slli_epi32(c.half[i], 16)));
        const __m256i close = _mm256_shuffle_epi8(q, order);
        store128(bytes + 24 * i, low128(close));
        store128(bytes + 24 * i + 12, high128(close));
    }
    std::memcpy(to, bytes, 3 * count);
}
inline void store_low_bytes(uint8_t* to, Vector v) {
    const __m256i byte = _mm256_set1_epi32(0xFF);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(v.half[0], byte), _mm256_and_si256(v.half[1], byte));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
    store128(to, _mm_packus_epi16(low128(ordered), high128(ordered)));
}

// ---- constants

inline Vector twice(__m256i v) { return {{v, v}}; }
inline Vector zeros() { return twice(_mm256_setzero_si256()); }
inline Vector each8(int x) { return twice(_mm256_set1_epi8(static_cast<char>(x))); }
inline Vector each16(int x) { return twice(_mm256_set1_epi16(static_cast<int16_t>(x))); }
inline Vector each32(int32_t x) { return twice(_mm256_set1_epi32(x)); }
inline Vector each64(int64_t x) { return twice(_mm256_set1_epi64x(x)); }
inline Floats each(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline Doubles each(double x) { return {{_mm256_set1_pd(x), _mm256_set1_pd(x)}}; }
inline Doubles counted() { return {{_mm256_setr_pd(0, 1, 2, 3), _mm256_setr_pd(4, 5, 6, 7)}}; }

// ---- bytes and words

FXQUANT_EACH_HALF(max8, _mm256_max_epu8)
FXQUANT_EACH_HALF(min8, _mm256_min_epu8)
FXQUANT_EACH_HALF(low8, _mm256_unpacklo_epi8)
FXQUANT_EACH_HALF(high8, _mm256_unpackhi_epi8)
FXQUANT_EACH_HALF(low16, _mm256_unpacklo_epi16)
FXQUANT_EACH_HALF(high16, _mm256_unpackhi_epi16)
FXQUANT_EACH_HALF(add16, _mm256_add_epi16)
FXQUANT_EACH_HALF(sub16, _mm256_sub_epi16)
FXQUANT_EACH_HALF(dot_pairs, _mm256_madd_epi16)
inline int64_t sum8(Vector v) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i four = _mm256_add_epi64(_mm256_sad_epu8(v.half[0], zero), _mm256_sad_epu8(v.half[1], zero));
    const __m128i two = _mm_add_epi64(low128(four), high128(four));
    return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
}

inline __m256i pack_one(__m256i a, __m256i b, __m256i c, __m256i d) {
    return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
inline __m256i pack_one_of_words(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA), cd = _mm256_blend_epi16(c, _mm256_slli_epi32(d, 16), 0xAA);
    const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    return _mm256_shuffle_epi8(_mm256_packus_epi16(ab, cd), apart);
}
inline __m256i lanes_in_turns(__m256i v) { return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
inline Vector pack_interleaved(const Vector v[4]) {
    return {{pack_one(v[0].half[0], v[1].half[0], v[2].half[0], v[3].half[0]),
             pack_one(v[0].half[1], v[1].half[1], v[2].half[1], v[3].half[1])}};
}
inline Vector pack(const Vector v[4]) {
    return {{lanes_in_turns(pack_one(v[0].half[0], v[0].half[1], v[1].half[0], v[1].half[1])),
             lanes_in_turns(pack_one(v[2].half[0], v[2].half[1], v[3].half[0], v[3].half[1]))}};
}
inline Vector pack_interleaved_words(const Vector v[4]) {
    return {{pack_one_of_words(v[0].half[0], v[1].half[0], v[2].half[0], v[3].half[0]),
             pack_one_of_words(v[0].half[1], v[1].half[1], v[2].half[1], v[3].half[1])}};
}
inline Vector pack_words(const Vector v[4]) {
    return {{lanes_in_turns(pack_one_of_words(v[0].half[0], v[0].half[1], v[1].half[0], v[1].half[1])),
             lanes_in_turns(pack_one_of_words(v[2].half[0], v[2].half[1], v[3].half[0], v[3].half[1]))}};
}

// The lower halves of 16 numbers in 32 bytes, and 64 bytes of four such blocks, 64 bytes apart.
constexpr bool NARROWS = true;
inline void store_words(void* to, Vector v) {
    const __m256i words = _mm256_blend_epi16(v.half[0], _mm256_slli_epi32(v.half[1], 16), 0xAA);
    _mm256_storeu_si256(static_cast<__m256i*>(to), words);
}
inline Vector pack_stored_words(const int32_t* from) {
    const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    const auto two = [&](int j) {
        const __m256i bytes = _mm256_packus_epi16(_mm256_loadu_si256(at256(from, 2 * j)), _mm256_loadu_si256(at256(from, 2 * j + 2)));
        return lanes_in_turns(_mm256_shuffle_epi8(bytes, apart));
    };
    return {{two(0), two(2)}};
}

// Sixteen tables of 16 bytes, each kept as its difference to the one before: an index goes down by 16 with each table, and
// once it is negative the shuffle gives zeros. Indices from 128 on take the second eight.
struct Table {
    alignas(32) uint8_t step[16][16];

    explicit Table(const uint8_t* table) {
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 16; i++) step[k][i] = table[16 * k + i] ^ (k % 8 ? table[16 * k + i - 16] : 0);
    }
    __m256i one(__m256i index) const {
        const __m256i down = _mm256_set1_epi8(16);
        __m256i low = index, high = _mm256_xor_si256(index, _mm256_set1_epi8(-128)), found = _mm256_setzero_si256();
        for (int k = 0; k < 8; k++) {
            const __m256i first = _mm256_broadcastsi128_si256(load128(step[k]));
            const __m256i second = _mm256_broadcastsi128_si256(load128(step[8 + k]));
            found = _mm256_xor_si256(found, _mm256_xor_si256(_mm256_shuffle_epi8(first, low), _mm256_shuffle_epi8(second, high)));
            low = _mm256_subs_epi8(low, down), high = _mm256_subs_epi8(high, down);
        }
        return found;
    }
    Vector operator()(Vector index) const { return {{one(index.half[0]), one(index.half[1])}}; }
};

// ---- 32 bits

FXQUANT_EACH_HALF(add32, _mm256_add_epi32)
FXQUANT_EACH_HALF(sub32, _mm256_sub_epi32)
FXQUANT_EACH_HALF(mul32, _mm256_mullo_epi32)
FXQUANT_EACH_HALF(max32, _mm256_max_epi32)
inline Vector dot_words(Vector acc, Vector a, Vector b) { return add32(acc, dot_pairs(a, b)); }
inline Vector shift_right32(Vector v, int count) {
    const __m128i by = _mm_cvtsi32_si128(count);
    return {{_mm256_sra_epi32(v.half[0], by), _mm256_sra_epi32(v.half[1], by)}};
}
inline Vector upper16(Vector v) { return {{_mm256_srai_epi32(v.half[0], 16), _mm256_srai_epi32(v.half[1], 16)}}; }
inline Vector first_of(int64_t count, Vector a, Vector b) {
    if (count >= 16) return a;
    return {{_mm256_blendv_epi8(b.half[0], a.half[0], first_eight(count)),
             _mm256_blendv_epi8(b.half[1], a.half[1], first_eight(count - 8))}};
}
inline int32_t sum32(Vector v) {
    const __m256i eight = _mm256_add_epi32(v.half[0], v.half[1]);
    const __m128i four = _mm_add_epi32(low128(eight), high128(eight));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return static_cast<int32_t>(static_cast<uint32_t>(_mm_cvtsi128_si32(two)) + static_cast<uint32_t>(_mm_extract_epi32(two, 1)));
}
inline int32_t greatest32(Vector v) {
    const __m256i eight = _mm256_max_epi32(v.half[0], v.half[1]);
    const __m128i four = _mm_max_epi32(low128(eight), high128(eight));
    const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return std::max(_mm_cvtsi128_si32(two), _mm_extract_epi32(two, 1));
}

// ---- 64 bits

FXQUANT_EACH_HALF(add64, _mm256_add_epi64)
FXQUANT_EACH_HALF(products, _mm256_mul_epi32)
// Arithmetic: the sign, which a logical shift moves down as well, is spread by a subtraction.
inline __m256i shift_right64(__m256i v, __m256i count) {
    const __m256i sign = _mm256_srlv_epi64(_mm256_set1_epi64x(INT64_MIN), count);
    return _mm256_sub_epi64(_mm256_xor_si256(_mm256_srlv_epi64(v, count), sign), sign);
}
inline Vector shift_right64(Vector v, Vector count) {
    return {{shift_right64(v.half[0], count.half[0]), shift_right64(v.half[1], count.half[1])}};
}
inline Vector odd_ones(Vector v) { return {{_mm256_srli_epi64(v.half[0], 32), _mm256_srli_epi64(v.half[1], 32)}}; }
inline Vector even_and_odd(Vector even, Vector odd) {
    return {{_mm256_blend_epi32(even.half[0], _mm256_slli_epi64(odd.half[0], 32), 0xAA),
             _mm256_blend_epi32(even.half[1], _mm256_slli_epi64(odd.half[1], 32), 0xAA)}};
}
inline __m256i below(__m256i v, int64_t most) {
    const __m256i negative = _mm256_cmpgt_epi64(_mm256_setzero_si256(), v);
    return _mm256_andnot_si256(negative, _mm256_cmpgt_epi64(_mm256_set1_epi64x(most), v));
}
inline Vector where_below(Vector a, int64_t most_a, Vector b, int64_t most_b, Vector yes, Vector no) {
    const auto one = [&](int i) {
        const __m256i there = _mm256_and_si256(below(a.half[i], most_a), below(b.half[i], most_b));
        return _mm256_blendv_epi8(no.half[i], yes.half[i], there);
    };
    return {{one(0), one(1)}};
}

// ---- floats

#define FXQUANT_OPERATOR(V, SIGN) \
    inline V operator SIGN(V a, V b) { return {{a.half[0] SIGN b.half[0], a.half[1] SIGN b.half[1]}}; }
FXQUANT_OPERATOR(Floats, +)
FXQUANT_OPERATOR(Floats, -)
FXQUANT_OPERATOR(Floats, *)
FXQUANT_OPERATOR(Floats, /)
FXQUANT_OPERATOR(Doubles, +)
FXQUANT_OPERATOR(Doubles, *)
FXQUANT_OPERATOR(Doubles, /)
#undef FXQUANT_OPERATOR

inline Vector bits(Floats v) { return {{_mm256_castps_si256(v.half[0]), _mm256_castps_si256(v.half[1])}}; }
inline Floats to_floats(Vector v) { return {{_mm256_cvtepi32_ps(v.half[0]), _mm256_cvtepi32_ps(v.half[1])}}; }
inline Vector nearest(Floats v) { return {{_mm256_cvtps_epi32(v.half[0]), _mm256_cvtps_epi32(v.half[1])}}; }
inline Floats rounded(Floats v) {
    constexpr int TO_NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {{_mm256_round_ps(v.half[0], TO_NEAREST), _mm256_round_ps(v.half[1], TO_NEAREST)}};
}
inline Floats fused(Floats a, Floats b, Floats c) {
    return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}
inline Floats greater(Floats a, Floats b) {
    return {{_mm256_max_ps(a.half[0], b.half[0]), _mm256_max_ps(a.half[1], b.half[1])}};
}
inline Floats smaller(Floats a, Floats b) {
    return {{_mm256_min_ps(a.half[0], b.half[0]), _mm256_min_ps(a.half[1], b.half[1])}};
}
inline Floats times_power(Floats v, Floats n) {
    const auto power = [](__m256 exponent) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23));
    };
    return {{v.half[0] * power(n.half[0]), v.half[1] * power(n.half[1])}};
}
inline Floats first_of(int64_t count, Floats v) {
    if (count >= 16) return v;
    return {{_mm256_and_ps(v.half[0], _mm256_castsi256_ps(first_eight(count))),
             _mm256_and_ps(v.half[1], _mm256_castsi256_ps(first_eight(count - 8)))}};
}
inline float sum(Floats v) {
    const __m256 eight = v.half[0] + v.half[1];
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// ---- doubles

inline Doubles doubles_of(__m256i v) { return {{_mm256_cvtepi32_pd(low128(v)), _mm256_cvtepi32_pd(high128(v))}}; }
inline Doubles low_doubles(Vector v) { return doubles_of(v.half[0]); }
inline Doubles high_doubles(Vector v) { return doubles_of(v.half[1]); }
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
    return {{_mm256_fmadd_pd(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_pd(a.half[1], b.half[1], c.half[1])}};
}
inline Doubles exact(Doubles a, Doubles b, Doubles c) { return fused(a, b, c); }
inline Doubles floor_of(Doubles v) { return {{_mm256_floor_pd(v.half[0]), _mm256_floor_pd(v.half[1])}}; }
// Whole numbers below 2^51: added to 1.5 * 2^52 they lie in the low bits.
inline Vector to_int64(Doubles v) {
    const __m256d magic = _mm256_set1_pd(0x1.8p52);
    const auto one = [&](__m256d x) { return _mm256_sub_epi64(_mm256_castpd_si256(x + magic), _mm256_castpd_si256(magic)); };
    return {{one(v.half[0]), one(v.half[1])}};
}
inline __m256i low_bits(Doubles v) {
    const __m256 even = _mm256_shuffle_ps(_mm256_castpd_ps(v.half[0]), _mm256_castpd_ps(v.half[1]), 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xD8);
}
inline Vector low_bits(Doubles a, Doubles b) { return {{low_bits(a), low_bits(b)}}; }
inline Vector nearest(Doubles a, Doubles b) {
    return {{both(_mm256_cvtpd_epi32(a.half[0]), _mm256_cvtpd_epi32(a.half[1])),
             both(_mm256_cvtpd_epi32(b.half[0]), _mm256_cvtpd_epi32(b.half[1]))}};
}
inline __m256 singles(Doubles v) { return _mm256_set_m128(_mm256_cvtpd_ps(v.half[1]), _mm256_cvtpd_ps(v.half[0])); }
inline Floats singles(Doubles a, Doubles b) { return {{singles(a), singles(b)}}; }

}  // namespace fxquant
