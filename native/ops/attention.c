/* Attention over paged keys and values, for prefill and decode alike.
 *
 * Work is cut into items: up to TOKENS neighbouring rows of one sequence, one key-value head, one span of positions. Spans are cut
 * where items would be too few to go round; their softmaxes are merged at the end (log-sum-exp weights).
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "../cpu/internal.h"

enum { TOKENS = 32, LEAST = 32, SPAN = 256, QUERIES = 16384 };   /* LEAST positions in a span; QUERIES: floats of an item's queries, on the stack */

typedef struct {
    int32_t first, tokens;    /* rows of the batch */
} row_run;

typedef struct {
    _Alignas(64) _Atomic int32_t spans;   /* that are not computed yet */
} open_spans;

typedef struct {
    unsigned char *out;
    const unsigned char *qkv;
    tops_kv kv;
    tops_batch batch;
    int64_t h, g, p, width, row_cols;   /* width: of a head with its padding */
    float scale;
    int gated, dtype;
    row_run *runs;                      /* this and what follows is planned when positions are known */
    int64_t splits, span, items;
    float *partial, *maximum, *sum;     /* [splits, n, h, width], [splits, n, h] twice; inside a run ordered by head, then by row */
    open_spans *open;                   /* [run, g] */
} attention_job;

static int64_t place_of(const attention_job *job, int64_t split, const row_run *run, int64_t head) {
    return (split * job->batch.n + run->first) * job->h + head * run->tokens * (job->h / job->g);
}

/* All spans of a run's rows and the query heads that share a key-value head, in order of position whoever computed them. */
static void merge(const attention_job *job, const row_run *run, int64_t head) {
    int64_t heads = job->h / job->g, p = job->p, size = (int64_t)storage_bytes(job->dtype), step = job->batch.n * job->h;
    float merged[256], gate[256];
    for (int t = 0; t < run->tokens; t++) {
        for (int64_t j = head * heads; j < (head + 1) * heads; j++) {
            float highest = -INFINITY, total = 0;
            int64_t row = place_of(job, 0, run, head) + t * heads + j % heads;
            for (int64_t s = 0; s < job->splits; s++)
                if (job->sum[row + s * step] > 0 && job->maximum[row + s * step] > highest) highest = job->maximum[row + s * step];
            memset(merged, 0, sizeof merged);
            for (int64_t s = 0; s < job->splits; s++) {
                int64_t at = row + s * step;
                if (!(job->sum[at] > 0)) continue;
                float share = expf(job->maximum[at] - highest);
                total += share * job->sum[at];
                for (int64_t c = 0; c < p; c++) merged[c] += share * job->partial[at * job->width + c];
            }
            for (int64_t c = 0; c < p; c++) merged[c] /= total;
            if (job->gated) {
                tops_cpu->load_row(gate, job->qkv + ((run->first + t) * job->row_cols + (job->h + 2 * job->g + j) * p) * size, job->dtype, p);
                for (int64_t c = 0; c < p; c++) merged[c] /= 1.0f + expf(-gate[c]);
            }
            tops_cpu->store_row(job->out + ((run->first + t) * job->h + j) * p * size, merged, job->dtype, p);
        }
    }
}

static void attend_item(void *context, int64_t index) {
    const attention_job *job = context;
    int64_t split = index % job->splits, head = index / job->splits % job->g, heads = job->h / job->g, p = job->p, width = job->width;
    const row_run *run = job->runs + index / job->splits / job->g;
    _Alignas(64) float q[QUERIES];
    for (int t = 0; t < run->tokens; t++)
        for (int64_t j = 0; j < heads; j++) {
            float *row = q + (t * heads + j) * width;
            int64_t place = (run->first + t) * job->row_cols + (head * heads + j) * p;
            tops_cpu->load_row(row, job->qkv + place * (int64_t)storage_bytes(job->dtype), job->dtype, p);
            for (int64_t c = 0; c < width; c++) row[c] = c < p ? row[c] * job->scale : 0;
        }

    const int32_t *positions = job->batch.positions + run->first;
    int64_t from = split * job->span, until = positions[run->tokens - 1] + 1;
    if (until > from + job->span) until = from + job->span;
    int64_t place = place_of(job, split, run, head);
    float maximum[QUERIES / 16], sum[QUERIES / 16];   /* here, because in the job's arrays other threads' stand in the same lines */
    tops_attention_item item = {
        .q = q, .pages = job->batch.page_table + job->batch.sequences[run->first] * job->batch.max_pages, .kv = &job->kv,
        .g = job->g, .p = p, .width = width, .head = head, .tokens = run->tokens, .heads = (int)heads, .positions = positions,
        .from = from, .until = until, .out = job->partial + place * width, .maximum = maximum, .sum = sum};
    tops_cpu->attend(&item);
    memcpy(job->maximum + place, maximum, (size_t)(run->tokens * heads) * sizeof *maximum);
    memcpy(job->sum + place, sum, (size_t)(run->tokens * heads) * sizeof *sum);
    if (job->splits == 1 || atomic_fetch_sub(&job->open[(run - job->runs) * job->g + head].spans, 1) == 1) merge(job, run, head);
}

