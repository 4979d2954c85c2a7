// Q3_K, Q6_K: superblocks of 256 in 16 groups, each with a signed scale that is itself quantized.
//
// Layouts (bytes): Q3_K: 32 of high bits, 64 of low two bits, 12 of 6-bit scales, half d.
// Q6_K: 128 of low nibbles, 64 of high two bits, 16 signed scales, half d.
#include "gguf.hpp"
#include "gguf_blocks.hpp"
#include "gguf_search.hpp"

namespace KERNELS_ISA {
namespace {

// The scale of largest magnitude among 16.
INLINE F extreme(const F* scales) { return signed_max<16>(scales); }

template <bool MATRIX>
INLINE void quantize_q3_k(const F* x, const F* importance, F, uint8_t* out) {
    F scales[16];
    F found[MATRIX ? 1 : 256];  // the codes of the search
    Scale fits[MATRIX ? 16 : 1];
    I ls[16];
    F d;
    if (MATRIX) {
        F group_weights[16];
        const F variance = 2.f * sum_of_squares<256>(x) / 256.f;
        for (int g = 0; g < 16; ++g) {
            F w[16];
            for (int i = 0; i < 16; ++i) w[i] = importance[16 * g + i] * sqrt(variance + x[16 * g + i] * x[16 * g + i]);
            group_weights[g] = sum<16>(w);
            fits[g] = fit_scale<16, 4>(x + 16 * g, w);
            scales[g] = fits[g].scale;
        }
        const Scale fit = fit_scale<16, 32>(scales, group_weights);
        for (int g = 0; g < 16; ++g) ls[g] = code_of<32>(fit, scales[g]);
        d = fit.scale;
    } else {
        constexpr int GROUPS = 4;
        for (int g = 0; g < 16; g += GROUPS) descend_scales<16, 4, GROUPS>(x + 16 * g, scales + g, found + 16 * g);
        const F top = extreme(scales), inverse = -32.f / top;
        const I some = top != 0.f;
        for (int g = 0; g < 16; ++g) {
            const I l = clip((nearest_int(inverse * scales[g]) << 24) >> 24, -32, 31) + 32;
            ls[g] = some ? l : I{};
        }
        d = some ? 1.f / inverse : F{};
    }
    const I hd = to_half(d);
    d = from_half(hd);

    I words[27];
    for (int w = 0; w < 2; ++w) {
        I bytes[4];
        for (int j = 0; j < 4; ++j) bytes[j] = (ls[4 * w + j] & 15) | ((ls[4 * w + j + 8] & 15) << 4);
        words[24 + w] = word(bytes);
    }
    I tops[4];
    for (int j = 0; j < 4; ++j)
        tops[j] = (ls[j] >> 4) | ((ls[j + 4] >> 4) << 2) | ((ls[j + 8] >> 4) << 4) | ((ls[j + 12] >> 4) << 6);
    words[26] = word(tops);

    I high[32] = {};
    for (int half = 0; half < 2; ++half) {
        I codes[128];
        for (int g = 0; g < 8; ++g) {
            const int j = 8 * half + g;
            const F scale = d * to_float(ls[j] - 32);
            const I none = scale == 0.f;
            for (int i = 0; i < 16; ++i) codes[16 * g + i] = clip(nearest_int(x[16 * j + i] / scale), -4, 3) + 4;
            if (any(none))
                for (int i = 0; i < 16; ++i) {
                    const I c = MATRIX ? code_of<4>(fits[j % (MATRIX ? 16 : 1)], x[16 * j + i])
                                       : truncate(found[(16 * j + i) % (MATRIX ? 1 : 256)]);
                    codes[16 * g + i] = none ? c : codes[16 * g + i];
                }
        }
        for (int i = 0; i < 128; ++i) high[i % 32] |= (codes[i] >> 2) << (4 * half + i / 32);
        for (int w = 0; w < 8; ++w) {
            I bytes[4];
            for (int j = 0; j < 4; ++j) {
                const I* c = codes + 4 * w + j;
                bytes[j] = (c[0] & 3) | ((c[32] & 3) << 2) | ((c[64] & 3) << 4) | ((c[96] & 3) << 6);
            }
            words[8 + 8 * half + w] = word(bytes);
        }
    }
    for (int w = 0; w < 8; ++w) words[w] = word(high + 4 * w);
    store_words<27>(words, out, 110);
    store_shorts(hd, out + 108, 110);
}

template <bool MATRIX>
INLINE void quantize_q6_k(const F* x, const F* importance, F, uint8_t* out) {
    Scale fits[16];
    F scales[16];
    for (int g = 0; g < 16; ++g) {
        F w[16];
        for (int i = 0; i < 16; ++i) w[i] = MATRIX ? importance[16 * g + i] : x[16 * g + i] * x[16 * g + i];
        fits[g] = fit_scale<16, 32>(x + 16 * g, w);
        scales[g] = fits[g].scale;
    }
    const F top = extreme(scales), inverse = -128.f / top;
    const I dead = abs(top) < GROUP_EPSILON;
    const I hd = dead ? I{} : to_half(1.f / inverse);
    const F d = from_half(hd);

    I words[52], scale_bytes[16];
    for (int g = 0; g < 16; ++g) {
        const I l = nearest_int(inverse * scales[g]);
        scale_bytes[g] = ((l > 127 ? splat(127) : l) << 24) >> 24;
    }
    for (int half = 0; half < 2; ++half) {
        I codes[128];
        for (int g = 0; g < 8; ++g) {
            const int j = 8 * half + g;
            const F scale = d * to_float(scale_bytes[j]);
            const I none = scale == 0.f;
            for (int i = 0; i < 16; ++i) codes[16 * g + i] = clip(nearest_int(x[16 * j + i] / scale), -32, 31) + 32;
            if (any(none))
                for (int i = 0; i < 16; ++i)
                    codes[16 * g + i] = none ? code_of<32>(fits[j], x[16 * j + i]) : codes[16 * g + i];
        }
        for (int w = 0; w < 8; ++w) {
            I first[4], second[4], tops[4];
            for (int j = 0; j < 4; ++j) {
                const I* c = codes + 4 * w + j;
                first[j] = (c[0] & 15) | ((c[64] & 15) << 4);
                second[j] = (c[32] & 15) | ((c[96] & 15) << 4);
                tops[j] = (c[0] >> 4) | ((c[32] >> 4) << 2) | ((c[64] >> 4) << 4) | ((c[96] >> 4) << 6);
            }
            words[16 * half + w] = word(first);
            words[16 * half + 8 + w] = word(second);
            words[32 + 8 * half + w] = word(tops);
        }
    }
    for (int g = 0; g < 16; ++g) scale_bytes[g] &= 255;
    for (int w = 0; w < 4; ++w) words[48 + w] = word(scale_bytes + 4 * w);
    for (int w = 0; w < 52; ++w) words[w] = dead ? I{} : words[w];
    store_words<52>(words, out, 210);
    store_shorts(hd, out + 208, 210);
}

void q3_k(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    if (importance)
        for_blocks<256, 110, false>(x, importance, rows, cols, out, quantize_q3_k<true>);
    else
        for_blocks<256, 110, false>(x, nullptr, rows, cols, out, quantize_q3_k<false>);
}

void q6_k(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    if (importance)
        for_blocks<256, 210, false>(x, importance, rows, cols, out, quantize_q6_k<true>);
    else
        for_blocks<256, 210, false>(x, nullptr, rows, cols, out, quantize_q6_k<false>);
}

void from_q3_k(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 110, out += 256) {
        const float d = load_half(in + 108);
        const uint8_t* b = in + 96;
        for (int g = 0; g < 16; ++g) {
            const int l = (g < 8 ? b[g] & 15 : b[g - 8] >> 4) | (((b[8 + g % 4] >> (2 * (g / 4))) & 3) << 4);
            const float scale = d * (float)(l - 32);
            const uint8_t *q = in + 32 + 32 * (g / 8) + 16 * (g % 2), *high = in + 16 * (g % 2);
            const int shift = 2 * (g % 8 / 2);
            for (int i = 0; i < 16; ++i)
                out[16 * g + i] = scale * (float)(((q[i] >> shift) & 3) - (((high[i] >> (g / 2)) & 1) ? 0 : 4));
        }
    }
}

void from_q6_k(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 210, out += 256) {
        const float d = load_half(in + 208);
        for (int g = 0; g < 16; ++g) {
            const int half = g / 8, k = g % 8 / 2, side = g % 2;  // 32-element quarter k of half, 16 elements on side
            const uint8_t* low = in + 64 * half + 32 * (k % 2) + 16 * side;
            const uint8_t* high = in + 128 + 32 * half + 16 * side;
            const float scale = d * (float)(int8_t)in[192 + g];
            for (int i = 0; i < 16; ++i) {
                const int c = (k < 2 ? low[i] & 15 : low[i] >> 4) | (((high[i] >> (2 * k)) & 3) << 4);
                out[16 * g + i] = scale * (float)(c - 32);
            }
        }
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_q3_k) = {KERNELS_ISA::q3_k, KERNELS_ISA::from_q3_k};
KERNEL_TABLE_HERE(BlockKernel, gguf_q6_k) = {KERNELS_ISA::q6_k, KERNELS_ISA::from_q6_k};
