// What each operation of a set's vocabulary gives for random numbers and for those at the edges, a hash a line: a set is right
// if all lines are those of isa_plain.h, which says what the operations mean.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "isa.h"

namespace {

using namespace fxquant;

constexpr int CASES = 4000;
uint64_t state;

uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
}
template <class T, size_t N>
T one_of(const T (&of)[N]) { return of[next() % N]; }

// Four vectors of whatever an operation reads.
struct alignas(64) Input {
    uint8_t bytes[4][64];

    const void* at(int i) const { return bytes[i]; }
    template <class T>
    void fill(const std::function<T()>& draw) {
        for (auto& vector : bytes)
            for (size_t i = 0; i < 64; i += sizeof(T)) {
                const T x = draw();
                std::memcpy(vector + i, &x, sizeof(T));
            }
    }
    Vector v(int i) const { return load(bytes[i]); }
    Floats f(int i) const { return load_floats(reinterpret_cast<const float*>(bytes[i])); }
    Doubles d(int i) const { return load_doubles(reinterpret_cast<const double*>(bytes[i])); }
};

uint8_t any_byte() { return static_cast<uint8_t>(next()); }
int32_t any_integer() {
    static const int32_t edges[] = {0, 1, -1, 127, 128, -128, 255, 256, -256, 32767, 32768, -32768, -32769, 65535, 65536,
                                    0x7FFF8000, INT32_MAX, INT32_MIN, INT32_MIN + 1, 0x00FF00FF, static_cast<int32_t>(0x80008000)};
    return next() % 3 ? static_cast<int32_t>(next()) >> next() % 32 : one_of(edges);
}
// 32 bits by a power of two. (Draws stand in statements of their own: arguments are computed in any order.)
double scaled(int powers, int lowest) {
    const int32_t integer = static_cast<int32_t>(next());
    return std::ldexp(static_cast<double>(integer), static_cast<int>(next() % powers) + lowest);
}
double any_double() {
    static const double edges[] = {0.0, -0.0, 0.5, 1.5, -1.5, 0x1p31 - 0.5, 0x1p31 - 1, 0x1p31, -0x1p31 - 0.5, -0x1p31 - 1, 1e30, -1e300,
                                   1e-310, INFINITY, -INFINITY, NAN, 3.5e38, -1e-46};
    if (next() % 4 == 0) return one_of(edges);
    if (next() % 4 == 0) return static_cast<double>(static_cast<int32_t>(next()) >> next() % 32) / 2;
    const double high = scaled(80, -60);
    return high + scaled(80, -90);
}
double whole_double() { return scaled(20, 0); }
float any_float() {
    static const float edges[] = {0.0f, -0.0f, 0.5f, -0.5f, 1.5f, 2.5f, -2.5f, 254.5f, 0x1p22f + 0.5f, 0x1p23f - 0.5f, 0x1p31f, -0x1p31f,
                                  0x1p31f - 128, 1e-45f, -1e-40f, 3e38f, INFINITY, -INFINITY, NAN};
    if (next() % 4 == 0) return one_of(edges);
    if (next() % 4 == 0) return static_cast<float>(static_cast<int32_t>(next()) >> next() % 32) / 2;
    return static_cast<float>(any_double());
}
// What an operation wrote; numbers that are none count as one and the same.
struct Output {
    uint64_t hash = 14695981039346656037u;

    void add(const void* from, size_t size) {
        for (size_t i = 0; i < size; i++) hash = (hash ^ static_cast<const uint8_t*>(from)[i]) * 1099511628211u;
    }
    void number(int64_t x) { add(&x, 8); }
    template <class T>
    void real(T x) {
        if (x != x) x = static_cast<T>(1.25e-7);
        add(&x, sizeof(T));
    }
    void vector(Vector v, int bytes = 64) {
        alignas(64) uint8_t at[64];
        store(at, v);
        add(at, bytes);
    }
    void floats(Floats v) {
        alignas(64) float at[16];
        store_floats(at, v);
        for (float x : at) real(x);
    }
    void f_(Floats v) { floats(v); }
    void d_(Doubles v) { doubles(v); }
    void doubles(Doubles v) {
        alignas(64) double at[8];
        std::memcpy(at, &v, 64);
        for (double x : at) real(x);
    }
};

using Body = std::function<void(const Input&, Output&)>;

