// Attention and layer normalization: bytes in, bytes out, float32 between.
#pragma once
#include "doors.h"

namespace fxquant {

constexpr double LOG2_E = 1.4426950408889634;

// 2^x for x <= 0, to about two units in the last place: 2^n times a polynomial on [-1/2, 1/2] (Cephes, exp2f).
inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.535336188319500e-4f);
    for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                    6.931472028550421e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

// Memory that a thread keeps for itself.
inline uint8_t* scratch(size_t bytes) {
    static thread_local std::vector<uint8_t> kept;
    if (kept.size() < bytes + 64) kept.resize(bytes + 64);
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(kept.data()) + 63) / 64 * 64);
}

// What attention reads besides its tensors. Axes of a tensor: n images (the batch), h heads, w tokens, c numbers.
struct Attention {
    Tensor value;
    int32_t zero_query, zero_key, zero_value, causal;
    double score, result;  // units of a score, and of a sum of values in steps of the result
};

constexpr int ROWS = 6;

// A head: its keys, laid out as a convolution's weights are, four blocks of 16 in a bundle; its values as floats; and room for
// the scores of some rows, which are integers first and floats then.
struct Head {
    const Step& s;
    const Attention& a;
    int i, h, keys, depth, width, blocks, quads, columns;  // fours of a key's numbers, 64s of a value's
    int64_t padded;
    int8_t* packed;
    int32_t* bias;
    float* scores;  // [ROWS][padded]
    float* values;  // [keys][64 columns]

    Head(const Step& s, const Attention& a, int number)
        : s(s), a(a), i(number / s.x.h), h(number % s.x.h), keys(s.z.w), depth(s.x.c), width(a.value.c),
          blocks((keys + 15) / 16), quads((depth + 3) / 4), columns((width + 63) / 64), padded(16 * blocks) {
        const int64_t weights = padded * quads * 4;
        packed = reinterpret_cast<int8_t*>(scratch(weights + 4 * (padded * (1 + ROWS) + static_cast<int64_t>(keys) * columns * 64)));
        bias = reinterpret_cast<int32_t*>(packed + weights);
        scores = reinterpret_cast<float*>(bias + padded), values = scores + ROWS * padded;
        for (int k = 0; k < padded; k++) pack(k);
        for (int k = 0; k < keys; k++) unpack(k);
    }
    int blocks_of(int bundle) const { return std::min(4, blocks - 4 * bundle); }

