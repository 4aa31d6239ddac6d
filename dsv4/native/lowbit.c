// Rounding to numbers of few bits, and reading them. Contract: dsv4/ops/lowbit; shapes K J O I as there.
// Each group or block is by itself, so that neither threads nor what stands beside it change a bit.
#include "hadamard.h"

#define BLOCK 128

static long smaller(long a, long b) { return a < b ? a : b; }

// Activations

// x: [rows, K]; codes: [rows, K]; scales: [rows, K / group].
void dsv4_quantise_rows(long rows, long K, long group, int is_bfloat16, int threads, const void *x, uint8_t *codes,
                        uint8_t *scales) {
    long groups = groups_of(K, group);
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch(K);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            read_row(row, x, r * K, K, is_bfloat16);
            for (long g = 0, at = 0; g < groups; g++, at += group)
                scales[r * groups + g] = e4m3_write(codes + r * K + at, row + at, smaller(group, K - at));
        }
        free(row);
    }
}

// The first ``channels`` of each row of x in groups, the others as they are.
void dsv4_round_rows(long rows, long K, long channels, long group, int is_bfloat16, int threads, const void *x,
                     void *y) {
    const long size = is_bfloat16 ? 2 : 4;
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch(channels);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            long rest = r * K + channels;
            read_row(row, x, r * K, channels, is_bfloat16);
            for (long at = 0; at < channels; at += group) e4m3_round(row + at, smaller(group, channels - at));
            write_row(y, r * K, row, channels, is_bfloat16);
            memcpy((char *)y + rest * size, (const char *)x + rest * size, (K - channels) * size);
        }
        free(row);
    }
}

// x: [rows, J], J a power of two; factor: of the transform. It is rounded to the dtype of x before groups are.
void dsv4_round_index(long rows, long J, int is_bfloat16, int threads, float factor, const void *x, void *y) {
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch(J);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            read_row(row, x, r * J, J, is_bfloat16);
            index_round(row, J, factor, is_bfloat16);
            write_row(y, r * J, row, J, is_bfloat16);
        }
        free(row);
    }
}

// Weights in FP4, I a multiple of FP4_GROUP

// w: [rows, I]; nibbles: [rows, I / 2]; scales: [rows, I / FP4_GROUP].
void dsv4_quantise_fp4(long rows, long I, int is_bfloat16, int threads, const void *w, uint8_t *nibbles,
                       uint8_t *scales) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long group = 0; group < rows * I / FP4_GROUP; group++) {
        float x[FP4_GROUP];
        read_row(x, w, group * FP4_GROUP, FP4_GROUP, is_bfloat16);
        scales[group] = e2m1_write(nibbles + group * FP4_GROUP / 2, x, FP4_GROUP);
    }
}

void dsv4_dequantise_fp4(long rows, long I, int is_bfloat16, int threads, const uint8_t *nibbles,
                         const uint8_t *scales, void *w) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long group = 0; group < rows * I / FP4_GROUP; group++) {
        float x[FP4_GROUP];
        e2m1_read(x, nibbles + group * FP4_GROUP / 2, e8m0_value(scales[group]));
        write_row(w, group * FP4_GROUP, x, FP4_GROUP, is_bfloat16);
    }
}

// w, y: [rows, I].
void dsv4_round_fp4(long rows, long I, int is_bfloat16, int y_is_bfloat16, int threads, const void *w, void *y) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long group = 0; group < rows * I / FP4_GROUP; group++) {
        float x[FP4_GROUP];
        read_row(x, w, group * FP4_GROUP, FP4_GROUP, is_bfloat16);
        e2m1_round(x, FP4_GROUP);
        write_row(y, group * FP4_GROUP, x, FP4_GROUP, y_is_bfloat16);
    }
}

// Weights in FP8, blocks of BLOCK x BLOCK, by bands of BLOCK rows

// The rows of band number ``band`` of matrices [O, I] that lie one after another.
typedef struct {
    long first, end;
} Band;

static Band band_of(long band, long O) {
    long bands = groups_of(O, BLOCK), matrix = band / bands, at = band % bands * BLOCK;
    return (Band){matrix * O + at, matrix * O + smaller(at + BLOCK, O)};
}

