// Vector types of this instruction set's width, and the few operations that the compilers' vector extensions lack.
//
// Included only by sources compiled per instruction set: everything lives in namespace KERNELS_ISA and is static
// inline.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

namespace KERNELS_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float F __attribute__((vector_size(4 * LANES)));    // one float per lane
typedef int32_t I __attribute__((vector_size(4 * LANES)));  // one int per lane; -1 or 0 for a comparison
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

INLINE F splat(float x) { return x - F{}; }  // subtraction, so that -0.0 is preserved
INLINE I splat(int32_t x) { return x + I{}; }
INLINE I bits(F x) { return (I)x; }
INLINE F floats(I x) { return (F)x; }
INLINE F to_float(I x) { return __builtin_convertvector(x, F); }

INLINE F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE I load(const int32_t* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(int32_t* p, I v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE F abs(F x) { return floats(bits(x) & 0x7fffffff); }
INLINE float abs(float x) { return __builtin_fabsf(x); }

// a < b ? a : b and a > b ? a : b; both are b where either is NaN, as with the x86 instructions.
INLINE F min(F a, F b) {
#if defined(__AVX512F__)
    return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
}
INLINE F max(F a, F b) {
#if defined(__AVX512F__)
    return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

INLINE F sqrt(F x) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (F)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (F)_mm_sqrt_ps((__m128)x);
#else
    F y;
    for (int i = 0; i < LANES; ++i) y[i] = __builtin_sqrtf(x[i]);
    return y;
#endif
}

// 1 / x but for a relative error of RECIPROCAL_ERROR, which differs between processors: not for results.
#if defined(__AVX512F__)
constexpr float RECIPROCAL_ERROR = 0x1p-14f;
#elif defined(__SSE2__)
constexpr float RECIPROCAL_ERROR = 1.5f * 0x1p-12f;
#else
constexpr float RECIPROCAL_ERROR = 0x1p-24f;
#endif
INLINE F estimated_reciprocal(F x) {
#if defined(__AVX512F__)
    return (F)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
    return (F)_mm256_rcp_ps((__m256)x);
#elif defined(__SSE2__)
    return (F)_mm_rcp_ps((__m128)x);
#else
    return 1.f / x;
#endif
}

// Bit l is set where lane l of a comparison is.
INLINE uint32_t lane_bits(I mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
    return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
    uint32_t b = 0;
    for (int i = 0; i < LANES; ++i) b |= (uint32_t)(mask[i] & 1) << i;
    return b;
#endif
}
INLINE bool any(I mask) { return lane_bits(mask) != 0; }
// lane_bits(a < b), and whether that is so in all lanes; with AVX-512 masks need not become vectors.
INLINE uint32_t lanes_below(F a, F b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#else
    return lane_bits(a < b);
#endif
}
INLINE bool all_below(F a, F b) { return lanes_below(a, b) == (1u << LANES) - 1; }

// table[i] for the i of each lane.
INLINE I gather(const int32_t* table, I i) {
#if defined(__AVX512F__)
    return (I)_mm512_i32gather_epi32((__m512i)i, table, 4);
#elif defined(__AVX2__)
    return (I)_mm256_i32gather_epi32(table, (__m256i)i, 4);
#else
    I y;
    for (int l = 0; l < LANES; ++l) y[l] = table[i[l]];
    return y;
#endif
}

// 0, 1, 2, ...
INLINE I iota() {
    I i;
    for (int l = 0; l < LANES; ++l) i[l] = l;
    return i;
}

// LANES unsigned bytes as ints.
INLINE I load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
    return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    I y;
    for (int l = 0; l < LANES; ++l) y[l] = p[l];
    return y;
#endif
}

typedef int8_t Bytes __attribute__((vector_size(16)));

// The low bytes of 16 ints.
INLINE Bytes low_bytes(const I* x) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)x[0]);
#elif defined(__AVX2__)
    const __m256i mixed = _mm256_packus_epi32((__m256i)(x[0] & 255), (__m256i)(x[1] & 255));
    const __m256i shorts = _mm256_permute4x64_epi64(mixed, 0xd8);
    return (Bytes)_mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