    // Scores are exact sums; what the keys' own zero point adds is the same for all keys of a row, and softmax does not see it.
    void pack(int k) {
        const int64_t step = 64 * blocks_of(k / 64);
        int8_t* to = packed + static_cast<int64_t>(k / 64) * quads * 256 + k % 64 * 4;
        __m512i sums = _mm512_setzero_si512();
        for (int d = 0; d < depth; d += 64) {
            const __mmask64 there = k < keys ? first(depth - d) : 0;
            const __m512i key = _mm512_maskz_loadu_epi8(there, s.z.at(i, h, k) + d);
            sums = _mm512_add_epi64(sums, _mm512_sad_epu8(key, _mm512_setzero_si512()));
            alignas(64) int32_t fours[16];
            _mm512_store_si512(fours, _mm512_maskz_add_epi8(there, key, _mm512_set1_epi8(-128)));
            for (int q = 0; q < std::min(16, quads - d / 4); q++, to += step) std::memcpy(to, fours + q, 4);
        }
        bias[k] = k < keys ? -a.zero_query * static_cast<int32_t>(_mm512_reduce_add_epi64(sums) - depth * a.zero_key) : 0;
    }
    void unpack(int k) {
        const uint8_t* value = a.value.at(i, h, k);
        float* to = values + static_cast<int64_t>(k) * columns * 64;
        for (int c = 0; c < columns * 64; c += 16) {
            const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(first(width - c)), value + c);
            const __m512i centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(a.zero_value));
            _mm512_store_ps(to + c, _mm512_cvtepi32_ps(centred));
        }
    }

    // Products of some rows with the first `seen` keys, as integers.
    void score(int row, int count, int seen) const {
        static const int32_t first_point = 0;
        alignas(64) int32_t sums[MOST_PIXELS * 64];
        const uint8_t* rows[ROWS];
        for (int r = 0; r < count; r++) rows[r] = s.x.at(i, h, row + r);
        Tile tile;
        tile.rows = rows, tile.offset = 0, tile.point = &first_point, tile.points = 1, tile.quads = quads;
        for (int b = 0; 64 * b < seen; b++) {
            tile.weight = packed + static_cast<int64_t>(b) * quads * 256, tile.bias = bias + 64 * b;
            ACCUMULATE[blocks_of(b)][count](tile, sums);
            for (int r = 0; r < count; r++)
                std::memcpy(scores + r * padded + 64 * b, sums + 64 * r, sizeof(int32_t) * 16 * blocks_of(b));
        }
    }

    // 2^((score - most) unit) of the first `seen` keys of a row, and 0 of what follows up to `end`; returns their sum.
    float weigh(float* at, int seen, int end) const {
        const __m512 unit = _mm512_set1_ps(static_cast<float>(a.score * LOG2_E));
        __m512i most = _mm512_set1_epi32(INT32_MIN);
        for (int k = 0; k < seen; k += 16)
            most = _mm512_mask_max_epi32(most, static_cast<__mmask16>(first(seen - k)), most, _mm512_load_si512(at + k));
        const __m512i top = _mm512_set1_epi32(_mm512_reduce_max_epi32(most));
        __m512 sum = _mm512_setzero_ps();
        for (int k = 0; k < end; k += 16) {
            const __m512 below = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(at + k), top));
            const __m512 p = _mm512_maskz_mov_ps(static_cast<__mmask16>(first(seen - k)), power_of_two(_mm512_mul_ps(below, unit)));
            _mm512_store_ps(at + k, p);
            sum = _mm512_add_ps(sum, p);
        }
        return _mm512_reduce_add_ps(sum);
    }

    // Sums of 64 numbers of the first `seen` values by the weights of all rows.
    void mix(int column, int seen, float out[ROWS][64]) const {
        __m512 acc[ROWS][4];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[r][j] = _mm512_setzero_ps();
        const float* value = values + 64 * column;
        for (int k = 0; k < seen; k++, value += columns * 64) {
            __m512 v[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) v[j] = _mm512_load_ps(value + 16 * j);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const __m512 p = _mm512_set1_ps(scores[r * padded + k]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) acc[r][j] = _mm512_fmadd_ps(p, v[j], acc[r][j]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) _mm512_store_ps(out[r] + 16 * j, acc[r][j]);
    }
};

// Some rows of one head.
inline void attend(const Step& s, int unit) {
    const int parts = s.groups, part = unit % parts, tokens = s.x.w;
    const Head head(s, *static_cast<const Attention*>(s.numbers), unit / parts);
    const __m512i low = _mm512_set1_epi8(static_cast<char>(s.out.low)), high = _mm512_set1_epi8(static_cast<char>(s.out.high));
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
                const __m512 unit_of_result = _mm512_set1_ps(static_cast<float>(head.a.result / total[r]));
                __m512i v[4];
                for (int j = 0; j < 4; j++) {
                    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(out[r] + 16 * j), unit_of_result));
                    v[j] = _mm512_add_epi32(q, _mm512_set1_epi32(s.zero_point[1]));
                }
                store(s.y.at(head.i, head.h, row + r) + 64 * column, clamp(pack(v), low, high), head.width - 64 * column);
            }
        }
    }
}

