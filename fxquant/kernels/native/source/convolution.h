// Convolutions and linear layers, a tile at a time. Pixels are found through pointers, so padding, stride and dilation cost
// nothing: a pointer that would leave the image shows a pixel of zero points.
#pragma once
#include "tiles.h"

namespace fxquant {

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

// Sums leave as floats: float(double(sum) * scale), clamped.
inline void leave_as_floats(const Step& s, const int32_t* sums, int channel, int channels, uint8_t* y) {
    const double* scale = static_cast<const double*>(s.numbers) + channel;
    const Floats low = each(static_cast<float>(s.scale[0])), high = each(static_cast<float>(s.scale[1]));
    float* out = reinterpret_cast<float*>(y) + channel;
    for (int c = 0; c < channels; c += 16) {
        const Vector sum = load(sums + c);
        const Doubles a = low_doubles(sum) * load_doubles_first(scale + c, channels - c);
        const Doubles b = high_doubles(sum) * load_doubles_first(scale + c + 8, channels - c - 8);
        store_floats_first(out + c, smaller(greater(singles(a, b), low), high), channels - c);
    }
}

// What becomes of a tile's sums[pixel][64] of some pixels: bytes, or floats.
inline void finish_sums(const Step& s, const Tile& tile, const Results& results, int count, int blocks, int channel, const int32_t* sums) {
    if (s.flags & TO_FLOAT) {
        for (int i = 0; i < count; i++) leave_as_floats(s, sums + 64 * i, channel, tile.channels, results.to[i]);
    } else {
        TO_BYTES[rule_of(s)][blocks](s, tile, results, count, sums);
    }
}

// How far a tap of a window is from where the window begins: in bytes, and in lines and columns.
struct Offset {
    int64_t bytes, down, right;
};

// Where the pixels of a region find their windows, and where they go: eight at a time, in vectors from beginning to end. (What is
// stored number by number and read back as a vector waits for all stores before it.) Numbers are float64, whole and below
// 2^53; (index + 1/2) / width is too far from whole numbers to be rounded across one.
struct Pixels {
    const Step& s;
    const PaddingRegion& region;
    const Tensor& z;  // what is added, or the result
    Offset* offsets;  // of each tap
    int64_t channel;  // in the result

