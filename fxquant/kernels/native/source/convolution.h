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

// The pixels of a zone, one after the other: where their windows begin, and where they go.
struct Walker {
    const Step& s;
    const Zone& zone;
    Point p;
    int y0, x0;
    const uint8_t* start;
    uint8_t* to;           // the pixel of the result
    const uint8_t* other;  // and what is added to it

    Walker(const Step& s, const Zone& zone, int64_t index) : s(s), zone(zone) {
        const int64_t line = index / zone.w;
        p = {zone.i + static_cast<int32_t>(line / zone.h), zone.y + static_cast<int32_t>(line % zone.h),
             zone.x + static_cast<int32_t>(index % zone.w)};
        find_start();
    }
    void find_start() {
        y0 = p.y * s.window.stride[0] - s.window.padding[0], x0 = p.x * s.window.stride[1] - s.window.padding[1];
        start = s.x.data + p.i * s.x.image + y0 * s.x.row + x0 * s.x.pixel;
        to = s.y.at(p.i, p.y, p.x), other = s.z.at(p.i, p.y, p.x);
    }
    void next() {
        if (++p.x < zone.x + zone.w) {
            x0 += s.window.stride[1], start += s.window.stride[1] * s.x.pixel, to += s.y.pixel, other += s.z.pixel;
            return;
        }
        p.x = zone.x;
        if (++p.y == zone.y + zone.h) p.y = zone.y, p.i++;
        find_start();
    }
};

// What a tile needs besides its numbers of pixels and blocks.
struct Tile {
    const uint8_t** rows;  // [point][MOST_PIXELS]
    const int32_t* point;  // its number in the weights
    int64_t offset;        // of the group's channels in a pixel
    int points, quads;     // points of the window, fours of channels in each
    const int8_t* weight;
    const int32_t* bias;
    int64_t block;  // the first one's number
    const Finish* finish;
    uint8_t* to[MOST_PIXELS];
    const uint8_t* other[MOST_PIXELS];
    int channels;
};

// sums[pixel][64] of PIXELS pixels by BLOCKS blocks; the accumulators stay in registers.
template <int PIXELS, int BLOCKS>
void accumulate(const Tile& tile, int32_t* sums) {
    __m512i acc[PIXELS][BLOCKS];
#pragma GCC unroll 8
    for (int j = 0; j < BLOCKS; j++) {
        const __m512i b = _mm512_loadu_si512(tile.bias + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) acc[i][j] = b;
    }
    const uint8_t* const* rows = tile.rows;
    const int64_t quads = tile.quads, offset = tile.offset;
    for (int t = 0; t < tile.points; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight + tile.point[t] * quads * (64 * BLOCKS);
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

using Accumulate = void (*)(const Tile&, int32_t*);
constexpr int PIXELS_FOR[5] = {0, 8, 8, 8, 6};
static const Accumulate ACCUMULATE[5][MOST_PIXELS + 1] = {
    {},
    {nullptr, accumulate<1, 1>, accumulate<2, 1>, accumulate<3, 1>, accumulate<4, 1>, accumulate<5, 1>,
     accumulate<6, 1>, accumulate<7, 1>, accumulate<8, 1>},
    {nullptr, accumulate<1, 2>, accumulate<2, 2>, accumulate<3, 2>, accumulate<4, 2>, accumulate<5, 2>,
     accumulate<6, 2>, accumulate<7, 2>, accumulate<8, 2>},
    {nullptr, accumulate<1, 3>, accumulate<2, 3>, accumulate<3, 3>, accumulate<4, 3>, accumulate<5, 3>,
     accumulate<6, 3>, accumulate<7, 3>, accumulate<8, 3>},
    {nullptr, accumulate<1, 4>, accumulate<2, 4>, accumulate<3, 4>, accumulate<4, 4>, accumulate<5, 4>, accumulate<6, 4>},
};

// From sums to the bytes of a tile.
template <int BLOCKS, Rule RULE>
void to_bytes(const Step& s, const Tile& tile, int count, const int32_t* sums) {
    const Rescaling<RULE> rescaling(s, tile.block);
    const Finish& finish = *tile.finish;
    for (int i = 0; i < count; i++, sums += 64) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) v[j] = j < BLOCKS ? rescaling(_mm512_load_si512(sums + 16 * j), j) : v[0];
        store(tile.to[i], finish(rescaling.bytes(v), tile.other[i]), tile.channels);
    }
}

