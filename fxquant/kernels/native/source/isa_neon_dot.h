// ARM's 128 bits with dot products of bytes: of an unsigned by a signed one where there is i8mm, else of signed ones. What each
// operation means is told in isa_plain.h.
#pragma once
#include <arm_neon.h>
#include <sys/auxv.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fxquant {

struct Vector {
    int32x4_t lane[4];
};
struct Floats {
    float32x4_t lane[4];
};
struct Doubles {
    float64x2_t lane[4];
};

// The bits of linux/arch/arm64/include/uapi/asm/hwcap.h, which old headers lack.
inline bool runs_here() {
    constexpr unsigned long ASIMD = 1ul << 1, DOT_PRODUCTS = 1ul << 20;
    const unsigned long needed = ASIMD | DOT_PRODUCTS;
#ifdef __ARM_FEATURE_MATMUL_INT8
    constexpr unsigned long AT_SECOND = 26, MATRICES_OF_BYTES = 1ul << 13;
    if (!(getauxval(AT_SECOND) & MATRICES_OF_BYTES)) return false;
#endif
    return (getauxval(AT_HWCAP) & needed) == needed;
}
inline void pause() { asm volatile("yield"); }

// f(lane) of each lane of V.
template <class V = Vector, class F>
inline V each_lane(F f) {
    return {{f(0), f(1), f(2), f(3)}};
}
// A function of vectors from an instruction on lanes of type T.
#define FXQUANT_EACH_LANE(NAME, T, INSTRUCTION)                                                              \
    inline Vector NAME(Vector a, Vector b) {                                                                 \
        return each_lane([&](int i) { return (int32x4_t)INSTRUCTION((T)a.lane[i], (T)b.lane[i]); });         \
    }

// ---- how sums are made

using Operand = uint8_t;
constexpr bool PAIRS_OF_BYTES = false;
using Weight = int8_t;
constexpr int BLOCKS_TOGETHER = 1;
constexpr int PIXELS_FOR[5] = {0, 6, 0, 0, 0};
constexpr int PIXELS_AT_ONCE[5] = {}, FOURS_AT_ONCE[5] = {};
constexpr int FOURS_IN_TURNS = 0;
constexpr bool NARROWS = false;

