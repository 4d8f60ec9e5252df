// 512 bits, with or without dot products of bytes (VNNI) and permutations of bytes (VBMI), as the compiler is told. What each
// operation means is told in isa_plain.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace fxquant {

using Vector = __m512i;
using Floats = __m512;
using Doubles = __m512d;

inline bool runs_here() {
#ifdef __AVX512VNNI__
    if (!__builtin_cpu_supports("avx512vnni")) return false;
#endif
#ifdef __AVX512VBMI__
    if (!__builtin_cpu_supports("avx512vbmi")) return false;
#endif
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
inline void pause() { _mm_pause(); }

// ---- how sums are made

constexpr int CENTRE = 0;
#ifdef __AVX512VNNI__
using Operand = uint8_t;
constexpr bool PAIRS_OF_BYTES = false;
using Weight = int8_t;
constexpr int BLOCKS_TOGETHER = 4;
constexpr int PIXELS_FOR[5] = {0, 8, 8, 8, 6};
constexpr int PIXELS_AT_ONCE[5] = {0, 8, 8, 4, 4}, FOURS_AT_ONCE[5] = {0, 1 << 30, 1 << 30, 12, 12};
constexpr int FOURS_IN_TURNS = 192;
constexpr bool NARROWS = false;

inline Vector dot(Vector acc, Vector x, Vector weight) { return _mm512_dpbusd_epi32(acc, x, weight); }
inline Vector dot_bytes(Vector acc, Vector x, const int8_t* weight) {
    return _mm512_dpbusd_epi32(acc, x, _mm512_loadu_si512(weight));
}
inline Vector dot_words(Vector acc, Vector a, Vector b) { return _mm512_dpwssd_epi32(acc, a, b); }
#else
// As in isa_avx2.h: products of words, and of bytes in pairs where weights allow it.
using Operand = uint16_t;
constexpr bool PAIRS_OF_BYTES = true;
using Weight = int16_t;
constexpr int BLOCKS_TOGETHER = 1;
constexpr int PIXELS_FOR[5] = {0, 8, 0, 0, 0};
constexpr int PIXELS_AT_ONCE[5] = {}, FOURS_AT_ONCE[5] = {};
constexpr int FOURS_IN_TURNS = 0;
constexpr bool NARROWS = false;

inline Vector dot_words(Vector acc, Vector a, Vector b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
inline Vector dot(Vector acc, Vector x, Vector weight) { return dot_words(acc, x, weight); }
inline Vector dot_in_pairs(Vector acc, Vector x, Vector weight) {
    return dot_words(acc, _mm512_maddubs_epi16(x, weight), _mm512_set1_epi16(1));
}
inline Vector dot_bytes(Vector acc, Vector x, const int8_t* weight) {
    const Vector even = _mm512_and_si512(x, _mm512_set1_epi16(0xFF)), odd = _mm512_srli_epi16(x, 8);
    acc = dot_words(acc, even, _mm512_loadu_si512(weight));
    return dot_words(acc, odd, _mm512_loadu_si512(weight + 64));
}
#endif
inline void keep(Vector&) {}
inline void keep(Floats&) {}

// ---- memory

inline __mmask64 first(int64_t count) { return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1; }

inline Vector load(const void* from) { return _mm512_loadu_si512(from); }
inline Vector load_first(const void* from, int64_t count) { return _mm512_maskz_loadu_epi8(first(count), from); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_floats_first(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(count)), from);
}
inline Doubles load_doubles(const double* from) { return _mm512_loadu_pd(from); }
inline Doubles load_doubles_first(const double* from, int64_t count) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first(count)), from);
}
inline Vector widen(const uint8_t* from, int64_t count) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>(first(count)), from));
}
inline Vector widen_to_words(const uint8_t* from, int64_t count) {
    return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(first(count)), from));
}

inline void store(void* to, Vector v) { _mm512_storeu_si512(to, v); }
// Stores under a mask take many times as long as others, so whole quarters are stored plainly.
inline void store_first(uint8_t* to, Vector v, int64_t count) {
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
inline void store_floats(float* to, Floats v) { _mm512_storeu_ps(to, v); }
inline void store_floats_first(float* to, Floats v, int64_t count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first(count)), v);
}

