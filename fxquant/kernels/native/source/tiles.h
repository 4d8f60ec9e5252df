// A few pixels by up to 64 channels: bytes times weights into sums of 32 bits, and sums into bytes.
#pragma once
#include <alloca.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "vectors.h"

namespace fxquant {

constexpr int MOST_PIXELS = 8;

// Where some pixels of the result go, and what is added to them.
struct alignas(64) Results {
    uint8_t* to[MOST_PIXELS];
    const uint8_t* other[MOST_PIXELS];
};

// Four bytes of operands that some channels fill.
inline int fours_of(int depth) { return (depth * static_cast<int>(sizeof(Operand)) + 3) / 4; }

// What a tile needs besides its numbers of pixels and blocks. What four bytes of operands hold counts as one: four channels of
// a set that multiplies bytes, two of a set that multiplies words.
struct Tile {
    const uint8_t** rows;  // [tap][MOST_PIXELS]
    const int32_t* tap;  // its number in the weights
    int64_t offset;        // of the group's channels in a pixel
    int taps, fours;     // taps of the window, four bytes of operands in each
    const int8_t* weight;
    const int32_t* bias;
    int64_t block;  // the first one's number
    const Finish* finish;
    int channels;
    int64_t between;  // bytes of the weights of a block
    const int8_t* halves;
    int window_taps;
    const int32_t *half_four, *half_first;  // of the block: null where weights are no bytes in pairs

    const float* numbers = nullptr;  // of the block, where sums leave its registers rescaled (NARROWS)
    float magic = 0;

    const int8_t* weight_of(int t, int blocks) const { return weight + static_cast<int64_t>(tap[t]) * fours * (64 * blocks); }
};

// What four bytes of a pixel and of weights hold: operands and weights of the set (dot), bytes whose products are added in pairs
// (dot_in_pairs), or two words (dot_words).
enum Products { OPERANDS, IN_PAIRS, IN_WORDS };

// PIXELS by BLOCKS sums of 16 channels, which stay in registers.
template <int PIXELS, int BLOCKS>
struct Sums {
    Vector acc[PIXELS][BLOCKS];

    explicit Sums(const int32_t* bias) {
#pragma GCC unroll 8
        for (int j = 0; j < BLOCKS; j++) {
            const Vector b = load(bias + 16 * j);
#pragma GCC unroll 8
            for (int i = 0; i < PIXELS; i++) acc[i][j] = b;
        }
    }
    // Four bytes of each pixel, by the weights of all channels.
    template <Products PRODUCTS = OPERANDS>
    void add(const uint8_t* const (&at)[PIXELS], int64_t four, const int8_t* weight) {
        Vector w[BLOCKS];
#pragma GCC unroll 8
        for (int j = 0; j < BLOCKS; j++) w[j] = load(weight + 64 * BLOCKS * four + 64 * j);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) {
            int32_t operands;
            std::memcpy(&operands, at[i] + 4 * four, 4);
            const Vector x = each32(operands);
#pragma GCC unroll 8
            for (int j = 0; j < BLOCKS; j++) {
                if constexpr (PRODUCTS == IN_PAIRS) acc[i][j] = dot_in_pairs(acc[i][j], x, w[j]);
                else if constexpr (PRODUCTS == IN_WORDS) acc[i][j] = dot_words(acc[i][j], x, w[j]);
                else acc[i][j] = dot(acc[i][j], x, w[j]);
                keep(acc[i][j]);
            }
        }
    }
    void store(int32_t* sums) const {
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) {
#pragma GCC unroll 8
            for (int j = 0; j < BLOCKS; j++) fxquant::store(sums + 64 * i + 16 * j, acc[i][j]);
        }
    }
    // Rescaled, the lower halves that pack_words would read.
    void store_rescaled(int32_t* sums, const float* numbers, float magic) const {
        static_assert(BLOCKS == 1);
        const Floats own = load_floats(numbers), shift = each(magic);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) store_words(sums + 64 * i, bits(fused(to_floats(acc[i][0]), own, shift)));
    }
};

// The bytes of a pixel from its sums.
template <int BLOCKS, Rule RULE>
inline void finish_pixel(const Rescaling<RULE>& rescaling, const Tile& tile, const Results& results, int i, const int32_t* sums) {
    Vector v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) v[j] = j < BLOCKS ? rescaling(load(sums + 16 * (j < BLOCKS ? j : 0)), j) : v[0];
    store_first(results.to[i], (*tile.finish)(rescaling.bytes(v), results.other[i]), tile.channels);
}

