// TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0: types that round to nearest and ignore importance.
//
// Layouts (bytes): TQ1_0: 48 of five trits, 4 of four trits, half d. TQ2_0: 64 of four 2-bit codes, half d. MXFP4:
// exponent, 16 of four-bit floats (element j low, j + 16 high). NVFP4: 4 scales of 16 elements each, for each of them 8
// of four-bit floats (element j low, j + 8 high). Q1_0: half d, 16 of eight signs. Q2_0: half d, 16 of four 2-bit codes.
#include "gguf.hpp"
#include "gguf_blocks.hpp"
#include "gguf_search.hpp"

namespace KERNELS_ISA {
namespace {

template <int N>
INLINE F largest_magnitude(const F* x) {
    F m = {};
    for (int i = 0; i < N; ++i) m = max(m, abs(x[i]));
    return m;
}

// A value outside the range of int has a low byte of 0, both in ggml's 64-bit lroundf and here.
INLINE I trit(F x) { return round_away(x) + 1; }

// A byte of trits, the first most significant, as the base-3 fraction that repeated multiplication by 3 unpacks.
INLINE I fraction(I q) { return ((q & 255) * 256 + 242) / 243; }

void tq1_0(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<256, 54, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) {
        const F d = largest_magnitude<256>(x), id = inverse_or_zero(d);
        I bytes[52], words[13];
        // five rows of 32, five of 16, four of 4
        const auto pack = [&](const F* x, int width, int count, I* to) __attribute__((always_inline)) {
            for (int m = 0; m < width; ++m) {
                I q = {};
                for (int n = 0; n < 5; ++n) q = q * 3 + (n < count ? trit(x[m + n * width] * id) : I{});
                to[m] = fraction(q) & 255;
            }
        };
        pack(x, 32, 5, bytes);
        pack(x + 160, 16, 5, bytes + 32);
        pack(x + 240, 4, 4, bytes + 48);
        for (int w = 0; w < 13; ++w) words[w] = word(bytes + 4 * w);
        store_words<13>(words, out, 54);
        store_shorts(to_half(d), out + 52, 54);
    });
}

void tq2_0(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<256, 66, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) {
        const F d = largest_magnitude<256>(x), id = inverse_or_zero(d);
        I words[16];
        for (int w = 0; w < 16; ++w) {
            I bytes[4];
            for (int j = 0; j < 4; ++j) {
                const F* of = x + 128 * (w / 8) + 4 * (w % 8) + j;
                bytes[j] = I{};
                for (int n = 0; n < 4; ++n) bytes[j] |= (trit(of[32 * n] * id) & 3) << (2 * n);
            }
            words[w] = word(bytes);
        }
        store_words<16>(words, out, 66);
        store_shorts(to_half(d), out + 64, 66);
    });
}

// Twice the sixteen values of a four-bit float.
constexpr float TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Half of 2^(e - 127) for a byte e: the scale of TWICE.
INLINE F half_power(I e) { return floats(e < 2 ? splat(0x00200000) << e : (e - 1) << 23); }

// The code of the nearest value; of two equally near magnitudes the smaller, of the two zeros the positive.
INLINE I nearest_float4(F x, F d) {
    const F a = abs(x);
    I best = {};
    F least = a;
    for (int k = 1; k < 8; ++k) {
        const F error = abs(TWICE[k] * d - a);
        const I better = error < least;
        best = better ? splat(k) : best;
        least = better ? error : least;
    }
    return best | ((best != 0) & (x < 0.f) & 8);
}

// floor(log2f(x)) of positive x. Just below a power of two log2f rounds up to it; only there the library is called.
INLINE I floor_log2(F x) {
    const I subnormal = x < 0x1p-126f;
    const I u = bits(subnormal ? x * 0x1p24f : x);
    I exponent = (u >> 23) - 127 - (subnormal & 24);
    const I close = (u & 0x007fffff) >= 0x007fff80;
    if (any(close))
        for (int l = 0; l < LANES; ++l)
            if (close[l]) exponent[l] = (int32_t)__builtin_floorf(__builtin_log2f(x[l]));
    return exponent;
}

void mxfp4(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<32, 17, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) {
        const F largest = largest_magnitude<32>(x);
        const I e = largest > 0.f ? (floor_log2(largest) - 2 + 127) & 255 : I{};
        const F d = half_power(e);
        I words[4];
        for (int w = 0; w < 4; ++w) {
            I bytes[4];
            for (int j = 0; j < 4; ++j)
                bytes[j] = nearest_float4(x[4 * w + j], d) | (nearest_float4(x[4 * w + j + 16], d) << 4);
            words[w] = word(bytes);
        }
        for (int l = 0; l < LANES; ++l) out[17 * l] = (uint8_t)e[l];
        store_words<4>(words, out + 1, 17);
    });
}

// A positive float8 e4m3 as ggml rounds to it: half away from zero, 448 from 256 on.
INLINE I to_scale_byte(F x) {
    const I u = bits(min(x, splat(448.f)));
    const I normal = (u >> 20) - (120 << 3) + (u >> 19 & 1);
    const I subnormal = truncate(x * 512.f + 0.5f);
    const I byte = u < 0x3c800000 ? (subnormal < 7 ? subnormal : splat(7)) : normal;
    return byte >= 120 ? splat(126) : byte;
}

// Half of the value of a scale's byte; its sign is ignored, and 127 is 0.
struct ScaleValues {
    float half[256];
};
constexpr ScaleValues scale_values() {
    ScaleValues values = {};
    for (int byte = 0; byte < 256; ++byte) {
        const int exponent = byte >> 3 & 15, mantissa = byte & 7;
        float value = exponent ? 8 + mantissa : mantissa;  // times 2^-10 is half of the smallest normal's binade
        for (int e = 1; e < exponent; ++e) value *= 2;
        values.half[byte] = byte == 127 ? 0 : value * 0x1p-10f;
    }
    return values;
}
constexpr ScaleValues SCALES = scale_values();

