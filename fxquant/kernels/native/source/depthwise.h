// Convolutions with one filter a channel. The bytes of four taps of the window are interleaved, so that a dot product sums over the
// four: any four taps of any window, or three lines of a column of a 3 x 3 window, which the next pixels read as well.
#pragma once
#include "convolution.h"

namespace fxquant {

// Where each tap of the window lies, for one pixel of the result after the other.
struct Cursor {
    const Step& s;
    Point p;
    int across, y0, x0, reach_y, reach_x;
    bool lines_inside;
    const uint8_t* start;
    uint8_t* to;           // the pixel of the result
    const uint8_t* other;  // and what is added to it
    int64_t* offsets;

    Cursor(const Step& s, int64_t index, int64_t* offsets) : s(s), p(point_of(index, s.y)), offsets(offsets) {
        const Window& w = s.window;
        across = w.kernel[1];
        const int down = s.taps / across;
        for (int t = 0; t < s.taps; t++)
            offsets[t] = t / across * w.dilation[0] * s.x.row + t % across * w.dilation[1] * s.x.pixel;
        reach_y = (down - 1) * w.dilation[0], reach_x = (across - 1) * w.dilation[1];
        find_start();
    }
    void find_start() {
        y0 = p.y * s.window.stride[0] - s.window.padding[0], x0 = p.x * s.window.stride[1] - s.window.padding[1];
        lines_inside = y0 >= 0 && y0 + reach_y < s.x.h;
        start = s.x.data + p.i * s.x.image + y0 * s.x.row + x0 * s.x.pixel;
        to = s.y.at(p.i, p.y, p.x), other = s.z.at(p.i, p.y, p.x);
    }
    void next() {
        if (p.x + 1 < s.y.w) {
            p.x++, x0 += s.window.stride[1], start += s.window.stride[1] * s.x.pixel, to += s.y.pixel, other += s.z.pixel;
        } else {
            advance(p, s.y);
            find_start();
        }
    }
    bool inside() const { return lines_inside && x0 >= 0 && x0 + reach_x < s.x.w; }
    // rows[tap]
    void rows(const uint8_t** rows) const {
        if (inside()) {
            for (int t = 0; t < s.taps; t++) rows[t] = start + offsets[t];
            return;
        }
        for (int t = 0; t < s.taps; t++) {
            const int y = y0 + t / across * s.window.dilation[0], x = x0 + t % across * s.window.dilation[1];
            rows[t] = y >= 0 && y < s.x.h && x >= 0 && x < s.x.w ? start + offsets[t] : s.border;
        }
    }
};

// Byte c of four tensors beside each other, for 64 channels in interleaved order.
inline void weave_four(Vector a, Vector b, Vector c, Vector d, Vector v[4]) {
    const Vector ab0 = low8(a, b), ab1 = high8(a, b), cd0 = low8(c, d), cd1 = high8(c, d);
    v[0] = low16(ab0, cd0), v[1] = high16(ab0, cd0);
    v[2] = low16(ab1, cd1), v[3] = high16(ab1, cd1);
}

// Products of four taps, of 16 of 64 channels, by weight[64][4] as dot_bytes reads it. Sets that add products of bytes in pairs
// have two such weights, of which the second makes up for pairs that would leave 16 bits: a bit of more tells where it must.
template <class V>
inline V dot_taps(V acc, V x, const int8_t* weight, int j, int32_t more) {
    if constexpr (PAIRS_OF_BYTES) {
        acc = dot_in_pairs(acc, x, load(weight + 64 * j));
        return more >> j & 1 ? dot_in_pairs(acc, x, load(weight + 256 + 64 * j)) : acc;
    } else {
        return dot_bytes(acc, x, weight + 64 * sizeof(Weight) * j);
    }
}

// Where those are needed: of each four taps of 64 channels.
inline const int32_t* more_of(const Step& s, int c, int fours) {
    static const int32_t nowhere[3] = {};
    return PAIRS_OF_BYTES ? s.half_first + c / 64 * fours : nowhere;
}

// Any window: weight[64 channels][four taps][64][4].
template <Rule RULE>
void any_window(const Step& s, int unit, const Finish& finish) {
    const int64_t pixels = static_cast<int64_t>(s.y.n) * s.y.h * s.y.w;
    const int64_t from = pixels * unit / s.units, end = pixels * (unit + 1) / s.units;
    const int fours = (s.taps + 3) / 4;
    const uint8_t** rows = static_cast<const uint8_t**>(alloca(sizeof(void*) * fours * 4));
    for (int t = s.taps; t < fours * 4; t++) rows[t] = s.border;
    Cursor cursor(s, from, static_cast<int64_t*>(alloca(sizeof(int64_t) * s.taps)));
    for (int64_t index = from; index < end; index++, cursor.next()) {
        cursor.rows(rows);
        for (int c = 0; c < s.y.c; c += 64) {
            Vector acc[4];
            for (int j = 0; j < 4; j++) acc[j] = load(s.bias + c + 16 * j);
            const int8_t* weight = s.weight + static_cast<int64_t>(c) * fours * 4 * sizeof(Weight);
            const int32_t* more = more_of(s, c, fours);
            for (int t = 0; t < fours; t++, weight += 256 * sizeof(Weight)) {
                Vector x[4];
                for (int j = 0; j < 4; j++) x[j] = load(rows[4 * t + j] + c);
                Vector v[4];
                weave_four(x[0], x[1], x[2], x[3], v);
                for (int j = 0; j < 4; j++) acc[j] = dot_taps(acc[j], v[j], weight, j, PAIRS_OF_BYTES ? more[t] : 0);
            }
            const Rescaling<RULE> rescaling(s, c / 16);
            for (int j = 0; j < 4; j++) acc[j] = rescaling(acc[j], j);
            store_first(cursor.to + c, finish(rescaling.interleaved_bytes(acc), cursor.other + c), s.y.c - c);
        }
    }
}

inline void depthwise(const Step& s, int unit, const Finish& finish) {
    switch (rule_of(s)) {
        case FLOAT32: return any_window<FLOAT32>(s, unit, finish);
        case FLOAT64: return any_window<FLOAT64>(s, unit, finish);
        case INTEGERS: return any_window<INTEGERS>(s, unit, finish);
    }
}

// The same channels of LINES lines of the result, of 64 / LINES channels each, from one vector.
template <int LINES>
void store_lines(uint8_t* const* at, Vector v, int count) {
    store_first(at[0], v, count);
    if constexpr (LINES == 2) store_first(at[1], part<2, 1>(v), count);
    if constexpr (LINES == 4) {
        store_first(at[1], part<4, 1>(v), count);
        store_first(at[2], part<4, 2>(v), count);
        store_first(at[3], part<4, 3>(v), count);
    }
}

// 64 channels (or fewer, of several lines) of two pixels of the result at once, so that what is read of weights and rules
// serves both. weight[column][64][4]: of the three lines, and of the second one again, where pairs are to fit into 16 bits.
template <int STRIDE, int LINES, Rule RULE>
struct ThreeByThree {
    static constexpr int COLUMNS = STRIDE + 3;
    const Step& s;
    const Finish& finish;
    const uint8_t* line[3][LINES];  // of the input; a line that is not there is the border's pixel over and over
    int64_t step[3][LINES];
    uint8_t* to[LINES];
    const uint8_t* other[LINES];

