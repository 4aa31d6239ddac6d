// Pages of indexer keys turned into columns of values: a lane is an entry, so that a product with a query is formed in one lane.
//
// Keys are in units of 4 bytes: a float, or a pair of bfloat16 where the processor multiplies pairs.
#pragma once
#include "rows.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define ENTRIES 32 // of a page, two vectors
#define PAGES 4    // turned at once,
#define WIDE 128   // and their entries side by side

#ifdef __AVX512BF16__
#define PAIRED 1
#else
#define PAIRED 0
#endif

// Whether packed keys are read lane by lane.
#if PAIRED && defined(__AVX512VBMI__)
#define CODED 1
#else
#define CODED 0
#endif

typedef struct {
    long J;
    int format, is_bfloat16;
    long units, width; // of a key, and in whole vectors
    long bytes;        // of a stored key
} Keys;

typedef struct {
    int32_t *rows;  // a page as it is stored, [ENTRIES, width]
    float *values;  // of a key
    int32_t *units; // [width, WIDE]
} Columns;

static inline long round_up(long n, long step) { return (n + step - 1) / step * step; }

static Columns make_columns(const Keys *keys) {
    return (Columns){
        .rows = (int32_t *)scratch(ENTRIES * keys->width),
        .values = scratch(2 * keys->width),
        .units = (int32_t *)scratch(WIDE * keys->width),
    };
}

static void free_columns(Columns *columns) {
    free(columns->rows);
    free(columns->values);
    free(columns->units);
}

#ifdef __AVX512F__
// 4 units of LANES rows that lie ``stride`` bytes apart, as columns.
INLINE void columns_of(__m512i *column, const uint8_t *from, long stride) {
    __m512i m[4]; // in parts of 128 bits, rows 0, 4, 8, 12, and those after them
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const uint8_t *row = from + i * stride;
        m[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row));
        m[i] = _mm512_inserti32x4(m[i], _mm_loadu_si128((const __m128i *)(row + 4 * stride)), 1);
        m[i] = _mm512_inserti32x4(m[i], _mm_loadu_si128((const __m128i *)(row + 8 * stride)), 2);
        m[i] = _mm512_inserti32x4(m[i], _mm_loadu_si128((const __m128i *)(row + 12 * stride)), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(m[0], m[1]), b = _mm512_unpacklo_epi32(m[2], m[3]);
    __m512i c = _mm512_unpackhi_epi32(m[0], m[1]), d = _mm512_unpackhi_epi32(m[2], m[3]);
    column[0] = _mm512_unpacklo_epi64(a, b);
    column[1] = _mm512_unpackhi_epi64(a, b);
    column[2] = _mm512_unpacklo_epi64(c, d);
    column[3] = _mm512_unpackhi_epi64(c, d);
}
#endif

// The same to memory, columns WIDE units apart.
INLINE void turn(int32_t *to, const uint8_t *from, long stride) {
#ifdef __AVX512F__
    __m512i column[4];
    columns_of(column, from, stride);
    for (int j = 0; j < 4; j++) _mm512_storeu_si512(to + j * WIDE, column[j]);
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) memcpy(to + j * WIDE + i, from + i * stride + 4 * j, 4);
#endif
}

static int is_coded(const Keys *keys) { return CODED && keys->is_bfloat16 && is_in_columns(keys->format, keys->J); }

#if CODED
// Unit u of LANES packed keys, and their scales of group g.
INLINE __m512i units_at(const uint8_t *page, long entry, long u) {
    return _mm512_loadu_si512(page + unit_place(ENTRIES, entry, u));
}

INLINE __m512i scales_at(const uint8_t *page, long entry, long g, long codes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(page + scale_place(ENTRIES, entry, g, codes))));
}

// Channels 2 j and 2 j + 1 of 8: E2M1 as bfloat16 times 2^64, from which ``shift`` takes exponents; what is 0 stays so.
INLINE __m512i unit_of(__m512i codes, __m512i shift, int j) {
    static const uint16_t E2M1[LANES] = {0, 0x5f00, 0x5f80, 0x5fc0, 0x6000, 0x6040, 0x6080, 0x60c0,
                                         0, 0xdf00, 0xdf80, 0xdfc0, 0xe000, 0xe040, 0xe080, 0xe0c0};
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)E2M1)); // bit 4 of an index is ignored
    __m512i begins = _mm512_set1_epi64(0x2424202004040000 + j * 0x0808080808080808);   // 8 bits of each byte
    return _mm512_subs_epu16(_mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(begins, codes), table), shift);
}

