// ggml's searches for scales, in lanes: each lane follows the scalar algorithm's operations in their order.
//
// The N elements of a group are N vectors; lane l of each is the group of block l. Sums run in index order. Where ggml
// stores the best codes, these functions store the numbers that produced them and recompute the codes on request: the
// same arithmetic gives the same codes, and most callers do not need them.
#pragma once

#include "lanes.hpp"

namespace KERNELS_ISA {

constexpr float GROUP_EPSILON = 1e-15f;  // groups and sets of scales whose largest value is smaller are zero

// The element of largest magnitude, with its sign; the first of equal ones.
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

template <int N>
INLINE F sum(const F* x) {
    F total = {};
    for (int i = 0; i < N; ++i) total += x[i];
    return total;
}

template <int N>
INLINE F sum_of_squares(const F* x) {
    F total = {};
    for (int i = 0; i < N; ++i) total += x[i] * x[i];
    return total;
}

// ---------------------------------------------------------------------------------------------------------------
// A scale and a minimum: make_qkx2_quants and make_qkx3_quants. x is about scale * l + minimum, l in 0..MAX, minimum <=
// 0.

struct ScaleAndMin {
    F scale, minus_min;
    // the source of the best codes: l = clip(round(code_scale * (x - code_min)))
    F code_scale, code_min;
    I first_guess;  // the best codes are those before the search
};

// The code of v = inverse scale * (x - minimum), as a float. Exact for every v within nearest_int's range; NaN gives 0,
// +inf MAX.
template <int MAX>
INLINE F clamped_code(F v) {
    return round_small(max(min(splat((float)MAX), v), F{}));
}
// The same for any v, including ggml's wraparound.
template <int MAX>
INLINE F wrapping_code(F v) {
    return to_float(clip(nearest_int(v), 0, MAX));
}

template <bool ABSOLUTE>
INLINE F error_of(F diff) {
    return ABSOLUTE ? abs(diff) : diff * diff;
}

// MATRIX: the variant with an importance matrix (qkx3), which clamps before it rounds. Without it (qkx2) codes wrap
// when the minimum is so close to the maximum that v leaves nearest_int's range; such steps take the slow path.
template <int N, int MAX, int STEPS, bool ABSOLUTE, bool MATRIX>
INLINE ScaleAndMin fit_scale_and_min(const F* x, const F* w, float first, float delta) {
    F low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    F minimum = low > 0.f ? F{} : low;
    const F start = minimum;
    const I flat = MATRIX ? high <= minimum : high == minimum;

    F inverse = (float)MAX / (flat ? splat(1.f) : high - minimum);
    ScaleAndMin best = {1.f / inverse, F{}, inverse, minimum, ~I{}};
    F best_error = {};
    for (int i = 0; i < N; ++i) {
        const F l = wrapping_code<MAX>(inverse * (x[i] - minimum));
        best_error += w[i] * error_of<ABSOLUTE>((best.scale * l + minimum) - x[i]);
    }

    for (int step = 0; step <= STEPS; ++step) {
        inverse = ((first + delta * (float)step) + (float)MAX) / (flat ? splat(1.f) : high - minimum);
        F l[N], sum_l = {}, sum_l2 = {}, sum_xl = {};
        // v is monotonic in x, so its ends bound it
        const F top = abs(inverse * (high - minimum)), bottom = abs(inverse * (low - minimum));
        if (MATRIX || !any(~((top <= 4194303.f) & (bottom <= 4194303.f)))) {
            for (int i = 0; i < N; ++i) {
                l[i] = clamped_code<MAX>(inverse * (x[i] - minimum));
                const F wl = w[i] * l[i];
                sum_l += wl;
                sum_l2 += wl * l[i];
                sum_xl += wl * x[i];
            }
        } else {
            for (int i = 0; i < N; ++i) {
                l[i] = wrapping_code<MAX>(inverse * (x[i] - minimum));
                const F wl = w[i] * l[i];
                sum_l += wl;
                sum_l2 += wl * l[i];
                sum_xl += wl * x[i];
            }
        }
        const F determinant = sum_w * sum_l2 - sum_l * sum_l;
        F scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        F offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const I positive = offset > 0.f;
        scale = positive ? sum_xl / sum_l2 : scale;
        offset = positive ? F{} : offset;
        F error = {};
        for (int i = 0; i < N; ++i) error += w[i] * error_of<ABSOLUTE>((scale * l[i] + offset) - x[i]);
        const I better = (determinant > 0.f) & (error < best_error);
        best_error = better ? error : best_error;
        best.scale = better ? scale : best.scale;
        best.code_scale = better ? inverse : best.code_scale;
        best.code_min = better ? minimum : best.code_min;
        best.first_guess = best.first_guess & ~better;
        minimum = better ? offset : minimum;
    }
    best.scale = flat ? F{} : best.scale;
    best.minus_min = -(flat ? start : minimum);
    best.code_scale = flat ? F{} : best.code_scale;
    return best;
}

// The codes of the best fit.
template <int MAX, bool MATRIX>
INLINE I code_of(const ScaleAndMin& fit, F x) {
    const F v = fit.code_scale * (x - fit.code_min);
    const I wrapping = clip(nearest_int(v), 0, MAX);
    return MATRIX ? (fit.first_guess ? wrapping : truncate(clamped_code<MAX>(v))) : wrapping;
}

// ---------------------------------------------------------------------------------------------------------------
// A scale alone, for codes of both signs: make_qx_quants with rmse_type 1. x is about scale * (l - MAX), l in 0..2 MAX
// - 1.

struct Scale {
    F scale;
    F code_scale;
    I dead;  // all zero: scale 0 and codes 0
};

template <int N, int MAX>
INLINE Scale fit_scale(const F* x, const F* w) {
    const F m = signed_max<N>(x);
    const I dead = abs(m) < GROUP_EPSILON;
    const F largest = dead ? splat(1.f) : m;
    F wx[N];
    for (int i = 0; i < N; ++i) wx[i] = w[i] * x[i];

    Scale best = {F{}, F{}, dead};
    F best_score = {};
    const auto attempt = [&](float steps, bool first) __attribute__((always_inline)) {
        const F inverse = -steps / largest;
        F sum_lx = {}, sum_l2 = {};
        for (int i = 0; i < N; ++i) {
            const F l = round_small(max(min(inverse * x[i], splat(MAX - 1.f)), splat(-(float)MAX)));
            sum_lx += wx[i] * l;
            sum_l2 += (w[i] * l) * l;
        }
        const F scale = sum_lx / sum_l2;
        if (first) {
            best.scale = sum_l2 != 0.f ? scale : F{};
            best.code_scale = inverse;
            best_score = best.scale * sum_lx;
        } else {
            const I better = (sum_l2 > 0.f) & (sum_lx * sum_lx > best_score * sum_l2);
            best.scale = better ? scale : best.scale;
            best.code_scale = better ? inverse : best.code_scale;
            best_score = better ? scale * sum_lx : best_score;
        }
    };
    attempt(MAX, true);
    for (int k = -9; k <= 9; ++k)
        if (k != 0) attempt((float)MAX + 0.1f * (float)k, false);
    best.scale = dead ? F{} : best.scale;
    return best;
}

template <int MAX>
INLINE I code_of(const Scale& fit, F x) {
    const I l = clip(nearest_int(fit.code_scale * x), -MAX, MAX - 1) + MAX;
    return fit.dead ? I{} : l;
}

// ---------------------------------------------------------------------------------------------------------------
// A scale alone by coordinate descent: make_q3_quants with do_rmse. GROUPS groups of N at once, x[g * N + i], so that
// their long chains of dependent operations overlap. Codes are l + MAX, as floats.

template <int N, int MAX, int GROUPS>
INLINE void descend_scales(const F* x, F* scales, F* codes) {
    F sum_lx[GROUPS], sum_l2[GROUPS];
    I dead[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        const F* const xg = x + g * N;
        const F m = signed_max<N>(xg);
        dead[g] = abs(m) < GROUP_EPSILON;
        const F inverse = -(float)MAX / (dead[g] ? splat(1.f) : m);
        sum_lx[g] = sum_l2[g] = F{};
        for (int i = 0; i < N; ++i) {
            const F l = round_small(max(min(inverse * xg[i], splat(MAX - 1.f)), splat(-(float)MAX))), w = xg[i] * xg[i];
            codes[g * N + i] = l;
            sum_lx[g] += w * xg[i] * l;
            sum_l2[g] += w * l * l;
        }
    }
    int quiet[GROUPS] = {};  // elements since the last change; after N nothing changes any more
    for (int sweep = 0; sweep < 5; ++sweep) {
        bool done = true;
        for (int i = 0; i < N; ++i)
            for (int g = 0; g < GROUPS; ++g) {
                if (quiet[g] >= N) continue;
                ++quiet[g];
                const F xi = x[g * N + i], l = codes[g * N + i], w = xi * xi, wx = w * xi;
                F lx = sum_lx[g] - wx * l, l2 = sum_l2[g] - w * l * l;
                // division is slow, and most codes are clearly the nearest
                constexpr float CLEARLY = 0.5f - 1.5f * RECIPROCAL_ERROR * (MAX + 1);
                if (all_below(abs(xi * l2 * estimated_reciprocal(lx) - l), splat(CLEARLY))) continue;
                const F next = to_float(clip(nearest_int(xi * l2 / lx), -MAX, MAX - 1));
                const I possible = (lx > 0.f) & (next != l);
                lx += wx * next;
                l2 += w * next * next;
                const I better = possible & (l2 > 0.f) & (lx * lx * sum_l2[g] > sum_lx[g] * sum_lx[g] * l2);
                if (!any(better)) continue;
                quiet[g] = 0;
                codes[g * N + i] = better ? next : l;
                sum_lx[g] = better ? lx : sum_lx[g];
                sum_l2[g] = better ? l2 : sum_l2[g];
            }
        for (int g = 0; g < GROUPS; ++g) done &= quiet[g] >= N;
        if (done) break;
    }
    for (int g = 0; g < GROUPS; ++g) {
        scales[g] = dead[g] | ~(sum_l2[g] > 0.f) ? F{} : sum_lx[g] / sum_l2[g];
        for (int i = 0; i < N; ++i) codes[g * N + i] = dead[g] ? F{} : codes[g * N + i] + (float)MAX;
    }
}

// ---------------------------------------------------------------------------------------------------------------
// A scale for scales, which are positive with rare exceptions: make_qp_quants. codes[i] is in 0..MAX (or, in an
// exception, the low byte of a negative number, as ggml stores it). Returns the scale.

template <int N, int MAX>
INLINE F fit_positive(const F* x, const F* w, I* codes) {
    F largest = {};
    for (int i = 0; i < N; ++i) largest = largest > x[i] ? largest : x[i];
    const I dead = largest < GROUP_EPSILON;
    largest = dead ? splat(1.f) : largest;

    F inverse = (float)MAX / largest, scale = 1.f / inverse, best = {};
    for (int i = 0; i < N; ++i) {
        const F diff = x[i] - scale * to_float(nearest_int(inverse * x[i]) & 255);
        best += w[i] * diff * diff;
    }
    for (int k = -4; k <= 4; ++k) {
        if (k == 0) continue;
        const F trial = (0.1f * (float)k + (float)MAX) / largest;
        scale = 1.f / trial;
        F error = {};
        for (int i = 0; i < N; ++i) {
            const I l = nearest_int(trial * x[i]);
            const F diff = x[i] - scale * to_float(l > MAX ? splat(MAX) : l);
            error += w[i] * diff * diff;
        }
        const I better = error < best;
        best = better ? error : best;
        inverse = better ? trial : inverse;
    }
    F sum_lx = {}, sum_l2 = {};
    for (int i = 0; i < N; ++i) {
        I l = nearest_int(inverse * x[i]);
        l = l > MAX ? splat(MAX) : l;
        codes[i] = l & 255;
        const F f = to_float(l);
        sum_lx += w[i] * x[i] * f;
        sum_l2 += w[i] * f * f;
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        I changed = {};
        for (int i = 0; i < N; ++i) {
            const F wx = w[i] * x[i], l = to_float(codes[i]);
            F lx = sum_lx - wx * l, l2 = sum_l2 - w[i] * l * l;
            const I possible = (lx > 0.f) & (l2 > 0.f);
            I next = nearest_int(x[i] * l2 / lx);
            next = next > MAX ? splat(MAX) : next;
            const F f = to_float(next);
            lx += wx * f;
            l2 += w[i] * f * f;
            const I better = possible & (next != codes[i]) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            codes[i] = better ? next & 255 : codes[i];
            sum_lx = better ? lx : sum_lx;
            sum_l2 = better ? l2 : sum_l2;
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < N; ++i) codes[i] = dead ? I{} : codes[i];
    return dead | ~(sum_l2 > 0.f) ? F{} : sum_lx / sum_l2;
}

}  // namespace KERNELS_ISA
