// Searches on the grids of the IQ1, IQ2 and IQ3 types.
//
// These kernels work on a group of one block; lanes are the trial scales, or the neighbors of a point. The distance to
// a point is a sum over its coordinates, and a coordinate has only 3 or 8 values, so the terms are tabulated once. A
// neighbor then takes a few lookups and additions, in the order of the coordinates, as in ggml.
#pragma once

#include "gguf_grids.hpp"
#include "lanes.hpp"

namespace KERNELS_ISA {

// table[i] for i in 0..7.
INLINE F look_up(const float* table, I i) {
#if defined(__AVX512F__)
    return (F)_mm512_permutexvar_ps((__m512i)i, _mm512_castps256_ps512(_mm256_loadu_ps(table)));
#elif defined(__AVX2__)
    return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)i);
#else
    F y;
    for (int l = 0; l < LANES; ++l) y[l] = table[i[l]];
    return y;
#endif
}

// The smallest position among the lanes with the smallest value.
INLINE int position_of_least(F value, I position) {
#if defined(__AVX512F__)
    const float least = _mm512_reduce_min_ps((__m512)value);
    const __mmask16 at = _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(least), _CMP_EQ_OQ);
    return _mm512_mask_reduce_min_epi32(at, (__m512i)position);
#else
    float least = value[0];
    int at = position[0];
    for (int l = 1; l < LANES; ++l)
        if (value[l] < least || (value[l] == least && position[l] < at)) least = value[l], at = position[l];
    return at;
#endif
}

// The code of DIMS coordinates.
template <int DIMS>
INLINE int code_of_point(const uint8_t* coordinates) {
    int u = 0;
    for (int i = 0; i < DIMS; ++i) u |= coordinates[i] << ((DIMS == 8 ? 2 : 3) * i);
    return u;
}

// The neighbor of the code `u`, which is not on the grid, with the smallest sum of w (scale value - x)^2; `values`:
// those of the coordinates.
template <int DIMS, int LEVELS>
INLINE int nearest_neighbour(const Grid& grid, int u, const float* x, const float* w, float scale,
                             const float* values) {
    const int list = -1 - grid.index[u], start = grid.list_start[list], count = grid.list_start[list + 1] - start;
    const uint8_t* coordinates = grid.list_coordinates + (size_t)start * DIMS;

    float terms[DIMS][8];
    for (int i = 0; i < DIMS; ++i)
        for (int v = 0; v < 8; ++v) {
            const float diff = scale * values[v] - x[i];
            terms[i][v] = w[i] * diff * diff;
        }
    F least = splat(3.40282347e+38f);
    I best = {}, position = iota();
    for (int j = 0; j < count; j += LANES, position += LANES) {
        F distance = look_up(terms[0], load_bytes(coordinates + j));
        for (int i = 1; i < DIMS; ++i) distance += look_up(terms[i], load_bytes(coordinates + i * count + j));
        const I better = distance < least;
        least = better ? distance : least;
        best = better ? position : best;
    }
    return grid.list_points[start + position_of_least(least, best)];
}

// The same for 4-dimensional grids, whose lists are short: lane t is trial t, with its scale and its code, which is not
// on the grid where `off`. Returns the coordinates, one in each byte, the first lowest.
INLINE I nearest_neighbours(const Grid& grid, I entry, I off, const float* x, const float* w, F scale) {
    const I list = off ? -1 - entry : I{};
    const I start = gather(grid.list_start, list), last = gather(grid.list_sizes, list) - 1;
    F least = splat(3.40282347e+38f);
    I best = {};
    for (int j = 0;; ++j) {
        const I packed = gather(grid.list_packed, start + (last < j ? last : splat(j)));
        F distance = {};
        for (int i = 0; i < 4; ++i) {
            const F diff = scale * to_float(((packed >> (8 * i)) & 7) * 2 + 1) - x[i];
            distance += w[i] * diff * diff;
        }
        const I better = distance < least;
        least = better ? distance : least;
        best = better ? packed : best;
        if (!any(off & (last > j))) return best;
    }
}

