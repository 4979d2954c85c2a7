// What the error feedback kernels share. Lanes run across rows.
//
// Included only by sources compiled per instruction set.
#pragma once

#include "feedback.hpp"
#include "lanes.hpp"

namespace KERNELS_ISA {

constexpr size_t WIDEST = 256;
constexpr float LARGEST = 3.4e38f;

// Values `index` of rows first... of an array (rows, count); rows beyond the last are zeros.
INLINE F column(const float* values, size_t count, size_t index, size_t first, size_t rows) {
    F v{};
    for (size_t l = 0; l < LANES && first + l < rows; ++l) v[l] = values[(first + l) * count + index];
    return v;
}

// Subtracts what the errors of the columns start...end cost the columns after them.
INLINE void compensate(F* x, const F* errors, size_t start, size_t end, size_t columns, const float* upper, size_t stride) {
    for (size_t k = end; k < columns; ++k) {
        F left = x[k];
        for (size_t j = start; j < end; ++j) left -= errors[j] * upper[j * stride + k];
        x[k] = left;
    }
}

}  // namespace KERNELS_ISA
