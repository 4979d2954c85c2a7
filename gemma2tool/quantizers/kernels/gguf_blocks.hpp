// Blocks in lanes: lane l of every vector belongs to block l of a batch of LANES consecutive blocks.
//
// A batch of blocks of B floats is transposed into B vectors. A kernel then reads like scalar code for one block: it
// keeps ggml's order of operations within each block and works on LANES blocks at a time. Codes are written as 32-bit
// words, transposed back.
#pragma once

#include "lanes.hpp"

namespace KERNELS_ISA {

// Transposes a LANES x LANES tile: out[j][i] = rows[i][j].
INLINE void transpose(F* r) {
#if defined(__AVX512F__)
    __m512 t[16], u[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
    }
    for (int g = 0; g < 16; g += 4)
        for (int h = 0; h < 2; ++h) {
            const __m512d a = (__m512d)t[g + h], b = (__m512d)t[g + 2 + h];
            u[g + 2 * h] = (__m512)_mm512_unpacklo_pd(a, b);
            u[g + 2 * h + 1] = (__m512)_mm512_unpackhi_pd(a, b);
        }
    for (int c = 0; c < 4; ++c) {
        const __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88),
                     b = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd),
                     e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
        r[c] = (F)_mm512_shuffle_f32x4(a, b, 0x88);
        r[8 + c] = (F)_mm512_shuffle_f32x4(a, b, 0xdd);
        r[4 + c] = (F)_mm512_shuffle_f32x4(d, e, 0x88);
        r[12 + c] = (F)_mm512_shuffle_f32x4(d, e, 0xdd);
    }