#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int CENTRE = 0;
inline int32x4_t dot(int32x4_t acc, int32x4_t x, int32x4_t weight) { return vusdotq_s32(acc, (uint8x16_t)x, (int8x16_t)weight); }
#else
// 128 taken off an unsigned byte is the byte with its highest bit turned, read as a signed one.
constexpr int CENTRE = 128;
inline int32x4_t dot(int32x4_t acc, int32x4_t x, int32x4_t weight) {
    return vdotq_s32(acc, (int8x16_t)veorq_u8((uint8x16_t)x, vdupq_n_u8(0x80)), (int8x16_t)weight);
}
#endif
inline Vector dot(Vector acc, Vector x, Vector weight) {
    return each_lane([&](int i) { return dot(acc.lane[i], x.lane[i], weight.lane[i]); });
}
inline Vector dot_bytes(Vector acc, Vector x, const int8_t* weight) {
    return each_lane([&](int i) { return dot(acc.lane[i], x.lane[i], (int32x4_t)vld1q_s8(weight + 16 * i)); });
}
inline int32x4_t dot_words(int32x4_t acc, int16x8_t a, int16x8_t b) {
    return vaddq_s32(acc, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
}
inline Vector dot_words(Vector acc, Vector a, Vector b) {
    return each_lane([&](int i) { return dot_words(acc.lane[i], (int16x8_t)a.lane[i], (int16x8_t)b.lane[i]); });
}
inline void keep(Vector& v) { asm volatile("" : "+w"(v.lane[0]), "+w"(v.lane[1]), "+w"(v.lane[2]), "+w"(v.lane[3])); }
inline void keep(Floats& v) { asm volatile("" : "+w"(v.lane[0]), "+w"(v.lane[1]), "+w"(v.lane[2]), "+w"(v.lane[3])); }

// ---- memory

template <class V>
inline V load_64_bytes(const void* from) {
    V v;
    std::memcpy(&v, from, 64);
    return v;
}
// The first bytes of 64, which may be all or none, and zeros.
template <class V>
inline V load_some(const void* from, int64_t bytes) {
    if (bytes >= 64) return load_64_bytes<V>(from);
    V v = {};
    if (bytes > 0) std::memcpy(&v, from, bytes);
    return v;
}
inline Vector load(const void* from) { return load_64_bytes<Vector>(from); }
inline Vector load_first(const void* from, int64_t count) { return load_some<Vector>(from, count); }
inline Floats load_floats(const float* from) { return load_64_bytes<Floats>(from); }
inline Floats load_floats_first(const float* from, int64_t count) { return load_some<Floats>(from, 4 * count); }
inline Doubles load_doubles(const double* from) { return load_64_bytes<Doubles>(from); }
inline Doubles load_doubles_first(const double* from, int64_t count) { return load_some<Doubles>(from, 8 * count); }

inline uint8x16_t load_bytes(const uint8_t* from, int64_t count) {
    if (count >= 16) return vld1q_u8(from);
    uint8_t bytes[16] = {};
    if (count > 0) std::memcpy(bytes, from, count);
    return vld1q_u8(bytes);
}
inline Vector widen(const uint8_t* from, int64_t count) {
    const uint8x16_t v = load_bytes(from, count);
    const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_high_u8(v);
    return {{(int32x4_t)vmovl_u16(vget_low_u16(low)), (int32x4_t)vmovl_high_u16(low),
             (int32x4_t)vmovl_u16(vget_low_u16(high)), (int32x4_t)vmovl_high_u16(high)}};
}
inline Vector widen_to_words(const uint8_t* from, int64_t count) {
    const uint8x16_t low = load_bytes(from, count), high = load_bytes(count > 16 ? from + 16 : from, count - 16);
    return {{(int32x4_t)vmovl_u8(vget_low_u8(low)), (int32x4_t)vmovl_high_u8(low),
             (int32x4_t)vmovl_u8(vget_low_u8(high)), (int32x4_t)vmovl_high_u8(high)}};
}

inline void store(void* to, Vector v) { std::memcpy(to, &v, 64); }
inline void store_first(uint8_t* to, Vector v, int64_t count) {
    if (count >= 64) return store(to, v);
    int i = 0;
    for (; count >= 16; i++, to += 16, count -= 16) vst1q_u8(to, (uint8x16_t)v.lane[i]);
    if (count <= 0) return;
    uint8_t bytes[16];
    vst1q_u8(bytes, (uint8x16_t)v.lane[i]);
    std::memcpy(to, bytes, count);
}
inline void store_floats(float* to, Floats v) { std::memcpy(to, &v, 64); }
inline void store_floats_first(float* to, Floats v, int64_t count) {
    if (count >= 16) return store_floats(to, v);
    if (count > 0) std::memcpy(to, &v, 4 * count);
}

template <int PARTS>
inline Vector load_parts(const uint8_t* const* at) {
    return each_lane([&](int i) { return (int32x4_t)vld1q_u8(at[i * PARTS / 4] + 16 * (i % (4 / PARTS))); });
}
template <int PARTS, int PART>
inline Vector part(Vector v) {
    return each_lane([&](int i) { return v.lane[(4 / PARTS * PART + i) % 4]; });
}

inline void store_low_bytes(uint8_t* to, Vector v) {
    const uint16x8_t low = vuzp1q_u16((uint16x8_t)v.lane[0], (uint16x8_t)v.lane[1]);
    const uint16x8_t high = vuzp1q_u16((uint16x8_t)v.lane[2], (uint16x8_t)v.lane[3]);
    vst1q_u8(to, vuzp1q_u8((uint8x16_t)low, (uint8x16_t)high));
}
inline void store_triples(uint8_t* to, Vector a, Vector b, Vector c, int count) {
    uint8_t bytes[3][16], triples[48];
    store_low_bytes(bytes[0], a), store_low_bytes(bytes[1], b), store_low_bytes(bytes[2], c);
    const uint8x16x3_t all = {{vld1q_u8(bytes[0]), vld1q_u8(bytes[1]), vld1q_u8(bytes[2])}};
    if (count >= 16) return vst3q_u8(to, all);
    vst3q_u8(triples, all);
    std::memcpy(to, triples, 3 * count);
}

// ---- constants

inline Vector four_times(int32x4_t v) { return {{v, v, v, v}}; }
inline Vector zeros() { return four_times(vdupq_n_s32(0)); }
inline Vector each8(int x) { return four_times((int32x4_t)vdupq_n_u8(static_cast<uint8_t>(x))); }
inline Vector each16(int x) { return four_times((int32x4_t)vdupq_n_s16(static_cast<int16_t>(x))); }
inline Vector each32(int32_t x) { return four_times(vdupq_n_s32(x)); }
inline Vector each64(int64_t x) { return four_times((int32x4_t)vdupq_n_s64(x)); }
inline Floats each(float x) {
    return each_lane<Floats>([&](int) { return vdupq_n_f32(x); });
}
inline Doubles each(double x) {
    return each_lane<Doubles>([&](int) { return vdupq_n_f64(x); });
}
inline Doubles counted() {
    static const double numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    return load_doubles(numbers);
}

// ---- bytes and words

FXQUANT_EACH_LANE(max8, uint8x16_t, vmaxq_u8)
FXQUANT_EACH_LANE(min8, uint8x16_t, vminq_u8)
FXQUANT_EACH_LANE(low8, uint8x16_t, vzip1q_u8)
FXQUANT_EACH_LANE(high8, uint8x16_t, vzip2q_u8)
FXQUANT_EACH_LANE(low16, uint16x8_t, vzip1q_u16)
FXQUANT_EACH_LANE(high16, uint16x8_t, vzip2q_u16)
FXQUANT_EACH_LANE(add16, int16x8_t, vaddq_s16)
FXQUANT_EACH_LANE(sub16, int16x8_t, vsubq_s16)
inline int64_t sum8(Vector v) {
    int64_t sum = 0;
    for (int i = 0; i < 4; i++) sum += vaddlvq_u8((uint8x16_t)v.lane[i]);
    return sum;
}

inline int32x4_t to_bytes_of(int16x8_t a, int16x8_t b) { return (int32x4_t)vqmovun_high_s16(vqmovun_s16(a), b); }
inline int16x8_t to_words_of(int32x4_t a, int32x4_t b) { return vqmovn_high_s32(vqmovn_s32(a), b); }
inline int16x8_t low_words_of(int32x4_t a, int32x4_t b) { return vuzp1q_s16((int16x8_t)a, (int16x8_t)b); }
inline Vector pack_interleaved(const Vector v[4]) {
    return each_lane([&](int i) {
        return to_bytes_of(to_words_of(v[0].lane[i], v[1].lane[i]), to_words_of(v[2].lane[i], v[3].lane[i]));
    });
}
inline Vector pack(const Vector v[4]) {
    return each_lane([&](int i) {
        return to_bytes_of(to_words_of(v[i].lane[0], v[i].lane[1]), to_words_of(v[i].lane[2], v[i].lane[3]));
    });
}
inline Vector pack_interleaved_words(const Vector v[4]) {
    return each_lane([&](int i) {
        return to_bytes_of(low_words_of(v[0].lane[i], v[1].lane[i]), low_words_of(v[2].lane[i], v[3].lane[i]));
    });
}
inline Vector pack_words(const Vector v[4]) {
    return each_lane([&](int i) {
        return to_bytes_of(low_words_of(v[i].lane[0], v[i].lane[1]), low_words_of(v[i].lane[2], v[i].lane[3]));
    });
}

// Four tables of 64 bytes; an index that is beyond one finds a zero there.
struct Table {
    uint8x16x4_t part[4];

    explicit Table(const uint8_t* table) {
        for (int i = 0; i < 4; i++) part[i] = vld1q_u8_x4(table + 64 * i);
    }
    int32x4_t one(uint8x16_t index) const {
        uint8x16_t found = vqtbl4q_u8(part[0], index);
        for (int i = 1; i < 4; i++) found = vorrq_u8(found, vqtbl4q_u8(part[i], vsubq_u8(index, vdupq_n_u8(64 * i))));
        return (int32x4_t)found;
    }
    Vector operator()(Vector index) const {
        return each_lane([&](int i) { return one((uint8x16_t)index.lane[i]); });
    }
};

// ---- 32 bits

FXQUANT_EACH_LANE(add32, int32x4_t, vaddq_s32)
FXQUANT_EACH_LANE(sub32, int32x4_t, vsubq_s32)
FXQUANT_EACH_LANE(mul32, int32x4_t, vmulq_s32)
FXQUANT_EACH_LANE(max32, int32x4_t, vmaxq_s32)
inline Vector shift_right32(Vector v, int count) {
    return each_lane([&](int i) { return vshlq_s32(v.lane[i], vdupq_n_s32(-count)); });
}
inline Vector upper16(Vector v) {
    return each_lane([&](int i) { return vshrq_n_s32(v.lane[i], 16); });
}
// All bits of those of numbers 4 i to 4 i + 3 that are among the first.
inline uint32x4_t among(int64_t count, int i) {
    static const int32_t numbers[4] = {0, 1, 2, 3};
    const int left = static_cast<int>(std::min<int64_t>(std::max<int64_t>(count - 4 * i, 0), 4));
    return vcltq_s32(vld1q_s32(numbers), vdupq_n_s32(left));
}
inline Vector first_of(int64_t count, Vector a, Vector b) {
    return each_lane([&](int i) { return vbslq_s32(among(count, i), a.lane[i], b.lane[i]); });
}
inline int32_t sum32(Vector v) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(v.lane[0], v.lane[1]), vaddq_s32(v.lane[2], v.lane[3])));
}
inline int32_t greatest32(Vector v) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(v.lane[0], v.lane[1]), vmaxq_s32(v.lane[2], v.lane[3])));
}

