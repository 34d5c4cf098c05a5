/* The gated delta rule with its convolution in front and its gated norm behind (Yang, Kautz, Hatamizadeh 2024).
 *
 * One item of work is a sequence and a key head with the value heads that read it: no two items touch the same channel or the same
 * part of a state, so a slot may be read and kept in place. Rows are taken one by one, in long prompts too: a head's memory stays in
 * the cache, and the chunked form has more multiplications than it saves loads on a processor.
 */
#include <string.h>

#include "../cpu/internal.h"
#include "../cpu/number.h"

enum { ROWS = 16 };      /* rows of x gathered at once */

/* Channels that belong to an item: where they begin among all channels and among its own. */
typedef struct {
    int64_t from, to, count;
} channel_span;

typedef struct {
    unsigned char *out;
    const unsigned char *x;
    const float *conv, *decay, *dt_bias, *norm;
    const tops_states *states;
    const tops_batch *batch;
    float eps;
    int32_t dtype;
    int64_t channels, width, group, own;     /* of all heads; of a row of x; value heads of a key head; channels of an item */
    int64_t first, floats;                   /* of the items in this run; scratch of one */
    float *scratch;
} delta_job;

static void spans_of(const delta_job *job, int64_t j, channel_span spans[3]) {
    const tops_states *s = job->states;
    int64_t values = job->group * s->pv;
    spans[0] = (channel_span){j * s->pk, 0, s->pk};
    spans[1] = (channel_span){(s->hk + j) * s->pk, s->pk, s->pk};
    spans[2] = (channel_span){2 * s->hk * s->pk + j * values, 2 * s->pk, values};
}

/* Rows t .. t + rows - 1 of x, an item's channels only. */
static void gather(const delta_job *job, const channel_span spans[3], float *raw, int64_t t, int64_t rows) {
    for (int64_t end = t + rows; t < end; t++, raw += job->own)
        for (const channel_span *s = spans; s < spans + 3; s++)
            tops_cpu->load_row(raw + s->to, job->x + (t * job->width + s->from) * (int64_t)storage_bytes(job->dtype), job->dtype, s->count);
}

static void load_state(const delta_job *job, const channel_span spans[3], int64_t j, int32_t slot, float *memory, float *raw) {
    const tops_states *s = job->states;
    int64_t size = job->group * s->pk * s->pv, before = s->taps - 1;
    if (slot < 0) {
        memset(memory, 0, (size_t)size * 4);
        memset(raw, 0, (size_t)(before * job->own) * 4);
        return;
    }
    memcpy(memory, s->memory + slot * s->pitch + j * size, (size_t)size * 4);
    for (int64_t m = 0; m < before; m++)
        for (int i = 0; i < 3; i++)
            memcpy(raw + m * job->own + spans[i].to, s->inputs + slot * s->pitch + m * job->channels + spans[i].from, (size_t)spans[i].count * 4);
}

static void store_state(const delta_job *job, const channel_span spans[3], int64_t j, int32_t slot, const float *memory, const float *raw) {
    const tops_states *s = job->states;
    int64_t size = job->group * s->pk * s->pv;
    memcpy(s->memory + slot * s->pitch + j * size, memory, (size_t)size * 4);
    for (int64_t m = 0; m < s->taps - 1; m++)
        for (int i = 0; i < 3; i++)
            memcpy(s->inputs + slot * s->pitch + m * job->channels + spans[i].from, raw + m * job->own + spans[i].to, (size_t)spans[i].count * 4);
}

static float one(const delta_job *job, int64_t index) {
    float value;
    tops_cpu->load_row(&value, job->x + index * (int64_t)storage_bytes(job->dtype), job->dtype, 1);
    return value;
}

static void l2_norm(float *x, int64_t count, float scale) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
    scale /= sqrtf(sum + 1e-6f);
    for (int64_t i = 0; i < count; i++) x[i] *= scale;
}

/* Row t for every value head of key head j; u = [q | k | v] after the convolution, work holds 2 pv values. */
static void delta_row(const delta_job *job, int64_t j, int64_t t, float *u, float *memory, float *work) {
    const tops_states *s = job->states;
    int64_t pk = s->pk, pv = s->pv, values = s->hv * pv, size = (int64_t)storage_bytes(job->dtype);
    float *o = work, *z = work + pv;
    l2_norm(u, pk, 1.0f / sqrtf((float)pk));
    l2_norm(u + pk, pk, 1.0f);
    for (int64_t i = 0, head = j * job->group; i < job->group; i++, head++) {
        int64_t gates = t * job->width + job->channels + values + head;
        float beta = 1.0f / (1.0f + expf(-one(job, gates))), step = one(job, gates + s->hv) + job->dt_bias[head];
        float g = expf(job->decay[head] * (step > 20.0f ? step : log1pf(expf(step))));
        tops_cpu->delta_step(o, memory + i * pk * pv, u, u + pk, u + 2 * pk + i * pv, g, beta, pk, pv);
        tops_cpu->rms_norm(o, o, job->norm, pv, job->eps);
        tops_cpu->load_row(z, job->x + (t * job->width + job->channels + head * pv) * size, job->dtype, pv);
        tops_cpu->silu_mul(o, z, o, pv);
        tops_cpu->store_row(job->out + (t * values + head * pv) * size, o, job->dtype, pv);
    }
}

