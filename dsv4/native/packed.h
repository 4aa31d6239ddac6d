// Products with a matrix in codes. Contract: dsv4/ops/lowbit; the order of the sums is product.h's.
//
// E4M3 and E2M1 numbers times a power of two are exact in bfloat16 and in float32, so rows are decoded, a few at a time,
// and multiplied as any other rows are: memory gives the codes alone.
#pragma once
#include "codes.h"
#include "product.h"

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
