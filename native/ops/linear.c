/* Linear layers: rows are prepared once (normed, rounded), then tiles of GROUP weight rows by TILE tokens are shared out. */
#include <string.h>

#include "../cpu/internal.h"

enum { STORE, ADD, GATE_UP };
enum { TOKENS_AT_ONCE = 48 };   /* tokens whose prepared rows stay in the cache while a chunk of weight rows passes */

enum { MOST_PARTS = 8 };

typedef struct {
    const void *x;                  /* [n, cols] */
    const float *norm;
    void *out;
    float eps;
    int parts, mode, dtype, out_dtype;
    int64_t n, out_cols, groups, chunk;   /* groups of the job and of an item */
    tops_rows rows;                 /* x prepared: by all threads for all of them, or by each for itself, own_bytes apart */
    int64_t own_bytes;
    tops_weight w[MOST_PARTS];      /* as many as there are parts */
} linear_job;

static void prepare(const linear_job *job, const tops_rows *rows, int64_t from, int64_t until) {
    int64_t bytes = rows->cols * (int64_t)storage_bytes(job->dtype);
    for (int64_t t = from; t < until; t++) tops_prepare_row(rows, t, (const unsigned char *)job->x + t * bytes, job->dtype, job->norm, job->eps);
}

static tops_rows rows_here(const linear_job *job) { return tops_rows_after(&job->rows, tops_me() * job->own_bytes); }

static void prepare_own(void *context) {
    const linear_job *job = context;
    tops_rows rows = rows_here(job);
    prepare(job, &rows, 0, job->n);
}

static int64_t rows_of_an_item(int64_t n) { return (n + MOST_ITEMS - 1) / MOST_ITEMS; }

static void prepare_some(void *context, int64_t item) {
    const linear_job *job = context;
    int64_t some = rows_of_an_item(job->n), until = (item + 1) * some;
    prepare(job, &job->rows, item * some, until < job->n ? until : job->n);
}

static void finish(const linear_job *job, const float *tile, int64_t token, int tokens, int64_t first_row, int count) {
    for (int t = 0; t < tokens; t++) {
        int64_t place = (token + t) * job->out_cols + first_row;
        unsigned char *out = (unsigned char *)job->out + place * (int64_t)storage_bytes(job->out_dtype);
        float row[GROUP];
        memcpy(row, tile + t * GROUP, sizeof row);
        if (job->mode == ADD) {
            float before[GROUP];
            tops_cpu->load_row(before, out, job->out_dtype, count);
            for (int r = 0; r < count; r++) row[r] += before[r];
        }
        tops_cpu->store_row(out, row, job->out_dtype, count);
    }
}

static bool in_pairs(const tops_weight *w) { return tops_cpu->tile_bf16 && w->activations == TOPS_BF16 && w->dtype == TOPS_BF16; }

/* A group of the job: the matrix in which it lies (the gate's for GATE_UP), its number there, and its first column of the output. */
typedef struct {
    const tops_weight *w;
    int64_t group, column;
} place;

static place place_of(const linear_job *job, int64_t group) {
    place at = {job->w, group, group * GROUP};
    if (job->mode == GATE_UP) return at;
    for (int64_t before = 0; at.group >= group_count(at.w->rows); at.w++) {
        at.group -= group_count(at.w->rows);
        before += at.w->rows;
        at.column = before + at.group * GROUP;
    }
    return at;
}

static const unsigned char *packed(const tops_weight *w, int64_t group) {
    return (const unsigned char *)w->data + group * tops_group_bytes(w->dtype, w->cols);
}

static int rows_in(const tops_weight *w, int64_t group) { return w->rows - group * GROUP < GROUP ? (int)(w->rows - group * GROUP) : GROUP; }

