// Rows of tensors as float32 vectors; every kernel computes in float32 and stores float32 or bfloat16.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec spread(float x) { return x - (vec){0}; }

static inline float sum_lanes(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// The product of two rows of ``width`` floats, whole vectors.
static inline float dot(const float *a, const float *b, long width) {
    vec total = {0};
    for (long d = 0; d < width; d += LANES) total += load(a + d) * load(b + d);
    return sum_lanes(total);
}

// How many floats hold a row of n in whole vectors.
static inline long whole(long n) { return (n + LANES - 1) / LANES * LANES; }

static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// Round to nearest, ties to even; a NaN stays one.
static inline uint16_t narrow_to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

static inline float rounded(float x, int is_bfloat16) { return is_bfloat16 ? widen(narrow_to_bfloat16(x)) : x; }

// Copy n elements that begin at element ``at`` of a tensor into floats, and back.
static inline void read_row(float *restrict to, const void *from, long at, long n, int is_bfloat16) {
    if (is_bfloat16) {
        const uint16_t *restrict x = (const uint16_t *)from + at;
        for (long i = 0; i < n; i++) to[i] = widen(x[i]);
    } else {
        memcpy(to, (const float *)from + at, 4 * n);
    }
}

static inline void write_row(void *to, long at, const float *restrict from, long n, int is_bfloat16) {
    if (is_bfloat16) {
        uint16_t *restrict y = (uint16_t *)to + at;
        for (long i = 0; i < n; i++) y[i] = narrow_to_bfloat16(from[i]);
    } else {
        memcpy((float *)to + at, from, 4 * n);
    }
}

// Zeroed scratch of n floats on a vector's boundary; callers free it.
static inline float *scratch(long n) {
    long bytes = 4 * whole(n > 0 ? n : 1);
    float *p = aligned_alloc(4 * LANES, bytes);
    if (!p) abort();
    memset(p, 0, bytes);
    return p;
}

// e to the x: 2 to the whole part of x log2(e) by exponent bits, a polynomial on the rest. Within 2 units in
// the last place; 0 below -87, capped at 88; a NaN stays one.
static inline float exponential(float x) {
    float y = x * 1.44269504f;
    y = y > 127.0f ? 127.0f : y;
    y = y < -126.0f ? -126.0f : y;
    float n = rintf(y);
    float r = x < -87.3f || x > 88.0f ? 0.0f : fmaf(n, -0.693145752f, x);
    r = x < -87.3f || x > 88.0f ? r : fmaf(n, -1.42860677e-6f, r);
    float p = 1.98756915e-4f;
    p = fmaf(p, r, 1.39819995e-3f);
    p = fmaf(p, r, 8.33345205e-3f);
    p = fmaf(p, r, 4.16657962e-2f);
    p = fmaf(p, r, 1.66666657e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p * r, r, r) + 1.0f;
    int32_t exponent = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &exponent, 4);
    return x < -87.3f ? 0.0f : p * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