// A tile's sums[pixel][64].
template <int PIXELS, int BLOCKS, Products PRODUCTS = OPERANDS>
void accumulate(const Tile& tile, int32_t* sums) {
    Sums<PIXELS, BLOCKS> acc(tile.bias);
    const uint8_t* const* rows = tile.rows;
    for (int t = 0; t < tile.taps; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight_of(t, BLOCKS);
        const uint8_t* at[PIXELS];
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) at[i] = rows[i] + tile.offset;
        const int64_t fours = tile.fours;
        for (int64_t k = 0; k < fours; k++) acc.template add<PRODUCTS>(at, k, weight);
        if constexpr (PRODUCTS == IN_PAIRS) {
            const int32_t* first = tile.half_first + tile.tap[t];
            for (int32_t h = first[0]; h < first[1]; h++) {
                const uint8_t* half[PIXELS];
#pragma GCC unroll 8
                for (int i = 0; i < PIXELS; i++) half[i] = at[i] + 4 * tile.half_four[h];
                acc.template add<IN_PAIRS>(half, 0, tile.halves + 64 * static_cast<int64_t>(h));
            }
        }
    }
    if constexpr (NARROWS) {
        if (tile.numbers) return acc.store_rescaled(sums, tile.numbers, tile.magic);
    }
    acc.store(sums);
}

// A function for each number of pixels of a tile of BLOCKS blocks, null beyond the most that a set has registers for.
template <class Function, template <int, int> class Choice, int BLOCKS, int... PIXELS>
constexpr std::array<Function, MOST_PIXELS + 1> for_pixels(std::integer_sequence<int, PIXELS...>) {
    return {Choice<PIXELS, BLOCKS>::function()...};
}
template <class Function, template <int, int> class Choice>
constexpr std::array<std::array<Function, MOST_PIXELS + 1>, 5> for_tiles() {
    using Pixels = std::make_integer_sequence<int, MOST_PIXELS + 1>;
    return {for_pixels<Function, Choice, 0>(Pixels()), for_pixels<Function, Choice, 1>(Pixels()),
            for_pixels<Function, Choice, 2>(Pixels()), for_pixels<Function, Choice, 3>(Pixels()),
            for_pixels<Function, Choice, 4>(Pixels())};
}

using Accumulate = void (*)(const Tile&, int32_t*);
template <int PIXELS, int BLOCKS>
struct Accumulating {
    static constexpr Accumulate function() {
        if constexpr (PIXELS > 0 && PIXELS <= PIXELS_FOR[BLOCKS]) return accumulate<PIXELS, BLOCKS>;
        return nullptr;
    }
};
static constexpr auto ACCUMULATE = for_tiles<Accumulate, Accumulating>();

template <int PIXELS, int BLOCKS>
struct AccumulatingInPairs {
    static constexpr Accumulate function() {
        if constexpr (PAIRS_OF_BYTES && PIXELS > 0 && PIXELS <= PIXELS_FOR[BLOCKS]) return accumulate<PIXELS, BLOCKS, IN_PAIRS>;
        return nullptr;
    }
};
static constexpr auto ACCUMULATE_IN_PAIRS = for_tiles<Accumulate, AccumulatingInPairs>();

// Memory of a thread's own, which grows and stays.
struct Scratch {
    std::vector<uint8_t> kept;

    uint8_t* operator()(size_t bytes) {
        if (kept.size() < bytes + 64) kept.resize(bytes + 64);
        return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(kept.data()) + 63) / 64 * 64);
    }
};

// The pixels of a tile as the operands of a set that does not multiply bytes, in memory of this thread; rows taps there.
inline void widen_rows(Tile& tile, int pixels, const uint8_t** rows) {
    static thread_local Scratch scratch;
    constexpr int A_FOUR = 4 / sizeof(Operand);
    const int64_t depth = static_cast<int64_t>(tile.fours) * A_FOUR, step = (depth + 15) / 16 * 16;
    Operand* to = reinterpret_cast<Operand*>(scratch(sizeof(Operand) * step * tile.taps * pixels));
    for (int t = 0; t < tile.taps; t++) {
        for (int i = 0; i < pixels; i++, to += step) {
            const uint8_t* from = tile.rows[MOST_PIXELS * t + i] + tile.offset;
            for (int64_t k = 0; k < depth; k += 16) {
#pragma GCC unroll 16
                for (int j = 0; j < 16; j++) to[k + j] = from[k + j];
            }
            rows[MOST_PIXELS * t + i] = reinterpret_cast<const uint8_t*>(to);
        }
    }
    tile.rows = rows, tile.offset = 0;
}

// The sums[pixel][64] of all blocks of a tile, as many at a time as a set has registers for.
inline void accumulate_all(const Tile& tile, int blocks, int pixels, int32_t* sums) {
    if constexpr (sizeof(Operand) == 1 && BLOCKS_TOGETHER == 4) return ACCUMULATE[blocks][pixels](tile, sums);
    Tile own = tile;
    if (sizeof(Operand) > 1 && !tile.half_first)
        widen_rows(own, pixels, static_cast<const uint8_t**>(alloca(sizeof(void*) * tile.taps * MOST_PIXELS)));
    for (int j = 0; j < blocks; j += BLOCKS_TOGETHER, sums += 16 * BLOCKS_TOGETHER) {
        const int count = std::min(BLOCKS_TOGETHER, blocks - j);
        (own.half_first ? ACCUMULATE_IN_PAIRS : ACCUMULATE)[count][pixels](own, sums);
        own.weight += BLOCKS_TOGETHER * own.between, own.bias += 16 * BLOCKS_TOGETHER;
        if (NARROWS && own.numbers) own.numbers += 16 * BLOCKS_TOGETHER;
        if (own.half_first) own.half_first += own.window_taps;
    }
}

