// Bounds of indexer scores from sums of 8-bit integers, twice as fast as the scores: most entries need no more.
//
// A packed key is S (2k), with integers |2k| <= 12 and S half its group's scale; a query is rounded to q' d, with
// integers |q'| <= 127 and d one for a head. Then q . key differs from d A, A = sum_g S_g (q' . 2k)_g, by at most d E:
//
//     E = sum_g S_g (12 r_g + 2):   r_g is the sum of |q / d - q'| over a group's channels; the sums of ``score_tile``
//                                   add 2^-18 of |q| |key|, less than 1
//
// relu(q . key) is then rounded to bfloat16, by less than 2^-7 of it. So w relu(d (A + E)) (1 + 2^-7) bounds what a head
// with w > 0 adds, w relu(d (A - E)) (1 - 2^-7) otherwise; rounded sums of larger terms are larger. NaN is a bound too,
// wherever numbers are so large or small that this could fail.
#pragma once
#include "columns.h"

#if CODED && defined(__AVX512VNNI__)
#define BOUNDED 1
#else
#define BOUNDED 0
#endif

#define BOUND_ROWS 4 // queries of a tile
#define OFFSET 12    // bytes of a key are 2k + 12, not below 0 as the processor wants them: 12 sum(q') is taken off

// What bounds take of queries, in tiles of ``rows`` of them, one head each.
typedef struct {
    long I, J;
    int32_t *bytes;   // [tiles, I, J / 4, rows], 4 channels each
    int32_t *offsets; // [tiles, I, groups, rows]: what a sum begins with: of E, and of bytes that are not below 0
    float *factors;   // [tiles, I, rows]: w d (1 +- 2^-7)
} Bounds;

// What they take of turned keys.
typedef struct {
    int32_t *bytes; // [J / 4, WIDE]
    float *scales;  // [groups, WIDE]: S
} Integers;

static Bounds make_bounds(long queries, long I, long J) {
    return (Bounds){
        .I = I,
        .J = J,
        .bytes = (int32_t *)scratch(queries * I * groups_of(J, 4)),
        .offsets = (int32_t *)scratch(queries * I * groups_of(J, INDEX_GROUP)),
        .factors = scratch(queries * I),
    };
}

static void free_bounds(Bounds *bounds) {
    free(bounds->bytes);
    free(bounds->offsets);
    free(bounds->factors);
}

static Integers make_integers(long J) {
    return (Integers){
        .bytes = (int32_t *)scratch(WIDE * groups_of(J, 4)),
        .scales = scratch(WIDE * groups_of(J, INDEX_GROUP)),
    };
}

static void free_integers(Integers *integers) {
    free(integers->bytes);
    free(integers->scales);
}

static int is_common(float x) { return x == 0 || (fabsf(x) > 0x1p-40f && fabsf(x) < 0x1p40f); }

// Head i, J floats and its weight, of query t.
static void read_bound(Bounds *bounds, long t, long i, const float *q, float weight, long rows) {
    long J = bounds->J, groups = J / INDEX_GROUP, head = t / rows * bounds->I + i, row = t % rows;
    float most = 0;
    int has_nan = 0;
    for (long j = 0; j < J; j++) {
        most = fabsf(q[j]) > most ? fabsf(q[j]) : most;
        has_nan |= q[j] != q[j];
    }
    int is_sound = !has_nan && is_common(most) && is_common(weight);
    float inverse = is_sound && most > 0 ? 127.0f / most : 0.0f;
    for (long g = 0; g < groups; g++) {
        int sum = 0;
        float rest = 0;
        for (long column = 8 * g; column < 8 * g + 8; column++) {
            int8_t four[4];
            for (long c = 0; c < 4; c++) {
                float exact = is_sound ? q[column / 2 * 8 + 2 * c + column % 2] * inverse : 0.0f;
                four[c] = (int8_t)rintf(exact);
                sum += four[c];
                rest += fabsf(exact - four[c]);
            }
            memcpy(bounds->bytes + (head * groups * 8 + column) * rows + row, four, 4);
        }
        int slack = (int)ceilf(12 * rest) + 2;
        bounds->offsets[(head * groups + g) * rows + row] = -OFFSET * sum + (weight > 0 ? slack : -slack);
    }
    float factor = weight * (most / 127.0f) * (weight > 0 ? 1 + 0x1p-7f : 1 - 0x1p-7f);
    bounds->factors[head * rows + row] = is_sound ? factor : NAN;
}

#if BOUNDED
// The bytes of channels 0, 2, 4, 6 of 8, or of 1, 3, 5, 7; the upper bits of an index are any.
INLINE __m512i bytes_of(__m512i codes, int is_odd) {
    static const uint8_t E2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)E2M1));
    return _mm512_permutexvar_epi8(is_odd ? _mm512_srli_epi16(codes, 4) : codes, table);
}