    void find_lines(int64_t index, int64_t lines) {
        for (int l = 0; l < LINES; l++) {
            const int64_t at = std::min(index + l, lines - 1);
            const int i = static_cast<int>(at / s.y.h), y = static_cast<int>(at % s.y.h);
            to[l] = s.y.at(i, y, 0), other[l] = s.z.at(i, y, 0);
            for (int k = 0; k < 3; k++) {
                const int from = y * STRIDE - s.window.padding[0] + k;
                const bool there = from >= 0 && from < s.x.h;
                line[k][l] = there ? s.x.at(i, from, 0) : s.border, step[k][l] = there ? s.x.pixel : 0;
            }
        }
    }
    inline __attribute__((always_inline)) void column(int x, int c, Vector v[4]) const {
        const bool there = x >= 0 && x < s.x.w;
        Vector row[3];
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++) {
            const uint8_t* at[LINES];
#pragma GCC unroll 4
            for (int l = 0; l < LINES; l++) at[l] = (there ? line[k][l] + x * step[k][l] : s.border) + c;
            row[k] = load_parts<LINES>(at);
        }
        weave_four(row[0], row[1], row[2], row[1], v);
    }
    void channels(int c) const {
        const int count = std::min(s.y.c - c, 64 / LINES);
        const int8_t* weight = s.weight + 12 * static_cast<int64_t>(c * sizeof(Weight));
        const int32_t* more = more_of(s, c, 3);
        const Rescaling<RULE> rescaling(s, c / 16);
        Vector col[COLUMNS][4];
        int ready = INT32_MIN;  // the pixel whose columns the last ones would be
        for (int pair = 0; pair < s.y.w; pair += 2) {
            const int x = std::max(0, std::min(pair, s.y.w - 2)), left = x * STRIDE - s.window.padding[1];
            constexpr int KEPT = 3 - STRIDE;
            if (ready == x) {
#pragma GCC unroll 2
                for (int k = 0; k < KEPT; k++)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) col[k][j] = col[k + 2 * STRIDE][j];
            } else {
#pragma GCC unroll 2
                for (int k = 0; k < KEPT; k++) column(left + k, c, col[k]);
            }
#pragma GCC unroll 5
            for (int k = KEPT; k < COLUMNS; k++) column(left + k, c, col[k]);
            ready = x + 2;
            Vector acc[2][4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                acc[0][j] = acc[1][j] = load(s.bias + c + 16 * j);
#pragma GCC unroll 3
                for (int k = 0; k < 3; k++) {
                    const int8_t* w = weight + 256 * k * sizeof(Weight);
                    acc[0][j] = dot_taps(acc[0][j], col[k][j], w, j, more[k]);
                    acc[1][j] = dot_taps(acc[1][j], col[k + STRIDE][j], w, j, more[k]);
                }
                acc[0][j] = rescaling(acc[0][j], j), acc[1][j] = rescaling(acc[1][j], j);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                if (i == s.y.w) break;
                Vector bytes = finish(rescaling.interleaved_bytes(acc[i]));
                uint8_t* out[LINES];
                const uint8_t* plus[LINES];
                for (int l = 0; l < LINES; l++) {
                    out[l] = to[l] + (x + i) * s.y.pixel + c;
                    plus[l] = other[l] + (x + i) * s.z.pixel + c;
                }
                if (finish.adds) bytes = finish.sum(bytes, load_parts<LINES>(plus));
                store_lines<LINES>(out, bytes, count);
            }
        }
    }
    void lines(int64_t from, int64_t end) {
        for (int64_t index = from; index < end; index += LINES) {
            find_lines(index, end);
            for (int c = 0; c < s.y.c; c += 64) channels(c);
        }
    }
};

