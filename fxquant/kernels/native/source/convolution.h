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

// Where some pixels of the result go, and what is added to them.
struct alignas(64) Results {
    uint8_t* to[MOST_PIXELS];
    const uint8_t* other[MOST_PIXELS];
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
    int channels;

    const int8_t* weight_of(int t, int blocks) const { return weight + static_cast<int64_t>(point[t]) * quads * (64 * blocks); }
};

// PIXELS by BLOCKS sums of 16 channels, which stay in registers.
template <int PIXELS, int BLOCKS>
struct Sums {
    __m512i acc[PIXELS][BLOCKS];

    explicit Sums(const int32_t* bias) {
#pragma GCC unroll 8
        for (int j = 0; j < BLOCKS; j++) {
            const __m512i b = _mm512_loadu_si512(bias + 16 * j);
#pragma GCC unroll 8
            for (int i = 0; i < PIXELS; i++) acc[i][j] = b;
        }
    }
    // Four bytes of each pixel, by the weights of all channels.
    void add(const uint8_t* const (&at)[PIXELS], int64_t quad, const int8_t* weight) {
        __m512i w[BLOCKS];
#pragma GCC unroll 8
        for (int j = 0; j < BLOCKS; j++) w[j] = _mm512_loadu_si512(weight + 64 * BLOCKS * quad + 64 * j);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) {
            int32_t four;
            std::memcpy(&four, at[i] + 4 * quad, 4);
            const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 8
            for (int j = 0; j < BLOCKS; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], x, w[j]);
        }
    }
    void store(int32_t* sums) const {
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) {
#pragma GCC unroll 8
            for (int j = 0; j < BLOCKS; j++) _mm512_store_si512(sums + 64 * i + 16 * j, acc[i][j]);
        }
    }
};

// The bytes of a pixel from its sums.
template <int BLOCKS, Rule RULE>
inline void finish_pixel(const Rescaling<RULE>& rescaling, const Tile& tile, const Results& results, int i, const __m512i* sums) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) v[j] = j < BLOCKS ? rescaling(_mm512_load_si512(sums + (j < BLOCKS ? j : 0)), j) : v[0];
    store(results.to[i], (*tile.finish)(rescaling.bytes(v), results.other[i]), tile.channels);
}

// A tile's sums[pixel][64].
template <int PIXELS, int BLOCKS>
void accumulate(const Tile& tile, int32_t* sums) {
    Sums<PIXELS, BLOCKS> acc(tile.bias);
    const uint8_t* const* rows = tile.rows;
    for (int t = 0; t < tile.points; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight_of(t, BLOCKS);
        const uint8_t* at[PIXELS];
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) at[i] = rows[i] + tile.offset;
        const int64_t quads = tile.quads;
        for (int64_t k = 0; k < quads; k++) acc.add(at, k, weight);
    }
    acc.store(sums);
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
void to_bytes(const Step& s, const Tile& tile, const Results& results, int count, const int32_t* sums) {
    const Rescaling<RULE> rescaling(s, tile.block);
    for (int i = 0; i < count; i++)
        finish_pixel<BLOCKS>(rescaling, tile, results, i, reinterpret_cast<const __m512i*>(sums + 64 * i));
}

using ToBytes = void (*)(const Step&, const Tile&, const Results&, int, const int32_t*);
static const ToBytes TO_BYTES[3][5] = {
    {nullptr, to_bytes<1, FLOAT32>, to_bytes<2, FLOAT32>, to_bytes<3, FLOAT32>, to_bytes<4, FLOAT32>},
    {nullptr, to_bytes<1, FLOAT64>, to_bytes<2, FLOAT64>, to_bytes<3, FLOAT64>, to_bytes<4, FLOAT64>},
    {nullptr, to_bytes<1, INTEGERS>, to_bytes<2, INTEGERS>, to_bytes<3, INTEGERS>, to_bytes<4, INTEGERS>},
};

// A tile of 4 pixels by 4 blocks that turns the sums of the one before into bytes while it adds up its own: rounding and
// products use different parts of a core. Tiles have 64 channels. A pixel is finished along with four fours of channels, one
// at a point where there are four points.
template <Rule RULE>
void accumulate_and_finish(const Step& s, const Tile& tile, int32_t* sums, const Results& before, const int32_t* sums_before) {
    const Rescaling<RULE> rescaling(s, tile.block);
    Sums<4, 4> acc(tile.bias);
    const uint8_t* const* rows = tile.rows;
    for (int t = 0, i = 0; t < tile.points; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight_of(t, 4);
        const uint8_t* const at[4] = {rows[0] + tile.offset, rows[1] + tile.offset, rows[2] + tile.offset, rows[3] + tile.offset};
        const int64_t quads = tile.quads;
        int64_t k = 0;
        for (const int until = tile.points < 4 ? 4 : std::min(t + 1, 4); i < until; i++) {
            __m512i v[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, k++) {
                acc.add(at, k, weight);
                v[j] = rescaling(_mm512_load_si512(sums_before + 64 * i + 16 * j), j);
            }
            _mm512_storeu_si512(before.to[i], (*tile.finish)(rescaling.bytes(v), before.other[i]));
        }
        for (; k < quads; k++) acc.add(at, k, weight);
    }
    acc.store(sums);
}

