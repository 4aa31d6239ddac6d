// The experts' forward pass in the fixed order of product.h: tokens grouped by expert, all in one parallel region.
// Contract: dsv4/ops/experts. Shapes T A E D F as there; a slot is one choice of one token.
#include "codes.h"
#include "packed.h"

#define SPAN 64      // rows of w1 and w3 that a thread takes at a time,
#define GROUP 128    // in codes as many as share a scale of the hidden rows,
#define SPAN_BACK 128 // and of w2
#define TOKENS 64    // rows of gate and linear part made at a time
#define FEW 16       // tokens that leave the threads waiting for the weights, which then are read in long runs

// Rows of tokens, grouped by expert: those of group g belong to expert[g] and begin at begin[g].
typedef struct {
    long groups;
    int32_t *expert, *begin;
    int32_t *token; // of each row
    float *factor;  // of each row, the routing weight
    int32_t *row;   // of each slot
} Groups;

// Count and place the slots whose expert is here, that is, has an address; the row of others is -1. The shared expert,
// number E, has a last group of all tokens.
static int group(Groups *to, long T, long A, long E, const int64_t *chosen, const float *weights,
                 const void *const *here) {
    long rows = T * (A + 1);
    to->expert = malloc(4 * (2 * E + 3 + 3 * rows) + 4);
    int32_t *next = calloc(E + 1, 4);
    if (!to->expert || !next) abort();
    to->begin = to->expert + E + 1;
    to->token = to->begin + E + 2;
    to->row = to->token + rows;
    to->factor = (float *)(to->row + rows);
    to->groups = 0;
    int fits = 1;
    for (long slot = 0; slot < T * A; slot++) {
        fits = fits && chosen[slot] >= 0 && chosen[slot] < E;
        if (fits) next[chosen[slot]]++;
    }
    int32_t start = 0;
    for (long expert = 0; fits && expert < E; expert++) {
        int32_t count = here[expert] ? next[expert] : 0;
        next[expert] = start;
        if (!count) continue;
        to->expert[to->groups] = expert;
        to->begin[to->groups++] = start;
        start += count;
    }
    for (long slot = 0; fits && slot < T * A; slot++) {
        int32_t row = here[chosen[slot]] ? next[chosen[slot]]++ : -1;
        to->row[slot] = row;
        if (row < 0) continue;
        to->token[row] = slot / A;
        to->factor[row] = weights[slot];
    }
    if (here[E]) {
        to->expert[to->groups] = E;
        to->begin[to->groups++] = start;
        for (long t = 0; t < T; t++) to->token[start + t] = t, to->factor[start + t] = 1.0f;
        start += T;
    }
    to->begin[to->groups] = start;
    free(next);
    return fits;
}

// gate = the weighted SwiGLU of n products, which are rounded first.
static void activate(float *restrict gate, const float *restrict up, long n, float limit, float factor,
                     int is_bfloat16) {
    for (long i = 0; i < n; i++) {
        float a = rounded(gate[i], is_bfloat16), b = rounded(up[i], is_bfloat16);
        a = a > limit ? limit : a;
        b = b > limit ? limit : b;
        b = b < -limit ? -limit : b;
        gate[i] = a * sigmoid(a) * b * factor;
    }
}

// Columns f0 .. f1 of the hidden rows of one group. Where w1 and w3 are in codes, so is w2, whose inputs are rounded.
static void hide(void *hidden, const Groups *by, long g, long f0, long f1, long D, long F, Matrix x, Weight w1,
                 Weight w3, float limit) {
    float gate[TOKENS * GROUP], up[TOKENS * GROUP];
    long width = f1 - f0;
    for (long row = by->begin[g]; row < by->begin[g + 1]; row += TOKENS) {
        long count = by->begin[g + 1] - row < TOKENS ? by->begin[g + 1] - row : TOKENS;
        x.pick = by->token + row;
        weight_products(gate, GROUP, x, count, w1, f0, width, D);
        weight_products(up, GROUP, x, count, w3, f0, width, D);
        for (long i = 0; i < count; i++) {
            float *made = gate + i * GROUP;
            activate(made, up + i * GROUP, width, limit, by->factor[row + i], x.is_bfloat16);
            if (is_coded(w1.kind)) {
                for (long f = 0; f < width; f++) made[f] = rounded(made[f], x.is_bfloat16);
                e4m3_round(made, width);
            }
            write_row(hidden, (row + i) * F + f0, made, width, x.is_bfloat16);
        }
    }
}