// S of a group, NaN where its scale is not within 2^-63 and 2^64.
INLINE vec half_of(__m512i scale) {
    __mmask16 is_common = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(scale, _mm512_set1_epi32(64)), _mm512_set1_epi32(128));
    __m512i bits = _mm512_slli_epi32(_mm512_sub_epi32(scale, _mm512_set1_epi32(1)), 23);
    return (vec)_mm512_mask_blend_epi32(is_common, _mm512_set1_epi32(0x7fc00000), bits);
}

// 4 channels more of q' . 2k.
INLINE ivec add_bytes(ivec sum, __m512i bytes, int32_t q) {
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, bytes, _mm512_set1_epi32(q));
}

INLINE vec add_group(vec A, ivec sum, vec scale) { return A + __builtin_convertvector(sum, vec) * scale; }

// The maximum of 0 and NaN, in this order, is NaN.
INLINE vec add_head(vec bound, vec A, float factor) {
    return bound + factor * (vec)_mm512_max_ps(_mm512_setzero_ps(), (__m512)A);
}

static void turn_integers(Integers *to, long at, const uint8_t *page, const Keys *keys) {
    for (long e = 0; e < ENTRIES; e += LANES, at += LANES) {
        for (long g = 0; g < keys->J / INDEX_GROUP; g++) {
            for (int j = 0; j < 8; j++)
                _mm512_storeu_si512(to->bytes + (8 * g + j) * WIDE + at, bytes_of(units_at(page, e, 4 * g + j / 2), j % 2));
            store(to->scales + g * WIDE + at, half_of(scales_at(page, e, g, keys->J / 2)));
        }
    }
}

// bound[row][half] of a tile's queries and a page of turned keys.
INLINE void bound_tile(vec *bound, const Bounds *bounds, long tile, const Integers *keys, long at) {
    long I = bounds->I, groups = bounds->J / INDEX_GROUP;
    vec total[2 * BOUND_ROWS] = {0};
    for (long head = tile * I; head < tile * I + I; head++) {
        const int32_t *q = bounds->bytes + head * groups * 8 * BOUND_ROWS;
        const int32_t *offsets = bounds->offsets + head * groups * BOUND_ROWS;
        const float *factors = bounds->factors + head * BOUND_ROWS;
        vec A[2 * BOUND_ROWS] = {0};
        for (long g = 0; g < groups; g++, offsets += BOUND_ROWS) {
            ivec sum[2 * BOUND_ROWS];
            for (int i = 0; i < 2 * BOUND_ROWS; i++) sum[i] = (ivec){0} + offsets[i / 2];
#pragma GCC unroll 8
            for (int column = 0; column < 8; column++, q += BOUND_ROWS) {
                const int32_t *bytes = keys->bytes + (8 * g + column) * WIDE + at;
                for (int i = 0; i < 2 * BOUND_ROWS; i++)
                    sum[i] = add_bytes(sum[i], _mm512_loadu_si512(bytes + i % 2 * LANES), q[i / 2]);
            }
            for (int i = 0; i < 2 * BOUND_ROWS; i++)
                A[i] = add_group(A[i], sum[i], load(keys->scales + g * WIDE + at + i % 2 * LANES));
        }
        for (int i = 0; i < 2 * BOUND_ROWS; i++) total[i] = add_head(total[i], A[i], factors[i / 2]);
    }
    for (int i = 0; i < 2 * BOUND_ROWS; i++) bound[i] = total[i];
}

// bound[half] of a page for one query alone, straight from the page: tiles of one row. Sums of their own for even and
// odd channels, and the halves side by side, hide each other's time.
INLINE void bound_page(vec *bound, const Bounds *bounds, long t, const uint8_t *page, long J, long I) {
    const long groups = J / INDEX_GROUP;
    bound[0] = bound[1] = (vec){0};
    for (long head = t * I; head < t * I + I; head++) {
        const int32_t *q = bounds->bytes + head * groups * 8, *offsets = bounds->offsets + head * groups;
        vec A[2] = {0};
#pragma GCC unroll 4
        for (long g = 0; g < groups; g++, q += 8) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                ivec even = (ivec){0} + offsets[g], odd = {0};
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m512i units = units_at(page, half * LANES, 4 * g + j);
                    even = add_bytes(even, bytes_of(units, 0), q[2 * j]);
                    odd = add_bytes(odd, bytes_of(units, 1), q[2 * j + 1]);
                }
                A[half] = add_group(A[half], even + odd, half_of(scales_at(page, half * LANES, g, J / 2)));
            }
        }
        for (int half = 0; half < 2; half++) bound[half] = add_head(bound[half], A[half], bounds->factors[head]);
    }
}
#endif
