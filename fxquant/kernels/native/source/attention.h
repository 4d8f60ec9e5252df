// Attention and layer normalization: bytes in, bytes out, float32 between.
#pragma once
#include "doors.h"

namespace fxquant {

// e^x for x <= 0, to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.3f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(c));
    y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(x, x), x), _mm512_set1_ps(1.0f));
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

// Some rows of one head. Scores are exact sums; what the keys' own zero point adds is the same for all keys of a row, and
// softmax does not see it.
inline void attend(const Step& s, int unit) {
    const Attention& a = *static_cast<const Attention*>(s.numbers);
    const int tokens = s.x.w, keys = s.z.w, depth = s.x.c, width = a.value.c;
    const int parts = s.groups, head = unit / parts, part = unit % parts;
    const int i = head / s.x.h, h = head % s.x.h;
    const int quads = (depth + 3) / 4, bundles = (keys + 63) / 64, padded = 64 * bundles, columns = (width + 63) / 64;
    const size_t key_bytes = static_cast<size_t>(padded) * quads * 4;
    uint8_t* memory = scratch(key_bytes + 4 * padded + sizeof(float) * (static_cast<size_t>(keys) * columns * 64 + ROWS * padded));
    int8_t* packed = reinterpret_cast<int8_t*>(memory);
    int32_t* bias = reinterpret_cast<int32_t*>(memory + key_bytes);
    float* values = reinterpret_cast<float*>(bias + padded);
    float* scores = values + static_cast<size_t>(keys) * columns * 64;

    std::memset(packed, 0, key_bytes);
    for (int k = 0; k < padded; k++) {
        bias[k] = 0;
        if (k >= keys) continue;
        const uint8_t* key = s.z.at(i, h, k);
        int8_t* to = packed + static_cast<int64_t>(k / 64) * quads * 256 + (k % 64) * 4;
        int32_t sum = 0;
        for (int d = 0; d < depth; d++) sum += key[d], to[d / 4 * 256 + d % 4] = static_cast<int8_t>(key[d] ^ 0x80);
        bias[k] = -a.zero_query * (sum - depth * a.zero_key);
    }
    for (int k = 0; k < keys; k++) {
        const uint8_t* value = a.value.at(i, h, k);
        float* to = values + static_cast<size_t>(k) * columns * 64;
        for (int c = 0; c < columns * 64; c += 16) {
            const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(first(width - c)), value + c);
            const __m512i centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(a.zero_value));
            _mm512_store_ps(to + c, _mm512_cvtepi32_ps(centred));
        }
    }
    const __m512 score = _mm512_set1_ps(static_cast<float>(a.score));
    const int from = tokens * part / parts, end = tokens * (part + 1) / parts;
    alignas(64) int32_t sums[MOST_PIXELS * 64];
    const uint8_t* rows[ROWS];
    for (int row = from; row < end; row += ROWS) {
        const int count = std::min(ROWS, end - row);
        Tile tile;
        static const int32_t first_point = 0;
        tile.rows = rows, tile.offset = 0, tile.point = &first_point, tile.points = 1, tile.quads = quads;
        for (int r = 0; r < count; r++) rows[r] = s.x.at(i, h, row + r);
        float total[ROWS];
        for (int b = 0; b < bundles; b++) {
            tile.weight = packed + static_cast<int64_t>(b) * quads * 256, tile.bias = bias + 64 * b;
            ACCUMULATE[4][count](tile, sums);
            for (int r = 0; r < count; r++)
                for (int j = 0; j < 64; j += 16) {
                    const __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 64 * r + j)), score);
                    _mm512_store_ps(scores + r * padded + 64 * b + j, real);
                }
        }
        for (int r = 0; r < ROWS; r++) {
            float* at = scores + r * padded;
            // Rows that are not there weigh nothing, so that the sums below need not ask.
            const int seen = r >= count ? 0 : a.causal ? std::min(keys, row + r + 1) : keys;
            __m512 most = _mm512_set1_ps(-INFINITY);
            for (int k = 0; k < seen; k += 16)
                most = _mm512_mask_max_ps(most, static_cast<__mmask16>(first(seen - k)), most, _mm512_load_ps(at + k));
            const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
            __m512 sum = _mm512_setzero_ps();
            for (int k = 0; k < padded; k += 16) {
                const __mmask16 mask = static_cast<__mmask16>(first(seen - k));
                const __m512 p = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(_mm512_load_ps(at + k), top)));
                _mm512_store_ps(at + k, p);
                sum = _mm512_add_ps(sum, p);
            }
            total[r] = _mm512_reduce_add_ps(sum);
        }
        for (int c = 0; c < width; c += 64) {
            __m512 acc[ROWS][4];
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) acc[r][j] = _mm512_setzero_ps();
            const float* value = values + c;
            for (int k = 0; k < keys; k++, value += columns * 64) {
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
            alignas(64) float out[ROWS][64];
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) _mm512_store_ps(out[r] + 16 * j, acc[r][j]);
            for (int r = 0; r < count; r++) {
                const __m512 unit_of_result = _mm512_set1_ps(static_cast<float>(a.result / total[r]));
                __m512i v[4];
                for (int j = 0; j < 4; j++) {
                    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(out[r] + 16 * j), unit_of_result));
                    v[j] = _mm512_add_epi32(q, _mm512_set1_epi32(s.zero_point[1]));
                }
                const __m512i bytes = clamp(pack(v), _mm512_set1_epi8(static_cast<char>(s.out.low)),
                                            _mm512_set1_epi8(static_cast<char>(s.out.high)));
                store(s.y.at(i, h, row + r) + c, bytes, width - c);
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
            const __m512 p = _mm512_maskz_mov_ps(mask, exponential(real));
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
