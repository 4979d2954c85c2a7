// IQ4_NL, IQ4_XS: four-bit codes into a table of 16 unevenly spaced values.
//
// Layouts (bytes): IQ4_NL: half d, 16 of codes (element j low, j + 16 high). IQ4_XS: half d, 16 bits with the high two
// bits of 8 group scales, 4 with their low nibbles, 128 of codes, 16 a group as in IQ4_NL.
#include "gguf.hpp"
#include "gguf_blocks.hpp"
#include "gguf_search.hpp"

namespace KERNELS_ISA {
namespace {

constexpr float VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The value nearest to x; the upper of two that are equally near.
INLINE F nearest_value(F x) {
    const F twice = x + x;
    F v = splat(VALUES[0]);
    for (int j = 1; j < 16; ++j) v = twice >= VALUES[j - 1] + VALUES[j] ? splat(VALUES[j]) : v;
    return v;
}
INLINE I nearest_index(F x) {
    const F twice = x + x;
    I index = {};
    for (int j = 1; j < 16; ++j) index -= twice >= VALUES[j - 1] + VALUES[j];
    return index;
}

// The scale of a group of 32.
INLINE F fit_group(const F* x, const F* w) {
    const F m = signed_max<32>(x);
    const I dead = abs(m) < GROUP_EPSILON;
    const F largest = dead ? splat(1.f) : m;
    F scale = {}, best = {};
    const auto attempt = [&](F inverse, bool first) __attribute__((always_inline)) {
        F sum_qx = {}, sum_q2 = {};
        for (int i = 0; i < 32; ++i) {
            const F q = nearest_value(inverse * x[i]), wq = w[i] * q;
            sum_qx += wq * x[i];
            sum_q2 += wq * q;
        }
        const F d = sum_qx / sum_q2;
        const I better = first ? sum_q2 > 0.f : (sum_q2 > 0.f) & (sum_qx * sum_qx > best * sum_q2);
        scale = better ? d : scale;
        best = better ? d * sum_qx : best;
    };
    attempt(1.f / (-largest / VALUES[0]), true);
    for (int k = -7; k <= 7; ++k) attempt((float)(k - 127) / largest, false);
    return dead ? F{} : scale;
}

INLINE void weights(const F* x, const F* importance, F variance, F* w) {
    for (int i = 0; i < 32; ++i) w[i] = importance ? importance[i] * sqrt(variance + x[i] * x[i]) : x[i] * x[i];
}

INLINE void pack_group(const F* x, F inverse, I* words) {
    for (int k = 0; k < 4; ++k) {
        I bytes[4];
        for (int j = 0; j < 4; ++j)
            bytes[j] = nearest_index(inverse * x[4 * k + j]) | (nearest_index(inverse * x[4 * k + j + 16]) << 4);
        words[k] = word(bytes);
    }
}

void iq4_nl(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<32, 18, false>(x, importance, rows, cols, out, [](const F* x, const F* importance, F, uint8_t* out) {
        F w[32];
        weights(x, importance, sum_of_squares<32>(x) * (2.f / 32), w);
        const F d = fit_group(x, w);
        I words[4];
        pack_group(x, inverse_or_zero(d), words);
        store_shorts(to_half(d), out, 18);
        store_words<4>(words, out + 2, 18);
    });
}

void iq4_xs(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<256, 136, false>(x, importance, rows, cols, out, [](const F* x, const F* importance, F, uint8_t* out) {
        const F variance = sum_of_squares<256>(x) * (2.f / 256);
        F scales[8];
        for (int g = 0; g < 8; ++g) {
            F w[32];
            weights(x + 32 * g, importance ? importance + 32 * g : nullptr, variance, w);
            scales[g] = fit_group(x + 32 * g, w);
        }
        const F d = -signed_max<8>(scales) / 32.f, inverse = inverse_or_zero(d);
        I words[34] = {to_half(d)};
        for (int g = 0; g < 8; ++g) {
            const I l = clip(nearest_int(inverse * scales[g]), -32, 31), u = l + 32;
            words[0] |= (u >> 4) << (16 + 2 * g);
            words[1] |= (u & 15) << (4 * g);
            pack_group(x + 32 * g, inverse_or_zero(d * to_float(l)), words + 2 + 4 * g);
        }
        store_words<34>(words, out, 136);
    });
}

INLINE void unpack_group(const uint8_t* q, float d, float* out) {
    for (int j = 0; j < 16; ++j) {
        out[j] = d * VALUES[q[j] & 15];
        out[j + 16] = d * VALUES[q[j] >> 4];
    }
}

void from_iq4_nl(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 18, out += 32) unpack_group(in + 2, load_half(in), out);
}

void from_iq4_xs(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 136, out += 256) {
        const float d = load_half(in);
        const int high = in[2] | (in[3] << 8);
        for (int g = 0; g < 8; ++g) {
            const int l = ((in[4 + g / 2] >> (4 * (g % 2))) & 15) | (((high >> (2 * g)) & 3) << 4);
            unpack_group(in + 8 + 16 * g, d * (float)(l - 32), out + 32 * g);
        }
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_iq4_nl) = {KERNELS_ISA::iq4_nl, KERNELS_ISA::from_iq4_nl};
KERNEL_TABLE_HERE(BlockKernel, gguf_iq4_xs) = {KERNELS_ISA::iq4_xs, KERNELS_ISA::from_iq4_xs};
