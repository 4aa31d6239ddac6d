// The register tiles of the fixed-order products: a few rows of x by a few rows of w, each pair with one vector
// accumulator. Contract: product.h.
#include "packed.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define AHEAD 16384 // bytes of w fetched ahead, in whole tiles
#define FEW_ROWS 24 // rows of x that stay in the first cache while w streams past

// The floats of one of the processor's vectors, and tiles of M rows of x by N rows of w, whose accumulators fit into
// its registers.
#ifdef __AVX512F__
#define WIDTH 16
#define TILES TILE(1, 8) TILE(2, 8) TILE(3, 8) TILE(4, 4) TILE(5, 4) TILE(6, 4)
#define MOST_M 6
#define MOST 24 // accumulators
#define TILE_N(M) ((M) <= 3 ? 8 : 4)
#else
#ifdef __AVX__
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define TILES TILE(1, 8) TILE(2, 4)
#define MOST_M 2
#define MOST 8
#define TILE_N(M) ((M) == 1 ? 8 : 4)
#endif
#define MOST_N 8
#define STEP_BYTES (8 * WIDTH) // of a row at most, that meet at once

typedef float floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH), aligned(2)));

#ifdef __AVX512F__

// Two vectors to one: each one's lanes i and i + 8 added, or of its halves i and i + 4; the next two within lanes of 4.
#define HALVED(a, b) (_mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee))
#define QUARTERED(a, b) (_mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd))
#define TO_PAIRS(a, b) (_mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee))
#define TO_ONE(a, b) (_mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd))

INLINE __m512 four(const floats *v) {
    return QUARTERED(HALVED((__m512)v[0], (__m512)v[4]), HALVED((__m512)v[8], (__m512)v[12]));
}

INLINE void sum_16_trees(float *to, const floats *v) {
    _mm512_storeu_ps(to, TO_ONE(TO_PAIRS(four(v), four(v + 1)), TO_PAIRS(four(v + 2), four(v + 3))));
}

