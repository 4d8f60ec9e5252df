// Where floats become bytes and bytes floats, and where channels leave their place behind their pixel.
#pragma once
#include "windows.h"

namespace fxquant {

// clamp(round(x / scale) + zero point) in float32, ties to even, as quantize() says; NCHW in, pixels out. A unit is a line.
inline void quantize(const Step& s, int unit) {
    const int i = unit / s.y.h, line = unit % s.y.h, c = s.y.c, w = s.y.w;
    const int64_t plane = static_cast<int64_t>(s.y.h) * w;
    const float* x = reinterpret_cast<const float*>(s.x.data) + i * c * plane + static_cast<int64_t>(line) * w;
    const __m512 scale = _mm512_set1_ps(static_cast<float>(s.scale[0])), zero = _mm512_set1_ps(static_cast<float>(s.zero_point[0]));
    const __m512 low = _mm512_set1_ps(static_cast<float>(s.out.low)), high = _mm512_set1_ps(static_cast<float>(s.out.high));
    const auto sixteen = [&](const float* from, __mmask16 mask) {
        const __m512 real = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, from), scale);
        const __m512 q = _mm512_add_ps(_mm512_roundscale_ps(real, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), zero);
        // A NaN becomes the lowest integer: the first operand of the maximum is given up for the second.
        return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(q, low), high));
    };
    uint8_t* y = s.y.at(i, line, 0);
    if (c == 3 && s.y.pixel == 3) {
        alignas(64) uint8_t order[64] = {};
        for (int b = 0; b < 48; b++) order[b] = static_cast<uint8_t>(b / 3 * 4 + b % 3);
        const __m512i three = _mm512_load_si512(order);
        for (int at = 0; at < w; at += 16, y += 48) {
            const __mmask16 mask = static_cast<__mmask16>(first(std::min(16, w - at)));
            const __m512i q0 = sixteen(x + at, mask), q1 = sixteen(x + plane + at, mask), q2 = sixteen(x + 2 * plane + at, mask);
            const __m512i q = _mm512_or_si512(q0, _mm512_or_si512(_mm512_slli_epi32(q1, 8), _mm512_slli_epi32(q2, 16)));
            _mm512_mask_storeu_epi8(y, first(3 * std::min(16, w - at)), _mm512_permutexvar_epi8(three, q));
        }
        return;
    }
    alignas(16) uint8_t bytes[16];
    for (int k = 0; k < c; k++) {
        for (int at = 0; at < w; at += 16) {
            const int count = std::min(16, w - at);
            const __mmask16 mask = static_cast<__mmask16>(first(count));
            _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(sixteen(x + k * plane + at, mask)));
            for (int j = 0; j < count; j++) y[(at + j) * s.y.pixel + k] = bytes[j];
        }
    }
}

// (q - zero point) * scale, NCHW. A unit is a channel of an image.
inline void dequantize(const Step& s, int unit) {
    const int i = unit / s.x.c, c = unit % s.x.c;
    float* y = reinterpret_cast<float*>(s.y.data) + static_cast<int64_t>(unit) * s.x.h * s.x.w;
    const float scale = static_cast<float>(s.scale[0]), zero = static_cast<float>(s.zero_point[0]);
    for (int line = 0; line < s.x.h; line++) {
        const uint8_t* x = s.x.at(i, line, 0) + c;
        for (int at = 0; at < s.x.w; at++, x += s.x.pixel) *y++ = (static_cast<float>(*x) - zero) * scale;
    }
}

}  // namespace fxquant
