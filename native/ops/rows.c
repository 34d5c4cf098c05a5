/* Ops on single rows: embedding, gathering, norm, SiLU product. */
#include <string.h>

#include "../cpu/internal.h"

enum { PART = 256 };

typedef struct {
    unsigned char *out;
    tops_weight w;
    const int32_t *ids;
    int64_t n;
    int32_t dtype;
} embed_call;

static int embed(tops_stream *stream, void *arguments) {
    const embed_call *call = arguments;
    const tops_weight *w = &call->w;
    tops_scratch scratch = scratch_of(stream);
    float *row = scratch_take(&scratch, w->cols * 4);
    REQUIRE_SCRATCH(row);
    int64_t bytes = w->cols * (int64_t)storage_bytes(call->dtype);
    for (int64_t t = 0; t < call->n; t++) {
        unsigned char *to = call->out + t * bytes;
        if (call->ids[t] < 0 || call->ids[t] >= w->rows) {
            memset(to, 0, (size_t)bytes);
            continue;
        }
        int status = tops_unpack_rows(stream, row, w, call->ids[t], 1);
        if (status) return status;
        tops_cpu->store_row(to, row, call->dtype, w->cols);
    }
    return TOPS_OK;
}

int tops_embed(tops_stream *stream, void *out, const tops_weight *w, const int32_t *ids, int64_t n, int32_t dtype) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    return CALL(embed, embed_call, out, *w, ids, n, dtype);
}

typedef struct {
    unsigned char *out;
    const unsigned char *in;
    const int32_t *rows;
    int64_t n;
    size_t bytes;
} gather_call;

static int gather(tops_stream *stream, void *arguments) {
    const gather_call *call = arguments;
    (void)stream;
    for (int64_t t = 0; t < call->n; t++) memcpy(call->out + (size_t)t * call->bytes, call->in + (size_t)call->rows[t] * call->bytes, call->bytes);
    return TOPS_OK;
}

int tops_gather_rows(tops_stream *stream, void *out, const void *in, const int32_t *rows, int64_t n, int64_t d, int32_t dtype) {
    return CALL(gather, gather_call, out, in, rows, n, (size_t)d * storage_bytes(dtype));
}

typedef struct {
    unsigned char *out;
    const unsigned char *x;
    const float *weight;
    int64_t n, d;
    float eps;
    int32_t dtype;
} norm_call;

static int rms_norm(tops_stream *stream, void *arguments) {
    const norm_call *call = arguments;
    tops_scratch scratch = scratch_of(stream);
    float *row = scratch_take(&scratch, call->d * 4);
    REQUIRE_SCRATCH(row);
    int64_t bytes = call->d * (int64_t)storage_bytes(call->dtype);
    for (int64_t t = 0; t < call->n; t++) {
        tops_cpu->load_row(row, call->x + t * bytes, call->dtype, call->d);
        tops_cpu->rms_norm(row, row, call->weight, call->d, call->eps);
        tops_cpu->store_row(call->out + t * bytes, row, call->dtype, call->d);
    }
    return TOPS_OK;
}

int tops_rms_norm(tops_stream *stream, void *out, const void *x, const float *weight, int64_t n, int64_t d, float eps, int32_t dtype) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    return CALL(rms_norm, norm_call, out, x, weight, n, d, eps, dtype);
}

typedef struct {
    unsigned char *out;
    const unsigned char *x;
    int64_t n, i;
    int32_t dtype;
} silu_call;

static int silu_mul(tops_stream *stream, void *arguments) {
    const silu_call *call = arguments;
    (void)stream;
    int64_t i = call->i, size = (int64_t)storage_bytes(call->dtype);
    float gate[PART], up[PART];
    for (int64_t t = 0; t < call->n; t++) {
        const unsigned char *in = call->x + t * 2 * i * size;
        for (int64_t c = 0; c < i; c += PART) {
            int64_t count = i - c < PART ? i - c : PART;
            tops_cpu->load_row(gate, in + c * size, call->dtype, count);
            tops_cpu->load_row(up, in + (i + c) * size, call->dtype, count);
            tops_cpu->silu_mul(gate, gate, up, count);
            tops_cpu->store_row(call->out + (t * i + c) * size, gate, call->dtype, count);
        }
    }
    return TOPS_OK;
}

int tops_silu_mul(tops_stream *stream, void *out, const void *x, int64_t n, int64_t i, int32_t dtype) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    return CALL(silu_mul, silu_call, out, x, n, i, dtype);
}
