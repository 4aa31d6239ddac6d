// RMS normalisation, one pass a row. Contract: dsv4/ops/rmsnorm.
#include "common.h"

// y [rows, D] = x inverse_rms weight, where inverse_rms [rows] = 1 / sqrt(mean(x^2) + eps); weight [D] of either dtype,
// or null for 1.
void dsv4_rmsnorm(long rows, long D, int is_bfloat16, int weight_is_bfloat16, int threads, float eps, const void *x,
                  const void *weight, void *y, float *inverse_rms) {
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch(D), *w = scratch(D);
        if (weight) read_row(w, weight, 0, D, weight_is_bfloat16);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            read_row(row, x, r * D, D, is_bfloat16);
            float factor = 1.0f / sqrtf(dot(row, row, whole(D)) / D + eps);
            inverse_rms[r] = factor;
            if (weight)
                for (long d = 0; d < D; d++) row[d] = row[d] * factor * w[d];
            else
                for (long d = 0; d < D; d++) row[d] *= factor;
            write_row(y, r * D, row, D, is_bfloat16);
        }
        free(row);
        free(w);
    }
}