static void delta_item(void *context, int64_t index) {
    const delta_job *job = context;
    const tops_states *s = job->states;
    int64_t item = job->first + index, sequence = item / s->hk, j = item % s->hk, before = s->taps - 1, own = job->own;
    int64_t row = job->batch->query_starts[sequence], end = job->batch->query_starts[sequence + 1];
    if (row == end) return;
    channel_span spans[3];
    spans_of(job, j, spans);
    float *memory = job->scratch + index * job->floats, *raw = memory + job->group * s->pk * s->pv, *u = raw + (ROWS + before) * own;
    float *taps = u + ROWS * own, *work = taps + s->taps * own;
    for (int i = 0; i < 3; i++)
        for (int64_t c = 0; c < spans[i].count; c++)
            for (int64_t m = 0; m < s->taps; m++) taps[m * own + spans[i].to + c] = job->conv[(spans[i].from + c) * s->taps + m];
    load_state(job, spans, j, job->batch->states_in[sequence], memory, raw);
    for (int64_t rows; row < end; row += rows) {
        rows = end - row < ROWS ? end - row : ROWS;
        gather(job, spans, raw + before * own, row, rows);
        for (int64_t t = 0; t < rows; t++) {
            tops_cpu->convolve_silu(u + t * own, raw + t * own, taps, s->taps, own);
            delta_row(job, j, row + t, u + t * own, memory, work);
            int32_t slot = job->batch->states_out[row + t];
            if (slot >= 0) store_state(job, spans, j, slot, memory, raw + (t + 1) * own);
        }
        memmove(raw, raw + rows * own, (size_t)(before * own) * 4);
    }
}

typedef struct {
    void *out;
    const void *x;
    const float *conv, *decay, *dt_bias, *norm;
    tops_states states;
    tops_batch batch;
    float eps;
    int32_t dtype;
} delta_call;

static int gated_delta_rule(tops_stream *stream, void *arguments) {
    const delta_call *call = arguments;
    const tops_states *s = &call->states;
    const tops_batch *batch = &call->batch;
    for (int64_t b = 0; b < batch->b; b++)
        REQUIRE(batch->states_in[b] < s->slots, "states_in[%lld]: must be below %lld, not %d", (long long)b, (long long)s->slots, batch->states_in[b]);
    for (int64_t t = 0; t < batch->n; t++)
        REQUIRE(batch->states_out[t] < s->slots, "states_out[%lld]: must be below %lld, not %d", (long long)t, (long long)s->slots, batch->states_out[t]);
    delta_job job = {.out = call->out, .x = call->x, .conv = call->conv, .decay = call->decay, .dt_bias = call->dt_bias, .norm = call->norm,
                     .states = s, .batch = batch, .eps = call->eps, .dtype = call->dtype, .group = s->hv / s->hk};
    job.channels = 2 * s->hk * s->pk + s->hv * s->pv;
    job.width = job.channels + s->hv * s->pv + 2 * s->hv;
    job.own = 2 * s->pk + job.group * s->pv;
    job.floats = job.group * s->pk * s->pv + (2 * ROWS + 2 * s->taps - 1) * job.own + 2 * s->pv;
    /* As many items at once as scratch has room for. */
    int64_t items = batch->n ? batch->b * s->hk : 0, most = stream->scratch_bytes / (job.floats * 4);
    job.scratch = (float *)stream->scratch;
    REQUIRE_SCRATCH(most ? stream->scratch : NULL);
    for (; job.first < items; job.first += most) tops_team_run(stream, items - job.first < most ? items - job.first : most, delta_item, &job);
    return TOPS_OK;
}

int tops_gated_delta_rule(tops_stream *stream, void *out, const void *x, const float *conv, const float *decay, const float *dt_bias,
                          const float *norm, const tops_states *states, const tops_batch *batch, float eps, int32_t dtype) {
    const tops_states *s = states;
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    REQUIRE(s->hk > 0 && s->hv > 0 && s->hv % s->hk == 0, "states: hv must be a multiple of hk, not %d of %d", s->hv, s->hk);
    REQUIRE(s->pk > 0 && s->pv > 0 && s->taps > 0, "states: pk, pv and taps must be positive, not %d, %d, %d", s->pk, s->pv, s->taps);
    return CALL(gated_delta_rule, delta_call, out, x, conv, decay, dt_bias, norm, *states, *batch, eps, dtype);
}
