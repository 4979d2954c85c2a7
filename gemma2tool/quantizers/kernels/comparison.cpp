// See comparison.hpp. A block is read tile by tile; one that has values which are not finite is read again, without them.
#include "comparison.hpp"

#include "lanes.hpp"

namespace KERNELS_ISA {
namespace {

constexpr int TILE = 16, PARTS = TILE / LANES;
constexpr int32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000, LARGEST = 0x7f7fffff;

typedef double D __attribute__((vector_size(8 * LANES)));

INLINE F floats_at(const float* p) { return load(p); }
INLINE F floats_at(const uint16_t* p) {  // bfloat16
#if defined(__AVX512F__)
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    I y;
    for (int l = 0; l < LANES; ++l) y[l] = (int32_t)((uint32_t)p[l] << 16);
    return floats(y);
#endif
}

INLINE D doubles(F x) {
#if defined(__AVX512F__)
    const __m512d parts[2] = {_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
                              _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1))};
#elif defined(__AVX2__)
    const __m256d parts[2] = {_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)),
                              _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1))};
#elif defined(__SSE2__)
    const __m128d parts[2] = {_mm_cvtps_pd((__m128)x), _mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x))};
#else
    const D parts = __builtin_convertvector(x, D);
#endif
    D y;
    __builtin_memcpy(&y, &parts, sizeof y);
    return y;
}

