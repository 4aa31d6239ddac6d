// Attention of one engine step over rings, its own rows and pages of entries. Contract: dsv4/ops/attend/paged.py.
//
// A token's result depends on its own sequence alone. Its rows are listed in order: raw tokens from the oldest, then
// entries. A score is a sum over whole vectors of channels, then over lanes by one tree. Each segment of the list has
// weights of its own, relative to the largest of its scores, whose sum runs in vectors and whose mix of rows one row after
// the other; segments are then added up in their order.
// Rows are read in place where the stored bytes are what the products read, else from copies padded with zeros.
#include "rows.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#define HAS_NARROW 1 // products of bfloat16 pairs
#else
#define HAS_NARROW 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 64    // bytes of a vector, 16 floats or 32 bfloat16
#define TILE 4      // heads, and rows or vectors, of one register tile
#define HEADS 8     // heads whose scores are held at once
#define CHANNELS 64 // copied rows are padded to a multiple: TILE vectors
#define NEAR 64     // rows that stay in the nearest cache from one tile of heads to the next
#define AHEAD 16    // rows on their way to the core
#define SEGMENT 256 // rows whose mix is formed by itself, and that threads share a long list by

typedef struct {
    long T, H, K, R, ring_tokens, window, ratio, num_picks, max_pages;
    int is_bfloat16, format, is_narrow, is_direct; // narrow: rows as bfloat16; direct: read in place
    long row, stride;                              // bytes of a row as stored, and as the products read it
    int page_shift;                                // 2 to its power are the entries of a page
    float scale;
    const void *q, *kv;
    const float *sink;
    const uint8_t *ring, *pages;
    const int32_t *slot, *position, *first, *table, *picked;
    void *out;
    long num_older, most_raw, most_entries; // older rows that copies are made of; most rows that a token sees
    long *older;                            // [T] at a sequence's first token: the number of its first older copy
    const uint8_t **older_rows;
    char *copies; // the step's rows, then the older ones
} Step;

// What a segment is for a head: its largest score, or the sink's, and the sum of the weights relative to it.
typedef struct {
    float peak, sum;
} Share;

// What one thread works with. held: the slot whose first num_held visible entries lie in ``entries``.
typedef struct {
    const char **rows;
    char *q, *entries;
    uint8_t *stored;
    float *wide, *scores, *mixed, *factors, *part;
    Share *shares;
    long held, num_held;
} Bench;

static inline long at_least(long a, long b) { return a > b ? a : b; }
static inline long at_most(long a, long b) { return a < b ? a : b; }

static void *room(long bytes) {
    void *p = aligned_alloc(BLOCK, (bytes / BLOCK + 1) * BLOCK);
    if (!p) abort();
    return p;
}

static long num_entries(const Step *s, long t) {
    if (!s->pages) return 0;
    return s->picked ? s->num_picks : (s->position[t] + 1) / s->ratio;
}

// How many tokens of the sequence of token t came before this step, and how many of these its window reaches.
static long before(const Step *s, long t) { return s->position[t] - (t - s->first[t]); }
static long older_seen(const Step *s, long t) { return at_most(before(s, t), s->window - 1); }

static const uint8_t *ring_row(const Step *s, long slot, long position) {
    return s->ring + (slot * s->ring_tokens + position % s->ring_tokens) * s->row;
}

static const uint8_t *entry_row(const Step *s, long slot, long entry) {
    long page = s->table[slot * s->max_pages + (entry >> s->page_shift)];
    return s->pages + ((page << s->page_shift) + (entry & ((1 << s->page_shift) - 1))) * s->row;
}

// Rows lie anywhere: the processor cannot see the next ones coming.
INLINE void fetch(const uint8_t *row, long bytes) {
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 0);
}

// Copy a row as the products read it, padding and all; ``wide``: K floats to work with.
static void copy_row(const Step *s, char *to, const uint8_t *row, float *wide) {
    long end = s->K * (s->is_narrow ? 2 : 4);
    if (end < s->stride) memset(to + end, 0, s->stride - end);
    if (s->is_narrow && is_packed(s->format)) {
        row_read_narrow((uint16_t *)to, row, s->K, s->R);
        return;
    }
    row_read(wide, row, s->format, s->K, s->R);
    for (long i = 0; i < s->K && s->is_bfloat16; i++) wide[i] = rounded(wide[i], 1);
    write_row(to, 0, wide, s->K, s->is_narrow);
}

