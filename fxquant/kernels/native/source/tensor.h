// What the steps of a plan read and write. The Python side fills the same structures (fxquant/native/library.py).
#pragma once
#include <cstdint>
#include <vector>

namespace fxquant {

// Bytes of n images of h x w pixels of c channels; strides in bytes. A channel follows its neighbour, so a slice of the
// channels of another tensor is a tensor. Up to 63 bytes behind the last pixel may be read, and count for nothing.
struct Tensor {
    uint8_t* data;
    int64_t pixel, row, image;
    int32_t n, h, w, c;

    uint8_t* at(int64_t i, int64_t y, int64_t x) const { return data + i * image + y * row + x * pixel; }
};

// A window that moves over a tensor.
struct Window {
    int32_t kernel[2], stride[2], padding[2], dilation[2];
};

// From sums of 32 bits to bytes: y = clamp(floor((acc * q + r) / 2^s)), r being half a step and the zero point, q / 2^s a
// float32. Where acc * q / 2^s cannot lie half way between two integers, a fused multiply-add gives the same: adding
// magic = 1.5 * 2^23 + zero point in float32, or 1.5 * 2^52 + zero point in float64, rounds to a whole number, once. Float32
// does where sums have less than 24 bits and results less than 16; it leaves results in the lower half of 32 bits, and
// something else in the upper one. Both read one number q / 2^s a channel. Where a sum can be half way (flag TIES), 16
// channels have 48 integers: q, r and s of the even ones, then of the odd ones.
// The byte may go through a table of 256 (and then be added to another tensor).
struct Requantization {
    const void* constants;
    const uint8_t* table;
    double magic;
    int32_t low, high;
};

// (a * q[0] + b * q[1] + constant) >> shift, clamped.
struct Addition {
    int64_t constant;
    int32_t q[2];
    int32_t shift, low, high;
};

// Pixels of a convolution's result for which the same taps of the window count: lines by columns of some images. A point
// that lies outside the tensor for all of them is left out.
struct PaddingRegion {
    int32_t i, y, x, n, h, w;  // the first image, line and column, and how many of each
    int32_t taps, inside;    // how many taps count, and whether all of them lie inside for all pixels
    const int32_t* tap;      // their numbers
    const int32_t* bias;       // which knows what is left out
};

struct Step {
    int32_t kind, flags;
    Tensor x, z, y;  // read, read, written; a float tensor counts bytes as well
    Window window;
    int32_t groups, taps, depth, blocks;  // of a convolution: windows' rows or taps, channels in each, 16s of channels
    const int8_t* weight;
    const int32_t* bias;
    const uint8_t* border;  // a pixel of zero points, read where a window leaves its tensor
    // Of weights that are multiplied in pairs, some by halves: the other halves [16][4] of fours of channels, which ones, and
    // where those of a block and tap begin; null for other layers.
    const int8_t* halves;
    const int32_t *half_four, *half_first;
    const PaddingRegion* regions;      // of a convolution: all pixels of the result, in the order in which they are computed
    Requantization out;
    Addition add;
    const void* numbers;  // what else a kind needs
    double scale[2];
    int32_t zero_point[2];
    int32_t units, outer;  // how the work is cut, and whether units have few channels each
    int32_t region_count;
    uint8_t* scratch;  // memory between the stages of a kind that has some, see there
    int64_t slot;      // bytes of it that each thread has
};

enum Kind : int32_t {
    QUANTIZE, CONVOLUTION, DEPTHWISE, MAXIMUM, AVERAGE, TABLE, ADD, MULTIPLY, AFFINE, COPY, DEQUANTIZE,
    DEPTHWISE_THREE, ATTENTION, LAYER_NORM, SOFTMAX, WINOGRAD, WINOGRAD_INPUT
};

enum Flag : int32_t {
    ADDS = 1,       // the result is added to z
    TO_FLOAT = 2,   // sums leave as floats: numbers are the scales, scale the bounds
    COUNTS_PADDING = 4,
    GROUPED = 8,
    LINEAR = 16,    // pixel i of the result comes from pixel i, and all tensors' pixels follow each other
    TIES = 32,      // sums can lie half way between two integers; of ADD: q needs 32 bits
    IN_FLOAT64 = 64 // sums are rescaled in float64, not float32
};

}  // namespace fxquant
