/* Rotary position embedding (Su et al. 2021), with the norm of queries and keys and the store into the cache in one pass. */
#include <math.h>
#include <string.h>

#include "../cpu/internal.h"

enum { HEAD_MAX = 256 };

int tops_rope_table(tops_stream *stream, float *table, const int32_t *positions, const float *inv_freq, int64_t n, int64_t r) {
    (void)stream;
    REQUIRE(r >= 0 && r % 2 == 0, "r: must be even and at least 0, not %lld", (long long)r);
    for (int64_t t = 0; t < n; t++) {
        for (int64_t j = 0; j < r / 2; j++) {
            float angle = (float)positions[t] * inv_freq[j];
            table[(t * (r / 2) + j) * 2] = cosf(angle);
            table[(t * (r / 2) + j) * 2 + 1] = sinf(angle);
        }
    }
    return TOPS_OK;
}

typedef struct {
    unsigned char *qkv;
    const tops_kv *kv;
    const tops_batch *batch;
    const float *table, *q_norm, *k_norm;
    int64_t h, g, p, r;
    int pairs, gated, dtype;
    float eps;
} rope_job;

static void rotate(float *x, const float *table, int64_t r, int pairs) {
    int64_t step = pairs ? 2 : 1, other = pairs ? 1 : r / 2;
    for (int64_t j = 0; j < r / 2; j++) {
        float a = x[j * step], b = x[j * step + other], c = table[2 * j], s = table[2 * j + 1];
        x[j * step] = a * c - b * s;
        x[j * step + other] = b * c + a * s;
    }
}

static void rope_row(void *context, int64_t t) {
    const rope_job *job = context;
    int64_t h = job->h, g = job->g, p = job->p, size = (int64_t)storage_bytes(job->dtype);
    unsigned char *row = job->qkv + t * ((job->gated ? 2 * h : h) + 2 * g) * p * size;
    int64_t slot = job->batch->slots[t], page = slot / job->kv->page_size, in_page = slot % job->kv->page_size;
    float head[HEAD_MAX];
    for (int64_t j = 0; j < h + 2 * g; j++) {
        tops_cpu->load_row(head, row + j * p * size, job->dtype, p);
        const float *norm = j < h ? job->q_norm : job->k_norm;
        if (j < h + g) {
            if (norm) tops_cpu->rms_norm(head, head, norm, p, job->eps);
            rotate(head, job->table + t * job->r, job->r, job->pairs);
        }
        if (j < h) {
            tops_cpu->store_row(row + j * p * size, head, job->dtype, p);
            continue;
        }
        int64_t kv_head = (j - h) % g, place = (page * g + kv_head) * job->kv->page_size + in_page;
        unsigned char *cache = j < h + g ? job->kv->k : job->kv->v;
        tops_cpu->store_cached(cache + place * cached_row_bytes(job->kv->dtype, p), head, job->kv->dtype, p);
    }
}

int tops_qk_norm_rope_store(tops_stream *stream, void *qkv, const tops_kv *kv, const tops_batch *batch, const float *table,
                            const float *q_norm, const float *k_norm, int64_t h, int64_t g, int64_t p, int64_t r,
                            int32_t pairs, int32_t gated, float eps, int32_t dtype) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    REQUIRE(p >= 1 && p <= HEAD_MAX, "p: must be in 1..256, not %lld", (long long)p);
    REQUIRE(r >= 0 && r <= p && r % 2 == 0, "r: must be even and at most p, not %lld", (long long)r);
    int status = check_cache(kv);
    if (status) return status;
    for (int64_t t = 0; t < batch->n; t++)
        REQUIRE(batch->slots[t] >= 0 && batch->slots[t] < kv->pages * kv->page_size, "slots[%lld]: outside the cache: %d", (long long)t, batch->slots[t]);
    rope_job job = {qkv, kv, batch, table, q_norm, k_norm, h, g, p, r, pairs, gated, dtype, eps};
    if (batch->n < 4) for (int64_t t = 0; t < batch->n; t++) rope_row(&job, t);
    else tops_team_run(stream->team, batch->n, rope_row, &job);
    return TOPS_OK;
}
