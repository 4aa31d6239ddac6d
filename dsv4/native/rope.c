// Rotations of the last channels of each head, alone or behind an RMS normalisation. Contract: dsv4/ops/rope.
// Rows are heads, ``heads`` of them a token; cos and sin: [tokens, R / 2] float32.
#include "common.h"

static void turn(float *tail, const float *cosine, const float *sine, long pairs, float sign) {
    for (long i = 0; i < pairs; i++) {
        float a = tail[2 * i], b = tail[2 * i + 1], c = cosine[i], s = sign * sine[i];
        tail[2 * i] = a * c - b * s;
        tail[2 * i + 1] = a * s + b * c;
    }
}

// y = x with its last 2 * pairs channels rotated; sign -1 turns back.
void dsv4_rotate(long rows, long K, long pairs, long heads, int is_bfloat16, int threads, float sign, const void *x,
                 const float *cosine, const float *sine, void *y) {
    long kept = K - 2 * pairs, width = is_bfloat16 ? 2 : 4;
#pragma omp parallel num_threads(threads)
    {
        float *tail = scratch(2 * pairs);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            long token = row / heads;
            memcpy((char *)y + row * K * width, (const char *)x + row * K * width, kept * width);
            read_row(tail, x, row * K + kept, 2 * pairs, is_bfloat16);
            turn(tail, cosine + token * pairs, sine + token * pairs, pairs, sign);
            write_row(y, row * K + kept, tail, 2 * pairs, is_bfloat16);
        }
        free(tail);
    }
}

// y = rotate(x / rms(x)), rounded between the two as the specification does; writes inverse_rms [rows].
void dsv4_rotate_unit(long rows, long K, long pairs, long heads, int is_bfloat16, int threads, float eps,
                      const void *x, const float *cosine, const float *sine, void *y, float *inverse_rms) {
#pragma omp parallel num_threads(threads)
    {
        float *head = scratch(K);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            long token = row / heads;
            read_row(head, x, row * K, K, is_bfloat16);
            float r = 1.0f / sqrtf(dot(head, head, whole(K)) / K + eps);
            inverse_rms[row] = r;
            for (long d = 0; d < K; d++) head[d] = rounded(head[d] * r, is_bfloat16);
            turn(head + K - 2 * pairs, cosine + token * pairs, sine + token * pairs, pairs, 1.0f);
            write_row(y, row * K, head, K, is_bfloat16);
        }
        free(head);
    }
}

// The gradient of x from the output y and its gradient. A rotation keeps products, so the part of the gradient along
// x is found on the rotated side.
void dsv4_rotate_unit_backward(long rows, long K, long pairs, long heads, int is_bfloat16, int threads, const void *y,
                               const float *inverse_rms, const float *cosine, const float *sine, const void *grad,
                               void *grad_x) {
#pragma omp parallel num_threads(threads)
    {
        float *head = scratch(K), *g = scratch(K);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            long token = row / heads;
            read_row(head, y, row * K, K, is_bfloat16);
            read_row(g, grad, row * K, K, is_bfloat16);
            float along = dot(g, head, whole(K)) / K, r = inverse_rms[row];
            for (long d = 0; d < K; d++) g[d] = (g[d] - head[d] * along) * r;
            turn(g + K - 2 * pairs, cosine + token * pairs, sine + token * pairs, pairs, -1.0f);
            write_row(grad_x, row * K, g, K, is_bfloat16);
        }
        free(head);
        free(g);
    }
}

// Cosine and sine [n, pairs] of positions [n] times frequency [pairs], the product formed in float32.
void dsv4_angles(long n, long pairs, int threads, const int32_t *positions, const float *frequency, float *cosine,
                 float *sine) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++)
        for (long k = 0; k < pairs; k++) {
            double angle = (float)positions[i] * frequency[k];
            cosine[i * pairs + k] = (float)cos(angle);
            sine[i * pairs + k] = (float)sin(angle);
        }
}
