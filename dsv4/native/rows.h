// Rows of the key-value cache in their stored formats. Contract: dsv4/ops/rows; shapes K R J as there.
//
// A packed row: K - R plain channels as E4M3 codes, R rotary channels as bfloat16, one E8M0 scale a group of
// ROW_GROUP plain channels, padded with zeros to 8 bytes. A packed indexer key: J E2M1 codes, the low nibble the even
// channel, then one E8M0 scale a group of INDEX_GROUP. Scales are powers of two, so packing what is on the grid loses
// nothing. A NaN stays one; with E2M1, which has none, its whole group becomes NaN.
#pragma once
#include "common.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define ROW_GROUP 64
#define INDEX_GROUP 32

enum { ROW_FLOAT32 = 0, ROW_BFLOAT16 = 1, ROW_PACKED = 2 };

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

typedef uint8_t bvec __attribute__((vector_size(LANES), aligned(1), may_alias));

// bfloat16 channels of a packed row may lie at an odd address.
typedef uint16_t loose16 __attribute__((aligned(1), may_alias));

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

// 2^(code - 127); 255 is NaN.
static inline float e8m0_value(uint32_t code) {
    return float_of(code == 255 ? 0x7fc00000 : code == 0 ? 0x00400000 : code << 23);
}

// 1 / e8m0_value(code) for the codes that rows have, 1 to 253.
static inline float e8m0_inverse(uint32_t code) { return float_of((254 - code) << 23); }

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

// 0, 0.5, 1, 1.5, 2, 3, 4, 6: the nearest, ties to the even code.
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

// The E8M0 code of the least power of two s with max(|x|, 1e-4) <= 448 s; 448 is 1.75 x 2^8.
static inline uint32_t e4m3_scale(const float *x, long n) {
    uint32_t most = largest_bits(x, n), least = bits_of(1e-4f);
    return (((most > least ? most : least) + 0x1fffff) >> 23) - 8;
}

// The least with max(|x|, 6 x 2^-126) <= 6 s; 6 is 1.5 x 2^2.
static inline uint32_t e2m1_scale(const float *x, long n) {
    uint32_t most = largest_bits(x, n), least = 0x01c00000;
    return (((most > least ? most : least) + 0x3fffff) >> 23) - 2;
}

static inline long groups_of(long n, long group) { return (n + group - 1) / group; }

static inline long row_bytes(int format, long K, long R) {
    if (format != ROW_PACKED) return (format == ROW_FLOAT32 ? 4 : 2) * K;
    return K + R + groups_of(groups_of(K - R, ROW_GROUP), 8) * 8;
}

static inline long index_row_bytes(int format, long J) {
    if (format != ROW_PACKED) return (format == ROW_FLOAT32 ? 4 : 2) * J;
    return groups_of(J, 2) + groups_of(J, INDEX_GROUP);
}

static inline void plain_read(float *restrict to, const uint8_t *restrict row, int is_bfloat16, long n) {
    if (is_bfloat16)
        for (long i = 0; i < n; i++) to[i] = widen(((const loose16 *)row)[i]);
    else
        memcpy(to, row, 4 * n);
}

static inline void plain_write(uint8_t *restrict row, const float *restrict from, int is_bfloat16, long n) {
    if (is_bfloat16)
        for (long i = 0; i < n; i++) ((loose16 *)row)[i] = narrow_to_bfloat16(from[i]);
    else
        memcpy(row, from, 4 * n);
}

static inline void row_read(float *restrict to, const uint8_t *restrict row, int format, long K, long R) {
    long plain = format == ROW_PACKED ? K - R : 0;
    const uint8_t *scale = row + plain + 2 * R;
    for (long first = 0; first < plain; first += ROW_GROUP) {
        long end = first + ROW_GROUP < plain ? first + ROW_GROUP : plain;
        float factor = e8m0_value(scale[first / ROW_GROUP]);
        for (long i = first; i < end; i++) to[i] = e4m3_value(row[i]) * factor;
    }
    plain_read(to + plain, row + plain, format != ROW_FLOAT32, K - plain);
}

// A packed row as bfloat16, in which its grid is exact: the lower half of each float is zero.
static inline void row_read_narrow(uint16_t *restrict to, const uint8_t *restrict row, long K, long R) {
    long plain = K - R;
    const uint8_t *scale = row + plain + 2 * R;
    for (long first = 0; first < plain; first += ROW_GROUP) {
        long end = first + ROW_GROUP < plain ? first + ROW_GROUP : plain;
        float factor = e8m0_value(scale[first / ROW_GROUP]);
        for (long i = first; i < end; i++) to[i] = bits_of(e4m3_value(row[i]) * factor) >> 16;
    }
    memcpy(to + plain, row + plain, 2 * R);
}

static inline void row_write(uint8_t *restrict row, const float *restrict from, int format, long K, long R) {
    long plain = format == ROW_PACKED ? K - R : 0;
    plain_write(row + plain, from + plain, format != ROW_FLOAT32, K - plain);
    if (format != ROW_PACKED) return;
    uint8_t *scale = row + plain + 2 * R;
    memset(scale, 0, row_bytes(format, K, R) - plain - 2 * R);
    for (long first = 0; first < plain; first += ROW_GROUP) {
        long end = first + ROW_GROUP < plain ? first + ROW_GROUP : plain;
        uint32_t code = e4m3_scale(from + first, end - first);
        float factor = e8m0_inverse(code);
        scale[first / ROW_GROUP] = code;
        for (long i = first; i < end; i++) row[i] = e4m3_code(from[i] * factor);
    }
}

static inline void index_row_read(float *restrict to, const uint8_t *restrict row, int format, long J) {
    if (format != ROW_PACKED) {
        plain_read(to, row, format != ROW_FLOAT32, J);
        return;
    }
    const uint8_t *scale = row + groups_of(J, 2);
    for (long first = 0; first < J; first += INDEX_GROUP) {
        long end = first + INDEX_GROUP < J ? first + INDEX_GROUP : J;
        float factor = e8m0_value(scale[first / INDEX_GROUP]);
        if (end - first == 2 * LANES) {
            e2m1_read(to + first, row + first / 2, factor);
            continue;
        }
        for (long i = first / 2; i < end / 2; i++) {
            to[2 * i] = e2m1_value(row[i] & 15) * factor;
            to[2 * i + 1] = e2m1_value(row[i] >> 4) * factor;
        }
        if (end % 2) to[end - 1] = e2m1_value(row[end / 2] & 15) * factor;
    }
}

static inline void index_row_write(uint8_t *restrict row, const float *restrict from, int format, long J) {
    if (format != ROW_PACKED) {
        plain_write(row, from, format != ROW_FLOAT32, J);
        return;
    }
    uint8_t *scale = row + groups_of(J, 2);
    for (long first = 0; first < J; first += INDEX_GROUP) {
        long end = first + INDEX_GROUP < J ? first + INDEX_GROUP : J, has_nan = 0;
        uint32_t code = e2m1_scale(from + first, end - first);
        float factor = e8m0_inverse(code);
        for (long i = first; i < end; i++) has_nan |= from[i] != from[i];
        scale[first / INDEX_GROUP] = has_nan ? 255 : code;
        for (long i = first / 2; i < end / 2; i++)
            row[i] = e2m1_code(from[2 * i] * factor) | e2m1_code(from[2 * i + 1] * factor) << 4;
        if (end % 2) row[end / 2] = e2m1_code(from[end - 1] * factor);
    }
}
