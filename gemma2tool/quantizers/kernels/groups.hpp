// Integer and float8 codes of matrices whose columns share scales in groups: the passes over every value. The scales
// and zero points of the groups, by each library's own rule, are computed in the Python modules.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "instruction_sets.hpp"

// How a value x becomes a code, given its group's scale s and offset z.
enum class CodeRule : int {
    divide,      // round(clamp(x / s + z)), every operation in `arithmetic`      compressed-tensors
    float8,      // float8_e4m3fn(clamp(x / s + 0)), every operation in `arithmetic`  compressed-tensors
    reciprocal,  // clamp(round(x * (1 / s)))                                     torchao
    from_bias,   // clamp(round((x - z) / s))                                     MLX
    add_zero,    // clamp(round(x / s) + z)                                       GPTQ, AWQ
    float4,      // float4_e2m1(x / s), the quotient in `arithmetic`              MLX
    float4_even, // float4_e2m1(x / s), the quotient in `arithmetic`              compressed-tensors
};
enum class Arithmetic : int { float32, bfloat16, float16 };

// Rows of `columns` values, float32 or bfloat16, in groups of `width`; the last group of a row may be shorter.
struct Grouped {
    const void* x;
    bool bf16;
    size_t rows, columns, width;
};

struct GroupKernels {
    // The smallest and the largest value of each group.
    void (*ranges)(const Grouped& in, float* low, float* high);
    // One byte for each value. Codes are clamped to low..high, which are integers (except for float8).
    void (*codes)(const Grouped& in, CodeRule rule, Arithmetic arithmetic, const float* scales, const float* offsets, float low,
                  float high, uint8_t* out);
    // (code - z) * s in float32; codes are signed or unsigned bytes. Only the shape of `in` is used.
    void (*values)(const Grouped& in, const uint8_t* codes, bool is_signed, const float* scales, const float* offsets, float* out);
    // Packs two codes of four bits into a byte, the first in its low half, and unpacks them.
    void (*pack_nibbles)(const uint8_t* codes, size_t bytes, uint8_t* out);
    void (*unpack_nibbles)(const uint8_t* packed, size_t bytes, uint8_t* out);
};

KERNEL_TABLE(GroupKernels, group_kernels)
