// The router from its logits: affinity, choice, weights. Contract: dsv4/ops/route.
#include "common.h"

#define LOWEST -80.0f

static float affinity(float logit) {
    float x = logit < LOWEST ? LOWEST : logit;
    return sqrtf(x > 20.0f ? x : log1pf(expf(x)));
}

// logits: [T, E]; bias: [E], or null where chosen [T, A] is given; writes chosen, and weights [T, A]. Equal scores go
// to the smaller expert; a NaN is never above anything.
void dsv4_route(long T, long E, long A, int threads, float scale, const float *logits, const float *bias,
                int64_t *chosen, float *weights) {
#pragma omp parallel num_threads(threads)
    {
        float *score = scratch(E);
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) {
            int64_t *mine = chosen + t * A;
            if (bias) {
                for (long e = 0; e < E; e++) score[e] = affinity(logits[t * E + e]) + bias[e];
                for (long a = 0; a < A; a++) {
                    long best = -1;
                    for (long e = 0; e < E; e++) {
                        int is_taken = 0;
                        for (long b = 0; b < a; b++) is_taken |= mine[b] == e;
                        if (!is_taken && (best < 0 || score[e] > score[best])) best = e;
                    }
                    mine[a] = best;
                }
            }
            float total = 0.0f;
            for (long a = 0; a < A; a++) total += weights[t * A + a] = affinity(logits[t * E + mine[a]]);
            for (long a = 0; a < A; a++) weights[t * A + a] *= scale / total;
        }
        free(score);
    }
}
