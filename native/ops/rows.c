/* Ops on single rows: embedding, gathering, norm, SiLU product. */
#include <string.h>

#include "../cpu/internal.h"

enum { PART = 256 };

int tops_embed(tops_stream *stream, void *out, const tops_weight *w, const int32_t *ids, int64_t n, int32_t dtype) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    tops_scratch scratch = scratch_of(stream);
    float *row = scratch_take(&scratch, w->cols * 4);
    REQUIRE_SCRATCH(row);
    int64_t bytes = w->cols * (int64_t)storage_bytes(dtype);
    for (int64_t t = 0; t < n; t++) {
        unsigned char *to = (unsigned char *)out + t * bytes;
        if (ids[t] < 0 || ids[t] >= w->rows) {
            memset(to, 0, (size_t)bytes);
            continue;
        }
        int status = tops_unpack_rows(stream, row, w, ids[t], 1);
        if (status) return status;
        tops_cpu->store_row(to, row, dtype, w->cols);
    }
    return TOPS_OK;
}

int tops_gather_rows(tops_stream *stream, void *out, const void *in, const int32_t *rows, int64_t n, int64_t d, int32_t dtype) {
    (void)stream;
    size_t bytes = (size_t)d * storage_bytes(dtype);
    for (int64_t t = 0; t < n; t++) memcpy((unsigned char *)out + (size_t)t * bytes, (const unsigned char *)in + (size_t)rows[t] * bytes, bytes);
    return TOPS_OK;
}

int tops_rms_norm(tops_stream *stream, void *out, const void *x, const float *weight, int64_t n, int64_t d, float eps, int32_t dtype) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    tops_scratch scratch = scratch_of(stream);
    float *row = scratch_take(&scratch, d * 4);
    REQUIRE_SCRATCH(row);
    int64_t bytes = d * (int64_t)storage_bytes(dtype);
    for (int64_t t = 0; t < n; t++) {
        tops_cpu->load_row(row, (const unsigned char *)x + t * bytes, dtype, d);
        tops_cpu->rms_norm(row, row, weight, d, eps);
        tops_cpu->store_row((unsigned char *)out + t * bytes, row, dtype, d);
    }
    return TOPS_OK;
}

int tops_silu_mul(tops_stream *stream, void *out, const void *x, int64_t n, int64_t i, int32_t dtype) {
    (void)stream;
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    int64_t size = (int64_t)storage_bytes(dtype);
    float gate[PART], up[PART];
    for (int64_t t = 0; t < n; t++) {
        const unsigned char *in = (const unsigned char *)x + t * 2 * i * size;
        for (int64_t c = 0; c < i; c += PART) {
            int64_t count = i - c < PART ? i - c : PART;
            tops_cpu->load_row(gate, in + c * size, dtype, count);
            tops_cpu->load_row(up, in + (i + c) * size, dtype, count);
            tops_cpu->silu_mul(gate, gate, up, count);
            tops_cpu->store_row((unsigned char *)out + (t * i + c) * size, gate, dtype, count);
        }
    }
    return TOPS_OK;
}
