// Codes of few bits: E4M3, E2M1, and their scales, E8M0. Contract: dsv4/ops/lowbit.
#pragma once
#include "common.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

#define NAN_SCALE 255

typedef uint8_t bvec __attribute__((vector_size(LANES), aligned(1), may_alias));

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline long groups_of(long n, long group) { return (n + group - 1) / group; }

// Scales

// 2^(code - 127); 255 is NaN.
static inline float e8m0_value(uint32_t code) {
    return float_of(code == NAN_SCALE ? 0x7fc00000 : code == 0 ? 0x00400000 : code << 23);
}

// 1 / e8m0_value(code) for the codes that are made here, 1 to 253.
static inline float e8m0_inverse(uint32_t code) { return float_of((254 - code) << 23); }

// The bits of the largest |x| of n, NaN aside. Sizes compare as integers.
static inline uint32_t largest_bits(const float *x, long n) {
    int32_t most = 0;
    for (long i = 0; i < n; i++) {
        int32_t size = bits_of(x[i]) & 0x7fffffff;
        size = size > 0x7f800000 ? 0 : size;
        most = size > most ? size : most;
    }
    return most;
}

static inline int has_nan(const float *x, long n) {
    int32_t most = 0;
    for (long i = 0; i < n; i++) {
        int32_t size = bits_of(x[i]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    return most > 0x7f800000;
}

// The E8M0 code of the least power of two s with max(size, floor) <= 448 s; 448 is 1.75 x 2^8. most: the size's bits;
// least: the floor's, 1e-4, or in indexer keys 448 x 2^-126.
static inline uint32_t e4m3_scale_above(uint32_t most, uint32_t least) {
    return (((most > least ? most : least) + 0x1fffff) >> 23) - 8;
}

static inline uint32_t e4m3_scale_of(uint32_t most) { return e4m3_scale_above(most, bits_of(1e-4f)); }
static inline uint32_t e4m3_scale(const float *x, long n) { return e4m3_scale_of(largest_bits(x, n)); }
static inline uint32_t key_scale(const float *x, long n) { return e4m3_scale_above(largest_bits(x, n), 0x04e00000); }

// The least with max(|x|, 6 x 2^-126) <= 6 s; 6 is 1.5 x 2^2.
static inline uint32_t e2m1_scale(const float *x, long n) {
    uint32_t most = largest_bits(x, n), least = 0x01c00000;
    return (((most > least ? most : least) + 0x3fffff) >> 23) - 2;
}

// E4M3

// Of |x| at most 448; to nearest, ties to even. 2^14 has the spacing of subnormals, 2^-9, so adding it rounds them.
static inline uint8_t e4m3_code(float x) {
    float size = fabsf(x) > 448.0f ? 448.0f : fabsf(x);
    uint32_t bits = bits_of(size), subnormal = bits_of(size + 16384.0f) - bits_of(16384.0f);
    uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    uint32_t code = size < 0.015625f ? subnormal : normal;
    return (bits_of(x) >> 24 & 0x80) | (x != x ? 0x7f : code);
}

static inline float e4m3_value(uint32_t code) {
    uint32_t size = code & 0x7f, normal = (size << 20) + (120u << 23);
    uint32_t bits = size < 8 ? bits_of(size * 0.001953125f) : size == 0x7f ? 0x7fc00000 : normal;
    return float_of(bits | (code & 0x80) << 24);
}

// e4m3_value(e4m3_code(x)).
static inline float e4m3_rounded(float x) {
    float size = fabsf(x) > 448.0f ? 448.0f : fabsf(x);
    uint32_t bits = bits_of(size), subnormal = bits_of((size + 16384.0f) - 16384.0f);
    uint32_t normal = (bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000;
    uint32_t code = x != x ? 0x7fc00000 : size < 0.015625f ? subnormal : normal;
    return float_of(code | (bits_of(x) & 0x80000000));
}

// E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6

// The nearest, ties to the even code.
static inline uint8_t e2m1_code(float x) {
    float size = fabsf(x);
    uint32_t code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) +
                    (size >= 3.5f) + (size > 5.0f);
    return (bits_of(x) >> 28 & 8) | code;
}

static inline float e2m1_value(uint32_t code) {
    uint32_t size = code & 7, normal = ((size >> 1) + 126) << 23 | (size & 1) << 22;
    return float_of((size < 2 ? bits_of(size * 0.5f) : normal) | (code & 8) << 28);
}

// e2m1_value(e2m1_code(x)) of a number. 2^22 has the spacing 0.5 of the values below 1, so adding it rounds these.
static inline float e2m1_rounded(float x) {
    float size = fabsf(x) > 6.0f ? 6.0f : fabsf(x);
    uint32_t bits = bits_of(size), small = bits_of((size + 4194304.0f) - 4194304.0f);
    uint32_t large = (bits + 0x1fffff + (bits >> 22 & 1)) & 0xffc00000;
    return float_of((size < 1.0f ? small : large) | (bits_of(x) & 0x80000000));
}

// Two vectors of even and odd channels, in the order of channels.
static inline void store_pairs(float *to, vec even, vec odd) {
    store(to, SHUFFLE(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    store(to + LANES, SHUFFLE(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

// 2 LANES channels of E2M1.
static inline void e2m1_read(float *restrict to, const uint8_t *restrict from, float factor) {
    static const float value[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    ivec codes = __builtin_convertvector(*(const bvec *)from, ivec);
    vec even, odd;
#ifdef __AVX512F__
    even = (vec)_mm512_permutexvar_ps((__m512i)(codes & 15), (__m512)load(value));
    odd = (vec)_mm512_permutexvar_ps((__m512i)(codes >> 4), (__m512)load(value));
#else
    for (int i = 0; i < LANES; i++) even[i] = value[codes[i] & 15], odd[i] = value[codes[i] >> 4];
#endif
    store_pairs(to, even * factor, odd * factor);
}

// Groups, n numbers that share a scale

static inline void e4m3_read(float *restrict to, const uint8_t *restrict codes, long n, float factor) {
    for (long i = 0; i < n; i++) to[i] = e4m3_value(codes[i]) * factor;
}

static inline void e4m3_write_scaled(uint8_t *restrict codes, const float *restrict from, long n, uint32_t scale) {
    float inverse = e8m0_inverse(scale);
    for (long i = 0; i < n; i++) codes[i] = e4m3_code(from[i] * inverse);
}

// The scale is returned.
static inline uint32_t e4m3_write(uint8_t *restrict codes, const float *restrict from, long n) {
    uint32_t scale = e4m3_scale(from, n);
    e4m3_write_scaled(codes, from, n, scale);
    return scale;
}

// The same of an indexer key: NaN if a number is.
static inline uint32_t key_write(uint8_t *restrict codes, const float *restrict from, long n) {
    uint32_t scale = key_scale(from, n);
    e4m3_write_scaled(codes, from, n, scale);
    return has_nan(from, n) ? NAN_SCALE : scale;
}

// The scale is returned, NaN if a number is. An odd last channel has a byte of its own.
static inline uint32_t e2m1_write(uint8_t *restrict nibbles, const float *restrict from, long n) {
    uint32_t scale = e2m1_scale(from, n);
    float inverse = e8m0_inverse(scale);
    uint8_t codes[2 * LANES];
    for (long first = 0; first < n; first += 2 * LANES) {
        long count = n - first < 2 * LANES ? n - first : 2 * LANES;
        if (count % 2) codes[count] = 0;
        for (long i = 0; i < count; i++) codes[i] = e2m1_code(from[first + i] * inverse);
        for (long i = 0; i < (count + 1) / 2; i++) nibbles[first / 2 + i] = codes[2 * i] | codes[2 * i + 1] << 4;
    }
    return has_nan(from, n) ? NAN_SCALE : scale;
}

// Through the codes and back, in place.
static inline void e4m3_round(float *x, long n) {
    uint32_t scale = e4m3_scale(x, n);
    float inverse = e8m0_inverse(scale), factor = e8m0_value(scale);
    for (long i = 0; i < n; i++) x[i] = e4m3_rounded(x[i] * inverse) * factor;
}

// As bfloat16

// Whether an E8M0 scale keeps all numbers of a code among bfloat16's normal ones.
static inline int is_plain_scale(int scale) { return scale >= 32 && scale <= 222; }

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// 32 codes as bfloat16 numbers, 2^shift times their value: E2M1 by a table, E4M3 by moving its fields of plain
// scales.
static inline __m512i fp4_pairs(const uint8_t *codes, int shift) {
    static const uint16_t E2M1[32] = {0,      0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                      0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
    __m512i numbers = _mm512_loadu_si512(E2M1);
    __m512i table = _mm512_mask_add_epi16(numbers, 0xfefefefe, numbers, _mm512_set1_epi16(shift * 128));
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    x = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), _mm512_set1_epi32(0x000f000f));
    return _mm512_permutexvar_epi16(x, table);
}

static inline __m512i fp8_pairs(const uint8_t *codes, int shift) {
    // The bits of 0 .. 7 times 2^-9, the subnormal numbers.
    static const uint16_t SMALL[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(x, 7), 15);
    __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(0x7f)), step = _mm512_set1_epi16(shift * 128);
    __m512i number = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16((shift + 120) * 128));
    __m512i small = _mm512_mask_add_epi16(_mm512_loadu_si512(SMALL), 0xfffffffe, _mm512_loadu_si512(SMALL), step);
    __mmask32 is_small = _mm512_cmplt_epi16_mask(size, _mm512_set1_epi16(8));
    number = _mm512_mask_permutexvar_epi16(number, is_small, size, small);
    return _mm512_or_si512(number, sign);
}
#endif