template <int PARTS>
inline Vector load_parts(const uint8_t* const* at) {
    if constexpr (PARTS == 1) return _mm512_loadu_si512(at[0]);
    if constexpr (PARTS == 2)
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at[0]))),
                                  _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at[1])), 1);
    Vector v = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at[0])));
    v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at[1 % PARTS])), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at[2 % PARTS])), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at[3 % PARTS])), 3);
}
template <int PARTS, int PART>
inline Vector part(Vector v) {
    if constexpr (PART == 0) return v;
    if constexpr (PARTS == 2) return _mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_castsi128_si512(_mm512_extracti32x4_epi32(v, PART));
}

inline void store_triples(uint8_t* to, Vector a, Vector b, Vector c, int count) {
    const Vector q = _mm512_or_si512(a, _mm512_or_si512(_mm512_slli_epi32(b, 8), _mm512_slli_epi32(c, 16)));
#ifdef __AVX512VBMI__
    alignas(64) uint8_t order[64] = {};
    for (int k = 0; k < 48; k++) order[k] = static_cast<uint8_t>(k / 3 * 4 + k % 3);
    const Vector triples = _mm512_permutexvar_epi8(_mm512_load_si512(order), q);
#else
    const Vector close = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const Vector order = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
    const Vector triples = _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(q, close));
#endif
    _mm512_mask_storeu_epi8(to, first(3 * count), triples);
}
inline void store_low_bytes(uint8_t* to, Vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v));
}

// ---- constants

inline Vector zeros() { return _mm512_setzero_si512(); }
inline Vector each8(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline Vector each16(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
inline Vector each32(int32_t x) { return _mm512_set1_epi32(x); }
inline Vector each64(int64_t x) { return _mm512_set1_epi64(x); }
inline Floats each(float x) { return _mm512_set1_ps(x); }
inline Doubles each(double x) { return _mm512_set1_pd(x); }
inline Doubles counted() { return _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7); }

// ---- bytes and words

inline Vector max8(Vector a, Vector b) { return _mm512_max_epu8(a, b); }
inline Vector min8(Vector a, Vector b) { return _mm512_min_epu8(a, b); }
inline Vector low8(Vector a, Vector b) { return _mm512_unpacklo_epi8(a, b); }
inline Vector high8(Vector a, Vector b) { return _mm512_unpackhi_epi8(a, b); }
inline Vector low16(Vector a, Vector b) { return _mm512_unpacklo_epi16(a, b); }
inline Vector high16(Vector a, Vector b) { return _mm512_unpackhi_epi16(a, b); }
inline Vector add16(Vector a, Vector b) { return _mm512_add_epi16(a, b); }
inline Vector sub16(Vector a, Vector b) { return _mm512_sub_epi16(a, b); }
inline int64_t sum8(Vector v) { return _mm512_reduce_add_epi64(_mm512_sad_epu8(v, _mm512_setzero_si512())); }

inline Vector pack_interleaved(const Vector v[4]) {
    return _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
}
inline Vector pack(const Vector v[4]) {
    const Vector order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, pack_interleaved(v));
}

inline Vector low_halves(const uint16_t order[32], const Vector v[4]) {
    const Vector from = _mm512_load_si512(order);
    return _mm512_packus_epi16(_mm512_permutex2var_epi16(v[0], from, v[1]), _mm512_permutex2var_epi16(v[2], from, v[3]));
}
alignas(64) static const uint16_t INTERLEAVED_WORDS[32] = {0,  2,  4,  6,  32, 34, 36, 38, 8,  10, 12, 14, 40, 42, 44, 46,
                                                     16, 18, 20, 22, 48, 50, 52, 54, 24, 26, 28, 30, 56, 58, 60, 62};
alignas(64) static const uint16_t WORDS[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                               32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
inline Vector pack_interleaved_words(const Vector v[4]) { return low_halves(INTERLEAVED_WORDS, v); }
inline Vector pack_words(const Vector v[4]) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), low_halves(WORDS, v));
}

struct Table {
    Vector part[4];

