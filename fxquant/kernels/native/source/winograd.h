// Winograd's convolutions (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016) in whole numbers: windows of
// 3 x 3 with stride 1 give M x M pixels of the result at a time from N x N pixels, N = M + 2, with N^2 products instead of 9 M^2.
//
// All fractions are multiplied away. M = 2: the weights' transform is taken twice in each direction, sums are 4 y. M = 4: rows of
// the weights' transform are taken 24 times, the last one 12 times, which the result's transform makes up for; sums are 576 y.
// Words of 16 bits hold all transformed bytes (from -12750 to 17340) and weights (up to 144 * 128), and sums are right modulo 2^32:
// 2^32 has no factor 9, so 64 y modulo 2^32 is the sum times the inverse of 9, and y that shifted by 6, as long as
// -2^25 <= y < 2^25. Python has seen to that from the weights of each channel (fxquant/kernels/native/winograd.py).
//
// Memory: words[position][tile][channels, whole 32s] of transformed pixels, then sums[position][tile][64]; 64 bytes between two
// positions, lest all of them meet in one set of the cache. With outer, a step before transforms all pixels and a unit is some
// tiles by 64 channels; else a unit is some tiles by all channels, whose words stay in the thread's own cache.
#pragma once
#include "convolution.h"

namespace fxquant {

// Numbers of a vector, which wrap.
struct Words {
    Vector v;
};
inline Words operator+(Words a, Words b) { return {add16(a.v, b.v)}; }
inline Words operator-(Words a, Words b) { return {sub16(a.v, b.v)}; }
struct Longs {
    Vector v;
};
inline Longs operator+(Longs a, Longs b) { return {add32(a.v, b.v)}; }
inline Longs operator-(Longs a, Longs b) { return {sub32(a.v, b.v)}; }
template <class T>
inline T twice(T a) {
    return a + a;
}

// A line of pixels, transformed.
inline void transform_pixels(const Words (&d)[4], Words (&t)[4]) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
}
inline void transform_pixels(const Words (&d)[6], Words (&t)[6]) {
    const Words far = d[4] - d[2], near = twice(d[3] - d[1]);
    t[0] = twice(twice(d[0] - d[2])) + far;
    t[5] = d[5] - d[3] - twice(near);
    t[3] = far + near, t[4] = far - near;
    const Words even = d[4] - twice(twice(d[2])), odd = d[3] - twice(twice(d[1]));
    t[1] = even + odd, t[2] = even - odd;
}

// A line of the result from its sums.
inline void transform_sums(const Longs (&s)[4], Longs (&y)[2]) {
    y[0] = s[0] + s[1] + s[2], y[1] = s[1] - s[2] - s[3];
}
inline void transform_sums(const Longs (&s)[6], Longs (&y)[4]) {
    const Longs one = s[1] + s[2], two = s[1] - s[2], four = s[3] + s[4], eight = twice(s[3] - s[4]);
    y[0] = s[0] + one + four;
    y[1] = two + eight;
    y[2] = one + twice(twice(four));
    y[3] = two + twice(twice(eight)) + twice(s[5]);
}

// Sums of some tiles; while they are added up, two lines a step of what is read next come nearer.
template <int PIXELS, int BLOCKS>
void multiply_words(const uint8_t* words, int64_t row, int pairs, const int8_t* weight, const int8_t* next, int32_t* sums) {
    static const int32_t NOTHING[64] = {};
    Sums<PIXELS, BLOCKS> acc(NOTHING);
    const uint8_t* at[PIXELS];
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) at[i] = words + i * row;
    for (int64_t k = 0; k < pairs; k++) {
        __builtin_prefetch(next + 128 * k);
        __builtin_prefetch(next + 128 * k + 64);
        acc.template add<IN_WORDS>(at, k, weight);
    }
    acc.store(sums);
}

using MultiplyWords = void (*)(const uint8_t*, int64_t, int, const int8_t*, const int8_t*, int32_t*);
template <int PIXELS, int BLOCKS>
struct MultiplyingWords {
    static constexpr MultiplyWords function() {
        if constexpr (PIXELS > 0 && PIXELS <= PIXELS_FOR[BLOCKS]) return multiply_words<PIXELS, BLOCKS>;
        return nullptr;
    }
};
static constexpr auto MULTIPLY_WORDS = for_tiles<MultiplyWords, MultiplyingWords>();