#elif defined(__SSE2__)
    const __m128i low = _mm_packs_epi32((__m128i)(x[0] & 255), (__m128i)(x[1] & 255));
    const __m128i high = _mm_packs_epi32((__m128i)(x[2] & 255), (__m128i)(x[3] & 255));
    return (Bytes)_mm_packus_epi16(low, high);
#else
    Bytes y;
    for (int i = 0; i < 16; ++i) y[i] = (int8_t)x[i / LANES][i % LANES];
    return y;
#endif
}

// The bits that leave a byte enter the next one; processors have no shifts of bytes.
template <int BITS>
INLINE Bytes shifted_left(Bytes x) {
    typedef uint16_t Shorts __attribute__((vector_size(16)));
    return (Bytes)((Shorts)x << BITS);
}

// Bit i is set where byte i is negative.
INLINE uint32_t sign_bits(Bytes x) {
#if defined(__SSE2__)
    return (uint32_t)_mm_movemask_epi8((__m128i)x);
#else
    uint32_t b = 0;
    for (int i = 0; i < 16; ++i) b |= (uint32_t)(x[i] < 0) << i;
    return b;
#endif
}

// LANES unsigned shorts as ints.
INLINE I load_shorts(const uint16_t* p) {
#if defined(__AVX512F__)
    return (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (I)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    I y;
    for (int l = 0; l < LANES; ++l) y[l] = p[l];
    return y;
#endif
}

// Round half to even by adding 1.5 * 2^23. Exact for |x| <= 4194303. Like ggml's nearest_int, this takes the low
// mantissa bits of the sum for any x, so that the results are equal for infinity and NaN too.
constexpr float ROUNDER = 12582912.f;
INLINE F round_small(F x) { return (x + ROUNDER) - ROUNDER; }
INLINE I nearest_int(F x) { return (bits(x + ROUNDER) & 0x007fffff) - 0x00400000; }
INLINE int32_t nearest_int(float x) {
    const float y = x + ROUNDER;
    int32_t i;
    __builtin_memcpy(&i, &y, 4);
    return (i & 0x007fffff) - 0x00400000;
}
INLINE int32_t clip(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }
INLINE I clip(I x, int32_t low, int32_t high) {
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
}

// Toward zero. A value outside the range of int, infinity or NaN becomes INT_MIN, as with the x86 instructions.
INLINE I truncate(F x) {
#if defined(__SSE2__)
    return __builtin_convertvector(x, I);
#else
    const I fits = abs(x) < 2147483648.f;
    return fits ? __builtin_convertvector(fits ? x : F{}, I) : splat(INT32_MIN);
#endif
}
// Half away from zero, as roundf; INT_MIN for a value outside the range of int.
INLINE I round_away(F x) {
    const I whole = truncate(x);
    const F rest = x - to_float(whole), size = abs(rest);
    const I up = (size >= 0.5f) & (size < 1.f);
    return whole + (up & (bits(rest) >> 31 | 1));
}

// IEEE half precision, round to nearest even. A NaN becomes 0x7E00 with its sign, as in ggml. In the other
// direction a NaN becomes quiet.
INLINE uint16_t to_half(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000) {  // subnormal half: the addition rounds at 2^-24
        float y;
        __builtin_memcpy(&y, &a, 4);
        y += 0.5f;
        uint32_t v;
        __builtin_memcpy(&v, &y, 4);
        return (uint16_t)(sign | (v - 0x3f000000));
    }
    return (uint16_t)(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}
INLINE float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, a = h & 0x7fff;
    uint32_t u;
    float x;
    if (a >= 0x7c00) {
        u = 0x7f800000 | (a << 13) | (a > 0x7c00 ? 0x00400000 : 0);
    } else if (a < 0x0400) {
        x = (float)(int32_t)a * 0x1p-24f;
        __builtin_memcpy(&u, &x, 4);
    } else {
        u = (a << 13) + 0x38000000;
    }
    u |= sign;
    __builtin_memcpy(&x, &u, 4);
    return x;
}
INLINE float load_half(const uint8_t* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, 2);
    return from_half(h);
}
// Stores x as a half and returns what was stored.
INLINE float store_half(uint8_t* p, float x) {
    const uint16_t h = to_half(x);
    __builtin_memcpy(p, &h, 2);
    return from_half(h);
}

}  // namespace KERNELS_ISA
