// Convolutions and linear layers: for each point of a window, bytes times weights into sums of 32 bits (vpdpbusd), a few
// pixels by up to 64 channels at a time. Pixels are found through pointers, so padding, stride and dilation cost nothing: a
// pointer that would leave the image shows a pixel of zero points.
#pragma once
#include <algorithm>
#include <cstring>

#include "vectors.h"

namespace fxquant {

constexpr int MOST_PIXELS = 8;

struct Point {
    int32_t i, y, x;
};

// The pixel of the result after point p.
inline void advance(Point& p, const Tensor& y) {
    if (++p.x == y.w) {
        p.x = 0;
        if (++p.y == y.h) p.y = 0, p.i++;
    }
}

inline Point point_of(int64_t index, const Tensor& y) {
    const int64_t line = index / y.w;
    return {static_cast<int32_t>(line / y.h), static_cast<int32_t>(line % y.h), static_cast<int32_t>(index % y.w)};
}

// Where each point of the window lies for one pixel of the result: rows[point * step].
inline void find_rows(const Step& s, const Point& p, int points_across, const uint8_t** rows, int step) {
    const Window& w = s.window;
    const int y0 = p.y * w.stride[0] - w.padding[0], x0 = p.x * w.stride[1] - w.padding[1];
    const int down = s.taps / points_across;
    const uint8_t* start = s.x.data + p.i * s.x.image + y0 * s.x.row + x0 * s.x.pixel;
    const int64_t line = w.dilation[0] * s.x.row, across = w.dilation[1] * s.x.pixel;
    const bool inside = y0 >= 0 && x0 >= 0 && y0 + (down - 1) * w.dilation[0] < s.x.h &&
                        x0 + (points_across - 1) * w.dilation[1] < s.x.w;
    for (int ky = 0; ky < down; ky++) {
        const uint8_t* at = start + ky * line;
        const int y = y0 + ky * w.dilation[0];
        for (int kx = 0; kx < points_across; kx++, at += across, rows += step) {
            const int x = x0 + kx * w.dilation[1];
            *rows = inside || (y >= 0 && y < s.x.h && x >= 0 && x < s.x.w) ? at : s.border;
        }
    }
}

// sums[pixel][16 * BLOCKS] of PIXELS pixels; rows[point][pixel], quads of 4 channels a point.
template <int PIXELS, int BLOCKS>
void multiply(const uint8_t* const* rows, int64_t offset, int points, int quads, const int8_t* weight, const int32_t* bias,
              int32_t* sums) {
    __m512i acc[PIXELS][BLOCKS];
#pragma GCC unroll 8
    for (int j = 0; j < BLOCKS; j++) {
        const __m512i b = _mm512_loadu_si512(bias + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) acc[i][j] = b;
    }
    for (int t = 0; t < points; t++, rows += PIXELS) {
        const uint8_t* at[PIXELS];
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) at[i] = rows[i] + offset;
        for (int64_t k = 0; k < quads; k++, weight += 64 * BLOCKS) {
            __m512i w[BLOCKS];
#pragma GCC unroll 8
            for (int j = 0; j < BLOCKS; j++) w[j] = _mm512_loadu_si512(weight + 64 * j);
#pragma GCC unroll 8
            for (int i = 0; i < PIXELS; i++) {
                int32_t four;
                std::memcpy(&four, at[i] + 4 * k, 4);
                const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 8
                for (int j = 0; j < BLOCKS; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], x, w[j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < BLOCKS; j++) _mm512_store_si512(sums + 64 * i + 16 * j, acc[i][j]);
    }
}

using Multiply = void (*)(const uint8_t* const*, int64_t, int, int, const int8_t*, const int32_t*, int32_t*);

// By blocks and pixels; the accumulators stay in registers.
constexpr int PIXELS_FOR[5] = {0, 8, 8, 8, 6};
static const Multiply KERNELS[5][MOST_PIXELS + 1] = {
    {},
    {nullptr, multiply<1, 1>, multiply<2, 1>, multiply<3, 1>, multiply<4, 1>, multiply<5, 1>, multiply<6, 1>,
     multiply<7, 1>, multiply<8, 1>},
    {nullptr, multiply<1, 2>, multiply<2, 2>, multiply<3, 2>, multiply<4, 2>, multiply<5, 2>, multiply<6, 2>,
     multiply<7, 2>, multiply<8, 2>},
    {nullptr, multiply<1, 3>, multiply<2, 3>, multiply<3, 3>, multiply<4, 3>, multiply<5, 3>, multiply<6, 3>,
     multiply<7, 3>, multiply<8, 3>},
    {nullptr, multiply<1, 4>, multiply<2, 4>, multiply<3, 4>, multiply<4, 4>, multiply<5, 4>, multiply<6, 4>},
};

// Sums leave as floats: float(double(sum) * scale), clamped.
inline void leave_as_floats(const Step& s, const int32_t* sums, int channel, int channels, uint8_t* y) {
    const double* scale = static_cast<const double*>(s.numbers) + channel;
    const __m256 low = _mm256_set1_ps(static_cast<float>(s.scale[0])), high = _mm256_set1_ps(static_cast<float>(s.scale[1]));
    float* out = reinterpret_cast<float*>(y) + channel;
    for (int c = 0; c < channels; c += 8) {
        const __mmask8 mask = channels - c >= 8 ? 0xFF : (1u << (channels - c)) - 1;
        const __m512d sum = _mm512_cvtepi32_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + c)));
        const __m256 real = _mm512_cvtpd_ps(_mm512_mul_pd(sum, _mm512_maskz_loadu_pd(mask, scale + c)));
        _mm256_mask_storeu_ps(out + c, mask, _mm256_min_ps(_mm256_max_ps(real, low), high));
    }
}