// ---- 64 bits

FXQUANT_EACH_LANE(add64, int64x2_t, vaddq_s64)
inline Vector shift_right64(Vector v, Vector count) {
    return each_lane([&](int i) { return (int32x4_t)vshlq_s64((int64x2_t)v.lane[i], vnegq_s64((int64x2_t)count.lane[i])); });
}
inline Vector products(Vector a, Vector b) {
    const auto even = [](int32x4_t v) { return vmovn_s64((int64x2_t)v); };
    return each_lane([&](int i) { return (int32x4_t)vmull_s32(even(a.lane[i]), even(b.lane[i])); });
}
inline Vector odd_ones(Vector v) {
    return each_lane([&](int i) { return (int32x4_t)vshrq_n_u64((uint64x2_t)v.lane[i], 32); });
}
inline Vector even_and_odd(Vector even, Vector odd) {
    return each_lane([&](int i) { return (int32x4_t)vsliq_n_u64((uint64x2_t)even.lane[i], (uint64x2_t)odd.lane[i], 32); });
}
inline Vector where_below(Vector a, int64_t most_a, Vector b, int64_t most_b, Vector yes, Vector no) {
    const auto below = [](int32x4_t v, int64_t most) { return vcltq_u64((uint64x2_t)v, vdupq_n_u64(static_cast<uint64_t>(most))); };
    return each_lane([&](int i) {
        const uint64x2_t there = vandq_u64(below(a.lane[i], most_a), below(b.lane[i], most_b));
        return vbslq_s32((uint32x4_t)there, yes.lane[i], no.lane[i]);
    });
}