// The bits of the largest size in each block of a band.
static void largest_of_band(uint32_t *most, float *row, Band band, long I, int is_bfloat16, const void *w) {
    memset(most, 0, groups_of(I, BLOCK) * sizeof *most);
    for (long r = band.first; r < band.end; r++) {
        read_row(row, w, r * I, I, is_bfloat16);
        for (long at = 0; at < I; at += BLOCK) {
            uint32_t size = largest_bits(row + at, smaller(BLOCK, I - at));
            most[at / BLOCK] = size > most[at / BLOCK] ? size : most[at / BLOCK];
        }
    }
}

// By a float32 scale, which is divided by and not a power of two.
static void e4m3_divide(uint8_t *restrict codes, const float *restrict x, long n, float scale) {
    for (long i = 0; i < n; i++) codes[i] = e4m3_code(x[i] / scale);
}

static void e4m3_multiply(uint8_t *restrict codes, const float *restrict x, long n, float inverse) {
    for (long i = 0; i < n; i++) codes[i] = e4m3_code(x[i] * inverse);
}

// w: [matrices, O, I]; codes: the same; scales: [matrices, O / BLOCK, I / BLOCK], float32 if wide, else E8M0.
void dsv4_quantise_blocks(long matrices, long O, long I, int is_bfloat16, int is_wide, int threads, const void *w,
                          uint8_t *codes, void *scales) {
    long across = groups_of(I, BLOCK);
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch(I);
        uint32_t *most = (uint32_t *)scratch(across);
#pragma omp for schedule(static)
        for (long b = 0; b < matrices * groups_of(O, BLOCK); b++) {
            Band band = band_of(b, O);
            float *wide = (float *)scales + b * across;
            uint8_t *narrow = (uint8_t *)scales + b * across;
            largest_of_band(most, row, band, I, is_bfloat16, w);
            for (long i = 0; i < across; i++) {
                if (is_wide) wide[i] = (float_of(most[i]) > 1e-4f ? float_of(most[i]) : 1e-4f) / 448.0f;
                else narrow[i] = e4m3_scale_of(most[i]);
            }
            for (long r = band.first; r < band.end; r++) {
                read_row(row, w, r * I, I, is_bfloat16);
                for (long at = 0; at < I; at += BLOCK) {
                    long n = smaller(BLOCK, I - at);
                    if (is_wide) e4m3_divide(codes + r * I + at, row + at, n, wide[at / BLOCK]);
                    else e4m3_multiply(codes + r * I + at, row + at, n, e8m0_inverse(narrow[at / BLOCK]));
                }
            }
        }
        free(row);
        free(most);
    }
}

void dsv4_dequantise_blocks(long matrices, long O, long I, int is_wide, int is_bfloat16, int threads,
                            const uint8_t *codes, const void *scales, void *w) {
    long across = groups_of(I, BLOCK);
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch(I);
#pragma omp for schedule(static)
        for (long b = 0; b < matrices * groups_of(O, BLOCK); b++) {
            Band band = band_of(b, O);
            const float *wide = (const float *)scales + b * across;
            const uint8_t *narrow = (const uint8_t *)scales + b * across;
            for (long r = band.first; r < band.end; r++) {
                for (long at = 0; at < I; at += BLOCK) {
                    float factor = is_wide ? wide[at / BLOCK] : e8m0_value(narrow[at / BLOCK]);
                    e4m3_read(row + at, codes + r * I + at, smaller(BLOCK, I - at), factor);
                }
                write_row(w, r * I, row, I, is_bfloat16);
            }
        }
        free(row);
    }
}

// w, y: [matrices, O, I], by E8M0 scales.
void dsv4_round_blocks(long matrices, long O, long I, int is_bfloat16, int y_is_bfloat16, int threads, const void *w,
                       void *y) {
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch(I);
        uint32_t *most = (uint32_t *)scratch(groups_of(I, BLOCK));
#pragma omp for schedule(static)
        for (long b = 0; b < matrices * groups_of(O, BLOCK); b++) {
            Band band = band_of(b, O);
            largest_of_band(most, row, band, I, is_bfloat16, w);
            for (long r = band.first; r < band.end; r++) {
                read_row(row, w, r * I, I, is_bfloat16);
                for (long at = 0; at < I; at += BLOCK) {
                    uint32_t scale = e4m3_scale_of(most[at / BLOCK]);
                    float inverse = e8m0_inverse(scale), factor = e8m0_value(scale);
                    long end = smaller(at + BLOCK, I);
                    for (long i = at; i < end; i++) row[i] = e4m3_rounded(row[i] * inverse) * factor;
                }
                write_row(y, r * I, row, I, y_is_bfloat16);
            }
        }
        free(row);
        free(most);
    }
}
