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

// Sine and cosine of |x| up to a few millions, to some 1e-16: whole quarter turns taken off in twice the digits of a
// double, then the series, which ends below 1e-19. The compiler makes vectors of it; the library's functions come one
// by one, with tables that a long step has pushed out of the caches.
static inline void sine_and_cosine(double x, float *sine, float *cosine) {
    double turns = rint(x * 0.63661977236758134308);
    double r = fma(-turns, 6.123233995736766e-17, fma(-turns, 1.5707963267948966, x)), z = r * r;
    double s = 1.0 / 355687428096000.0, c = 1.0 / 20922789888000.0;
    s = fma(s, z, -1.0 / 1307674368000.0), c = fma(c, z, -1.0 / 87178291200.0);
    s = fma(s, z, 1.0 / 6227020800.0), c = fma(c, z, 1.0 / 479001600.0);
    s = fma(s, z, -1.0 / 39916800.0), c = fma(c, z, -1.0 / 3628800.0);
    s = fma(s, z, 1.0 / 362880.0), c = fma(c, z, 1.0 / 40320.0);
    s = fma(s, z, -1.0 / 5040.0), c = fma(c, z, -1.0 / 720.0);
    s = fma(s, z, 1.0 / 120.0), c = fma(c, z, 1.0 / 24.0);
    s = fma(s, z, -1.0 / 6.0), c = fma(c, z, -0.5);
    s = fma(s * z, r, r), c = fma(c, z, 1.0);
    int64_t quarter = (int64_t)turns;
    double a = quarter & 1 ? c : s, b = quarter & 1 ? s : c;
    *sine = (float)(quarter & 2 ? -a : a);
    *cosine = (float)((quarter + 1) & 2 ? -b : b);
}

// Cosine and sine [n, pairs] of positions [n] times frequency [pairs], the product formed in float32.
void dsv4_angles(long n, long pairs, int threads, const int32_t *positions, const float *frequency, float *cosine,
                 float *sine) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++)
        for (long k = 0; k < pairs; k++)
            sine_and_cosine((float)positions[i] * frequency[k], sine + i * pairs + k, cosine + i * pairs + k);
}