// The same with sums that are never stored, for tiles of at most 16 of them: more leave the compiler too few registers. Short
// sums gain, since storing and reading them again would take as long as adding them up.
template <int PIXELS, int BLOCKS>
void at_once(const Step& s, const Tile& tile, const Results& results) {
    Sums<PIXELS, BLOCKS> acc(tile.bias);
    const uint8_t* const* rows = tile.rows;
    for (int t = 0; t < tile.points; t++, rows += MOST_PIXELS) {
        const int8_t* weight = tile.weight_of(t, BLOCKS);
        const uint8_t* at[PIXELS];
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++) at[i] = rows[i] + tile.offset;
        for (int64_t k = 0; k < tile.quads; k++) acc.add(at, k, weight);
    }
    const Rescaling<FLOAT32> rescaling(s, tile.block);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) finish_pixel<BLOCKS>(rescaling, tile, results, i, acc.acc[i]);
}

using AtOnce = void (*)(const Step&, const Tile&, const Results&);
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

// How far a point of a window is from where the window begins: in bytes, and in lines and columns.
struct Offset {
    int64_t bytes, down, right;
};

// Where the pixels of a zone find their windows, and where they go: eight at a time, in vectors from beginning to end. (What is
// stored number by number and read back as a vector waits for all stores before it.) Numbers are float64, whole and below
// 2^53; (index + 1/2) / width is too far from whole numbers to be rounded across one.
struct Pixels {
    const Step& s;
    const Zone& zone;
    const Tensor& z;  // what is added, or the result
    Offset* offsets;  // of each point
    int64_t channel;  // in the result

    Pixels(const Step& s, const Zone& zone, Offset* offsets, int channel)
        : s(s), zone(zone), z(s.flags & ADDS ? s.z : s.y), offsets(offsets), channel(s.flags & TO_FLOAT ? 0 : channel) {
        const Window& w = s.window;
        for (int t = 0; t < zone.points && !(s.flags & LINEAR); t++) {
            const int down = zone.point[t] / w.kernel[1] * w.dilation[0], right = zone.point[t] % w.kernel[1] * w.dilation[1];
            offsets[t] = {down * s.x.row + right * s.x.pixel, down, right};
        }
    }
    void find(int64_t index, int count, Tile& tile, Results& results) const {
        if (!(s.flags & LINEAR)) return find_windows(index, tile, results);
        for (int i = 0; i < count; i++) {
            tile.rows[i] = s.x.data + (index + i) * s.x.pixel;
            results.to[i] = s.y.data + (index + i) * s.y.pixel + channel;
            results.other[i] = z.data + (index + i) * z.pixel + channel;
        }
    }

private:
    static __m512d all(double x) { return _mm512_set1_pd(x); }
    static __m512d floor_of(__m512d x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
    static __m512i at(const uint8_t* data, const Tensor& t, __m512d i, __m512d y, __m512d x) {
        const __m512d line = _mm512_fmadd_pd(y, all(t.row), _mm512_mul_pd(i, all(t.image)));
        const __m512i offset = _mm512_cvtpd_epi64(_mm512_fmadd_pd(x, all(t.pixel), line));
        return _mm512_add_epi64(_mm512_set1_epi64(reinterpret_cast<int64_t>(data)), offset);
    }
    void find_windows(int64_t first, Tile& tile, Results& results) const {
        const __m512d half = all(0.5), index = _mm512_add_pd(all(first), _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7));
        const __m512d lines = floor_of(_mm512_mul_pd(_mm512_add_pd(index, half), all(1.0 / zone.w)));
        const __m512d images = floor_of(_mm512_mul_pd(_mm512_add_pd(lines, half), all(1.0 / zone.h)));
        const __m512d x = _mm512_add_pd(_mm512_fnmadd_pd(lines, all(zone.w), index), all(zone.x));
        const __m512d y = _mm512_add_pd(_mm512_fnmadd_pd(images, all(zone.h), lines), all(zone.y));
        const __m512d i = _mm512_add_pd(images, all(zone.i));
        _mm512_store_si512(results.to, at(s.y.data + channel, s.y, i, y, x));
        _mm512_store_si512(results.other, at(z.data + channel, z, i, y, x));
        const Window& w = s.window;
        const __m512d y0 = _mm512_fmadd_pd(y, all(w.stride[0]), all(-w.padding[0]));
        const __m512d x0 = _mm512_fmadd_pd(x, all(w.stride[1]), all(-w.padding[1]));
        const __m512i start = at(s.x.data, s.x, i, y0, x0);
        for (int t = 0; t < zone.points; t++) {
            __m512i row = _mm512_add_epi64(start, _mm512_set1_epi64(offsets[t].bytes));
            if (!zone.inside) row = or_border(row, _mm512_cvtpd_epi64(y0), _mm512_cvtpd_epi64(x0), offsets[t]);
            _mm512_storeu_si512(tile.rows + MOST_PIXELS * t, row);
        }
    }
    __m512i or_border(__m512i row, __m512i y0, __m512i x0, const Offset& offset) const {
        const __m512i y = _mm512_add_epi64(y0, _mm512_set1_epi64(offset.down));
        const __m512i x = _mm512_add_epi64(x0, _mm512_set1_epi64(offset.right));
        const __mmask8 inside = _mm512_cmplt_epu64_mask(y, _mm512_set1_epi64(s.x.h)) &
                                _mm512_cmplt_epu64_mask(x, _mm512_set1_epi64(s.x.w));
        return _mm512_mask_mov_epi64(_mm512_set1_epi64(reinterpret_cast<int64_t>(s.border)), inside, row);
    }
};