INLINE void sum_8_trees(float *to, const floats *v) {
    __m512 a = QUARTERED(HALVED((__m512)v[0], (__m512)v[4]), HALVED((__m512)v[2], (__m512)v[6]));
    __m512 b = QUARTERED(HALVED((__m512)v[1], (__m512)v[5]), HALVED((__m512)v[3], (__m512)v[7]));
    __m512 ab = TO_PAIRS(a, b);
    __m512 sums = TO_ONE(ab, ab); // 0 1 . . 4 5 . . 2 3 . . 6 7 . .
    const __m512i order = _mm512_setr_epi32(0, 1, 8, 9, 4, 5, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
}

INLINE void sum_trees(float *to, const floats *v, int n) {
    if (n > 8) sum_16_trees(to, v);
    if (n <= 8) sum_8_trees(to, v);
    if (n > 16) sum_8_trees(to + 16, v + 16);
}

#else

// The lanes of v[i] added: halves first, then halves of the result, down to one.
static void sum_trees(float *to, const floats *v, int n) {
    for (int i = 0; i < n; i++) {
        float sum[WIDTH];
        memcpy(sum, v + i, sizeof sum);
        for (int half = WIDTH / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
        to[i] = sum[0];
    }
}

#endif

INLINE floats load_floats(const char *p) { return *(const floats *)p; }

INLINE floats widened(const char *p) { return (floats)(__builtin_convertvector(*(const halves *)p, words) << 16); }

// Each lane rounded to bfloat16, as narrow_to_bfloat16 does.
INLINE floats rounded_lanes(floats x) {
    words bits = (words)x, even = bits + 0x7fff + ((bits >> 16) & 1);
    words is_nan = (words)((bits & 0x7fffffff) > 0x7f800000);
    return (floats)((is_nan & 0x7fc00000) | (~is_nan & even & 0xffff0000));
}

// The kinds of products. Of the last, x is bfloat16 and so is w, or w is float32 and rounded.
enum { FLOAT_FLOAT, FLOAT_HALF, HALF_FLOAT, HALF_ROUNDED, HALF_HALF, HALF_FP8, HALF_FP4 };
#define X_SIZE(kind) ((kind) <= FLOAT_HALF ? 4 : 2)
#define W_SIZE(kind) ((kind) == FLOAT_HALF || (kind) == HALF_HALF ? 2 : 4)

#ifdef __AVX512BF16__
#define IN_PAIRS(kind) ((kind) >= HALF_ROUNDED)
INLINE floats load_pairs(const char *p) { return (floats)_mm512_loadu_si512(p); }
INLINE floats round_to_pairs(floats low, floats high) {
    return (floats)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
INLINE floats add_pairs(floats total, floats u, floats v) {
    return (floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)u, (__m512bh)v);
}
#else
#define IN_PAIRS(kind) ((void)(kind), 0)
INLINE floats load_pairs(const char *p) { return load_floats(p); }
INLINE floats round_to_pairs(floats low, floats high) { return low + high; }
INLINE floats add_pairs(floats total, floats u, floats v) { return total + u * v; }
#endif
#define STEP(kind) (IN_PAIRS(kind) ? 2 * WIDTH : WIDTH) // elements of a row that meet at once

INLINE floats elements_of_x(const char *row, long k, int kind) {
    if (IN_PAIRS(kind)) return load_pairs(row + 2 * k);
    return X_SIZE(kind) == 2 ? widened(row + 2 * k) : load_floats(row + 4 * k);
}

INLINE floats elements_of_w(const char *row, long k, int kind) {
    if (W_SIZE(kind) == 2) return IN_PAIRS(kind) ? load_pairs(row + 2 * k) : widened(row + 2 * k);
    floats w = load_floats(row + 4 * k);
    if (kind != HALF_ROUNDED) return w;
    return IN_PAIRS(kind) ? round_to_pairs(w, load_floats(row + 4 * (k + WIDTH))) : rounded_lanes(w);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define CODED 1

// E2M1 times every scale, as bfloat16: a group then costs one look into a table that is near.
static uint16_t fp4_tables[256][32] __attribute__((aligned(64)));

__attribute__((constructor)) static void make_tables(void) {
    for (int scale = 0; scale < 256; scale++)
        for (int code = 0; code < 32; code++) {
            uint32_t bits = bits_of(e2m1_value(code % 16));
            if (bits << 1) bits += (uint32_t)(scale - 127) << 23; // of scales that are plain
            fp4_tables[scale][code] = bits >> 16;
        }
}

INLINE floats elements_of_codes(const char *row, const uint8_t *scales, long k, int kind) {
    if (kind == HALF_FP4) {
        __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + k / 2)));
        x = _mm512_or_si512(x, _mm512_slli_epi32(x, 12)); // the low nibble, and the high one 16 bits on
        // An index has 5 bits and the table every number twice: what stands above a nibble does not matter but for one.
        return (floats)_mm512_permutexvar_epi16(x, _mm512_load_si512(fp4_tables[scales[k / FP4_GROUP]]));
    }
    return (floats)fp8_pairs((const uint8_t *)row + k, (int)scales[k / FP8_BLOCK] - 127);
}
#else
#define CODED 0
#endif

INLINE floats add(floats total, floats u, floats v, int kind) {
    return IN_PAIRS(kind) ? add_pairs(total, u, v) : total + u * v;
}

// total[m N + n] += row m of a times row n of b from element k on, lane by lane. Written out: a compiler that is to
// keep the totals in registers must not meet a loop here.
#define READ(n) if (n < N) v[n] = elements_of_w(b[n], k, kind);
#define READ_ALL READ(0) READ(1) READ(2) READ(3) READ(4) READ(5) READ(6) READ(7)
#define ADD(m, n) if (n < N) total[m * N + n] = add(total[m * N + n], u, v[n], kind);
#define ADD_ALL(m) ADD(m, 0) ADD(m, 1) ADD(m, 2) ADD(m, 3) ADD(m, 4) ADD(m, 5) ADD(m, 6) ADD(m, 7)
#define ROW(m) if (m < M) { u = elements_of_x(a[m], k, kind); ADD_ALL(m) }
INLINE void step(floats *total, const char **a, const char **b, long k, int M, int N, int kind) {
    floats u, v[MOST_N];
    READ_ALL ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5)
}

// Copy the last n bytes of rows, from byte ``at`` on, into zeroed rows of one step, and point to these.
static void fill_tails(char (*few)[STEP_BYTES], const char **to, const char **rows, int count, long at, long n) {
    for (int i = 0; i < count; i++) {
        memset(few[i], 0, sizeof few[i]);
        memcpy(few[i], rows[i] + at, n);
        to[i] = few[i];
    }
}

