// bitsandbytes' types, block by block or row by row. Within a block only the largest magnitude depends on more than one
// value, and it is the same in any order, so vectorized loops give the library's bytes.
#include "bnb.hpp"

#include "rounding.hpp"

namespace KERNELS_ISA {
namespace {

constexpr int BLOCK = 64;
constexpr size_t NESTED_BLOCK = 256;

// The largest magnitude; NaN if any value is NaN. The bits of floats without their signs are ordered like integers.
INLINE float largest(const uint32_t* x, size_t n) {
    uint32_t most = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint32_t a = x[i] & 0x7fffffff;
        most = a > most ? a : most;
    }
    return float_of(most);
}
INLINE float largest(const uint16_t* x, size_t n) {
    uint16_t most = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint16_t a = x[i] & 0x7fff;
        most = a > most ? a : most;
    }
    return float_of((uint32_t)most << 16);
}

// The codes of 64 scaled values. A value's code is accumulated over the midpoints: each midpoint below the value adds
// the difference to the next code. NaN counts as above every midpoint.
INLINE void codes_of(const FourBitSteps& steps, const float* scaled, uint8_t* codes) {
    for (int i = 0; i < BLOCK; i += LANES) {
        const F x = load(scaled + i);
        I code = splat((int32_t)steps.ascending[0]);
        for (int k = 0; k < 15; ++k) code += ~(splat(steps.midpoints[k]) >= x) & (steps.ascending[k + 1] - steps.ascending[k]);
        int32_t c[LANES];
        store(c, code);
        for (int j = 0; j < LANES; ++j) codes[i + j] = (uint8_t)c[j];
    }
}

template <class Bits>
INLINE void quantize_4bit_of(const FourBitSteps& steps, const Bits* x, size_t n, uint8_t* packed, float* absmax) {
    constexpr float SMALLEST = 1e-38f;  // the library's guard against division by zero
    float scaled[BLOCK];
    uint8_t codes[BLOCK];
    for (; n >= BLOCK; n -= BLOCK, x += BLOCK) {
        const float most = largest(x, BLOCK);
        *absmax++ = most;
        if (!packed) continue;
        const float scale = 1.f / (most < SMALLEST ? SMALLEST : most);
        for (int i = 0; i < BLOCK; ++i) scaled[i] = float_of(bits_at(x, i)) * scale;
        codes_of(steps, scaled, codes);
        for (int i = 0; i < BLOCK / 2; ++i) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
        packed += BLOCK / 2;
    }
    if (n == 0) return;
    // In a short last block the library stores the guarded absmax and divides by it. A missing last value is zero.
    float most = largest(x, n);
    most = most < SMALLEST ? SMALLEST : most;
    *absmax = most;
    if (!packed) return;
    for (size_t i = 0; i < BLOCK; ++i) scaled[i] = i < n ? float_of(bits_at(x, i)) / most : 0.f;
    codes_of(steps, scaled, codes);
    for (size_t i = 0; i < (n + 1) / 2; ++i) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
}

void quantize_4bit(const FourBitSteps& steps, const void* x, bool bf16, size_t n, uint8_t* packed, float* absmax) {
    if (bf16)
        quantize_4bit_of(steps, (const uint16_t*)x, n, packed, absmax);
    else
        quantize_4bit_of(steps, (const uint32_t*)x, n, packed, absmax);
}

constexpr size_t STEP = 32;  // values dequantized at once; divides every block size

#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xffff;  // GCC 12 warns about the unmasked forms in its own header
#endif

