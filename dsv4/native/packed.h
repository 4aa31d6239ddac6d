// Products with a matrix in codes. Contract: dsv4/ops/lowbit; the order of the sums is product.h's.
//
// E4M3 and E2M1 numbers times a power of two are exact in bfloat16 and in float32, so rows are decoded, a few at a time,
// and multiplied as any other rows are: memory gives the codes alone.
#pragma once
#include "product.h"

enum { CODES_FP8 = 2, CODES_FP4 = 3, CODES_FP8_FLOAT = 4 }; // after float32 and bfloat16, by w_kind

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