INLINE const char *row_of(const Matrix *rows, long i) {
    return (const char *)rows->at + (rows->pick ? rows->pick[i] : i) * rows->stride * (rows->is_bfloat16 ? 2 : 4);
}

// Products of the M rows a with ``count`` of N rows of w from n0 on.
INLINE void tile(float *out, long out_stride, const char **a, const Matrix *w, long n0, long count, long K, int M,
                 int N, int kind) {
    const char *b[MOST_N];
    UNROLL for (int n = 0; n < N; n++) b[n] = row_of(w, n0 + (n < count ? n : count - 1));
    const long rest = K % STEP(kind), even = K - rest;
    // Rows of w come from memory in the order of the tiles, which the processor's own prefetch does not foresee.
    const long size = N * w->stride * W_SIZE(kind);
    const long ahead = w->pick || !size ? 0 : (AHEAD + size - 1) / size * size;
    floats total[MOST];
    UNROLL for (int i = 0; i < MOST; i++) total[i] = (floats){0};
    for (long k = 0; k < even; k += STEP(kind)) {
        UNROLL for (int n = 0; n < N; n++) {
            __builtin_prefetch(b[n] + k * W_SIZE(kind) + ahead, 0, 2);
            if (N == MOST_N) __builtin_prefetch(b[n] + k * W_SIZE(kind) + 2 * ahead, 0, 2);
        }
        step(total, a, b, k, M, N, kind);
    }
    if (rest) {
        char few[MOST_M + MOST_N][STEP_BYTES];
        const char *last_a[MOST_M], *last_b[MOST_N];
        fill_tails(few, last_a, a, M, even * X_SIZE(kind), rest * X_SIZE(kind));
        fill_tails(few + M, last_b, b, N, even * W_SIZE(kind), rest * W_SIZE(kind));
        step(total, last_a, last_b, 0, M, N, kind);
    }
    float sums[MOST];
    sum_trees(sums, total, M * N);
    UNROLL for (int m = 0; m < M; m++)
        if (count == N)
            memcpy(out + m * out_stride, sums + m * N, 4 * N);
        else
            for (int n = 0; n < count; n++) out[m * out_stride + n] = sums[m * N + n];
}

// All of x by all of w.
INLINE void block(float *out, long out_stride, Matrix x, long M, Matrix w, long N, long K, int kind) {
    long tiles = (M + MOST_M - 1) / MOST_M, width = M <= FEW_ROWS ? 16 : N;
    for (long n0 = 0; n0 < N; n0 += width) {
        long end = n0 + width < N ? n0 + width : N;
        for (long i = 0; i < tiles; i++) {
            long m0 = M * i / tiles, rows = M * (i + 1) / tiles - m0, step = TILE_N(rows);
            const char *a[MOST_M];
            for (long m = 0; m < rows; m++) a[m] = row_of(&x, m0 + m);
            for (long n = n0; n < end; n += step) {
                long count = end - n < step ? end - n : step;
                float *to = out + m0 * out_stride + n;
#define TILE(M, N) case M: tile(to, out_stride, a, &w, n, count, K, M, N, kind); break;
                switch (rows) { TILES }
            }
        }
    }
}

#define BLOCK(name, kind)                                                                                              \
    static void name(float *out, long out_stride, Matrix x, long M, Matrix w, long N, long K) {                        \
        block(out, out_stride, x, M, w, N, K, kind);                                                                   \
    }
BLOCK(float_float, FLOAT_FLOAT)
BLOCK(float_half, FLOAT_HALF)
BLOCK(half_float, HALF_FLOAT)
BLOCK(half_rounded, HALF_ROUNDED)
BLOCK(half_half, HALF_HALF)

void dsv4_products(float *out, long out_stride, Matrix x, long M, Matrix w, long N, long K, int narrow) {
    if (x.is_bfloat16 && w.is_bfloat16)
        half_half(out, out_stride, x, M, w, N, K);
    else if (x.is_bfloat16)
        (narrow ? half_rounded : half_float)(out, out_stride, x, M, w, N, K);
    else
        (w.is_bfloat16 ? float_half : float_float)(out, out_stride, x, M, w, N, K);
}

#if CODED
#define CODED_N 4 // rows of codes of a tile: their places and those of their scales fit into registers

