// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 with one scale, and in the _1 types a minimum.
//
// Layouts (bytes): half scale, half minimum (_1), 32 high bits (Q5), then the codes; the low code of a byte is element
// j, the high one element j + 16.
#include "gguf.hpp"
#include "gguf_blocks.hpp"
#include "gguf_search.hpp"

namespace KERNELS_ISA {
namespace {

// BITS 4 or 5; with a minimum (_1) or without (_0).
template <int BITS, bool MIN>
struct Layout {
    static constexpr int MAX = (1 << BITS) - 1;
    static constexpr int HALF = 1 << (BITS - 1);     // the code of 0 in the _0 types
    static constexpr int WORDS = BITS == 5 ? 5 : 4;  // high bits and codes
    static constexpr int HEADER = MIN ? 4 : 2, BYTES = HEADER + 4 * WORDS;
};

template <int BITS, bool MIN>
INLINE void store_block(const I* codes, F scale, F minimum, uint8_t* out) {
    using L = Layout<BITS, MIN>;
    I words[L::WORDS] = {};
    for (int w = 0; w < 4; ++w) {
        I bytes[4];
        for (int j = 0; j < 4; ++j) bytes[j] = (codes[4 * w + j] & 15) | ((codes[4 * w + j + 16] & 15) << 4);
        words[L::WORDS - 4 + w] = word(bytes);
    }
    if (BITS == 5)
        for (int i = 0; i < 32; ++i) words[0] |= ((codes[i] >> 4) & 1) << i;
    store_shorts(to_half(scale), out, L::BYTES);
    if (MIN) store_shorts(to_half(minimum), out + 2, L::BYTES);
    store_words<L::WORDS>(words, out + L::HEADER, L::BYTES);
}

// Without importance: the scale that maps the extreme value to an end of the range.
template <int BITS, bool MIN>
INLINE void round_block(const F* x, uint8_t* out) {
    using L = Layout<BITS, MIN>;
    // a float to int8_t or uint8_t as on x86: converted to an int, of which the low byte is kept
    I codes[32];
    if (MIN) {
        F low = splat(3.40282347e+38f), high = -low;
        for (int i = 0; i < 32; ++i) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
        }
        const F d = (high - low) / (float)L::MAX, id = inverse_or_zero(d);
        for (int i = 0; i < 32; ++i) {
            const I c = truncate((x[i] - low) * id + 0.5f);
            if (BITS == 4) {
                const I s = (c << 24) >> 24;
                codes[i] = s > L::MAX ? splat(L::MAX) : s;
            } else {
                codes[i] = c;
            }
        }
        store_block<BITS, MIN>(codes, d, low, out);
    } else {
        const F d = signed_max<32>(x) / -(float)L::HALF, id = inverse_or_zero(d);
        for (int i = 0; i < 32; ++i) {
            const I c = (truncate(x[i] * id + (L::HALF + 0.5f)) << 24) >> 24;
            codes[i] = c > L::MAX ? splat(L::MAX) : c;
        }
        store_block<BITS, MIN>(codes, d, d, out);
    }
}

template <int BITS, bool MIN>
INLINE void search_block(const F* x, const F* importance, F row_mean, uint8_t* out) {
    using L = Layout<BITS, MIN>;
    F w[32];
    for (int i = 0; i < 32; ++i) w[i] = importance[i] * sqrt(row_mean + x[i] * x[i]);
    I codes[32];
    if (MIN) {
        const ScaleAndMin fit = fit_scale_and_min<32, L::MAX, 36, false, true>(x, w, -0.9f, 0.05f);
        for (int i = 0; i < 32; ++i) codes[i] = code_of<L::MAX, true>(fit, x[i]);
        store_block<BITS, MIN>(codes, fit.scale, -fit.minus_min, out);
    } else {
        const Scale fit = fit_scale<32, L::HALF>(x, w);
        for (int i = 0; i < 32; ++i) codes[i] = code_of<L::HALF>(fit, x[i]);
        store_block<BITS, MIN>(codes, fit.scale, fit.scale, out);
    }
}

template <int BITS, bool MIN>
void quantize(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    constexpr int BYTES = Layout<BITS, MIN>::BYTES;
    if (importance)
        for_blocks<32, BYTES, true>(
            x, importance, rows, cols, out,
            [](const F* x, const F* w, F row_mean, uint8_t* out) { search_block<BITS, MIN>(x, w, row_mean, out); });
    else
        for_blocks<32, BYTES, false>(x, nullptr, rows, cols, out,
                                     [](const F* x, const F*, F, uint8_t* out) { round_block<BITS, MIN>(x, out); });
}

template <int BITS, bool MIN>
void dequantize(const uint8_t* in, int64_t blocks, float* out) {
    using L = Layout<BITS, MIN>;
    for (; blocks > 0; --blocks, in += L::BYTES, out += 32) {
        const float d = load_half(in), m = MIN ? load_half(in + 2) : 0.f;
        uint32_t high = 0;
        if (BITS == 5) __builtin_memcpy(&high, in + L::HEADER, 4);
        uint8_t codes[16];  // a copy, so that `out` cannot alias it
        __builtin_memcpy(codes, in + L::BYTES - 16, 16);
        for (int half = 0; half < 2; ++half)
            for (int j = 0; j < 16; ++j) {
                int c = (codes[j] >> (4 * half)) & 15;
                if (BITS == 5) c |= (int)((high >> (j + 16 * half)) & 1) << 4;
                out[j + 16 * half] = MIN ? (float)c * d + m : (float)(c - L::HALF) * d;
            }
    }
}

void quantize_q8_0(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<32, 34, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) {
        F amax = {};
        for (int i = 0; i < 32; ++i) amax = max(amax, abs(x[i]));
        const F d = amax / 127.f, id = inverse_or_zero(d);
        I words[8];
        for (int w = 0; w < 8; ++w) {
            I bytes[4];
            for (int j = 0; j < 4; ++j) bytes[j] = round_away(x[4 * w + j] * id) & 255;
            words[w] = word(bytes);
        }
        store_shorts(to_half(d), out, 34);
        store_words<8>(words, out + 2, 34);
    });
}

void dequantize_q8_0(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 34, out += 32) {
        const float d = load_half(in);
        for (int j = 0; j < 32; ++j) out[j] = (float)(int8_t)in[2 + j] * d;
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_q4_0) = {KERNELS_ISA::quantize<4, false>, KERNELS_ISA::dequantize<4, false>};
KERNEL_TABLE_HERE(BlockKernel, gguf_q4_1) = {KERNELS_ISA::quantize<4, true>, KERNELS_ISA::dequantize<4, true>};
KERNEL_TABLE_HERE(BlockKernel, gguf_q5_0) = {KERNELS_ISA::quantize<5, false>, KERNELS_ISA::dequantize<5, false>};
KERNEL_TABLE_HERE(BlockKernel, gguf_q5_1) = {KERNELS_ISA::quantize<5, true>, KERNELS_ISA::dequantize<5, true>};
KERNEL_TABLE_HERE(BlockKernel, gguf_q8_0) = {KERNELS_ISA::quantize_q8_0, KERNELS_ISA::dequantize_q8_0};
