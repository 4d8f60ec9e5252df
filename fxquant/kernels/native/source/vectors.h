// 64 bytes at a time: requantization, tables, sums of two grids. Every rule is that of fxquant's integer forms, to the bit.
#pragma once
#include <algorithm>
#include <type_traits>

#include "isa.h"
#include "tensor.h"

namespace fxquant {

// round(acc * number) + zero point of 16 sums by 16 numbers: the fused multiply-add leaves a whole number in the low bits.
inline Vector rescale(Vector acc, const float* number, Floats magic) {
    return bits(fused(to_floats(acc), load_floats(number), magic));
}

inline Vector rescale(Vector acc, const double* number, Doubles magic) {
    return low_bits(fused(low_doubles(acc), load_doubles(number), magic),
                    fused(high_doubles(acc), load_doubles(number + 8), magic));
}

// floor((acc * q + r) / 2^s) of 16 numbers; a product has up to 62 bits, so even and odd lanes go separate ways.
struct Multiplier {
    Vector q[2], r[2], s[2];

    explicit Multiplier(const int64_t* constants) {
        for (int odd = 0; odd < 2; odd++) {
            q[odd] = load(constants + 24 * odd);
            r[odd] = load(constants + 24 * odd + 8);
            s[odd] = load(constants + 24 * odd + 16);
        }
    }
    Vector operator()(Vector acc) const {
        const Vector even = add64(products(acc, q[0]), r[0]), odd = add64(products(odd_ones(acc), q[1]), r[1]);
        return even_and_odd(shift_right64(even, s[0]), shift_right64(odd, s[1]));
    }
};

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
    Vector operator()(Vector acc, int block) const {
        const Constant* own = constants + A_BLOCK * block;
        if constexpr (RULE == FLOAT32) {
            return rescale(acc, own, each(static_cast<float>(magic)));
        } else if constexpr (RULE == FLOAT64) {
            return rescale(acc, own, each(magic));
        } else {
            return Multiplier(own)(acc);
        }
    }
    static Vector bytes(const Vector v[4]) { return RULE == FLOAT32 ? pack_words(v) : pack(v); }
    static Vector interleaved_bytes(const Vector v[4]) { return RULE == FLOAT32 ? pack_interleaved_words(v) : pack_interleaved(v); }
};

// The opposite of pack_interleaved.
inline void weave(Vector bytes, Vector v[4]) {
    const Vector low = low8(bytes, zeros()), high = high8(bytes, zeros());
    v[0] = low16(low, zeros()), v[1] = high16(low, zeros());
    v[2] = low16(high, zeros()), v[3] = high16(high, zeros());
}

inline Vector clamp(Vector bytes, Vector low, Vector high) { return min8(max8(bytes, low), high); }

static const uint8_t NO_TABLE[256] = {};

// (a q0 + b q1 + c) >> s of bytes, exactly, in 32 bits: with q = 2^16 h + l the products with h and l are summed apart, and
// floor((2^16 H + L) / 2^s) = floor((H + floor(L / 2^16)) / 2^(s - 16)).
struct Sum {
    Vector high, low, constant_high, constant_low, least, most;
    int shift;

    explicit Sum(const Addition& add) {
        uint32_t halves[2][2];
        for (int i = 0; i < 2; i++) {
            halves[1][i] = add.q[i] & 0xFFFF;
            halves[0][i] = static_cast<uint32_t>((static_cast<int64_t>(add.q[i]) - static_cast<int16_t>(halves[1][i])) >> 16);
        }
        high = each32(static_cast<int32_t>((halves[0][0] & 0xFFFF) | (halves[0][1] << 16)));
        low = each32(static_cast<int32_t>(halves[1][0] | (halves[1][1] << 16)));
        constant_high = each32(static_cast<int32_t>(add.constant >> 16));
        constant_low = each32(static_cast<int32_t>(add.constant & 0xFFFF));
        shift = add.shift - 16;
        least = each8(add.low), most = each8(add.high);
    }
    Vector one(Vector pairs) const {
        const Vector h = dot_words(constant_high, pairs, high), l = dot_words(constant_low, pairs, low);
        return shift_right32(add32(h, upper16(l)), shift);
    }
    Vector operator()(Vector a, Vector b) const {
        const Vector a0 = low8(a, zeros()), a1 = high8(a, zeros()), b0 = low8(b, zeros()), b1 = high8(b, zeros());
        const Vector v[4] = {one(low16(a0, b0)), one(high16(a0, b0)), one(low16(a1, b1)), one(high16(a1, b1))};
        return clamp(pack_interleaved(v), least, most);
    }
};

// The same in 64 bits, for a q that is too close to 2^31 for two halves of 16 bits.
inline Vector wide_sum(const Addition& add, const uint8_t* a, const uint8_t* b) {
    alignas(64) uint8_t out[64];
    for (int k = 0; k < 64; k++) {
        const int64_t sum = static_cast<int64_t>(a[k]) * add.q[0] + static_cast<int64_t>(b[k]) * add.q[1] + add.constant;
        out[k] = static_cast<uint8_t>(std::min<int64_t>(std::max<int64_t>(sum >> add.shift, add.low), add.high));
    }
    return load(out);
}

// What happens to 64 bytes once they are requantized.
struct Finish {
    Vector low, high;
    bool looks_up, adds;
    Table table;
    Sum sum;

    explicit Finish(const Step& step)
        : low(each8(step.out.low)),
          high(each8(step.out.high)),
          looks_up(step.out.table != nullptr),
          adds(step.flags & ADDS),
          table(looks_up ? step.out.table : NO_TABLE),
          sum(step.add) {}
    Vector operator()(Vector bytes) const {
        bytes = clamp(bytes, low, high);
        return looks_up ? table(bytes) : bytes;
    }
    Vector operator()(Vector bytes, const uint8_t* other) const {
        bytes = (*this)(bytes);
        return adds ? sum(bytes, load(other)) : bytes;
    }
};

}  // namespace fxquant
