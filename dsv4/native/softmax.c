// The softmax of attention over window, entries and sink, and its gradient, one pass each. Contract: dsv4/ops/attend.
// Scores are in base 2, [rows, H, S] float32 with rows = tokens; hidden: [rows, S] bytes. There are one or two parts
// with S of their own; the second may be absent, S = 0. Weights and projections have the dtype of the values.
#include "common.h"

typedef struct {
    long S;
    const float *scores;
    const uint8_t *hidden;
} part;

// 2 to the x, as ``exponential``; 0 below -126.
static inline float power2(float x) {
    float y = x > 127.0f ? 127.0f : x;
    y = y < -126.0f ? -126.0f : y;
    float n = rintf(y), r = (y - n) * 0.693147181f;
    float p = 1.98756915e-4f;
    p = fmaf(p, r, 1.39819995e-3f);
    p = fmaf(p, r, 8.33345205e-3f);
    p = fmaf(p, r, 4.16657962e-2f);
    p = fmaf(p, r, 1.66666657e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p * r, r, r) + 1.0f;
    int32_t exponent = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &exponent, 4);
    return x < -126.0f ? 0.0f : p * power;
}

static float largest(float peak, const float *x, const uint8_t *hidden, long S) {
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = peak;
    long whole_S = S / LANES * LANES;
    for (long j = 0; j < whole_S; j += LANES)
        for (int i = 0; i < LANES; i++) {
            float seen = hidden[j + i] ? -INFINITY : x[j + i];
            lanes[i] = seen <= lanes[i] ? lanes[i] : seen; // a NaN goes through
        }
    for (long j = whole_S; j < S; j++) {
        float seen = hidden[j] ? -INFINITY : x[j];
        lanes[0] = seen <= lanes[0] ? lanes[0] : seen;
    }
    for (int i = 0; i < LANES; i++) peak = lanes[i] <= peak ? peak : lanes[i];
    return peak;
}

// to[j] = 2 to the (x[j] - shift), 0 where hidden.
static void shifted_powers(float *restrict to, const float *restrict x, const uint8_t *restrict hidden, long S,
                           float shift) {
    for (long j = 0; j < S; j++) to[j] = hidden[j] ? 0.0f : power2(x[j] - shift);
}

// weights: powers of the scores above their peak, not yet divided by total [rows, H]; log_total [rows, H] base 2.
void dsv4_attention_softmax(long rows, long H, int is_bfloat16, int threads, const float *log_sink, long S1,
                            const float *scores1, const uint8_t *hidden1, void *weights1, long S2,
                            const float *scores2, const uint8_t *hidden2, void *weights2, float *total,
                            float *log_total) {
    part parts[2] = {{S1, scores1, hidden1}, {S2, scores2, hidden2}};
    void *weights[2] = {weights1, weights2};
    long most = whole(S1 > S2 ? S1 : S2);
#pragma omp parallel num_threads(threads)
    {
        float *p = scratch(most);
#pragma omp for schedule(static)
        for (long at = 0; at < rows * H; at++) {
            long row = at / H;
            float sink = log_sink[at % H], peak = sink;
            for (int k = 0; k < 2; k++)
                peak = largest(peak, parts[k].scores + at * parts[k].S, parts[k].hidden + row * parts[k].S, parts[k].S);
            float sum = power2(sink - peak);
            for (int k = 0; k < 2; k++) {
                long S = parts[k].S;
                shifted_powers(p, parts[k].scores + at * S, parts[k].hidden + row * S, S, peak);
                for (long j = S; j < whole(S); j++) p[j] = 0.0f;
                vec lanes = {0};
                for (long j = 0; j < whole(S); j += LANES) lanes += load(p + j);
                sum += sum_lanes(lanes);
                if (S) write_row(weights[k], at * S, p, S, is_bfloat16);
            }
            total[at] = sum;
            log_total[at] = peak + log2f(sum);
        }
        free(p);
    }
}

// d score = p (d p - delta), delta = sum p d p over both parts, with p = 2 to the (score - log_total).
// pairs: per batch of ``per_batch`` heads, their d scores, then their p: [batches, 2 per_batch, S].
// Writes the part of grad_sink of each head, [rows, H].
void dsv4_attention_softmax_backward(long rows, long H, int is_bfloat16, int threads, const float *log_sink,
                                     const float *log_total, long S1, const float *scores1, const uint8_t *hidden1,
                                     const void *projected1, long per_batch1, void *pairs1, long S2,
                                     const float *scores2, const uint8_t *hidden2, const void *projected2,
                                     long per_batch2, void *pairs2, float *grad_sink) {
    part parts[2] = {{S1, scores1, hidden1}, {S2, scores2, hidden2}};
    const void *projected[2] = {projected1, projected2};
    void *pairs[2] = {pairs1, pairs2};
    long per_batch[2] = {per_batch1, per_batch2};
    long most = whole(S1) + whole(S2);
#pragma omp parallel num_threads(threads)
    {
        float *p = scratch(most), *dp = scratch(most);
#pragma omp for schedule(static)
        for (long at = 0; at < rows * H; at++) {
            long row = at / H, offset[2] = {0, whole(S1)};
            float delta = 0;
            for (int k = 0; k < 2; k++) {
                long S = parts[k].S;
                float *mine = p + offset[k], *d = dp + offset[k];
                if (!S) continue;
                shifted_powers(mine, parts[k].scores + at * S, parts[k].hidden + row * S, S, log_total[at]);
                read_row(d, projected[k], at * S, S, is_bfloat16);
                for (long j = S; j < whole(S); j++) mine[j] = d[j] = 0.0f;
                delta += dot(mine, d, whole(S));
            }
            grad_sink[at] = -power2(log_sink[at % H] - log_total[at]) * delta;
            for (int k = 0; k < 2; k++) {
                long S = parts[k].S;
                float *mine = p + offset[k], *d = dp + offset[k];
                if (!S) continue;
                long first = (at / per_batch[k] * 2 * per_batch[k] + at % per_batch[k]) * S;
                write_row(pairs[k], first + per_batch[k] * S, mine, S, is_bfloat16);
                for (long j = 0; j < S; j++) d[j] = mine[j] * (d[j] - delta);
                write_row(pairs[k], first, d, S, is_bfloat16);
            }
        }
        free(p);
        free(dp);
    }
}
