// Rounding with error feedback (GPTQ) to values that are scales times levels: the passes over every value of a block of
// columns. Columns beyond the block are the caller's, who subtracts `errors` times the rest of the factor from them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "instruction_sets.hpp"

// A value of a group is scale * level + offset, or scale * (level + offset) with `scaled_offsets`. Every group of every row
// comes with scales and offsets to try, the first of each being those that are known to be good.
struct ScalarGrid {
    const float* levels;  // ascending
    size_t level_count;
    bool uniform;          // levels are one apart
    size_t width, groups;  // columns of a group; groups of a block
    const float* scales;   // (rows, groups, scale_count)
    size_t scale_count;
    const float* offsets;  // (rows, groups, offset_count), or null
    size_t offset_count;
    bool scaled_offsets;
};

// A vector of `size` columns is scale * sign * entry: one of `entry_count` entries, and a sign for each column. With
// `even_signs`, every eight columns have an even number of negative signs.
struct VectorGrid {
    const float* entries;  // (entry_count, size), not negative
    size_t entry_count, size;
    bool even_signs;
    size_t width, groups;  // columns that share a scale; groups of a block
    const float* scales;   // (rows, groups, scale_count)
    size_t scale_count;
};

// Rows of `width * groups` floats, and the upper triangular factor of their inverse Hessian, `upper_stride` apart.
struct FeedbackBlock {
    const float* x;
    size_t rows, stride;
    const float* upper;
    size_t upper_stride;
};

// `codes`: index of each value's level, and `errors`: what each lost, over the factor's diagonal, (rows, columns).
// `scale_choices` and `offset_choices`: (rows, groups). `losses`: sums of squares of errors, (rows,).
struct FeedbackResult {
    uint8_t *codes, *scale_choices, *offset_choices;
    float *errors, *losses;
};

// The same for vectors. `codes`: indices of entries, (rows, columns / size). `signs`: a bit for each column, (rows,
// columns / 8).
struct VectorResult {
    uint16_t* codes;
    uint8_t *signs, *scale_choices;
    float *errors, *losses;
};

struct FeedbackKernels {
    void (*round_scalars)(const FeedbackBlock& block, const ScalarGrid& grid, const FeedbackResult& result);
    void (*round_vectors)(const FeedbackBlock& block, const VectorGrid& grid, const VectorResult& result);
};

KERNEL_TABLE(FeedbackKernels, feedback_kernels)
