// The indexer's choice over paged keys. Contract: dsv4/ops/index/paged.py; shapes T I J P as there.
//
// A page of keys is turned so that each lane of a vector is an entry: a score is formed in one lane, over channels and
// then heads in their order, whatever stands beside it. Queries of one sequence share the turned pages, and each keeps
// few candidates while it goes through them. FP4 keys, where they are many, are bounded first, and only candidates
// scored.
#include "bounds.h"
#include "candidates.h"

#define TOKENS 128       // of a page
#define QUERIES 128      // that share the turned pages
#define AHEAD 8          // pages on their way to the core
#define ROWS 8           // of a register tile
#define TILE 16          // its sums, vectors of entries: they hide each other's time
#define FEW 64           // entries for each to pick from which on one query alone is bounded first,
#define MANY 1024        // and from which on many are
#define TURN 4           // what turning a page costs, in rows
#define SMALL (1L << 20) // fewer multiply-adds than this are not worth splitting over threads

typedef struct {
    long I, P, max_pages;
    int weights_are_bfloat16;
    const void *q, *weights;
    const uint8_t *pages;
    const int32_t *slot, *position, *table;
    Keys keys;
} Job;

// The rows of a register tile: queries times heads of each.
typedef struct {
    long queries, heads;
} Tile;

// What a thread works with on a group of queries of one sequence.
typedef struct {
    const Job *job;
    const int32_t *table; // of the sequence
    long first, count;    // its tokens
    Tile tile;
    int32_t *q; // of each tile's queries, [heads / its heads, units, its rows]
    float *weights, *values;
    Columns columns;
    Bounds bounds;
    Integers integers;
    uint8_t *gathered; // WIDE keys as they are stored
    Candidates best[QUERIES];
} Room;

static long visible(const Job *job, long t) { return ((long)job->position[t] + 1) * ENTRIES / TOKENS; }

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

// dots[row][vector] = q_row . key of a tile, ``vectors`` wide; a row's units are ``step`` apart.
INLINE void multiply(vec *dots, const int32_t *q, long step, const int32_t *units, long num_units, int rows,
                     int vectors, int is_bfloat16) {
    for (int i = 0; i < rows * vectors; i++) dots[i] = (vec){0};
    for (long u = 0; u < num_units; u++, q += step, units += WIDE) {
        vec key[ROWS];
        for (int v = 0; v < vectors; v++) key[v] = load((const float *)units + v * LANES);
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++)
                dots[i * vectors + v] = multiply_add(dots[i * vectors + v], key[v], q[i], is_bfloat16);
    }
}

// score[query][vector] = sum_i weights_i relu(q_i . key) of a tile. Adding 0 makes -0 one with it.
INLINE void score_tile(vec *score, const int32_t *q, long step, const float *weights, const int32_t *units,
                       const Job *job, int queries, int heads, int vectors, int is_bfloat16) {
    const int rows = queries * heads;
    long all_heads = round_up(job->I, heads);
    vec total[TILE] = {0};
    for (long head = 0; head < all_heads; head += heads, q += step * job->keys.units) {
        vec dots[TILE];
        multiply(dots, q, step, units, job->keys.units, rows, vectors, is_bfloat16);
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++)
                total[i / heads * vectors + v] += weights[i / heads * all_heads + head + i % heads] *
                                                  rounded_positive(dots[i * vectors + v], is_bfloat16);
    }
    for (int i = 0; i < queries * vectors; i++) score[i] = total[i] + 0.0f;
}

// Choices

// Many queries fill a tile with one head each; one alone with its heads, or a row of more entries where they are few.
static Tile tile_of(const Job *job, long queries) {
    return queries >= ROWS ? (Tile){ROWS, 1} : job->I >= ROWS ? (Tile){1, ROWS} : (Tile){1, 1};
}

