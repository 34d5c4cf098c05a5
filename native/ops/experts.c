/*
 * Products with the experts that each token chose, and with the shared one (which counts as expert e).
 *
 * Pairs (token, choice) are sorted by expert; an expert's rows then lie together and take the same tiles as a linear layer, whether
 * it has one token or a hundred. Nothing of an expert that nobody chose is read. Experts that were left in a file are packed here,
 * GROUP rows at a time, into a buffer that stays in the cache while all their tokens pass.
 */
#include <string.h>

#include "../cpu/internal.h"

typedef struct {
    tops_rows x;                    /* the pairs' rows, by expert, rounded as the weights ask */
    const unsigned char *in;        /* [n, d] or [n, k + 1, d] */
    int32_t *order, *starts;        /* [n (k + 1)] pairs by expert; [e + 2] */
    int32_t *active;                /* experts that somebody chose */
    int64_t actives, n, e, k;
    bool by_token;                  /* a pair's row is its token's */
    int32_t dtype;
    const tops_weight *w, *shared;
    unsigned char *out;
    int64_t rows;                   /* of a matrix of one expert */
    const float *shares;
    float *sums;                    /* [item, n, GROUP] */
} expert_job;

static int64_t row_of(const expert_job *job, int32_t pair) { return job->by_token ? pair / (job->k + 1) : pair; }

static bool rounds_to_q8(const tops_weight *w) { return w->activations == TOPS_Q8_0 && tops_is_quantised(w->dtype); }

enum { PACKED_BYTES = 256 << 10 };   /* of GROUP rows that are packed on their way, on the stack */

int32_t tops_reads_in_place(int32_t dtype, int64_t cols) {
    int64_t bytes = tops_group_bytes(dtype, cols);
    return bytes >= 0 && bytes <= PACKED_BYTES;
}

/* Rows GROUP group .. of matrix `part` of an expert (e: the shared one). */
typedef struct {
    const unsigned char *packed;
    const float *scales;
    tops_tile tile;
} row_group;

/* buffer [PACKED_BYTES]: for rows that are not packed yet */
static row_group rows_of(const expert_job *job, int64_t expert, int part, int64_t group, unsigned char *buffer) {
    const tops_weight *w = expert == job->e ? &job->shared[part] : &job->w[part];
    int64_t index = expert == job->e ? 0 : expert, wide = (w->cols + 127) / 128, bytes = tops_group_bytes(w->dtype, w->cols);
    const float *scales = w->scales ? w->scales + (index * ((job->rows + 127) / 128) + group * GROUP / 128) * wide : NULL;
    tops_tile tile = (rounds_to_q8(w) ? tops_cpu->tile_q8 : tops_cpu->tile_f32)[dtype_slot(w->dtype)];
    if (!w->in_place) return (row_group){(const unsigned char *)w->data + (index * group_count(job->rows) + group) * bytes, scales, tile};
    int64_t rows = job->rows - group * GROUP < GROUP ? job->rows - group * GROUP : GROUP;
    const unsigned char *in = (const unsigned char *)w->in_place[index] + group * GROUP * tops_file_row_bytes(w->dtype, w->cols);
    tops_pack_group(buffer, in, w->dtype, w->cols, (int)rows);
    return (row_group){buffer, scales, tile};
}

/* out [tokens, GROUP] for sorted rows first .. */
static void product(const expert_job *job, float *out, const row_group *rows, int64_t first, int tokens) {
    rows->tile(out, rows->packed, &job->x, first, tokens, rows->scales);
}

static void prepare_pair(void *context, int64_t at) {
    const expert_job *job = context;
    int64_t bytes = job->x.cols * (int64_t)storage_bytes(job->dtype);
    tops_prepare_row(&job->x, at, job->in + row_of(job, job->order[at]) * bytes, job->dtype, NULL, 0);
}

