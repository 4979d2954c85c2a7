// float32 values rounded to narrower types and kept in float32; loops over these vectorize.
//
// Included only by sources compiled per instruction set.
#pragma once

#include "lanes.hpp"

namespace KERNELS_ISA {

INLINE float float_of(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}
INLINE uint32_t bits_of(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}
// The bits of value i of an array of float32 or of bfloat16.
INLINE uint32_t bits_at(const uint32_t* x, size_t i) { return x[i]; }
INLINE uint32_t bits_at(const uint16_t* x, size_t i) { return (uint32_t)x[i] << 16; }

// The value rounded to float16: 11 bits, a grid of 2^-24 below 2^-14, infinite from 65520 on.
INLINE float through_half(uint32_t u) {
    const uint32_t a = u & 0x7fffffff;
    const uint32_t normal = (a + 0xfff + (a >> 13 & 1)) & 0xffffe000;
    const uint32_t subnormal = bits_of((float_of(a) + 0.5f) - 0.5f);
    uint32_t r = a < 0x38800000 ? subnormal : normal;
    r = r >= 0x47800000 ? 0x7f800000 : r;
    r = a > 0x7f800000 ? 0x7fc00000 : r;
    return float_of(r | (u & 0x80000000));
}

// The value rounded to bfloat16.
INLINE float through_bfloat16(uint32_t u) {
    const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000;
    return float_of((u & 0x7fffffff) > 0x7f800000 ? u | 0x00400000 : rounded);
}

// float8_e4m3fn of a value within +-448: 3 bits of mantissa, a grid of 2^-9 below 2^-6.
INLINE uint8_t to_float8(float x) {
    const uint32_t u = bits_of(x), a = u & 0x7fffffff;
    const uint32_t normal = ((a + 0x7ffff + (a >> 20 & 1)) >> 20) - (120 << 3);
    const uint32_t subnormal = bits_of(float_of(a) + 16384.f) - 0x46800000;
    return (uint8_t)((a < 0x3c800000 ? subnormal : normal) | u >> 31 << 7);
}

}  // namespace KERNELS_ISA