// One unit: some pixels of the result by one bundle of up to four blocks of 16 channels. Bundles are as even as they can be.
inline void convolution(const Step& s, int unit, const Finish& finish) {
    const int64_t pixels = static_cast<int64_t>(s.y.n) * s.y.h * s.y.w;
    const int chunks = static_cast<int>((pixels + s.chunk - 1) / s.chunk);
    const int bundles = (s.blocks + 3) / 4, columns = bundles * s.groups;
    const int column = s.outer ? unit / chunks : unit % columns, chunk = s.outer ? unit % chunks : unit / columns;
    const int group = column / bundles, bundle = column % bundles;
    const int from = s.blocks * bundle / bundles, blocks = s.blocks * (bundle + 1) / bundles - from;
    const int per_group = s.y.c / s.groups, quads = (s.depth + 3) / 4;
    const int inside = 16 * from, channel = group * per_group + inside;
    const int channels = std::min(16 * blocks, per_group - inside);
    const int block = group * s.blocks + from;
    const int8_t* weight = s.weight + static_cast<int64_t>(block) * s.taps * quads * 64;
    const int64_t offset = static_cast<int64_t>(group) * (s.flags & GROUPED ? s.depth : 0);
    const int32_t* bias = s.bias + 16 * block;
    const int64_t* constants = s.out.constants + 48 * static_cast<int64_t>(block);
    const __mmask64 mask = first(channels);

    int64_t index = static_cast<int64_t>(chunk) * s.chunk;
    const int64_t end = std::min(index + s.chunk, pixels);
    const int most = PIXELS_FOR[blocks], across = s.window.kernel[1];
    int tiles = static_cast<int>((end - index + most - 1) / most);
    Point p = point_of(index, s.y);
    alignas(64) int32_t sums[MOST_PIXELS * 64];
    const uint8_t** rows = static_cast<const uint8_t**>(alloca(sizeof(void*) * s.taps * MOST_PIXELS));
    for (; tiles > 0; tiles--) {
        const int count = static_cast<int>((end - index + tiles - 1) / tiles);
        uint8_t* to[MOST_PIXELS];
        const uint8_t* other[MOST_PIXELS];
        for (int i = 0; i < count; i++) {
            find_rows(s, p, across, rows + i, count);
            to[i] = s.y.at(p.i, p.y, p.x);
            other[i] = s.flags & ADDS ? s.z.at(p.i, p.y, p.x) + channel : nullptr;
            advance(p, s.y);
        }
        KERNELS[blocks][count](rows, offset, s.taps, quads, weight, bias, sums);
        if (s.flags & TO_FLOAT) {
            for (int i = 0; i < count; i++) leave_as_floats(s, sums + 64 * i, channel, channels, to[i]);
        } else {
            for (int j = 0; j < blocks; j++) {
                const Multiplier multiplier(constants + 48 * j);
                for (int i = 0; i < count; i++) {
                    int32_t* at = sums + 64 * i + 16 * j;
                    _mm512_store_si512(at, multiplier(_mm512_load_si512(at)));
                }
            }
            for (int i = 0; i < count; i++) {
                __m512i v[4];
                for (int j = 0; j < 4; j++) v[j] = _mm512_load_si512(sums + 64 * i + 16 * j);
                _mm512_mask_storeu_epi8(to[i] + channel, mask, finish(pack(v), other[i], mask));
            }
        }
        index += count;
    }
}

