// The indexer's choice over paged keys. Contract: dsv4/ops/index/paged.py; shapes T I J P as there.
//
// A page of keys is turned so that each lane of a vector is an entry: a score is formed in one lane, over channels and
// then heads in their order, whatever stands beside it. Queries of one sequence share the turned pages, and each keeps
// few candidates while it goes through them: no row of scores exists.
#include "rows.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define ENTRIES 32       // of a page, two vectors,
#define TOKENS 128       // and its tokens
#define PAGES 4          // turned at once
#define HEADS 8          // of one register tile, beside the entries of a page
#define QUERIES 32       // that share the turned pages
#define SMALL (1L << 21) // fewer multiply-adds than this are not worth splitting over threads

// Keys and queries are in units of 4 bytes: a float, or a pair of bfloat16 where the processor multiplies pairs.
#ifdef __AVX512BF16__
#define PAIRED 1
#else
#define PAIRED 0
#endif

typedef struct {
    long I, J, P, max_pages;
    int format, is_bfloat16, weights_are_bfloat16;
    const void *q, *weights;
    const uint8_t *pages;
    const int32_t *slot, *position, *table;
    long heads; // I in whole register tiles
    long units; // of a head
    long width; // units in whole vectors
    long bytes; // of a stored key
    long room;  // for candidates of a query
} Job;

// The best of one query so far, in the order of their entries. Scores are integers that compare as the numbers do.
typedef struct {
    long count;
    int32_t limit; // a later entry is a candidate above this
    int32_t *score, *entry;
} Candidates;

typedef struct {
    int32_t *rows; // a page as it is stored, [ENTRIES, width] units
    int32_t *keys; // PAGES of [width, ENTRIES]
    int32_t *q;    // QUERIES of [heads / HEADS, units, HEADS]
    float *weights, *values;
    Candidates best[QUERIES];
} Room;

static long visible(const Job *job, long t) { return ((long)job->position[t] + 1) * ENTRIES / TOKENS; }

// Rows to columns, 16 by 16: rows lie ``stride`` apart, columns ENTRIES apart.
static void transpose(int32_t *to, const int32_t *from, long stride) {
#ifdef __AVX512F__
    __m512i m[LANES], lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) m[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) { // exchange the off-diagonal blocks of this size
        __mmask16 is_odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
        __m512i next = _mm512_add_epi32(lane, _mm512_set1_epi32(step));
        __m512i upper = _mm512_mask_add_epi32(lane, is_odd, lane, _mm512_set1_epi32(LANES - step));
        __m512i lower = _mm512_mask_add_epi32(next, is_odd, lane, _mm512_set1_epi32(LANES));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            __m512i a = m[i], b = m[i + step];
            m[i] = _mm512_permutex2var_epi32(a, upper, b);
            m[i + step] = _mm512_permutex2var_epi32(a, lower, b);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + i * ENTRIES, m[i]);
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j * ENTRIES + i] = from[i * stride + j];
#endif
}

// A packed key of whole groups as pairs: the 16 numbers of E2M1 times the group's scale, looked up by code.
// Returns 0 where a scale is none that rows have.
static int read_pairs(int32_t *to, const uint8_t *row, long J) {
#if PAIRED
    static const uint16_t E2M1[2 * LANES] = {
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080,
        0xc0c0};
    __m512i numbers = _mm512_loadu_si512(E2M1), nibbles = _mm512_set1_epi32(0x000f000f);
    __mmask32 is_some = _mm512_test_epi16_mask(numbers, numbers);
    for (long g = 0; g < J / INDEX_GROUP; g++) {
        int scale = row[J / 2 + g];
        if (scale == 0 || scale > 253) return 0;
        __m512i table = _mm512_mask_add_epi16(numbers, is_some, numbers, _mm512_set1_epi16((scale - 127) * 128));
        __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + LANES * g)));
        codes = _mm512_and_si512(_mm512_or_si512(codes, _mm512_slli_epi32(codes, 12)), nibbles);
        _mm512_storeu_si512(to + LANES * g, _mm512_permutexvar_epi16(codes, table));
    }
    return 1;
#else
    return 0;
#endif
}

