/* Rounding f32 to what files hold, and between storage formats. */
#include "internal.h"
#include "number.h"

static void quantize_block(unsigned char *out, const float *x, int dtype) {
    float most = 0, signed_most = 0;
    for (int c = 0; c < BLOCK; c++) {
        if (fabsf(x[c]) > most) {
            most = fabsf(x[c]);
            signed_most = x[c];
        }
    }
    /* Q4_0 codes are -8..7, so the largest value gets -8; Q8_0 codes are -127..127. */
    float scale = dtype == TOPS_Q8_0 ? most / 127 : signed_most / -8, inverse = scale != 0 ? 1 / scale : 0;
    uint16_t bits = f16_of_float(scale);
    memcpy(out, &bits, 2);
    for (int c = 0; c < BLOCK; c++) {
        if (dtype == TOPS_Q8_0) {
            out[2 + c] = (unsigned char)(int8_t)roundf(x[c] * inverse);
        } else {
            int code = (int)(x[c] * inverse + 8.5f);
            code = code > 15 ? 15 : code;
            out[2 + c % 16] = (unsigned char)(c < 16 ? code : out[2 + c % 16] | code << 4);
        }
    }
}

typedef struct {
    unsigned char *out;
    const float *in;
    int dtype;
    int64_t cols;
} quantize_job;

static void quantize_file_row(void *context, int64_t row) {
    const quantize_job *job = context;
    int64_t bytes = job->dtype == TOPS_Q8_0 ? 34 : 18, blocks = job->cols / BLOCK;
    for (int64_t b = 0; b < blocks; b++) quantize_block(job->out + (row * blocks + b) * bytes, job->in + row * job->cols + b * BLOCK, job->dtype);
}

int tops_quantize(tops_stream *stream, void *out, const float *in, int32_t dtype, int64_t rows, int64_t cols) {
    if (dtype == TOPS_F16 || dtype == TOPS_BF16) return tops_convert(stream, out, dtype, in, TOPS_F32, rows * cols);
    if (dtype != TOPS_Q8_0 && dtype != TOPS_Q4_0) return tops_fail(TOPS_UNSUPPORTED, "dtype: rounds to Q8_0, Q4_0, f16 and bf16, not %d", dtype);
    REQUIRE(cols % BLOCK == 0, "cols: must be a multiple of 32, not %lld", (long long)cols);
    quantize_job job = {out, in, dtype, cols};
    tops_team_run(stream, rows, quantize_file_row, &job);
    return TOPS_OK;
}

int tops_convert(tops_stream *stream, void *out, int32_t out_dtype, const void *in, int32_t in_dtype, int64_t count) {
    (void)stream;
    for (int i = 0; i < 2; i++) {
        int dtype = i ? in_dtype : out_dtype;
        REQUIRE(dtype == TOPS_F32 || dtype == TOPS_F16 || dtype == TOPS_BF16, "%s_dtype: must be f32, f16 or bf16, not %d", i ? "in" : "out", dtype);
    }
    float part[256];
    for (int64_t i = 0; i < count; i += 256) {
        int64_t size = count - i < 256 ? count - i : 256;
        tops_cpu->load_row(part, (const unsigned char *)in + i * (int64_t)storage_bytes(in_dtype), in_dtype, size);
        tops_cpu->store_row((unsigned char *)out + i * (int64_t)storage_bytes(out_dtype), part, out_dtype, size);
    }
    return TOPS_OK;
}
