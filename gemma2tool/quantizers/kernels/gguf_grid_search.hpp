// Searches for the scale and the grid points of a group, for the IQ2 and IQ3 types.
//
// These kernels work on a group of one block; lanes are the trial scales.
#pragma once

#include "gguf_grid_lists.hpp"

namespace KERNELS_ISA {

// The code of DIMS coordinates.
template <int DIMS>
INLINE int code_of_point(const uint8_t* coordinates) {
    int u = 0;
    for (int i = 0; i < DIMS; ++i) u |= coordinates[i] << (bits_of(DIMS) * i);
    return u;
}

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
        int32_t codes[POINTS][VECTORS * LANES];
        uint32_t off[POINTS];  // bit t: not on the grid in trial t
        const bool wraps = !(least(x) * inverses[TRIES - 1] > -4e6f);
        const bool is_usual = scales[0] < 1e9f && scales[TRIES - 1] > 1e-9f;
        for (int p = 0; p < POINTS; ++p) {
            const uint32_t inside = wraps ? round_point<true>(x + DIMS * p, inverses, codes[p])
                                          : round_point<false>(x + DIMS * p, inverses, codes[p]);
            off[p] = to_grid(grid, x + DIMS * p, root + DIMS * p, scales, inverses, is_usual ? inside : 0, codes[p]);
        }
        float sums_qx[VECTORS * LANES], sums_q2[VECTORS * LANES];
        for (int v = 0; v < VECTORS; ++v) {
            F sum_qx = {}, sum_q2 = {};
            for (int p = 0; p < POINTS; ++p) {
                const I code = load(codes[p] + v * LANES);
                for (int i = 0; i < DIMS; ++i) {
                    const int at = DIMS * p + i;
                    const F q = odd_of(code >> (BITS * i));
                    sum_qx += (w[at] * x[at]) * q;
                    sum_q2 += w[at] * q * q;
                }
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
        for (int p = 0; p < POINTS; ++p) any_off |= chosen < 0 ? !on_grid_at_first : (off[p] >> chosen) & 1;
        for (int p = 0; p < POINTS; ++p) out.points[p] = chosen < 0 ? 0 : codes[p][chosen];  // codes until the end
        if (out.scale > 0 && (refit == Refit::ALL || any_off)) {
            const float inverse = 1.f / out.scale;
            float sum_qx = 0, sum_q2 = 0;
            for (int p = 0; p < POINTS; ++p) {
                const bool was_off = chosen < 0 ? !on_grid_at_first : (off[p] >> chosen) & 1;
                if (refit != Refit::OFF_GRID || was_off)
                    out.points[p] = code_at(grid, x + DIMS * p, root + DIMS * p, out.scale, inverse);
                for (int i = 0; i < DIMS; ++i) {
                    const int at = DIMS * p + i;
                    const float q = (float)(2 * ((out.points[p] >> (BITS * i)) & ((1 << BITS) - 1)) + 1);
                    sum_qx += (w[at] * x[at]) * q;
                    sum_q2 += w[at] * q * q;
                }
            }
            if (sum_q2 > 0) out.scale = sum_qx / sum_q2;
        }
        for (int p = 0; p < POINTS; ++p) out.points[p] = grid.index[out.points[p]];
    }

   private:
    static INLINE_MEMBER float least(const float* x) {
        F least = load(x);
        for (int i = LANES; i < N; i += LANES) least = min(least, load(x + i));
        return least_lane(least);
    }

    // The value of the lowest digit.
    static INLINE_MEMBER F odd_of(I code) {
#if defined(__AVX2__)
        return Table<BITS>{load(ODD<DIMS>.lowest)}[code];
#else
        return to_float(2 * (code & ((1 << BITS) - 1)) + 1);
#endif
    }

    // The codes of a point in all trials: inverse x rounded to 1, 3, 5... WRAPS: also where it is so far below 0 that
    // ggml's rounding wraps around. Bit t of the result is set where x is clearly inside the cell of the code of trial
    // t; then of two neighbors, one that is nearer to the code wherever they differ has no larger a sum.
    template <bool WRAPS>
    static INLINE_MEMBER uint32_t round_point(const float* x, const float* inverses, int32_t* codes) {
        uint32_t inside = 0;
        for (int v = 0; v < VECTORS; ++v) {
            const F inverse = load(inverses + v * LANES);
            I code = {};
            F margin = splat(1.f);  // to the nearest boundary
            for (int i = 0; i < DIMS; ++i) {
                const F scaled = inverse * x[i];
                if (WRAPS) {
                    code |= clip(nearest_int(0.5f * (scaled - 1.f)), 0, LEVELS - 1) << (BITS * i);
                } else if (LEVELS == 3) {  // half an odd number rounds to even: down at 2, up at 4
                    code = scaled > 2.f ? code + (1 << (BITS * i)) : code;
                    code = scaled >= 4.f ? code + (1 << (BITS * i)) : code;
                    margin = min(margin, abs(abs(scaled - 3.f) - 1.f));
                } else {
                    const F level = max(min(0.5f * (scaled - 1.f), splat(LEVELS - 1.f)), F{}), sum = level + ROUNDER;
                    code |= (bits(sum) & (LEVELS - 1)) << (BITS * i);
                    margin = min(margin, 0.5f - abs(level - (sum - ROUNDER)));
                }
            }
            store(codes + v * LANES, code);
            inside |= WRAPS ? 0 : lane_bits(margin > 5e-5f) << (v * LANES);
        }
        return inside;
    }

    // Replaces codes that are not on the grid; bit t of the result is set where that of trial t was not.
    static INLINE_MEMBER uint32_t to_grid(const Grid& grid, const float* x, const float* root, const float* scales,
                                          const float* inverses, uint32_t inside, int32_t* codes) {
        uint32_t off = 0;
        for (int v = 0; v < VECTORS; ++v)
            off |= lane_bits(gather(grid.index, load(codes + v * LANES)) < 0) << (v * LANES);
        if (!off) return 0;
        const PointSearch<DIMS> point(grid, x, root, ODD<DIMS>);
        for (uint32_t rest = off; rest;)
            rest &= ~point.template replace<VECTORS>(codes[__builtin_ctz(rest)], scales, inverses, inside, codes);
        return off;
    }

    // The code of a point for one scale.
    static INLINE_MEMBER int code_at(const Grid& grid, const float* x, const float* root, float scale, float inverse) {
        int code = 0;
        for (int i = 0; i < DIMS; ++i)
            code |= clip(nearest_int(0.5f * (inverse * x[i] - 1.f)), 0, LEVELS - 1) << (BITS * i);
        const int entry = grid.index[code];
        if (entry >= 0) return code;
        const NeighbourLists& lists =
            is_inside_cell<DIMS>(x, scale, inverse, 0) ? grid.undominated : grid.neighbours;
        return grid.codes[search_exactly<DIMS>(lists, -1 - entry, x, root, scale, ODD<DIMS>)];
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
