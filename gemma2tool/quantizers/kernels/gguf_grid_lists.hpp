// The nearest grid point of a code that is not on the grid: ggml's search through a list of neighbors.
//
// ggml sums w (scale value - x)^2 over the coordinates, in order, and takes the first neighbor with the smallest sum.
// Only the neighbor matters, not the sum. So the sum is first estimated as scale (scale A - B) + C, where A and B are
// sums of terms of single coordinates that do not depend on the scale; if no other neighbor comes within the error of
// the estimate, its result is ggml's. Otherwise ggml's sums are computed. Both look terms up: a coordinate has only 3
// or 8 values.
#pragma once

#include "gguf_grids.hpp"
#include "lanes.hpp"

namespace KERNELS_ISA {

constexpr int bits_of(int dims) { return dims == 8 ? 2 : 3; }

// The values of the digits of a code, for every index of a table: of the lowest digit, and of the second.
struct Values {
    float lowest[16], second[16];
    float largest;  // magnitude
};
template <int DIMS>
constexpr Values make_values(float first, float step) {
    Values v = {};
    const int levels = DIMS == 8 ? 3 : 8, mask = DIMS == 8 ? 3 : 7;
    for (int e = 0; e < 16; ++e) {
        v.lowest[e] = (e & mask) < levels ? first + step * (float)(e & mask) : 0.f;
        v.second[e] = e >> bits_of(DIMS) < levels ? first + step * (float)(e >> bits_of(DIMS)) : 0.f;
    }
    const float last = first + step * (float)(levels - 1), a = first < 0 ? -first : first, b = last < 0 ? -last : last;
    v.largest = a > b ? a : b;
    return v;
}
// Twice the coordinate plus one: the values of the IQ2 and IQ3 grids while they are searched.
template <int DIMS>
constexpr Values ODD = make_values<DIMS>(1, 2);

// Entry i of a table, for the low bits of every i; a table has as many entries as a vector, but not fewer than 2^BITS.
template <int BITS>
struct Table {
#if defined(__AVX2__)
    F entries;

    INLINE_MEMBER F operator[](I i) const {
#if defined(__AVX512F__)
        return (F)_mm512_permutexvar_ps((__m512i)i, (__m512)entries);
#else
        return (F)_mm256_permutevar8x32_ps((__m256)entries, (__m256i)i);
#endif
    }
    // term(e): entries e .. e + LANES - 1
    template <class Term>
    INLINE_MEMBER void fill(Term term) {
        entries = term(0);
    }
#else
    static constexpr int SIZE = 1 << BITS;
    float entries[SIZE];

    INLINE_MEMBER F operator[](I i) const {
        F y;
        for (int l = 0; l < LANES; ++l) y[l] = entries[i[l] & (SIZE - 1)];
        return y;
    }
    template <class Term>
    INLINE_MEMBER void fill(Term term) {
        for (int e = 0; e < SIZE; e += LANES) store(entries + e, term(e));
    }
#endif
};

// The smallest lane.
INLINE float least_lane(F x) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_ps((__m512)x);
#elif defined(__AVX2__)
    __m128 y = _mm_min_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_min_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_min_ss(y, _mm_shuffle_ps(y, y, 1)));
#else
    float least = x[0];
    for (int l = 1; l < LANES; ++l) least = x[l] < least ? x[l] : least;
    return least;
#endif
}
// lane_bits(a <= b)
INLINE uint32_t lanes_at_most(F a, F b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#else
    return lane_bits(a <= b);
#endif
}

// ggml's search: the point of `list` with the smallest sum of w (scale value - x)^2.
template <int DIMS>
INLINE int search_exactly(const NeighbourLists& lists, int list, const float* x, const float* w, float scale,
                          const Values& values) {
    constexpr int BITS = bits_of(DIMS);
    const int start = lists.lists[list].start, size = lists.lists[list].size;
    const uint16_t* codes = lists.codes + start;
    Table<BITS> terms[DIMS];
    for (int i = 0; i < DIMS; ++i)
        terms[i].fill([&](int e) __attribute__((always_inline)) {
            const F diff = scale * load(values.lowest + e) - x[i];
            return w[i] * diff * diff;
        });
    float least = 3.40282347e+38f;
    int best = 0;
    for (int j = 0; j < size; j += LANES) {
        const I code = load_shorts(codes + j);
        F distance = terms[0][code];
        for (int i = 1; i < DIMS; ++i) distance += terms[i][code >> (BITS * i)];
        const float here = least_lane(distance);  // those past the end repeat the first
        if (!(here < least)) continue;
        least = here;
        best = j + __builtin_ctz(lanes_at_most(distance, splat(here)) | (1u << (LANES - 1)));
    }
    return lists.points[start + (best < size ? best : 0)];
}

