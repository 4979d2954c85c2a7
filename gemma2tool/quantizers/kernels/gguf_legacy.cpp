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

// Without importance the codes of consecutive weights are made together, a block after the other; only the scales of
// LANES blocks are computed in lanes.

// The least and the greatest weight of each of `count` blocks, block l in lane l. NaN does not count.
struct Extremes {
    F low, high;
};
INLINE Extremes extremes(const float* x, int count) {
    F low[LANES], high[LANES];
    for (int l = 0; l < LANES; ++l) {  // lanes past the end repeat the last block
        const float* block = x + 32 * (l < count ? l : count - 1);
        low[l] = splat(3.40282347e+38f), high[l] = -low[l];
        for (int i = 0; i < 32; i += LANES) {
            low[l] = min(load(block + i), low[l]);
            high[l] = max(load(block + i), high[l]);
        }
    }
    transpose(low);
    transpose(high);
    for (int i = 1; i < LANES; ++i) {
        low[0] = min(low[i], low[0]);
        high[0] = max(high[i], high[0]);
    }
    return {low[0], high[0]};
}

// Replaces lane l of `value`, for every set bit l of `lanes`, by the first weight of block l whose magnitude is that.
INLINE F first_of_magnitude(F value, uint32_t lanes, const float* x, int count) {
    for (int l = 0; l < count; ++l)
        if (lanes >> l & 1)
            for (int i = 0; i < 32; ++i)
                if (abs(x[32 * l + i]) == abs(value[l])) {
                    value[l] = x[32 * l + i];
                    break;
                }
    return value;
}

// The scale that maps the extreme value to an end of the range.
template <int BITS, bool MIN>
INLINE void round_blocks(const float* x, int64_t blocks, uint8_t* out) {
    using L = Layout<BITS, MIN>;
    for (; blocks > 0; blocks -= LANES, x += 32 * LANES, out += L::BYTES * LANES) {
        const int count = blocks < LANES ? (int)blocks : LANES;
        const auto [low, high] = extremes(x, count);
        F d, minimum = low;
        if (MIN) {
            const I zero = low == 0.f;  // of either sign
            if (any(zero)) minimum = first_of_magnitude(low, lane_bits(zero), x, count);
            d = (high - minimum) / (float)L::MAX;
        } else {
            F extreme = high > -low ? high : low;
            const I both = high == -low;
            if (any(both)) extreme = first_of_magnitude(extreme, lane_bits(both), x, count);
            d = (extreme == 0.f ? F{} : extreme) / -(float)L::HALF;
        }
        const F id = inverse_or_zero(d);
        const I scales = to_half(d), minima = to_half(minimum);
        for (int l = 0; l < count; ++l) {
            uint8_t* block = out + L::BYTES * l;
            const uint16_t header[2] = {(uint16_t)scales[l], (uint16_t)minima[l]};
            __builtin_memcpy(block, header, L::HEADER);
            // a float to int8_t or uint8_t as on x86: converted to an int, of which the low byte is kept
            Bytes codes[2];
            for (int half = 0; half < 2; ++half) {
                I c[16 / LANES];
                for (int i = 0; i < 16; i += LANES) {
                    const F v = load(x + 32 * l + 16 * half + i);
                    c[i / LANES] = MIN ? truncate((v - minimum[l]) * id[l] + 0.5f)
                                       : truncate(v * id[l] + (L::HALF + 0.5f));
                }
                codes[half] = low_bytes(c);
                if (BITS == 4 || !MIN) codes[half] = codes[half] > L::MAX ? Bytes{} + L::MAX : codes[half];
            }
            const Bytes packed = (codes[0] & 15) | shifted_left<4>(codes[1] & 15);
            __builtin_memcpy(block + L::BYTES - 16, &packed, 16);
            if (BITS == 5) {
                const uint32_t tops = sign_bits(shifted_left<3>(codes[0])) | sign_bits(shifted_left<3>(codes[1])) << 16;
                __builtin_memcpy(block + L::HEADER, &tops, 4);
            }
        }
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
    if (importance)
        for_blocks<32, Layout<BITS, MIN>::BYTES, true>(
            x, importance, rows, cols, out,
            [](const F* x, const F* w, F row_mean, uint8_t* out) { search_block<BITS, MIN>(x, w, row_mean, out); });
    else
        round_blocks<BITS, MIN>(x, rows * cols / 32, out);
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

// The largest magnitude of each of `count` blocks, block l in lane l, as ggml's comparisons find it: NaN is forgotten
// with the next weight.
INLINE F largest_magnitudes(const float* x, int count) {
    F largest[LANES];
    I nan = {};
    for (int l = 0; l < LANES; ++l) {
        const float* block = x + 32 * (l < count ? l : count - 1);
        largest[l] = F{};
        for (int i = 0; i < 32; i += LANES) {
            const F v = load(block + i);
            largest[l] = max(abs(v), largest[l]);
            nan |= v != v;
        }
    }
    transpose(largest);
    for (int i = 1; i < LANES; ++i) largest[0] = max(largest[i], largest[0]);
    if (any(nan))
        for (int l = 0; l < count; ++l) {
            float amax = 0.f;
            for (int i = 0; i < 32; ++i) {
                const float a = abs(x[32 * l + i]);
                amax = amax > a ? amax : a;
            }
            largest[0][l] = amax;
        }
    return largest[0];
}

void quantize_q8_0(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for (int64_t blocks = rows * cols / 32; blocks > 0; blocks -= LANES, x += 32 * LANES, out += 34 * LANES) {
        const int count = blocks < LANES ? (int)blocks : LANES;
        const F d = largest_magnitudes(x, count) / 127.f, id = inverse_or_zero(d);
        const I scales = to_half(d);
        for (int l = 0; l < count; ++l) {
            const uint16_t scale = (uint16_t)scales[l];
            __builtin_memcpy(out + 34 * l, &scale, 2);
            for (int half = 0; half < 2; ++half) {
                I c[16 / LANES];
                for (int i = 0; i < 16; i += LANES) c[i / LANES] = round_away(load(x + 32 * l + 16 * half + i) * id[l]);
                const Bytes codes = low_bytes(c);
                __builtin_memcpy(out + 34 * l + 2 + 16 * half, &codes, 16);
            }
        }
    }
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