// total [n] += a row, rounded first.
static void add(float *restrict total, const float *restrict y, long n, int is_bfloat16) {
    for (long i = 0; i < n; i++) total[i] += rounded(y[i], is_bfloat16);
}

// x: [T, D]; chosen: [T, A]; weights: [T, A]. w1, w2 and w3 hold an address for each of E experts, [F, D], [D, F] and
// [F, D], and one more for the expert of all tokens, or null. out: [T, D] float32, each token's experts added in the order
// of its choices; with the expert of all tokens, in the dtype of x, that one added last and the sum rounded once.
// ``apart``: nothing is added up. out: [T, A + 1, D] in the dtype of x, of each choice its own row, and of the expert of
// all tokens the last; rows of experts without an address stay as they are.
// A choice outside 0 .. E - 1 only sets wrong. w_kind, shared_kind: as Weight's; matrices in codes have scales at s1, s2
// and s3, as many addresses, and their x is rounded by the caller.
void dsv4_experts(long T, long A, long E, long D, long F, int x_is_bfloat16, int w_kind, int shared_kind, int apart,
                  int threads, float limit, const void *x, const int64_t *chosen, const float *weights,
                  const void *const *w1, const void *const *w2, const void *const *w3, const void *const *s1,
                  const void *const *s2, const void *const *s3, void *out, long *wrong) {
    Groups by;
    *wrong = !group(&by, T, A, E, chosen, weights, w1);
    if (*wrong) {
        free(by.expert);
        return;
    }
    long rows = by.begin[by.groups], size = x_is_bfloat16 ? 2 : 4;
    long span = is_coded(w_kind) || is_coded(shared_kind) ? GROUP : SPAN, parts = (F + span - 1) / span;
    long items = by.groups * parts, run = T <= FEW ? (items + threads - 1) / threads : 1;
    long width = T <= FEW ? whole((D + threads - 1) / threads) : SPAN_BACK;
    int shared = w1[E] != 0, out_is_bfloat16 = shared && x_is_bfloat16;
    void *hidden = malloc(rows * F * size + 1);
    if (!hidden) abort();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, run)
        for (long item = 0; item < items; item++) {
            long g = item / parts, f0 = item % parts * span, e = by.expert[g];
            Weight gate = {w1[e], s1 ? s1[e] : 0, e == E ? shared_kind : w_kind};
            Weight up = {w3[e], s3 ? s3[e] : 0, gate.kind};
            hide(hidden, &by, g, f0, f0 + span < F ? f0 + span : F, D, F, rows_of(x, D, x_is_bfloat16), gate, up, limit);
        }
        float *y = malloc(4 * (rows + 1) * width), *total = y + rows * width;
        if (!y) abort();
#pragma omp for schedule(dynamic)
        for (long d0 = 0; d0 < D; d0 += width) {
            long n = D - d0 < width ? D - d0 : width;
            for (long g = 0; g < by.groups; g++) {
                long e = by.expert[g];
                Weight w = {w2[e], s2 ? s2[e] : 0, e == E ? shared_kind : w_kind};
                Matrix h = from_row(rows_of(hidden, F, x_is_bfloat16), by.begin[g]);
                weight_products(y + by.begin[g] * width, width, h, by.begin[g + 1] - by.begin[g], w, d0, n, F);
            }
            const float *last = y + (shared ? rows - T : 0) * width; // of the expert of all tokens
            for (long t = 0; t < T && apart; t++) {
                for (long a = 0; a < A; a++)
                    if (by.row[t * A + a] >= 0)
                        write_row(out, (t * (A + 1) + a) * D + d0, y + by.row[t * A + a] * width, n, x_is_bfloat16);
                if (shared) write_row(out, (t * (A + 1) + A) * D + d0, last + t * width, n, x_is_bfloat16);
            }
            for (long t = 0; t < T && !apart; t++) {
                memset(total, 0, 4 * n);
                for (long a = 0; a < A; a++) add(total, y + by.row[t * A + a] * width, n, x_is_bfloat16);
                if (shared) add(total, last + t * width, n, x_is_bfloat16);
                write_row(out, t * D + d0, total, n, out_is_bfloat16);
            }
        }
        free(y);
    }
    free(hidden);
    free(by.expert);
}