    Pixels(const Step& s, const PaddingRegion& region, Offset* offsets, int channel)
        : s(s), region(region), z(s.flags & ADDS ? s.z : s.y), offsets(offsets), channel(s.flags & TO_FLOAT ? 0 : channel) {
        const Window& w = s.window;
        for (int t = 0; t < region.taps && !(s.flags & LINEAR); t++) {
            const int down = region.tap[t] / w.kernel[1] * w.dilation[0], right = region.tap[t] % w.kernel[1] * w.dilation[1];
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
    static Doubles all(double x) { return each(x); }
    static Vector at(const uint8_t* data, const Tensor& t, Doubles i, Doubles y, Doubles x) {
        const Doubles line = exact(y, all(t.row), i * all(t.image));
        return add64(each64(reinterpret_cast<int64_t>(data)), to_int64(exact(x, all(t.pixel), line)));
    }
    void find_windows(int64_t first, Tile& tile, Results& results) const {
        const Doubles half = all(0.5), index = all(first) + counted();
        const Doubles lines = floor_of((index + half) * all(1.0 / region.w));
        const Doubles images = floor_of((lines + half) * all(1.0 / region.h));
        const Doubles x = exact(lines, all(-region.w), index) + all(region.x);
        const Doubles y = exact(images, all(-region.h), lines) + all(region.y);
        const Doubles i = images + all(region.i);
        store(results.to, at(s.y.data + channel, s.y, i, y, x));
        store(results.other, at(z.data + channel, z, i, y, x));
        const Window& w = s.window;
        const Doubles y0 = exact(y, all(w.stride[0]), all(-w.padding[0]));
        const Doubles x0 = exact(x, all(w.stride[1]), all(-w.padding[1]));
        const Vector start = at(s.x.data, s.x, i, y0, x0);
        for (int t = 0; t < region.taps; t++) {
            Vector row = add64(start, each64(offsets[t].bytes));
            if (!region.inside) row = or_border(row, to_int64(y0), to_int64(x0), offsets[t]);
            store(tile.rows + MOST_PIXELS * t, row);
        }
    }
    Vector or_border(Vector row, Vector y0, Vector x0, const Offset& offset) const {
        const Vector y = add64(y0, each64(offset.down)), x = add64(x0, each64(offset.right));
        return where_below(y, s.x.h, x, s.x.w, row, each64(reinterpret_cast<int64_t>(s.border)));
    }
};

// Fours of pixels, each finished while the next one's sums are added up; returns the first pixel that is left. Long sums
// gain less than tiles of six pixels do, which read weights less often.
template <Rule RULE>
int64_t in_turns(const Step& s, const Pixels& pixels, int64_t index, int64_t end, Tile& tile) {
    alignas(64) int32_t sums[2][4 * 64];
    Results results[2];
    int now = 0;
    pixels.find(index, 4, tile, results[now]);
    accumulate_all(tile, 4, 4, sums[now]);
    for (index += 4; index + 4 <= end; index += 4) {
        const int before = now;
        now = 1 - now;
        pixels.find(index, 4, tile, results[now]);
        accumulate_and_finish<RULE>(s, tile, sums[now], results[before], sums[before]);
    }
    to_bytes<4, RULE>(s, tile, results[now], 4, sums[now]);
    return index;
}

// The tile's blocks for some pixels of a region.
inline void convolve_region(const Step& s, const PaddingRegion& region, int64_t index, int64_t end, int blocks, int channel, Offset* offsets,
                          Tile& tile) {
    tile.taps = region.taps, tile.tap = region.tap, tile.bias = region.bias + 16 * tile.block;
    const int64_t fours = static_cast<int64_t>(tile.taps) * tile.fours;
    const Rule rule = rule_of(s);
    const bool to_float = s.flags & TO_FLOAT;
    if (NARROWS && rule == FLOAT32 && !to_float)
        tile.numbers = static_cast<const float*>(s.out.constants) + 16 * tile.block, tile.magic = static_cast<float>(s.out.magic);
    const bool at_once = BLOCKS_TOGETHER == 4 && !to_float && rule == FLOAT32 && fours <= FOURS_AT_ONCE[blocks];
    const int most = at_once ? PIXELS_AT_ONCE[blocks] : PIXELS_FOR[std::min(blocks, BLOCKS_TOGETHER)];
    const Pixels pixels(s, region, offsets, channel);
    if constexpr (FOURS_IN_TURNS > 0) {
        const bool fits = tile.channels == 64 && tile.fours >= (tile.taps < 4 ? 16 : 4) && !to_float && rule != INTEGERS;
        if (fits && fours <= FOURS_IN_TURNS && end - index >= 8)
            index = (rule == FLOAT32 ? in_turns<FLOAT32> : in_turns<FLOAT64>)(s, pixels, index, end, tile);
    }
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
        accumulate_all(tile, blocks, count, sums);
        finish_sums(s, tile, results, count, blocks, channel, sums);
    }
}

// Some pixels of the result by one tile of up to four blocks of 16 channels.
inline void convolve(const Step& s, int column, int64_t index, int64_t end, const Finish& finish) {
    const int nr_tiles = (s.blocks + 3) / 4;
    const int group = column / nr_tiles, nr_tile = column % nr_tiles;
    const int from = 4 * nr_tile, blocks = std::min(4, s.blocks - from);
    const int per_group = s.y.c / s.groups, inside = 16 * from, channel = group * per_group + inside;

    Tile tile;
    tile.rows = static_cast<const uint8_t**>(alloca(sizeof(void*) * s.taps * MOST_PIXELS));
    Offset* offsets = static_cast<Offset*>(alloca(sizeof(Offset) * s.taps));
    tile.offset = s.flags & GROUPED ? static_cast<int64_t>(group) * s.depth : 0;
    tile.fours = s.half_first ? (s.depth + 3) / 4 : fours_of(s.depth);
    tile.between = static_cast<int64_t>(s.taps) * tile.fours * 64;
    tile.block = group * s.blocks + from;
    tile.weight = s.weight + tile.block * tile.between;
    tile.halves = s.halves, tile.half_four = s.half_four, tile.window_taps = s.taps;
    tile.half_first = s.half_first ? s.half_first + tile.block * s.taps : nullptr;
    tile.finish = &finish;
    tile.channels = std::min(16 * blocks, per_group - inside);
    for (int k = 0; k < s.region_count && end > 0; k++) {
        const PaddingRegion& region = s.regions[k];
        const int64_t pixels = static_cast<int64_t>(region.n) * region.h * region.w;
        if (index < pixels)
            convolve_region(s, region, std::max<int64_t>(index, 0), std::min(end, pixels), blocks, channel, offsets, tile);
        index -= pixels, end -= pixels;
    }
}

// A unit: some pixels by all channels where the weights stay in cache, else by one tile, whose pixels are next. Threads that
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
