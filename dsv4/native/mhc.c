// Hyper-connections, one pass over the streams each. Contracts: dsv4/ops/mhc; shapes T N D as there, and
// M = N (2 + N) mixes (N at the head). Reductions over tokens are left as one partial sum a block of BLOCK tokens,
// so that results do not depend on the number of threads.
#include "common.h"

#define MOST_STREAMS 8
#define BLOCK 64
#define TOKENS 4 // tokens and
#define ROWS 6   // rows of fn in one register tile of the mixes

// out[t][m] = x[t] . fn[m] for TOKENS rows of x and ROWS rows of fn from m0 on, both ``width`` floats long in whole
// vectors.
static void product_tile(float *out, const float *x, const float *fn, long m0, long M, long width) {
    const float *row[ROWS];
    for (int m = 0; m < ROWS; m++) row[m] = fn + (m0 + m < M ? m0 + m : M - 1) * width;
    vec total[TOKENS][ROWS] = {0};
    for (long d = 0; d < width; d += LANES) {
        vec a[TOKENS];
        for (int t = 0; t < TOKENS; t++) a[t] = load(x + t * width + d);
        for (int m = 0; m < ROWS; m++) {
            vec b = load(row[m] + d);
            for (int t = 0; t < TOKENS; t++) total[t][m] += a[t] * b;
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int m = 0; m < ROWS && m0 + m < M; m++) out[t * M + m0 + m] = sum_lanes(total[t][m]);
}

static float inverse_rms_of(const float *x, long width, long n, float eps) {
    return 1.0f / sqrtf(dot(x, x, width) / n + eps);
}

// A sigmoid rounded once: a token has few gates, and all its channels carry their error.
static float gate(float x) { return (float)(1.0 / (1.0 + exp(-(double)x))); }

// u = sum_j weight_j x_j, rounded to the dtype of the streams; x: N rows ``stride`` apart.
static void read_streams(float *u, const float *x, const float *weight, long N, long D, long stride, int is_bfloat16) {
    for (long d = 0; d < D; d++) {
        float total = 0;
        for (long j = 0; j < N; j++) total = fmaf(weight[j], x[j * stride + d], total);
        u[d] = rounded(total, is_bfloat16);
    }
}

typedef struct {
    long T, N, D, M, width, whole_D;
    int is_bfloat16;
    const void *streams;
    const float *fn, *base, *scale, *norm_weight;
    float norm_eps, eps;
    void *x;
    float *mixes, *inverse_rms, *post, *logits;
} Read;

// Read token t from its row ``wide`` and its products; ``u``: a row of scratch.
static void read_token(const Read *to, long t, const float *wide, const float *products, float *u) {
    long N = to->N, D = to->D, M = to->M;
    float r = inverse_rms_of(wide, to->width, N * D, to->norm_eps), weight[MOST_STREAMS];
    const float *base = to->base, *scale = to->scale;
    to->inverse_rms[t] = r;
    float *mix = to->mixes + t * M;
    for (long m = 0; m < M; m++) mix[m] = products[m] * r;
    for (long j = 0; j < N; j++) weight[j] = gate(mix[j] * scale[0] + base[j]) + to->eps;
    for (long j = N; j < 2 * N && j < M; j++) to->post[t * N + j - N] = 2 * gate(mix[j] * scale[1] + base[j]);
    for (long m = 2 * N; m < M; m++) to->logits[(m - 2 * N) * to->T + t] = mix[m] * scale[2] + base[m];
    read_streams(u, wide, weight, N, D, D, to->is_bfloat16);
    float s = inverse_rms_of(u, to->whole_D, D, to->norm_eps);
    for (long d = 0; d < D; d++) u[d] = u[d] * s * to->norm_weight[d];
    write_row(to->x, t * D, u, D, to->is_bfloat16);
}

// Read one tile of tokens, with threads that share the rows of fn.
static void read_tile(const Read *to, long tile, int threads) {
    long first = tile * TOKENS, count = to->T - first < TOKENS ? to->T - first : TOKENS, M = to->M, size = to->N * to->D;
    float *wide = scratch(TOKENS * to->width), *u = scratch(to->whole_D);
    float out[TOKENS * MOST_STREAMS * (2 + MOST_STREAMS)];
    for (long t = 0; t < count; t++)
        read_row(wide + t * to->width, to->streams, (first + t) * size, size, to->is_bfloat16);
    if (threads > 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (long m0 = 0; m0 < M; m0 += ROWS) product_tile(out, wide, to->fn, m0, M, to->width);
    } else {
        for (long m0 = 0; m0 < M; m0 += ROWS) product_tile(out, wide, to->fn, m0, M, to->width);
    }
    for (long t = 0; t < count; t++) read_token(to, first + t, wide + t * to->width, out + t * M, u);
    free(wide);
    free(u);
}

// fn: [M, whole(N D)], padded with zeros. Writes x [T, D], mixes [T, M] and inverse_rms [T]; around a sub-layer also
// post [T, N] and the logits of the comb [N N, T], token last.
void dsv4_mhc_pre(long T, long N, long D, long M, int is_bfloat16, int weight_is_bfloat16, int threads,
                  const void *streams, const float *fn, const float *base, const float *scale, const void *norm_weight,
                  float norm_eps, float eps, void *x, float *mixes, float *inverse_rms, float *post, float *logits) {
    long tiles = (T + TOKENS - 1) / TOKENS;
    float *normal = scratch(D);
    read_row(normal, norm_weight, 0, D, weight_is_bfloat16);
    Read to = {T, N, D, M, whole(N * D), whole(D), is_bfloat16, streams, fn, base, scale, normal, norm_eps, eps, x,
               mixes, inverse_rms, post, logits};
    if (tiles == 1) {
        read_tile(&to, 0, threads);
    } else {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (long tile = 0; tile < tiles; tile++) read_tile(&to, tile, 1);
    }
    free(normal);
}

// First half of the backward pass: through the normalisation and the read. Writes grad_u [T, D] float32,
// grad_read [T, N] (the gradient of the read's weights) and grad_norm [blocks, D], partial sums.
void dsv4_mhc_pre_backward_read(long T, long N, long D, int is_bfloat16, int threads, const void *streams,
                                const float *weights, const float *norm_weight, float norm_eps, const void *grad_x,
                                float *grad_u, float *grad_read, float *grad_norm) {
    long stride = whole(D), blocks = (T + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
    {
        float *x = scratch(N * stride), *u = scratch(stride), *g = scratch(stride);
#pragma omp for schedule(static)
        for (long block = 0; block < blocks; block++) {
            float *sum = grad_norm + block * D;
            memset(sum, 0, 4 * D);
            for (long t = block * BLOCK; t < T && t < (block + 1) * BLOCK; t++) {
                for (long j = 0; j < N; j++) read_row(x + j * stride, streams, (t * N + j) * D, D, is_bfloat16);
                read_row(g, grad_x, t * D, D, is_bfloat16);
                read_streams(u, x, weights + t * N, N, D, stride, is_bfloat16);
                float s = inverse_rms_of(u, stride, D, norm_eps);
                for (long d = 0; d < D; d++) {
                    u[d] *= s;
                    sum[d] = fmaf(g[d], u[d], sum[d]);
                    g[d] *= norm_weight[d];
                }
                float along = dot(g, u, stride) / D;
                for (long d = 0; d < D; d++) g[d] = (g[d] - u[d] * along) * s;
                memcpy(grad_u + t * D, g, 4 * D);
                for (long j = 0; j < N; j++) grad_read[t * N + j] = dot(x + j * stride, g, stride);
            }
        }
        free(x);
        free(u);
        free(g);
    }
}

// Second half: grad_streams, which holds the part through the mixes' product, takes in
// along_t x + weights_j grad_u + grad_carried. grad_u and grad_carried may be null.
void dsv4_mhc_pre_backward_streams(long T, long N, long D, int is_bfloat16, int threads, const void *streams,
                                   const float *weights, const float *along, const float *grad_u,
                                   const void *grad_carried, void *grad_streams) {
#pragma omp parallel num_threads(threads)
    {
        float *x = scratch(D), *total = scratch(D), *carried = scratch(D);
#pragma omp for schedule(static)
        for (long row = 0; row < T * N; row++) {
            long t = row / N;
            read_row(x, streams, row * D, D, is_bfloat16);
            read_row(total, grad_streams, row * D, D, is_bfloat16);
            for (long d = 0; d < D; d++) total[d] = fmaf(along[t], x[d], total[d]);
            if (grad_u)
                for (long d = 0; d < D; d++) total[d] = fmaf(weights[row], grad_u[t * D + d], total[d]);
            if (grad_carried) {
                read_row(carried, grad_carried, row * D, D, is_bfloat16);
                for (long d = 0; d < D; d++) total[d] += carried[d];
            }
            write_row(grad_streams, row * D, total, D, is_bfloat16);
        }
        free(x);
        free(total);
        free(carried);
    }
}

// out_k = post_k y + sum_j comb_jk x_j.
void dsv4_mhc_post(long T, long N, long D, int is_bfloat16, int threads, const void *streams, const void *y,
                   const float *post, const float *comb, void *out) {
#pragma omp parallel num_threads(threads)
    {
        float *x = scratch(N * D), *written = scratch(D), *total = scratch(D);
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) {
            read_row(x, streams, t * N * D, N * D, is_bfloat16);
            read_row(written, y, t * D, D, is_bfloat16);
            for (long k = 0; k < N; k++) {
                float weight = post[t * N + k];
                const float *mix = comb + t * N * N + k;
                for (long d = 0; d < D; d++) total[d] = weight * written[d];
                for (long j = 0; j < N; j++)
                    for (long d = 0; d < D; d++) total[d] = fmaf(mix[j * N], x[j * D + d], total[d]);
                write_row(out, (t * N + k) * D, total, D, is_bfloat16);
            }
        }
        free(x);
        free(written);
        free(total);
    }
}

void dsv4_mhc_post_backward(long T, long N, long D, int is_bfloat16, int threads, const void *streams, const void *y,
                            const float *post, const float *comb, const void *grad, void *grad_streams, void *grad_y,
                            float *grad_post, float *grad_comb) {
    long stride = whole(D);
#pragma omp parallel num_threads(threads)
    {
        float *x = scratch(N * stride), *g = scratch(N * stride), *written = scratch(stride), *total = scratch(stride);
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) {
            const float *weight = post + t * N, *mix = comb + t * N * N;
            read_row(written, y, t * D, D, is_bfloat16);
            for (long k = 0; k < N; k++) {
                read_row(x + k * stride, streams, (t * N + k) * D, D, is_bfloat16);
                read_row(g + k * stride, grad, (t * N + k) * D, D, is_bfloat16);
            }
            for (long j = 0; j < N; j++) {
                memset(total, 0, 4 * D);
                for (long k = 0; k < N; k++)
                    for (long d = 0; d < D; d++) total[d] = fmaf(mix[j * N + k], g[k * stride + d], total[d]);
                write_row(grad_streams, (t * N + j) * D, total, D, is_bfloat16);
                for (long k = 0; k < N; k++)
                    grad_comb[(t * N + j) * N + k] = dot(x + j * stride, g + k * stride, stride);
            }
            memset(total, 0, 4 * D);
            for (long k = 0; k < N; k++) {
                for (long d = 0; d < D; d++) total[d] = fmaf(weight[k], g[k * stride + d], total[d]);
                grad_post[t * N + k] = dot(written, g + k * stride, stride);
            }
            write_row(grad_y, t * D, total, D, is_bfloat16);
        }
        free(x);
        free(g);
        free(written);
        free(total);
    }
}