using ToBytes = void (*)(const Step&, const Tile&, int, const int32_t*);
static const ToBytes TO_BYTES[3][5] = {
    {nullptr, to_bytes<1, FLOAT32>, to_bytes<2, FLOAT32>, to_bytes<3, FLOAT32>, to_bytes<4, FLOAT32>},
    {nullptr, to_bytes<1, FLOAT64>, to_bytes<2, FLOAT64>, to_bytes<3, FLOAT64>, to_bytes<4, FLOAT64>},
    {nullptr, to_bytes<1, INTEGERS>, to_bytes<2, INTEGERS>, to_bytes<3, INTEGERS>, to_bytes<4, INTEGERS>},
};

// The same with sums that are never stored, for tiles of at most 16 of them: more leave the compiler too few registers. Short
// sums gain, since storing and reading them again would take as long as adding them up.
template <int PIXELS, int BLOCKS>
void at_once(const Step& s, const Tile& tile) {
    __m512i acc[PIXELS][BLOCKS];
#pragma GCC unroll 4
    for (int j = 0; j < BLOCKS; j++) {
        const __m512i b = _mm512_loadu_si512(tile.bias + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) acc[i][j] = b;
    }
    const uint8_t* const* rows = tile.rows;
    for (int t = 0; t < tile.points; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight + static_cast<int64_t>(tile.point[t]) * tile.quads * (64 * BLOCKS);
        for (int64_t k = 0; k < tile.quads; k++, weight += 64 * BLOCKS) {
            __m512i w[BLOCKS];
#pragma GCC unroll 4
            for (int j = 0; j < BLOCKS; j++) w[j] = _mm512_loadu_si512(weight + 64 * j);
#pragma GCC unroll 8
            for (int i = 0; i < PIXELS; i++) {
                int32_t four;
                std::memcpy(&four, rows[i] + tile.offset + 4 * k, 4);
                const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int j = 0; j < BLOCKS; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], x, w[j]);
            }
        }
    }
    const Rescaling<FLOAT32> rescaling(s, tile.block);
    const Finish& finish = *tile.finish;
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) v[j] = j < BLOCKS ? rescaling(acc[i][j < BLOCKS ? j : 0], j) : v[0];
        store(tile.to[i], finish(rescaling.bytes(v), tile.other[i]), tile.channels);
    }
}

