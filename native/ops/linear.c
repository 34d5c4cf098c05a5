/* Linear layers: rows are prepared once (normed, rounded), then tiles of GROUP weight rows by TILE tokens are shared out. */
#include <string.h>

#include "../cpu/internal.h"

enum { STORE, ADD, GATE_UP };
enum { TOKENS_AT_ONCE = 48 };   /* tokens whose prepared rows stay in the cache while a chunk of weight rows passes */

typedef struct {
    const tops_weight *w;
    int parts, mode, out_dtype;
    void *out;
    int64_t n, out_cols, groups, chunk;
    tops_rows x;
} linear_job;

typedef struct {
    const void *x;
    const float *norm;
    float eps;
    int dtype;
    int64_t cols;
    float *f32;
    tops_q8 *q8;
    uint16_t *bf16;
} prepare_job;

static void prepare_row(void *context, int64_t t) {
    const prepare_job *job = context;
    int64_t cols = job->cols;
    float *row = job->f32 + t * cols;
    tops_cpu->load_row(row, (const unsigned char *)job->x + t * cols * (int64_t)storage_bytes(job->dtype), job->dtype, cols);
    if (job->norm) tops_cpu->rms_norm(row, row, job->norm, cols, job->eps);
    if (job->bf16) {
        uint16_t *half = job->bf16 + t * bf16_pitch(cols);
        half[bf16_pitch(cols) - 1] = 0;
        tops_cpu->store_row(half, row, TOPS_BF16, cols);
        tops_cpu->load_row(row, half, TOPS_BF16, cols);
    }
    if (job->q8) tops_cpu->quantize_row(job->q8 + t * (cols / BLOCK), row, cols);
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

static void multiply(float *out, const linear_job *job, const tops_weight *w, int64_t group, int64_t t, int tokens) {
    const float *scales = w->scales ? w->scales + group * GROUP / 128 * ((w->cols + 127) / 128) : NULL;
    bool integers = w->activations == TOPS_Q8_0 && tops_is_quantised(w->dtype);
    (integers ? tops_cpu->tile_q8 : tops_cpu->tile_f32)[dtype_slot(w->dtype)](out, packed(w, group), &job->x, t, tokens, scales);
}

static void run_group(const linear_job *job, place at, int64_t first, int64_t until) {
    for (int64_t t = first; t < until; t += TILE) {
        int tokens = until - t < TILE ? (int)(until - t) : TILE;
        float tile[TILE * GROUP], up[TILE * GROUP];
        multiply(tile, job, at.w, at.group, t, tokens);
        if (job->mode == GATE_UP) {
            multiply(up, job, at.w + 1, at.group, t, tokens);
            tops_cpu->silu_mul(tile, tile, up, tokens * GROUP);
        }
        finish(job, tile, t, tokens, at.column, rows_in(at.w, at.group));
    }
}

/* Two groups at once: neighbours, of which there may be one, or a gate's and an up's. */
static void run_pair(const linear_job *job, place at, int groups, int64_t first, int64_t until) {
    bool gated = job->mode == GATE_UP;
    const unsigned char *pair[2] = {packed(at.w, at.group), gated ? packed(at.w + 1, at.group) : packed(at.w, at.group + 1)};
    int64_t ahead = tops_group_bytes(at.w->dtype, at.w->cols) * (gated ? 1 : 2);
    float tile[2][PAIR_TILE * GROUP], *const out[2] = {tile[0], tile[1]};
    for (int64_t t = first; t < until; t += PAIR_TILE) {
        int tokens = until - t < PAIR_TILE ? (int)(until - t) : PAIR_TILE;
        tops_cpu->tile_bf16(out, pair, gated ? 2 : groups, &job->x, t, tokens, ahead);
        if (gated) tops_cpu->silu_mul(tile[0], tile[0], tile[1], tokens * GROUP);
        for (int g = 0; g < groups; g++) finish(job, tile[g], t, tokens, at.column + g * GROUP, rows_in(at.w, at.group + g));
    }
}

static void run_chunk(void *context, int64_t item) {
    const linear_job *job = context;
    int64_t from = item * job->chunk, to = from + job->chunk < job->groups ? from + job->chunk : job->groups;
    for (int64_t first = 0; first < job->n; first += TOKENS_AT_ONCE) {
        int64_t until = first + TOKENS_AT_ONCE < job->n ? first + TOKENS_AT_ONCE : job->n;
        for (int64_t group = from; group < to;) {
            place at = place_of(job, group);
            if (job->mode == GATE_UP ? in_pairs(at.w) && in_pairs(at.w + 1) : in_pairs(at.w)) {
                int groups = job->mode != GATE_UP && group + 1 < to && at.group + 1 < group_count(at.w->rows) ? 2 : 1;
                run_pair(job, at, groups, first, until);
                group += groups;
            } else {
                run_group(job, at, first, until);
                group++;
            }
        }
    }
}

enum { MOST_PARTS = 8 };

typedef struct {
    void *out;
    const void *x;
    const float *norm;
    int64_t n, rows, groups;       /* rows and groups of all parts */
    float eps;
    int parts, mode, dtype, out_dtype;
    bool quantise, round, pairs;   /* what the rows are prepared for */
    tops_weight w[MOST_PARTS];     /* as many as there are parts */
} linear_call;

static int linear(tops_stream *stream, void *arguments) {
    const linear_call *call = arguments;
    int64_t n = call->n, cols = call->w->cols;
    tops_scratch scratch = scratch_of(stream);
    float *f32 = scratch_take(&scratch, n * cols * 4);
    REQUIRE_SCRATCH(f32);
    prepare_job prepare = {.x = call->x, .norm = call->norm, .eps = call->eps, .dtype = call->dtype, .cols = cols, .f32 = f32};
    if (call->quantise) {
        prepare.q8 = scratch_take(&scratch, n * (cols / BLOCK) * (int64_t)sizeof *prepare.q8);
        REQUIRE_SCRATCH(prepare.q8);
    }
    if (call->round) {
        prepare.bf16 = scratch_take(&scratch, n * bf16_pitch(cols) * 2);
        REQUIRE_SCRATCH(prepare.bf16);
    }
    /* A wake-up of the team costs more than a few short rows. */
    if (n * cols < 16384) for (int64_t t = 0; t < n; t++) prepare_row(&prepare, t);
    else tops_team_run(stream->team, n, prepare_row, &prepare);

    bool gated = call->mode == GATE_UP;
    linear_job job = {.w = call->w, .parts = call->parts, .mode = call->mode, .out_dtype = call->out_dtype, .out = call->out, .n = n,
                      .out_cols = gated ? call->w->rows : call->rows, .groups = gated ? group_count(call->w->rows) : call->groups,
                      .x = {f32, prepare.q8, prepare.bf16, cols}};
    int64_t shares = tops_team_threads(stream->team) * 8;
    job.chunk = (job.groups + shares - 1) / shares;
    if (call->pairs && n > 1) job.chunk += job.chunk % 2;
    tops_team_run(stream->team, (job.groups + job.chunk - 1) / job.chunk, run_chunk, &job);
    return TOPS_OK;
}

static int check_and_call(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int parts, int64_t n, float eps,
                          int dtype, int out_dtype, int mode) {
    REQUIRE(n >= 0, "n: must be at least 0, not %lld", (long long)n);
    REQUIRE(parts >= 1 && parts <= MOST_PARTS, "parts: must be in 1..%d, not %d", MOST_PARTS, parts);
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    linear_call call = {.out = out, .x = x, .norm = norm, .n = n, .eps = eps, .parts = parts, .mode = mode, .dtype = dtype, .out_dtype = out_dtype};
    int64_t cols = w->cols;
    for (int i = 0; i < parts; i++) {
        REQUIRE(w[i].cols == cols, "w[%d].cols: must be %lld as in the first part, not %lld", i, (long long)cols, (long long)w[i].cols);
        REQUIRE(tops_packed_bytes(w[i].dtype, w[i].rows, cols) >= 0, "w[%d]: no kernel for dtype %d with %lld columns", i, w[i].dtype, (long long)cols);
        call.w[i] = w[i];
        call.rows += w[i].rows;
        call.groups += group_count(w[i].rows);
        call.quantise = call.quantise || (w[i].activations == TOPS_Q8_0 && tops_is_quantised(w[i].dtype));
        call.round = call.round || w[i].activations == TOPS_BF16;
        call.pairs = call.pairs || (mode != GATE_UP && in_pairs(&w[i]));
    }
    return n && call.rows ? tops_call(stream, linear, &call, offsetof(linear_call, w) + (size_t)parts * sizeof *w) : TOPS_OK;
}

int tops_linear(tops_stream *stream, void *out, const void *x, const tops_weight *w, int32_t parts, int64_t n, int32_t dtype) {
    return check_and_call(stream, out, x, NULL, w, parts, n, 0, dtype, dtype, STORE);
}
int tops_linear_add(tops_stream *stream, void *out, const void *x, const tops_weight *w, int64_t n, int32_t dtype) {
    return check_and_call(stream, out, x, NULL, w, 1, n, 0, dtype, dtype, ADD);
}
int tops_rms_norm_linear(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                         int64_t n, float eps, int32_t dtype) {
    return check_and_call(stream, out, x, norm, w, parts, n, eps, dtype, dtype, STORE);
}
int tops_rms_norm_linear_f32(tops_stream *stream, float *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                             int64_t n, float eps, int32_t dtype) {
    return check_and_call(stream, out, x, norm, w, parts, n, eps, dtype, TOPS_F32, STORE);
}
int tops_rms_norm_gate_up_silu(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w,
                               int64_t n, float eps, int32_t dtype) {
    REQUIRE(w[0].rows == w[1].rows, "w: gate and up must have equal rows, not %lld and %lld", (long long)w[0].rows, (long long)w[1].rows);
    return check_and_call(stream, out, x, norm, w, 2, n, eps, dtype, dtype, GATE_UP);
}