// The queries of the group as tiles multiply them, the last tile filled with zeros.
static void read_queries(Room *room, int is_bounded) {
    const Job *job = room->job;
    Tile tile = room->tile;
    long I = job->I, J = job->keys.J, units = job->keys.units, rows = tile.queries * tile.heads;
    long heads = round_up(I, tile.heads), size = heads * units, per_unit = PAIRED && job->keys.is_bfloat16 ? 2 : 1;
    memset(room->q, 0, 4 * round_up(room->count, tile.queries) * size);
    for (long t = 0; t < room->count; t++) {
        int32_t *own = room->q + t / tile.queries * tile.queries * size + t % tile.queries * tile.heads;
        read_row(room->weights + t * heads, job->weights, (room->first + t) * I, I, job->weights_are_bfloat16);
        for (long i = 0; i < I; i++) {
            int32_t *q = own + i / tile.heads * units * rows + i % tile.heads;
            read_row(room->values, job->q, ((room->first + t) * I + i) * J, J, job->keys.is_bfloat16);
            if (is_bounded) read_bound(&room->bounds, t, i, room->values, room->weights[t * heads + i], tile.queries);
            for (long u = 0; u < units; u++) {
                float a = room->values[per_unit * u], b = per_unit == 2 ? room->values[2 * u + 1] : 0.0f;
                q[u * rows] = per_unit == 1 ? bits_of(a) : bits_of(a) >> 16 | bits_of(b);
            }
        }
    }
}

static const uint8_t *page_of(const Room *room, long i) {
    return room->job->pages + room->table[i] * ENTRIES * room->job->keys.bytes;
}

// Pages lie anywhere: the processor cannot see the next ones coming.
INLINE void fetch(const uint8_t *page, long bytes) {
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch(page + at, 0, 0);
}

// Score n entries, at most WIDE, for query t, as integers that compare as scores do.
static void score_entries(Room *room, long t, const int32_t *entry, long n, int32_t *to) {
    const Job *job = room->job;
    long J = job->keys.J, bytes = job->keys.bytes, queries = room->tile.queries;
    const int32_t *q = room->q + t / queries * queries * job->I * job->keys.units + t % queries;
    for (long i = 0; i < round_up(n, ENTRIES); i++) { // the last one again to fill a page
        long e = entry[i < n ? i : n - 1];
        uint8_t *to = room->gathered + i / ENTRIES * ENTRIES * bytes;
        copy_entry(to, i % ENTRIES, page_of(room, e / ENTRIES), e % ENTRIES, ENTRIES, job->keys.format, J);
    }
    for (long i = 0; i < n; i += ENTRIES) turn_page(&room->columns, i, room->gathered + i * bytes, &job->keys);
    vec score[WIDE / LANES];
    score_tile(score, q, queries, room->weights + t * job->I, room->columns.units, job, 1, 1, WIDE / LANES, 1);
    for (long i = 0; i < n; i += LANES) {
        ivec scores = ordered((ivec)score[i / LANES]);
        memcpy(to + i, &scores, 4 * (n - i < LANES ? n - i : LANES));
    }
}

// Keep the best candidates of query t, once all have scores.
static void settle(Room *room, long t) {
    Candidates *best = &room->best[t];
    for (long i = best->scored; i < best->count; i += WIDE)
        score_entries(room, t, best->entry + i, best->count - i < WIDE ? best->count - i : WIDE, best->score + i);
    narrow(best);
    best->scored = best->count;
}

// Choose among the entries from ``entry`` to ``end``, which are turned.
INLINE void choose_turned(Room *room, long entry, long end, int queries, int heads, int is_bfloat16) {
    const Job *job = room->job;
    const int rows = queries * heads, vectors = rows == 1 ? WIDE / LANES : TILE / rows;
    long all_heads = round_up(job->I, heads);
    for (long t = 0; t < room->count; t += queries) {
        const int32_t *q = room->q + t * all_heads * job->keys.units;
        const float *weights = room->weights + t * all_heads;
        long last = t + queries < room->count ? t + queries : room->count, most = room->best[last - 1].seen;
        for (long from = entry; from < end && from < most; from += vectors * LANES) {
            vec score[TILE];
            const int32_t *units = room->columns.units + (from - entry);
            score_tile(score, q, rows, weights, units, job, queries, heads, vectors, is_bfloat16);
            for (Candidates *best = room->best + t; best < room->best + last; best++)
                for (int v = 0; v < vectors; v += 2) {
                    long begin = from + v * LANES, seen = best->seen < end ? best->seen : end;
                    if (take(best, score + (best - room->best - t) * vectors + v, begin, seen - begin)) narrow(best);
                }
        }
    }
}