template <int STRIDE, int LINES>
void three_by_three(const Step& s, int unit, const Finish& finish) {
    const int64_t lines = static_cast<int64_t>(s.y.n) * s.y.h;
    const int64_t from = lines * unit / s.units, end = lines * (unit + 1) / s.units;
    switch (rule_of(s)) {
        case FLOAT32: return ThreeByThree<STRIDE, LINES, FLOAT32>{s, finish, {}, {}, {}, {}}.lines(from, end);
        case FLOAT64: return ThreeByThree<STRIDE, LINES, FLOAT64>{s, finish, {}, {}, {}, {}}.lines(from, end);
        case INTEGERS: return ThreeByThree<STRIDE, LINES, INTEGERS>{s, finish, {}, {}, {}, {}}.lines(from, end);
    }
}

// groups: how many lines share a vector.
inline void depthwise_three(const Step& s, int unit, const Finish& finish) {
    const bool strided = s.window.stride[1] == 2;
    if (s.groups == 4) return strided ? three_by_three<2, 4>(s, unit, finish) : three_by_three<1, 4>(s, unit, finish);
    if (s.groups == 2) return strided ? three_by_three<2, 2>(s, unit, finish) : three_by_three<1, 2>(s, unit, finish);
    return strided ? three_by_three<2, 1>(s, unit, finish) : three_by_three<1, 1>(s, unit, finish);
}

}  // namespace fxquant
