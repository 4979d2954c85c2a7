// IQ3_XXS, IQ3_S: points of four magnitudes on a grid, signs stored separately, 8 groups of 32 with a four-bit scale.
//
// Layouts (bytes): IQ3_XXS: half d, 64 of points, 8 words of four times seven signs and a scale. IQ3_S: half d, 64 of
// points, 8 of their ninth bits, 32 of signs, 4 of scales.
#include "gguf.hpp"
#include "gguf_grid_search.hpp"

namespace KERNELS_ISA {
namespace {

template <bool S>
INLINE void quantize_iq3(const float* x, const float* importance, uint8_t* out) {
    constexpr int BYTES = S ? 110 : 98;
    const Grid& grid = gguf_grids[S ? GRID_IQ3_S : GRID_IQ3_XXS];
    __builtin_memset(out, 0, BYTES);
    const float variance = 2 * ordered_sum_of_squares(x, 256) / 256;
    float w[256], root[256 + LANES], magnitudes[256 + LANES], scales[8], top = 0;
    uint32_t signs_and_scale[8] = {};
    for (int i = 0; i < 256; ++i)
        w[i] = importance ? importance[i] * __builtin_sqrtf(variance + x[i] * x[i]) : x[i] * x[i];
    for (int i = 0; i < 256; ++i) root[i] = __builtin_sqrtf(w[i]);
    uint8_t *points = out + 2, *signs_out = out + 74;
    for (int g = 0; g < 8; ++g) {
        const int at = 32 * g;
        int signs[4];
        float* m = magnitudes + at;
        for (int k = 0; k < 4; ++k) signs[k] = take_signs<!S>(x + at + 8 * k, w + at + 8 * k, m + 8 * k);
        float range = m[0];
        for (int i = 1; i < 32; ++i) range = range > m[i] ? range : m[i];
        scales[g] = 0;
        if (S ? range == 0 : range < 1e-8f) continue;  // ggml's IQ3_S does not advance its outputs either
        using Fit = GridFit<32, 4, 8, S ? 19 : 31>;
        Fit fit;
        fit.scale = range / 15;
        Fit::fit(fit, grid, m, w + at, root + at, range, 0.2f, S ? Refit::ALL_IF_OFF : Refit::OFF_GRID, !S);
        if (fit.scale < 0) {
            fit.scale = -fit.scale;
            for (int k = 0; k < 4; ++k) signs[k] = ~signs[k] & (S ? 255 : 127);
        }
        if (S) {
            for (int k = 0; k < 8; ++k) {
                points[k] = (uint8_t)fit.points[k];
                out[66 + g] |= (uint8_t)((fit.points[k] >> 8) << k);
            }
            points += 8;
            for (int k = 0; k < 4; ++k) signs_out[k] = (uint8_t)signs[k];
            signs_out += 4;
        } else {
            for (int k = 0; k < 8; ++k) points[8 * g + k] = (uint8_t)fit.points[k];
            signs_and_scale[g] = (uint32_t)(signs[0] | (signs[1] << 7) | (signs[2] << 14) | (signs[3] << 21));
        }
        scales[g] = fit.scale;
        top = top > fit.scale ? top : fit.scale;
    }
    if (top == 0) {
        if (!S) __builtin_memset(out, 0, BYTES);
        return;
    }
    const float d = top / 31, inverse = 1 / d;
    store_half(out, d * (S ? 1.033f : 1.0125f));
    for (int g = 0; g < 8; ++g) {
        const int l = clip(nearest_int(0.5f * (inverse * scales[g] - 1)), 0, 15);
        if (S)
            out[106 + g / 2] |= (uint8_t)(l << (4 * (g % 2)));
        else
            signs_and_scale[g] |= (uint32_t)l << 28;
    }
    if (!S) __builtin_memcpy(out + 66, signs_and_scale, 32);
}

template <bool S>
void iq3(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_superblocks<S ? 110 : 98>(x, importance, rows, cols, out, quantize_iq3<S>);
}

void from_iq3_xxs(const uint8_t* in, int64_t blocks, float* out) {
    const Grid& grid = gguf_grids[GRID_IQ3_XXS];
    for (; blocks > 0; --blocks, in += 98)
        for (int g = 0; g < 8; ++g) {
            uint32_t u;
            __builtin_memcpy(&u, in + 66 + 4 * g, 4);
            const float d = load_half(in) * (0.5f + (float)(u >> 28)) * 0.5f;
            for (int k = 0; k < 8; ++k, out += 4)
                unpack_signed<4>(grid, in[2 + 8 * g + k], d, with_parity((u >> (7 * (k / 2))) & 127) >> (4 * (k % 2)),
                                 out);
        }
}

void from_iq3_s(const uint8_t* in, int64_t blocks, float* out) {
    const Grid& grid = gguf_grids[GRID_IQ3_S];
    for (; blocks > 0; --blocks, in += 110)
        for (int g = 0; g < 8; ++g) {
            const float d = load_half(in) * (float)(1 + 2 * ((in[106 + g / 2] >> (4 * (g % 2))) & 15));
            for (int k = 0; k < 8; ++k, out += 4)
                unpack_signed<4>(grid, in[2 + 8 * g + k] | (((in[66 + g] >> k) & 1) << 8), d,
                                 in[74 + 4 * g + k / 2] >> (4 * (k % 2)), out);
        }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_iq3_xxs) = {KERNELS_ISA::iq3<false>, KERNELS_ISA::from_iq3_xxs};
KERNEL_TABLE_HERE(BlockKernel, gguf_iq3_s) = {KERNELS_ISA::iq3<true>, KERNELS_ISA::from_iq3_s};
