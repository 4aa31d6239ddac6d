// The clamped SwiGLU and its gradient, one pass each. Contract: dsv4/ops/experts.
#include "common.h"

// out [n, F] = silu(min(gate, limit)) clamp(up, -limit, limit) weight; weight [n], or null for 1.
void dsv4_swiglu(long n, long F, int is_bfloat16, int threads, const void *gate, const void *up, const float *weight,
                 float limit, void *out) {
#pragma omp parallel num_threads(threads)
    {
        float *g = scratch(F), *v = scratch(F);
#pragma omp for schedule(static)
        for (long row = 0; row < n; row++) {
            float factor = weight ? weight[row] : 1.0f;
            read_row(g, gate, row * F, F, is_bfloat16);
            read_row(v, up, row * F, F, is_bfloat16);
            for (long i = 0; i < F; i++) {
                float a = g[i] > limit ? limit : g[i], b = v[i] > limit ? limit : v[i];
                b = b < -limit ? -limit : b;
                g[i] = a * sigmoid(a) * b * factor;
            }
            write_row(out, row * F, g, F, is_bfloat16);
        }
        free(g);
        free(v);
    }
}

// grad: [n, F], of the weighted activation. Writes the weighted activation, the gradients of gate and up, and of
// the weight [n]; activated and grad_weight may be null. Nothing passes beyond a clamp's limit.
void dsv4_swiglu_backward(long n, long F, int is_bfloat16, int threads, const void *gate, const void *up,
                          const float *weight, float limit, const void *grad, void *activated, void *grad_gate,
                          void *grad_up, float *grad_weight) {
#pragma omp parallel num_threads(threads)
    {
        long width = whole(F);
        float *g = scratch(width), *v = scratch(width), *d = scratch(width), *act = scratch(width);
#pragma omp for schedule(static)
        for (long row = 0; row < n; row++) {
            float factor = weight ? weight[row] : 1.0f;
            read_row(g, gate, row * F, F, is_bfloat16);
            read_row(v, up, row * F, F, is_bfloat16);
            read_row(d, grad, row * F, F, is_bfloat16);
            vec total = {0};
            for (long at = 0; at < width; at += LANES) {
                float products[LANES];
                for (long lane = 0; lane < LANES; lane++) {
                    long i = at + lane;
                    float a = g[i] > limit ? limit : g[i], b = v[i] > limit ? limit : v[i];
                    b = b < -limit ? -limit : b;
                    float s = sigmoid(a), silu = a * s, weighted = d[i] * factor;
                    products[lane] = silu * b * d[i];
                    act[i] = silu * b * factor;
                    float to_gate = weighted * b * s * (1.0f + a * (1.0f - s)), to_up = weighted * silu;
                    g[i] = g[i] > limit ? 0.0f : to_gate;
                    v[i] = v[i] > limit || v[i] < -limit ? 0.0f : to_up;
                }
                total += load(products);
            }
            if (grad_weight) grad_weight[row] = sum_lanes(total);
            if (activated) write_row(activated, row * F, act, F, is_bfloat16);
            write_row(grad_gate, row * F, g, F, is_bfloat16);
            write_row(grad_up, row * F, v, F, is_bfloat16);
        }
        free(g);
        free(v);
        free(d);
        free(act);
    }
}
