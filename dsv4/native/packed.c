// Rows of codes to numbers, and their products. Contract: packed.h.
#include "packed.h"
#include "codes.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define BLOCK 128    // rows and elements of a block of FP8
#define GROUP 32     // elements of a group of FP4
#define ROOM 65536   // bytes of decoded rows that stay in a core's cache,
#define FEW_ROWS 24  // of x, for which
#define FEW_DECODED 8 // so many rows are decoded at once

#ifdef __AVX512BW__
#define WIDE 1
// 32 codes as the bits of bfloat16 numbers: E2M1 by a table, E4M3 by moving its fields; 2^shift times their value. Scales
// that leave bfloat16's normal numbers go the long way.
static inline void fp4_pairs(uint16_t *to, const uint8_t *codes, int shift) {
    static const uint16_t E2M1[32] = {0,      0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                      0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
    static const uint16_t SIZE[32] = {0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1};
    __m512i numbers = _mm512_loadu_si512(E2M1), sizes = _mm512_loadu_si512(SIZE);
    __mmask32 is_some = _mm512_test_epi16_mask(sizes, sizes);
    __m512i table = _mm512_mask_add_epi16(numbers, is_some, numbers, _mm512_set1_epi16(shift * 128));
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    x = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), _mm512_set1_epi32(0x000f000f));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(x, table));
}

static inline void fp8_pairs(uint16_t *to, const uint8_t *codes, int shift) {
    // The bits of 0 .. 7 times 2^-9, the subnormal numbers.
    static const uint16_t SMALL[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    __m512i sign = _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0x80)), 8);
    __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(0x7f)), step = _mm512_set1_epi16(shift * 128);
    __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_add_epi16(step, _mm512_set1_epi16(120 * 128)));
    __m512i small = _mm512_permutexvar_epi16(size, _mm512_loadu_si512(SMALL));
    small = _mm512_mask_add_epi16(small, _mm512_test_epi16_mask(small, small), small, step);
    __mmask32 is_small = _mm512_cmplt_epi16_mask(size, _mm512_set1_epi16(8));
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_mask_blend_epi16(is_small, normal, small), sign));
}
#else
#define WIDE 0
static inline void fp4_pairs(uint16_t *to, const uint8_t *codes, int shift) { (void)to, (void)codes, (void)shift; }
static inline void fp8_pairs(uint16_t *to, const uint8_t *codes, int shift) { (void)to, (void)codes, (void)shift; }
#endif

static float scale_of(const Codes *w, long row, long group) {
    if (w->kind == CODES_FP4) return e8m0_value(((const uint8_t *)w->scales)[row * w->scale_stride + group]);
    long at = row / BLOCK * w->scale_stride + group;
    return w->kind == CODES_FP8 ? e8m0_value(((const uint8_t *)w->scales)[at]) : 1.0f;
}

// Elements k0 .. k1 of a row, within one group, as floats.
static void decode_slowly(float *to, const Codes *w, long row, long k0, long k1, float scale) {
    const uint8_t *codes = w->codes + (row - w->first) * w->stride;
    for (long k = k0; k < k1; k++) {
        float value = w->kind == CODES_FP4 ? e2m1_value(codes[k / 2] >> k % 2 * 4 & 15) : e4m3_value(codes[k]);
        to[k - k0] = value * scale;
    }
}

// Row number ``row`` as numbers of the dtype asked for; float32 scales are left to the caller.
static void decode(void *to, const Codes *w, long row, long K, int is_bfloat16) {
    long group = w->kind == CODES_FP4 ? GROUP : BLOCK;
    const uint8_t *codes = w->codes + (row - w->first) * w->stride;
    for (long k0 = 0; k0 < K; k0 += group) {
        long k1 = k0 + group < K ? k0 + group : K, k = k0;
        float scale = scale_of(w, row, k0 / group), few[BLOCK];
        int shift = (int)(bits_of(scale) >> 23) - 127;
        if (WIDE && is_bfloat16 && shift > -100 && shift < 100) {
            for (; w->kind == CODES_FP4 && k + 32 <= k1; k += 32) fp4_pairs((uint16_t *)to + k, codes + k / 2, shift);
            for (; w->kind != CODES_FP4 && k + 32 <= k1; k += 32) fp8_pairs((uint16_t *)to + k, codes + k, shift);
        }
        decode_slowly(few, w, row, k, k1, scale);
        write_row(to, k, few, k1 - k, is_bfloat16);
    }
}

// Products with float32 scales, which are exact in no code: sums of blocks, each times its scale, added in their order.
static void by_blocks(float *out, long out_stride, Matrix x, long M, Matrix rows, const Codes *w, long row, long N, long K,
                      float *part) {
    long size = x.is_bfloat16 ? 2 : 4;
    for (long m = 0; m < M; m++) memset(out + m * out_stride, 0, 4 * N);
    for (long k = 0; k < K; k += BLOCK) {
        Matrix a = x, b = rows;
        a.at = (const char *)x.at + k * size, b.at = (const char *)rows.at + k * size;
        dsv4_products(part, N, a, M, b, N, K - k < BLOCK ? K - k : BLOCK, 0);
        for (long m = 0; m < M; m++)
            for (long n = 0; n < N; n++) {
                long at = (row + n) / BLOCK * w->scale_stride + k / BLOCK;
                out[m * out_stride + n] += part[m * N + n] * ((const float *)w->scales)[at];
            }
    }
}

void dsv4_products_of_codes(float *out, long out_stride, Matrix x, long M, Codes w, long N, long K) {
    long size = x.is_bfloat16 ? 2 : 4, width = whole(K), most = M > FEW_ROWS ? ROOM / (width * size) : FEW_DECODED;
    most = most < FEW_DECODED ? FEW_DECODED : most > 64 ? 64 : most / 8 * 8;
    void *room = scratch(most * width);
    float *part = w.kind == CODES_FP8_FLOAT ? scratch(M * most) : 0;
    for (long n = 0; n < N; n += most) {
        long count = N - n < most ? N - n : most;
        for (long i = 0; i < count; i++)
            decode((char *)room + i * width * size, &w, w.first + n + i, K, x.is_bfloat16);
        Matrix rows = rows_of(room, width, x.is_bfloat16);
        if (part)
            by_blocks(out + n, out_stride, x, M, rows, &w, w.first + n, count, K, part);
        else
            dsv4_products(out + n, out_stride, x, M, rows, count, K, 0);
    }
    free(room);
    free(part);
}