Vector pack_stored_words(const int32_t* from);  // of sets that narrow (NARROWS) alone

// From sums, or what was stored of them rescaled, to the bytes of a tile.
template <int BLOCKS, Rule RULE>
void to_bytes(const Step& s, const Tile& tile, const Results& results, int count, const int32_t* sums) {
    if constexpr (NARROWS && RULE == FLOAT32) {
        if (tile.numbers) {
            for (int i = 0; i < count; i++)
                store_first(results.to[i], (*tile.finish)(pack_stored_words(sums + 64 * i), results.other[i]), tile.channels);
            return;
        }
    }
    const Rescaling<RULE> rescaling(s, tile.block);
    for (int i = 0; i < count; i++) finish_pixel<BLOCKS>(rescaling, tile, results, i, sums + 64 * i);
}

using ToBytes = void (*)(const Step&, const Tile&, const Results&, int, const int32_t*);
static const ToBytes TO_BYTES[3][5] = {
    {nullptr, to_bytes<1, FLOAT32>, to_bytes<2, FLOAT32>, to_bytes<3, FLOAT32>, to_bytes<4, FLOAT32>},
    {nullptr, to_bytes<1, FLOAT64>, to_bytes<2, FLOAT64>, to_bytes<3, FLOAT64>, to_bytes<4, FLOAT64>},
    {nullptr, to_bytes<1, INTEGERS>, to_bytes<2, INTEGERS>, to_bytes<3, INTEGERS>, to_bytes<4, INTEGERS>},
};

// A tile of 4 pixels by 4 blocks that turns the sums of the one before into bytes while it adds up its own: rounding and
// products use different parts of a core. Tiles have 64 channels. A pixel is finished along with four fours of channels, one
// at a tap where there are four taps.
template <Rule RULE>
void accumulate_and_finish(const Step& s, const Tile& tile, int32_t* sums, const Results& before, const int32_t* sums_before) {
    const Rescaling<RULE> rescaling(s, tile.block);
    Sums<4, 4> acc(tile.bias);
    const uint8_t* const* rows = tile.rows;
    for (int t = 0, i = 0; t < tile.taps; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight_of(t, 4);
        const uint8_t* const at[4] = {rows[0] + tile.offset, rows[1] + tile.offset, rows[2] + tile.offset, rows[3] + tile.offset};
        const int64_t fours = tile.fours;
        int64_t k = 0;
        for (const int until = tile.taps < 4 ? 4 : std::min(t + 1, 4); i < until; i++) {
            Vector v[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, k++) {
                acc.add(at, k, weight);
                v[j] = rescaling(load(sums_before + 64 * i + 16 * j), j);
            }
            store(before.to[i], (*tile.finish)(rescaling.bytes(v), before.other[i]));
        }
        for (; k < fours; k++) acc.add(at, k, weight);
    }
    acc.store(sums);
}

// The same with sums that are never stored, for tiles of at most 16 of them: more leave the compiler too few registers. Short
// sums gain, since storing and reading them again would take as long as adding them up.
template <int PIXELS, int BLOCKS>
void at_once(const Step& s, const Tile& tile, const Results& results) {
    Sums<PIXELS, BLOCKS> acc(tile.bias);
    const uint8_t* const* rows = tile.rows;
    for (int t = 0; t < tile.taps; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight_of(t, BLOCKS);
        const uint8_t* at[PIXELS];
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) at[i] = rows[i] + tile.offset;
        for (int64_t k = 0; k < tile.fours; k++) acc.add(at, k, weight);
    }
    const Rescaling<FLOAT32> rescaling(s, tile.block);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) {
        Vector v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) v[j] = j < BLOCKS ? rescaling(acc.acc[i][j < BLOCKS ? j : 0], j) : v[0];
        store_first(results.to[i], (*tile.finish)(rescaling.bytes(v), results.other[i]), tile.channels);
    }
}

using AtOnce = void (*)(const Step&, const Tile&, const Results&);
template <int PIXELS, int BLOCKS>
struct FinishingAtOnce {
    static constexpr AtOnce function() {
        if constexpr (PIXELS > 0 && PIXELS <= PIXELS_AT_ONCE[BLOCKS]) return at_once<PIXELS, BLOCKS>;
        return nullptr;
    }
};
static constexpr auto AT_ONCE = for_tiles<AtOnce, FinishingAtOnce>();

}  // namespace fxquant
