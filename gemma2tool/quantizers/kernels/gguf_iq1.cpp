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
// The values of the three codes with the shift up and down; the rest pads to eight.
constexpr float UP[8] = {-1 + SHIFT, SHIFT, 1 + SHIFT}, DOWN[8] = {-1 - SHIFT, -SHIFT, 1 - SHIFT};

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
    I better = {};
    for (int k = 0; k < K; ++k) better |= (q2[k] > 0.f) & (qx[k] * qx[k] > best.score * q2[k]);
    const uint32_t all = (1u << lanes) - 1;
    for (uint32_t of = lane_bits(better) & all; of; of &= of - 1) {
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

// Codes of the split; a negative scale reverses them. Returns whether it is negative.
template <int N>
INLINE bool codes_of(Split& split, const int* order, uint8_t* codes) {
    for (int j = 0; j < N; ++j) codes[order[j]] = j < split.first ? 0 : j < split.second ? 1 : 2;
    if (!(split.scale < 0)) return false;
    for (int j = 0; j < N; ++j) codes[j] = (uint8_t)(2 - codes[j]);
    split.scale = -split.scale;
    return true;
}

// The points of the codes, or the nearest points where they are not on the grid, and then the scale that fits them.
// values[p]: the values of the three codes for point p.
template <int POINTS>
INLINE void to_grid(const Grid& grid, const float* x, const float* w, const uint8_t* codes, const float* const* values,
                    float& scale, int* points) {
    bool all = true;
    for (int p = 0; p < POINTS; ++p) {
        const int u = code_of_point<8>(codes + 8 * p);
        points[p] = grid.index[u];
        if (points[p] >= 0) continue;
        all = false;
        points[p] = nearest_neighbour<8, 3>(grid, u, x + 8 * p, w + 8 * p, scale, values[p]);
    }
    if (all) return;
    float qx = 0, q2 = 0;
    for (int p = 0; p < POINTS; ++p)
        for (int i = 0; i < 8; ++i) {
            const float q = values[p][grid.points[points[p]][i]], wq = w[8 * p + i] * q;
            qx += wq * x[8 * p + i];
            q2 += wq * q;
        }
    if (qx > 0 && q2 > 0) scale = qx / q2;
}

constexpr int PAD = 16;  // so that a vector may be loaded from any element

INLINE Split split_s(const float* x, const float* w, const int* order) {
    float sum_x[33 + PAD] = {}, sum_w[33 + PAD] = {};
    for (int j = 0; j < 32; ++j) {
        sum_x[j + 1] = sum_x[j] + w[order[j]] * x[order[j]];
        sum_w[j + 1] = sum_w[j] + w[order[j]];
    }
    Split best;
    for (int i1 = 0; i1 <= 32; ++i1)
        for (int i2 = i1; i2 <= 32; i2 += LANES) {
            const F x2 = load(sum_x + i2), w2 = load(sum_w + i2);
            F qx[2], q2[2];
            for (int k = 0; k < 2; ++k) {
                const float* v = k ? DOWN : UP;
                qx[k] = ((sum_x[i1] - sum_x[0]) * v[0] + (x2 - sum_x[i1]) * v[1]) + (sum_x[32] - x2) * v[2];
                q2[k] = ((sum_w[i1] - sum_w[0]) * v[0] * v[0] + (w2 - sum_w[i1]) * v[1] * v[1]) +
                        (sum_w[32] - w2) * v[2] * v[2];
            }
            offer<2>(best, qx, q2, i1, i2, 33 - i2 < LANES ? 33 - i2 : LANES);
        }
    return best;
}

void quantize_iq1_s(const float* x, const float* importance, uint8_t* out) {
    const Grid& grid = gguf_grids[GRID_IQ1];
    float w[256], scales[8] = {}, top = 0;
    bool down[8] = {};
    uint16_t high[8] = {};
    weigh(x, importance, 2 * ordered_sum_of_squares(x, 256) / 256, w);
    __builtin_memset(out, 0, 50);
    for (int g = 0; g < 8; ++g) {
        const float *xg = x + 32 * g, *wg = w + 32 * g;
        if (largest_magnitude(xg, 32) < 1e-12f) continue;
        int order[32] = {}, points[4];
        uint8_t codes[32] = {};
        sort<32>(xg, order);
        Split split = split_s(xg, wg, order);
        if (split.shift < 0) continue;
        const bool turned = codes_of<32>(split, order, codes);
        down[g] = (split.shift == 1) != turned;
        const float* v = down[g] ? DOWN : UP;
        const float* const values[4] = {v, v, v, v};
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

INLINE const float* values_m(int shift, int point) { return (point == 0 ? shift < 2 : shift % 2 == 0) ? UP : DOWN; }

// Combinations of the shifts of the two points of a group: up up, up down, down up, down down.
INLINE Split split_m(const float* x, const float* w, const int* order) {
    float px[2][17 + PAD] = {}, pw[2][17 + PAD] = {};
    for (int j = 0; j < 16; ++j) {
        const int i = order[j], h = i / 8;
        px[h][j + 1] = px[h][j] + w[i] * x[i];
        pw[h][j + 1] = pw[h][j] + w[i];
        px[1 - h][j + 1] = px[1 - h][j];
        pw[1 - h][j + 1] = pw[1 - h][j];
    }
    Split best;
    for (int i1 = 0; i1 <= 16; ++i1)
        for (int i2 = i1; i2 <= 16; i2 += LANES) {
            F half_qx[2][2], half_q2[2][2];  // [shift][half]
            for (int h = 0; h < 2; ++h)
                for (int k = 0; k < 2; ++k) {
                    const float* v = k ? DOWN : UP;
                    half_qx[k][h] = px[h][16] * v[2] - (px[h][i1] + load(px[h] + i2));
                    half_q2[k][h] = (pw[h][16] * v[2] * v[2] + pw[h][i1] * (v[0] * v[0] - v[1] * v[1])) +
                                    load(pw[h] + i2) * (v[1] * v[1] - v[2] * v[2]);
                }
            F qx[4], q2[4];
            for (int k = 0; k < 4; ++k) {
                qx[k] = half_qx[k / 2][0] + half_qx[k % 2][1];
                q2[k] = half_q2[k / 2][0] + half_q2[k % 2][1];
            }
            offer<4>(best, qx, q2, i1, i2, 17 - i2 < LANES ? 17 - i2 : LANES);
        }
    return best;
}

void quantize_iq1_m(const float* x, const float* importance, uint8_t* out) {
    const Grid& grid = gguf_grids[GRID_IQ1];
    float w[256], scales[16] = {}, top = 0;
    int shifts[16] = {};
    int points[16][2] = {};
    weigh(x, importance, 2 * ordered_sum_of_squares(x, 256) / 256, w);
    __builtin_memset(out, 0, 56);
    for (int g = 0; g < 16; ++g) {
        const float *xg = x + 16 * g, *wg = w + 16 * g;
        if (largest_magnitude(xg, 16) < 1e-7f) continue;
        int order[16] = {};
        uint8_t codes[16] = {};
        sort<16>(xg, order);
        Split split = split_m(xg, wg, order);
        if (split.shift < 0) continue;
        const bool turned = codes_of<16>(split, order, codes);
        shifts[g] = turned ? 3 - split.shift : split.shift;
        const float* const values[2] = {values_m(shifts[g], 0), values_m(shifts[g], 1)};
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
                const float q = values_m(shifts[g], p)[grid.points[points[g][p]][i]] * (float)(2 * l + 1),
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
