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

/* Bytes of a row's 32 (or 256) columns in a file. */
static inline int64_t file_super_bytes(int dtype) {
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

int64_t tops_file_row_bytes(int dtype, int64_t cols) {
    tops_format f = format_of(dtype);
    return f.super ? cols / f.super * file_super_bytes(dtype) : cols * (dtype == TOPS_F32 ? 4 : dtype == TOPS_FP8_E4M3 ? 1 : 2);
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

/* What follows is inlined for each format, so that its loops over columns are compiled for it. */
#define INLINED static inline __attribute__((always_inline))

/* Codes of sub-block s of the columns that share a header in a file, each in a byte. */
INLINED void file_codes(unsigned char codes[BLOCK], int dtype, const unsigned char *in, int s) {
    switch (dtype) {
    case TOPS_Q8_0:
        for (int c = 0; c < BLOCK; c++) codes[c] = in[2 + c] ^ 0x80;
        return;
    case TOPS_Q6_K: {
        const unsigned char *low = in + s / 4 * 64 + s % 2 * 32, *high = in + 128 + s / 4 * 32;
        for (int c = 0; c < BLOCK; c++) codes[c] = (unsigned char)((low[c] >> (s % 4 / 2 * 4) & 15) | (high[c] >> (s % 4 * 2) & 3) << 4);
        return;
    }
    case TOPS_Q4_K: case TOPS_Q5_K: {
        const unsigned char *low = in + (dtype == TOPS_Q5_K ? 48 : 16) + s / 2 * 32;
        for (int c = 0; c < BLOCK; c++) codes[c] = low[c] >> (s % 2 * 4) & 15;
        for (int c = 0; dtype == TOPS_Q5_K && c < BLOCK; c++) codes[c] |= (unsigned char)((in[16 + c] >> s & 1) << 4);
        return;
    }
    default: {
        const unsigned char *low = in + file_super_bytes(dtype) - BLOCK / 2;
        for (int c = 0; c < BLOCK / 2; c++) codes[c] = low[c] & 15;
        for (int c = 0; c < BLOCK / 2; c++) codes[BLOCK / 2 + c] = low[c] >> 4;
        if (dtype != TOPS_Q5_0 && dtype != TOPS_Q5_1) return;
        uint32_t high, four;
        memcpy(&high, low - 4, 4);
        for (int v = 0; v < 8; v++) {
            memcpy(&four, codes + 4 * v, 4);
            four |= ((high >> 4 * v & 15) * 0x00204081 & 0x01010101) << 4;   /* bit c goes to bit 8 c */
            memcpy(codes + 4 * v, &four, 4);
        }
    }
    }
}

INLINED void pack_super(int dtype, unsigned char *header, const unsigned char *in, int row) {
    tops_format f = format_of(dtype);
    unsigned char *block = header + f.header, codes[BLOCK];
    unsigned char *scale = f.header ? header : block;
    memcpy(scale + 2 * row, dtype == TOPS_Q6_K ? in + 208 : in, 2);
    if (f.minimum) memcpy(scale + 32 + 2 * row, in + 2, 2);
    for (int s = 0; s < f.super / BLOCK; s++, block += block_bytes(f)) {
        if (dtype == TOPS_Q6_K) {
            block[row] = in[192 + 2 * s];
            block[16 + row] = in[192 + 2 * s + 1];
        } else if (f.header) {
            scale_min(in + 4, s, block + row, block + 16 + row);
        }
        file_codes(codes, dtype, in, s);
        set_codes(f, block, row, codes);
    }
}

typedef struct {
    unsigned char *out;
    const unsigned char *in;
    int dtype;
    int64_t rows, cols, group_bytes, file_row_bytes;
} pack_job;

INLINED void pack_supers(int dtype, unsigned char *group, const unsigned char *in, int64_t cols, int count) {
    tops_format f = format_of(dtype);
    int64_t supers = cols / f.super, bytes = file_super_bytes(dtype);
    for (int64_t s = 0; s < supers; s++)
        for (int row = 0; row < count; row++) pack_super(dtype, group + s * super_bytes(f), in + (row * supers + s) * bytes, row);
}

/* Rows of values that lie `unit` together: an f32, a pair of bf16, one f16 or fp8. STRIP columns of all rows stay in the cache. */
INLINED void interleave(unsigned char *group, const unsigned char *in, int64_t row_bytes, int count, int unit) {
    enum { STRIP = 128 };
    int64_t whole = row_bytes / unit;
    for (int64_t first = 0; first < whole; first += STRIP)
        for (int row = 0; row < count; row++)
            for (int64_t at = first; at < whole && at < first + STRIP; at++)
                memcpy(group + (at * GROUP + row) * unit, in + row * row_bytes + at * unit, (size_t)unit);
    for (int row = 0; row < count; row++)   /* the last of an odd number of bf16 */
        memcpy(group + (whole * GROUP + row) * unit, in + row * row_bytes + whole * unit, (size_t)(row_bytes % unit));
}

void tops_pack_group(unsigned char *group, const unsigned char *in, int dtype, int64_t cols, int rows) {
    int64_t row_bytes = tops_file_row_bytes(dtype, cols);
    memset(group, 0, (size_t)tops_group_bytes(dtype, cols));
    switch (dtype) {
    case TOPS_Q4_0: pack_supers(TOPS_Q4_0, group, in, cols, rows); break;
    case TOPS_Q4_1: pack_supers(TOPS_Q4_1, group, in, cols, rows); break;
    case TOPS_Q5_0: pack_supers(TOPS_Q5_0, group, in, cols, rows); break;
    case TOPS_Q5_1: pack_supers(TOPS_Q5_1, group, in, cols, rows); break;
    case TOPS_Q8_0: pack_supers(TOPS_Q8_0, group, in, cols, rows); break;
    case TOPS_Q4_K: pack_supers(TOPS_Q4_K, group, in, cols, rows); break;
    case TOPS_Q5_K: pack_supers(TOPS_Q5_K, group, in, cols, rows); break;
    case TOPS_Q6_K: pack_supers(TOPS_Q6_K, group, in, cols, rows); break;
    case TOPS_F32: case TOPS_BF16: interleave(group, in, row_bytes, rows, 4); break;
    case TOPS_F16: interleave(group, in, row_bytes, rows, 2); break;
    default: interleave(group, in, row_bytes, rows, 1);
    }
}

static void pack_item(void *context, int64_t item) {
    const pack_job *job = context;
    int64_t first = item * GROUP, rows = job->rows - first < GROUP ? job->rows - first : GROUP;
    tops_pack_group(job->out + item * job->group_bytes, job->in + first * job->file_row_bytes, job->dtype, job->cols, (int)rows);
}

int tops_pack(tops_stream *stream, void *out, const void *in, int32_t dtype, int64_t rows, int64_t cols) {
    if (tops_packed_bytes(dtype, rows, cols) < 0)
        return tops_fail(TOPS_UNSUPPORTED, "dtype: no packed layout for dtype %d with %lld x %lld", dtype, (long long)rows, (long long)cols);
    pack_job job = {out, in, dtype, rows, cols, tops_group_bytes(dtype, cols), tops_file_row_bytes(dtype, cols)};
    tops_team_run(stream, group_count(rows), pack_item, &job);
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
    REQUIRE(!w->in_place, "w: must be packed");
    REQUIRE(tops_packed_bytes(w->dtype, w->rows, w->cols) >= 0, "w: no packed layout for dtype %d with %lld columns", w->dtype, (long long)w->cols);
    REQUIRE(first >= 0 && count >= 0 && first + count <= w->rows, "rows: %lld..%lld of %lld", (long long)first, (long long)(first + count), (long long)w->rows);
    unpack_job job = {out, w, first};
    tops_team_run(stream, count, unpack_item, &job);
    return TOPS_OK;
}