// Copy number i: a row of kv as the format stores it, or a ring's.
static void copy_raw(const Step *s, long i, float *wide, uint8_t *stored) {
    const uint8_t *row = stored;
    if (i < s->T) {
        read_row(wide, s->kv, i * s->K, s->K, s->is_bfloat16);
        row_write(stored, wide, s->format, s->K, s->R);
    } else {
        row = s->older_rows[i - s->T];
    }
    copy_row(s, s->copies + i * s->stride, row, wide);
}

// By all threads, each its part.
static void copy_all(const Step *s, float *wide, uint8_t *stored) {
    long num_copies = s->is_direct ? 0 : s->T + s->num_older;
#pragma omp for schedule(static)
    for (long i = 0; i < num_copies; i++) copy_raw(s, i, wide, stored);
}

// Find every sequence's older rows.
static void find_older(Step *s) {
    s->older = room(s->T * sizeof(long));
    s->older_rows = room(s->num_older * sizeof(uint8_t *));
    long count = 0;
    for (long t = 0; t < s->T; t++) {
        if (s->first[t] != t) continue;
        long begin = before(s, t);
        s->older[t] = s->T + count;
        for (long p = begin - older_seen(s, t); p < begin; p++)
            s->older_rows[count++] = ring_row(s, s->slot[t], p);
    }
}

static long list_raw(const Step *s, long t, const char **rows) {
    long begin = before(s, t), from = at_least(0, s->position[t] - s->window + 1), first = s->first[t], count = 0;
    const char *own = s->is_direct ? s->kv : s->copies;
    const char *older = s->copies + (s->older[first] - (begin - older_seen(s, t))) * s->stride;
    long turn = from % s->ring_tokens;
    for (long p = from; p < begin; p++) {
        rows[count++] = s->is_direct ? (const char *)s->ring + (s->slot[t] * s->ring_tokens + turn) * s->row
                                     : older + p * s->stride;
        turn = turn + 1 == s->ring_tokens ? 0 : turn + 1;
    }
    for (long i = first + at_least(from - begin, 0); i <= t; i++) rows[count++] = own + i * s->stride;
    return count;
}

// Where to read an entry: in place, or in a copy.
static const char *read_entry(const Step *s, long slot, long entry, char *copy, float *wide) {
    const uint8_t *row = entry_row(s, slot, entry);
    if (s->is_direct) return (const char *)row;
    copy_row(s, copy, row, wide);
    return copy;
}

static long nth_entry(const Step *s, long t, long i) { return s->picked ? s->picked[t * s->num_picks + i] : i; }

// Neighbouring tokens of a sequence see the same entries but the last; copies of them are kept.
static long list_entries(const Step *s, long t, Bench *b, const char **rows) {
    long slot = s->slot[t], total = num_entries(s, t), count = 0;
    long num_held = !s->picked && b->held == slot ? b->num_held : 0;
    for (long i = 0; i < total; i++) {
        long entry = nth_entry(s, t, i), later = i + AHEAD < total ? nth_entry(s, t, i + AHEAD) : -1;
        if (entry < 0) continue;
        if (later >= 0 && count + AHEAD >= num_held) fetch(entry_row(s, slot, later), s->row);
        char *copy = b->entries + count * s->stride;
        rows[count] = count < num_held && !s->is_direct ? copy : read_entry(s, slot, entry, copy, b->wide);
        count++;
    }
    b->held = slot;
    b->num_held = at_least(num_held, count);
    return count;
}

INLINE vec multiply_add(vec total, const char *a, const char *b, int is_narrow) {
#if HAS_NARROW
    if (is_narrow)
        return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#endif
    return total + load((const float *)a) * load((const float *)b);
}

