// Maxima and averages over windows, and what works on single values or channels.
#pragma once
#include <cmath>

#include "depthwise.h"

namespace fxquant {

// The part of a window that lies inside the image, along one axis.
struct Span {
    int first, count;

    Span(const Window& w, int axis, int index, int size) {
        const int start = index * w.stride[axis] - w.padding[axis], d = w.dilation[axis];
        const int skipped = start < 0 ? (-start + d - 1) / d : 0;
        first = start + skipped * d;
        const int left = first < size ? (size - 1 - first) / d + 1 : 0;
        count = std::max(0, std::min(w.kernel[axis] - skipped, left));
    }
};

inline void maximum(const Step& s, int unit) {
    const int64_t pixels = static_cast<int64_t>(s.y.n) * s.y.h * s.y.w;
    const int64_t from = pixels * unit / s.units, end = pixels * (unit + 1) / s.units;
    Point p = point_of(from, s.y);
    for (int64_t index = from; index < end; index++, advance(p, s.y)) {
        const Span down(s.window, 0, p.y, s.x.h), across(s.window, 1, p.x, s.x.w);
        const uint8_t* corner = s.x.at(p.i, down.first, across.first);
        uint8_t* to = s.y.at(p.i, p.y, p.x);
        for (int c = 0; c < s.y.c; c += 64) {
            Vector most = zeros();
            for (int ky = 0; ky < down.count; ky++) {
                const uint8_t* at = corner + ky * s.window.dilation[0] * s.x.row + c;
                for (int kx = 0; kx < across.count; kx++, at += s.window.dilation[1] * s.x.pixel)
                    most = max8(most, load(at));
            }
            store_first(to + c, most, s.y.c - c);
        }
    }
}

// round(mean(x - zero point) * ratio) + zero point: float64 after exact sums, ties to even. A unit is one 64 channels' column
// of one line of the result. The window of an adaptive pool is given line by line in numbers: starts and ends.
inline void average(const Step& s, int unit) {
    const int columns = (s.y.c + 63) / 64, c = 64 * (unit % columns), line = unit / columns;
    const int i = line / s.y.h, y = line % s.y.h;
    const int32_t* adaptive = static_cast<const int32_t*>(s.numbers);
    for (int x = 0; x < s.y.w; x++) {
        int y0, y1, x0, x1;
        double divisor;
        if (adaptive) {
            y0 = adaptive[2 * y], y1 = adaptive[2 * y + 1];
            x0 = adaptive[2 * (s.y.h + x)], x1 = adaptive[2 * (s.y.h + x) + 1];
            divisor = static_cast<double>(y1 - y0) * (x1 - x0);
        } else {
            const Window& w = s.window;
            const int top = y * w.stride[0] - w.padding[0], left = x * w.stride[1] - w.padding[1];
            const int bottom = std::min(top + w.kernel[0], s.x.h + w.padding[0]);
            const int right = std::min(left + w.kernel[1], s.x.w + w.padding[1]);
            y0 = std::max(top, 0), x0 = std::max(left, 0), y1 = std::min(bottom, s.x.h), x1 = std::min(right, s.x.w);
            const bool whole = s.flags & COUNTS_PADDING;
            divisor = whole ? static_cast<double>(bottom - top) * (right - left) : static_cast<double>(y1 - y0) * (x1 - x0);
        }
        const int lines = std::max(0, y1 - y0), width = std::max(0, x1 - x0);
        Vector sum[4] = {zeros(), zeros(), zeros(), zeros()};
        for (int ky = y0; ky < y0 + lines; ky++) {
            const uint8_t* at = s.x.at(i, ky, x0) + c;
            for (int kx = 0; kx < width; kx++, at += s.x.pixel) {
                Vector v[4];
                weave(load(at), v);
                for (int j = 0; j < 4; j++) sum[j] = add32(sum[j], v[j]);
            }
        }
        const Vector centre = each32(lines * width * s.zero_point[0]), to_zero = each32(s.zero_point[1]);
        const Doubles by = each(divisor), ratio = each(s.scale[0]);
        for (int j = 0; j < 4; j++) {
            const Vector d = sub32(sum[j], centre);
            sum[j] = add32(nearest(low_doubles(d) / by * ratio, high_doubles(d) / by * ratio), to_zero);
        }
        const Vector low = each8(s.out.low), high = each8(s.out.high);
        store_first(s.y.at(i, y, x) + c, clamp(pack_interleaved(sum), low, high), s.y.c - c);
    }
}

// Calls body(point of the result, pixel of x, pixel of y) for the pixels of a unit.
template <class Body>
void each_pixel(const Step& s, int unit, Body body) {
    const int64_t pixels = static_cast<int64_t>(s.y.n) * s.y.h * s.y.w;
    const int64_t from = pixels * unit / s.units, end = pixels * (unit + 1) / s.units;
    Point p = point_of(from, s.y);
    for (int64_t index = from; index < end; index++, advance(p, s.y)) body(p, s.x.at(p.i, p.y, p.x), s.y.at(p.i, p.y, p.x));
}

inline void look_up(const Step& s, int unit) {
    const Table table(s.out.table);
    each_pixel(s, unit, [&](const Point&, const uint8_t* x, uint8_t* y) {
        for (int c = 0; c < s.y.c; c += 64)
            store_first(y + c, table(load(x + c)), s.y.c - c);
    });
}

// Up to six axes with strides of their own: numbers[axis] is size, stride in x, stride in y. A unit is some of the first.
inline void copy_axes(const int64_t (*axis)[3], int axes, const uint8_t* x, uint8_t* y) {
    const int64_t size = axis[0][0], from = axis[0][1], to = axis[0][2];
    if (axes == 1) {
        if (from == 1 && to == 1) {
            std::memcpy(y, x, size);
            return;
        }
        for (int64_t k = 0; k < size; k++) y[k * to] = x[k * from];
        return;
    }
    for (int64_t k = 0; k < size; k++) copy_axes(axis + 1, axes - 1, x + k * from, y + k * to);
}

inline void copy(const Step& s, int unit) {
    int64_t axis[6][3];
    std::memcpy(axis, s.numbers, sizeof(axis[0]) * s.taps);
    const int64_t from = axis[0][0] * unit / s.units, end = axis[0][0] * (unit + 1) / s.units;
    const int64_t x = from * axis[0][1], y = from * axis[0][2];
    axis[0][0] = end - from;
    copy_axes(axis, s.taps, s.x.data + x, s.y.data + y);
}

inline void add(const Step& s, int unit) {
    const Sum sum(s.add);
    const bool wide = s.flags & TIES;
    each_pixel(s, unit, [&](const Point& p, const uint8_t* x, uint8_t* y) {
        const uint8_t* z = s.z.at(p.i, p.y, p.x);
        for (int c = 0; c < s.y.c; c += 64) {
            store_first(y + c, wide ? wide_sum(s.add, x + c, z + c) : sum(load(x + c), load(z + c)), s.y.c - c);
        }
    });
}

// (x - zero point)(z - zero point) requantized.
template <Rule RULE>
void product(const Step& s, int unit) {
    const Rescaling<RULE> rescaling(s, 0);
    const Vector x_zero = each32(s.zero_point[0]), z_zero = each32(s.zero_point[1]);
    const Vector low = each8(s.out.low), high = each8(s.out.high);
    each_pixel(s, unit, [&](const Point& p, const uint8_t* x, uint8_t* y) {
        const uint8_t* z = s.z.at(p.i, p.y, p.x);
        for (int c = 0; c < s.y.c; c += 64) {
            Vector a[4], b[4];
            weave(load(x + c), a);
            weave(load(z + c), b);
            for (int j = 0; j < 4; j++) a[j] = rescaling(mul32(sub32(a[j], x_zero), sub32(b[j], z_zero)), 0);
            store_first(y + c, clamp(rescaling.interleaved_bytes(a), low, high), s.y.c - c);
        }
    });
}

inline void multiply(const Step& s, int unit) {
    switch (rule_of(s)) {
        case FLOAT32: return product<FLOAT32>(s, unit);
        case FLOAT64: return product<FLOAT64>(s, unit);
        case INTEGERS: return product<INTEGERS>(s, unit);
    }
}

// round(x * gain + offset) of each channel in float64, ties to even: numbers[64 channels][gain, offset][64], interleaved.
inline void affine(const Step& s, int unit) {
    const Vector low = each8(s.out.low), high = each8(s.out.high);
    const Doubles magic = each(s.out.magic);
    for (int c = 0; c < s.y.c; c += 64) {
        const double* numbers = static_cast<const double*>(s.numbers) + 2 * c;
        const auto eight = [&](Doubles q, const double* n) { return fused(q, load_doubles(n), load_doubles(n + 64)) + magic; };
        each_pixel(s, unit, [&](const Point&, const uint8_t* x, uint8_t* y) {
            Vector v[4];
            weave(load(x + c), v);
            for (int j = 0; j < 4; j++)
                v[j] = low_bits(eight(low_doubles(v[j]), numbers + 16 * j), eight(high_doubles(v[j]), numbers + 16 * j + 8));
            store_first(y + c, clamp(pack_interleaved(v), low, high), s.y.c - c);
        });
    }
}

}  // namespace fxquant