// One normalisation of LANES matrices side by side, over rows (the first index) or columns; keeps the divisors.
static void normalise(vec *comb, vec *total, long N, int over_columns, float eps) {
    for (long a = 0; a < N; a++) {
        vec sum = {0};
        for (long b = 0; b < N; b++) sum += comb[over_columns ? a * N + b : b * N + a];
        total[a] = sum + eps;
        for (long b = 0; b < N; b++) comb[over_columns ? a * N + b : b * N + a] /= total[a];
    }
}

// The gradient through comb = softmax / total, or through the softmax itself where ``total`` is null.
static void normalise_backward(vec *grad, const vec *comb, const vec *total, long N, int over_columns) {
    for (long a = 0; a < N; a++) {
        vec along = {0};
        for (long b = 0; b < N; b++) {
            long at = over_columns ? a * N + b : b * N + a;
            along += grad[at] * comb[at];
        }
        for (long b = 0; b < N; b++) {
            long at = over_columns ? a * N + b : b * N + a;
            grad[at] = total ? (grad[at] - along) / total[a] : comb[at] * (grad[at] - along);
        }
    }
}

static void softmax_rows(vec *comb, long N) {
    for (long j = 0; j < N; j++) {
        vec peak = comb[j * N], sum = {0};
        for (long k = 1; k < N; k++)
            for (int i = 0; i < LANES; i++)
                peak[i] = comb[j * N + k][i] > peak[i] ? comb[j * N + k][i] : peak[i];
        for (long k = 0; k < N; k++) {
            vec x = comb[j * N + k] - peak;
            float y[LANES];
            store(y, x);
            for (int i = 0; i < LANES; i++) y[i] = exponential(y[i]);
            comb[j * N + k] = load(y);
            sum += load(y);
        }
        for (long k = 0; k < N; k++) comb[j * N + k] /= sum;
    }
}