void nvfp4(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<64, 36, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) {
        I words[9], scales[4];
        for (int s = 0; s < 4; ++s) {
            const F* part = x + 16 * s;
            scales[s] = to_scale_byte(largest_magnitude<16>(part) / 6.f);
            F d;
            for (int l = 0; l < LANES; ++l) d[l] = SCALES.half[scales[s][l]];
            for (int w = 0; w < 2; ++w) {
                I bytes[4];
                for (int j = 0; j < 4; ++j)
                    bytes[j] = nearest_float4(part[4 * w + j], d) | (nearest_float4(part[4 * w + j + 8], d) << 4);
                words[1 + 2 * s + w] = word(bytes);
            }
        }
        words[0] = word(scales);
        store_words<9>(words, out, 36);
    });
}

void q1_0(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<128, 18, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) {
        F total = {};
        I words[4] = {};
        for (int i = 0; i < 128; ++i) {
            total += abs(x[i]);
            words[i / 32] |= (x[i] >= 0.f) & (int32_t)(1u << (i % 32));
        }
        store_shorts(to_half(total / 128.f), out, 18);
        store_words<4>(words, out + 2, 18);
    });
}

void q2_0(const float* x, const float*, int64_t rows, int64_t cols, uint8_t* out) {
    for_blocks<64, 18, false>(x, nullptr, rows, cols, out, [](const F* x, const F*, F, uint8_t* out) {
        const F d = largest_magnitude<64>(x), id = inverse_or_zero(d);
        I words[4] = {};
        for (int i = 0; i < 64; ++i) {
            const I q = trit(x[i] * id), low = q < 0 ? I{} : q;
            words[i / 16] |= (low > 3 ? splat(3) : low) << (2 * (i % 16));
        }
        store_shorts(to_half(d), out, 18);
        store_words<4>(words, out + 2, 18);
    });
}

void from_tq1_0(const uint8_t* in, int64_t blocks, float* out) {
    constexpr uint8_t POWERS[5] = {1, 3, 9, 27, 81};
    for (; blocks > 0; --blocks, in += 54, out += 256) {
        const float d = load_half(in + 52);
        const auto unpack = [&](const uint8_t* q, int width, int count, float* to) __attribute__((always_inline)) {
            for (int n = 0; n < count; ++n)
                for (int m = 0; m < width; ++m) {
                    const uint8_t f = (uint8_t)(q[m] * POWERS[n]);
                    to[n * width + m] = (float)(((f * 3) >> 8) - 1) * d;
                }
        };
        unpack(in, 32, 5, out);
        unpack(in + 32, 16, 5, out + 160);
        unpack(in + 48, 4, 4, out + 240);
    }
}

void from_tq2_0(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 66, out += 256) {
        const float d = load_half(in + 64);
        for (int half = 0; half < 2; ++half)
            for (int n = 0; n < 4; ++n)
                for (int m = 0; m < 32; ++m)
                    out[128 * half + 32 * n + m] = (float)(((in[32 * half + m] >> (2 * n)) & 3) - 1) * d;
    }
}

void from_mxfp4(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 17, out += 32) {
        const uint32_t e = in[0], u = e < 2 ? 0x00200000u << e : (e - 1) << 23;
        float d;
        __builtin_memcpy(&d, &u, 4);
        for (int j = 0; j < 16; ++j) {
            out[j] = TWICE[in[1 + j] & 15] * d;
            out[j + 16] = TWICE[in[1 + j] >> 4] * d;
        }
    }
}

void from_nvfp4(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 36)
        for (int s = 0; s < 4; ++s, out += 16) {
            const float d = SCALES.half[in[s]];
            for (int j = 0; j < 8; ++j) {
                const uint8_t pair = in[4 + 8 * s + j];
                out[j] = TWICE[pair & 15] * d;
                out[j + 8] = TWICE[pair >> 4] * d;
            }
        }
}

void from_q1_0(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 18, out += 128) {
        const float d = load_half(in);
        for (int i = 0; i < 128; ++i) out[i] = in[2 + i / 8] >> (i % 8) & 1 ? d : -d;
    }
}

void from_q2_0(const uint8_t* in, int64_t blocks, float* out) {
    for (; blocks > 0; --blocks, in += 18, out += 64) {
        const float d = load_half(in);
        for (int i = 0; i < 64; ++i) out[i] = (float)((in[2 + i / 4] >> (2 * (i % 4)) & 3) - 1) * d;
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BlockKernel, gguf_tq1_0) = {KERNELS_ISA::tq1_0, KERNELS_ISA::from_tq1_0};
KERNEL_TABLE_HERE(BlockKernel, gguf_tq2_0) = {KERNELS_ISA::tq2_0, KERNELS_ISA::from_tq2_0};
KERNEL_TABLE_HERE(BlockKernel, gguf_mxfp4) = {KERNELS_ISA::mxfp4, KERNELS_ISA::from_mxfp4};
KERNEL_TABLE_HERE(BlockKernel, gguf_nvfp4) = {KERNELS_ISA::nvfp4, KERNELS_ISA::from_nvfp4};
KERNEL_TABLE_HERE(BlockKernel, gguf_q1_0) = {KERNELS_ISA::q1_0, KERNELS_ISA::from_q1_0};
KERNEL_TABLE_HERE(BlockKernel, gguf_q2_0) = {KERNELS_ISA::q2_0, KERNELS_ISA::from_q2_0};
