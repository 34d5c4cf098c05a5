/* From rows as files hold them to packed groups, and back to f32 (formats.h draws the layout). */
#include <stdlib.h>

#include "formats.h"

bool tops_is_quantised(int dtype) { return format_of(dtype).super != 0; }

int64_t tops_group_bytes(int dtype, int64_t cols) {
    tops_format f = format_of(dtype);
    if (f.super) return cols % f.super ? -1 : cols / f.super * super_bytes(f);
    switch (dtype) {
    case TOPS_F32: return cols * GROUP * 4;
    case TOPS_F16: return cols * GROUP * 2;
    case TOPS_BF16: return (cols + 1) / 2 * GROUP * 4;
    case TOPS_FP8_E4M3: return cols * GROUP;
    default: return -1;
    }
}

int64_t tops_packed_bytes(int32_t dtype, int64_t rows, int64_t cols) {
    int64_t group = rows < 0 || cols < 0 ? -1 : tops_group_bytes(dtype, cols);
    return group < 0 ? -1 : group_count(rows) * group;
}

/* Bytes of a row of 32 (or 256) columns in a file. */
static int64_t file_super_bytes(int dtype) {
    switch (dtype) {
    case TOPS_Q4_0: return 18;
    case TOPS_Q4_1: return 20;
    case TOPS_Q5_0: return 22;
    case TOPS_Q5_1: return 24;
    case TOPS_Q8_0: return 34;
    case TOPS_Q4_K: return 144;
    case TOPS_Q5_K: return 176;
    default: return 210;
    }
}

