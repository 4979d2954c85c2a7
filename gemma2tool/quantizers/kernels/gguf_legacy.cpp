// Q4_0, Q8_0
#include "gguf.hpp"
#include "gguf_blocks.hpp"

namespace KERNELS_ISA {
namespace {

// The element of largest magnitude, the first of equals, with its sign.
template <int N>
INLINE F signed_max(const F* x) {
    F amax = {}, m = {};
    for (int i = 0; i < N; ++i) {
        const F a = abs(x[i]);
        m = amax < a ? x[i] : m;
        amax = amax < a ? a : amax;
    }
    return m;
}

INLINE F inverse_or_zero(F d) { return d != 0.f ? 1.f / d : F{}; }
// A float to int8_t, as x86 converts: through int32_t, whose low byte is kept.
INLINE I to_int8(F x) { return (truncate(x) << 24) >> 24; }

void quantize_q4_0(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<32, 18, true>(x, importance, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) __attribute__((always_inline)) {
        const F d = signed_max<32>(x) / -8.f, id = inverse_or_zero(d);
        I words[4];
        for (int w = 0; w < 4; ++w) {
            I bytes[4];
            for (int j = 0; j < 4; ++j) {
                I low = to_int8(x[4 * w + j] * id + 8.5f), high = to_int8(x[4 * w + j + 16] * id + 8.5f);
                low = low > 15 ? splat(15) : low;
                high = high > 15 ? splat(15) : high;
                bytes[j] = (low | (high << 4)) & 255;
            }
            words[w] = word(bytes);
        }
        store_shorts(to_half(d), out, 18);
        store_words<4>(words, out + 2, 18);
    });
}

void dequantize_q4_0(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 18, out += 32) {
        const float d = load_half(in);
        for (int j = 0; j < 16; ++j) {
            out[j] = (float)((in[2 + j] & 15) - 8) * d;
            out[j + 16] = (float)((in[2 + j] >> 4) - 8) * d;
        }
    }
}


void quantize_q8_0(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<32, 34, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) __attribute__((always_inline)) {
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

KERNEL_TABLE_HERE(BlockKernel, gguf_q4_0) = {KERNELS_ISA::quantize_q4_0, KERNELS_ISA::dequantize_q4_0};
KERNEL_TABLE_HERE(BlockKernel, gguf_q8_0) = {KERNELS_ISA::quantize_q8_0, KERNELS_ISA::dequantize_q8_0};
