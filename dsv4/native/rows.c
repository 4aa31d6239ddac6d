// Whole tensors of stored rows. Contract: dsv4/ops/rows.
#include "rows.h"

// from: [n, K] float32; to: [n, bytes].
void dsv4_pack(long n, long K, long R, int format, int is_index, const float *from, uint8_t *to) {
    long bytes = is_index ? index_row_bytes(format, K) : row_bytes(format, K, R);
    for (long i = 0; i < n; i++) {
        if (is_index)
            index_row_write(to + i * bytes, from + i * K, format, K);
        else
            row_write(to + i * bytes, from + i * K, format, K, R);
    }
}

// from: [n, bytes]; to: [n, K] float32.
void dsv4_unpack(long n, long K, long R, int format, int is_index, const uint8_t *from, float *to) {
    long bytes = is_index ? index_row_bytes(format, K) : row_bytes(format, K, R);
    for (long i = 0; i < n; i++) {
        if (is_index)
            index_row_read(to + i * K, from + i * bytes, format, K);
        else
            row_read(to + i * K, from + i * bytes, format, K, R);
    }
}
