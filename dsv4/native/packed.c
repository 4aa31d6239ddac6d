// Rows of codes to numbers, and their products. Contract: packed.h.
#include "packed.h"
#include "codes.h"

#define ROOM 65536   // bytes of decoded rows that stay in a core's cache,
#define FEW_ROWS 24  // of x, for which
#define FEWER_ROWS(kind) ((kind) == CODES_FP4 ? 9 : 3) // that are multiplied without a room for decoded rows
#define FEW_DECODED 8 // so many rows are decoded at once

static float scale_of(const Codes *w, long row, long group) {
    if (w->kind == CODES_FP4) return e8m0_value(((const uint8_t *)w->scales)[row * w->scale_stride + group]);
    long at = row / FP8_BLOCK * w->scale_stride + group;
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
    long group = w->kind == CODES_FP4 ? FP4_GROUP : FP8_BLOCK;
    for (long k0 = 0; k0 < K; k0 += group) {
        long k1 = k0 + group < K ? k0 + group : K, k = k0;
        float scale = scale_of(w, row, k0 / group), few[FP8_BLOCK];
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        const uint8_t *codes = w->codes + (row - w->first) * w->stride;
        int shift = (int)(bits_of(scale) >> 23) - 127;
        if (is_bfloat16 && is_plain_scale(shift + 127))
            for (; k + 32 <= k1; k += 32)
                _mm512_storeu_si512((uint16_t *)to + k, w->kind == CODES_FP4 ? fp4_pairs(codes + k / 2, shift)
                                                                             : fp8_pairs(codes + k, shift));
#endif
        decode_slowly(few, w, row, k, k1, scale);
        write_row(to, k, few, k1 - k, is_bfloat16);
    }
}

// Products with float32 scales, which are exact in no code: sums of blocks, each times its scale, added in their order.
static void by_blocks(float *out, long out_stride, Matrix x, long M, Matrix rows, const Codes *w, long row, long N, long K,
                      float *part) {
    long size = x.is_bfloat16 ? 2 : 4;
    for (long m = 0; m < M; m++) memset(out + m * out_stride, 0, 4 * N);
    for (long k = 0; k < K; k += FP8_BLOCK) {
        Matrix a = x, b = rows;
        a.at = (const char *)x.at + k * size, b.at = (const char *)rows.at + k * size;
        dsv4_products(part, N, a, M, b, N, K - k < FP8_BLOCK ? K - k : FP8_BLOCK, 0);
        for (long m = 0; m < M; m++)
            for (long n = 0; n < N; n++) {
                long at = (row + n) / FP8_BLOCK * w->scale_stride + k / FP8_BLOCK;
                out[m * out_stride + n] += part[m * N + n] * ((const float *)w->scales)[at];
            }
    }
}

void dsv4_products_of_codes(float *out, long out_stride, Matrix x, long M, Codes w, long N, long K) {
    if (M <= FEWER_ROWS(w.kind) && dsv4_few_products_of_codes(out, out_stride, x, M, w, N, K)) return;
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
