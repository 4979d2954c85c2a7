// IQ1_S, IQ1_M: points of eight trits on a grid, each value shifted by +-1/8; groups of 32 (S) or 16 (M) with a
// three-bit scale.
//
// Layouts (bytes): IQ1_S: half d, 32 of points, 8 times 16 bits: four times three high bits, scale, sign of the shift.
// IQ1_M: 32 of points, 16 of twice three high bits and the sign of the shift, 4 times 16 bits: four scales, a quarter
// of the half d.
#include "gguf.hpp"
#include "gguf_grid_search.hpp"

namespace KERNELS_ISA {
namespace {

constexpr float SHIFT = 0.125f;
// The values of the three codes with the shift up and down.
constexpr Values UP = make_values<8>(-1 + SHIFT, 1), DOWN = make_values<8>(-1 - SHIFT, 1);

INLINE void weigh(const float* x, const float* importance, float variance, float* w) {
    for (int i = 0; i < 256; ++i)
        w[i] = importance ? importance[i] * __builtin_sqrtf(variance + x[i] * x[i]) : x[i] * x[i];
}

INLINE float largest_magnitude(const float* x, int n) {
    float m = abs(x[0]);
    for (int i = 1; i < n; ++i) m = m > abs(x[i]) ? m : abs(x[i]);
    return m;
}

// order[r] = the element of rank r; equal elements keep their order (as with the qsort of glibc that ggml calls).
template <int N>
INLINE void sort(const float* x, int* order) {
    for (int j = 0; j < N; j += LANES) {
        const F at = load(x + j);
        const I number = iota() + j;
        I rank = {};
        for (int k = 0; k < N; ++k) rank -= (x[k] < at) | ((x[k] == at) & (k < number));
        for (int l = 0; l < LANES; ++l) order[rank[l]] = j + l;
    }
}

// The best split so far of a sorted group into codes 0, 1 and 2: [0, first), [first, second), [second, N).
struct Split {
    float score = -3.40282347e+38f, scale = 0;
    int first = -1, second = -1, shift = -1;  // shift: which combination of shifts

    static inline __attribute__((always_inline)) bool beaten_by(const Split& s, float qx, float q2) {
        return q2 > 0 && qx * qx > s.score * q2;
    }
    void take(float qx, float q2, int i1, int i2, int k) {
        scale = qx / q2;
        score = scale * qx;
        first = i1;
        second = i2;
        shift = k;
    }
};

// Takes one vector of candidates for each of K shifts: lane l is second = i2 + l. In order of lanes, then shifts, as in
// ggml's loops.
template <int K>
INLINE void offer(Split& best, const F* qx, const F* q2, int i1, int i2, int lanes) {
    uint32_t better = 0;
    for (int k = 0; k < K; ++k) better |= lanes_below(best.score * q2[k], qx[k] * qx[k]);
    const uint32_t all = (1u << lanes) - 1;
    for (uint32_t of = better & all; of; of &= of - 1) {
        const int l = __builtin_ctz(of);
        for (int k = 0; k < K; ++k) {
            if (!Split::beaten_by(best, qx[k][l], q2[k][l])) continue;
            const float before = best.score;
            best.take(qx[k][l], q2[k][l], i1, i2 + l, k);
            // rounding can make the score of a better split lower; then every later lane has to be compared again
            if (best.score < before) of = all & -(1u << l);
        }
    }
}

constexpr int PAD = 16;  // so that a vector may be loaded from any element

// Sums over the first j elements of a sorted group, for each of PARTS halves of it.
template <int N, int PARTS>
struct Prefixes {
    float x[PARTS][N + 1 + PAD] = {}, w[PARTS][N + 1 + PAD] = {};