    explicit Table(const uint8_t* table) {
        for (int i = 0; i < 4; i++) part[i] = _mm512_loadu_si512(table + 64 * i);
    }
#ifdef __AVX512VBMI__
    Vector operator()(Vector index) const {
        const Vector low = _mm512_permutex2var_epi8(part[0], index, part[1]);
        const Vector high = _mm512_permutex2var_epi8(part[2], index, part[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    }
#else
    // Bytes of the even places, or of the odd ones, as words: two entries are found together, and one of them kept.
    Vector one(Vector index) const {
        const Vector pair = _mm512_srli_epi16(index, 1);
        const Vector low = _mm512_permutex2var_epi16(part[0], pair, part[1]);
        const Vector high = _mm512_permutex2var_epi16(part[2], pair, part[3]);
        const Vector both = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(128)), low, high);
        const Vector by = _mm512_slli_epi16(_mm512_and_si512(index, _mm512_set1_epi16(1)), 3);
        return _mm512_and_si512(_mm512_srlv_epi16(both, by), _mm512_set1_epi16(0xFF));
    }
    Vector operator()(Vector index) const {
        const Vector even = one(_mm512_and_si512(index, _mm512_set1_epi16(0xFF))), odd = one(_mm512_srli_epi16(index, 8));
        return _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
    }
#endif
};

// ---- 32 bits

inline Vector add32(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
inline Vector sub32(Vector a, Vector b) { return _mm512_sub_epi32(a, b); }
inline Vector mul32(Vector a, Vector b) { return _mm512_mullo_epi32(a, b); }
inline Vector max32(Vector a, Vector b) { return _mm512_max_epi32(a, b); }
inline Vector shift_right32(Vector v, int count) { return _mm512_sra_epi32(v, _mm_cvtsi32_si128(count)); }
inline Vector upper16(Vector v) { return _mm512_srai_epi32(v, 16); }
inline Vector first_of(int64_t count, Vector a, Vector b) {
    return _mm512_mask_mov_epi32(b, static_cast<__mmask16>(first(count)), a);
}
inline int32_t sum32(Vector v) { return _mm512_reduce_add_epi32(v); }
inline int32_t greatest32(Vector v) { return _mm512_reduce_max_epi32(v); }

// ---- 64 bits

inline Vector add64(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
inline Vector shift_right64(Vector v, Vector count) { return _mm512_srav_epi64(v, count); }
inline Vector products(Vector a, Vector b) { return _mm512_mul_epi32(a, b); }
inline Vector odd_ones(Vector v) { return _mm512_srli_epi64(v, 32); }
inline Vector even_and_odd(Vector even, Vector odd) { return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)); }
inline Vector where_below(Vector a, int64_t most_a, Vector b, int64_t most_b, Vector yes, Vector no) {
    const __mmask8 both = _mm512_cmplt_epu64_mask(a, _mm512_set1_epi64(most_a)) & _mm512_cmplt_epu64_mask(b, _mm512_set1_epi64(most_b));
    return _mm512_mask_mov_epi64(no, both, yes);
}

// ---- floats

inline Vector bits(Floats v) { return _mm512_castps_si512(v); }
inline Floats to_floats(Vector v) { return _mm512_cvtepi32_ps(v); }
inline Vector nearest(Floats v) { return _mm512_cvtps_epi32(v); }
inline Floats rounded(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
inline Floats first_of(int64_t count, Floats v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(first(count)), v); }
inline float sum(Floats v) {
    const __m256 four = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 two = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
    const __m128 one = _mm_add_ps(two, _mm_movehl_ps(two, two));
    return _mm_cvtss_f32(_mm_add_ss(one, _mm_movehdup_ps(one)));
}

// ---- doubles

inline Doubles low_doubles(Vector v) { return _mm512_cvtepi32_pd(_mm512_castsi512_si256(v)); }
inline Doubles high_doubles(Vector v) { return _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(v, 1)); }
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
inline Doubles exact(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
inline Doubles floor_of(Doubles v) { return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Vector to_int64(Doubles v) { return _mm512_cvtpd_epi64(v); }
inline Vector low_bits(Doubles a, Doubles b) {
    const Vector even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(_mm512_castpd_si512(a), even, _mm512_castpd_si512(b));
}
inline Vector nearest(Doubles a, Doubles b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtpd_epi32(a)), _mm512_cvtpd_epi32(b), 1);
}
inline Floats singles(Doubles a, Doubles b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
}

}  // namespace fxquant