template <class T>
void test(const char* name, T (*draw)(), const Body& body) {
    state = 7;
    Output out;
    Input in;
    for (int i = 0; i < CASES; i++) {
        in.fill<T>(draw);
        body(in, out);
    }
    std::printf("%s %016llx\n", name, static_cast<unsigned long long>(out.hash));
}

#define TWO(NAME, DRAW) test(#NAME, DRAW, [](const Input& in, Output& out) { out.vector(NAME(in.v(0), in.v(1))); })
#define OPERATOR(V, SIGN, DRAW) test(#V " " #SIGN, DRAW, [](const Input& in, Output& out) { out.V##_(in.V(0) SIGN in.V(1)); })

// A copy of the first bytes with nothing behind it, for a sanitizer to see what is read beyond.
template <class T>
std::vector<T> first_ones(const void* from, int64_t count, int64_t most) {
    const T* at = static_cast<const T*>(from);
    return std::vector<T>(at, at + std::min(std::max<int64_t>(count, 0), most));
}
// What store writes into memory that is full of one byte.
void stored(Output& out, const std::function<void(uint8_t*)>& store) {
    uint8_t memory[128];
    std::memset(memory, 0xAB, sizeof(memory));
    store(memory + 3);
    out.add(memory, sizeof(memory));
}
int64_t some(int most) { return static_cast<int64_t>(next() % (most + 4)) - 2; }

void memory() {
    test("load_first", any_byte, [](const Input& in, Output& out) {
        const int64_t count = some(64);
        out.vector(load_first(first_ones<uint8_t>(in.at(0), count, 64).data(), count));
    });
    test("load_floats_first", any_float, [](const Input& in, Output& out) {
        const int64_t count = some(16);
        out.floats(load_floats_first(first_ones<float>(in.at(0), count, 16).data(), count));
    });
    test("load_doubles_first", any_double, [](const Input& in, Output& out) {
        const int64_t count = some(8);
        out.doubles(load_doubles_first(first_ones<double>(in.at(0), count, 8).data(), count));
    });
    test("widen", any_byte, [](const Input& in, Output& out) {
        const int64_t count = some(16);
        out.vector(widen(first_ones<uint8_t>(in.at(0), count, 16).data(), count));
    });
    test("widen_to_words", any_byte, [](const Input& in, Output& out) {
        const int64_t count = some(32);
        out.vector(widen_to_words(first_ones<uint8_t>(in.at(0), count, 32).data(), count));
    });
    test("store_first", any_byte, [](const Input& in, Output& out) {
        stored(out, [&](uint8_t* to) { store_first(to, in.v(0), some(64)); });
    });
    test("store_floats_first", any_integer, [](const Input& in, Output& out) {
        alignas(64) float to[17] = {};
        store_floats_first(to, to_floats(in.v(0)), some(16));
        out.add(to, sizeof(to));
    });
    test("load_parts", any_byte, [](const Input& in, Output& out) {
        const uint8_t* const at[4] = {in.bytes[2] + 1, in.bytes[0] + 5, in.bytes[1], in.bytes[2] + 30};
        out.vector(load_parts<1>(at)), out.vector(load_parts<2>(at)), out.vector(load_parts<4>(at));
    });
    test("part", any_byte, [](const Input& in, Output& out) {
        const Vector v = in.v(0);
        out.vector(part<1, 0>(v)), out.vector(part<2, 0>(v), 32), out.vector(part<2, 1>(v), 32), out.vector(part<4, 0>(v), 16);
        out.vector(part<4, 1>(v), 16), out.vector(part<4, 2>(v), 16), out.vector(part<4, 3>(v), 16);
    });
    test<int32_t>("store_triples", [] { return static_cast<int32_t>(next() % 256); }, [](const Input& in, Output& out) {
        stored(out, [&](uint8_t* to) { store_triples(to, in.v(0), in.v(1), in.v(2), static_cast<int>(next() % 17)); });
    });
    test("store_low_bytes", any_integer, [](const Input& in, Output& out) {
        stored(out, [&](uint8_t* to) { store_low_bytes(to, in.v(0)); });
    });
    test("constants", any_integer, [](const Input&, Output& out) {
        const int32_t x = any_integer();
        out.vector(zeros()), out.vector(each8(x & 255)), out.vector(each16(static_cast<int16_t>(x))), out.vector(each32(x));
        out.vector(each64(static_cast<int64_t>(x) * (int64_t{1} << next() % 33))), out.floats(each(any_float())), out.doubles(each(any_double()));
        out.doubles(counted());
    });
}