// A lookup table of the 16 values of a block with one absmax, and the lookup of STEP values by the codes in STEP / 2
// bytes; the first code of a byte is in its high half.
#if defined(__AVX512F__)
struct FloatTable {
    __m512 values;
};
INLINE FloatTable table_of(const float* numbers, float absmax, float*) {
    return {_mm512_maskz_mul_ps(ALL, _mm512_loadu_ps(numbers), _mm512_set1_ps(absmax))};
}
// Looks up even and odd values separately, then interleaves them. Only the low four bits of an index are used.
INLINE void look_up(const FloatTable& table, const uint8_t* packed, float* out) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i byte = _mm512_maskz_cvtepu8_epi32(ALL, _mm_loadu_si128((const __m128i*)packed));
    const __m512 even = _mm512_maskz_permutexvar_ps(ALL, _mm512_maskz_srli_epi32(ALL, byte, 4), table.values);
    const __m512 odd = _mm512_maskz_permutexvar_ps(ALL, byte, table.values);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, second, odd));
}

struct HalfTable {
    __m512i values;  // twice
};
INLINE HalfTable table_of(const float* numbers, float absmax, uint16_t*) {
    const I u = (I)table_of(numbers, absmax, (float*)nullptr).values;
    const U rounded = ((U)u + 0x7fff + ((U)u >> 16 & 1)) >> 16, quiet = (U)u >> 16 | 64;
    const I nan = (u & 0x7fffffff) > 0x7f800000;
    const __m256i half = _mm512_maskz_cvtepi32_epi16(ALL, (__m512i)(((I)rounded & ~nan) | ((I)quiet & nan)));
    return {_mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1)};
}
INLINE void look_up(const HalfTable& table, const uint8_t* packed, uint16_t* out) {
    const __m512i byte = _mm512_maskz_cvtepu8_epi32(ALL, _mm_loadu_si128((const __m128i*)packed));
    const U code = (U)byte >> 4 | (U)byte << 16;  // a pair; bit 4 of the second index is unused
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16((__m512i)code, table.values));
}
#else
template <class Out>
struct Table {
    Out values[16];
};
INLINE Table<float> table_of(const float* numbers, float absmax, float*) {
    Table<float> table;
    for (int i = 0; i < 16; ++i) table.values[i] = numbers[i] * absmax;
    return table;
}
INLINE Table<uint16_t> table_of(const float* numbers, float absmax, uint16_t*) {
    Table<uint16_t> table;
    for (int i = 0; i < 16; ++i) {
        const uint32_t u = bits_of(numbers[i] * absmax);
        const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, quiet = u >> 16 | 64;
        table.values[i] = (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
    }
    return table;
}
// The two codes of each byte, the first in its high half.
INLINE void split(const uint8_t* packed, uint8_t* codes) {
    uint16_t pairs[STEP / 2];
    for (size_t i = 0; i < STEP / 2; ++i) pairs[i] = (uint16_t)(packed[i] >> 4 | (packed[i] & 15) << 8);
    __builtin_memcpy(codes, pairs, STEP);
}

INLINE void look_up(const Table<float>& numbers, const uint8_t* packed, float* out) {
    const float* table = numbers.values;
    uint8_t codes[STEP];
    split(packed, codes);
    for (size_t i = 0; i < STEP; i += LANES) {
#if defined(__AVX2__)
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i)));
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), code);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), code);
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28))));
#else
        for (int j = 0; j < LANES; ++j) out[i + j] = table[codes[i + j]];
#endif
    }
}
INLINE void look_up(const Table<uint16_t>& numbers, const uint8_t* packed, uint16_t* out) {
    const uint16_t* table = numbers.values;
    uint8_t codes[STEP];
    split(packed, codes);
#if defined(__AVX2__)
    // Low and high bytes of the entries are looked up separately, then interleaved.
    const __m256i both = _mm256_loadu_si256((const __m256i*)table);
    const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(both, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(both, 8));
    const __m256i low_table = _mm256_permute4x64_epi64(bytes, 0x88), high_table = _mm256_permute4x64_epi64(bytes, 0xdd);
    const __m256i code = _mm256_loadu_si256((const __m256i*)codes);
    const __m256i low = _mm256_shuffle_epi8(low_table, code), high = _mm256_shuffle_epi8(high_table, code);
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256((__m256i*)(out + 16), _mm256_permute2x128_si256(first, second, 0x31));
#else
    for (size_t i = 0; i < STEP; ++i) out[i] = table[codes[i]];
#endif
}
#endif