/* Sorts the pairs and loads their rows. */
static int sort_pairs(tops_stream *stream, expert_job *job, tops_scratch *scratch, const int32_t *experts, int parts) {
    int64_t n = job->n, k = job->k, e = job->e, pairs = n * (k + 1);
    int32_t *values = scratch_take(scratch, pairs * 12 + (2 * e + 3) * 4);
    REQUIRE_SCRATCH(values);
    job->order = values + pairs;
    job->starts = job->order + pairs;
    job->active = job->starts + e + 2;
    bool q8 = false;
    for (int part = 0; part < parts; part++) q8 = q8 || rounds_to_q8(&job->w[part]) || rounds_to_q8(&job->shared[part]);
    int64_t bytes;
    REQUIRE_SCRATCH(tops_take_rows(&job->x, &bytes, scratch, 1, pairs, job->w->cols, q8, false) ? stream->scratch : NULL);
    for (int64_t t = 0; t < n; t++) {
        for (int64_t j = 0; j < k; j++) values[t * (k + 1) + j] = experts[t * k + j] < e ? experts[t * k + j] : -1;
        values[t * (k + 1) + k] = (int32_t)e;
    }
    int status = tops_gather_by_value(stream, job->order, job->starts, values, pairs, e + 1);
    if (status) return status;
    for (int64_t expert = 0; expert <= e; expert++)
        if (job->starts[expert] < job->starts[expert + 1]) job->active[job->actives++] = (int32_t)expert;
    tops_team_run(stream, job->starts[e + 1], prepare_pair, job);
    return TOPS_OK;
}

static int check_stack(const char *name, const tops_weight *w, int64_t e, int64_t rows, int64_t cols) {
    REQUIRE(w->cols == cols && w->rows == e * rows, "%s: must be %lld matrices of %lld x %lld, not %lld x %lld in all", name, (long long)e,
            (long long)rows, (long long)cols, (long long)w->rows, (long long)w->cols);
    REQUIRE(tops_packed_bytes(w->dtype, rows, cols) >= 0, "%s: number format %d has no rows of %lld", name, w->dtype, (long long)cols);
    REQUIRE(w->dtype != TOPS_FP8_E4M3 || w->scales, "%s: fp8 needs scales", name);
    REQUIRE(!w->in_place || tops_reads_in_place(w->dtype, cols), "%s: rows of %lld must be packed", name, (long long)cols);
    return TOPS_OK;
}

static int check_sizes(int64_t n, int64_t e, int64_t k, int32_t dtype) {
    REQUIRE(n >= 0 && e > 0 && k >= 0 && k <= e, "n, e, k: must be n >= 0 and k <= e, not %lld, %lld, %lld", (long long)n, (long long)e, (long long)k);
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    return TOPS_OK;
}

enum { SPAN = 4 };      /* groups of rows in one item */

static void gate_up_item(void *context, int64_t item) {
    const expert_job *job = context;
    int64_t groups = group_count(job->rows), spans = (groups + SPAN - 1) / SPAN;
    int64_t expert = job->active[item / spans], last = (item % spans + 1) * SPAN;
    float gate[TILE * GROUP], up[TILE * GROUP];
    _Alignas(64) unsigned char buffer[2][PACKED_BYTES];
    for (int64_t group = item % spans * SPAN; group < groups && group < last; group++) {
        row_group gates = rows_of(job, expert, 0, group, buffer[0]), ups = rows_of(job, expert, 1, group, buffer[1]);
        for (int64_t at = job->starts[expert], end = job->starts[expert + 1]; at < end; at += TILE) {
            int tokens = end - at < TILE ? (int)(end - at) : TILE;
            int64_t count = job->rows - group * GROUP < GROUP ? job->rows - group * GROUP : GROUP;
            product(job, gate, &gates, at, tokens);
            product(job, up, &ups, at, tokens);
            tops_cpu->silu_mul(gate, gate, up, (int64_t)tokens * GROUP);
            for (int t = 0; t < tokens; t++)
                tops_cpu->store_row(job->out + (size_t)(job->order[at + t] * job->rows + group * GROUP) * storage_bytes(job->dtype),
                                    gate + t * GROUP, job->dtype, count);
        }
    }
}

/* w and shared: gate and up, or down */
typedef struct {
    void *out;
    const void *x;
    const int32_t *experts;
    const float *shares;
    tops_weight w[2], shared[2];
    int64_t n, e, k;
    int32_t dtype;
} expert_call;

