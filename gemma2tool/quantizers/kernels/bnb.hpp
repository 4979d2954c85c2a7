// bitsandbytes' nf4, fp4, its 8-bit type for absmax, and LLM.int8(): quantization and back. Tables come from bnb_tables.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "instruction_sets.hpp"

// A 4-bit type on the number line: its codes from the smallest number up, and the midpoints between neighbouring numbers.
struct FourBitSteps {
    float midpoints[15];
    uint8_t ascending[16];
};

// Floats arrive as float32 or bfloat16 and leave so too (`bf16`).
struct BnbKernels {
    // n values in blocks of 64, of which the last may be shorter: absmax[ceil(n/64)]; packed[ceil(n/2)], unless it is null.
    void (*quantize_4bit)(const FourBitSteps& steps, const void* x, bool bf16, size_t n, uint8_t* packed, float* absmax);
    // n values of blocks of `blocksize`, a multiple of 32; n may end within a block.
    void (*dequantize_4bit)(const float* numbers, const uint8_t* packed, const float* absmax, size_t blocksize, size_t n,
                            void* out, bool bf16);
    // n float32 in blocks of 256; bins[65536] holds the code of each step from -1 to 1.
    void (*quantize_8bit)(const float* x, size_t n, const uint8_t* bins, uint8_t* codes, float* absmax);
    // (rows, columns), a scale a row.
    void (*quantize_int8)(const void* x, bool bf16, size_t rows, size_t columns, int8_t* codes, float* absmax);
    void (*dequantize_int8)(const int8_t* codes, const float* absmax, size_t rows, size_t columns, float* out);
};

KERNEL_TABLE(BnbKernels, bnb_kernels)