template <class Out>
INLINE void dequantize_4bit_of(const float* numbers, const uint8_t* packed, const float* absmax, size_t blocksize, size_t n,
                               Out* out) {
    Out rest[STEP];
    uint8_t last[STEP / 2] = {};
    for (size_t block = 0; block < n; block += blocksize) {
        const auto table = table_of(numbers, *absmax++, out);
        const size_t end = n - block < blocksize ? n : block + blocksize;
        size_t start = block;
        for (; start + STEP <= end; start += STEP) look_up(table, packed + start / 2, out + start);
        if (start < end) {
            __builtin_memcpy(last, packed + start / 2, (end - start + 1) / 2);
            look_up(table, last, rest);
            __builtin_memcpy(out + start, rest, (end - start) * sizeof(Out));
        }
    }
}

void dequantize_4bit(const float* numbers, const uint8_t* packed, const float* absmax, size_t blocksize, size_t n, void* out,
                     bool bf16) {
    if (bf16)
        dequantize_4bit_of(numbers, packed, absmax, blocksize, n, (uint16_t*)out);
    else
        dequantize_4bit_of(numbers, packed, absmax, blocksize, n, (float*)out);
}

void quantize_8bit(const float* x, size_t n, const uint8_t* bins, uint8_t* codes, float* absmax) {
    for (size_t start = 0; start < n; start += NESTED_BLOCK) {
        const size_t end = n - start < NESTED_BLOCK ? n : start + NESTED_BLOCK;
        const float most = largest((const uint32_t*)x + start, end - start);
        *absmax++ = most;
        const float scale = 1.f / most;
        for (size_t i = start; i < end; ++i) {
            float v = x[i] * scale;
            v = v < -1.f ? -1.f : v > 1.f ? 1.f : v;
            // The library's compiler fuses this multiply-add: float64 represents it exactly, then it is rounded once to
            // float32.
            const float bin = (float)((double)((v + 1.f) * 0.5f) * 65535. + 0.5);
            codes[i] = most == 0.f ? 0 : bins[bin == bin ? (int32_t)bin : 0];
        }
    }
}

template <class Bits>
INLINE void quantize_int8_of(const Bits* x, size_t rows, size_t columns, int8_t* codes, float* absmax) {
    for (size_t row = 0; row < rows; ++row, x += columns, codes += columns) {
        const float most = through_half(bits_of(largest(x, columns)));  // rounding preserves the order of values
        absmax[row] = most;
        const float scale = 1.f / most * 127.f;
        for (size_t i = 0; i < columns; ++i) {
            // Round half to even in the low bits of the sum; NaN (0 * inf) becomes 0.
            const uint32_t sum = bits_of(through_half(bits_at(x, i)) * scale + ROUNDER);
            codes[i] = (int8_t)((int32_t)(sum & 0x007fffff) - 0x00400000);
        }
    }
}

void quantize_int8(const void* x, bool bf16, size_t rows, size_t columns, int8_t* codes, float* absmax) {
    if (bf16)
        quantize_int8_of((const uint16_t*)x, rows, columns, codes, absmax);
    else
        quantize_int8_of((const uint32_t*)x, rows, columns, codes, absmax);
}

void dequantize_int8(const int8_t* codes, const float* absmax, size_t rows, size_t columns, float* out) {
    for (size_t row = 0; row < rows; ++row, codes += columns, out += columns) {
        const float scale = absmax[row];
        for (size_t i = 0; i < columns; ++i) out[i] = (float)codes[i] * scale * 7.874015718698502e-3f;
    }
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(BnbKernels, bnb_kernels) = {
    KERNELS_ISA::quantize_4bit, KERNELS_ISA::dequantize_4bit, KERNELS_ISA::quantize_8bit,
    KERNELS_ISA::quantize_int8, KERNELS_ISA::dequantize_int8,
};