static void load_lanes(vec *to, const float *from, long count, long T, long first) {
    for (long m = 0; m < count; m++)
        for (int i = 0; i < LANES; i++) to[m][i] = first + i < T ? from[m * T + first + i] : 0.0f;
}

// logits: [N N, T], token last. Writes comb [T, N, N].
void dsv4_mhc_sinkhorn(long T, long N, int iterations, float eps, int threads, const float *logits, float *comb) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < T; first += LANES) {
        vec now[MOST_STREAMS * MOST_STREAMS], total[MOST_STREAMS];
        load_lanes(now, logits, N * N, T, first);
        softmax_rows(now, N);
        for (long m = 0; m < N * N; m++) now[m] += eps;
        for (int half = 0; half < 2 * iterations - 1; half++) normalise(now, total, N, half % 2, eps);
        for (long m = 0; m < N * N; m++)
            for (int i = 0; i < LANES && first + i < T; i++) comb[(first + i) * N * N + m] = now[m][i];
    }
}

// grad: [T, N, N], of the result. Writes grad_logits [N N, T], token last. The rounds are done again and kept.
void dsv4_mhc_sinkhorn_backward(long T, long N, int iterations, float eps, int threads, const float *logits,
                                const float *grad, float *grad_logits) {
    long halves = 2 * iterations - 1, size = N * N;
#pragma omp parallel num_threads(threads)
    {
        vec *rounds = (vec *)scratch(LANES * (halves * (size + N) + size));
#pragma omp for schedule(static)
        for (long first = 0; first < T; first += LANES) {
            vec *softmax = rounds, now[MOST_STREAMS * MOST_STREAMS];
            load_lanes(softmax, logits, size, T, first);
            softmax_rows(softmax, N);
            for (long m = 0; m < size; m++) now[m] = softmax[m] + eps;
            for (long half = 0; half < halves; half++) {
                vec *kept = rounds + size + half * (size + N);
                normalise(now, kept + size, N, half % 2, eps);
                memcpy(kept, now, size * sizeof(vec));
            }
            for (long m = 0; m < size; m++)
                for (int i = 0; i < LANES; i++) now[m][i] = first + i < T ? grad[(first + i) * size + m] : 0.0f;
            for (long half = halves - 1; half >= 0; half--) {
                vec *kept = rounds + size + half * (size + N);
                normalise_backward(now, kept, kept + size, N, half % 2);
            }
            normalise_backward(now, softmax, 0, N, 1);
            for (long m = 0; m < size; m++)
                for (int i = 0; i < LANES && first + i < T; i++) grad_logits[m * T + first + i] = now[m][i];
        }
        free(rounds);
    }
}
