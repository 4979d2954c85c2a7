// Conversions between float32, float16 and bfloat16: plain loops, which the compiler vectorizes.
#include "casts.hpp"

#include "lanes.hpp"

namespace KERNELS_ISA {
namespace {

INLINE uint16_t to_bfloat16(uint32_t u) {
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 64;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// The loops over halves work on blocks of 16 floats, to use the hardware conversion where it exists.
constexpr int BLOCK = 16;

INLINE void halves_from(const float* x, uint16_t* out) {
#if defined(__F16C__)
    for (int i = 0; i < BLOCK; i += 8) {
        const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        // the instruction preserves a NaN's payload
        const __m128i nan = _mm_cmpgt_epi16(_mm_and_si128(h, _mm_set1_epi16(0x7fff)), _mm_set1_epi16(0x7c00));
        const __m128i plain = _mm_or_si128(_mm_and_si128(h, _mm_set1_epi16((short)0x8000)), _mm_set1_epi16(0x7e00));
        _mm_storeu_si128((__m128i*)(out + i), _mm_or_si128(_mm_andnot_si128(nan, h), _mm_and_si128(nan, plain)));
    }
#else
    for (int i = 0; i < BLOCK; ++i) {
        uint32_t u;
        __builtin_memcpy(&u, x + i, 4);
        const uint32_t a = u & 0x7fffffff;
        float f;
        __builtin_memcpy(&f, &a, 4);
        f += 0.5f;
        uint32_t subnormal;
        __builtin_memcpy(&subnormal, &f, 4);
        uint32_t h = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
        h = a < 0x38800000 ? subnormal - 0x3f000000 : h;
        h = a >= 0x477ff000 ? 0x7c00 : h;
        h = a > 0x7f800000 ? 0x7e00 : h;
        out[i] = (uint16_t)(h | ((u >> 16) & 0x8000));
    }
#endif
}

INLINE void floats_from(const uint16_t* h, float* out) {
#if defined(__F16C__)
    for (int i = 0; i < BLOCK; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + i))));
#else
    for (int i = 0; i < BLOCK; ++i) {
        const uint32_t a = h[i] & 0x7fff;
        const float small = (float)(int32_t)a * 0x1p-24f;
        uint32_t subnormal;
        __builtin_memcpy(&subnormal, &small, 4);
        uint32_t u = (a << 13) + 0x38000000;
        u = a < 0x0400 ? subnormal : u;
        u = a >= 0x7c00 ? 0x7f800000 | (a << 13) : u;
        u |= a > 0x7c00 ? 0x00400000 : 0;
        u |= (uint32_t)(h[i] & 0x8000) << 16;
        __builtin_memcpy(out + i, &u, 4);
    }
#endif
}

// Runs `f` over whole blocks, then once over a padded copy of the rest.
template <class In, class Out, class Function>
INLINE void by_blocks(const void* in, void* out, size_t n, Function f) {
    const In* x = (const In*)in;
    Out* y = (Out*)out;
    size_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) f(x + i, y + i);
    if (i < n) {
        In rest[BLOCK] = {};
        Out result[BLOCK];
        __builtin_memcpy(rest, x + i, (n - i) * sizeof(In));
        f(rest, result);
        __builtin_memcpy(y + i, result, (n - i) * sizeof(Out));
    }
}

void f32_to_f16(const void* in, void* out, size_t n) {
    by_blocks<float, uint16_t>(in, out, n,
                               [](const float* x, uint16_t* y) __attribute__((always_inline)) { halves_from(x, y); });
}

void f16_to_f32(const void* in, void* out, size_t n) {
    by_blocks<uint16_t, float>(in, out, n,
                               [](const uint16_t* x, float* y) __attribute__((always_inline)) { floats_from(x, y); });
}

void f32_to_bf16(const void* in, void* out, size_t n) {
    const uint32_t* x = (const uint32_t*)in;
    uint16_t* y = (uint16_t*)out;
    for (size_t i = 0; i < n; ++i) y[i] = to_bfloat16(x[i]);
}

void bf16_to_f32(const void* in, void* out, size_t n) {
    const uint16_t* x = (const uint16_t*)in;
    uint32_t* y = (uint32_t*)out;
    for (size_t i = 0; i < n; ++i) y[i] = (uint32_t)x[i] << 16;
}

void bf16_to_f16(const void* in, void* out, size_t n) {
    by_blocks<uint16_t, uint16_t>(in, out, n, [](const uint16_t* x, uint16_t* y) __attribute__((always_inline)) {
        float f[BLOCK];
        for (int i = 0; i < BLOCK; ++i) {
            const uint32_t u = (uint32_t)x[i] << 16;
            __builtin_memcpy(f + i, &u, 4);
        }
        halves_from(f, y);
    });
}

void f16_to_bf16(const void* in, void* out, size_t n) {
    by_blocks<uint16_t, uint16_t>(in, out, n, [](const uint16_t* x, uint16_t* y) __attribute__((always_inline)) {
        float f[BLOCK];
        floats_from(x, f);
        for (int i = 0; i < BLOCK; ++i) {
            uint32_t u;
            __builtin_memcpy(&u, f + i, 4);
            y[i] = to_bfloat16(u);
        }
    });
}

size_t nonfinite_f32(const void* in, size_t n) {
    const uint32_t* x = (const uint32_t*)in;
    size_t total = 0;
    for (size_t i = 0; i < n;) {  // 32-bit counters are as wide as the elements, so that the loop vectorizes
        const size_t end = n - i > (1u << 20) ? i + (1u << 20) : n;
        uint32_t count = 0;
        for (; i < end; ++i) count += (x[i] & 0x7f800000) == 0x7f800000;
        total += count;
    }
    return total;
}

size_t nonfinite_16(const void* in, size_t n, uint16_t exponent) {
    const uint16_t* x = (const uint16_t*)in;
    size_t total = 0;
    for (size_t i = 0; i < n;) {
        const size_t end = n - i > 32768 ? i + 32768 : n;
        uint16_t count = 0;
        for (; i < end; ++i) count = (uint16_t)(count + ((x[i] & exponent) == exponent));
        total += count;
    }
    return total;
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(CastKernels, cast_kernels) = {
    KERNELS_ISA::f32_to_f16,  KERNELS_ISA::f32_to_bf16, KERNELS_ISA::f16_to_f32,    KERNELS_ISA::bf16_to_f32,
    KERNELS_ISA::bf16_to_f16, KERNELS_ISA::f16_to_bf16, KERNELS_ISA::nonfinite_f32, KERNELS_ISA::nonfinite_16,
};