// Whether x / scale is clearly within the cell of its code. Then of two neighbors the one that is nearer to the code in
// every coordinate in which they differ has no larger a sum. inverse x + offset: the value on the
// scale of ODD. x is read up to a multiple of LANES.
template <int DIMS>
INLINE bool is_inside_cell(const float* x, float scale, float inverse, float offset) {
    if (!(scale > 1e-9f && scale < 1e9f)) return false;
    // the distance from the even numbers between the lowest and the highest value
    constexpr float TOP = DIMS == 8 ? 5 : 15;
    bool inside = true;
    for (int i = 0; i < DIMS; i += LANES) {
        const F half = 0.5f * max(min(inverse * load(x + i) + offset, splat(TOP)), splat(1.f));
        constexpr uint32_t ALL = (1u << (DIMS < LANES ? DIMS : LANES)) - 1;
        inside &= (lanes_at_most(splat(5e-5f), abs(half - round_small(half))) & ALL) == ALL;
    }
    return inside;
}

// The estimate for one point and any scale; lanes are scales.
template <int DIMS>
struct PointSearch {
    // AVX-512 has a lookup in 16 entries: two digits of 8-dimensional codes.
#if defined(__AVX2__) && !defined(__AVX512F__)
    static constexpr int DIGITS = 1;
#else
    static constexpr int DIGITS = DIMS == 8 ? 2 : 1;
#endif
    static constexpr int BITS = bits_of(DIMS) * DIGITS, TABLES = DIMS / DIGITS, MOST = 128;

    const Grid& grid;
    const float *x, *w;
    const Values& values;
    Table<BITS> quadratic[TABLES], linear[TABLES];
    float weight, largest;  // sum of w; largest |x|

    INLINE_MEMBER PointSearch(const Grid& grid, const float* x, const float* w, const Values& values)
        : grid(grid), x(x), w(w), values(values) {
        for (int k = 0; k < TABLES; ++k) {
            const int i = k * DIGITS, j = i + DIGITS - 1;
            const float wx = 2 * w[i] * x[i], second_wx = 2 * w[j] * x[j];
            quadratic[k].fill([&](int e) __attribute__((always_inline)) {
                const F v = load(values.lowest + e), second = load(values.second + e), sum = w[i] * v * v;
                return DIGITS == 2 ? sum + w[j] * second * second : sum;
            });
            linear[k].fill([&](int e) __attribute__((always_inline)) {
                const F v = load(values.lowest + e), second = load(values.second + e);
                return DIGITS == 2 ? wx * v + second_wx * second : wx * v;
            });
        }
        weight = 0, largest = 0;
        for (int i = 0; i < DIMS; ++i) {
            weight += w[i];
            largest = largest > abs(x[i]) ? largest : abs(x[i]);
        }
    }

    // Replaces `code`, whose entry in the grid's index is negative, by the code of the point that ggml finds, wherever
    // it stands in `codes`, one for each trial. inside: bit t is set where x is clearly inside the cell of the code of
    // trial t. Returns the bits of the trials.
    template <int VECTORS>
    INLINE_MEMBER uint32_t replace(int32_t code, const float* scales, const float* inverses, uint32_t inside,
                                   int32_t* codes) const {
        const int list = -1 - grid.index[code];
        const NeighbourLists::List entries = grid.undominated.lists[list];
        const uint16_t* const listed = grid.undominated.codes + entries.start;
        float a[MOST], b[MOST];
        int32_t candidates[MOST];
        const int size = entries.size < MOST ? entries.size : 1;
        for (int j = 0; j < size; j += LANES) sums(load_shorts(listed + j), a + j, b + j, candidates + j);
        uint32_t replaced = 0, unsure = 0;
        for (int v = 0; v < VECTORS; ++v) {
            const I before = load(codes + v * LANES), here = before == code;
            if (!any(here)) continue;
            const F scale = load(scales + v * LANES);
            F least = scale * a[0] - b[0], second = splat(3.40282347e+38f);
            I best = splat(candidates[0]);
            for (int j = 1; j < size; ++j) {
                const F estimate = scale * a[j] - b[j];
                best = estimate < least ? splat(candidates[j]) : best;
                second = min(second, max(least, estimate));
                least = min(least, estimate);
            }
            const F reach = values.largest * scale + largest;
            const F error = (4e-6f * weight) * reach * reach * load(inverses + v * LANES);
            store(codes + v * LANES, here ? best : before);
            replaced |= lane_bits(here) << (v * LANES);
            unsure |= lane_bits(here & ~(second - least > error)) << (v * LANES);
        }
        const bool is_usual = weight > 1e-13f && weight < 1e13f && largest < 1e9f && entries.size < MOST;
        for (uint32_t rest = is_usual ? unsure | (replaced & ~inside) : replaced; rest; rest &= rest - 1) {
            const int t = __builtin_ctz(rest);
            const NeighbourLists& lists = (inside >> t) & 1 ? grid.undominated : grid.neighbours;
            codes[t] = grid.codes[search_exactly<DIMS>(lists, list, x, w, scales[t], values)];
        }
        return replaced;
    }

   private:
    // A and B of LANES codes, and the codes.
    INLINE_MEMBER void sums(I code, float* a, float* b, int32_t* codes) const {
        F sum_a = quadratic[0][code], sum_b = linear[0][code];
        for (int k = 1; k < TABLES; ++k) {
            const I digits = code >> (BITS * k);
            sum_a += quadratic[k][digits];
            sum_b += linear[k][digits];
        }
        store(a, sum_a);
        store(b, sum_b);
        store(codes, code);
    }
};

}  // namespace KERNELS_ISA
