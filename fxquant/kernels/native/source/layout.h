// Where the fields of the structures lie that Python fills, and the numbers of kinds and flags: compared when the library is
// loaded, so that no field is read as another (fxquant/kernels/native/abi.py).
#pragma once
#include <cstddef>
#include <type_traits>

#include "attention.h"

namespace fxquant {

struct Entry {
    const char* name;  // "Step" and its size, "Step.weight" and its place, or "Kind.COPY" and its number
    int64_t at, size;
    char kind;  // p: pointer, i: integers, f: floats, s: a structure
};

template <class T> constexpr char kind_of() {
    using One = std::remove_all_extents_t<T>;
    return std::is_pointer<One>::value ? 'p' : std::is_floating_point<One>::value ? 'f' : std::is_class<One>::value ? 's' : 'i';
}

#define STRUCTURE(S) {#S, 0, sizeof(S), 's'}
#define FIELD(S, name) {#S "." #name, offsetof(S, name), sizeof(S::name), kind_of<decltype(S::name)>()}
#define NUMBER(E, name) {#E "." #name, name, sizeof(E), 'i'}

static const Entry LAYOUT[] = {
    STRUCTURE(Tensor), FIELD(Tensor, data), FIELD(Tensor, pixel), FIELD(Tensor, row), FIELD(Tensor, image), FIELD(Tensor, n),
    FIELD(Tensor, h), FIELD(Tensor, w), FIELD(Tensor, c),
    STRUCTURE(Window), FIELD(Window, kernel), FIELD(Window, stride), FIELD(Window, padding), FIELD(Window, dilation),
    STRUCTURE(Requantization), FIELD(Requantization, constants), FIELD(Requantization, table), FIELD(Requantization, magic),
    FIELD(Requantization, low), FIELD(Requantization, high),
    STRUCTURE(Addition), FIELD(Addition, constant), FIELD(Addition, q), FIELD(Addition, shift), FIELD(Addition, low),
    FIELD(Addition, high),
    STRUCTURE(PaddingRegion), FIELD(PaddingRegion, i), FIELD(PaddingRegion, y), FIELD(PaddingRegion, x), FIELD(PaddingRegion, n), FIELD(PaddingRegion, h), FIELD(PaddingRegion, w),
    FIELD(PaddingRegion, taps), FIELD(PaddingRegion, inside), FIELD(PaddingRegion, tap), FIELD(PaddingRegion, bias),
    STRUCTURE(Step), FIELD(Step, kind), FIELD(Step, flags), FIELD(Step, x), FIELD(Step, z), FIELD(Step, y),
    FIELD(Step, window), FIELD(Step, groups), FIELD(Step, taps), FIELD(Step, depth), FIELD(Step, blocks), FIELD(Step, weight),
    FIELD(Step, bias), FIELD(Step, border), FIELD(Step, halves), FIELD(Step, half_four), FIELD(Step, half_first), FIELD(Step, regions), FIELD(Step, out), FIELD(Step, add), FIELD(Step, numbers),
    FIELD(Step, scale), FIELD(Step, zero_point), FIELD(Step, units), FIELD(Step, outer), FIELD(Step, region_count),
    FIELD(Step, scratch), FIELD(Step, slot),
    STRUCTURE(Attention), FIELD(Attention, value), FIELD(Attention, zero_query), FIELD(Attention, zero_key),
    FIELD(Attention, zero_value), FIELD(Attention, causal), FIELD(Attention, score), FIELD(Attention, result),
    NUMBER(Kind, QUANTIZE), NUMBER(Kind, CONVOLUTION), NUMBER(Kind, DEPTHWISE), NUMBER(Kind, MAXIMUM), NUMBER(Kind, AVERAGE),
    NUMBER(Kind, TABLE), NUMBER(Kind, ADD), NUMBER(Kind, MULTIPLY), NUMBER(Kind, AFFINE), NUMBER(Kind, COPY),
    NUMBER(Kind, DEQUANTIZE), NUMBER(Kind, DEPTHWISE_THREE), NUMBER(Kind, ATTENTION), NUMBER(Kind, LAYER_NORM),
    NUMBER(Kind, SOFTMAX), NUMBER(Kind, WINOGRAD), NUMBER(Kind, WINOGRAD_INPUT),
    NUMBER(Flag, ADDS), NUMBER(Flag, TO_FLOAT), NUMBER(Flag, COUNTS_PADDING), NUMBER(Flag, GROUPED), NUMBER(Flag, LINEAR),
    NUMBER(Flag, TIES), NUMBER(Flag, IN_FLOAT64),
};

#undef STRUCTURE
#undef FIELD
#undef NUMBER

}  // namespace fxquant