using AtOnce = void (*)(const Step&, const Tile&);
constexpr int PIXELS_AT_ONCE[5] = {0, 8, 8, 4, 4}, QUADS_AT_ONCE[5] = {0, 1 << 30, 1 << 30, 12, 12};
static const AtOnce AT_ONCE[5][MOST_PIXELS + 1] = {
    {},
    {nullptr, at_once<1, 1>, at_once<2, 1>, at_once<3, 1>, at_once<4, 1>, at_once<5, 1>, at_once<6, 1>, at_once<7, 1>,
     at_once<8, 1>},
    {nullptr, at_once<1, 2>, at_once<2, 2>, at_once<3, 2>, at_once<4, 2>, at_once<5, 2>, at_once<6, 2>, at_once<7, 2>,
     at_once<8, 2>},
    {nullptr, at_once<1, 3>, at_once<2, 3>, at_once<3, 3>, at_once<4, 3>},
    {nullptr, at_once<1, 4>, at_once<2, 4>, at_once<3, 4>, at_once<4, 4>},
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

// The next pixels: their points of the window, eight pixels at a time, and where they go.
inline void take(Walker& walker, int count, int own, int channel, Tile& tile) {
    const Step& s = walker.s;
    const Window& w = s.window;
    alignas(64) int64_t start[MOST_PIXELS], y0[MOST_PIXELS], x0[MOST_PIXELS];
    for (int i = 0; i < count; i++, walker.next()) {
        start[i] = reinterpret_cast<int64_t>(walker.start), y0[i] = walker.y0, x0[i] = walker.x0;
        tile.to[i] = walker.to + own, tile.other[i] = walker.other + channel;
    }
    const __m512i from = _mm512_load_si512(start), ys = _mm512_load_si512(y0), xs = _mm512_load_si512(x0);
    const __m512i border = _mm512_set1_epi64(reinterpret_cast<int64_t>(s.border));
    const __m512i lines = _mm512_set1_epi64(s.x.h), columns = _mm512_set1_epi64(s.x.w);
    for (int t = 0; t < tile.points; t++) {
        const int down = tile.point[t] / w.kernel[1] * w.dilation[0], right = tile.point[t] % w.kernel[1] * w.dilation[1];
        __m512i row = _mm512_add_epi64(from, _mm512_set1_epi64(down * s.x.row + right * s.x.pixel));
        if (!walker.zone.inside) {
            const __mmask8 there = _mm512_cmplt_epu64_mask(_mm512_add_epi64(ys, _mm512_set1_epi64(down)), lines) &
                                   _mm512_cmplt_epu64_mask(_mm512_add_epi64(xs, _mm512_set1_epi64(right)), columns);
            row = _mm512_mask_mov_epi64(border, there, row);
        }
        _mm512_storeu_si512(tile.rows + MOST_PIXELS * t, row);
    }
}

// The tile's blocks for some pixels of a zone.
inline void convolve_zone(const Step& s, const Zone& zone, int64_t index, int64_t end, int blocks, int channel, Tile& tile) {
    const bool to_float = s.flags & TO_FLOAT, linear = s.flags & LINEAR;
    tile.points = zone.points, tile.point = zone.point, tile.bias = zone.bias + 16 * tile.block;
    const bool at_once = !(s.flags & (TO_FLOAT | TIES | IN_FLOAT64)) && tile.points * tile.quads <= QUADS_AT_ONCE[blocks];
    const int most = at_once ? PIXELS_AT_ONCE[blocks] : PIXELS_FOR[blocks];
    const int own = to_float ? 0 : channel;
    Walker walker(s, zone, index);
    alignas(64) int32_t sums[MOST_PIXELS * 64];
    for (int tiles = static_cast<int>((end - index + most - 1) / most); tiles > 0; tiles--) {
        const int count = static_cast<int>((end - index + tiles - 1) / tiles);
        if (linear) {
            for (int i = 0; i < count; i++) {
                tile.rows[i] = s.x.data + (index + i) * s.x.pixel;
                tile.to[i] = s.y.data + (index + i) * s.y.pixel + own;
                tile.other[i] = s.z.data + (index + i) * s.z.pixel + channel;
            }
        } else {
            take(walker, count, own, channel, tile);
        }
        index += count;
        if (at_once) {
            AT_ONCE[blocks][count](s, tile);
            continue;
        }
        ACCUMULATE[blocks][count](tile, sums);
        if (to_float) {
            for (int i = 0; i < count; i++) leave_as_floats(s, sums + 64 * i, channel, tile.channels, tile.to[i]);
        } else {
            TO_BYTES[rule_of(s)][blocks](s, tile, count, sums);
        }
    }
}

// Some pixels of the result by one bundle of up to four blocks of 16 channels.
inline void convolve(const Step& s, int column, int64_t index, int64_t end, const Finish& finish) {
    const int bundles = (s.blocks + 3) / 4;
    const int group = column / bundles, bundle = column % bundles;
    const int from = 4 * bundle, blocks = std::min(4, s.blocks - from);
    const int per_group = s.y.c / s.groups, inside = 16 * from, channel = group * per_group + inside;

    Tile tile;
    tile.rows = static_cast<const uint8_t**>(alloca(sizeof(void*) * s.taps * MOST_PIXELS));
    tile.offset = s.flags & GROUPED ? static_cast<int64_t>(group) * s.depth : 0;
    tile.quads = (s.depth + 3) / 4;
    tile.block = group * s.blocks + from;
    tile.weight = s.weight + tile.block * s.taps * tile.quads * 64;
    tile.finish = &finish;
    tile.channels = std::min(16 * blocks, per_group - inside);
    for (int k = 0; k < s.zone_count && end > 0; k++) {
        const Zone& zone = s.zones[k];
        const int64_t pixels = static_cast<int64_t>(zone.n) * zone.h * zone.w;
        if (index < pixels)
            convolve_zone(s, zone, std::max<int64_t>(index, 0), std::min(end, pixels), blocks, channel, tile);
        index -= pixels, end -= pixels;
    }
}

// A unit: some pixels by all channels where the weights stay in cache, else by one bundle, whose pixels are next. Threads that
// wrote neighbouring channels of one pixel would take the cache line from each other.
inline void convolution(const Step& s, int unit, const Finish& finish) {
    const int64_t pixels = static_cast<int64_t>(s.y.n) * s.y.h * s.y.w;
    const int columns = (s.blocks + 3) / 4 * s.groups;
    if (s.outer) {
        const int chunks = s.units / columns, chunk = unit % chunks;
        return convolve(s, unit / chunks, pixels * chunk / chunks, pixels * (chunk + 1) / chunks, finish);
    }
    const int64_t from = pixels * unit / s.units, end = pixels * (unit + 1) / s.units;
    for (int column = 0; column < columns; column++) convolve(s, column, from, end, finish);
}

}  // namespace fxquant