template <int M>
struct Winograd {
    static constexpr int N = M + 2, POSITIONS = N * N;
    const Step& s;
    int down, across;  // tiles of an image
    int64_t tiles, row;

    explicit Winograd(const Step& s)
        : s(s), down((s.y.h + M - 1) / M), across((s.y.w + M - 1) / M), tiles(static_cast<int64_t>(s.y.n) * down * across),
          row((s.depth + 31) / 32 * 64) {}

    int64_t words_plane(int64_t count) const { return count * row + 64; }
    static int64_t sums_plane(int64_t count) { return count * 256 + 64; }

    // Where a tile's result begins.
    Point place(int64_t tile) const {
        const int64_t line = tile / across;
        return {static_cast<int32_t>(line / down), static_cast<int32_t>(line % down * M), static_cast<int32_t>(tile % across * M)};
    }

    // Words of the tiles from first on.
    void transform_input(int64_t first, int count, uint8_t* words, int64_t plane) const {
        for (int k = 0; k < count; k++, words += row) {
            const Point p = place(first + k);
            const uint8_t* at[N][N];
            const int y0 = p.y - s.window.padding[0], x0 = p.x - s.window.padding[1];
            const uint8_t* start = s.x.data + p.i * s.x.image + y0 * s.x.row + x0 * s.x.pixel;
            const bool inside = y0 >= 0 && y0 + N <= s.x.h && x0 >= 0 && x0 + N <= s.x.w;
#pragma GCC unroll 6
            for (int i = 0; i < N; i++) {
                const bool line = inside || (y0 + i >= 0 && y0 + i < s.x.h);
#pragma GCC unroll 6
                for (int j = 0; j < N; j++) {
                    const bool there = inside || (line && x0 + j >= 0 && x0 + j < s.x.w);
                    at[i][j] = there ? start + i * s.x.row + j * s.x.pixel : s.border;
                }
            }
            for (int c = 0; c < s.depth; c += 32) {
                Words lines[N][N];
#pragma GCC unroll 6
                for (int i = 0; i < N; i++) {
                    Words d[N];
#pragma GCC unroll 6
                    for (int j = 0; j < N; j++) d[j] = {widen_to_words(at[i][j] + c, 32)};
                    transform_pixels(d, lines[i]);
                }
#pragma GCC unroll 6
                for (int j = 0; j < N; j++) {
                    Words d[N], t[N];
#pragma GCC unroll 6
                    for (int i = 0; i < N; i++) d[i] = lines[i][j];
                    transform_pixels(d, t);
#pragma GCC unroll 6
                    for (int i = 0; i < N; i++) store(words + (i * N + j) * plane + 2 * c, t[i].v);
                }
            }
        }
    }

    // Sums of the tiles of some words by 64 channels.
    void multiply(const uint8_t* words, int64_t plane, int count, int block, int blocks, uint8_t* sums, int64_t sums_plane) const {
        const int pairs = (s.depth + 1) / 2;
        for (int position = 0; position < POSITIONS; position++, words += plane, sums += sums_plane) {
            for (int j = 0; j < blocks; j += BLOCKS_TOGETHER) {
                const int together = std::min(BLOCKS_TOGETHER, blocks - j);
                const int8_t* weight = s.weight + 64 * static_cast<int64_t>(pairs) * ((block + j) * POSITIONS + position * together);
                const int8_t* next = weight + 64 * static_cast<int64_t>(pairs) * together;
                const int most = PIXELS_FOR[together];
                for (int parts = (count + most - 1) / most, from = 0; parts > 0; parts--) {
                    const int pixels = (count - from + parts - 1) / parts;
                    int32_t* to = reinterpret_cast<int32_t*>(sums) + 64 * from + 16 * j;
                    MULTIPLY_WORDS[together][pixels](words + from * row, row, pairs, weight, next, to);
                    from += pixels, next += 128 * pairs;
                }
            }
        }
    }

