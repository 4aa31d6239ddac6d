// The best entries of a query while it goes through its keys, no row of scores beside them.
//
// Candidates beat the P best of the entries before them, as these were when there was last no room for more. Scores
// are integers that compare as the numbers do; of equal ones the earlier entry is the better.
#pragma once
#include "columns.h"

// In the order of their entries.
typedef struct {
    long P;
    long seen;   // entries to choose among, 0 where all are picked
    long count;  // of candidates,
    long room;   // and for how many there is room, in whole vectors
    long scored; // of those that have scores; the others may have bounds
    float limit; // a later entry is a candidate unless it scores at most this
    int32_t *score, *entry;
} Candidates;

static void make_candidates(Candidates *best, long queries, long P) {
    long room = whole(2 * P) + 4 * ENTRIES; // what two pieces chose, and pages beside
    int32_t *numbers = (int32_t *)scratch(2 * queries * room);
    for (long t = 0; t < queries; t++, numbers += 2 * room)
        best[t] = (Candidates){.P = P, .room = room, .score = numbers, .entry = numbers + room};
}

static void free_candidates(Candidates *best) { free(best[0].score); }

// A score's bits as an integer that compares as it does, and back.
static inline ivec ordered(ivec bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
static inline float score_of(int32_t order) { return float_of(order ^ ((order >> 31) & 0x7fffffff)); }

static void start(Candidates *best, long seen) {
    best->seen = seen;
    best->count = best->scored = 0;
    best->limit = score_of(INT32_MIN); // a NaN
}

static inline ivec load_integers(const int32_t *p) { return *(const ivec *)p; }

// A bit of each lane.
static inline uint32_t bits_above(ivec a, ivec b) {
#ifdef __AVX512F__
    return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)(a[i] > b[i]) << i;
    return bits;
#endif
}

// The same of numbers; a NaN is above, and so is anything above a NaN.
static inline uint32_t bits_not_below(vec a, float b) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_NLE_UQ);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)!(a[i] <= b) << i;
    return bits;
#endif
}

// Store the lanes with a bit, and anything in what is left of a vector. Returns how many they are.
static inline long store_lanes(int32_t *to, ivec lanes, uint32_t bits) {
#ifdef __AVX512F__
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(bits, (__m512i)lanes));
#else
    for (int i = 0; bits >> i; i++)
        if (bits >> i & 1) *to++ = lanes[i];
#endif
    return __builtin_popcount(bits);
}

// How many of n scores are above, the last vector filled with the least of all.
static long count_above(const int32_t *score, long n, int32_t limit) {
    long count = 0;
    for (long i = 0; i < n; i += LANES)
        count += __builtin_popcount(bits_above(load_integers(score + i), (ivec){0} + limit));
    return count;
}

// The lowest n of some bits.
static uint32_t lowest(uint32_t bits, long n) {
    uint32_t rest = bits;
    for (; n > 0 && rest; n--) rest &= rest - 1;
    return bits ^ rest;
}

// Keep the P best, the earlier of equal ones. All have scores.
static void narrow(Candidates *best) {
    long P = best->P, n = best->count;
    if (n <= P) return;
    long low = best->score[0], high = low;
    for (long i = 1; i < n; i++) {
        low = best->score[i] < low ? best->score[i] : low;
        high = best->score[i] > high ? best->score[i] : high;
    }
    for (long i = n; i < whole(n); i++) best->score[i] = INT32_MIN;
    for (high++; high - low > 1;) { // at least P reach low, fewer reach high
        long middle = low + (high - low) / 2, reaching = count_above(best->score, n, middle - 1);
        if (reaching >= P) low = middle;
        else high = middle;
        if (reaching == P) break;
    }
    long kept = 0, equals = P - count_above(best->score, n, low);
    ivec lows = (ivec){0} + (int32_t)low;
    for (long i = 0; i < n; i += LANES) {
        ivec score = load_integers(best->score + i), entry = load_integers(best->entry + i);
        uint32_t all = n - i < LANES ? (1u << (n - i)) - 1 : 0xffff, above = bits_above(score, lows);
        uint32_t equal = lowest(all & ~above & ~bits_above(lows, score), equals);
        store_lanes(best->score + kept, score, above | equal);
        kept += store_lanes(best->entry + kept, entry, above | equal);
        equals -= __builtin_popcount(equal);
    }
    best->count = kept;
    best->limit = score_of(low);
}

// Add the candidates of a page, two vectors of scores or bounds, of which the first n entries are visible. Returns
// whether there is no room for another page.
INLINE int take(Candidates *best, const vec *score, long entry, long n) {
    uint32_t bits = bits_not_below(score[0], best->limit) | bits_not_below(score[1], best->limit) << LANES;
    if (n < ENTRIES) bits &= n > 0 ? (1u << n) - 1 : 0;
    if (!bits) return 0;
    ivec entries = (ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (int32_t)entry;
    for (int half = 0; half < 2; half++, bits >>= LANES, entries += LANES) {
        store_lanes(best->score + best->count, ordered((ivec)score[half]), bits & 0xffff);
        best->count += store_lanes(best->entry + best->count, entries, bits & 0xffff);
    }
    return best->count > best->room - ENTRIES;
}
