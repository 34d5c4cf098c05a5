/* Rows by the value that sends them somewhere: a counting sort, and its way back. */
#include <string.h>

#include "../cpu/internal.h"

int tops_gather_by_value(tops_stream *stream, int32_t *order, int32_t *starts, const int32_t *values, int64_t n, int64_t e) {
    (void)stream;
    REQUIRE(n >= 0 && e >= 0 && n <= INT32_MAX, "n, e: must be in 0..2^31 - 1, not %lld, %lld", (long long)n, (long long)e);
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

enum { COLUMNS = 256 };

typedef struct {
    unsigned char *out;
    const unsigned char *in;
    const int32_t *index;
    const float *scale;
    int64_t n, rows, d;
    int32_t dtype;
} scatter_job;

/* An item owns some columns of every row, so rows that meet in one place are added in the order of t on any number of threads. */
static void scatter_columns(void *context, int64_t item) {
    const scatter_job *job = context;
    int64_t first = item * COLUMNS, count = job->d - first < COLUMNS ? job->d - first : COLUMNS;
    size_t size = storage_bytes(job->dtype);
    float to[COLUMNS], from[COLUMNS];
    for (int64_t t = 0; t < job->n; t++) {
        if (job->index[t] < 0 || job->index[t] >= job->rows) continue;
        unsigned char *out = job->out + (size_t)(job->index[t] * job->d + first) * size;
        float scale = job->scale ? job->scale[t] : 1.0f;
        tops_cpu->load_row(to, out, job->dtype, count);
        tops_cpu->load_row(from, job->in + (size_t)(t * job->d + first) * size, job->dtype, count);
        for (int64_t i = 0; i < count; i++) to[i] += scale * from[i];
        tops_cpu->store_row(out, to, job->dtype, count);
    }
}

int tops_scatter_add_by_index(tops_stream *stream, void *out, const void *in, const int32_t *index, const float *scale,
                              int64_t n, int64_t rows, int64_t d, int32_t dtype) {
    REQUIRE(n >= 0 && rows >= 0 && d >= 0, "n, rows, d: must be at least 0, not %lld, %lld, %lld", (long long)n, (long long)rows, (long long)d);
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    scatter_job job = {.out = out, .in = in, .index = index, .scale = scale, .n = n, .rows = rows, .d = d, .dtype = dtype};
    tops_team_run(stream->team, (d + COLUMNS - 1) / COLUMNS, scatter_columns, &job);
    return TOPS_OK;
}
