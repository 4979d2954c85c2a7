// Conversions between float32, float16 and bfloat16, and the search for NaN and infinity.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "instruction_sets.hpp"

struct CastKernels {
    void (*f32_to_f16)(const void* in, void* out, size_t n);
    void (*f32_to_bf16)(const void* in, void* out, size_t n);
    void (*f16_to_f32)(const void* in, void* out, size_t n);
    void (*bf16_to_f32)(const void* in, void* out, size_t n);
    void (*bf16_to_f16)(const void* in, void* out, size_t n);
    void (*f16_to_bf16)(const void* in, void* out, size_t n);
    size_t (*nonfinite_f32)(const void* in, size_t n);
    // 16-bit floats, nonfinite where all bits of `exponent` are set
    size_t (*nonfinite_16)(const void* in, size_t n, uint16_t exponent);
};

KERNEL_TABLE(CastKernels, cast_kernels)