// Twice the coordinate plus one: the values of the IQ2 and IQ3 grids while they are searched.
constexpr float ODD[8] = {1, 3, 5, 7, 9, 11, 13, 15};

// Which final codes of a group are recomputed with its final scale.
enum class Refit {
    ALL,         // every point again
    OFF_GRID,    // the points that were not on the grid
    ALL_IF_OFF,  // every point again if any was not on the grid
};

// A group of N magnitudes as points of DIMS coordinates on a grid, and its scale.
template <int N, int DIMS, int LEVELS, int TRIES>
struct GridFit {
    static constexpr int POINTS = N / DIMS, BITS = DIMS == 8 ? 2 : 3, VECTORS = (TRIES + LANES - 1) / LANES;

    float scale;
    int points[POINTS];  // numbers on the grid

    // x: magnitudes (one of each point may be negative); w: weights; root: their square roots. Tries the scales range /
    // (top + step k) for k = -TRIES / 2 .. TRIES / 2, top = 2 LEVELS - 1. `scale` must be initialized to the result for
    // the case that no trial is an improvement.
    static inline __attribute__((always_inline)) void fit(GridFit& out, const Grid& grid, const float* x,
                                                          const float* w, const float* root, float range, float step,
                                                          Refit refit, bool on_grid_at_first) {
        float inverses[VECTORS * LANES], scales[VECTORS * LANES];
        for (int t = 0; t < VECTORS * LANES; ++t) {
            const int k = (t < TRIES ? t : TRIES - 1) - TRIES / 2;
            inverses[t] = ((float)(2 * LEVELS - 1) + (float)k * step) / range;
            scales[t] = 1.f / inverses[t];
        }
        I codes[N][VECTORS];
        uint32_t off[POINTS] = {};  // bit t: not on the grid in trial t
        for (int p = 0; p < POINTS; ++p) {
            int32_t packed[VECTORS * LANES];
            for (int v = 0; v < VECTORS; ++v) {
                const F inverse = load(inverses + v * LANES);
                I u = {}, l[DIMS];
                for (int i = 0; i < DIMS; ++i) {
                    l[i] = clip(nearest_int(0.5f * (inverse * x[DIMS * p + i] - 1.f)), 0, LEVELS - 1);
                    u |= l[i] << (BITS * i);
                }
                const I entry = gather(grid.index, u), is_off = entry < 0;
                off[p] |= lane_bits(is_off) << (v * LANES);
                if (DIMS == 4 && any(is_off)) {
                    const I near = nearest_neighbours(grid, entry, is_off, x + DIMS * p, root + DIMS * p,
                                                      load(scales + v * LANES));
                    for (int i = 0; i < DIMS; ++i) l[i] = is_off ? (near >> (8 * i)) & 7 : l[i];
                }
                for (int i = 0; i < DIMS; ++i) codes[DIMS * p + i][v] = l[i];
                store(packed + v * LANES, u);
            }
            for (int t = 0; DIMS != 4 && t < TRIES; ++t) {
                if (!((off[p] >> t) & 1)) continue;
                const int n =
                    nearest_neighbour<DIMS, LEVELS>(grid, packed[t], x + DIMS * p, root + DIMS * p, scales[t], ODD);
                for (int i = 0; i < DIMS; ++i) codes[DIMS * p + i][t / LANES][t % LANES] = grid.points[n][i];
            }
        }
        float sums_qx[VECTORS * LANES], sums_q2[VECTORS * LANES];
        for (int v = 0; v < VECTORS; ++v) {
            F sum_qx = {}, sum_q2 = {};
            for (int i = 0; i < N; ++i) {
                const F q = to_float(2 * codes[i][v] + 1);
                sum_qx += (w[i] * x[i]) * q;
                sum_q2 += w[i] * q * q;
            }
            store(sums_qx + v * LANES, sum_qx);
            store(sums_q2 + v * LANES, sum_q2);
        }
        float best = 0;
        int chosen = -1;
        for (int t = 0; t < TRIES; ++t)
            if (sums_q2[t] > 0 && sums_qx[t] * sums_qx[t] > best * sums_q2[t]) {
                out.scale = sums_qx[t] / sums_q2[t];
                best = out.scale * sums_qx[t];
                chosen = t;
            }

        bool any_off = false;
        uint8_t levels[N];
        for (int p = 0; p < POINTS; ++p) any_off |= chosen < 0 ? !on_grid_at_first : (off[p] >> chosen) & 1;
        for (int i = 0; i < N; ++i) levels[i] = chosen < 0 ? 0 : (uint8_t)codes[i][chosen / LANES][chosen % LANES];
        if (out.scale > 0 && (refit == Refit::ALL || any_off)) {
            const float inverse = 1.f / out.scale;
            for (int p = 0; p < POINTS; ++p) {
                const bool was_off = chosen < 0 ? !on_grid_at_first : (off[p] >> chosen) & 1;
                if (refit == Refit::OFF_GRID && !was_off) continue;
                int u = 0;
                for (int i = 0; i < DIMS; ++i)
                    u |= clip(nearest_int(0.5f * (inverse * x[DIMS * p + i] - 1.f)), 0, LEVELS - 1) << (BITS * i);
                const int n = grid.index[u] >= 0 ? grid.index[u]
                                                 : nearest_neighbour<DIMS, LEVELS>(grid, u, x + DIMS * p,
                                                                                   root + DIMS * p, out.scale, ODD);
                for (int i = 0; i < DIMS; ++i) levels[DIMS * p + i] = grid.points[n][i];
            }
            float sum_qx = 0, sum_q2 = 0;
            for (int i = 0; i < N; ++i) {
                const float q = (float)(2 * levels[i] + 1);
                sum_qx += (w[i] * x[i]) * q;
                sum_q2 += w[i] * q * q;
            }
            if (sum_q2 > 0) out.scale = sum_qx / sum_q2;
        }
        for (int p = 0; p < POINTS; ++p) out.points[p] = grid.index[code_of_point<DIMS>(levels + DIMS * p)];
    }
};

