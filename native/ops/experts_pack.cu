/* Matrices of experts: from rows as files hold them to tiles (tile_format.cuh draws the layout). */
#include "../cuda/tile_format.cuh"

struct file_code {
    int code;                  /* value = scale code + minimum */
    float scale, minimum;
};

static __device__ float half_at(const uint8_t *bytes) { return __half2float(*(const half *)bytes); }

/* Scale and minimum of sub-block j of Q4_K and Q5_K, in 6 bits each. */
static __device__ void scale_min(const uint8_t *packed, int j, int *scale, int *minimum) {
    *scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
    *minimum = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4;
}

/* Column c of a row of a GGUF format (github.com/ggml-org/ggml: ggml-quants.c has the same layouts). */
static __device__ file_code decode(int dtype, const uint8_t *row, int c) {
    int j = c % 32, k = c % 256, nibble = j / 16 * 4;
    const uint8_t *b;
    int scale, minimum;
    switch (dtype) {
    case TOPS_Q4_0:
        b = row + c / 32 * 18;
        return {b[2 + j % 16] >> nibble & 15, half_at(b), 0};
    case TOPS_Q4_1:
        b = row + c / 32 * 20;
        return {b[4 + j % 16] >> nibble & 15, half_at(b), half_at(b + 2)};
    case TOPS_Q5_0:
        b = row + c / 32 * 22;
        return {((b[6 + j % 16] >> nibble & 15) | (b[2 + j / 8] >> j % 8 & 1) << 4) - 16, half_at(b), 0};
    case TOPS_Q5_1:
        b = row + c / 32 * 24;
        return {(b[8 + j % 16] >> nibble & 15) | (b[4 + j / 8] >> j % 8 & 1) << 4, half_at(b), half_at(b + 2)};
    case TOPS_Q8_0:
        b = row + c / 32 * 34;
        return {(int8_t)b[2 + j], half_at(b), 0};
    case TOPS_Q4_K:
        b = row + c / 256 * 144;
        scale_min(b + 4, k / 32, &scale, &minimum);
        return {b[16 + k / 64 * 32 + j] >> (k / 32 % 2 * 4) & 15, half_at(b) * scale, -half_at(b + 2) * minimum};
    case TOPS_Q5_K:
        b = row + c / 256 * 176;
        scale_min(b + 4, k / 32, &scale, &minimum);
        return {(b[48 + k / 64 * 32 + j] >> (k / 32 % 2 * 4) & 15) | (b[16 + j] >> k / 32 & 1) << 4, half_at(b) * scale, -half_at(b + 2) * minimum};
    default: {   /* Q6_K */
        b = row + c / 256 * 210;
        int half = k / 128, part = k % 128 / 32;
        int low = b[64 * half + j + part % 2 * 32] >> (part / 2 * 4) & 15, high = b[128 + 32 * half + j] >> (2 * part) & 3;
        return {(low | high << 4) - 32, half_at(b + 208) * (int8_t)b[192 + k / 16], 0};
    }
    }
}

