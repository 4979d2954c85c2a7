// Decoded values beside the values that they were made from: sums over a run of them, and the largest of each block.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "instruction_sets.hpp"

// Two runs of n values, float32 or bfloat16, in blocks of `block`; the last block may be shorter.
struct Compared {
    const void *source, *actual;
    bool source_bf16, actual_bf16;
    size_t n, block;
};

// Sums over the pairs of finite values. An error that float32 cannot represent counts as its largest number.
struct ErrorSums {
    double signal = 0, noise = 0, bias = 0;  // squares of the source, squares of actual - source, actual - source
    float largest = 0;                       // |actual - source|
    size_t nonfinite = 0, source_nonfinite = 0;
    size_t first_nonfinite = SIZE_MAX;  // of `actual`
};

struct ComparisonKernels {
    // One value a block: the largest magnitude in the source, the largest error, the error of the first value that has
    // the largest magnitude (not computed where `anchor` is null). Where `absmax` is null, only the sums.
    //
    // Value i of a block is added to sum i % 16, in double precision; the 16 sums are added at the end. So every
    // instruction set gives the same bits.
    ErrorSums (*compare)(const Compared& in, float* absmax, float* worst, float* anchor);
    // Number of pairs whose bits differ, and the index of the first (n if none), of values of `size` bytes, 2 or 4.
    size_t (*differing)(const void* a, const void* b, int size, size_t n, size_t* first);
};

KERNEL_TABLE(ComparisonKernels, comparison_kernels)
