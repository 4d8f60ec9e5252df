// Plain C++ with vectors of 16 bytes, which GCC and Clang have for every processor. This header is also what the vocabulary
// means: another set's header does the same with instructions of its own, to the bit.
//
// A Vector is 64 bytes, in four lanes of 16: unsigned bytes, or integers of 16, 32 or 64 bits, as an operation's name says.
// Floats are 16 float32, Doubles 8 float64. In "interleaved" order four vectors of 32-bit numbers come as unpacking 64 bytes twice
// leaves them: vector j has the channels 16 L + 4 j + (0..3) of each lane L.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fxquant {

template <class T>
struct Of {
    typedef T Lane __attribute__((vector_size(16)));
};
template <class T>
using Lane = typename Of<T>::Lane;

#ifdef __clang__
#define FXQUANT_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FXQUANT_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, Lane<T>{__VA_ARGS__})
#endif

struct Vector {
    Lane<int32_t> lane[4];
};
struct Floats {
    Lane<float> lane[4];
};
struct Doubles {
    Lane<double> lane[4];
};

inline bool runs_here() { return true; }
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// f of each lane of T.
template <class T, class F>
inline Vector lanes(Vector a, F f) {
    const auto one = [&](int i) { return (Lane<int32_t>)f((Lane<T>)a.lane[i]); };
    return {{one(0), one(1), one(2), one(3)}};
}
template <class T, class F>
inline Vector lanes(Vector a, Vector b, F f) {
    const auto one = [&](int i) { return (Lane<int32_t>)f((Lane<T>)a.lane[i], (Lane<T>)b.lane[i]); };
    return {{one(0), one(1), one(2), one(3)}};
}
// A vector of numbers of T that f gives by their index, and numbers as an array.
template <class T, class F>
inline Vector numbered(F f) {
    constexpr int COUNT = 64 / sizeof(T);
    T numbers[COUNT];
    for (int i = 0; i < COUNT; i++) numbers[i] = static_cast<T>(f(i));
    Vector v;
    std::memcpy(&v, numbers, 64);
    return v;
}
template <class T>
struct Numbers {
    T at[64 / sizeof(T)];

    template <class V>
    explicit Numbers(const V& v) {
        static_assert(sizeof(V) == 64, "a vector has 64 bytes");
        std::memcpy(at, &v, 64);
    }
    T operator[](int i) const { return at[i]; }
};

// ---- how sums are made
//
// Operand is what dot multiplies of a pixel, a byte or a byte widened to a word, and Weight what it is multiplied by.
// BLOCKS_TOGETHER blocks of 16 sums times PIXELS_FOR[blocks] pixels stay in registers (and in weights' memory beside each
// other). Up to PIXELS_AT_ONCE[blocks] with at most FOURS_AT_ONCE[blocks] products become bytes without being stored; with at
// most FOURS_IN_TURNS products, a tile is finished while the next one is added up. Zeros: never. With PAIRS_OF_BYTES a layer may
// also have weights of bytes for dot_in_pairs, which adds two products in 16 bits: Python has seen to it that they fit.
// CENTRE is what dot and dot_bytes take off each byte of a pixel, for instructions that know signed bytes alone; biases make up for it.

using Operand = uint16_t;
constexpr bool PAIRS_OF_BYTES = false;
constexpr int CENTRE = 0;
using Weight = int16_t;
constexpr int BLOCKS_TOGETHER = 1;
constexpr int PIXELS_FOR[5] = {0, 6, 0, 0, 0};
constexpr int PIXELS_AT_ONCE[5] = {}, FOURS_AT_ONCE[5] = {};
constexpr int FOURS_IN_TURNS = 0;
constexpr bool NARROWS = false;