static int plan(tops_stream *stream, void *context) {
    attention_job *job = context;
    const tops_batch *batch = &job->batch;
    int64_t n = batch->n, h = job->h, g = job->g, width = job->width;
    tops_scratch scratch = scratch_of(stream);
    row_run *runs = scratch_take(&scratch, n * (int64_t)sizeof *runs);
    REQUIRE_SCRATCH(runs);
    int64_t count = 0, most = QUERIES / (h / g * width), longest = 0;
    if (most > TOKENS) most = TOKENS;
    for (int64_t t = 0; t < n; t++) {
        row_run *last = runs + count - 1;
        int64_t position = batch->positions[t];
        REQUIRE(position >= 0 && position < batch->max_pages * job->kv.page_size, "positions[%lld]: outside the page table: %lld", (long long)t,
                (long long)position);
        if (position + 1 > longest) longest = position + 1;
        if (count && batch->sequences[last->first] == batch->sequences[t] && last->tokens < most) last->tokens++;
        else runs[count++] = (row_run){(int32_t)t, 1};
    }
    int64_t threads = tops_team_threads(stream->team), wanted = threads * (longest > SPAN ? 4 : 2), splits = (wanted + count * g - 1) / (count * g);
    while (threads > 1 && splits > 1 && splits < 2 * threads && count * g * splits % threads) splits++;   /* the same number for each thread */
    if (splits > (longest + LEAST - 1) / LEAST) splits = (longest + LEAST - 1) / LEAST;
    if (splits * n > n + 64) splits = (n + 64) / n;   /* what tops_scratch_bytes provides for */
    job->runs = runs;
    job->splits = splits;
    job->span = ((longest + splits - 1) / splits + LEAST - 1) / LEAST * LEAST;
    job->items = count * g * splits;
    job->partial = scratch_take(&scratch, splits * n * h * width * 4);
    job->maximum = scratch_take(&scratch, splits * n * h * 4);
    job->sum = scratch_take(&scratch, splits * n * h * 4);
    job->open = scratch_take(&scratch, splits > 1 ? count * g * (int64_t)sizeof *job->open : 0);
    REQUIRE_SCRATCH(job->open);
    for (int64_t i = 0; splits > 1 && i < count * g; i++) atomic_init(&job->open[i].spans, (int32_t)splits);
    return TOPS_OK;
}

/* Where there may be more items than a stage takes. */
static int attention(tops_stream *stream, void *context) {
    attention_job *job = context;
    int status = plan(stream, context);
    if (!status) tops_team_run(stream, job->items, attend_item, job);
    return status;
}

int tops_paged_attention(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch,
                         int64_t h, int64_t g, int64_t p, float scale, int32_t gated, int32_t dtype) {
    int64_t n = batch->n, width = (p + 15) / 16 * 16;
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    REQUIRE(g >= 1 && h % g == 0, "h: must be a multiple of g = %lld, not %lld", (long long)g, (long long)h);
    REQUIRE(p >= 1 && width <= 256 && h / g * width <= QUERIES, "p: must be in 1..256 with at most 16384 values in a group of heads, not %lld", (long long)p);
    int status = check_cache(kv);
    if (status || n == 0) return status;
    attention_job job = {.out = out, .qkv = qkv, .kv = *kv, .batch = *batch, .h = h, .g = g, .p = p, .width = width,
                         .row_cols = ((gated ? 2 * h : h) + 2 * g) * p, .scale = scale, .gated = gated, .dtype = dtype};
    if (n * g + 4 * tops_team_threads(stream->team) > MOST_ITEMS) return tops_do(stream, &(tops_stage){.serial = attention}, 1, &job, sizeof job);
    tops_stage stages[] = {{.serial = plan}, {.task = attend_item, .count_at = offsetof(attention_job, items)}};
    return tops_do(stream, stages, 2, &job, sizeof job);
}

int tops_rope_attention(tops_stream *stream, void *out, void *qkv, const tops_kv *kv, const tops_batch *batch, const float *table,
                        const float *q_norm, const float *k_norm, int64_t h, int64_t g, int64_t p, int64_t r,
                        int32_t pairs, int32_t gated, float scale, float eps, int32_t dtype) {
    int status = tops_qk_norm_rope_store(stream, qkv, kv, batch, table, q_norm, k_norm, h, g, p, r, pairs, gated, eps, dtype);
    return status ? status : tops_paged_attention(stream, out, qkv, kv, batch, h, g, p, scale, gated, dtype);
}
