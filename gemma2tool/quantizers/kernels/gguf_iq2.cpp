// IQ2_XXS, IQ2_XS, IQ2_S: points of eight magnitudes on a grid, signs stored separately, groups of 32 (XXS) or 16 with
// a four-bit scale.
//
// Layouts (bytes): IQ2_XXS: half d, 8 times: 4 of points, a word of four times seven signs and a scale. IQ2_XS: half d,
// 32 times 16 bits: point, seven signs; 8 of scales. IQ2_S: half d, 32 of points, 32 of signs, 8 of the points' high
// bits, 8 of scales.
#include "gguf.hpp"
#include "gguf_blocks.hpp"
#include "gguf_grid_search.hpp"
#include "gguf_search.hpp"

namespace KERNELS_ISA {
namespace {

INLINE float largest(const float* x, int n) {
    float m = x[0];
    for (int i = 1; i < n; ++i) m = m > x[i] ? m : x[i];
    return m;
}

INLINE void importance_weights(const float* x, const float* importance, float variance, float* w, float* root) {
    for (int i = 0; i < 256; ++i) w[i] = importance[i] * __builtin_sqrtf(variance + x[i] * x[i]);
    for (int i = 0; i < 256; ++i) root[i] = __builtin_sqrtf(w[i]);
}

// The starting scales of 8 groups of 32.
INLINE void starting_scales(const float* magnitudes, const float* w, float* scales) {
    for (int first = 0; first < 8; first += LANES) {
        const float *x_rows[LANES], *w_rows[LANES];
        for (int l = 0; l < LANES; ++l) {
            const int g = first + l < 8 ? first + l : 7;
            x_rows[l] = magnitudes + 32 * g;
            w_rows[l] = w + 32 * g;
        }
        F xt[32], wt[32];
        I codes[32];
        load_transposed(x_rows, 32, xt);
        load_transposed(w_rows, 32, wt);
        const F found = fit_positive<32, 4>(xt, wt, codes);
        for (int l = 0; l < LANES && first + l < 8; ++l) scales[first + l] = found[l];
    }
}

void quantize_iq2_xxs(const float* x, const float* importance, uint8_t* out) {
    const Grid& grid = gguf_grids[GRID_IQ2_XXS];
    float w[256], root[256 + LANES], magnitudes[256 + LANES], starts[8], scales[8], top = 0;
    int signs[32];
    importance_weights(x, importance, ordered_sum_of_squares(x, 256) / 256, w, root);
    for (int k = 0; k < 32; ++k) signs[k] = take_signs<true>(x + 8 * k, w + 8 * k, magnitudes + 8 * k);
    starting_scales(magnitudes, w, starts);
    uint32_t words[16] = {};
    for (int g = 0; g < 8; ++g) {
        const float* m = magnitudes + 32 * g;
        scales[g] = 0;
        const float range = starts[g] * 3;
        if (largest(m, 32) < GROUP_EPSILON || range <= 0) continue;
        using Fit = GridFit<32, 8, 3, 13>;
        Fit fit;
        fit.scale = starts[g];
        Fit::fit(fit, grid, m, w + 32 * g, root + 32 * g, range, 0.1f, Refit::ALL, true);
        if (fit.scale < 0) {
            fit.scale = -fit.scale;
            for (int k = 0; k < 4; ++k) signs[4 * g + k] = ~signs[4 * g + k] & 127;
        }
        for (int k = 0; k < 4; ++k) {
            words[2 * g] |= (uint32_t)fit.points[k] << (8 * k);
            words[2 * g + 1] |= (uint32_t)signs[4 * g + k] << (7 * k);
        }
        scales[g] = fit.scale;
        top = top > fit.scale ? top : fit.scale;
    }
    __builtin_memset(out, 0, 66);
    if (top == 0) return;
    const float d = top / 31, inverse = 1 / d;
    store_half(out, d);
    for (int g = 0; g < 8; ++g)
        words[2 * g + 1] |= (uint32_t)clip(nearest_int(0.5f * (inverse * scales[g] - 1)), 0, 15) << 28;
    __builtin_memcpy(out + 2, words, 64);
}

template <bool S>
void quantize_iq2(const float* x, const float* importance, uint8_t* out) {
    constexpr int BYTES = S ? 82 : 74;
    const Grid& grid = gguf_grids[S ? GRID_IQ2_S : GRID_IQ2_XS];
    float w[256], root[256 + LANES], magnitudes[256 + LANES], scales[16], top = 0;
    const float squares = ordered_sum_of_squares(x, 256), variance = S ? 2 * squares / 256 : squares / 256;
    if (importance) {
        importance_weights(x, importance, variance, w, root);
    } else {
        for (int i = 0; i < 256; ++i) w[i] = 0.25f * variance + x[i] * x[i];
        for (int i = 0; i < 256; ++i) root[i] = __builtin_sqrtf(w[i]);
    }
    __builtin_memset(out, 0, BYTES);
    uint16_t codes[32] = {};
    for (int g = 0; g < 16; ++g) {
        float* m = magnitudes + 16 * g;
        int signs[2];
        for (int k = 0; k < 2; ++k) signs[k] = take_signs<!S>(x + 16 * g + 8 * k, w + 16 * g + 8 * k, m + 8 * k);
        const float range = largest(m, 16);
        scales[g] = 0;
        if (range < (S ? 1e-8f : GROUP_EPSILON)) continue;
        using Fit = GridFit<16, 8, 3, 19>;
        Fit fit;
        fit.scale = range / 5;
        Fit::fit(fit, grid, m, w + 16 * g, root + 16 * g, range, 0.1f, Refit::OFF_GRID, true);
        if (fit.scale < 0) {
            fit.scale = -fit.scale;
            for (int k = 0; k < 2; ++k) signs[k] = ~signs[k] & (S ? 255 : 127);
        }
        for (int k = 0; k < 2; ++k) {
            const int i = 2 * g + k;
            if (S) {
                out[2 + i] = (uint8_t)fit.points[k];
                out[34 + i] = (uint8_t)signs[k];
                out[66 + i / 4] |= (uint8_t)((fit.points[k] >> 8) << (2 * (i % 4)));
            } else {
                codes[i] = (uint16_t)(fit.points[k] | (signs[k] << 9));
            }
        }
        scales[g] = fit.scale;
        top = top > fit.scale ? top : fit.scale;
    }
    if (top == 0) return;
    const float d = top / 31, inverse = 1 / d;
    store_half(out, S ? d * 0.9875f : d);
    for (int g = 0; g < 16; ++g)
        out[BYTES - 8 + g / 2] |=
            (uint8_t)(clip(nearest_int(0.5f * (inverse * scales[g] - 1)), 0, 15) << (4 * (g % 2)));
    if (!S) __builtin_memcpy(out + 2, codes, 64);
}

void iq2_xxs(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_superblocks<66>(x, importance, rows, cols, out, quantize_iq2_xxs);
}
void iq2_xs(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_superblocks<74>(x, importance, rows, cols, out, quantize_iq2<false>);
}
void iq2_s(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_superblocks<82>(x, importance, rows, cols, out, quantize_iq2<true>);
}

void from_iq2_xxs(const uint8_t* in, int64_t blocks, float* out) {
    const Grid& grid = gguf_grids[GRID_IQ2_XXS];
    for (; blocks > 0; --blocks, in += 66)
        for (int g = 0; g < 8; ++g) {
            uint32_t u;
            __builtin_memcpy(&u, in + 6 + 8 * g, 4);
            const float d = load_half(in) * (0.5f + (float)(u >> 28)) * 0.25f;
            for (int k = 0; k < 4; ++k, out += 8)
                unpack_signed<8>(grid, in[2 + 8 * g + k], d, with_parity((u >> (7 * k)) & 127), out);
        }
}

void from_iq2_xs(const uint8_t* in, int64_t blocks, float* out) {
    const Grid& grid = gguf_grids[GRID_IQ2_XS];
    for (; blocks > 0; --blocks, in += 74)
        for (int k = 0; k < 32; ++k, out += 8) {
            const int code = in[2 + 2 * k] | (in[3 + 2 * k] << 8);
            const float d = load_half(in) * (0.5f + (float)((in[66 + k / 4] >> (4 * (k % 4 / 2))) & 15)) * 0.25f;
            unpack_signed<8>(grid, code & 511, d, with_parity(code >> 9), out);
        }
}

void from_iq2_s(const uint8_t* in, int64_t blocks, float* out) {
    const Grid& grid = gguf_grids[GRID_IQ2_S];
    for (; blocks > 0; --blocks, in += 82)
        for (int k = 0; k < 32; ++k, out += 8) {
            const int point = in[2 + k] | (((in[66 + k / 4] >> (2 * (k % 4))) & 3) << 8);
            const float d = load_half(in) * (0.5f + (float)((in[74 + k / 4] >> (4 * (k % 4 / 2))) & 15)) * 0.25f;
            unpack_signed<8>(grid, point, d, in[34 + k], out);
        }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_iq2_xxs) = {KERNELS_ISA::iq2_xxs, KERNELS_ISA::from_iq2_xxs};
KERNEL_TABLE_HERE(BlockKernel, gguf_iq2_xs) = {KERNELS_ISA::iq2_xs, KERNELS_ISA::from_iq2_xs};
KERNEL_TABLE_HERE(BlockKernel, gguf_iq2_s) = {KERNELS_ISA::iq2_s, KERNELS_ISA::from_iq2_s};