// The sum of two neighbouring products that fit into 16 bits.
inline Lane<int32_t> pairs(Lane<int16_t> products) {
    const Lane<int32_t> both = (Lane<int32_t>)products;
    return ((Lane<int32_t>)((Lane<uint32_t>)both << 16) >> 16) + (both >> 16);
}
// acc + the four bytes' operands of x by those of weight: unsigned bytes by signed ones, so that a product fits into 16 bits.
inline Vector dot(Vector acc, Vector x, Vector weight) {
    const auto one = [&](int i) { return acc.lane[i] + pairs((Lane<int16_t>)x.lane[i] * (Lane<int16_t>)weight.lane[i]); };
    return {{one(0), one(1), one(2), one(3)}};
}
// acc + four bytes of x by four weights in memory: 16 times four bytes, or words, 16 times the even ones, then the odd ones.
inline Vector dot_bytes(Vector acc, Vector x, const int8_t* weight) {
    const auto one = [&](int i) {
        Lane<int16_t> even, odd;
        std::memcpy(&even, weight + 16 * i, 16), std::memcpy(&odd, weight + 64 + 16 * i, 16);
        const Lane<uint16_t> two = (Lane<uint16_t>)x.lane[i];
        return acc.lane[i] + pairs((Lane<int16_t>)(two & 0xFF) * even) + pairs((Lane<int16_t>)(two >> 8) * odd);
    };
    return {{one(0), one(1), one(2), one(3)}};
}
// acc + the sum of two products of signed words, modulo 2^32.
inline Vector dot_words(Vector acc, Vector a, Vector b) {
    const auto odd = [](Lane<int32_t> v) { return v >> 16; };
    const auto even = [&](Lane<int32_t> v) { return odd((Lane<int32_t>)((Lane<uint32_t>)v << 16)); };
    const auto one = [&](int i) {
        const auto first = (Lane<uint32_t>)(even(a.lane[i]) * even(b.lane[i]));
        const auto second = (Lane<uint32_t>)(odd(a.lane[i]) * odd(b.lane[i]));
        return (Lane<int32_t>)((Lane<uint32_t>)acc.lane[i] + first + second);
    };
    return {{one(0), one(1), one(2), one(3)}};
}
// Tells a compiler that would spill sums to leave them in their registers.
inline void keep(Vector&) {}
inline void keep(Floats&) {}

// ---- memory: _first reads or writes no more than the first numbers, and has zeros for the others

inline Vector load(const void* from) {
    Vector v;
    std::memcpy(&v, from, 64);
    return v;
}
inline Vector load_first(const void* from, int64_t count) {
    Vector v = {};
    if (count > 0) std::memcpy(&v, from, std::min<int64_t>(count, 64));
    return v;
}
inline Floats load_floats(const float* from) {
    Floats v;
    std::memcpy(&v, from, 64);
    return v;
}
inline Floats load_floats_first(const float* from, int64_t count) {
    Floats v = {};
    if (count > 0) std::memcpy(&v, from, 4 * std::min<int64_t>(count, 16));
    return v;
}
inline Doubles load_doubles(const double* from) {
    Doubles v;
    std::memcpy(&v, from, 64);
    return v;
}
inline Doubles load_doubles_first(const double* from, int64_t count) {
    Doubles v = {};
    if (count > 0) std::memcpy(&v, from, 8 * std::min<int64_t>(count, 8));
    return v;
}
// 16 bytes as 32 bits each, 32 bytes as 16 bits each.
inline Vector widen(const uint8_t* from, int64_t count) {
    return numbered<int32_t>([&](int i) { return i < count ? from[i] : 0; });
}
inline Vector widen_to_words(const uint8_t* from, int64_t count) {
    return numbered<int16_t>([&](int i) { return i < count ? from[i] : 0; });
}

inline void store(void* to, Vector v) { std::memcpy(to, &v, 64); }
inline void store_first(uint8_t* to, Vector v, int64_t count) {
    if (count >= 64) return store(to, v);
    std::memcpy(to, &v, std::max<int64_t>(count, 0));
}
inline void store_floats(float* to, Floats v) { std::memcpy(to, &v, 64); }
inline void store_floats_first(float* to, Floats v, int64_t count) {
    std::memcpy(to, &v, 4 * std::min<int64_t>(std::max<int64_t>(count, 0), 16));
}

// A vector of the first bytes at PARTS places, and part PART of a vector at its beginning (what follows it is anything).
template <int PARTS>
inline Vector load_parts(const uint8_t* const* at) {
    Vector v;
    for (int i = 0; i < PARTS; i++) std::memcpy(reinterpret_cast<uint8_t*>(&v) + 64 / PARTS * i, at[i], 64 / PARTS);
    return v;
}
template <int PARTS, int PART>
inline Vector part(Vector v) {
    constexpr int FIRST = 4 / PARTS * PART;
    return {{v.lane[FIRST], v.lane[(FIRST + 1) % 4], v.lane[(FIRST + 2) % 4], v.lane[(FIRST + 3) % 4]}};
}

