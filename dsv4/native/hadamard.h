// The Hadamard transform, and what indexer queries and keys are rounded to. Contract: dsv4/ops/lowbit.
#pragma once
#include "codes.h"

#define FP4_GROUP (2 * LANES)

// A NaN makes its group NaN.
static inline void e2m1_round(float *x, long n) {
    uint32_t scale = e2m1_scale(x, n);
    float inverse = e8m0_inverse(scale), factor = e8m0_value(has_nan(x, n) ? NAN_SCALE : scale);
    for (long i = 0; i < n; i++) x[i] = e2m1_rounded(x[i] * inverse) * factor;
}

#define LANES_BY(i) \
    0 ^ i, 1 ^ i, 2 ^ i, 3 ^ i, 4 ^ i, 5 ^ i, 6 ^ i, 7 ^ i, 8 ^ i, 9 ^ i, 10 ^ i, 11 ^ i, 12 ^ i, 13 ^ i, 14 ^ i, 15 ^ i

// a + b in lanes whose bit is clear, a - b in the others. The product with a sign is exact.
static inline vec pairs(vec x, vec other, int half) {
    vec sign;
    for (int i = 0; i < LANES; i++) sign[i] = i & half ? -1.0f : 1.0f;
    return other + x * sign;
}

// The transform of J numbers in whole vectors, in place and without its factor: sums and differences of numbers 1, 2,
// 4 .. apart, the order of the reference. Lanes past J are spoilt.
static inline void hadamard(float *x, long J) {
    for (long i = 0; i < J; i += LANES) {
        vec v = load(x + i);
        if (J > 1) v = pairs(v, SHUFFLE(v, v, LANES_BY(1)), 1);
        if (J > 2) v = pairs(v, SHUFFLE(v, v, LANES_BY(2)), 2);
        if (J > 4) v = pairs(v, SHUFFLE(v, v, LANES_BY(4)), 4);
        if (J > 8) v = pairs(v, SHUFFLE(v, v, LANES_BY(8)), 8);
        store(x + i, v);
    }
    for (long half = LANES; half < J; half *= 2)
        for (long first = 0; first < J; first += 2 * half)
            for (long i = first; i < first + half; i += LANES) {
                vec a = load(x + i), b = load(x + i + half);
                store(x + i, a + b);
                store(x + i + half, a - b);
            }
}

// J numbers, a power of two, in whole vectors: transformed, rounded to the dtype, and then in groups through E2M1.
static inline void index_round(float *x, long J, float factor, int is_bfloat16) {
    hadamard(x, J);
    for (long i = 0; i < J; i++) x[i] = rounded(x[i] * factor, is_bfloat16);
    if (J < FP4_GROUP) e2m1_round(x, J);
    else for (long at = 0; at < J; at += FP4_GROUP) e2m1_round(x + at, FP4_GROUP);
}
