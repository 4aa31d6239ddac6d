// Inner products in a fixed order. The products of a row of x with a row of w run over k in whole vectors into one
// vector accumulator, k's tail filled with zeros; its lanes are then added as one fixed tree. So a result depends on
// nothing but its two rows: not on how many others are computed beside it, nor on where a block begins.
//
// Two bfloat16 rows are multiplied in pairs by AVX512-BF16 where the compiler has it: exact products, float32 sums,
// denormals flushed to zero on the way in and out. All else is widened to float32 and fused multiply-adds.
#pragma once
#include "common.h"

// Rows of a matrix: row i begins ``stride`` (pick ? pick[i] : i) elements after ``at``.
typedef struct {
    const void *at;
    long stride;
    const int32_t *pick;
    int is_bfloat16;
} Matrix;

static inline Matrix rows_of(const void *at, long stride, int is_bfloat16) {
    return (Matrix){at, stride, 0, is_bfloat16};
}

static inline Matrix from_row(Matrix rows, long first) {
    if (rows.pick)
        rows.pick += first;
    else
        rows.at = (const char *)rows.at + first * rows.stride * (rows.is_bfloat16 ? 2 : 4);
    return rows;
}

// out[m * out_stride + n] = row m of x . row n of w, rows of K elements, by the calling thread alone. ``narrow`` rounds
// a float32 w to bfloat16 if x is bfloat16; else both are widened to the wider of the two.
// With many rows of x, keep w small enough (say 256 KB) to stay in the core's own cache.
void dsv4_products(float *out, long out_stride, Matrix x, long M, Matrix w, long N, long K, int narrow);