// A key in the dtype of the queries; ``values``: J floats of scratch.
static void read_key(int32_t *to, const uint8_t *row, float *values, const Job *job) {
    long J = job->J;
    if (!PAIRED || !job->is_bfloat16) {
        float *key = (float *)to;
        index_row_read(key, row, job->format, J);
        for (long j = 0; j < J && job->is_bfloat16; j++) key[j] = rounded(key[j], 1);
    } else if (job->format == ROW_BFLOAT16) {
        memcpy(to, row, 2 * J);
    } else if (job->format != ROW_PACKED || J % INDEX_GROUP || !read_pairs(to, row, J)) {
        index_row_read(values, row, job->format, J);
        write_row(to, 0, values, J, 1);
    }
}

// Pages lie anywhere: the processor cannot see the next one coming.
static void prefetch(const uint8_t *page, long bytes) {
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch(page + at);
}

static void turn_page(int32_t *keys, const uint8_t *page, Room *room, const Job *job) {
    for (long e = 0; e < ENTRIES; e++)
        read_key(room->rows + e * job->width, page + e * job->bytes, room->values, job);
    for (long u = 0; u < job->width; u += LANES)
        for (long e = 0; e < ENTRIES; e += LANES)
            transpose(keys + u * ENTRIES + e, room->rows + e * job->width + u, job->width);
}

// Scores

static inline vec multiply_add(vec total, vec keys, int32_t unit, int in_pairs) {
#if PAIRED
    if (in_pairs) return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)keys, (__m512bh)_mm512_set1_epi32(unit));
#endif
    return total + keys * float_of(unit);
}

static inline vec rounded_positive(vec x, int is_bfloat16) {
    ivec bits = (ivec)x & (x > 0);
    if (!is_bfloat16) return (vec)bits;
    return (vec)((bits + 0x7fff + ((bits >> 16) & 1)) & -0x10000);
}

// score[e] = sum_i weights_i relu(q_i . key_e) of a page. Adding 0 makes -0 one with it.
static inline __attribute__((always_inline)) void score_page(int32_t *score, const int32_t *q, const float *weights,
                                                             const float *keys, const Job *job, int is_bfloat16) {
    vec total[2] = {0};
    for (long head = 0; head < job->heads; head += HEADS) {
        vec dots[HEADS][2] = {0};
        for (long u = 0; u < job->units; u++, q += HEADS) {
            vec a = load(keys + u * ENTRIES), b = load(keys + u * ENTRIES + LANES);
            for (int i = 0; i < HEADS; i++) {
                dots[i][0] = multiply_add(dots[i][0], a, q[i], is_bfloat16);
                dots[i][1] = multiply_add(dots[i][1], b, q[i], is_bfloat16);
            }
        }
        for (int i = 0; i < HEADS; i++)
            for (int half = 0; half < 2; half++)
                total[half] += weights[head + i] * rounded_positive(dots[i][half], is_bfloat16);
    }
    for (int half = 0; half < 2; half++) {
        ivec bits = (ivec)(total[half] + 0.0f);
        store((float *)score + half * LANES, (vec)(bits ^ ((bits >> 31) & 0x7fffffff)));
    }
}

// Choices

static long count_from(const int32_t *score, long n, int32_t least) {
    int count = 0;
    for (long i = 0; i < n; i++) count += score[i] >= least;
    return count;
}

// Keep the P best, the earlier of equal ones.
static void narrow(Candidates *best, long P) {
    if (best->count <= P) return;
    long n = best->count, low = best->score[0], high = low;
    for (long i = 1; i < n; i++) {
        low = best->score[i] < low ? best->score[i] : low;
        high = best->score[i] > high ? best->score[i] : high;
    }
    for (high++; high - low > 1;) { // at least P reach low, fewer reach high
        long middle = low + (high - low) / 2, reaching = count_from(best->score, n, middle);
        if (reaching >= P) low = middle;
        else high = middle;
        if (reaching == P) break;
    }
    long kept = 0, equals = P;
    for (long i = 0; i < n; i++) equals -= best->score[i] > low;
    for (long i = 0; i < n; i++) {
        int32_t score = best->score[i];
        int is_equal = score == low;
        best->score[kept] = score;
        best->entry[kept] = best->entry[i];
        kept += (score > low) | (is_equal & (equals > 0));
        equals -= is_equal;
    }
    best->count = kept;
    best->limit = low;
}