// Products of the M rows a with ``count`` of CODED_N rows of codes from n0 on, in the order of ``tile``.
INLINE void tile_of_codes(float *out, long out_stride, const char **a, const Codes *w, long n0, long count, long K,
                          int M, int kind) {
    const char *b[CODED_N];
    const uint8_t *scales[CODED_N];
    UNROLL for (int n = 0; n < CODED_N; n++) {
        long row = n0 + (n < count ? n : count - 1);
        b[n] = (const char *)w->codes + row * w->stride;
        long of_scales = kind == HALF_FP4 ? w->first + row : (w->first + row) / FP8_BLOCK;
        scales[n] = (const uint8_t *)w->scales + of_scales * w->scale_stride;
    }
    const long ahead = (AHEAD + CODED_N * w->stride - 1) / (CODED_N * w->stride) * CODED_N * w->stride;
    floats total[MOST];
    UNROLL for (int i = 0; i < MOST; i++) total[i] = (floats){0};
    for (long k = 0; k < K; k += 32) {
        if (k % (kind == HALF_FP4 ? 128 : 64) == 0)
            UNROLL for (int n = 0; n < CODED_N; n++)
                __builtin_prefetch(b[n] + k / (kind == HALF_FP4 ? 2 : 1) + ahead, 0, 2);
        floats v[CODED_N], u;
        UNROLL for (int n = 0; n < CODED_N; n++) v[n] = elements_of_codes(b[n], scales[n], k, kind);
        UNROLL for (int m = 0; m < M; m++) {
            u = load_pairs(a[m] + 2 * k);
            UNROLL for (int n = 0; n < CODED_N; n++) total[m * CODED_N + n] = add_pairs(total[m * CODED_N + n], u, v[n]);
        }
    }
    float sums[MOST];
    sum_trees(sums, total, M * CODED_N);
    UNROLL for (int m = 0; m < M; m++)
        for (int n = 0; n < count; n++) out[m * out_stride + n] = sums[m * CODED_N + n];
}

// Whether all scales of N rows keep their numbers normal in bfloat16.
static int are_plain(const Codes *w, long n0, long N, long K) {
    long first = w->first + n0, last = first + N - 1, width = K / FP4_GROUP;
    if (w->kind != CODES_FP4) first /= FP8_BLOCK, last /= FP8_BLOCK, width = K / FP8_BLOCK;
    long rows = last - first + 1;
    if (w->scale_stride == width) width *= rows, rows = 1; // one run, which vectors go through
    uint8_t least = 255, most = 0;
    for (long row = 0; row < rows; row++) {
        const uint8_t *scales = (const uint8_t *)w->scales + (first + row) * w->scale_stride;
        for (long i = 0; i < width; i++) {
            uint8_t scale = scales[i];
            least = scale < least ? scale : least;
            most = scale > most ? scale : most;
        }
    }
    return is_plain_scale(least) && is_plain_scale(most);
}

int dsv4_few_products_of_codes(float *out, long out_stride, Matrix x, long M, Codes w, long N, long K) {
    if (!x.is_bfloat16 || w.kind == CODES_FP8_FLOAT || K % (w.kind == CODES_FP4 ? FP4_GROUP : FP8_BLOCK)) return 0;
    if (!are_plain(&w, 0, N, K)) return 0;
    long tiles = (M + 2) / 3;
    for (long n = 0; n < N; n += CODED_N) {
        long count = N - n < CODED_N ? N - n : CODED_N;
        for (long i = 0; i < tiles; i++) {
            long m0 = M * i / tiles, rows = M * (i + 1) / tiles - m0;
            const char *a[3];
            for (long m = 0; m < rows; m++) a[m] = row_of(&x, m0 + m);
            float *to = out + m0 * out_stride + n;
#define CODES_TILE(M, kind) tile_of_codes(to, out_stride, a, &w, n, count, K, M, kind)
            if (w.kind == CODES_FP4)
                rows == 1 ? CODES_TILE(1, HALF_FP4) : rows == 2 ? CODES_TILE(2, HALF_FP4) : CODES_TILE(3, HALF_FP4);
            else
                rows == 1 ? CODES_TILE(1, HALF_FP8) : rows == 2 ? CODES_TILE(2, HALF_FP8) : CODES_TILE(3, HALF_FP8);
        }
    }
    return 1;
}
#else
int dsv4_few_products_of_codes(float *out, long out_stride, Matrix x, long M, Codes w, long N, long K) {
    (void)out, (void)out_stride, (void)x, (void)M, (void)w, (void)N, (void)K;
    return 0;
}
#endif
