// Linear maps: rows of x by rows of weights, in the fixed order of product.h. Contract: dsv4/ops/linear.
#include "packed.h"

#define UNIT 16      // rows of a weight, the least that is shared out
#define COLUMNS 64   // of the result, made at a time
#define ROWS 256     // of x, and
#define FEW_ROWS 24  // rows of x that leave a map waiting for its weights
#define SPAN 262144  // bytes of weights that such a map has read in one go, for the memory likes long runs
#define CACHED 131072 // bytes of weights that stay in a core's own cache

// One map of x, as Python packs it. A result that is not wide is rounded to the dtype of x. w_kind: 0 for float32, 1 for
// bfloat16, or a kind of codes, whose rows are w_stride bytes apart and have scales.
typedef struct {
    const void *x, *w;
    long w_stride, w_kind, is_wide, N;
    void *out;
    long out_stride;
    const void *scales;
    long scale_stride;
} Map;

static long units_of(const Map *map) { return (map->N + UNIT - 1) / UNIT; }

// How many units one thread takes at a time: results do not depend on it.
static long units_at_a_time(long units, long bytes, long M, int threads) {
    long wanted = (M > FEW_ROWS ? CACHED : SPAN) / bytes, share = (units + threads - 1) / threads;
    if (M <= FEW_ROWS && wanted < units / (8 * threads)) wanted = units / (8 * threads);
    return wanted < 1 ? 1 : wanted < share ? wanted : share;
}

// The same of a weight in codes, decoded once for all rows.
static void part_of_codes(const Map *map, Matrix x, long m0, long m1, long n0, long n1, long K) {
    Codes w = {map->w, map->scales, map->w_stride, map->scale_stride, 0, map->w_kind};
    long M = m1 - m0, N = n1 - n0, at = m0 * map->out_stride + n0, is_bfloat16 = x.is_bfloat16 && !map->is_wide;
    float *sums = is_bfloat16 ? scratch(M * N) : (float *)map->out + at;
    dsv4_products_of_codes(sums, is_bfloat16 ? N : map->out_stride, x, M, codes_from_row(w, n0), N, K);
    if (!is_bfloat16) return;
    for (long m = 0; m < M; m++) write_row(map->out, at + m * map->out_stride, sums + m * N, N, 1);
    free(sums);
}

// Columns n0 .. n1 of rows m0 .. m1 of one result.
static void part(const Map *map, long m0, long m1, long n0, long n1, long K, long x_stride, int x_is_bfloat16) {
    int rounds = x_is_bfloat16 && !map->is_wide;
    Matrix x = from_row(rows_of(map->x, x_stride, x_is_bfloat16), m0);
    if (is_coded(map->w_kind)) {
        part_of_codes(map, x, m0, m1, n0, n1, K);
        return;
    }
    float sums[ROWS * COLUMNS];
    for (long n = n0; n < n1; n += COLUMNS) {
        long count = n1 - n < COLUMNS ? n1 - n : COLUMNS, at = m0 * map->out_stride + n;
        Matrix w = from_row(rows_of(map->w, map->w_stride, map->w_kind), n);
        if (rounds) {
            dsv4_products(sums, COLUMNS, x, m1 - m0, w, count, K, 1);
            for (long m = 0; m < m1 - m0; m++)
                write_row(map->out, at + m * map->out_stride, sums + m * COLUMNS, count, 1);
        } else {
            dsv4_products((float *)map->out + at, map->out_stride, x, m1 - m0, w, count, K, 0);
        }
    }
}

// All maps of M rows of K, in one parallel region.
void dsv4_linears(long M, long K, long x_stride, int x_is_bfloat16, long count, int threads, const Map *maps) {
    long units = 0, blocks = (M + ROWS - 1) / ROWS;
    for (long i = 0; i < count; i++) units += units_of(maps + i);
    long step = units_at_a_time(units, UNIT * K * (maps->w_kind ? 2 : 4), M, threads);
    long items = (units + step - 1) / step * blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (items > 1)
    for (long item = 0; item < items; item++) {
        long first = item / blocks * step, last = first + step, m0 = item % blocks * ROWS;
        long m1 = m0 + ROWS < M ? m0 + ROWS : M;
        for (long i = 0; i < count && last > 0; i++) {
            long own = units_of(maps + i);
            if (first < own) {
                long n1 = last < own ? last * UNIT : maps[i].N;
                part(maps + i, m0, m1, (first > 0 ? first : 0) * UNIT, n1, K, x_stride, x_is_bfloat16);
            }
            first -= own;
            last -= own;
        }
    }
}