static void multiply(float *out, const tops_rows *rows, const tops_weight *w, int64_t group, int64_t t, int tokens) {
    const float *scales = w->scales ? w->scales + group * GROUP / 128 * ((w->cols + 127) / 128) : NULL;
    bool integers = w->activations == TOPS_Q8_0 && tops_is_quantised(w->dtype);
    (integers ? tops_cpu->tile_q8 : tops_cpu->tile_f32)[dtype_slot(w->dtype)](out, packed(w, group), rows, t, tokens, scales);
}

static void run_group(const linear_job *job, const tops_rows *rows, place at, int64_t first, int64_t until) {
    for (int64_t t = first; t < until; t += TILE) {
        int tokens = until - t < TILE ? (int)(until - t) : TILE;
        float tile[TILE * GROUP], up[TILE * GROUP];
        multiply(tile, rows, at.w, at.group, t, tokens);
        if (job->mode == GATE_UP) {
            multiply(up, rows, at.w + 1, at.group, t, tokens);
            tops_cpu->silu_mul(tile, tile, up, tokens * GROUP);
        }
        finish(job, tile, t, tokens, at.column, rows_in(at.w, at.group));
    }
}

/* Two groups at once: neighbours, of which there may be one, or a gate's and an up's. */
static void run_pair(const linear_job *job, const tops_rows *rows, place at, int groups, int64_t first, int64_t until) {
    bool gated = job->mode == GATE_UP;
    const unsigned char *pair[2] = {packed(at.w, at.group), gated ? packed(at.w + 1, at.group) : packed(at.w, at.group + 1)};
    int64_t ahead = tops_group_bytes(at.w->dtype, at.w->cols) * (gated ? 1 : 2);
    float tile[2][PAIR_TILE * GROUP], *const out[2] = {tile[0], tile[1]};
    for (int64_t t = first; t < until; t += PAIR_TILE) {
        int tokens = until - t < PAIR_TILE ? (int)(until - t) : PAIR_TILE;
        tops_cpu->tile_bf16(out, pair, gated ? 2 : groups, rows, t, tokens, ahead);
        if (gated) tops_cpu->silu_mul(tile[0], tile[0], tile[1], tokens * GROUP);
        for (int g = 0; g < groups; g++) finish(job, tile[g], t, tokens, at.column + g * GROUP, rows_in(at.w, at.group + g));
    }
}

static void run_chunk(void *context, int64_t item) {
    const linear_job *job = context;
    tops_rows rows = rows_here(job);
    int64_t from = item * job->chunk, to = from + job->chunk < job->groups ? from + job->chunk : job->groups;
    for (int64_t first = 0; first < job->n; first += TOKENS_AT_ONCE) {
        int64_t until = first + TOKENS_AT_ONCE < job->n ? first + TOKENS_AT_ONCE : job->n;
        for (int64_t group = from; group < to;) {
            place at = place_of(job, group);
            if (job->mode == GATE_UP ? in_pairs(at.w) && in_pairs(at.w + 1) : in_pairs(at.w)) {
                int groups = job->mode != GATE_UP && group + 1 < to && at.group + 1 < group_count(at.w->rows) ? 2 : 1;
                run_pair(job, &rows, at, groups, first, until);
                group += groups;
            } else {
                run_group(job, &rows, at, first, until);
                group++;
            }
        }
    }
}

/* Groups of an item: eight items for each thread or a few more, so that every thread has as many. */
static int64_t chunk_of(int64_t groups, int64_t threads, bool pairs) {
    int64_t items = 8 * threads < MOST_ITEMS / 2 ? 8 * threads : MOST_ITEMS / 2, most = (groups + items - 1) / items;
    if (pairs) return most + most % 2;
    for (int64_t chunk = most; chunk > most / 2; chunk--)
        if ((groups + chunk - 1) / chunk % threads == 0) return chunk;
    return most;
}

enum { FEW_VALUES = 4096 };   /* of rows that every thread prepares for itself, which takes less time than to wait for who would do it */

