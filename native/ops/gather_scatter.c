/* Rows by the value that sends them somewhere: a counting sort, and its way back. */
#include <string.h>

#include "../cpu/internal.h"

typedef struct {
    int32_t *order, *starts;
    const int32_t *values;
    int64_t n, e;
} gather_call;

static int gather(tops_stream *stream, void *arguments) {
    const gather_call *call = arguments;
    int32_t *order = call->order, *starts = call->starts;
    const int32_t *values = call->values;
    int64_t n = call->n, e = call->e;
    (void)stream;
    memset(starts, 0, (size_t)(e + 1) * sizeof *starts);
    for (int64_t i = 0; i < n; i++)
        if (values[i] >= 0 && values[i] < e) starts[values[i] + 1]++;
    for (int64_t v = 0; v < e; v++) starts[v + 1] += starts[v];
    /* starts[v] is where the next index of value v goes; afterwards it is where value v + 1 starts. */
    for (int64_t i = 0; i < n; i++)
        if (values[i] >= 0 && values[i] < e) order[starts[values[i]]++] = (int32_t)i;
    if (e) memmove(starts + 1, starts, (size_t)e * sizeof *starts);
    starts[0] = 0;
    return TOPS_OK;
}

int tops_gather_by_value(tops_stream *stream, int32_t *order, int32_t *starts, const int32_t *values, int64_t n, int64_t e) {
    REQUIRE(n >= 0 && e >= 0 && n <= INT32_MAX, "n, e: must be in 0..2^31 - 1, not %lld, %lld", (long long)n, (long long)e);
    return CALL(gather, gather_call, order, starts, values, n, e);
}

enum { COLUMNS = 256 };

typedef struct {
    unsigned char *out;
    const unsigned char *in;
    const int32_t *index;
    const float *scale;
    int64_t n, rows, d;
    int32_t dtype;
} scatter_call;

/* An item owns some columns of every row, so rows that meet in one place are added in the order of t on any number of threads. */
static void scatter_columns(void *context, int64_t item) {
    const scatter_call *call = context;
    int64_t first = item * COLUMNS, count = call->d - first < COLUMNS ? call->d - first : COLUMNS;
    size_t size = storage_bytes(call->dtype);
    float to[COLUMNS], from[COLUMNS];
    for (int64_t t = 0; t < call->n; t++) {
        if (call->index[t] < 0 || call->index[t] >= call->rows) continue;
        unsigned char *out = call->out + (size_t)(call->index[t] * call->d + first) * size;
        float scale = call->scale ? call->scale[t] : 1.0f;
        tops_cpu->load_row(to, out, call->dtype, count);
        tops_cpu->load_row(from, call->in + (size_t)(t * call->d + first) * size, call->dtype, count);
        for (int64_t i = 0; i < count; i++) to[i] += scale * from[i];
        tops_cpu->store_row(out, to, call->dtype, count);
    }
}

static int scatter_add(tops_stream *stream, void *arguments) {
    scatter_call *call = arguments;
    tops_team_run(stream, (call->d + COLUMNS - 1) / COLUMNS, scatter_columns, call);
    return TOPS_OK;
}

int tops_scatter_add_by_index(tops_stream *stream, void *out, const void *in, const int32_t *index, const float *scale,
                              int64_t n, int64_t rows, int64_t d, int32_t dtype) {
    REQUIRE(n >= 0 && rows >= 0 && d >= 0, "n, rows, d: must be at least 0, not %lld, %lld, %lld", (long long)n, (long long)rows, (long long)d);
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    return CALL(scatter_add, scatter_call, out, in, index, scale, n, rows, d, dtype);
}