// The bytes of a, b and c, of 32 bits each, interleaved; and the lowest byte of each number.
inline void store_triples(uint8_t* to, Vector a, Vector b, Vector c, int count) {
    const Numbers<int32_t> numbers[3] = {Numbers<int32_t>(a), Numbers<int32_t>(b), Numbers<int32_t>(c)};
    for (int k = 0; k < 3 * count; k++) to[k] = static_cast<uint8_t>(numbers[k % 3][k / 3]);
}
inline void store_low_bytes(uint8_t* to, Vector v) {
    const Numbers<int32_t> numbers(v);
    for (int k = 0; k < 16; k++) to[k] = static_cast<uint8_t>(numbers[k]);
}

// ---- constants

inline Vector each32(int32_t x) {
    const Lane<int32_t> all = Lane<int32_t>{} + x;
    return {{all, all, all, all}};
}
inline Vector zeros() { return each32(0); }
inline Vector each8(int x) { return each32(static_cast<int32_t>((x & 0xFFu) * 0x01010101u)); }
inline Vector each16(int x) { return each32(static_cast<int32_t>((x & 0xFFFFu) * 0x00010001u)); }
inline Vector each64(int64_t x) {
    return numbered<int64_t>([&](int) { return x; });
}
inline Floats each(float x) {
    const Lane<float> all = {x, x, x, x};  // not 0 + x, which has no sign where x is -0
    return {{all, all, all, all}};
}
inline Doubles each(double x) {
    const Lane<double> all = {x, x};
    return {{all, all, all, all}};
}
inline Doubles counted() { return {{Lane<double>{0, 1}, Lane<double>{2, 3}, Lane<double>{4, 5}, Lane<double>{6, 7}}}; }

// ---- bytes and words