/* A thread packs what one lane holds of a tile, and one row's scales. */
static __global__ void pack_tiles(matrix m, char *tiles, char *scales, const uint8_t *in, int64_t row_bytes, int dtype) {
    launch_dependents();
    wait_for_inputs();
    int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, tile = item / 32;
    int lane = item % 32;
    if (tile >= (int64_t)m.row_tiles * m.col_tiles) return;
    int row0 = tile / m.col_tiles * TILE_ROWS, col0 = tile % m.col_tiles * TILE_COLS;
    char *at = tiles + tile * tile_bytes(m.kind);
    uint32_t four[4] = {};
    for (int s = 0; s < 4; s++)
        for (int i = 0; i < 4; i++)
            for (int high = 0; high < 2; high++) {
                int row = row0 + lane / 4 + i % 2 * 8, col = col0 + 16 * s + lane % 4 * 4 + i / 2 * 2 + high;
                bool there = row < m.rows && col < m.cols;
                const uint8_t *from = in + row * row_bytes;
                if (m.kind == TILES_BF16) {
                    ((uint16_t *)at)[((s * 32 + lane) * 4 + i) * 2 + high] = there ? ((const uint16_t *)from)[col] : 0;
                    continue;
                }
                int place = (s / 2 * 32 + lane) * 16 + s % 2 * 8 + i * 2 + high;
                if (m.kind == TILES_FP8) {
                    at[place] = there ? from[col] : 0;
                    continue;
                }
                int zero = m.kind == TILES_4 ? 8 : m.kind == TILES_4_MIN ? 0 : 128;
                int code = there ? decode(dtype, from, col).code : m.kind == TILES_4 ? 8 : 0;
                if (m.kind == TILES_4 || m.kind == TILES_4_MIN) four[s] |= (uint32_t)code << (4 * i + 16 * high);
                else ((uint8_t *)at)[place] = (uint8_t)(code + zero);
            }
    if (m.kind == TILES_4 || m.kind == TILES_4_MIN) ((uint4 *)at)[lane] = make_uint4(four[0], four[1], four[2], four[3]);
    if (!has_scales(m.kind) || lane >= TILE_ROWS) return;
    int groups = TILE_COLS / group_cols(m.kind);
    for (int group = 0; group < groups; group++) {
        int row = row0 + lane, col = col0 + group * group_cols(m.kind);
        file_code found = {0, 0, 0};
        if (row < m.rows && col < m.cols) found = decode(dtype, in + row * row_bytes, col);
        half *to = (half *)scales + scale_place(tile, groups, group, lane) * (has_minimum(m.kind) ? 2 : 1);
        to[0] = __float2half_rn(found.scale);
        if (has_minimum(m.kind)) to[1] = __float2half_rn(found.minimum);
    }
}

static int64_t file_row_bytes(int dtype, int64_t cols) {
    switch (dtype) {
    case TOPS_F32: return cols * 4;
    case TOPS_F16: case TOPS_BF16: return cols * 2;
    case TOPS_FP8_E4M3: return cols;
    case TOPS_Q4_0: return cols % 32 ? -1 : cols / 32 * 18;
    case TOPS_Q4_1: return cols % 32 ? -1 : cols / 32 * 20;
    case TOPS_Q5_0: return cols % 32 ? -1 : cols / 32 * 22;
    case TOPS_Q5_1: return cols % 32 ? -1 : cols / 32 * 24;
    case TOPS_Q8_0: return cols % 32 ? -1 : cols / 32 * 34;
    case TOPS_Q4_K: return cols % 256 ? -1 : cols / 256 * 144;
    case TOPS_Q5_K: return cols % 256 ? -1 : cols / 256 * 176;
    case TOPS_Q6_K: return cols % 256 ? -1 : cols / 256 * 210;
    default: return -1;
    }
}

int64_t tops_packed_expert_bytes(int32_t dtype, int64_t rows, int64_t cols) {
    if (rows < 0 || cols < 0 || rows > INT32_MAX || cols > INT32_MAX || file_row_bytes(dtype, cols) < 0) return -1;
    return packed_bytes(kind_of(dtype), rows, cols);
}

int tops_pack_expert(tops_stream *stream, void *out, const void *in, int32_t dtype, int64_t rows, int64_t cols) {
    int64_t bytes = tops_packed_expert_bytes(dtype, rows, cols);
    REQUIRE(bytes >= 0, "dtype, rows, cols: format %d has no rows of %lld", dtype, (long long)cols);
    if (is_rows(kind_of(dtype))) return bytes ? tops_copy_2d(stream, out, bytes, in, bytes, bytes, 1) : TOPS_OK;
    tops_weight w = {out, nullptr, rows, cols, dtype, 0};
    matrix m = expert_matrix(w, 0, 1);
    int64_t items = (int64_t)m.row_tiles * m.col_tiles * 32;
    return launch(stream, pack_tiles, dim3(ceil_div(items, 128)), 128, 0, 1, m, (char *)out, (char *)m.scales, (const uint8_t *)in, file_row_bytes(dtype, cols), dtype);
}