INLINE I magnitude(F x) { return bits(x) & MAGNITUDE; }  // has the order of the magnitudes
INLINE I larger(I a, I b) { return a > b ? a : b; }
INLINE int32_t largest_lane(I x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t m = x[0];
    for (int l = 1; l < LANES; ++l) m = x[l] > m ? x[l] : m;
    return m;
#endif
}
INLINE float as_float(int32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

struct Tile {
    F source[PARTS], actual[PARTS];
};

template <class S, class A>
INLINE Tile whole_tile(const S* source, const A* actual) {
    Tile tile;
    for (int p = 0; p < PARTS; ++p) {
        tile.source[p] = floats_at(source + LANES * p);
        tile.actual[p] = floats_at(actual + LANES * p);
    }
    return tile;
}

// Values `i` to `i + TILE` of a block of `n`; zeros beyond it.
template <class S, class A>
INLINE Tile tile_at(const S* source, const A* actual, size_t i, size_t n) {
    if (i + TILE <= n) return whole_tile(source + i, actual + i);
    S s[TILE] = {};
    A a[TILE] = {};
    for (size_t k = i; k < n; ++k) {
        s[k - i] = source[k];
        a[k - i] = actual[k];
    }
    return whole_tile(s, a);
}

// Zeros in place of pairs of which one is not finite.
INLINE void keep_finite(Tile& tile) {
    for (int p = 0; p < PARTS; ++p) {
        const I finite = (magnitude(tile.source[p]) < INFINITE) & (magnitude(tile.actual[p]) < INFINITE);
        tile.source[p] = floats(bits(tile.source[p]) & finite);
        tile.actual[p] = floats(bits(tile.actual[p]) & finite);
    }
}

// CLEAN: both sides and their difference are finite.
template <bool CLEAN>
INLINE F error_of(F source, F actual) {
    const F error = actual - source;
    if (CLEAN) return error;
    const I size = magnitude(error);
    return floats((size >= INFINITE ? splat(LARGEST) : size) | (bits(error) & ~MAGNITUDE));
}

struct Sums {
    D signal[PARTS] = {}, noise[PARTS] = {}, bias[PARTS] = {};
};

// The largest magnitudes of a block, as bits.
struct Largest {
    int32_t source, actual, error;
};

template <bool CLEAN, class S, class A>
INLINE Largest add_block(const S* source, const A* actual, size_t n, Sums& sums) {
    I of_source = {}, of_actual = {}, of_error = {};
    for (size_t i = 0; i < n; i += TILE) {
        Tile tile = tile_at(source, actual, i, n);
        if (!CLEAN) keep_finite(tile);
        for (int p = 0; p < PARTS; ++p) {
            const F s = tile.source[p], a = tile.actual[p], e = error_of<CLEAN>(s, a);
            of_source = larger(of_source, magnitude(s));
            of_actual = larger(of_actual, magnitude(a));
            of_error = larger(of_error, magnitude(e));
            const D wide = doubles(s), wide_error = doubles(e);
            sums.signal[p] += wide * wide;
            sums.noise[p] += wide_error * wide_error;
            sums.bias[p] += wide_error;
        }
    }
    return {largest_lane(of_source), largest_lane(of_actual), largest_lane(of_error)};
}

// The error of the first value of magnitude `absmax`.
template <bool CLEAN, class S, class A>
INLINE float anchor_error(const S* source, const A* actual, size_t n, int32_t absmax) {
    for (size_t i = 0; i < n; i += TILE) {
        Tile tile = tile_at(source, actual, i, n);
        if (!CLEAN) keep_finite(tile);
        for (int p = 0; p < PARTS; ++p) {
            const uint32_t equal = lane_bits(magnitude(tile.source[p]) == absmax);
            if (!equal) continue;
            const I size = magnitude(error_of<CLEAN>(tile.source[p], tile.actual[p]));
            return as_float(size[__builtin_ctz(equal)]);
        }
    }
    return 0;
}

template <class S, class A>
void count_nonfinite(const S* source, const A* actual, size_t first, size_t n, ErrorSums& sums) {
    for (size_t i = first; i < first + n; i += TILE) {
        const Tile tile = tile_at(source, actual, i, first + n);
        for (int p = 0; p < PARTS; ++p) {
            const uint32_t bad = lane_bits(magnitude(tile.actual[p]) >= INFINITE);
            sums.source_nonfinite += __builtin_popcount(lane_bits(magnitude(tile.source[p]) >= INFINITE));
            sums.nonfinite += __builtin_popcount(bad);
            if (bad && sums.first_nonfinite == SIZE_MAX) sums.first_nonfinite = i + LANES * p + __builtin_ctz(bad);
        }
    }
}

double total(const D* parts) {
    double sum = 0;
    for (int i = 0; i < TILE; ++i) sum += parts[i / LANES][i % LANES];
    return sum;
}

template <class S, class A>
ErrorSums compare_runs(const S* source, const A* actual, const Compared& in, float* absmax, float* worst, float* anchor) {
    ErrorSums result;
    Sums sums;
    int32_t largest_error = 0;
    for (size_t first = 0, b = 0; first < in.n; first += in.block, ++b) {
        const S* s = source + first;
        const A* a = actual + first;
        const size_t n = in.n - first < in.block ? in.n - first : in.block;
        Sums with_block = sums;
        Largest largest = add_block<true>(s, a, n, with_block);
        const bool clean = largest.source < INFINITE && largest.actual < INFINITE && largest.error < INFINITE;
        if (!clean) {
            with_block = sums;
            largest = add_block<false>(s, a, n, with_block);
            count_nonfinite(source, actual, first, n, result);
        }
        sums = with_block;
        largest_error = largest.error > largest_error ? largest.error : largest_error;
        if (!absmax) continue;
        absmax[b] = as_float(largest.source);
        worst[b] = as_float(largest.error);
        if (anchor)
            anchor[b] = clean ? anchor_error<true>(s, a, n, largest.source) : anchor_error<false>(s, a, n, largest.source);
    }
    result.signal = total(sums.signal);
    result.noise = total(sums.noise);
    result.bias = total(sums.bias);
    result.largest = as_float(largest_error);
    return result;
}

ErrorSums compare(const Compared& in, float* absmax, float* worst, float* anchor) {
    const auto *s16 = (const uint16_t*)in.source, *a16 = (const uint16_t*)in.actual;
    const auto *s32 = (const float*)in.source, *a32 = (const float*)in.actual;
    if (in.source_bf16)
        return in.actual_bf16 ? compare_runs(s16, a16, in, absmax, worst, anchor)
                              : compare_runs(s16, a32, in, absmax, worst, anchor);
    return in.actual_bf16 ? compare_runs(s32, a16, in, absmax, worst, anchor)
                          : compare_runs(s32, a32, in, absmax, worst, anchor);
}

template <class T>
size_t count_differing(const T* a, const T* b, size_t n, size_t* first) {
    size_t total = 0;
    *first = n;
    for (size_t i = 0; i < n;) {  // counters as wide as the values, so that the loop vectorizes
        const size_t start = i, end = n - i > 32768 ? i + 32768 : n;
        T count = 0;
        for (; i < end; ++i) count = (T)(count + (a[i] != b[i]));
        if (count && !total)
            for (size_t k = start; *first == n; ++k)
                if (a[k] != b[k]) *first = k;
        total += count;
    }
    return total;
}

size_t differing(const void* a, const void* b, int size, size_t n, size_t* first) {
    return size == 2 ? count_differing((const uint16_t*)a, (const uint16_t*)b, n, first)
                     : count_differing((const uint32_t*)a, (const uint32_t*)b, n, first);
}

}  // namespace
}  // namespace KERNELS_ISA

KERNEL_TABLE_HERE(ComparisonKernels, comparison_kernels) = {KERNELS_ISA::compare, KERNELS_ISA::differing};
