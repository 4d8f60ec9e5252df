// Attention and layer normalization: bytes in, bytes out, float32 between.
#pragma once
#include "border.h"

namespace fxquant {

constexpr double LOG2_E = 1.4426950408889634;

// 2^x for x <= 0, to about two units in the last place: 2^n times a polynomial on [-1/2, 1/2] (Cephes, exp2f).
inline Floats power_of_two(Floats x) {
    x = greater(x, each(-126.0f));
    const Floats n = rounded(x);
    x = x - n;
    Floats y = each(1.535336188319500e-4f);
    for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                    6.931472028550421e-1f, 1.0f})
        y = fused(y, x, each(c));
    return times_power(y, n);
}

// Memory that a thread keeps for itself.
inline uint8_t* scratch(size_t bytes) {
    static thread_local Scratch kept;
    return kept(bytes);
}

// What attention reads besides its tensors. Axes of a tensor: n images (the batch), h heads, w tokens, c numbers.
struct Attention {
    Tensor value;
    int32_t zero_query, zero_key, zero_value, causal;
    double score, result;  // units of a score, and of a sum of values in steps of the result
};

constexpr int ROWS = 6;

// A head: its keys, laid out as a convolution's weights are; its values as floats; and room for
// the scores of some rows, which are integers first and floats then.
struct Head {
    const Step& s;
    const Attention& a;
    int i, h, keys, depth, width, blocks, fours, columns;  // fours of a key's bytes, 64s of a value's numbers
    int64_t padded;
    int8_t* packed;
    int32_t* bias;
    float* scores;  // [ROWS][padded]
    float* values;  // [keys][64 columns]

    Head(const Step& s, const Attention& a, int number)
        : s(s), a(a), i(number / s.x.h), h(number % s.x.h), keys(s.z.w), depth(s.x.c), width(a.value.c),
          blocks((keys + 15) / 16), fours(fours_of(depth)), columns((width + 63) / 64), padded(16 * blocks) {
        const int64_t weights = padded * fours * 4;
        packed = reinterpret_cast<int8_t*>(scratch(weights + 4 * (padded * (1 + ROWS) + static_cast<int64_t>(keys) * columns * 64)));
        bias = reinterpret_cast<int32_t*>(packed + weights);
        scores = reinterpret_cast<float*>(bias + padded), values = scores + ROWS * padded;
        for (int k = 0; k < padded; k++) pack(k);
        for (int k = 0; k < keys; k++) unpack(k);
    }
    int8_t* weights_of(int block) const { return packed + static_cast<int64_t>(block) * fours * 64; }

    // Scores are exact sums; what the keys' own zero point adds is the same for all keys of a row, and softmax does not see it.
    void pack(int k) {
        const int first = k / (16 * BLOCKS_TOGETHER) * BLOCKS_TOGETHER, together = std::min(BLOCKS_TOGETHER, blocks - first);
        int8_t* to = weights_of(first) + (k - 16 * first) * 4;
        int64_t sum = 0;
        int left = fours;
        for (int d = 0; d < depth; d += 64) {
            const int count = k < keys ? std::min(64, depth - d) : 0;
            const Vector key = load_first(s.z.at(i, h, k) + d, count);
            sum += sum8(key);
            alignas(64) uint8_t bytes[64];
            alignas(64) Weight centred[64];
            store(bytes, key);
            for (int n = 0; n < 64; n++) centred[n] = static_cast<Weight>(n < count ? bytes[n] - 128 : 0);
            const char* four = reinterpret_cast<const char*>(centred);
            for (int q = std::min(left, static_cast<int>(sizeof(centred)) / 4); q > 0; q--, left--, four += 4, to += 64 * together)
                std::memcpy(to, four, 4);
        }
        const int32_t taken_off = CENTRE * static_cast<int32_t>(sum - depth * 128);
        bias[k] = k < keys ? taken_off - a.zero_query * static_cast<int32_t>(sum - depth * a.zero_key) : 0;
    }
    void unpack(int k) {
        const uint8_t* value = a.value.at(i, h, k);
        float* to = values + static_cast<int64_t>(k) * columns * 64;
        for (int c = 0; c < columns * 64; c += 16) {
            store_floats(to + c, to_floats(sub32(widen(value + c, width - c), each32(a.zero_value))));
        }
    }