/* Six-bit scale and minimum of sub-block j in the 12 bytes of a Q4_K or Q5_K block. */
static void scale_min(const unsigned char *packed, int j, unsigned char *scale, unsigned char *minimum) {
    if (j < 4) {
        *scale = packed[j] & 63;
        *minimum = packed[j + 4] & 63;
    } else {
        *scale = (unsigned char)((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
        *minimum = (unsigned char)(packed[j + 4] >> 4 | (packed[j] >> 6) << 4);
    }
}

static void pack_super(int dtype, tops_format f, unsigned char *header, const unsigned char *in, int row) {
    unsigned char *block = header + f.header;
    if (f.super == BLOCK) {
        bool minimum = f.minimum;
        memcpy(block + 2 * row, in, 2);
        if (minimum) memcpy(block + 32 + 2 * row, in + 2, 2);
        const unsigned char *codes = in + (minimum ? 4 : 2), *high = codes;
        if (f.bits == 5) codes += 4;
        for (int c = 0; c < BLOCK; c++) {
            int code = f.bits == 8 ? codes[c] ^ 0x80 : codes[c % 16] >> (c / 16 * 4) & 15;
            if (f.bits == 5) code |= (high[c / 8] >> c % 8 & 1) << 4;
            set_code(f, block, row, c, code);
        }
        return;
    }
    const unsigned char *d = dtype == TOPS_Q6_K ? in + 208 : in;
    memcpy(header + 2 * row, d, 2);
    if (f.minimum) memcpy(header + 32 + 2 * row, in + 2, 2);
    for (int s = 0; s < 8; s++, block += block_bytes(f)) {
        if (dtype == TOPS_Q6_K) {
            block[row] = in[192 + 2 * s];
            block[16 + row] = in[192 + 2 * s + 1];
        } else {
            scale_min(in + 4, s, block + row, block + 16 + row);
        }
        for (int c = 0; c < BLOCK; c++) {
            int code;
            if (dtype == TOPS_Q6_K) {
                const unsigned char *low = in + s / 4 * 64 + s % 2 * 32, *high = in + 128 + s / 4 * 32;
                code = (low[c] >> (s % 4 / 2 * 4) & 15) | (high[c] >> (s % 4 * 2) & 3) << 4;
            } else {
                const unsigned char *low = in + (dtype == TOPS_Q5_K ? 48 : 16) + s / 2 * 32;
                code = low[c] >> (s % 2 * 4) & 15;
                if (dtype == TOPS_Q5_K) code |= (in[16 + c] >> s & 1) << 4;
            }
            set_code(f, block, row, c, code);
        }
    }
}

typedef struct {
    unsigned char *out;
    const unsigned char *in;
    int dtype;
    int64_t rows, cols, group_bytes;
} pack_job;

static void pack_group(void *context, int64_t item) {
    const pack_job *job = context;
    unsigned char *group = job->out + item * job->group_bytes;
    int64_t cols = job->cols, first = item * GROUP;
    int count = job->rows - first < GROUP ? (int)(job->rows - first) : GROUP;
    memset(group, 0, (size_t)job->group_bytes);
    tops_format f = format_of(job->dtype);
    if (f.super) {
        int64_t supers = cols / f.super, bytes = file_super_bytes(job->dtype);
        for (int64_t s = 0; s < supers; s++)
            for (int row = 0; row < count; row++)
                pack_super(job->dtype, f, group + s * super_bytes(f), job->in + ((first + row) * supers + s) * bytes, row);
        return;
    }
    int size = job->dtype == TOPS_F32 ? 4 : job->dtype == TOPS_FP8_E4M3 ? 1 : 2;
    for (int row = 0; row < count; row++) {
        const unsigned char *in = job->in + (first + row) * cols * size;
        for (int64_t c = 0; c < cols; c++) {
            int64_t place = job->dtype == TOPS_BF16 ? (c / 2 * GROUP + row) * 2 + c % 2 : c * GROUP + row;
            memcpy(group + place * size, in + c * size, (size_t)size);
        }
    }
}

int tops_pack(tops_stream *stream, void *out, const void *in, int32_t dtype, int64_t rows, int64_t cols) {
    if (tops_packed_bytes(dtype, rows, cols) < 0)
        return tops_fail(TOPS_UNSUPPORTED, "dtype: no packed layout for dtype %d with %lld x %lld", dtype, (long long)rows, (long long)cols);
    pack_job job = {out, in, dtype, rows, cols, tops_group_bytes(dtype, cols)};
    tops_team_run(stream->team, group_count(rows), pack_group, &job);
    return TOPS_OK;
}

static void unpack_row(float *out, const tops_weight *w, int64_t index) {
    int dtype = w->dtype, row = (int)(index % GROUP);
    const unsigned char *group = (const unsigned char *)w->data + index / GROUP * tops_group_bytes(dtype, w->cols);
    tops_format f = format_of(dtype);
    if (f.super) {
        for (int64_t b = 0; b < w->cols / BLOCK; b++) {
            const unsigned char *header = header_at(f, group, b), *block = block_at(f, group, b);
            for (int half = 0; half < 2; half++) {
                float scale, minimum;
                affine_of(dtype, header, block, row, half, &scale, &minimum);
                for (int c = 16 * half; c < 16 * half + 16; c++)
                    out[b * BLOCK + c] = scale * (float)(code_at(f, block, row, c) - f.offset) + minimum;
            }
        }
        return;
    }
    const float *scales = w->scales ? w->scales + index / 128 * ((w->cols + 127) / 128) : NULL;
    for (int64_t c = 0; c < w->cols; c++) {
        switch (dtype) {
        case TOPS_F32: memcpy(out + c, group + (c * GROUP + row) * 4, 4); break;
        case TOPS_F16: out[c] = float_of_f16(u16_at(group, c * GROUP + row)); break;
        case TOPS_BF16: out[c] = float_of_bf16(u16_at(group, (c / 2 * GROUP + row) * 2 + c % 2)); break;
        default: out[c] = float_of_fp8(group[c * GROUP + row]) * (scales ? scales[c / 128] : 1.0f);
        }
    }
}

/* An expert's rows are groups like any other's. */
int64_t tops_packed_expert_bytes(int32_t dtype, int64_t rows, int64_t cols) { return tops_packed_bytes(dtype, rows, cols); }
int tops_pack_expert(tops_stream *stream, void *out, const void *in, int32_t dtype, int64_t rows, int64_t cols) {
    return tops_pack(stream, out, in, dtype, rows, cols);
}

typedef struct {
    float *out;
    const tops_weight *w;
    int64_t first;
} unpack_job;

static void unpack_item(void *context, int64_t row) {
    const unpack_job *job = context;
    unpack_row(job->out + row * job->w->cols, job->w, job->first + row);
}

int tops_unpack_rows(tops_stream *stream, float *out, const tops_weight *w, int64_t first, int64_t count) {
    REQUIRE(tops_packed_bytes(w->dtype, w->rows, w->cols) >= 0, "w: no packed layout for dtype %d with %lld columns", w->dtype, (long long)w->cols);
    REQUIRE(first >= 0 && count >= 0 && first + count <= w->rows, "rows: %lld..%lld of %lld", (long long)first, (long long)(first + count), (long long)w->rows);
    unpack_job job = {out, w, first};
    tops_team_run(stream->team, count, unpack_item, &job);
    return TOPS_OK;
}

/* ---- rounding f32 to what files hold ---- */
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
    tops_team_run(stream->team, rows, quantize_file_row, &job);
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
