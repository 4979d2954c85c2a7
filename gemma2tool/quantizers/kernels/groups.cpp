// Plain loops over the values of a group, which the compiler vectorizes.
#include "groups.hpp"

#include "rounding.hpp"

namespace KERNELS_ISA {
namespace {

// Calls f(first value, count, group) for every group.
template <class Function>
INLINE void for_groups(const Grouped& in, Function f) {
    size_t group = 0;
    for (size_t row = 0; row < in.rows; ++row)
        for (size_t first = 0; first < in.columns; first += in.width, ++group)
            f(row * in.columns + first, in.columns - first < in.width ? in.columns - first : in.width, group);
}

// Floats as integers in the same order.
INLINE int32_t ordered(uint32_t u) { return (int32_t)(u ^ ((uint32_t)((int32_t)u >> 31) & 0x7fffffff)); }

template <class Bits>
INLINE void ranges_of(const Grouped& in, float* low, float* high) {
    const Bits* x = (const Bits*)in.x;
    for_groups(in, [=](size_t first, size_t count, size_t group) __attribute__((always_inline)) {
        int32_t least = INT32_MAX, most = INT32_MIN;
        for (size_t i = 0; i < count; ++i) {
            const int32_t v = ordered(bits_at(x, first + i));
            least = v < least ? v : least;
            most = v > most ? v : most;
        }
        low[group] = float_of((uint32_t)ordered((uint32_t)least));
        high[group] = float_of((uint32_t)ordered((uint32_t)most));
    });
}

void ranges(const Grouped& in, float* low, float* high) {
    if (in.bf16)
        ranges_of<uint16_t>(in, low, high);
    else
        ranges_of<uint32_t>(in, low, high);
}

template <Arithmetic arithmetic>
INLINE float in_arithmetic(float x) {
    if (arithmetic == Arithmetic::bfloat16) return through_bfloat16(bits_of(x));
    if (arithmetic == Arithmetic::float16) return through_half(bits_of(x));
    return x;
}

INLINE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

// The integer nearest to x, |x| <= 448, in the low bits of a byte. Clamping to integer limits before
// rounding is the same as after it.
INLINE uint8_t nearest_byte(float x) { return (uint8_t)bits_of(x + ROUNDER); }

// float4_e2m1: a sign and the index of 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Of two equally near values, MLX takes the smaller
// and compressed-tensors the one with an even index. Only the latter has a negative zero. In MLX, what has no distance
// from any value (infinity and NaN: a scale of zero) is 0.
template <bool even>
INLINE uint8_t to_float4(float x) {
    const float a = __builtin_fabsf(x);
    const bool odd = even ? a >= 0.75f : a > 0.75f, third = even ? a >= 1.75f : a > 1.75f, fifth = even ? a >= 3.5f : a > 3.5f;
    const int32_t code = (a > 0.25f) + odd + (a > 1.25f) + third + (a > 2.5f) + fifth + (a > 5.f);
    const int32_t sign = (x < 0.f) << 3;
    if (even) return (uint8_t)(code | sign);
    return (uint8_t)(code && a < __builtin_inff() ? code | sign : 0);
}

template <class Bits, CodeRule rule, Arithmetic arithmetic>
INLINE void codes_of(const Grouped& in, const float* scales, const float* offsets, float low, float high, uint8_t* out) {
    const Bits* x = (const Bits*)in.x;
    for_groups(in, [=](size_t first, size_t count, size_t group) __attribute__((always_inline)) {
        const float scale = scales[group], inverse = 1.f / scale, offset = offsets ? offsets[group] : 0.f;
        const float from = low - offset, to = high - offset;
        for (size_t i = 0; i < count; ++i) {
            const float v = float_of(bits_at(x, first + i));
            if (rule == CodeRule::divide || rule == CodeRule::float8) {
                const float scaled = in_arithmetic<arithmetic>(in_arithmetic<arithmetic>(v / scale) + offset);
                const float clamped = clamp(scaled, low, high);
                out[first + i] = rule == CodeRule::float8 ? to_float8(clamped) : nearest_byte(clamped);
            } else if (rule == CodeRule::float4 || rule == CodeRule::float4_even) {
                out[first + i] = to_float4<rule == CodeRule::float4_even>(in_arithmetic<arithmetic>(v / scale));
            } else if (rule == CodeRule::reciprocal) {
                out[first + i] = nearest_byte(clamp(v * inverse, low, high));
            } else if (rule == CodeRule::from_bias) {
                out[first + i] = nearest_byte(clamp((v - offset) / scale, low, high));
            } else {
                out[first + i] = (uint8_t)(nearest_byte(clamp(v / scale, from, to)) + (uint8_t)(int32_t)offset);
            }
        }
    });
}

template <class Bits, CodeRule rule>
INLINE void codes_in(Arithmetic arithmetic, const Grouped& in, const float* scales, const float* offsets, float low, float high,
                     uint8_t* out) {
    if (arithmetic == Arithmetic::float32) codes_of<Bits, rule, Arithmetic::float32>(in, scales, offsets, low, high, out);
    if (arithmetic == Arithmetic::bfloat16) codes_of<Bits, rule, Arithmetic::bfloat16>(in, scales, offsets, low, high, out);
    if (arithmetic == Arithmetic::float16) codes_of<Bits, rule, Arithmetic::float16>(in, scales, offsets, low, high, out);
}

template <class Bits>
void codes_by(CodeRule rule, Arithmetic arithmetic, const Grouped& in, const float* scales, const float* offsets, float low,
              float high, uint8_t* out) {
    constexpr Arithmetic f32 = Arithmetic::float32;
    switch (rule) {
        case CodeRule::divide: return codes_in<Bits, CodeRule::divide>(arithmetic, in, scales, offsets, low, high, out);
        case CodeRule::float8: return codes_in<Bits, CodeRule::float8>(arithmetic, in, scales, offsets, low, high, out);
        case CodeRule::reciprocal: return codes_of<Bits, CodeRule::reciprocal, f32>(in, scales, offsets, low, high, out);
        case CodeRule::from_bias: return codes_of<Bits, CodeRule::from_bias, f32>(in, scales, offsets, low, high, out);
        case CodeRule::add_zero: return codes_of<Bits, CodeRule::add_zero, f32>(in, scales, offsets, low, high, out);
        case CodeRule::float4: return codes_in<Bits, CodeRule::float4>(arithmetic, in, scales, offsets, low, high, out);
        case CodeRule::float4_even:
            return codes_in<Bits, CodeRule::float4_even>(arithmetic, in, scales, offsets, low, high, out);
    }
}

void codes(const Grouped& in, CodeRule rule, Arithmetic arithmetic, const float* scales, const float* offsets, float low,
           float high, uint8_t* out) {
    if (in.bf16)
        codes_by<uint16_t>(rule, arithmetic, in, scales, offsets, low, high, out);
    else
        codes_by<uint32_t>(rule, arithmetic, in, scales, offsets, low, high, out);
}

template <class Code>
INLINE void values_of(const Grouped& in, const Code* codes, const float* scales, const float* offsets, float* out) {
    for_groups(in, [=](size_t first, size_t count, size_t group) __attribute__((always_inline)) {
        const float scale = scales[group], offset = offsets ? offsets[group] : 0.f;
        for (size_t i = first; i < first + count; ++i) out[i] = ((float)codes[i] - offset) * scale;
    });
}

void values(const Grouped& in, const uint8_t* codes, bool is_signed, const float* scales, const float* offsets, float* out) {
    if (is_signed)
        values_of(in, (const int8_t*)codes, scales, offsets, out);
    else
        values_of(in, codes, scales, offsets, out);
}

void pack_nibbles(const uint8_t* codes, size_t bytes, uint8_t* out) {
    for (size_t i = 0; i < bytes; ++i) out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
}

void unpack_nibbles(const uint8_t* packed, size_t bytes, uint8_t* out) {
    for (size_t i = 0; i < bytes; ++i) {
        const uint16_t pair = (uint16_t)((packed[i] & 15) | packed[i] >> 4 << 8);
        __builtin_memcpy(out + 2 * i, &pair, 2);
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(GroupKernels, group_kernels) = {
    KERNELS_ISA::ranges, KERNELS_ISA::codes, KERNELS_ISA::values, KERNELS_ISA::pack_nibbles, KERNELS_ISA::unpack_nibbles,
};
