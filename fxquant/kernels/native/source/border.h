// Where floats become bytes and bytes floats, and where channels leave their place behind their pixel.
#pragma once
#include <cstring>

#include "windows.h"

namespace fxquant {

// clamp(round(x / scale) + zero point) in float32, ties to even, as quantize() says; NCHW in, pixels out. A unit is a line.
inline void quantize(const Step& s, int unit) {
    const int i = unit / s.y.h, line = unit % s.y.h, c = s.y.c, w = s.y.w;
    const int64_t plane = static_cast<int64_t>(s.y.h) * w;
    const float* x = reinterpret_cast<const float*>(s.x.data) + i * c * plane + static_cast<int64_t>(line) * w;
    const Floats scale = each(static_cast<float>(s.scale[0])), zero = each(static_cast<float>(s.zero_point[0]));
    const Floats low = each(static_cast<float>(s.out.low)), high = each(static_cast<float>(s.out.high));
    const auto sixteen = [&](const float* from, int count) {
        const Floats q = rounded(load_floats_first(from, count) / scale) + zero;
        return nearest(smaller(greater(q, low), high));  // a NaN becomes the lowest integer
    };
    uint8_t* y = s.y.at(i, line, 0);
    if (c == 3 && s.y.pixel == 3) {
        for (int at = 0; at < w; at += 16, y += 48) {
            const int count = std::min(16, w - at);
            store_triples(y, sixteen(x + at, count), sixteen(x + plane + at, count), sixteen(x + 2 * plane + at, count), count);
        }
        return;
    }
    alignas(16) uint8_t bytes[16];
    for (int k = 0; k < c; k++) {
        for (int at = 0; at < w; at += 16) {
            const int count = std::min(16, w - at);
            store_low_bytes(bytes, sixteen(x + k * plane + at, count));
            if (c == 1 && s.y.pixel == 1) {
                std::memcpy(y + at, bytes, count);
                continue;
            }
            for (int j = 0; j < count; j++) y[(at + j) * s.y.pixel + k] = bytes[j];
        }
    }
}

// (q - zero point) * scale, NCHW. A unit is sixteen channels of an image, sixteen pixels of which are turned at a time.
inline void dequantize(const Step& s, int unit) {
    const int blocks = (s.x.c + 15) / 16, i = unit / blocks, first = unit % blocks * 16;
    const int channels = std::min(16, s.x.c - first);
    const int64_t plane = static_cast<int64_t>(s.x.h) * s.x.w;
    float* y = reinterpret_cast<float*>(s.y.data) + (static_cast<int64_t>(i) * s.x.c + first) * plane;
    const float scale = static_cast<float>(s.scale[0]), zero = static_cast<float>(s.zero_point[0]);
    uint8_t turned[16][16];
    for (int line = 0; line < s.x.h; line++, y += s.x.w) {
        const uint8_t* x = s.x.at(i, line, 0) + first;
        if (s.x.c == 1 && s.x.pixel == 1) {
            for (int at = 0; at < s.x.w; at++) y[at] = (static_cast<float>(x[at]) - zero) * scale;
            continue;
        }
        for (int at = 0; at < s.x.w; at += 16) {
            const int count = std::min(16, s.x.w - at);
            for (int j = 0; j < count; j++) {
                for (int k = 0; k < channels; k++) turned[k][j] = x[(at + j) * s.x.pixel + k];
            }
            for (int k = 0; k < channels; k++) {
                for (int j = 0; j < count; j++) y[k * plane + at + j] = (static_cast<float>(turned[k][j]) - zero) * scale;
            }
        }
    }
}

}  // namespace fxquant