static void take(Candidates *best, const int32_t *score, long entry, long n, const Job *job) {
    int any = 0;
    for (long i = 0; i < ENTRIES; i++) any |= score[i] > best->limit;
    if (!any) return;
    long count = best->count;
    for (long i = 0; i < n; i++) {
        best->score[count] = score[i];
        best->entry[count] = entry + i;
        count += score[i] > best->limit;
    }
    best->count = count;
    if (count > job->room - ENTRIES) narrow(best, job->P);
}

static void read_queries(Room *room, long first, long count, const Job *job) {
    long I = job->I, J = job->J, per_unit = PAIRED && job->is_bfloat16 ? 2 : 1, size = job->heads * job->units;
    memset(room->q, 0, 4 * count * size);
    for (long t = 0; t < count; t++) {
        read_row(room->weights + t * job->heads, job->weights, (first + t) * I, I, job->weights_are_bfloat16);
        for (long i = 0; i < I; i++) {
            int32_t *q = room->q + t * size + i / HEADS * job->units * HEADS + i % HEADS;
            read_row(room->values, job->q, ((first + t) * I + i) * J, J, job->is_bfloat16);
            for (long u = 0; u < job->units; u++) {
                float a = room->values[per_unit * u], b = per_unit == 2 ? room->values[2 * u + 1] : 0.0f;
                q[u * HEADS] = per_unit == 1 ? bits_of(a) : bits_of(a) >> 16 | bits_of(b);
            }
        }
    }
}

// Choose among the pages from ``page`` to ``end`` of a sequence, for ``count`` of its queries.
static void choose(Room *room, long first, long count, long page, long end, const Job *job) {
    const int32_t *table = job->table + job->slot[first] * job->max_pages;
    long size = job->heads * job->units, page_units = job->width * ENTRIES, page_bytes = ENTRIES * job->bytes;
    int32_t score[ENTRIES];
    for (long t = 0; t < count; t++) {
        room->best[t].count = 0;
        room->best[t].limit = INT32_MIN;
    }
    if (page < end) read_queries(room, first, count, job);
    for (; page < end; page += PAGES) {
        long turned = end - page < PAGES ? end - page : PAGES;
        for (long i = 0; i < turned; i++) {
            if (page + i + 1 < end) prefetch(job->pages + table[page + i + 1] * page_bytes, page_bytes);
            turn_page(room->keys + i * page_units, job->pages + table[page + i] * page_bytes, room, job);
        }
        for (long t = 0; t < count; t++) {
            const int32_t *q = room->q + t * size;
            const float *weights = room->weights + t * job->heads;
            long seen = visible(job, first + t);
            for (long i = 0; seen > job->P && i < turned && (page + i) * ENTRIES < seen; i++) {
                long entry = (page + i) * ENTRIES, n = seen - entry < ENTRIES ? seen - entry : ENTRIES;
                const float *keys = (const float *)(room->keys + i * page_units);
                if (job->is_bfloat16) score_page(score, q, weights, keys, job, 1);
                else score_page(score, q, weights, keys, job, 0);
                take(&room->best[t], score, entry, n, job);
            }
        }
    }
    for (long t = 0; t < count; t++) narrow(&room->best[t], job->P);
}

// Cut the step into groups of up to QUERIES tokens of one sequence: their first tokens, and T after the last.
static long group_tokens(long *starts, long T, const int32_t *first) {
    long count = 0;
    for (long t = 0; t < T; t++)
        if (t == 0 || first[t] != first[t - 1] || t - starts[count - 1] == QUERIES) starts[count++] = t;
    starts[count] = T;
    return count;
}

// The pages that a group must read: none where all its tokens pick whatever they see.
static long pages_of(const Job *job, const long *starts, long group) {
    long seen = visible(job, starts[group + 1] - 1);
    return seen > job->P ? (seen + ENTRIES - 1) / ENTRIES : 0;
}

// For groups of up to ``queries``.
static Room make_room(const Job *job, long queries) {
    long size = job->heads * job->units;
    Room room = {
        .rows = (int32_t *)scratch(ENTRIES * job->width),
        .keys = (int32_t *)scratch(PAGES * ENTRIES * job->width),
        .q = (int32_t *)scratch(queries * size),
        .weights = scratch(queries * job->heads),
        .values = scratch(2 * job->width),
    };
    int32_t *candidates = (int32_t *)scratch(2 * queries * job->room);
    for (long t = 0; t < queries; t++) {
        room.best[t].score = candidates + 2 * t * job->room;
        room.best[t].entry = room.best[t].score + job->room;
    }
    return room;
}

