// Lanes run across rows. Each row is rounded from left to right, and its sums run in sequence, so the width of the lanes
// changes nothing.
#include "feedback_lanes.hpp"

namespace KERNELS_ISA {
namespace {

constexpr int SWEEPS = 2;  // over the scales with the best offset, and over the offsets with the best scale

// Rounds a group of columns `x` with one scale and offset for each row; returns the sums of squares of the errors. With
// `keep`, codes and errors are stored; otherwise it stops where no row can have less than `least`.
template <bool uniform, bool keep>
INLINE F round_group(const F* x, const float* upper, size_t upper_stride, F scale, F offset, F least, const ScalarGrid& grid,
                     I* codes, F* errors) {
    F left[WIDEST];
    const size_t width = grid.width;
    for (size_t j = 0; j < width; ++j) left[j] = x[j];
    const F inverse = scale == 0.f ? F{} : 1.f / scale;
    const float first = grid.levels[0], top = (float)(grid.level_count - 1);
    F loss{};
    for (size_t j = 0; j < width; ++j) {
        const float* row = upper + j * upper_stride;
        const F target = (left[j] - offset) * inverse;
        I code;
        F level;
        if (uniform) {
            level = round_small(max(min(target - first, splat(top)), F{}));
            code = truncate(level);
            level = level + first;
        } else {
            code = I{};
            for (size_t i = 1; i < grid.level_count; ++i) code -= target > (grid.levels[i - 1] + grid.levels[i]) * 0.5f;
            level = floats(gather((const int32_t*)grid.levels, code));
        }
        const F error = (left[j] - (scale * level + offset)) / row[j];
        loss += error * error;
        if (keep) {
            codes[j] = code;
            errors[j] = error;
        } else if ((j & 7) == 7 && !any(loss < least)) {
            break;
        }
        for (size_t k = j + 1; k < width; ++k) left[k] -= error * row[k];
    }
    return loss;
}

template <bool uniform>
void round_rows(const FeedbackBlock& block, const ScalarGrid& grid, const FeedbackResult& result, size_t first) {
    const size_t columns = grid.width * grid.groups, stride = block.upper_stride, rows = block.rows;
    const size_t lanes = rows - first < LANES ? rows - first : LANES;
    F x[WIDEST], errors[WIDEST], losses{};
    I codes[WIDEST];
    for (size_t j = 0; j < columns; ++j) x[j] = column(block.x, block.stride, j, first, rows);
    for (size_t g = 0; g < grid.groups; ++g) {
        const size_t start = g * grid.width;
        const float* upper = block.upper + start * (stride + 1);
        F scale{}, offset{}, least = splat(LARGEST);
        I best_scale{}, best_offset{};
        const auto shift = [&](F s, F o) __attribute__((always_inline)) { return grid.scaled_offsets ? s * o : o; };
        const auto attempt = [&](F s, F o, I scale_index, I offset_index) __attribute__((always_inline)) {
            const F loss = round_group<uniform, false>(x + start, upper, stride, s, shift(s, o), least, grid, nullptr, nullptr);
            const I better = loss < least;
            least = better ? loss : least, scale = better ? s : scale, offset = better ? o : offset;
            best_scale = better ? scale_index : best_scale, best_offset = better ? offset_index : best_offset;
        };
        const size_t offsets = grid.offsets ? grid.offset_count : 1;
        for (int sweep = 0; sweep < (offsets > 1 ? SWEEPS : 1); ++sweep) {
            F o = offset;
            if (sweep == 0 && grid.offsets) o = column(grid.offsets, grid.groups * offsets, g * offsets, first, rows);
            const I o_index = best_offset;
            for (size_t i = 0; i < grid.scale_count; ++i)
                attempt(column(grid.scales, grid.groups * grid.scale_count, g * grid.scale_count + i, first, rows), o,
                        splat((int32_t)i), o_index);
            const F s = scale;
            const I s_index = best_scale;
            for (size_t i = 0; i < (offsets > 1 ? offsets : 0); ++i)
                attempt(s, column(grid.offsets, grid.groups * offsets, g * offsets + i, first, rows), s_index,
                        splat((int32_t)i));
        }
        losses += round_group<uniform, true>(x + start, upper, stride, scale, shift(scale, offset), least, grid, codes + start,
                                             errors + start);
        compensate(x, errors, start, start + grid.width, columns, block.upper, stride);
        for (size_t l = 0; l < lanes; ++l) {
            result.scale_choices[(first + l) * grid.groups + g] = (uint8_t)best_scale[l];
            result.offset_choices[(first + l) * grid.groups + g] = (uint8_t)best_offset[l];
        }
    }
    for (size_t l = 0; l < lanes; ++l) {
        result.losses[first + l] = losses[l];
        for (size_t j = 0; j < columns; ++j) {
            result.codes[(first + l) * columns + j] = (uint8_t)codes[j][l];
            result.errors[(first + l) * columns + j] = errors[j][l];
        }
    }
}

void round_scalars(const FeedbackBlock& block, const ScalarGrid& grid, const FeedbackResult& result) {
    for (size_t first = 0; first < block.rows; first += LANES) {
        if (grid.uniform)
            round_rows<true>(block, grid, result, first);
        else
            round_rows<false>(block, grid, result, first);
    }
}

}  // namespace
}  // namespace KERNELS_ISA

namespace KERNELS_ISA {
void round_vectors(const FeedbackBlock& block, const VectorGrid& grid, const VectorResult& result);
}

KERNEL_TABLE_HERE(FeedbackKernels, feedback_kernels) = {KERNELS_ISA::round_scalars, KERNELS_ISA::round_vectors};
