// Products with a matrix in codes. Contract: dsv4/ops/lowbit; the order of the sums is product.h's.
//
// E4M3 and E2M1 numbers times a power of two are exact in bfloat16 and in float32, so rows are decoded, a few at a time,
// and multiplied as any other rows are: memory gives the codes alone.
#pragma once
#include "product.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

enum { CODES_FP8 = 2, CODES_FP4 = 3, CODES_FP8_FLOAT = 4 }; // after float32 and bfloat16, by w_kind

#define FP8_BLOCK 128 // rows and elements of a block of FP8
#define FP4_GROUP 32  // elements of a group of FP4

// Rows of K codes, ``stride`` bytes apart. FP4: a scale for 32 elements of a row. FP8: one for a block of 128 rows by 128
// elements, E8M0 or, of the last kind, float32. ``first``: the number of the row at ``codes``, by which blocks are found.
typedef struct {
    const uint8_t *codes;
    const void *scales;
    long stride, scale_stride, first;
    int kind;
} Codes;

static inline Codes codes_from_row(Codes w, long first) {
    w.codes += first * w.stride;
    w.first += first;
    return w;
}

// Whether an E8M0 scale keeps all numbers of a code among bfloat16's normal ones.
static inline int is_plain_scale(int scale) { return scale >= 32 && scale <= 222; }

#ifdef __AVX512BW__
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

// As dsv4_products, N rows of w; results of a bfloat16 x are of a decoded bfloat16 w.
void dsv4_products_of_codes(float *out, long out_stride, Matrix x, long M, Codes w, long N, long K);

// The same for few rows of x, decoding in registers. Returns 0 where that does not serve, and does nothing.
int dsv4_few_products_of_codes(float *out, long out_stride, Matrix x, long M, Codes w, long N, long K);

// Rows of K elements side by side, in a dtype or in codes.
typedef struct {
    const void *at, *scales;
    int kind; // 0 for float32, 1 for bfloat16, or a kind of codes
} Weight;

static inline int is_coded(int kind) { return kind > 1; }

// As dsv4_products, rows n0 .. n0 + N of w.
static inline void weight_products(float *out, long out_stride, Matrix x, long M, Weight w, long n0, long N, long K) {
    if (!is_coded(w.kind)) {
        dsv4_products(out, out_stride, x, M, from_row(rows_of(w.at, K, w.kind), n0), N, K, 1);
        return;
    }
    int is_fp4 = w.kind == CODES_FP4;
    Codes codes = {w.at, w.scales, is_fp4 ? K / 2 : K, is_fp4 ? K / 32 : (K + 127) / 128, 0, w.kind};
    dsv4_products_of_codes(out, out_stride, x, M, codes_from_row(codes, n0), N, K);
}