    // Products of some rows with the first `seen` keys, as integers.
    void score(int row, int count, int seen) const {
        static const int32_t first_tap = 0;
        alignas(64) int32_t sums[MOST_PIXELS * 64];
        const uint8_t* rows[ROWS];
        for (int r = 0; r < count; r++) rows[r] = s.x.at(i, h, row + r);
        Tile tile;
        tile.rows = rows, tile.offset = 0, tile.tap = &first_tap, tile.taps = 1, tile.fours = fours;
        tile.between = static_cast<int64_t>(fours) * 64, tile.half_first = nullptr;
        for (int b = 0; 16 * b < seen; b += 4) {
            const int most = std::min(4, blocks - b);
            tile.weight = weights_of(b), tile.bias = bias + 16 * b;
            accumulate_all(tile, most, count, sums);
            for (int r = 0; r < count; r++) std::memcpy(scores + r * padded + 16 * b, sums + 64 * r, sizeof(int32_t) * 16 * most);
        }
    }

    // 2^((score - most) unit) of the first `seen` keys of a row, and 0 of what follows up to `end`; returns their sum.
    float weigh(float* at, int seen, int end) const {
        const Floats unit = each(static_cast<float>(a.score * LOG2_E));
        Vector most = each32(INT32_MIN);
        for (int k = 0; k < seen; k += 16) most = first_of(seen - k, max32(most, load(at + k)), most);
        const Vector top = each32(greatest32(most));
        Floats sums = each(0.0f);
        for (int k = 0; k < end; k += 16) {
            const Floats below = to_floats(sub32(load(at + k), top));
            const Floats p = first_of(seen - k, power_of_two(below * unit));
            store_floats(at + k, p);
            sums = sums + p;
        }
        return sum(sums);
    }

    // Sums of 64 numbers of the first `seen` values by the weights of all rows.
    void mix(int column, int seen, float out[ROWS][64]) const {
        for (int part = 0; part < 4; part += BLOCKS_TOGETHER) mix_part(64 * column + 16 * part, seen, out, 16 * part);
    }
    void mix_part(int from, int seen, float out[ROWS][64], int to) const {
        Floats acc[ROWS][BLOCKS_TOGETHER];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < BLOCKS_TOGETHER; j++) acc[r][j] = each(0.0f);
        const float* value = values + from;
        for (int k = 0; k < seen; k++, value += columns * 64) {
            Floats v[BLOCKS_TOGETHER];
#pragma GCC unroll 4
            for (int j = 0; j < BLOCKS_TOGETHER; j++) v[j] = load_floats(value + 16 * j);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const Floats p = each(scores[r * padded + k]);
#pragma GCC unroll 4
                for (int j = 0; j < BLOCKS_TOGETHER; j++) {
                    acc[r][j] = fused(p, v[j], acc[r][j]);
                    keep(acc[r][j]);
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < BLOCKS_TOGETHER; j++) store_floats(out[r] + to + 16 * j, acc[r][j]);
    }
};

// Some rows of one head.
inline void attend(const Step& s, int unit) {
    const int parts = s.groups, part = unit % parts, tokens = s.x.w;
    const Head head(s, *static_cast<const Attention*>(s.numbers), unit / parts);
    const Vector low = each8(s.out.low), high = each8(s.out.high);
    const int end = tokens * (part + 1) / parts;
    for (int row = tokens * part / parts; row < end; row += ROWS) {
        const int count = std::min(ROWS, end - row);
        const int seen = head.a.causal ? std::min(head.keys, row + count) : head.keys;
        head.score(row, count, seen);
        float total[ROWS];
        // Rows that are not there weigh nothing, so that the sums below need not ask.
        for (int r = 0; r < ROWS; r++) {
            const int own = r >= count ? 0 : head.a.causal ? std::min(head.keys, row + r + 1) : head.keys;
            total[r] = head.weigh(head.scores + r * head.padded, own, seen);
        }
        for (int column = 0; column < head.columns; column++) {
            alignas(64) float out[ROWS][64];
            head.mix(column, seen, out);
            for (int r = 0; r < count; r++) {
                const Floats unit_of_result = each(static_cast<float>(head.a.result / total[r]));
                Vector v[4];
                for (int j = 0; j < 4; j++)
                    v[j] = add32(nearest(load_floats(out[r] + 16 * j) * unit_of_result), each32(s.zero_point[1]));
                store_first(s.y.at(head.i, head.h, row + r) + 64 * column, clamp(pack(v), low, high), head.width - 64 * column);
            }
        }
    }
}