// The same, each kind of tile compiled by itself.
static void choose_from(Room *room, long entry, long end) {
    int is_bfloat16 = room->job->keys.is_bfloat16;
    if (room->tile.queries > 1)
        is_bfloat16 ? choose_turned(room, entry, end, ROWS, 1, 1) : choose_turned(room, entry, end, ROWS, 1, 0);
    else if (room->tile.heads > 1)
        is_bfloat16 ? choose_turned(room, entry, end, 1, ROWS, 1) : choose_turned(room, entry, end, 1, ROWS, 0);
    else
        is_bfloat16 ? choose_turned(room, entry, end, 1, 1, 1) : choose_turned(room, entry, end, 1, 1, 0);
}

// Choose among the pages from ``page`` to ``end`` by scores of all.
static void choose_scored(Room *room, long page, long end) {
    for (long next = page; page < end; page = next) {
        next = page + PAGES < end ? page + PAGES : end;
        for (long i = page; i < next; i++) {
            if (i + AHEAD < end) fetch(page_of(room, i + AHEAD), ENTRIES * room->job->keys.bytes);
            turn_page(&room->columns, (i - page) * ENTRIES, page_of(room, i), &room->job->keys);
        }
        choose_from(room, page * ENTRIES, next * ENTRIES);
    }
}

// The same by bounds.
static void choose_bounded(Room *room, long page, long end) {
#if BOUNDED
    const Keys *keys = &room->job->keys;
    for (long next = page; page < end; page = next) {
        next = page + PAGES < end ? page + PAGES : end;
        for (long i = page; i < next; i++) {
            if (i + AHEAD < end) fetch(page_of(room, i + AHEAD), ENTRIES * room->job->keys.bytes);
            turn_integers(&room->integers, (i - page) * ENTRIES, page_of(room, i), keys);
        }
        for (long t = 0; t < room->count; t += BOUND_ROWS) {
            long last = t + BOUND_ROWS < room->count ? t + BOUND_ROWS : room->count, most = room->best[last - 1].seen;
            for (long i = page; i < next && i * ENTRIES < most; i++) {
                vec bound[2 * BOUND_ROWS];
                bound_tile(bound, &room->bounds, t / BOUND_ROWS, &room->integers, (i - page) * ENTRIES);
                for (long query = t; query < last; query++) {
                    Candidates *best = &room->best[query];
                    if (take(best, bound + 2 * (query - t), i * ENTRIES, best->seen - i * ENTRIES)) settle(room, query);
                }
            }
        }
    }
#endif
}

// The same for query t alone. With J and I known to the compiler, a page is one run of instructions.
INLINE void choose_alone_of(Room *room, long t, long page, long end, long J, long I) {
#if BOUNDED
    Candidates *best = &room->best[t];
    const long bytes = ENTRIES * (J / 2 + J / INDEX_GROUP), last = (best->seen + ENTRIES - 1) / ENTRIES;
    const uint8_t *pages = room->job->pages;
    const int32_t *table = room->table;
    for (end = end < last ? end : last; page < end; page++) {
        vec bound[2];
        if (page + AHEAD < end) fetch(pages + table[page + AHEAD] * bytes, bytes);
        bound_page(bound, &room->bounds, t, pages + table[page] * bytes, J, I);
        if (take(best, bound, page * ENTRIES, best->seen - page * ENTRIES)) settle(room, t);
    }
#endif
}

static void choose_alone(Room *room, long t, long page, long end) {
    long J = room->job->keys.J, I = room->job->I;
    if (J == 32 && I == 2) choose_alone_of(room, t, page, end, 32, 2);
    else choose_alone_of(room, t, page, end, J, I);
}

