// Rows of the key-value cache in their stored formats. Contract: dsv4/ops/rows; shapes K R J as there.
//
// A packed row: K - R plain channels as E4M3 codes, R rotary channels as bfloat16, one E8M0 scale a group of
// ROW_GROUP plain channels, padded with zeros to 8 bytes. A packed indexer key: J E2M1 codes, the low nibble the even
// channel, or J E4M3 codes, then one E8M0 scale a group of INDEX_GROUP. Scales are powers of two, so packing what is on
// the grid loses nothing. A NaN stays one; with keys its whole group becomes NaN.
//
// A page of packed indexer keys of whole groups lies in columns, so that a vector holds one unit of many keys: units of
// 4 bytes of codes, [J / 8, entries] or [J / 4, entries], then scales, [groups, entries]. Four E4M3 codes lie in
// the order 0, 2, 1, 3, as a GPU wants them (dsv4/ops/rows/formats.py). Pages of other rows are rows.
#pragma once
#include "codes.h"

#define ROW_GROUP 64
#define INDEX_GROUP 32

enum { ROW_FLOAT32 = 0, ROW_BFLOAT16 = 1, ROW_PACKED = 2, ROW_PACKED_FP8 = 3 };

// bfloat16 channels of a packed row may lie at an odd address.
typedef uint16_t loose16 __attribute__((aligned(1), may_alias));

static inline int is_packed(int format) { return format >= ROW_PACKED; }

static inline long row_bytes(int format, long K, long R) {
    if (!is_packed(format)) return (format == ROW_FLOAT32 ? 4 : 2) * K;
    return K + R + groups_of(groups_of(K - R, ROW_GROUP), 8) * 8;
}

// Of the codes of a packed key.
static inline long code_bytes(int format, long J) { return format == ROW_PACKED_FP8 ? J : groups_of(J, 2); }

static inline long index_row_bytes(int format, long J) {
    if (!is_packed(format)) return (format == ROW_FLOAT32 ? 4 : 2) * J;
    return code_bytes(format, J) + groups_of(J, INDEX_GROUP);
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
    long plain = is_packed(format) ? K - R : 0;
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
    long r = 0;
    for (; r + 32 <= R; r += 32) memcpy(to + plain + r, row + plain + 2 * r, 64); // of a known size: no call
    memcpy(to + plain + r, row + plain + 2 * r, 2 * (R - r));
}

static inline void row_write(uint8_t *restrict row, const float *restrict from, int format, long K, long R) {
    long plain = is_packed(format) ? K - R : 0;
    plain_write(row + plain, from + plain, format != ROW_FLOAT32, K - plain);
    if (!is_packed(format)) return;
    uint8_t *scale = row + plain + 2 * R;
    memset(scale, 0, row_bytes(format, K, R) - plain - 2 * R);
    for (long first = 0; first < plain; first += ROW_GROUP) {
        long end = first + ROW_GROUP < plain ? first + ROW_GROUP : plain;
        scale[first / ROW_GROUP] = e4m3_write(row + first, from + first, end - first);
    }
}

static inline void index_row_read(float *restrict to, const uint8_t *restrict row, int format, long J) {
    if (!is_packed(format)) {
        plain_read(to, row, format != ROW_FLOAT32, J);
        return;
    }
    const uint8_t *scale = row + code_bytes(format, J);
    for (long first = 0; first < J; first += INDEX_GROUP) {
        long end = first + INDEX_GROUP < J ? first + INDEX_GROUP : J;
        float factor = e8m0_value(scale[first / INDEX_GROUP]);
        if (format == ROW_PACKED_FP8) {
            e4m3_read(to + first, row + first, end - first, factor);
            continue;
        }
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
    if (!is_packed(format)) {
        plain_write(row, from, format != ROW_FLOAT32, J);
        return;
    }
    uint8_t *scale = row + code_bytes(format, J);
    for (long first = 0; first < J; first += INDEX_GROUP) {
        long n = first + INDEX_GROUP < J ? INDEX_GROUP : J - first;
        scale[first / INDEX_GROUP] = format == ROW_PACKED_FP8 ? key_write(row + first, from + first, n)
                                                              : e2m1_write(row + first / 2, from + first, n);
    }
}

static inline int is_in_columns(int format, long J) { return is_packed(format) && J % INDEX_GROUP == 0; }

// Where in a page of so many entries an entry's unit u lies, and its scale of group g after so many bytes of codes.
static inline long unit_place(long entries, long entry, long u) { return 4 * (u * entries + entry); }
static inline long scale_place(long entries, long entry, long g, long codes) { return (codes + g) * entries + entry; }

// Copy an entry from one page in columns to another.
static inline void copy_entry(uint8_t *restrict to, long place, const uint8_t *restrict page, long entry, long entries,
                              int format, long J) {
    long codes = code_bytes(format, J);
    for (long u = 0; u < codes / 4; u++)
        memcpy(to + unit_place(entries, place, u), page + unit_place(entries, entry, u), 4);
    for (long g = 0; g < J / INDEX_GROUP; g++)
        to[scale_place(entries, place, g, codes)] = page[scale_place(entries, entry, g, codes)];
}

// Units of codes of one group in their order in a page, and back.
static inline void order_codes(uint8_t *codes, int format) {
    for (long i = 0; i < INDEX_GROUP && format == ROW_PACKED_FP8; i += 4) {
        uint8_t one = codes[i + 1];
        codes[i + 1] = codes[i + 2], codes[i + 2] = one;
    }
}

static inline void index_entry_write(uint8_t *restrict page, long entry, long entries, const float *restrict from,
                                     int format, long J) {
    if (!is_in_columns(format, J)) {
        index_row_write(page + entry * index_row_bytes(format, J), from, format, J);
        return;
    }
    long units = code_bytes(format, INDEX_GROUP) / 4; // of a group
    for (long g = 0; g < J / INDEX_GROUP; g++, from += INDEX_GROUP) {
        uint8_t codes[INDEX_GROUP];
        page[scale_place(entries, entry, g, code_bytes(format, J))] =
            format == ROW_PACKED_FP8 ? key_write(codes, from, INDEX_GROUP) : e2m1_write(codes, from, INDEX_GROUP);
        order_codes(codes, format);
        for (long u = 0; u < units; u++) memcpy(page + unit_place(entries, entry, units * g + u), codes + 4 * u, 4);
    }
}

// The values of an entry of a page in columns.
static inline void index_entry_read(float *restrict to, const uint8_t *restrict page, long entry, long entries,
                                    int format, long J) {
    long units = code_bytes(format, INDEX_GROUP) / 4; // of a group
    for (long g = 0; g < J / INDEX_GROUP; g++, to += INDEX_GROUP) {
        uint8_t codes[INDEX_GROUP];
        float factor = e8m0_value(page[scale_place(entries, entry, g, code_bytes(format, J))]);
        for (long u = 0; u < units; u++) memcpy(codes + 4 * u, page + unit_place(entries, entry, units * g + u), 4);
        order_codes(codes, format);
        if (format == ROW_PACKED_FP8) e4m3_read(to, codes, INDEX_GROUP, factor);
        else e2m1_read(to, codes, factor);
    }
}