// (x - mean) / sqrt(variance + epsilon) * gain + offset over the channels of a pixel. Sums of bytes and of their squares are
// exact; epsilon is in units of the input's steps, gain and offset in steps of the result: numbers[2][channels].
inline void normalize(const Step& s, int unit) {
    const float* gain = static_cast<const float*>(s.numbers);
    const float* offset = gain + s.y.c;
    const Vector least = each8(s.out.low), most = each8(s.out.high);
    each_pixel(s, unit, [&](const Point&, const uint8_t* x, uint8_t* y) {
        Vector sums = zeros(), squares = zeros();
        for (int c = 0; c < s.y.c; c += 32) {
            const Vector wide = widen_to_words(x + c, s.y.c - c);
            sums = dot_words(sums, wide, each16(1));
            squares = dot_words(squares, wide, wide);
        }
        const double n = s.y.c, total = sum32(sums), square = sum32(squares);
        const double mean = total / n, variance = (square * n - total * total) / (n * n);
        const Floats centre = each(static_cast<float>(mean));
        const Floats spread = each(static_cast<float>(1.0 / std::sqrt(variance + s.scale[0])));
        for (int c = 0; c < s.y.c; c += 64) {
            Vector v[4];
            for (int j = 0; j < 4; j++) {
                const int at = c + 16 * j, left = s.y.c - at;
                const Floats normal = (to_floats(widen(x + at, left)) - centre) * spread;
                const Floats real = fused(normal, load_floats_first(gain + at, left), load_floats_first(offset + at, left));
                v[j] = add32(nearest(real), each32(s.zero_point[1]));
            }
            store_first(y + c, clamp(pack(v), least, most), s.y.c - c);
        }
    });
}

// e^(x - most) / sum over the channels of a pixel, or its logarithm (taps); scale[0] is the input's step, scale[1] one over
// the result's.
inline void softmax(const Step& s, int unit) {
    const Vector least = each8(s.out.low), high = each8(s.out.high);
    const int c = s.y.c, padded = (c + 63) / 64 * 64;
    float* reals = reinterpret_cast<float*>(scratch(sizeof(float) * padded));
    const Floats step = each(static_cast<float>(s.scale[0]));
    each_pixel(s, unit, [&](const Point&, const uint8_t* x, uint8_t* y) {
        int most = 0;
        for (int k = 0; k < c; k++) most = std::max(most, static_cast<int>(x[k]));
        Floats sums = each(0.0f);
        for (int k = 0; k < padded; k += 16) {
            const Floats real = to_floats(sub32(widen(x + k, c - k), each32(most))) * step;
            const Floats p = first_of(c - k, power_of_two(real * each(static_cast<float>(LOG2_E))));
            store_floats(reals + k, s.taps ? real : p);
            sums = sums + p;
        }
        const double total = sum(sums);
        const Floats subtracted = each(s.taps ? static_cast<float>(std::log(total)) : 0.0f);
        const Floats unit_of_result = each(static_cast<float>(s.taps ? s.scale[1] : s.scale[1] / total));
        for (int k = 0; k < c; k += 64) {
            Vector v[4];
            for (int j = 0; j < 4; j++) {
                const Floats real = load_floats(reals + k + 16 * j) - subtracted;
                v[j] = add32(nearest(real * unit_of_result), each32(s.zero_point[1]));
            }
            store_first(y + k, clamp(pack(v), least, high), c - k);
        }
    });
}

}  // namespace fxquant