    // Sums at one end of the second code: of one j in all lanes, or of consecutive j.
    struct End {
        F x[PARTS], w[PARTS];
    };
    INLINE_MEMBER End at(int j) const {
        End end;
        for (int h = 0; h < PARTS; ++h) end.x[h] = splat(x[h][j]), end.w[h] = splat(w[h][j]);
        return end;
    }
    INLINE_MEMBER End from(int j) const {
        End end;
        for (int h = 0; h < PARTS; ++h) end.x[h] = load(x[h] + j), end.w[h] = load(w[h] + j);
        return end;
    }
};

// A lower bound of the best score: the best split along the row first = N / 4, then along the column of its second, and
// the row of that one's first. 0 where the numbers are so small or large that rounding needs a closer look.
template <int N, int K, class Sums, class Candidates>
INLINE float score_to_beat(const Sums& sums, float weight, Candidates candidates) {
    float best = 0;
    int first = N / 4, second = N;
    for (int pass = 0; pass < 3; ++pass) {
        const bool row = pass != 1;
        int& end = row ? second : first;
        for (int j = row ? first : 0; j <= (row ? N : second); j += LANES) {
            F qx[K], q2[K], score = {};
            candidates(row ? sums.at(first) : sums.from(j), row ? sums.from(j) : sums.at(second), qx, q2);
            for (int k = 0; k < K; ++k) {
                const F estimate = qx[k] * qx[k] * estimated_reciprocal(q2[k]);
                score = max(score, q2[k] > 0.f ? estimate : F{});
            }
            score = iota() + j <= (row ? N : second) ? score : F{};
            const float here = -least_lane(-score);
            if (!(here > best)) continue;
            best = here;
            end = j + __builtin_ctz(lanes_at_most(splat(here), score));
        }
    }
    return best > 1e-18f && best < 1e18f && weight > 1e-12f && weight < 1e12f ? best : 0;
}

// The best split of ggml's loops over the ends of the second code. candidates(first, second, qx, q2): K sums for each
// lane.
template <int N, int K, class Sums, class Candidates>
INLINE Split best_split(const Sums& sums, float weight, Candidates candidates) {
    Split best;
    // Splits that are far worse than the best have no influence. Rounding may let two sequences of increasing scores
    // that start differently stay apart, but by less than 6 units in the last place at each of 1,122 candidates.
    const float known = score_to_beat<N, K>(sums, weight, candidates);
    if (known > 0) best.score = known * (1 - 1e-3f - 2 * RECIPROCAL_ERROR);
    for (int i1 = 0; i1 <= N; ++i1)
        for (int i2 = i1; i2 <= N; i2 += LANES) {
            F qx[K], q2[K];
            candidates(sums.at(i1), sums.from(i2), qx, q2);
            offer<K>(best, qx, q2, i1, i2, N + 1 - i2 < LANES ? N + 1 - i2 : LANES);
        }
    return best;
}

// Codes of the split; a negative scale reverses them. Returns whether it is negative.
template <int N>
INLINE bool codes_of(Split& split, const int* order, uint8_t* codes) {
    for (int j = 0; j < N; ++j) codes[order[j]] = j < split.first ? 0 : j < split.second ? 1 : 2;
    if (!(split.scale < 0)) return false;
    for (int j = 0; j < N; ++j) codes[j] = (uint8_t)(2 - codes[j]);
    split.scale = -split.scale;
    return true;
}

// Whether the codes of a point are the nearest values, and clearly so. x and codes are read up to a multiple of LANES.
INLINE bool is_rounded(const float* x, const uint8_t* codes, float scale, float inverse, float offset) {
    bool rounded = is_inside_cell<8>(x, scale, inverse, offset);
    for (int i = 0; i < 8; i += LANES) {
        const F scaled = inverse * load(x + i) + offset;
        const I level = -((scaled > 2.f) + (scaled > 4.f));
        constexpr uint32_t ALL = (1u << (8 < LANES ? 8 : LANES)) - 1;
        rounded &= (lane_bits(level == load_bytes(codes + i)) & ALL) == ALL;
    }
    return rounded;
}

// The points of the codes, or the nearest points where they are not on the grid, and then the scale that fits them.
// values[p]: the values of the three codes for point p. x and codes are read up to a multiple of LANES.
template <int POINTS>
INLINE void to_grid(const Grid& grid, const float* x, const float* w, const uint8_t* codes, const Values* const* values,
                    float& scale, int* points) {
    bool all = true;
    const float inverse = 2 / scale;  // between two values
    for (int p = 0; p < POINTS; ++p) {
        points[p] = grid.index[code_of_point<8>(codes + 8 * p)];
        if (points[p] >= 0) continue;
        all = false;
        const float offset = 1 - 2 * values[p]->lowest[0];
        const bool rounded = is_rounded(x + 8 * p, codes + 8 * p, scale, inverse, offset);
        points[p] = search_exactly<8>(rounded ? grid.undominated : grid.neighbours, -1 - points[p], x + 8 * p,
                                      w + 8 * p, scale, *values[p]);
    }
    if (all) return;
    float qx = 0, q2 = 0;
    for (int p = 0; p < POINTS; ++p)
        for (int i = 0; i < 8; ++i) {
            const float q = values[p]->lowest[grid.points[points[p]][i]], wq = w[8 * p + i] * q;
            qx += wq * x[8 * p + i];
            q2 += wq * q;
        }
    if (qx > 0 && q2 > 0) scale = qx / q2;
}

INLINE Split split_s(const float* x, const float* w, const int* order) {
    Prefixes<32, 1> sums;
    float *sum_x = sums.x[0], *sum_w = sums.w[0];
    float all_x = 0, all_w = 0;
    for (int j = 0; j < 32; ++j) {
        sum_x[j + 1] = all_x += w[order[j]] * x[order[j]];
        sum_w[j + 1] = all_w += w[order[j]];
    }
    using End = Prefixes<32, 1>::End;
    return best_split<32, 2>(sums, all_w, [=](const End& first, const End& second, F* qx, F* q2)
                                              __attribute__((always_inline)) {
        const F x1 = first.x[0], x2 = second.x[0], w1 = first.w[0], w2 = second.w[0];
        for (int k = 0; k < 2; ++k) {
            const float* v = (k ? DOWN : UP).lowest;
            qx[k] = (x1 * v[0] + (x2 - x1) * v[1]) + (all_x - x2) * v[2];
            q2[k] = (w1 * v[0] * v[0] + (w2 - w1) * v[1] * v[1]) + (all_w - w2) * v[2] * v[2];
        }
    });
}

void quantize_iq1_s(const float* source, const float* importance, uint8_t* out) {
    const Grid& grid = gguf_grids[GRID_IQ1];
    float x[256 + LANES], w[256], scales[8] = {}, top = 0;
    __builtin_memcpy(x, source, 1024);
    bool down[8] = {};
    uint16_t high[8] = {};
    weigh(x, importance, 2 * ordered_sum_of_squares(x, 256) / 256, w);
    __builtin_memset(out, 0, 50);
    for (int g = 0; g < 8; ++g) {
        const float *xg = x + 32 * g, *wg = w + 32 * g;
        if (largest_magnitude(xg, 32) < 1e-12f) continue;
        int order[32] = {}, points[4];
        uint8_t codes[32 + LANES] = {};
        sort<32>(xg, order);
        Split split = split_s(xg, wg, order);
        if (split.shift < 0) continue;
        const bool turned = codes_of<32>(split, order, codes);
        down[g] = (split.shift == 1) != turned;
        const Values* v = down[g] ? &DOWN : &UP;
        const Values* const values[4] = {v, v, v, v};
        to_grid<4>(grid, xg, wg, codes, values, split.scale, points);
        for (int k = 0; k < 4; ++k) {
            out[2 + 4 * g + k] = (uint8_t)points[k];
            high[g] |= (uint16_t)((points[k] >> 8) << (3 * k));
        }
        scales[g] = split.scale;
        top = top > split.scale ? top : split.scale;
    }
    if (top > 0) {
        const float d = top / 15, inverse = 1 / d;
        store_half(out, d * 1.125f);
        for (int g = 0; g < 8; ++g) {
            const int l = clip(nearest_int(0.5f * (inverse * scales[g] - 1)), 0, 7) | (down[g] ? 8 : 0);
            high[g] |= (uint16_t)(l << 12);
        }
    }
    __builtin_memcpy(out + 34, high, 16);
}

INLINE const Values* values_m(int shift, int point) {
    return (point == 0 ? shift < 2 : shift % 2 == 0) ? &UP : &DOWN;
}

// Combinations of the shifts of the two points of a group: up up, up down, down up, down down.
INLINE Split split_m(const float* x, const float* w, const int* order) {
    Prefixes<16, 2> sums;
    float terms_x[2][16] = {}, terms_w[2][16] = {};
    for (int h = 0; h < 2; ++h)
        for (int i = 8 * h; i < 8 * h + 8; ++i) terms_x[h][i] = w[i] * x[i], terms_w[h][i] = w[i];
    float sum_x[2] = {}, sum_w[2] = {};
    for (int j = 0; j < 16; ++j)
        for (int h = 0; h < 2; ++h) {
            sums.x[h][j + 1] = sum_x[h] += terms_x[h][order[j]];
            sums.w[h][j + 1] = sum_w[h] += terms_w[h][order[j]];
        }
    const float all_x[2] = {sums.x[0][16], sums.x[1][16]}, all_w[2] = {sums.w[0][16], sums.w[1][16]};
    using End = Prefixes<16, 2>::End;
    return best_split<16, 4>(sums, all_w[0] + all_w[1], [&](const End& first, const End& second, F* qx, F* q2)
                                                            __attribute__((always_inline)) {
        F half_qx[2][2], half_q2[2][2];  // [shift][half]
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 2; ++k) {
                const float* v = (k ? DOWN : UP).lowest;
                half_qx[k][h] = all_x[h] * v[2] - (first.x[h] + second.x[h]);
                half_q2[k][h] = (all_w[h] * v[2] * v[2] + first.w[h] * (v[0] * v[0] - v[1] * v[1])) +
                                second.w[h] * (v[1] * v[1] - v[2] * v[2]);
            }
        for (int k = 0; k < 4; ++k) {
            qx[k] = half_qx[k / 2][0] + half_qx[k % 2][1];
            q2[k] = half_q2[k / 2][0] + half_q2[k % 2][1];
        }
    });
}

void quantize_iq1_m(const float* source, const float* importance, uint8_t* out) {
    const Grid& grid = gguf_grids[GRID_IQ1];
    float x[256 + LANES], w[256], scales[16] = {}, top = 0;
    __builtin_memcpy(x, source, 1024);
    int shifts[16] = {};
    int points[16][2] = {};
    weigh(x, importance, 2 * ordered_sum_of_squares(x, 256) / 256, w);
    __builtin_memset(out, 0, 56);
    for (int g = 0; g < 16; ++g) {
        const float *xg = x + 16 * g, *wg = w + 16 * g;
        if (largest_magnitude(xg, 16) < 1e-7f) continue;
        int order[16] = {};
        uint8_t codes[16 + LANES] = {};
        sort<16>(xg, order);
        Split split = split_m(xg, wg, order);
        if (split.shift < 0) continue;
        const bool turned = codes_of<16>(split, order, codes);
        shifts[g] = turned ? 3 - split.shift : split.shift;
        const Values* const values[2] = {values_m(shifts[g], 0), values_m(shifts[g], 1)};
        to_grid<2>(grid, xg, wg, codes, values, split.scale, points[g]);
        out[2 * g] = (uint8_t)points[g][0];
        out[2 * g + 1] = (uint8_t)points[g][1];
        out[32 + g] = (uint8_t)((points[g][0] >> 8) | ((points[g][1] >> 8) << 4));
        scales[g] = split.scale;
        top = top > split.scale ? top : split.scale;
    }
    if (!(top > 0)) return;
    constexpr uint8_t SHIFT_BITS[4] = {0x00, 0x80, 0x08, 0x88};
    uint16_t packed[4] = {};
    float d = top / 15, qx = 0, q2 = 0;
    const float inverse = 1 / d;
    for (int g = 0; g < 16; ++g) {
        const int l = clip(nearest_int(0.5f * (inverse * scales[g] - 1)), 0, 7);
        packed[g / 4] |= (uint16_t)(l << (3 * (g % 4)));
        out[32 + g] |= SHIFT_BITS[shifts[g]];
        for (int p = 0; p < 2; ++p)
            for (int i = 0; i < 8; ++i) {
                const int at = 16 * g + 8 * p + i;
                const float q = values_m(shifts[g], p)->lowest[grid.points[points[g][p]][i]] * (float)(2 * l + 1),
                            wq = w[at] * q;
                qx += wq * x[at];
                q2 += wq * q;
            }
    }
    if (q2 > 0) d = qx / q2;
    const uint16_t h = to_half(d * 1.1125f);
    for (int k = 0; k < 4; ++k) packed[k] |= (uint16_t)(((h >> (4 * k)) & 15) << 12);
    __builtin_memcpy(out + 48, packed, 8);
}

void iq1_s(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_superblocks<50>(x, importance, rows, cols, out, quantize_iq1_s);
}
void iq1_m(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_superblocks<56>(x, importance, rows, cols, out, quantize_iq1_m);
}

INLINE void unpack(const Grid& grid, int point, float d, float shift, float* out) {
    for (int i = 0; i < 8; ++i) out[i] = d * ((float)grid.values[point][i] + shift);
}

void from_iq1_s(const uint8_t* in, int64_t blocks, float* out) {
    const Grid& grid = gguf_grids[GRID_IQ1];
    for (; blocks > 0; --blocks, in += 50)
        for (int g = 0; g < 8; ++g) {
            const int high = in[34 + 2 * g] | (in[35 + 2 * g] << 8);
            const float d = load_half(in) * (float)(2 * ((high >> 12) & 7) + 1);
            for (int k = 0; k < 4; ++k, out += 8)
                unpack(grid, in[2 + 4 * g + k] | (((high >> (3 * k)) & 7) << 8), d, high & 0x8000 ? -SHIFT : SHIFT,
                       out);
        }
}

void from_iq1_m(const uint8_t* in, int64_t blocks, float* out) {
    const Grid& grid = gguf_grids[GRID_IQ1];
    for (; blocks > 0; --blocks, in += 56) {
        uint16_t packed[4];
        __builtin_memcpy(packed, in + 48, 8);
        uint16_t h = 0;
        for (int k = 0; k < 4; ++k) h |= (uint16_t)((packed[k] >> 12) << (4 * k));
        for (int k = 0; k < 32; ++k, out += 8) {
            const int g = k / 2, high = in[32 + g] >> (4 * (k % 2));
            const float d = from_half(h) * (float)(2 * ((packed[g / 4] >> (3 * (g % 4))) & 7) + 1);
            unpack(grid, in[k] | ((high & 7) << 8), d, high & 8 ? -SHIFT : SHIFT, out);
        }
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_iq1_s) = {KERNELS_ISA::iq1_s, KERNELS_ISA::from_iq1_s};
KERNEL_TABLE_HERE(BlockKernel, gguf_iq1_m) = {KERNELS_ISA::iq1_m, KERNELS_ISA::from_iq1_m};