// Choose among the pages from ``page`` to ``end`` for ``count`` queries from token ``first`` on.
static void choose(Room *room, long first, long count, long page, long end) {
    const Job *job = room->job;
    room->table = job->table + job->slot[first] * job->max_pages;
    room->first = first, room->count = count, room->tile = tile_of(job, count);
    for (long t = 0; t < count; t++) {
        long seen = visible(job, first + t);
        start(&room->best[t], seen > job->P ? seen : 0);
    }
    if (page >= end) return;
    int is_alone = room->tile.queries == 1;
    int is_bounded = BOUNDED && is_coded(&job->keys) && job->keys.format == ROW_PACKED && room->tile.heads == 1 &&
                     (end - page) * ENTRIES > (is_alone ? FEW : MANY) * job->P;
    if (is_bounded && !is_alone) room->tile.queries = BOUND_ROWS;
    read_queries(room, is_bounded);
    if (!is_bounded) choose_scored(room, page, end);
    else if (!is_alone) choose_bounded(room, page, end);
    for (long t = 0; t < count; t++) {
        if (is_bounded && is_alone) choose_alone(room, t, page, end);
        is_bounded ? settle(room, t) : narrow(&room->best[t]);
    }
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
static Room *make_room(const Job *job, long queries) {
    Room *room = malloc(sizeof(Room));
    if (!room) abort();
    long filled = round_up(queries, ROWS), heads = round_up(job->I, ROWS), J = job->keys.J;
    room->job = job;
    room->q = (int32_t *)scratch(filled * heads * job->keys.units);
    room->weights = scratch(filled * heads);
    room->values = scratch(J + 1);
    room->columns = make_columns(&job->keys);
    room->bounds = make_bounds(filled, job->I, J);
    room->integers = make_integers(J);
    room->gathered = (uint8_t *)scratch(WIDE * job->keys.bytes / 4);
    make_candidates(room->best, queries, job->P);
    return room;
}

static void free_room(Room *room) {
    free(room->q);
    free(room->weights);
    free(room->values);
    free_columns(&room->columns);
    free_bounds(&room->bounds);
    free_integers(&room->integers);
    free(room->gathered);
    free_candidates(room->best);
    free(room);
}

// What a query chose among a piece of its pages: a count, the scores, the entries, 1 + 2 P numbers; and the join of
// pieces that follow one another.
static void keep(int32_t *chosen, const Candidates *best) {
    chosen[0] = best->count;
    memcpy(chosen + 1, best->score, 4 * best->count);
    memcpy(chosen + 1 + best->P, best->entry, 4 * best->count);
}

static void join(int32_t *picked, const int32_t *chosen, long pieces, long seen, Candidates *best) {
    long P = best->P;
    best->count = 0;
    for (long piece = 0; piece < pieces && seen > P; piece++, chosen += 1 + 2 * P) {
        memcpy(best->score + best->count, chosen + 1, 4 * chosen[0]);
        memcpy(best->entry + best->count, chosen + 1 + P, 4 * chosen[0]);
        best->count += chosen[0];
        narrow(best);
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
    long units = PAIRED && is_bfloat16 ? (J + 1) / 2 : J;
    Job job = {
        .I = I, .P = P, .max_pages = max_pages, .weights_are_bfloat16 = weights_are_bfloat16,
        .q = q, .weights = weights, .pages = pages, .slot = slot, .position = position, .table = table,
        .keys = {J, format, is_bfloat16, units, whole(units), index_row_bytes(format, J)},
    };
    long *starts = malloc((T + 1) * sizeof(long));
    if (!starts) abort();
    long groups = group_tokens(starts, T, first), most_pages = 0, most_queries = 1, work = 0;
    for (long group = 0; group < groups; group++) {
        long count = starts[group + 1] - starts[group], num_pages = pages_of(&job, starts, group);
        most_pages = num_pages > most_pages ? num_pages : most_pages;
        most_queries = count > most_queries ? count : most_queries;
        work += (count * I + TURN) * num_pages * ENTRIES * J;
    }
    threads = work < SMALL ? 1 : threads;
    // Few groups are cut into pieces of as many pages, so that every thread finds work in the longest sequence.
    long pieces = groups < 8 * threads ? threads : 1, piece_pages = (most_pages + pieces - 1) / pieces;
    long stride = pieces * (1 + 2 * P);
    int32_t *chosen = malloc(4 * (T * stride + 1));
    if (!chosen) abort();
#pragma omp parallel num_threads(threads)
    {
        Room *room = make_room(&job, most_queries);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < groups * pieces; task++) {
            long group = task / pieces, piece = task % pieces, begin = starts[group], count = starts[group + 1] - begin;
            long page = piece * piece_pages, end = pages_of(&job, starts, group);
            choose(room, begin, count, page, page + piece_pages < end ? page + piece_pages : end);
            for (long t = 0; t < count; t++)
                keep(chosen + (begin + t) * stride + piece * (1 + 2 * P), &room->best[t]);
        }
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++)
            join(picked + t * P, chosen + t * stride, pieces, visible(&job, t), &room->best[0]);
        free_room(room);
    }
    free(chosen);
    free(starts);
}