static int gate_up_silu(tops_stream *stream, void *arguments) {
    const expert_call *call = arguments;
    tops_scratch scratch = scratch_of(stream);
    expert_job job = {.in = call->x, .n = call->n, .e = call->e, .k = call->k, .by_token = true, .dtype = call->dtype, .w = call->w,
                      .shared = call->shared, .out = call->out, .rows = call->shared->rows};
    int status = sort_pairs(stream, &job, &scratch, call->experts, 2);
    if (!status) tops_team_run(stream, job.actives * ((group_count(job.rows) + SPAN - 1) / SPAN), gate_up_item, &job);
    return status;
}

int tops_experts_gate_up_silu(tops_stream *stream, void *out, const void *x, const int32_t *experts, const tops_weight *w,
                              const tops_weight *shared, int64_t n, int64_t e, int64_t k, int32_t dtype) {
    int status = check_sizes(n, e, k, dtype);
    for (int part = 0; part < 2 && !status; part++) {
        status = check_stack("w", &w[part], e, shared->rows, w->cols);
        if (!status) status = check_stack("shared", &shared[part], 1, shared->rows, w->cols);
    }
    if (status || n == 0) return status;
    return CALL(gate_up_silu, expert_call, out, x, experts, NULL, {w[0], w[1]}, {shared[0], shared[1]}, n, e, k, dtype);
}

/* An item owns GROUP columns of the output and takes the experts in order: the sum does not depend on the threads. */
static void down_item(void *context, int64_t group) {
    const expert_job *job = context;
    int64_t n = job->n, count = job->rows - group * GROUP < GROUP ? job->rows - group * GROUP : GROUP;
    float *sums = job->sums + group * n * GROUP, y[TILE * GROUP], before[GROUP];
    _Alignas(64) unsigned char buffer[PACKED_BYTES];
    memset(sums, 0, (size_t)(n * GROUP) * sizeof(float));
    for (int64_t a = 0; a < job->actives; a++) {
        int64_t expert = job->active[a];
        row_group rows = rows_of(job, expert, 0, group, buffer);
        for (int64_t at = job->starts[expert], end = job->starts[expert + 1]; at < end; at += TILE) {
            int tokens = end - at < TILE ? (int)(end - at) : TILE;
            product(job, y, &rows, at, tokens);
            for (int t = 0; t < tokens; t++) {
                int32_t pair = job->order[at + t];
                float *sum = sums + pair / (job->k + 1) * GROUP;
                for (int i = 0; i < GROUP; i++) sum[i] += job->shares[pair] * y[t * GROUP + i];
            }
        }
    }
    for (int64_t t = 0; t < n; t++) {
        unsigned char *out = job->out + (size_t)(t * job->rows + group * GROUP) * storage_bytes(job->dtype);
        tops_cpu->load_row(before, out, job->dtype, count);
        for (int64_t i = 0; i < count; i++) before[i] += sums[t * GROUP + i];
        tops_cpu->store_row(out, before, job->dtype, count);
    }
}

static int down_add(tops_stream *stream, void *arguments) {
    const expert_call *call = arguments;
    tops_scratch scratch = scratch_of(stream);
    expert_job job = {.in = call->x, .n = call->n, .e = call->e, .k = call->k, .dtype = call->dtype, .w = call->w, .shared = call->shared,
                      .out = call->out, .rows = call->shared->rows, .shares = call->shares};
    int status = sort_pairs(stream, &job, &scratch, call->experts, 1);
    if (status) return status;
    job.sums = scratch_take(&scratch, group_count(job.rows) * job.n * GROUP * 4);
    REQUIRE_SCRATCH(job.sums);
    tops_team_run(stream, group_count(job.rows), down_item, &job);
    return TOPS_OK;
}

int tops_experts_down_add(tops_stream *stream, void *out, const void *x, const int32_t *experts, const float *shares,
                          const tops_weight *w, const tops_weight *shared, int64_t n, int64_t e, int64_t k, int32_t dtype) {
    int status = check_sizes(n, e, k, dtype);
    if (!status) status = check_stack("w", w, e, shared->rows, w->cols);
    if (!status) status = check_stack("shared", shared, 1, shared->rows, w->cols);
    if (status || n == 0) return status;
    return CALL(down_add, expert_call, out, x, experts, shares, {*w}, {*shared}, n, e, k, dtype);
}