inline Vector max8(Vector a, Vector b) {
    return lanes<uint8_t>(a, b, [](Lane<uint8_t> x, Lane<uint8_t> y) { return x > y ? x : y; });
}
inline Vector min8(Vector a, Vector b) {
    return lanes<uint8_t>(a, b, [](Lane<uint8_t> x, Lane<uint8_t> y) { return x < y ? x : y; });
}
// In each lane, the lower or the upper halves of a and b, interleaved.
inline Vector low8(Vector a, Vector b) {
    return lanes<uint8_t>(a, b, [](Lane<uint8_t> x, Lane<uint8_t> y) {
        return FXQUANT_SHUFFLE(uint8_t, x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    });
}
inline Vector high8(Vector a, Vector b) {
    return lanes<uint8_t>(a, b, [](Lane<uint8_t> x, Lane<uint8_t> y) {
        return FXQUANT_SHUFFLE(uint8_t, x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    });
}
inline Vector low16(Vector a, Vector b) {
    return lanes<uint16_t>(a, b, [](Lane<uint16_t> x, Lane<uint16_t> y) {
        return FXQUANT_SHUFFLE(uint16_t, x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    });
}
inline Vector high16(Vector a, Vector b) {
    return lanes<uint16_t>(a, b, [](Lane<uint16_t> x, Lane<uint16_t> y) {
        return FXQUANT_SHUFFLE(uint16_t, x, y, 4, 12, 5, 13, 6, 14, 7, 15);
    });
}
// Lanes of unsigned numbers, which may wrap.
inline Vector add16(Vector a, Vector b) {
    return lanes<uint16_t>(a, b, [](Lane<uint16_t> x, Lane<uint16_t> y) { return x + y; });
}
inline Vector sub16(Vector a, Vector b) {
    return lanes<uint16_t>(a, b, [](Lane<uint16_t> x, Lane<uint16_t> y) { return x - y; });
}
inline int64_t sum8(Vector v) {
    const Numbers<uint8_t> bytes(v);
    int64_t sum = 0;
    for (int i = 0; i < 64; i++) sum += bytes[i];
    return sum;
}

// 16 numbers of 32 bits, clamped to bytes.
inline Lane<int32_t> to_bytes_of(Lane<int32_t> a, Lane<int32_t> b, Lane<int32_t> c, Lane<int32_t> d) {
    const Lane<int32_t> low = {}, high = low + 255;
    const auto clamped = [&](Lane<int32_t> v) {
        v = v > low ? v : low;
        return (Lane<uint16_t>)(v < high ? v : high);
    };
    const auto halves = [](Lane<uint16_t> x, Lane<uint16_t> y) {
        return (Lane<uint8_t>)FXQUANT_SHUFFLE(uint16_t, x, y, 0, 2, 4, 6, 8, 10, 12, 14);
    };
    const Lane<uint8_t> ab = halves(clamped(a), clamped(b)), cd = halves(clamped(c), clamped(d));
    return (Lane<int32_t>)FXQUANT_SHUFFLE(uint8_t, ab, cd, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
// Four vectors of 16 numbers of 32 bits as 64 bytes, clamped; of _words, only the lower 16 bits count.
inline Vector pack_interleaved(const Vector v[4]) {
    const auto one = [&](int i) { return to_bytes_of(v[0].lane[i], v[1].lane[i], v[2].lane[i], v[3].lane[i]); };
    return {{one(0), one(1), one(2), one(3)}};
}
inline Vector pack(const Vector v[4]) {
    const auto one = [&](int i) { return to_bytes_of(v[i].lane[0], v[i].lane[1], v[i].lane[2], v[i].lane[3]); };
    return {{one(0), one(1), one(2), one(3)}};
}
inline Vector low_words(Vector v) {
    return lanes<uint32_t>(v, [](Lane<uint32_t> x) { return (Lane<int32_t>)(x << 16) >> 16; });
}
inline Vector pack_interleaved_words(const Vector v[4]) {
    const Vector words[4] = {low_words(v[0]), low_words(v[1]), low_words(v[2]), low_words(v[3])};
    return pack_interleaved(words);
}
inline Vector pack_words(const Vector v[4]) {
    const Vector words[4] = {low_words(v[0]), low_words(v[1]), low_words(v[2]), low_words(v[3])};
    return pack(words);
}

// 256 bytes in memory, looked up by bytes.
struct Table {
    const uint8_t* table;

    explicit Table(const uint8_t* table) : table(table) {}
    Vector operator()(Vector index) const {
        const Numbers<uint8_t> at(index);
        return numbered<uint8_t>([&](int i) { return table[at[i]]; });
    }
};

// ---- 32 bits

// Lanes of unsigned numbers, which may wrap.
inline Vector add32(Vector a, Vector b) {
    return lanes<uint32_t>(a, b, [](Lane<uint32_t> x, Lane<uint32_t> y) { return x + y; });
}
inline Vector sub32(Vector a, Vector b) {
    return lanes<uint32_t>(a, b, [](Lane<uint32_t> x, Lane<uint32_t> y) { return x - y; });
}
inline Vector mul32(Vector a, Vector b) {
    return lanes<uint32_t>(a, b, [](Lane<uint32_t> x, Lane<uint32_t> y) { return x * y; });
}
inline Vector max32(Vector a, Vector b) {
    return lanes<int32_t>(a, b, [](Lane<int32_t> x, Lane<int32_t> y) { return x > y ? x : y; });
}
inline Vector shift_right32(Vector v, int count) {
    return lanes<int32_t>(v, [&](Lane<int32_t> x) { return x >> count; });
}
inline Vector upper16(Vector v) { return shift_right32(v, 16); }
// The first numbers of a, then those of b.
inline Vector first_of(int64_t count, Vector a, Vector b) {
    const Numbers<int32_t> x(a), y(b);
    return numbered<int32_t>([&](int i) { return i < count ? x[i] : y[i]; });
}
inline int32_t sum32(Vector v) {
    const Numbers<int32_t> numbers(v);
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += static_cast<uint32_t>(numbers[i]);
    return static_cast<int32_t>(sum);
}
inline int32_t greatest32(Vector v) {
    const Numbers<int32_t> numbers(v);
    return *std::max_element(numbers.at, numbers.at + 16);
}

// ---- 64 bits

inline Vector add64(Vector a, Vector b) {
    return lanes<uint64_t>(a, b, [](Lane<uint64_t> x, Lane<uint64_t> y) { return x + y; });
}
inline Vector shift_right64(Vector v, Vector count) {
    const Numbers<int64_t> x(v), by(count);
    return numbered<int64_t>([&](int i) { return x[i] >> by[i]; });
}
// Products of the even numbers of 32 bits; the odd ones in the even ones' places; and both in their own, from 64 bits each.
inline Vector products(Vector a, Vector b) {
    const Numbers<int32_t> x(a), y(b);
    return numbered<int64_t>([&](int i) { return static_cast<int64_t>(x[2 * i]) * y[2 * i]; });
}
inline Vector odd_ones(Vector v) {
    return lanes<uint64_t>(v, [](Lane<uint64_t> x) { return x >> 32; });
}
inline Vector even_and_odd(Vector even, Vector odd) {
    return lanes<uint64_t>(even, odd, [](Lane<uint64_t> x, Lane<uint64_t> y) { return (x & 0xFFFFFFFFu) | (y << 32); });
}
// yes where 0 <= a < most_a and 0 <= b < most_b, else no.
inline Vector where_below(Vector a, int64_t most_a, Vector b, int64_t most_b, Vector yes, Vector no) {
    const Numbers<int64_t> x(a), y(b), first(yes), second(no);
    return numbered<int64_t>([&](int i) {
        return x[i] >= 0 && x[i] < most_a && y[i] >= 0 && y[i] < most_b ? first[i] : second[i];
    });
}

// ---- floats

#define FXQUANT_OPERATOR(V, SIGN)                                                                                          \
    inline V operator SIGN(V a, V b) {                                                                                     \
        return {{a.lane[0] SIGN b.lane[0], a.lane[1] SIGN b.lane[1], a.lane[2] SIGN b.lane[2], a.lane[3] SIGN b.lane[3]}}; \
    }
FXQUANT_OPERATOR(Floats, +)
FXQUANT_OPERATOR(Floats, -)
FXQUANT_OPERATOR(Floats, *)
FXQUANT_OPERATOR(Floats, /)
FXQUANT_OPERATOR(Doubles, +)
FXQUANT_OPERATOR(Doubles, -)
FXQUANT_OPERATOR(Doubles, *)
FXQUANT_OPERATOR(Doubles, /)
#undef FXQUANT_OPERATOR

template <class F>
inline Floats float_lanes(F one) {
    return {{one(0), one(1), one(2), one(3)}};
}
template <class V, class T, class F>
inline V real_numbers(F f) {
    T numbers[64 / sizeof(T)];
    for (int i = 0; i < static_cast<int>(64 / sizeof(T)); i++) numbers[i] = f(i);
    V v;
    std::memcpy(&v, numbers, 64);
    return v;
}

inline Vector bits(Floats v) {
    return {{(Lane<int32_t>)v.lane[0], (Lane<int32_t>)v.lane[1], (Lane<int32_t>)v.lane[2], (Lane<int32_t>)v.lane[3]}};
}
inline Floats to_floats(Vector v) {
    return float_lanes([&](int i) { return __builtin_convertvector(v.lane[i], Lane<float>); });
}
// Ties to even: beyond 2^23 a float is whole, and below it adding 2^23 leaves no bits for a fraction.
inline Lane<float> rounded(Lane<float> v) {
    const Lane<int32_t> sign = (Lane<int32_t>)v & INT32_MIN, magnitude = (Lane<int32_t>)v ^ sign;
    const Lane<float> size = (Lane<float>)magnitude, whole = (size + 0x1p23f) - 0x1p23f;
    return size < 0x1p23f ? (Lane<float>)((Lane<int32_t>)whole | sign) : v;
}
inline Floats rounded(Floats v) {
    return float_lanes([&](int i) { return rounded(v.lane[i]); });
}
// To the nearest integer, ties to even; what has none in 32 bits becomes the lowest one.
inline Vector nearest(Floats v) {
    const auto one = [&](int i) {
        const Lane<float> whole = rounded(v.lane[i]);
        const Lane<int32_t> fits = (whole >= -0x1p31f) & (whole < 0x1p31f);
        const Lane<int32_t> number = __builtin_convertvector((Lane<float>)((Lane<int32_t>)whole & fits), Lane<int32_t>);
        return (number & fits) | (INT32_MIN & ~fits);
    };
    return {{one(0), one(1), one(2), one(3)}};
}
// a b + c, rounded once. Where the processor has no such instruction: the product is exact in float64; a sum there that is not
// exact is made odd, so that rounding it to float32 cannot go wrong (Boldo and Melquiond, "Emulation of FMA", 2008).
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    const double product = static_cast<double>(a) * b, sum = product + c, part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    int64_t odd;
    std::memcpy(&odd, &sum, 8);
    odd += (odd & 1) == 0 && (error > 0 || error < 0) ? ((error > 0) == (sum > 0) ? 1 : -1) : 0;
    double exact;
    std::memcpy(&exact, &odd, 8);
    return static_cast<float>(exact);
#endif
}
inline Floats fused(Floats a, Floats b, Floats c) {
    const Numbers<float> x(a), y(b), z(c);
    return real_numbers<Floats, float>([&](int i) { return fused(x[i], y[i], z[i]); });
}
// The greater and the smaller one, or b where one is no number.
inline Floats greater(Floats a, Floats b) {
    return float_lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats smaller(Floats a, Floats b) {
    return float_lanes([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// v 2^n for whole n from -126 to 0.
inline Floats times_power(Floats v, Floats n) {
    return float_lanes([&](int i) {
        const Lane<int32_t> exponent = __builtin_convertvector(n.lane[i], Lane<int32_t>);
        return v.lane[i] * (Lane<float>)((exponent + 127) << 23);
    });
}
inline Floats first_of(int64_t count, Floats v) {
    const Numbers<float> x(v);
    return real_numbers<Floats, float>([&](int i) { return i < count ? x[i] : 0.0f; });
}
// Number i and number i + 8 first, then i and i + 4, i and i + 2, i and i + 1.
inline float sum(Floats v) {
    const Lane<float> four = (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// ---- doubles

template <int FIRST>
inline Doubles doubles_of(Vector v) {
    const Numbers<int32_t> x(v);
    return real_numbers<Doubles, double>([&](int i) { return static_cast<double>(x[FIRST + i]); });
}
inline Doubles low_doubles(Vector v) { return doubles_of<0>(v); }
inline Doubles high_doubles(Vector v) { return doubles_of<8>(v); }
// a b + c, rounded once; and where it is exact in any case.
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
    const Numbers<double> x(a), y(b), z(c);
    return real_numbers<Doubles, double>([&](int i) { return std::fma(x[i], y[i], z[i]); });
}
inline Doubles exact(Doubles a, Doubles b, Doubles c) { return a * b + c; }
// For whole parts below 2^51.
inline Doubles floor_of(Doubles v) {
    const Numbers<double> x(v);
    return real_numbers<Doubles, double>([&](int i) {
        const double whole = static_cast<double>(static_cast<int64_t>(x[i]));
        return whole > x[i] ? whole - 1 : whole;
    });
}
inline Vector to_int64(Doubles v) {
    const Numbers<double> x(v);
    return numbered<int64_t>([&](int i) { return static_cast<int64_t>(x[i]); });
}
// The lower 32 bits of each.
inline Vector low_bits(Doubles a, Doubles b) {
    const Numbers<int32_t> x(a), y(b);
    return numbered<int32_t>([&](int i) { return i < 8 ? x[2 * i] : y[2 * i - 16]; });
}
inline Vector nearest(Doubles a, Doubles b) {
    const Numbers<double> x(a), y(b);
    return numbered<int32_t>([&](int i) {
        const double v = i < 8 ? x[i] : y[i - 8];
        if (!(v > -0x1p31 && v < 0x1p31 - 0.5)) return INT32_MIN;
        return static_cast<int32_t>((v + 0x1.8p52) - 0x1.8p52);
    });
}
inline Floats singles(Doubles a, Doubles b) {
    const Numbers<double> x(a), y(b);
    return real_numbers<Floats, float>([&](int i) { return static_cast<float>(i < 8 ? x[i] : y[i - 8]); });
}

}  // namespace fxquant