// Fours of pixels, each finished while the next one's sums are added up; returns the first pixel that is left. Long sums
// gain less than tiles of six pixels do, which read weights less often.
constexpr int QUADS_IN_TURNS = 192;

template <Rule RULE>
int64_t in_turns(const Step& s, const Pixels& pixels, int64_t index, int64_t end, Tile& tile) {
    alignas(64) int32_t sums[2][4 * 64];
    Results results[2];
    int now = 0;
    pixels.find(index, 4, tile, results[now]);
    ACCUMULATE[4][4](tile, sums[now]);
    for (index += 4; index + 4 <= end; index += 4) {
        const int before = now;
        now = 1 - now;
        pixels.find(index, 4, tile, results[now]);
        accumulate_and_finish<RULE>(s, tile, sums[now], results[before], sums[before]);
    }
    to_bytes<4, RULE>(s, tile, results[now], 4, sums[now]);
    return index;
}

// The tile's blocks for some pixels of a zone.
inline void convolve_zone(const Step& s, const Zone& zone, int64_t index, int64_t end, int blocks, int channel, Offset* offsets,
                          Tile& tile) {
    tile.points = zone.points, tile.point = zone.point, tile.bias = zone.bias + 16 * tile.block;
    const int64_t quads = static_cast<int64_t>(tile.points) * tile.quads;
    const Rule rule = rule_of(s);
    const bool to_float = s.flags & TO_FLOAT, at_once = !to_float && rule == FLOAT32 && quads <= QUADS_AT_ONCE[blocks];
    const int most = at_once ? PIXELS_AT_ONCE[blocks] : PIXELS_FOR[blocks];
    const Pixels pixels(s, zone, offsets, channel);
    const bool fits = tile.channels == 64 && tile.quads >= (tile.points < 4 ? 16 : 4) && !to_float && rule != INTEGERS;
    if (fits && quads <= QUADS_IN_TURNS && end - index >= 8)
        index = (rule == FLOAT32 ? in_turns<FLOAT32> : in_turns<FLOAT64>)(s, pixels, index, end, tile);
    Results results;
    alignas(64) int32_t sums[MOST_PIXELS * 64];
    for (int tiles = static_cast<int>((end - index + most - 1) / most); tiles > 0; tiles--) {
        const int count = static_cast<int>((end - index + tiles - 1) / tiles);
        pixels.find(index, count, tile, results);
        index += count;
        if (at_once) {
            AT_ONCE[blocks][count](s, tile, results);
            continue;
        }
        ACCUMULATE[blocks][count](tile, sums);
        if (to_float) {
            for (int i = 0; i < count; i++) leave_as_floats(s, sums + 64 * i, channel, tile.channels, results.to[i]);
        } else {
            TO_BYTES[rule][blocks](s, tile, results, count, sums);
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
    Offset* offsets = static_cast<Offset*>(alloca(sizeof(Offset) * s.taps));
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
            convolve_zone(s, zone, std::max<int64_t>(index, 0), std::min(end, pixels), blocks, channel, offsets, tile);
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
