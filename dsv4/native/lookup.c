// Rows of a table by number. Contract: dsv4/ops/lookup.
#include "common.h"

// out [n, copies, bytes] = table [., bytes] at ids [n].
void dsv4_lookup(long n, long bytes, long copies, const char *table, const int32_t *ids, char *out) {
    for (long i = 0; i < n * copies; i++) memcpy(out + i * bytes, table + ids[i / copies] * bytes, bytes);
}