// (x - mean) / sqrt(variance + epsilon) * gain + offset over the channels of a pixel. Sums of bytes and of their squares are
// exact; epsilon is in units of the input's steps, gain and offset in steps of the result: numbers[2][channels].
inline void normalize(const Step& s, int unit) {
    const float* gain = static_cast<const float*>(s.numbers);
    const float* offset = gain + s.y.c;
    const __m512i least = _mm512_set1_epi8(static_cast<char>(s.out.low)), most = _mm512_set1_epi8(static_cast<char>(s.out.high));
    each_pixel(s, unit, [&](const Point&, const uint8_t* x, uint8_t* y) {
        __m512i sum = _mm512_setzero_si512(), squares = _mm512_setzero_si512();
        for (int c = 0; c < s.y.c; c += 32) {
            const __m256i bytes = _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first(s.y.c - c)), x + c);
            const __m512i wide = _mm512_cvtepu8_epi16(bytes);
            sum = _mm512_dpwssd_epi32(sum, wide, _mm512_set1_epi16(1));
            squares = _mm512_dpwssd_epi32(squares, wide, wide);
        }
        const double n = s.y.c, total = _mm512_reduce_add_epi32(sum), square = _mm512_reduce_add_epi32(squares);
        const double mean = total / n, variance = (square * n - total * total) / (n * n);
        const __m512 centre = _mm512_set1_ps(static_cast<float>(mean));
        const __m512 spread = _mm512_set1_ps(static_cast<float>(1.0 / std::sqrt(variance + s.scale[0])));
        for (int c = 0; c < s.y.c; c += 64) {
            __m512i v[4];
            for (int j = 0; j < 4; j++) {
                const int at = c + 16 * j;
                const __mmask16 mask = static_cast<__mmask16>(first(s.y.c - at));
                const __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, x + at)));
                const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(q, centre), spread);
                const __m512 real = _mm512_fmadd_ps(normal, _mm512_maskz_loadu_ps(mask, gain + at), _mm512_maskz_loadu_ps(mask, offset + at));
                v[j] = _mm512_add_epi32(_mm512_cvtps_epi32(real), _mm512_set1_epi32(s.zero_point[1]));
            }
            store(y + c, clamp(pack(v), least, most), s.y.c - c);
        }
    });
}

// e^(x - most) / sum over the channels of a pixel, or its logarithm (taps); scale[0] is the input's step, scale[1] one over
// the result's.
inline void softmax(const Step& s, int unit) {
    const __m512i least = _mm512_set1_epi8(static_cast<char>(s.out.low)), high = _mm512_set1_epi8(static_cast<char>(s.out.high));
    const int c = s.y.c, padded = (c + 63) / 64 * 64;
    float* reals = reinterpret_cast<float*>(scratch(sizeof(float) * padded));
    const __m512 step = _mm512_set1_ps(static_cast<float>(s.scale[0]));
    each_pixel(s, unit, [&](const Point&, const uint8_t* x, uint8_t* y) {
        int most = 0;
        for (int k = 0; k < c; k++) most = std::max(most, static_cast<int>(x[k]));
        __m512 sum = _mm512_setzero_ps();
        for (int k = 0; k < padded; k += 16) {
            const __mmask16 mask = static_cast<__mmask16>(first(c - k));
            const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, x + k));
            const __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_set1_epi32(most))), step);
            const __m512 p = _mm512_maskz_mov_ps(mask, power_of_two(_mm512_mul_ps(real, _mm512_set1_ps(static_cast<float>(LOG2_E)))));
            _mm512_store_ps(reals + k, s.taps ? real : p);
            sum = _mm512_add_ps(sum, p);
        }
        const double total = _mm512_reduce_add_ps(sum);
        const __m512 subtracted = _mm512_set1_ps(s.taps ? static_cast<float>(std::log(total)) : 0.0f);
        const __m512 unit_of_result = _mm512_set1_ps(static_cast<float>(s.taps ? s.scale[1] : s.scale[1] / total));
        for (int k = 0; k < c; k += 64) {
            __m512i v[4];
            for (int j = 0; j < 4; j++) {
                const __m512 real = _mm512_sub_ps(_mm512_load_ps(reals + k + 16 * j), subtracted);
                const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(real, unit_of_result));
                v[j] = _mm512_add_epi32(q, _mm512_set1_epi32(s.zero_point[1]));
            }
            store(y + k, clamp(pack(v), least, high), c - k);
        }
    });
}

}  // namespace fxquant