static void free_room(Room *room) {
    free(room->rows);
    free(room->keys);
    free(room->q);
    free(room->weights);
    free(room->values);
    free(room->best[0].score);
}

// Join what the pieces of a query chose, ``stride`` numbers each: a count, the scores, the entries.
static void join(int32_t *picked, const int32_t *chosen, long pieces, long stride, long seen, Candidates *best,
                 long P) {
    best->count = 0;
    for (long piece = 0; piece < pieces && seen > P; piece++, chosen += stride) {
        memcpy(best->score + best->count, chosen + 1, 4 * chosen[0]);
        memcpy(best->entry + best->count, chosen + 1 + P, 4 * chosen[0]);
        best->count += chosen[0];
        narrow(best, P);
    }
    long count = seen > P ? best->count : seen;
    for (long i = 0; i < P; i++) picked[i] = i >= count ? -1 : seen > P ? best->entry[i] : i;
}

// q: [T, I, J]; weights: [T, I] of either dtype; pages: [num_pages, ENTRIES, bytes of a key]; table: [num_slots,
// max_pages]. Writes picked [T, P]. A choice is that of the whole however it is cut into pieces: equal scores have an
// order too.
void dsv4_select_paged(long T, long I, long J, long P, long max_pages, int format, int is_bfloat16,
                       int weights_are_bfloat16, int threads, const void *q, const void *weights, const uint8_t *pages,
                       const int32_t *slot, const int32_t *position, const int32_t *first, const int32_t *table,
                       int32_t *picked) {
    Job job = {
        .I = I, .J = J, .P = P, .max_pages = max_pages,
        .format = format, .is_bfloat16 = is_bfloat16, .weights_are_bfloat16 = weights_are_bfloat16,
        .q = q, .weights = weights, .pages = pages, .slot = slot, .position = position, .table = table,
        .heads = (I + HEADS - 1) / HEADS * HEADS,
        .units = PAIRED && is_bfloat16 ? (J + 1) / 2 : J,
        .bytes = index_row_bytes(format, J),
        .room = 2 * P + 4 * ENTRIES,
    };
    job.width = whole(job.units);
    long *starts = malloc((T + 1) * sizeof(long));
    if (!starts) abort();
    long groups = group_tokens(starts, T, first), most_pages = 0, most_queries = 1, work = 0;
    for (long group = 0; group < groups; group++) {
        long count = starts[group + 1] - starts[group], num_pages = pages_of(&job, starts, group);
        most_pages = num_pages > most_pages ? num_pages : most_pages;
        most_queries = count > most_queries ? count : most_queries;
        work += count * num_pages * ENTRIES * I * J;
    }
    threads = work < SMALL ? 1 : threads;
    // Few groups are cut into pieces of as many pages, so that every thread finds work in the longest sequence.
    long pieces = groups < 8 * threads ? threads : 1, piece_pages = (most_pages + pieces - 1) / pieces;
    long stride = 1 + 2 * P;
    int32_t *chosen = malloc(4 * (T * pieces * stride + 1));
    if (!chosen) abort();
#pragma omp parallel num_threads(threads)
    {
        Room room = make_room(&job, most_queries);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < groups * pieces; task++) {
            long group = task / pieces, piece = task % pieces, begin = starts[group], count = starts[group + 1] - begin;
            long end = pages_of(&job, starts, group), page = piece * piece_pages;
            choose(&room, begin, count, page, page + piece_pages < end ? page + piece_pages : end, &job);
            for (long t = 0; t < count; t++) {
                int32_t *to = chosen + ((begin + t) * pieces + piece) * stride;
                const Candidates *best = &room.best[t];
                to[0] = best->count;
                memcpy(to + 1, best->score, 4 * best->count);
                memcpy(to + 1 + P, best->entry, 4 * best->count);
            }
        }
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++)
            join(picked + t * P, chosen + t * pieces * stride, pieces, stride, visible(&job, t), &room.best[0], P);
        free_room(&room);
    }
    free(chosen);
    free(starts);
}