void integers() {
    TWO(max8, any_byte), TWO(min8, any_byte), TWO(low8, any_byte), TWO(high8, any_byte), TWO(low16, any_byte), TWO(high16, any_byte);
    TWO(add32, any_integer), TWO(sub32, any_integer), TWO(mul32, any_integer), TWO(max32, any_integer), TWO(add64, any_integer);
    TWO(products, any_integer), TWO(even_and_odd, any_integer), TWO(add16, any_integer), TWO(sub16, any_integer);
    test("sum8", any_byte, [](const Input& in, Output& out) { out.number(sum8(in.v(0))); });
    test("sum32", any_integer, [](const Input& in, Output& out) { out.number(sum32(in.v(0))); });
    test("greatest32", any_integer, [](const Input& in, Output& out) { out.number(greatest32(in.v(0))); });
    test("upper16", any_integer, [](const Input& in, Output& out) { out.vector(upper16(in.v(0))); });
    test("odd_ones", any_integer, [](const Input& in, Output& out) { out.vector(odd_ones(in.v(0))); });
    test("dot_words", any_integer, [](const Input& in, Output& out) { out.vector(dot_words(in.v(0), in.v(1), in.v(2))); });
    test("shift_right32", any_integer, [](const Input& in, Output& out) {
        out.vector(shift_right32(in.v(0), static_cast<int>(next() % 32)));
    });
    test("shift_right64", any_integer, [](const Input& in, Output& out) {
        int64_t counts[8];
        for (int64_t& count : counts) count = next() % 64;
        out.vector(shift_right64(in.v(0), load(counts)));
    });
    test("first_of", any_integer, [](const Input& in, Output& out) { out.vector(first_of(some(16), in.v(0), in.v(1))); });
    test("where_below", any_integer, [](const Input& in, Output& out) {
        int64_t at[2][8];
        for (auto& axis : at)
            for (int64_t& x : axis) x = next() % 3 ? static_cast<int64_t>(next() % 20) - 5 : static_cast<int64_t>(next()) << 31;
        const int64_t high = 1 + next() % 12, wide = 1 + next() % 12;
        out.vector(where_below(load(at[0]), high, load(at[1]), wide, in.v(0), in.v(1)));
    });
    const auto pack_by = [](const char* name, Vector (*pack)(const Vector*)) {
        test(name, any_integer, [=](const Input& in, Output& out) {
            const Vector v[4] = {in.v(0), in.v(1), in.v(2), in.v(3)};
            out.vector(pack(v));
        });
    };
    pack_by("pack", pack), pack_by("pack_interleaved", pack_interleaved);
    pack_by("pack_words", pack_words), pack_by("pack_interleaved_words", pack_interleaved_words);
    test("Table", any_byte, [](const Input& in, Output& out) {
        const Table table(in.bytes[0]);
        for (int i = 0; i < 4; i++) out.vector(table(in.v(i)));
    });
}

// acc + the products of 16 times four bytes by four weights, by dot, or by dot_in_pairs.
template <bool IN_PAIRS, class V = Vector>
V by_dots(V acc, const uint8_t* x, const int8_t* weight) {
    if constexpr (IN_PAIRS) return dot_in_pairs(acc, V(load(x)), V(load(weight)));
    constexpr int A_FOUR = 4 / sizeof(Operand);
    for (int from = 0; from < 4; from += A_FOUR) {
        alignas(64) Operand operands[64 / sizeof(Operand)];
        alignas(64) Weight weights[64 / sizeof(Weight)];
        for (int i = 0; i < 16 * A_FOUR; i++) {
            const int at = i / A_FOUR * 4 + from + i % A_FOUR;
            operands[i] = x[at], weights[i] = weight[at];
        }
        acc = dot(acc, load(operands), load(weights));
    }
    return acc;
}
Vector by_dot_bytes(Vector acc, const uint8_t* x, const int8_t* weight) {
    alignas(64) Weight weights[64];
    for (int i = 0; i < 64; i++) {
        const int number = i / 4, k = i % 4;
        weights[sizeof(Weight) == 1 ? i : k % 2 * 32 + number * 2 + k / 2] = weight[i];
    }
    return dot_bytes(acc, load(x), reinterpret_cast<const int8_t*>(weights));
}
// With what CENTRE takes off put back, as biases do.
void dots(const char* name, Vector (*sums)(Vector, const uint8_t*, const int8_t*), int most) {
    test<uint8_t>(name, [] { return next() % 3 ? any_byte() : static_cast<uint8_t>(next() % 2 ? 255 : 128); },
                  [&](const Input& in, Output& out) {
        alignas(64) int8_t weight[64];
        alignas(64) int32_t bias[16];
        for (int8_t& w : weight) {
            const int x = next() % 3 ? static_cast<int8_t>(next()) : next() % 2 ? 127 : -128;
            w = static_cast<int8_t>(std::min(std::max(x, -most), most - (most == 128)));
        }
        for (int i = 0; i < 16; i++) {
            int sum = 0;
            for (int k = 0; k < 4; k++) sum += weight[4 * i + k];
            bias[i] = (any_integer() >> 4) + CENTRE * sum;
        }
        out.vector(sums(load(bias), in.bytes[0], weight));
    });
}
template <bool HAS>
void dots_in_pairs() {
    dots("dot_in_pairs", by_dots<HAS>, 64);  // by dot where the set has no such thing
}

