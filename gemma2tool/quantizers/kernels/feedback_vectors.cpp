// Codes that are vectors of columns. A vector is the unit of feedback: of all entries, the one with the smallest error is
// taken, where the errors e of its columns solve e U = x - v.
#include "feedback_lanes.hpp"

namespace KERNELS_ISA {
namespace {

constexpr size_t LONGEST = 8;  // columns of a vector
constexpr size_t SIGNED = 8;   // columns whose signs are counted together

// The inverse of an upper triangular matrix (size, size).
INLINE void invert(const float* upper, size_t stride, size_t size, float* inverse) {
    for (size_t j = 0; j < size; ++j) {
        for (size_t k = 0; k < j; ++k) inverse[j * LONGEST + k] = 0.f;
        inverse[j * LONGEST + j] = 1.f / upper[j * stride + j];
        for (size_t k = j + 1; k < size; ++k) {
            float sum = 0.f;
            for (size_t m = j; m < k; ++m) sum += inverse[j * LONGEST + m] * upper[m * stride + k];
            inverse[j * LONGEST + k] = -sum / upper[k * stride + k];
        }
    }
}

// The signs, 1 or -1, of `count` columns x, of which the last `size` may still be changed. If they must be even and are
// not, that of the column is changed whose error costs the least.
INLINE void choose_signs(const F* x, const float* upper, size_t stride, size_t size, const F* before, size_t before_count,
                         bool must_be_even, F* signs) {
    I odd{};
    F smallest = splat(LARGEST);
    I at{};
    for (size_t k = 0; k < before_count; ++k) odd ^= before[k] < 0.f;
    for (size_t k = 0; k < size; ++k) {
        const I negative = x[k] < 0.f;
        odd ^= negative;
        signs[k] = negative ? splat(-1.f) : splat(1.f);
        const F cost = abs(x[k]) / upper[k * (stride + 1)];
        const I less = cost < smallest;
        smallest = less ? cost : smallest;
        at = less ? splat((int32_t)k) : at;
    }
    if (!must_be_even) return;
    for (size_t k = 0; k < size; ++k) signs[k] = odd & (at == (int32_t)k) ? -signs[k] : signs[k];
}

// The entry with the smallest error for each row, and its error.
template <size_t size>
INLINE F best_entry(const F* x, const float* inverse, const F* scaled_signs, const VectorGrid& grid, I& best) {
    F target[size], factors[size * size];
    for (size_t k = 0; k < size; ++k) {
        target[k] = F{};
        for (size_t j = 0; j <= k; ++j) {
            target[k] += x[j] * inverse[j * LONGEST + k];
            factors[k * size + j] = scaled_signs[j] * inverse[j * LONGEST + k];
        }
    }
    F least = splat(LARGEST);
    best = I{};
    for (size_t i = 0; i < grid.entry_count; ++i) {
        const float* entry = grid.entries + i * size;
        F loss{};
        for (size_t k = 0; k < size; ++k) {
            F error = target[k];
            for (size_t j = 0; j <= k; ++j) error -= factors[k * size + j] * entry[j];
            loss += error * error;
        }
        const I better = loss < least;
        least = better ? loss : least;
        best = better ? splat((int32_t)i) : best;
    }
    return least;
}

struct Group {
    F errors[WIDEST];
    F signs[WIDEST];
    I codes[WIDEST];
};

// Rounds the columns of a group, `x`, with one scale for each row; returns the sums of squares of the errors, or stops where
// no row can have less than `least`.
template <size_t size>
INLINE F round_group(const F* x, const float* upper, size_t stride, F scale, F least, const VectorGrid& grid,
                     const float* inverses, Group& out) {
    F left[WIDEST], loss{};
    for (size_t j = 0; j < grid.width; ++j) left[j] = x[j];
    for (size_t first = 0; first < grid.width; first += size) {
        const size_t before = first % SIGNED;
        const float* diagonal = upper + first * (stride + 1);
        F scaled[LONGEST];
        choose_signs(left + first, diagonal, stride, size, out.signs + first - before, before,
                     grid.even_signs && before + size == SIGNED, out.signs + first);
        for (size_t k = 0; k < size; ++k) scaled[k] = scale * out.signs[first + k];
        I best;
        loss += best_entry<size>(left + first, inverses + first / size * LONGEST * LONGEST, scaled, grid, best);
        out.codes[first / size] = best;
        if (!any(loss < least)) break;
        for (size_t k = 0; k < size; ++k) {
            F level{};
            for (int l = 0; l < LANES; ++l) level[l] = grid.entries[best[l] * size + k];
            const F error = (left[first + k] - scaled[k] * level) / diagonal[k * (stride + 1)];
            out.errors[first + k] = error;
            for (size_t m = first + k + 1; m < grid.width; ++m) left[m] -= error * upper[(first + k) * stride + m];
        }
    }
    return loss;
}

template <size_t size>
void round_rows(const FeedbackBlock& block, const VectorGrid& grid, const VectorResult& result, size_t first,
                const float* inverses) {
    const size_t columns = grid.width * grid.groups, stride = block.upper_stride, rows = block.rows;
    const size_t lanes = rows - first < LANES ? rows - first : LANES;
    F x[WIDEST], errors[WIDEST], losses{};
    Group group;
    for (size_t j = 0; j < columns; ++j) x[j] = column(block.x, block.stride, j, first, rows);
    for (size_t g = 0; g < grid.groups; ++g) {
        const size_t start = g * grid.width;
        const float* upper = block.upper + start * (stride + 1);
        const float* inverse = inverses + start / size * LONGEST * LONGEST;
        F scale{}, least = splat(LARGEST);
        I choice{};
        for (size_t i = 0; i < grid.scale_count; ++i) {
            const F s = column(grid.scales, grid.groups * grid.scale_count, g * grid.scale_count + i, first, rows);
            const F loss = round_group<size>(x + start, upper, stride, s, least, grid, inverse, group);
            const I better = loss < least;
            least = better ? loss : least, scale = better ? s : scale, choice = better ? splat((int32_t)i) : choice;
        }
        losses += round_group<size>(x + start, upper, stride, scale, splat(LARGEST), grid, inverse, group);
        for (size_t j = 0; j < grid.width; ++j) errors[start + j] = group.errors[j];
        compensate(x, errors, start, start + grid.width, columns, block.upper, stride);
        for (size_t l = 0; l < lanes; ++l) {
            const size_t row = first + l;
            result.scale_choices[row * grid.groups + g] = (uint8_t)choice[l];
            for (size_t j = 0; j < grid.width / size; ++j)
                result.codes[row * (columns / size) + start / size + j] = (uint16_t)group.codes[j][l];
            for (size_t j = 0; j < grid.width / SIGNED; ++j) {
                uint8_t bits = 0;
                for (size_t k = 0; k < SIGNED; ++k) bits |= (uint8_t)((group.signs[j * SIGNED + k][l] < 0.f) << k);
                result.signs[row * (columns / SIGNED) + start / SIGNED + j] = bits;
            }
        }
    }
    for (size_t l = 0; l < lanes; ++l) {
        result.losses[first + l] = losses[l];
        for (size_t j = 0; j < columns; ++j) result.errors[(first + l) * columns + j] = errors[j][l];
    }
}

template <size_t size>
void round_all(const FeedbackBlock& block, const VectorGrid& grid, const VectorResult& result) {
    float inverses[WIDEST / size * LONGEST * LONGEST];
    for (size_t j = 0; j < grid.width * grid.groups; j += size)
        invert(block.upper + j * (block.upper_stride + 1), block.upper_stride, size, inverses + j / size * LONGEST * LONGEST);
    for (size_t first = 0; first < block.rows; first += LANES) round_rows<size>(block, grid, result, first, inverses);
}

}  // namespace

void round_vectors(const FeedbackBlock& block, const VectorGrid& grid, const VectorResult& result) {
    if (grid.size == 8)
        round_all<8>(block, grid, result);
    else
        round_all<4>(block, grid, result);
}

}  // namespace KERNELS_ISA