// One filter a channel: the bytes of four points of the window are woven, so that a vpdpbusd sums over the four.
// weight[channel block of 64][four points][4][16][4], everything in woven order.
inline void depthwise(const Step& s, int unit, const Finish& finish) {
    const int64_t pixels = static_cast<int64_t>(s.y.n) * s.y.h * s.y.w;
    int64_t index = static_cast<int64_t>(unit) * s.chunk;
    const int64_t end = std::min(index + s.chunk, pixels);
    const int fours = (s.taps + 3) / 4, across = s.window.kernel[1];
    Point p = point_of(index, s.y);
    const uint8_t** rows = static_cast<const uint8_t**>(alloca(sizeof(void*) * fours * 4));
    for (int t = s.taps; t < fours * 4; t++) rows[t] = s.border;
    for (; index < end; index++) {
        find_rows(s, p, across, rows, 1);
        uint8_t* to = s.y.at(p.i, p.y, p.x);
        const uint8_t* other = s.flags & ADDS ? s.z.at(p.i, p.y, p.x) : nullptr;
        for (int c = 0; c < s.y.c; c += 64) {
            const __mmask64 mask = first(s.y.c - c);
            __m512i acc[4];
            for (int j = 0; j < 4; j++) acc[j] = _mm512_loadu_si512(s.bias + c + 16 * j);
            const int8_t* weight = s.weight + static_cast<int64_t>(c) * fours * 4;
            for (int t = 0; t < fours; t++, weight += 256) {
                const __m512i x0 = _mm512_loadu_si512(rows[4 * t] + c), x1 = _mm512_loadu_si512(rows[4 * t + 1] + c);
                const __m512i x2 = _mm512_loadu_si512(rows[4 * t + 2] + c), x3 = _mm512_loadu_si512(rows[4 * t + 3] + c);
                const __m512i low01 = _mm512_unpacklo_epi8(x0, x1), high01 = _mm512_unpackhi_epi8(x0, x1);
                const __m512i low23 = _mm512_unpacklo_epi8(x2, x3), high23 = _mm512_unpackhi_epi8(x2, x3);
                const __m512i x[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                                      _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
                for (int j = 0; j < 4; j++)
                    acc[j] = _mm512_dpbusd_epi32(acc[j], x[j], _mm512_loadu_si512(weight + 64 * j));
            }
            const int64_t* constants = s.out.constants + 3 * static_cast<int64_t>(c);
            for (int j = 0; j < 4; j++) acc[j] = Multiplier(constants + 48 * j)(acc[j]);
            _mm512_mask_storeu_epi8(to + c, mask, finish(pack_woven(acc), other + c, mask));
        }
        advance(p, s.y);
    }
}

}  // namespace fxquant