// ---- floats

#define FXQUANT_OPERATOR(V, SIGN, INSTRUCTION) \
    inline V operator SIGN(V a, V b) { return each_lane<V>([&](int i) { return INSTRUCTION(a.lane[i], b.lane[i]); }); }
FXQUANT_OPERATOR(Floats, +, vaddq_f32)
FXQUANT_OPERATOR(Floats, -, vsubq_f32)
FXQUANT_OPERATOR(Floats, *, vmulq_f32)
FXQUANT_OPERATOR(Floats, /, vdivq_f32)
FXQUANT_OPERATOR(Doubles, +, vaddq_f64)
FXQUANT_OPERATOR(Doubles, *, vmulq_f64)
FXQUANT_OPERATOR(Doubles, /, vdivq_f64)
#undef FXQUANT_OPERATOR

inline Vector bits(Floats v) {
    return each_lane([&](int i) { return (int32x4_t)v.lane[i]; });
}
inline Floats to_floats(Vector v) {
    return each_lane<Floats>([&](int i) { return vcvtq_f32_s32(v.lane[i]); });
}
// The instruction gives the highest integer for what is above it, and 0 for what is no number.
inline Vector nearest(Floats v) {
    return each_lane([&](int i) {
        return vbslq_s32(vcltq_f32(v.lane[i], vdupq_n_f32(0x1p31f)), vcvtnq_s32_f32(v.lane[i]), vdupq_n_s32(INT32_MIN));
    });
}
inline Floats rounded(Floats v) {
    return each_lane<Floats>([&](int i) { return vrndnq_f32(v.lane[i]); });
}
inline Floats fused(Floats a, Floats b, Floats c) {
    return each_lane<Floats>([&](int i) { return vfmaq_f32(c.lane[i], a.lane[i], b.lane[i]); });
}
// Not vmaxq_f32 and vminq_f32, which give no number where either is none.
inline Floats greater(Floats a, Floats b) {
    return each_lane<Floats>([&](int i) { return vbslq_f32(vcgtq_f32(a.lane[i], b.lane[i]), a.lane[i], b.lane[i]); });
}
inline Floats smaller(Floats a, Floats b) {
    return each_lane<Floats>([&](int i) { return vbslq_f32(vcltq_f32(a.lane[i], b.lane[i]), a.lane[i], b.lane[i]); });
}
inline Floats times_power(Floats v, Floats n) {
    const auto power = [](float32x4_t exponent) {
        return (float32x4_t)vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(exponent), vdupq_n_s32(127)), 23);
    };
    return each_lane<Floats>([&](int i) { return vmulq_f32(v.lane[i], power(n.lane[i])); });
}
inline Floats first_of(int64_t count, Floats v) {
    return each_lane<Floats>([&](int i) { return vbslq_f32(among(count, i), v.lane[i], vdupq_n_f32(0)); });
}
inline float sum(Floats v) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v.lane[0], v.lane[2]), vaddq_f32(v.lane[1], v.lane[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

// ---- doubles

inline Doubles doubles_of(int32x4_t a, int32x4_t b) {
    return {{vcvtq_f64_s64(vmovl_s32(vget_low_s32(a))), vcvtq_f64_s64(vmovl_high_s32(a)),
             vcvtq_f64_s64(vmovl_s32(vget_low_s32(b))), vcvtq_f64_s64(vmovl_high_s32(b))}};
}
inline Doubles low_doubles(Vector v) { return doubles_of(v.lane[0], v.lane[1]); }
inline Doubles high_doubles(Vector v) { return doubles_of(v.lane[2], v.lane[3]); }
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
    return each_lane<Doubles>([&](int i) { return vfmaq_f64(c.lane[i], a.lane[i], b.lane[i]); });
}
inline Doubles exact(Doubles a, Doubles b, Doubles c) { return fused(a, b, c); }
inline Doubles floor_of(Doubles v) {
    return each_lane<Doubles>([&](int i) { return vrndmq_f64(v.lane[i]); });
}
inline Vector to_int64(Doubles v) {
    return each_lane([&](int i) { return (int32x4_t)vcvtq_s64_f64(v.lane[i]); });
}
inline Vector low_bits(Doubles a, Doubles b) {
    const auto even = [](float64x2_t x, float64x2_t y) { return vuzp1q_s32((int32x4_t)x, (int32x4_t)y); };
    return {{even(a.lane[0], a.lane[1]), even(a.lane[2], a.lane[3]), even(b.lane[0], b.lane[1]), even(b.lane[2], b.lane[3])}};
}
// In 64 bits first, which is one rounding as well; what has no place in 32 becomes the lowest integer.
inline int32x2_t nearest(float64x2_t v) {
    const int64x2_t whole = vcvtnq_s64_f64(v);
    const uint64x2_t fits = vandq_u64(vceqq_s64(whole, vmovl_s32(vmovn_s64(whole))), vceqq_f64(v, v));
    return vmovn_s64(vbslq_s64(fits, whole, vdupq_n_s64(INT32_MIN)));
}
inline Vector nearest(Doubles a, Doubles b) {
    const auto four = [](float64x2_t x, float64x2_t y) { return vcombine_s32(nearest(x), nearest(y)); };
    return {{four(a.lane[0], a.lane[1]), four(a.lane[2], a.lane[3]), four(b.lane[0], b.lane[1]), four(b.lane[2], b.lane[3])}};
}
inline Floats singles(Doubles a, Doubles b) {
    const auto four = [](float64x2_t x, float64x2_t y) { return vcvt_high_f32_f64(vcvt_f32_f64(x), y); };
    return {{four(a.lane[0], a.lane[1]), four(a.lane[2], a.lane[3]), four(b.lane[0], b.lane[1]), four(b.lane[2], b.lane[3])}};
}

#undef FXQUANT_EACH_LANE

}  // namespace fxquant