static int run(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int parts, int64_t n, float eps,
               int dtype, int out_dtype, int mode) {
    REQUIRE(n >= 0, "n: must be at least 0, not %lld", (long long)n);
    REQUIRE(parts >= 1 && parts <= MOST_PARTS, "parts: must be in 1..%d, not %d", MOST_PARTS, parts);
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    linear_job job = {.x = x, .norm = norm, .out = out, .eps = eps, .parts = parts, .mode = mode, .dtype = dtype, .out_dtype = out_dtype, .n = n};
    int64_t cols = w->cols, threads = tops_team_threads(stream->team);
    bool q8 = false, bf16 = false, pairs = false;
    for (int i = 0; i < parts; i++) {
        REQUIRE(w[i].cols == cols, "w[%d].cols: must be %lld as in the first part, not %lld", i, (long long)cols, (long long)w[i].cols);
        REQUIRE(tops_packed_bytes(w[i].dtype, w[i].rows, cols) >= 0, "w[%d]: no kernel for dtype %d with %lld columns", i, w[i].dtype, (long long)cols);
        job.w[i] = w[i];
        job.out_cols += w[i].rows;
        job.groups += group_count(w[i].rows);
        q8 = q8 || (w[i].activations == TOPS_Q8_0 && tops_is_quantised(w[i].dtype));
        bf16 = bf16 || w[i].activations == TOPS_BF16;
        pairs = pairs || (mode != GATE_UP && n > 1 && in_pairs(&w[i]));
    }
    if (n == 0 || job.out_cols == 0) return TOPS_OK;
    if (mode == GATE_UP) job.out_cols /= 2, job.groups /= 2;
    job.chunk = chunk_of(job.groups, threads, pairs);
    tops_scratch scratch = scratch_of(stream);
    bool alone = n * cols <= FEW_VALUES && tops_take_rows(&job.rows, &job.own_bytes, &scratch, threads, n, cols, q8, bf16);
    if (!alone) {
        REQUIRE_SCRATCH(tops_take_rows(&job.rows, &job.own_bytes, &scratch, 1, n, cols, q8, bf16) ? stream->scratch : NULL);
        job.own_bytes = 0;
    }
    tops_stage stages[] = {{.task = prepare_some, .items = (n + rows_of_an_item(n) - 1) / rows_of_an_item(n)},
                           {.task = run_chunk, .begin = alone ? prepare_own : NULL, .items = (job.groups + job.chunk - 1) / job.chunk}};
    return tops_do(stream, stages + alone, 2 - alone, &job, offsetof(linear_job, w) + (size_t)parts * sizeof *w);
}

int tops_linear(tops_stream *stream, void *out, const void *x, const tops_weight *w, int32_t parts, int64_t n, int32_t dtype) {
    return run(stream, out, x, NULL, w, parts, n, 0, dtype, dtype, STORE);
}
int tops_linear_add(tops_stream *stream, void *out, const void *x, const tops_weight *w, int64_t n, int32_t dtype) {
    return run(stream, out, x, NULL, w, 1, n, 0, dtype, dtype, ADD);
}
int tops_rms_norm_linear(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                         int64_t n, float eps, int32_t dtype) {
    return run(stream, out, x, norm, w, parts, n, eps, dtype, dtype, STORE);
}
int tops_rms_norm_linear_f32(tops_stream *stream, float *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                             int64_t n, float eps, int32_t dtype) {
    return run(stream, out, x, norm, w, parts, n, eps, dtype, TOPS_F32, STORE);
}
int tops_rms_norm_gate_up_silu(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w,
                               int64_t n, float eps, int32_t dtype) {
    REQUIRE(w[0].rows == w[1].rows, "w: gate and up must have equal rows, not %lld and %lld", (long long)w[0].rows, (long long)w[1].rows);
    return run(stream, out, x, norm, w, 2, n, eps, dtype, dtype, GATE_UP);
}
