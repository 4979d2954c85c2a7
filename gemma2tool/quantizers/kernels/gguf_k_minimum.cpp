// Q2_K, Q4_K, Q5_K: superblocks of 256 in groups, each group with a scale and a minimum that are themselves quantized.
//
// Layouts (bytes): Q2_K: 16 scales (low nibble scale, high nibble minimum), 64 of codes, half d, half dmin.
// Q4_K, Q5_K: half d, half dmin, 12 of 6-bit scales and minima, (Q5_K: 32 of high bits,) 128 of low nibbles.
#include "gguf.hpp"
#include "gguf_blocks.hpp"
#include "gguf_search.hpp"

namespace KERNELS_ISA {
namespace {

// The weights of a group, with an importance matrix and without: the mean magnitude plus |x|, or |x| alone.
template <int N>
INLINE void importance_weights(const F* x, const F* importance, F variance, F* w) {
    for (int i = 0; i < N; ++i) w[i] = importance[i] * sqrt(variance + x[i] * x[i]);
}
template <int N>
INLINE void magnitude_weights(const F* x, F* w) {
    const F average = sqrt(sum_of_squares<N>(x) / (float)N);
    for (int i = 0; i < N; ++i) w[i] = average + abs(x[i]);
}

template <int N>
INLINE F largest_or_zero(const F* x) {
    F m = {};
    for (int i = 0; i < N; ++i) m = x[i] > m ? x[i] : m;
    return m;
}

// The final codes of a group: rounded with the stored scale and minimum; where the scale is 0, those of the search.
template <int N, int MAX, bool MATRIX>
INLINE void final_codes(const F* x, const ScaleAndMin& fit, F d, F m, I* codes) {
    for (int i = 0; i < N; ++i) codes[i] = clip(nearest_int((x[i] + m) / d), 0, MAX);
    const I none = d == 0.f;
    if (any(none))
        for (int i = 0; i < N; ++i) codes[i] = none ? code_of<MAX, MATRIX>(fit, x[i]) : codes[i];
}

// Packs two-bit codes of 128 elements into 8 words: element 32 k + i is in bits 2 k of byte i.
INLINE void pack_2_bits(const I* codes, I* words) {
    for (int w = 0; w < 8; ++w) {
        I bytes[4];
        for (int j = 0; j < 4; ++j) {
            const I* c = codes + 4 * w + j;
            bytes[j] = c[0] | (c[32] << 2) | (c[64] << 4) | (c[96] << 6);
        }
        words[w] = word(bytes);
    }
}

template <bool MATRIX>
INLINE void quantize_q2_k(const F* x, const F* importance, F, uint8_t* out) {
    constexpr int STEPS = MATRIX ? 36 : 15;
    ScaleAndMin fits[16];
    F scales[16], minima[16], group_weights[16];
    const F variance = MATRIX ? sum_of_squares<256>(x) / 256.f : F{};
    for (int g = 0; g < 16; ++g) {
        F w[16];
        if (MATRIX) {
            importance_weights<16>(x + 16 * g, importance + 16 * g, variance, w);
            group_weights[g] = sum<16>(w);
        } else {
            for (int i = 0; i < 16; ++i) w[i] = abs(x[16 * g + i]);
        }
        fits[g] = fit_scale_and_min<16, 3, STEPS, !MATRIX, MATRIX>(x + 16 * g, w, MATRIX ? -0.9f : -0.5f,
                                                                   MATRIX ? 0.05f : 0.1f);
        scales[g] = fits[g].scale;
        minima[g] = fits[g].minus_min;
    }

    I bytes[16];
    F d, dmin;
    if (MATRIX) {
        I ls[16], lm[16];
        d = fit_positive<16, 15>(scales, group_weights, ls);
        dmin = fit_positive<16, 15>(minima, group_weights, lm);
        for (int g = 0; g < 16; ++g) bytes[g] = (ls[g] | (lm[g] << 4)) & 255;
    } else {
        const F top = largest_or_zero<16>(scales), deepest = largest_or_zero<16>(minima);
        const I some = top > 0.f, minus = deepest > 0.f;
        const F inverse = 15.f / top, inverse_min = 15.f / deepest;
        for (int g = 0; g < 16; ++g) {
            bytes[g] = some ? nearest_int(inverse * scales[g]) & 255 : I{};
            bytes[g] |= minus ? (nearest_int(inverse_min * minima[g]) << 4) & 255 : I{};
        }
        d = top / 15.f;
        dmin = deepest / 15.f;
    }
    const I hd = to_half(d), hmin = to_half(dmin);
    d = from_half(hd);
    dmin = from_half(hmin);

    I words[21];
    for (int w = 0; w < 4; ++w) words[w] = word(bytes + 4 * w);
    for (int half = 0; half < 2; ++half) {
        I codes[128];
        for (int g = 0; g < 8; ++g) {
            const int j = 8 * half + g;
            final_codes<16, 3, MATRIX>(x + 16 * j, fits[j], d * to_float(bytes[j] & 15), dmin * to_float(bytes[j] >> 4),
                                       codes + 16 * g);
        }
        pack_2_bits(codes, words + 4 + 8 * half);
    }
    words[20] = hd | (hmin << 16);
    store_words<21>(words, out, 84);
}

// BITS 4 or 5.
template <int BITS, bool MATRIX>
INLINE void quantize_q45_k(const F* x, const F* importance, F, uint8_t* out) {
    constexpr int MAX = (1 << BITS) - 1, STEPS = MATRIX ? 36 : BITS == 4 ? 20 : 15, CODES = BITS == 4 ? 4 : 12;
    ScaleAndMin fits[8];
    F scales[8], minima[8], group_weights[8];
    const F variance = MATRIX ? 2.f * sum_of_squares<256>(x) / 256.f : F{};
    for (int g = 0; g < 8; ++g) {
        F w[32];
        if (MATRIX) {
            importance_weights<32>(x + 32 * g, importance + 32 * g, variance, w);
            group_weights[g] = sum<32>(w);
        } else {
            magnitude_weights<32>(x + 32 * g, w);
        }
        fits[g] = fit_scale_and_min<32, MAX, STEPS, false, MATRIX>(x + 32 * g, w,
                                                                   MATRIX      ? -0.9f
                                                                   : BITS == 4 ? -1.f
                                                                               : -0.5f,
                                                                   MATRIX ? 0.05f : 0.1f);
        scales[g] = fits[g].scale;
        minima[g] = fits[g].minus_min;
    }

    I ls[8], lm[8];
    F d, dmin;
    if (MATRIX) {
        d = fit_positive<8, 63>(scales, group_weights, ls);
        dmin = fit_positive<8, 63>(minima, group_weights, lm);
    } else {
        const F top = largest_or_zero<8>(scales), deepest = largest_or_zero<8>(minima);
        const F inverse = top > 0.f ? 63.f / top : F{}, inverse_min = deepest > 0.f ? 63.f / deepest : F{};
        for (int g = 0; g < 8; ++g) {
            ls[g] = nearest_int(inverse * scales[g]) & 255;
            lm[g] = nearest_int(inverse_min * minima[g]) & 255;
        }
        d = top / 63.f;
        dmin = deepest / 63.f;
    }
    if (!MATRIX || BITS == 5)
        for (int g = 0; g < 8; ++g) {
            ls[g] = ls[g] > 63 ? splat(63) : ls[g];
            lm[g] = lm[g] > 63 ? splat(63) : lm[g];
        }

    I b[12];
    for (int g = 0; g < 4; ++g) {
        b[g] = (ls[g] | ((ls[g + 4] >> 4) << 6)) & 255;
        b[g + 4] = (lm[g] | ((lm[g + 4] >> 4) << 6)) & 255;
        b[g + 8] = (ls[g + 4] & 15) | ((lm[g + 4] & 15) << 4);
    }
    const I hd = to_half(d), hmin = to_half(dmin);
    d = from_half(hd);
    dmin = from_half(hmin);

    I words[CODES + 32] = {hd | (hmin << 16), word(b), word(b + 4), word(b + 8)};
    I high[32] = {};
    for (int pair = 0; pair < 4; ++pair) {
        I codes[64];
        for (int k = 0; k < 2; ++k) {
            const int g = 2 * pair + k;
            const I s = g < 4 ? b[g] & 63 : (b[g + 4] & 15) | ((b[g - 4] >> 6) << 4);
            const I m = g < 4 ? b[g + 4] & 63 : (b[g + 4] >> 4) | ((b[g] >> 6) << 4);
            final_codes<32, MAX, MATRIX>(x + 32 * g, fits[g], d * to_float(s), dmin * to_float(m), codes + 32 * k);
        }
        for (int w = 0; w < 8; ++w) {
            I bytes[4];
            for (int j = 0; j < 4; ++j) {
                const I first = codes[4 * w + j], second = codes[4 * w + j + 32];
                bytes[j] = (first & 15) | ((second & 15) << 4);
                if (BITS == 5) high[4 * w + j] |= ((first >> 4) << (2 * pair)) | ((second >> 4) << (2 * pair + 1));
            }
            words[CODES + 8 * pair + w] = word(bytes);
        }
    }
    if (BITS == 5)
        for (int w = 0; w < 8; ++w) words[4 + w] = word(high + 4 * w);
    store_words<CODES + 32>(words, out, 4 * (CODES + 32));
}

void q2_k(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    if (importance)
        for_blocks<256, 84, false>(x, importance, rows, cols, out, quantize_q2_k<true>);
    else
        for_blocks<256, 84, false>(x, nullptr, rows, cols, out, quantize_q2_k<false>);
}

template <int BITS>
void q45_k(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    constexpr int BYTES = BITS == 4 ? 144 : 176;
    if (importance)
        for_blocks<256, BYTES, false>(x, importance, rows, cols, out, quantize_q45_k<BITS, true>);
    else
        for_blocks<256, BYTES, false>(x, nullptr, rows, cols, out, quantize_q45_k<BITS, false>);
}

void from_q2_k(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 84, out += 256) {
        const float d = load_half(in + 80), dmin = load_half(in + 82);
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
                for (int side = 0; side < 2; ++side) {
                    const int g = 8 * half + 2 * k + side;
                    const float scale = d * (float)(in[g] & 15), minimum = dmin * (float)(in[g] >> 4);
                    const uint8_t* q = in + 16 + 32 * half + 16 * side;
                    for (int i = 0; i < 16; ++i) out[16 * g + i] = scale * (float)((q[i] >> (2 * k)) & 3) - minimum;
                }
    }
}

template <int BITS>
void from_q45_k(const uint8_t* in, int64_t blocks, float* out) {
    constexpr int BYTES = BITS == 4 ? 144 : 176;
    for (; blocks > 0; --blocks, in += BYTES, out += 256) {
        const float d = load_half(in), dmin = load_half(in + 2);
        const uint8_t *b = in + 4, *high = in + 16, *q = in + BYTES - 128;
        for (int g = 0; g < 8; ++g) {
            const int s = g < 4 ? b[g] & 63 : (b[g + 4] & 15) | ((b[g - 4] >> 6) << 4);
            const int m = g < 4 ? b[g + 4] & 63 : (b[g + 4] >> 4) | ((b[g] >> 6) << 4);
            const float scale = d * (float)s, minimum = dmin * (float)m;
            for (int i = 0; i < 32; ++i) {
                int c = g % 2 ? q[32 * (g / 2) + i] >> 4 : q[32 * (g / 2) + i] & 15;
                if (BITS == 5) c += ((high[i] >> g) & 1) << 4;
                out[32 * g + i] = scale * (float)c - minimum;
            }
        }
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_q2_k) = {KERNELS_ISA::q2_k, KERNELS_ISA::from_q2_k};
KERNEL_TABLE_HERE(BlockKernel, gguf_q4_k) = {KERNELS_ISA::q45_k<4>, KERNELS_ISA::from_q45_k<4>};
KERNEL_TABLE_HERE(BlockKernel, gguf_q5_k) = {KERNELS_ISA::q45_k<5>, KERNELS_ISA::from_q45_k<5>};