// Magnitudes and signs of 8 values; bit i of the result is set where x[i] is negative. PARITY: the number of negative
// signs is made even by flipping the value with the smallest w x^2, whose magnitude becomes negative; the eighth sign
// is then redundant and is dropped.
template <bool PARITY>
INLINE int take_signs(const float* x, const float* w, float* magnitudes) {
    int signs = 0;
    for (int i = 0; i < 8; ++i) {
        magnitudes[i] = x[i] >= 0 ? x[i] : -x[i];
        signs |= x[i] >= 0 ? 0 : 1 << i;
    }
    if (!PARITY) return signs;
    if (__builtin_parity((unsigned)signs)) {
        int at = 0;
        float least = w[0] * x[0] * x[0];
        for (int i = 1; i < 8; ++i) {
            const float a = w[i] * x[i] * x[i];
            if (a < least) least = a, at = i;
        }
        magnitudes[at] = -magnitudes[at];
        signs ^= 1 << at;
    }
    return signs & 127;
}
// d times the values of a point of DIMS coordinates, negative where a bit of `signs` is set.
template <int DIMS>
INLINE void unpack_signed(const Grid& grid, int point, float d, int signs, float* out) {
    for (int i = 0; i < DIMS; ++i) {
        const float v = d * (float)grid.values[point][i];
        uint32_t u;
        __builtin_memcpy(&u, &v, 4);
        u ^= signs & (1 << i) ? 0x80000000u : 0;
        __builtin_memcpy(out + i, &u, 4);
    }
}
// The eight signs that follow from seven.
INLINE int with_parity(int signs) { return signs | (__builtin_parity((unsigned)signs) << 7); }

INLINE float ordered_sum_of_squares(const float* x, int n) {
    float total = 0;
    for (int i = 0; i < n; ++i) total += x[i] * x[i];
    return total;
}

// Runs kernel(x, importance or null, out) for each superblock of 256.
template <int BYTES, class Kernel>
INLINE void for_superblocks(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out,
                            Kernel kernel) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < cols; c += 256, x += 256, out += BYTES)
            kernel(x, importance ? importance + c : nullptr, out);
}

}  // namespace KERNELS_ISA