#elif defined(__AVX2__)
    __m256 t[8], u[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
    for (int g = 0; g < 8; g += 4)
        for (int h = 0; h < 2; ++h) {
            const __m256d a = (__m256d)t[g + h], b = (__m256d)t[g + 2 + h];
            u[g + 2 * h] = (__m256)_mm256_unpacklo_pd(a, b);
            u[g + 2 * h + 1] = (__m256)_mm256_unpackhi_pd(a, b);
        }
    for (int c = 0; c < 4; ++c) {
        r[c] = (F)_mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
        r[4 + c] = (F)_mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
    }
#else
    const F a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const F c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// out[j], lane l = rows[l][j] for j < n, a multiple of LANES.
INLINE void load_transposed(const float* const* rows, int n, F* out) {
    for (int j = 0; j < n; j += LANES) {
        F tile[LANES];
        for (int l = 0; l < LANES; ++l) tile[l] = load(rows[l] + j);
        transpose(tile);
        for (int l = 0; l < LANES; ++l) out[j + l] = tile[l];
    }
}

// Writes words[0..W) of lane l to out + l * stride, as little-endian 32-bit words, for every lane.
template <int W>
INLINE void store_words(const I* words, uint8_t* out, int stride) {
    for (int w = 0; w < W; w += LANES) {
        F tile[LANES];
        for (int l = 0; l < LANES; ++l) tile[l] = w + l < W ? (F)words[w + l] : F{};
        transpose(tile);
        const int rest = W - w;
        if (rest >= LANES) {
            for (int l = 0; l < LANES; ++l) __builtin_memcpy(out + l * stride + 4 * w, tile + l, 4 * LANES);
        } else {
            constexpr int TAIL = 4 * (W % LANES);
            for (int l = 0; l < LANES; ++l) __builtin_memcpy(out + l * stride + 4 * w, tile + l, TAIL);
        }
    }
}

// Writes the low 16 bits of every lane to out + l * stride.
INLINE void store_shorts(I x, uint8_t* out, int stride) {
    for (int l = 0; l < LANES; ++l) {
        const uint16_t h = (uint16_t)x[l];
        __builtin_memcpy(out + l * stride, &h, 2);
    }
}

// Four byte values to one word, the first lowest.
INLINE I word(I a, I b, I c, I d) { return a | (b << 8) | (c << 16) | (d << 24); }
INLINE I word(const I* b) { return word(b[0], b[1], b[2], b[3]); }

// to_half and from_half of lanes.hpp for all lanes: the half's 16 bits in an int.
INLINE I to_half(F x) {
    const I u = bits(x), a = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
    I h = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    h = a < 0x38800000 ? bits(floats(a) + 0.5f) - 0x3f000000 : h;
    h = a >= 0x477ff000 ? splat(0x7c00) : h;
    h = a > 0x7f800000 ? splat(0x7e00) : h;
    return h | sign;
}
INLINE F from_half(I h) {
    const I a = h & 0x7fff;
    I u = (a << 13) + 0x38000000;
    u = a < 0x0400 ? bits(to_float(a) * 0x1p-24f) : u;
    u = a >= 0x7c00 ? (a << 13) | 0x7f800000 : u;
    u = a > 0x7c00 ? u | 0x00400000 : u;
    return floats(u | ((h & 0x8000) << 16));
}

// Sum of squares of each of LANES rows, in order, divided by their length.
INLINE F mean_square(const float* const* rows, int64_t cols) {
    F sum = {};
    int64_t j = 0;
    for (; j + LANES <= cols; j += LANES) {
        F tile[LANES];
        for (int l = 0; l < LANES; ++l) tile[l] = load(rows[l] + j);
        transpose(tile);
        for (int l = 0; l < LANES; ++l) sum += tile[l] * tile[l];
    }
    return sum / (float)cols;
}

// Runs `kernel` over all blocks of (rows, cols) floats, LANES at a time:
//     kernel(const F* x, const F* importance or null, F mean_square_of_row, uint8_t* out)
// x and importance are BLOCK vectors; out takes LANES blocks of BYTES bytes. ROW_MEAN: the mean square of the block's
// whole row is needed (computed only with importance). cols is a multiple of BLOCK, BLOCK of 16.
template <int BLOCK, int BYTES, bool ROW_MEAN, class Kernel>
INLINE void for_blocks(const float* x, const float* importance, int64_t rows, int64_t cols, uint8_t* out,
                       Kernel kernel) {
    const int64_t per_row = cols / BLOCK;
    for (int64_t row = 0; row < rows; row += LANES, x += LANES * cols) {
        const int64_t here = rows - row < LANES ? rows - row : LANES, blocks = here * per_row;
        float means[LANES] = {};
        if (ROW_MEAN && importance) {
            const float* of[LANES];
            for (int l = 0; l < LANES; ++l) of[l] = x + (l < here ? l : here - 1) * cols;
            store(means, mean_square(of, cols));
        }
        int64_t in_row = 0, r = 0;  // of the next block
        for (int64_t b = 0; b < blocks; b += LANES) {
            const int count = blocks - b < LANES ? (int)(blocks - b) : LANES;
            const float *source[LANES], *weights[LANES];
            float mean[LANES];
            for (int l = 0; l < LANES; ++l) {  // lanes past the end repeat the last block
                source[l] = x + (b + (l < count ? l : count - 1)) * BLOCK;
                weights[l] = importance ? importance + in_row * BLOCK : nullptr;
                mean[l] = means[r];
                if (l + 1 < count && ++in_row == per_row) in_row = 0, ++r;
            }
            if (++in_row == per_row) in_row = 0, ++r;
            F t[BLOCK], w[BLOCK];
            load_transposed(source, BLOCK, t);
            if (importance) load_transposed(weights, BLOCK, w);
            if (count == LANES) {
                kernel(t, importance ? w : nullptr, load(mean), out);
            } else {
                uint8_t padded[LANES * BYTES];
                kernel(t, importance ? w : nullptr, load(mean), padded);
                __builtin_memcpy(out, padded, (size_t)count * BYTES);
            }
            out += count * BYTES;
        }
    }
}

}  // namespace KERNELS_ISA
