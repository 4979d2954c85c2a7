// bitsandbytes' nf4, fp4, the 8-bit type of absmax, and LLM.int8(): quantize and dequantize. The tables are in
// bnb_tables.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "instruction_sets.hpp"

// A 4-bit type: its codes by ascending value, and the midpoints between neighboring values.
struct FourBitSteps {
    float midpoints[15];
    uint8_t ascending[16];
};

// Inputs and outputs are float32 or, with `bf16`, bfloat16.
struct BnbKernels {
    // n values in blocks of 64, the last may be shorter: absmax[ceil(n/64)]; packed[ceil(n/2)], which may be null.
    void (*quantize_4bit)(const FourBitSteps& steps, const void* x, bool bf16, size_t n, uint8_t* packed, float* absmax);
    // n values in blocks of `blocksize`, a multiple of 32; the last block may be incomplete.
    void (*dequantize_4bit)(const float* numbers, const uint8_t* packed, const float* absmax, size_t blocksize, size_t n,
                            void* out, bool bf16);
    // n float32 in blocks of 256; bins[65536]: the code of each step from -1 to 1.
    void (*quantize_8bit)(const float* x, size_t n, const uint8_t* bins, uint8_t* codes, float* absmax);
    // (rows, columns), one scale for each row.
    void (*quantize_int8)(const void* x, bool bf16, size_t rows, size_t columns, int8_t* codes, float* absmax);
    void (*dequantize_int8)(const int8_t* codes, const float* absmax, size_t rows, size_t columns, float* out);
};

KERNEL_TABLE(BnbKernels, bnb_kernels)
