/* Rotary position embedding (Su et al. 2021), with the norm of queries and keys and the store into the cache in one pass. */
#include <math.h>
#include <string.h>

#include "../cpu/internal.h"

enum { HEAD_MAX = 256 };

typedef struct {
    float *table;
    const int32_t *positions;
    const float *inv_freq;
    int64_t n, half;
} table_call;

static int rope_table(tops_stream *stream, void *arguments) {
    const table_call *call = arguments;
    (void)stream;
    for (int64_t t = 0; t < call->n; t++) {
        for (int64_t j = 0; j < call->half; j++) {
            float angle = (float)call->positions[t] * call->inv_freq[j];
            call->table[(t * call->half + j) * 2] = cosf(angle);
            call->table[(t * call->half + j) * 2 + 1] = sinf(angle);
        }
    }
    return TOPS_OK;
}

int tops_rope_table(tops_stream *stream, float *table, const int32_t *positions, const float *inv_freq, int64_t n, int64_t r) {
    REQUIRE(r >= 0 && r % 2 == 0, "r: must be even and at least 0, not %lld", (long long)r);
    return CALL(rope_table, table_call, table, positions, inv_freq, n, r / 2);
}

typedef struct {
    unsigned char *qkv;
    tops_kv kv;
    tops_batch batch;
    const float *table, *q_norm, *k_norm;
    int64_t h, g, p, r;
    int pairs, gated, dtype;
    float eps;
} rope_call;

static void rotate(float *x, const float *table, int64_t r, int pairs) {
    int64_t step = pairs ? 2 : 1, other = pairs ? 1 : r / 2;
    for (int64_t j = 0; j < r / 2; j++) {
        float a = x[j * step], b = x[j * step + other], c = table[2 * j], s = table[2 * j + 1];
        x[j * step] = a * c - b * s;
        x[j * step + other] = b * c + a * s;
    }
}

static void rope_row(void *context, int64_t t) {
    const rope_call *call = context;
    int64_t h = call->h, g = call->g, p = call->p, size = (int64_t)storage_bytes(call->dtype);
    unsigned char *row = call->qkv + t * ((call->gated ? 2 * h : h) + 2 * g) * p * size;
    int64_t slot = call->batch.slots[t], page = slot / call->kv.page_size, in_page = slot % call->kv.page_size;
    float head[HEAD_MAX];
    for (int64_t j = 0; j < h + 2 * g; j++) {
        tops_cpu->load_row(head, row + j * p * size, call->dtype, p);
        const float *norm = j < h ? call->q_norm : call->k_norm;
        if (j < h + g) {
            if (norm) tops_cpu->rms_norm(head, head, norm, p, call->eps);
            rotate(head, call->table + t * call->r, call->r, call->pairs);
        }
        if (j < h) {
            tops_cpu->store_row(row + j * p * size, head, call->dtype, p);
            continue;
        }
        int64_t kv_head = (j - h) % g, place = (page * g + kv_head) * call->kv.page_size + in_page;
        unsigned char *cache = j < h + g ? call->kv.k : call->kv.v;
        tops_cpu->store_cached(cache + place * cached_row_bytes(call->kv.dtype, p), head, call->kv.dtype, p);
    }
}

static int rope(tops_stream *stream, void *arguments) {
    rope_call *call = arguments;
    const tops_batch *batch = &call->batch;
    for (int64_t t = 0; t < batch->n; t++)
        REQUIRE(batch->slots[t] >= 0 && batch->slots[t] < call->kv.pages * call->kv.page_size, "slots[%lld]: outside the cache: %d", (long long)t,
                batch->slots[t]);
    if (batch->n < 4) for (int64_t t = 0; t < batch->n; t++) rope_row(call, t);
    else tops_team_run(stream, batch->n, rope_row, call);
    return TOPS_OK;
}

int tops_qk_norm_rope_store(tops_stream *stream, void *qkv, const tops_kv *kv, const tops_batch *batch, const float *table,
                            const float *q_norm, const float *k_norm, int64_t h, int64_t g, int64_t p, int64_t r,
                            int32_t pairs, int32_t gated, float eps, int32_t dtype) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    REQUIRE(p >= 1 && p <= HEAD_MAX, "p: must be in 1..256, not %lld", (long long)p);
    REQUIRE(r >= 0 && r <= p && r % 2 == 0, "r: must be even and at most p, not %lld", (long long)r);
    int status = check_cache(kv);
    return status ? status : CALL(rope, rope_call, qkv, *kv, *batch, table, q_norm, k_norm, h, g, p, r, pairs, gated, dtype, eps);
}
