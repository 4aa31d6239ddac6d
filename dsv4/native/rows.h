// Rows of the key-value cache in their stored formats. Contract: dsv4/ops/rows; shapes K R J as there.
//
// A packed row: K - R plain channels as E4M3 codes, R rotary channels as bfloat16, one E8M0 scale a group of
// ROW_GROUP plain channels, padded with zeros to 8 bytes. A packed indexer key: J E2M1 codes, the low nibble the even
// channel, then one E8M0 scale a group of INDEX_GROUP. Scales are powers of two, so packing what is on the grid loses
// nothing. A NaN stays one; with E2M1, which has none, its whole group becomes NaN.
#pragma once
#include "codes.h"

#define ROW_GROUP 64
#define INDEX_GROUP 32

enum { ROW_FLOAT32 = 0, ROW_BFLOAT16 = 1, ROW_PACKED = 2 };

// bfloat16 channels of a packed row may lie at an odd address.
typedef uint16_t loose16 __attribute__((aligned(1), may_alias));

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
        e4m3_read(to + first, row + first, end - first, e8m0_value(scale[first / ROW_GROUP]));
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
        long i = first;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        if (is_plain_scale(scale[first / ROW_GROUP]))
            for (; i + 32 <= end; i += 32) {
                __m256i sizes = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(row + i)), _mm256_set1_epi8(0x7f));
                __mmask32 is_nan = _mm256_cmpeq_epi8_mask(sizes, _mm256_set1_epi8(0x7f));
                __m512i numbers = fp8_pairs(row + i, (int)scale[first / ROW_GROUP] - 127);
                _mm512_storeu_si512(to + i, _mm512_mask_mov_epi16(numbers, is_nan, _mm512_set1_epi16(0x7fc0)));
            }
#endif
        for (; i < end; i++) to[i] = bits_of(e4m3_value(row[i]) * factor) >> 16;
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
        scale[first / ROW_GROUP] = e4m3_write(row + first, from + first, end - first);
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
        long end = first + INDEX_GROUP < J ? first + INDEX_GROUP : J;
        scale[first / INDEX_GROUP] = e2m1_write(row + first / 2, from + first, end - first);
    }
}