// The same of 4: E4M3, two of them in the lower bytes of a lane's halves. Its fields are moved, and the bits of 0 .. 7
// times 2^-9, the subnormal numbers, are in a table.
INLINE __m512i fp8_unit_of(__m512i codes, __m512i shift, int j) {
    static const uint16_t SMALL[32] = {0, 0x5b00, 0x5b80, 0x5bc0, 0x5c00, 0x5c20, 0x5c40, 0x5c60};
    __m512i code = _mm512_and_si512(_mm512_srli_epi16(codes, 8 * j), _mm512_set1_epi16(0xff));
    __m512i size = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    __m512i number = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16((120 + 64) << 7));
    __mmask32 is_small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
    number = _mm512_mask_permutexvar_epi16(number, is_small, size, _mm512_loadu_si512(SMALL));
    __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(code, 7), 15);
    return _mm512_or_si512(_mm512_subs_epu16(number, shift), sign);
}

// A page of packed keys. Returns 0 if a scale is none that a shift serves: one above 2^64, or that makes numbers
// subnormal.
INLINE int turn_codes_of(int32_t *units, const uint8_t *page, long J, int is_fp8) {
    const __m512i one = _mm512_set1_epi32(127 + 64);
    const long per_group = is_fp8 ? 8 : 4, bytes = is_fp8 ? J : J / 2, least = is_fp8 ? 10 : 2;
    __m512i most = _mm512_setzero_si512(); // shift, unsigned: a scale above ``one`` wraps to the top
    for (long g = 0; g < J / INDEX_GROUP; g++)
        for (long e = 0; e < ENTRIES; e += LANES) {
            __m512i shift = _mm512_slli_epi32(_mm512_sub_epi32(one, scales_at(page, e, g, bytes)), 7);
            most = _mm512_max_epu32(most, shift);
            shift = _mm512_or_si512(shift, _mm512_slli_epi32(shift, 16));
            int32_t *to = units + g * INDEX_GROUP / 2 * WIDE + e;
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) {
                __m512i codes = units_at(page, e, per_group * g + j * per_group / LANES);
                __m512i pair = is_fp8 ? fp8_unit_of(codes, shift, j % 2) : unit_of(codes, shift, j % 4);
                _mm512_storeu_si512(to + j * WIDE, pair);
            }
        }
    return !_mm512_cmpgt_epu32_mask(most, _mm512_set1_epi32((127 + 64 - least) << 7));
}

static int turn_codes(int32_t *units, const uint8_t *page, const Keys *keys) {
    if (keys->format == ROW_PACKED_FP8) return turn_codes_of(units, page, keys->J, 1);
    return turn_codes_of(units, page, keys->J, 0);
}
#endif

// Key e of a page in the dtype of the queries.
static void read_key(int32_t *to, const uint8_t *page, long e, float *values, const Keys *keys) {
    long J = keys->J;
    const uint8_t *row = page + e * keys->bytes;
    int is_paired = PAIRED && keys->is_bfloat16;
    float *key = is_paired ? values : (float *)to;
    if (is_paired && keys->format == ROW_BFLOAT16) {
        memcpy(to, row, 2 * J);
        return;
    }
    if (is_in_columns(keys->format, J)) index_entry_read(key, page, e, ENTRIES, keys->format, J);
    else index_row_read(key, row, keys->format, J);
    if (is_paired) write_row(to, 0, key, J, 1);
    for (long j = 0; j < J && keys->is_bfloat16 && !is_paired; j++) key[j] = rounded(key[j], 1);
}

// A page to columns, straight from where it lies if its keys are stored as they are multiplied.
static void turn_page(Columns *columns, long at, const uint8_t *page, const Keys *keys) {
    int32_t *units = columns->units + at;
#if CODED
    if (is_coded(keys) && turn_codes(units, page, keys)) return;
#endif
    int is_direct = PAIRED && keys->is_bfloat16 && keys->format == ROW_BFLOAT16 && keys->bytes == 4 * keys->width;
    const uint8_t *rows = is_direct ? page : (const uint8_t *)columns->rows;
    for (long e = 0; e < ENTRIES && !is_direct; e++)
        read_key(columns->rows + e * keys->width, page, e, columns->values, keys);
    for (long u = 0; u < keys->width; u += 4)
        for (long e = 0; e < ENTRIES; e += LANES)
            turn(units + u * WIDE + e, rows + 4 * (e * keys->width + u), 4 * keys->width);
}