    // 16 channels of a tile's result[M][M][64].
    static void transform_output(const uint8_t* sums, int64_t plane, const int32_t* bias, int32_t* result) {
        Longs columns[N][M];
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
            Longs d[N];
#pragma GCC unroll 6
            for (int j = 0; j < N; j++) d[j] = {load(sums + (i * N + j) * plane)};
            transform_sums(d, columns[i]);
        }
        const Vector b = load(bias), ninth = each32(0x38E38E39);  // 9 * 0x38E38E39 = 2^33 + 1
#pragma GCC unroll 4
        for (int j = 0; j < M; j++) {
            Longs d[N], y[M];
#pragma GCC unroll 6
            for (int i = 0; i < N; i++) d[i] = columns[i][j];
            transform_sums(d, y);
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) {
                const Vector exact = M == 2 ? shift_right32(y[i].v, 2) : shift_right32(mul32(y[i].v, ninth), 6);
                store(result + 64 * (i * M + j), add32(exact, b));
            }
        }
    }

    // The result of some tiles from their sums.
    void finish(const Finish& finish, int64_t first, int count, int block, int blocks, const uint8_t* sums, int64_t plane) const {
        Tile tile;
        tile.finish = &finish, tile.block = block, tile.channels = std::min(16 * blocks, s.y.c - 16 * block);
        const Tensor& z = s.flags & ADDS ? s.z : s.y;
        const int64_t channel = s.flags & TO_FLOAT ? 0 : 16 * block;
        for (int k = 0; k < count; k++, sums += 256) {
            alignas(64) int32_t result[M * M * 64];
            for (int j = 0; j < blocks; j++)
                transform_output(sums + 64 * j, plane, s.bias + 16 * (block + j), result + 16 * j);
            const Point p = place(first + k);
            const int lines = std::min(M, s.y.h - p.y), width = std::min(M, s.y.w - p.x);
            for (int i = 0; i < lines; i++) {
                Results results;
                for (int j = 0; j < width; j++) {
                    results.to[j] = s.y.at(p.i, p.y + i, p.x + j) + channel;
                    results.other[j] = z.at(p.i, p.y + i, p.x + j) + channel;
                }
                finish_sums(s, tile, results, width, blocks, 16 * block, result + 64 * M * i);
            }
        }
    }

    void unit(int unit, const Finish& done, int thread) const {
        const int columns = (s.blocks + 3) / 4, chunks = s.outer ? s.units / columns : s.units;
        const int chunk = s.outer ? unit % chunks : unit;
        const int64_t first = tiles * chunk / chunks;
        const int count = static_cast<int>(tiles * (chunk + 1) / chunks - first);
        const int64_t most = (tiles + chunks - 1) / chunks;
        const int64_t plane = words_plane(s.outer ? tiles : most), between = sums_plane(most);
        uint8_t* words = s.scratch + (s.outer ? 0 : thread * s.slot);
        uint8_t* sums = words + POSITIONS * plane + (s.outer ? thread * s.slot : 0);
        if (s.outer) words += first * row;
        else transform_input(first, count, words, plane);
        const int from = s.outer ? unit / chunks : 0, end = s.outer ? from + 1 : columns;
        for (int column = from; column < end; column++) {
            const int block = 4 * column, blocks = std::min(4, s.blocks - block);
            multiply(words, plane, count, block, blocks, sums, between);
            finish(done, first, count, block, blocks, sums, between);
        }
    }
    void input_unit(int unit) const {
        const int64_t first = tiles * unit / s.units, end = tiles * (unit + 1) / s.units;
        transform_input(first, static_cast<int>(end - first), s.scratch + first * row, words_plane(tiles));
    }
};

// taps: 36 positions, or 16.
inline void winograd(const Step& s, int unit, const Finish& finish, int thread) {
    if (s.taps == 36) Winograd<4>(s).unit(unit, finish, thread);
    else Winograd<2>(s).unit(unit, finish, thread);
}
inline void winograd_input(const Step& s, int unit) {
    if (s.taps == 36) Winograd<4>(s).input_unit(unit);
    else Winograd<2>(s).input_unit(unit);
}

}  // namespace fxquant