// Lane 4 h + j is the sum of all lanes of x[h][j], each by the same tree.
INLINE vec sums_of(vec x[TILE][TILE]) {
    vec part[TILE];
    for (int j = 0; j < TILE; j++) {
        vec a = SHUFFLE(x[0][j], x[1][j], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                SHUFFLE(x[0][j], x[1][j], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        vec b = SHUFFLE(x[2][j], x[3][j], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                SHUFFLE(x[2][j], x[3][j], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        part[j] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int j = 0; j < 2; j++)
        part[j] = SHUFFLE(part[2 * j], part[2 * j + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  SHUFFLE(part[2 * j], part[2 * j + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(part[0], part[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           SHUFFLE(part[0], part[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// Scores of TILE heads with TILE rows, ``width`` scores a head.
INLINE void score_tile(float *scores, long width, const char *q, const char *const *rows, long stride, int is_narrow) {
    vec total[TILE][TILE] = {0};
    for (long at = 0; at < stride; at += BLOCK)
        for (int h = 0; h < TILE; h++)
            for (int j = 0; j < TILE; j++)
                total[h][j] = multiply_add(total[h][j], q + h * stride + at, rows[j] + at, is_narrow);
    vec sums = sums_of(total);
    for (int h = 0; h < TILE; h++) memcpy(scores + h * width, (const float *)&sums + h * TILE, 4 * TILE);
}

// mixed, TILE heads ``K`` apart, += weights rows, over TILE vectors of channels. Vectors of bfloat16 are kept as even
// and odd channels.
INLINE void mix_tile(float *mixed, long K, const float *weights, long width, const char *const *rows, long count,
                     long at, int is_narrow) {
    vec total[TILE][TILE];
    for (int h = 0; h < TILE; h++)
        for (int i = 0; i < TILE; i++) total[h][i] = load(mixed + h * K + i * LANES);
    for (long j = 0; j < count; j++) {
        vec value[TILE];
        for (int i = 0; i < TILE; i++) {
            if (is_narrow) {
                ivec pair = *(const ivec *)(rows[j] + at + i / 2 * BLOCK);
                value[i] = (vec)(i % 2 ? pair & (int32_t)0xffff0000 : pair << 16);
            } else {
                value[i] = load((const float *)(rows[j] + at + i * BLOCK));
            }
        }
        for (int h = 0; h < TILE; h++)
            for (int i = 0; i < TILE; i++) total[h][i] += spread(weights[h * width + j]) * value[i];
    }
    for (int h = 0; h < TILE; h++)
        for (int i = 0; i < TILE; i++) store(mixed + h * K + i * LANES, total[h][i]);
}

// Scores of rows [from, end) of the list.
INLINE void score_tiles(const Step *s, const Bench *b, long heads, long from, long end, long width, int is_narrow) {
    for (long near = from; near < end; near += NEAR)
        for (long h = 0; h < heads; h += TILE)
            for (long j = near; j < end && j < near + NEAR; j += TILE)
                score_tile(b->scores + h * width + j, width, b->q + h * s->stride, b->rows + j, s->stride, is_narrow);
}

static void score_rows(const Step *s, const Bench *b, long heads, long from, long end, long width) {
    s->is_narrow ? score_tiles(s, b, heads, from, end, width, 1) : score_tiles(s, b, heads, from, end, width, 0);
}

INLINE void mix_tiles(const Step *s, const Bench *b, float *mixed, long heads, long from, long end, long width,
                      int is_narrow) {
    long element = is_narrow ? 2 : 4, K = s->stride / element;
    memset(mixed, 0, 4 * HEADS * K);
    for (long near = from; near < end; near += NEAR)
        for (long h = 0; h < heads; h += TILE)
            for (long d = 0; d < K; d += CHANNELS)
                mix_tile(mixed + h * K + d, K, b->scores + h * width + near, width, b->rows + near,
                         at_most(NEAR, end - near), d * element, is_narrow);
}

// The mix of rows [from, end), a segment of the list at most.
static void mix_rows(const Step *s, const Bench *b, float *mixed, long heads, long from, long end, long width) {
    s->is_narrow ? mix_tiles(s, b, mixed, heads, from, end, width, 1)
                 : mix_tiles(s, b, mixed, heads, from, end, width, 0);
}

// Turn a head's scores of a segment, whole vectors of them, into weights.
static Share weigh(float *scores, long count, float scale, float sink) {
    float peaks[LANES], peak = sink;
    long width = whole(count);
    for (int i = 0; i < LANES; i++) peaks[i] = sink;
    for (long j = count; j < width; j++) scores[j] = -INFINITY;
    for (long j = 0; j < width; j += LANES) {
        for (int i = 0; i < LANES; i++) {
            scores[j + i] *= scale;
            peaks[i] = scores[j + i] > peaks[i] ? scores[j + i] : peaks[i];
        }
    }
    for (int i = 0; i < LANES; i++) peak = peaks[i] > peak ? peaks[i] : peak;
    vec total = {0};
    for (long j = 0; j < width; j += LANES) {
        for (int i = 0; i < LANES; i++) scores[j + i] = exponential(scores[j + i] - peak);
        total += load(scores + j);
    }
    return (Share){peak, sum_lanes(total)};
}

// A head's factors for its segments, whose shares lie ``step`` apart; returns one over all weights and the sink's.
static float weigh_segments(float *factors, const Share *shares, long segments, long step, float sink) {
    float peak = sink, total = 0;
    for (long i = 0; i < segments; i++) peak = shares[i * step].peak > peak ? shares[i * step].peak : peak;
    for (long i = 0; i < segments; i++) {
        factors[i] = exponential(shares[i * step].peak - peak);
        total += factors[i] * shares[i * step].sum;
    }
    return 1.0f / (exponential(sink - peak) + total);
}

static void write_head(const Step *s, long t, long head, const float *mixed, float factor, float *wide) {
    for (long d = 0; d < s->K; d += 2 * LANES) {
        vec a = load(mixed + d) * factor, b = load(mixed + d + LANES) * factor;
        if (s->is_narrow) {
            store_pairs(wide + d, a, b);
        } else {
            store(wide + d, a);
            store(wide + d + LANES, b);
        }
    }
    write_row(s->out, (t * s->H + head) * s->K, wide, s->K, s->is_bfloat16);
}

static void read_heads(const Step *s, long t, long head, long heads, char *q, float *wide) {
    memset(q, 0, HEADS * s->stride);
    for (long h = 0; h < heads; h++) {
        read_row(wide, s->q, (t * s->H + head + h) * s->K, s->K, s->is_bfloat16);
        write_row(q + h * s->stride, 0, wide, s->K, s->is_narrow);
    }
}

static void add_part(float *mixed, const float *part, float factor, long n) {
    for (long i = 0; i < n; i++) mixed[i] += factor * part[i];
}

static long segments_of(long count) { return (count + SEGMENT - 1) / SEGMENT; }
static long channels_of(const Step *s) { return s->stride / (s->is_narrow ? 2 : 4); }

// Heads [head, end) of token t.
static void attend_token(const Step *s, Bench *b, long t, long head, long end) {
    long count = list_raw(s, t, b->rows);
    count += list_entries(s, t, b, b->rows + count);
    for (long j = count; j < count + TILE; j++) b->rows[j] = b->rows[count - 1]; // for the last tile
    long width = whole(count), K = channels_of(s), segments = segments_of(count);
    for (; head < end; head += HEADS) {
        long heads = at_most(HEADS, end - head);
        read_heads(s, t, head, heads, b->q, b->wide);
        score_rows(s, b, heads, 0, count, width);
        float whole_factor[HEADS];
        for (long h = 0; h < heads; h++) {
            for (long i = 0; i < segments; i++)
                b->shares[i] = weigh(b->scores + h * width + i * SEGMENT, at_most(SEGMENT, count - i * SEGMENT), s->scale,
                                     s->sink[head + h]);
            whole_factor[h] = weigh_segments(b->factors + h * segments, b->shares, segments, 1, s->sink[head + h]);
        }
        memset(b->mixed, 0, 4 * HEADS * K);
        for (long i = 0; i < segments; i++) {
            mix_rows(s, b, b->part, heads, i * SEGMENT, at_most((i + 1) * SEGMENT, count), width);
            for (long h = 0; h < heads; h++)
                add_part(b->mixed + h * K, b->part + h * K, b->factors[h * segments + i], K);
        }
        for (long h = 0; h < heads; h++) write_head(s, t, head + h, b->mixed + h * K, whole_factor[h], b->wide);
    }
}

// List the rows of a segment of token t's list; ``raw`` of the list are raw tokens, listed in ``rows``. Returns how many.
static long list_segment(const Step *s, long t, long segment, long raw, long count, const char *const *rows, Bench *own) {
    long from = segment * SEGMENT, n = at_most(SEGMENT, count - from);
    for (long i = 0; i < n; i++) {
        long entry = from + i - raw, later = entry + AHEAD;
        if (later >= 0 && later < count - raw) fetch(entry_row(s, s->slot[t], later), s->row);
        own->rows[i] = entry < 0 ? rows[from + i]
                                 : read_entry(s, s->slot[t], entry, own->entries + i * s->stride, own->wide);
    }
    for (long i = n; i < n + TILE; i++) own->rows[i] = own->rows[n - 1];
    return n;
}

// Token t by all threads together, each with segments of its list. They share ``b``: the queries of all heads, raw rows,
// and what segments give; ``own`` is a thread's.
static void attend_together(const Step *s, const Bench *b, Bench *own, long t) {
    long raw = at_most(s->window, s->position[t] + 1), count = raw + num_entries(s, t);
    long K = channels_of(s), segments = segments_of(count), H = (s->H + HEADS - 1) / HEADS * HEADS;
#pragma omp single
    {
        list_raw(s, t, b->rows);
        for (long head = 0; head < s->H; head += HEADS)
            read_heads(s, t, head, at_most(HEADS, s->H - head), b->q + head * s->stride, own->wide);
    }
#pragma omp for schedule(static)
    for (long segment = 0; segment < segments; segment++) {
        long n = list_segment(s, t, segment, raw, count, b->rows, own);
        for (long head = 0; head < s->H; head += HEADS) {
            long heads = at_most(HEADS, s->H - head);
            own->q = b->q + head * s->stride;
            score_rows(s, own, heads, 0, n, SEGMENT);
            for (long h = 0; h < heads; h++)
                b->shares[segment * H + head + h] = weigh(own->scores + h * SEGMENT, n, s->scale, s->sink[head + h]);
            mix_rows(s, own, b->part + (segment * H + head) * K, heads, 0, n, SEGMENT);
        }
    }
#pragma omp for schedule(static)
    for (long head = 0; head < s->H; head++) {
        float factor = weigh_segments(own->factors, b->shares + head, segments, H, s->sink[head]);
        memset(own->mixed, 0, 4 * K);
        for (long i = 0; i < segments; i++) add_part(own->mixed, b->part + (i * H + head) * K, own->factors[i], K);
        write_head(s, t, head, own->mixed, factor, own->wide);
    }
}

// For lists of ``count`` rows and so many heads at once, ``parts`` of them.
static Bench bench(const Step *s, long count, long heads, long parts) {
    long channels = channels_of(s), segments = segments_of(s->most_raw + s->most_entries);
    Bench b = {.held = -1};
    b.rows = room((count + TILE) * sizeof(char *));
    b.q = room(heads * s->stride);
    b.entries = room(s->is_direct ? 0 : count * s->stride);
    b.stored = room(s->row);
    b.wide = room(4 * channels);
    b.scores = room(4 * HEADS * whole(count + TILE));
    b.mixed = room(4 * HEADS * channels);
    b.factors = room(4 * HEADS * segments);
    b.shares = room(parts * heads * segments * sizeof(Share));
    b.part = room(4 * parts * heads * channels);
    return b;
}

static void clear(Bench *b) {
    free(b->rows);
    free(b->q);
    free(b->entries);
    free(b->stored);
    free(b->wide);
    free(b->scores);
    free(b->mixed);
    free(b->factors);
    free(b->shares);
    free(b->part);
}

// Tokens after one another, where they are few and their lists long.
static void run_together(const Step *s, int threads) {
    long heads = (s->H + HEADS - 1) / HEADS * HEADS;
    Bench all = bench(s, s->most_raw, heads, segments_of(s->most_raw + s->most_entries));
#pragma omp parallel num_threads(threads)
    {
        Bench own = bench(s, SEGMENT, HEADS, 1);
        char *q = own.q;
        copy_all(s, own.wide, own.stored);
        for (long t = 0; t < s->T; t++) attend_together(s, &all, &own, t);
        own.q = q;
        clear(&own);
    }
    clear(&all);
}

static void run(const Step *s, int threads) {
    // Few tokens share out their heads too, so that no thread is idle.
    long share = s->T < 4 * threads ? (s->H + threads - 1) / threads : s->H;
    share = (share + TILE - 1) / TILE * TILE;
    long shares = (s->H + share - 1) / share;
#pragma omp parallel num_threads(threads)
    {
        Bench b = bench(s, s->most_raw + s->most_entries, HEADS, 1);
        copy_all(s, b.wide, b.stored);
#pragma omp for schedule(dynamic) nowait
        for (long item = 0; item < s->T * shares; item++) {
            long head = item % shares * share;
            attend_token(s, &b, item / shares, head, at_most(head + share, s->H));
        }
        clear(&b);
    }
}

// num_picks: of a token, -1 for all visible entries. max_pages: of a slot. pages and picked may be null.
void dsv4_attend_paged(long T, long H, long K, long R, long ring_tokens, long window, long ratio, long num_picks,
                       long max_pages, int is_bfloat16, int format, int threads, float scale, const void *q,
                       const void *kv, const float *sink, const uint8_t *ring, const int32_t *slot,
                       const int32_t *position, const int32_t *first, const int32_t *table, const uint8_t *pages,
                       const int32_t *picked, void *out) {
    int is_narrow = HAS_NARROW && is_bfloat16, own_format = is_bfloat16 ? ROW_BFLOAT16 : ROW_FLOAT32;
    Step s = {.T = T, .H = H, .K = K, .R = R, .ring_tokens = ring_tokens, .window = window, .ratio = ratio};
    s.num_picks = num_picks, s.max_pages = max_pages, s.page_shift = ratio == 4 ? 5 : 0;
    s.is_bfloat16 = is_bfloat16, s.is_narrow = is_narrow, s.format = format, s.row = row_bytes(format, K, R);
    s.is_direct = K % CHANNELS == 0 && is_narrow == is_bfloat16 && format == own_format;
    s.stride = (K + CHANNELS - 1) / CHANNELS * CHANNELS * (is_narrow ? 2 : 4);
    s.scale = scale, s.q = q, s.kv = kv, s.sink = sink, s.ring = ring, s.pages = pages, s.out = out;
    s.slot = slot, s.position = position, s.first = first, s.table = table, s.picked = picked;
    for (long t = 0; t < T; t++) {
        s.most_raw = at_least(s.most_raw, at_most(window, position[t] + 1));
        s.most_entries = at_least(s.most_entries, num_entries(&s, t));
        s.num_older += first[t] == t ? older_seen(&s, t) : 0;
    }
    if (!T) return;
    s.copies = room(s.is_direct ? 0 : (T + s.num_older) * s.stride);
    find_older(&s);
    int is_long = !picked && s.most_raw + s.most_entries >= 8 * SEGMENT;
    is_long && T < threads ? run_together(&s, threads) : run(&s, threads);
    free(s.copies);
    free(s.older);
    free(s.older_rows);
}

// Store the last tokens of each sequence of a step, at most a ring of them.
void dsv4_write_ring(long T, long K, long R, long ring_tokens, int is_bfloat16, int format, const void *kv,
                     const int32_t *slot, const int32_t *position, const int32_t *first, uint8_t *ring) {
    float *wide = scratch(K);
    long bytes = row_bytes(format, K, R), end = T;
    for (long t = T - 1; t >= 0; t--) {
        if (end - t <= ring_tokens) {
            read_row(wide, kv, t * K, K, is_bfloat16);
            row_write(ring + (slot[t] * ring_tokens + position[t] % ring_tokens) * bytes, wide, format, K, R);
        }
        end = first[t] == t ? t : end;
    }
    free(wide);
}