void reals() {
    OPERATOR(f, +, any_float), OPERATOR(f, -, any_float), OPERATOR(f, *, any_float), OPERATOR(f, /, any_float);
    OPERATOR(d, +, any_double), OPERATOR(d, *, any_double), OPERATOR(d, /, any_double);
    test("bits", any_integer, [](const Input& in, Output& out) { out.vector(bits(to_floats(in.v(0)))); });
    test("to_floats", any_integer, [](const Input& in, Output& out) { out.floats(to_floats(in.v(0))); });
    test("nearest of floats", any_float, [](const Input& in, Output& out) { out.vector(nearest(in.f(0))); });
    test("rounded", any_float, [](const Input& in, Output& out) { out.floats(rounded(in.f(0))); });
    test("fused floats", any_float, [](const Input& in, Output& out) { out.floats(fused(in.f(0), in.f(1), in.f(2))); });
    test("greater", any_float, [](const Input& in, Output& out) { out.floats(greater(in.f(0), in.f(1))); });
    test("smaller", any_float, [](const Input& in, Output& out) { out.floats(smaller(in.f(0), in.f(1))); });
    test<float>("times_power", [] { return 0.5f + next() * 0x1.8p-32f; }, [](const Input& in, Output& out) {
        float powers[16];
        for (float& n : powers) n = -static_cast<float>(next() % 127);
        out.floats(times_power(in.f(0), load_floats(powers)));
    });
    test("first_of floats", any_float, [](const Input& in, Output& out) { out.floats(first_of(some(16), in.f(0))); });
    test("sum", any_float, [](const Input& in, Output& out) { out.real(sum(in.f(0))); });
    test("low_doubles", any_integer, [](const Input& in, Output& out) { out.doubles(low_doubles(in.v(0))); });
    test("high_doubles", any_integer, [](const Input& in, Output& out) { out.doubles(high_doubles(in.v(0))); });
    test("fused doubles", any_double, [](const Input& in, Output& out) { out.doubles(fused(in.d(0), in.d(1), in.d(2))); });
    test<double>("exact", [] { return static_cast<double>(static_cast<int32_t>(next()) >> 9); },
                 [](const Input& in, Output& out) { out.doubles(exact(in.d(0), in.d(1), in.d(2))); });
    test<double>("floor_of", [] {
        const double whole = whole_double();
        return whole + (next() % 2 ? next() * 0x1p-32 : 0.0);
    },
                 [](const Input& in, Output& out) { out.doubles(floor_of(in.d(0)) + each(0.0)); });
    test("to_int64", whole_double, [](const Input& in, Output& out) { out.vector(to_int64(in.d(0))); });
    test("low_bits", any_double, [](const Input& in, Output& out) { out.vector(low_bits(in.d(0), in.d(1))); });
    test("nearest of doubles", any_double, [](const Input& in, Output& out) { out.vector(nearest(in.d(0), in.d(1))); });
    test("singles", any_double, [](const Input& in, Output& out) { out.floats(singles(in.d(0), in.d(1))); });
}

}  // namespace

int main() {
    if (!runs_here()) return 3;
    memory();
    integers();
    dots("dot", by_dots<false>, 128), dots("dot_bytes", by_dot_bytes, 128), dots_in_pairs<PAIRS_OF_BYTES>();
    reals();
}
