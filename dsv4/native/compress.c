// Compression into pages: the blocks that a step closes, pooled, normalised, rotated and stored, then the tails.
// Contract: dsv4/ops/compress/paged.py; shapes T C E K m L as there.
#include "hadamard.h"
#include "rows.h"

#define PAGE_TOKENS 128
#define SMALL (1 << 17) // fewer projections than this are not worth splitting over threads

typedef struct {
    long E, K, m, L, max_pages;
    const float *kv, *gate, *bias;
    float *tail_kv, *tail_gate;
    const int32_t *slot, *position, *first, *table;
} Job;

// One of the tokens that an entry pools: K channels each.
typedef struct {
    const float *kv, *gate, *bias;
} Part;

// The m tokens from position ``begin`` on, by their channels from ``channel`` on, as token t sees them: those of the
// step where they stand in it, older ones in the tail.
static void find_block(Part *parts, const Job *job, long t, long begin, long channel) {
    for (long j = 0; j < job->m; j++) {
        long position = begin + j, flat = t - (job->position[t] - position);
        long row = flat >= job->first[t] ? flat : job->slot[t] * job->L + position % job->L;
        const float *kv = flat >= job->first[t] ? job->kv : job->tail_kv;
        const float *gate = flat >= job->first[t] ? job->gate : job->tail_gate;
        parts[j].kv = kv + row * job->E + channel;
        parts[j].gate = gate + row * job->E + channel;
        parts[j].bias = job->bias + j * job->E + channel;
    }
}

static vec load_some(const float *p, long n) {
    if (n >= LANES) return load(p);
    float x[LANES] = {0};
    memcpy(x, p, 4 * n);
    return load(x);
}

// y = sum_j kv_j softmax_j(gate_j + bias_j) by channel; ``score``: LANES numbers a part.
static void pool(float *y, const Part *parts, long count, long K, float *score) {
    for (long d = 0; d < K; d += LANES) {
        float peak[LANES];
        for (int i = 0; i < LANES; i++) peak[i] = -INFINITY;
        for (long j = 0; j < count; j++) {
            float *x = score + j * LANES;
            store(x, load_some(parts[j].gate + d, K - d) + load_some(parts[j].bias + d, K - d));
            for (int i = 0; i < LANES; i++) peak[i] = x[i] > peak[i] ? x[i] : peak[i];
        }
        vec total = {0}, weights = {0};
        for (long j = 0; j < count; j++) {
            float *x = score + j * LANES;
            for (int i = 0; i < LANES; i++) x[i] = exponential(x[i] - peak[i]);
            weights += load(x);
            total += load(x) * load_some(parts[j].kv + d, K - d);
        }
        store(y + d, total / weights);
    }
}

// x = x / rms(x) weight, then its last 2 * pairs channels rotated; x is whole vectors, zeros behind K.
static void finish(float *x, const float *weight, float eps, const float *cosine, const float *sine, long K,
                   long pairs, int is_bfloat16) {
    for (long d = 0; d < K; d++) x[d] = rounded(x[d], is_bfloat16);
    float factor = 1.0f / sqrtf(dot(x, x, whole(K)) / K + eps);
    for (long d = 0; d < K; d++) x[d] = rounded(x[d] * factor * weight[d], is_bfloat16);
    for (float *tail = x + K - 2 * pairs; pairs > 0; pairs--, tail += 2, cosine++, sine++) {
        float a = tail[0], b = tail[1];
        tail[0] = rounded(a * *cosine - b * *sine, is_bfloat16);
        tail[1] = rounded(a * *sine + b * *cosine, is_bfloat16);
    }
}

// kv, gate: [T, E]; bias: [m, E]; norm_weight: [K] of either dtype; cosine, sine: [C, pairs];
// rounds: entries as released, ``transform`` the factor of an index key's.
// tails: [num_slots, L, E]; pages: [num_pages, PAGE_TOKENS / m, bytes of a row]; closing: [C], blocks' last tokens.
void dsv4_compress_paged(long T, long C, long E, long m, long L, long pairs, long max_pages, int overlap, int format,
                         int is_index, int rounds, int is_bfloat16, int weight_is_bfloat16, int threads, float eps,
                         float transform, const float *kv,
                         const float *gate, const float *bias, const void *norm_weight, const float *cosine,
                         const float *sine, float *tail_kv, float *tail_gate, uint8_t *pages, const int32_t *slot,
                         const int32_t *position, const int32_t *first, const int32_t *table, const int32_t *closing) {
    long K = overlap ? E / 2 : E, R = 2 * pairs;
    long bytes = is_index ? index_row_bytes(format, K) : row_bytes(format, K, R);
    Job job = {E, K, m, L, max_pages, kv, gate, bias, tail_kv, tail_gate, slot, position, first, table};
    threads = (C * 2 * m + T) * E < SMALL ? 1 : threads;
#pragma omp parallel num_threads(threads)
    {
        Part *parts = malloc(2 * m * sizeof(Part));
        if (!parts) abort();
        float *score = scratch(2 * m * LANES), *x = scratch(K), *weight = scratch(K);
        read_row(weight, norm_weight, 0, K, weight_is_bfloat16);
#pragma omp for schedule(static)
        for (long c = 0; c < C; c++) {
            long t = closing[c], begin = position[t] + 1 - m, has_previous = overlap && begin > 0;
            if (has_previous) find_block(parts, &job, t, begin - m, 0);
            find_block(parts + (has_previous ? m : 0), &job, t, begin, E - K);
            pool(x, parts, has_previous ? 2 * m : m, K, score);
            finish(x, weight, eps, cosine + c * pairs, sine + c * pairs, K, pairs, is_bfloat16);
            if (rounds && is_index) index_round(x, K, transform, is_bfloat16);
            for (long d = 0; rounds && !is_index && d < K - R; d += ROW_GROUP)
                e4m3_round(x + d, K - R - d < ROW_GROUP ? K - R - d : ROW_GROUP);
            long page = table[slot[t] * max_pages + begin / PAGE_TOKENS];
            long entry = begin % PAGE_TOKENS / m, entries = PAGE_TOKENS / m;
            uint8_t *own = pages + page * entries * bytes;
            if (is_index) index_entry_write(own, entry, entries, x, format, K);
            else row_write(own + entry * bytes, x, format, K, R);
        }
        // The barrier between the loops: tails are read before any is written.
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) {
            if (t + L < T && first[t + L] == first[t]) continue; // a later token takes the place
            long row = slot[t] * L + position[t] % L;
            memcpy(tail_kv + row * E, kv + t * E, 4 * E);
            memcpy(tail_gate + row * E, gate + t * E, 4 * E);
        }
        free(parts);
        free(score);
        free(x);
        free(weight);
    }
}
