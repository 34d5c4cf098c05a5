/*
 * Packed matrices of experts. They are cut into tiles of 16 rows by 64 columns, stored in the order in which tensor cores take them:
 *   lane l of a warp, step s of 16 columns, register i in 0..3 holds row l / 4 + i % 2 * 8, columns 16 s + l % 4 * 4 + i / 2 * 2 + {0, 1}
 *   4 bits   512 bytes: uint4 [lane], word s; register i in bits 4 i and 16 + 4 i
 *   8 bits  1024 bytes: uint4 [s / 2][lane], words 2 (s % 2) + {0, 1}; bytes {register 0 low, high, register 1 low, high}, {2, 3}
 *   bf16    2048 bytes: uint4 [s][lane], word i
 * Behind all tiles come the scales, by tile [row % 8][group of columns][row / 8]: f16, or f16 pairs (scale, minimum): value = scale code + minimum.
 *   Q4_0, Q8_0             groups of 32, scale
 *   Q4_1, Q4_K             4 bits, groups of 32, scale and minimum
 *   Q5_0, Q5_1, Q5_K, Q6_K 8 bits, groups of 16, scale and minimum
 * A product of two scales (K formats) is rounded to f16, a relative error of at most 2^-11; everything else is exact. Rows and columns
 * beyond the matrix are zeros. f32 and f16 stay rows as files hold them.
 */
#pragma once
#include <cuda_fp8.h>

#include "storage.cuh"

enum tile_kind { ROWS_F32, ROWS_F16, TILES_BF16, TILES_FP8, TILES_4, TILES_4_MIN, TILES_8, TILES_8_MIN, NO_KIND };

enum { TILE_ROWS = 16, TILE_COLS = 64 };

__host__ __device__ inline tile_kind kind_of(int dtype) {
    switch (dtype) {
    case TOPS_F32: return ROWS_F32;
    case TOPS_F16: return ROWS_F16;
    case TOPS_BF16: return TILES_BF16;
    case TOPS_FP8_E4M3: return TILES_FP8;
    case TOPS_Q4_0: return TILES_4;
    case TOPS_Q4_1: case TOPS_Q4_K: return TILES_4_MIN;
    case TOPS_Q8_0: return TILES_8;
    case TOPS_Q5_0: case TOPS_Q5_1: case TOPS_Q5_K: case TOPS_Q6_K: return TILES_8_MIN;
    default: return NO_KIND;
    }
}
__host__ __device__ constexpr bool is_rows(tile_kind kind) { return kind == ROWS_F32 || kind == ROWS_F16; }
__host__ __device__ constexpr int tile_bytes(tile_kind kind) {
    return kind == TILES_BF16 ? 2048 : kind == TILES_4 || kind == TILES_4_MIN ? 512 : 1024;
}
__host__ __device__ constexpr bool has_scales(tile_kind kind) { return kind >= TILES_4; }
__host__ __device__ constexpr bool has_minimum(tile_kind kind) { return kind == TILES_4_MIN || kind == TILES_8_MIN; }
__host__ __device__ constexpr int group_cols(tile_kind kind) { return kind == TILES_8_MIN ? 16 : 32; }
__host__ __device__ constexpr int tile_scale_bytes(tile_kind kind) {
    return has_scales(kind) ? TILE_COLS / group_cols(kind) * TILE_ROWS * (has_minimum(kind) ? 4 : 2) : 0;
}

/* Where the scale (or pair) of a row of a tile lies, in scales (or pairs): what a lane needs of a tile lies side by side. */
__host__ __device__ inline int64_t scale_place(int64_t tile, int groups, int group, int row) { return ((tile * 8 + row % 8) * groups + group) * 2 + row / 8; }

/* One matrix as kernels see it. */
struct matrix {
    const char *tiles;
    const char *scales;         /* behind the tiles; for fp8 f32 by 128 x 128 */
    int rows, cols, row_tiles, col_tiles;
    tile_kind kind;
};

/* Where the codes and the scales of a tile begin */
__device__ inline const char *tile_codes(const matrix &m, int row_tile, int col_tile) { return m.tiles + ((int64_t)row_tile * m.col_tiles + col_tile) * tile_bytes(m.kind); }
__device__ inline const char *tile_scales(const matrix &m, int row_tile, int col_tile) { return m.scales + ((int64_t)row_tile * m.col_tiles + col_tile) * tile_scale_bytes(m.kind); }

__host__ __device__ inline int64_t packed_bytes(tile_kind kind, int64_t rows, int64_t cols) {
    if (is_rows(kind)) return rows * cols * (kind == ROWS_F32 ? 4 : 2);
    return ((rows + TILE_ROWS - 1) / TILE_ROWS) * ((cols + TILE_COLS - 1) / TILE_COLS) * (tile_bytes(kind) + tile_scale_bytes(kind));
}

/* Matrix `index` of a stack of `count`, packed one after the other. */
__host__ __device__ inline matrix expert_matrix(const tops_weight &w, int64_t index, int64_t count) {
    matrix m;
    m.rows = (int)(w.rows / count), m.cols = (int)w.cols, m.kind = kind_of(w.dtype);
    m.row_tiles = (m.rows + TILE_ROWS - 1) / TILE_ROWS, m.col_tiles = (m.cols + TILE_COLS - 1) / TILE_COLS;
    m.tiles = (const char *)w.data + index * packed_bytes(m.kind, m.rows, m.cols);
    m.scales = m.kind == TILES_FP8 ? (const char *)(w.scales + index * ((m.rows + 127) / 128) * ((m.cols + 127) / 128))
                                   : m.tiles + (int64_t)m.row_tiles * m.col_tiles * tile_bytes(m.kind);
    return m;
}

__device__ inline float fp8_value(uint8_t code) {
    __half_raw raw = __nv_cvt_fp8_to_halfraw(code, __NV_E4M3);
    return __half2float(half(raw));
}

/* The value at (row, column): for what is not worth a kernel of its own. */
__device__ inline float value_at(const matrix &m, int row, int col) {
    if (m.kind == ROWS_F32) return ((const float *)m.tiles)[(int64_t)row * m.cols + col];
    if (m.kind == ROWS_F16) return __half2float(((const half *)m.tiles)[(int64_t)row * m.cols + col]);
    int64_t tile = (int64_t)(row / TILE_ROWS) * m.col_tiles + col / TILE_COLS;
    int r = row % TILE_ROWS, c = col % TILE_COLS, s = c / 16, i = r / 8 + c % 4 / 2 * 2, lane = r % 8 * 4 + c % 16 / 4, high = c % 2;
    const char *at = m.tiles + tile * tile_bytes(m.kind);
    if (m.kind == TILES_BF16) return __bfloat162float(((const bf16 *)at)[((s * 32 + lane) * 4 + i) * 2 + high]);
    int code;
    if (m.kind == TILES_4 || m.kind == TILES_4_MIN)
        code = ((const uint32_t *)at)[lane * 4 + s] >> (4 * i + 16 * high) & 15;
    else
        code = ((const uint8_t *)at)[(s / 2 * 32 + lane) * 16 + s % 2 * 8 + i * 2 + high];
    if (m.kind == TILES_FP8) return fp8_value((uint8_t)code) * ((const float *)m.scales)[row / 128 * ((m.cols + 127) / 128) + col / 128];
    code -= m.kind == TILES_4 ? 8 : m.kind == TILES_4_MIN ? 0 : 128;
    int64_t place = scale_place(tile, TILE_COLS / group_cols(m.kind), c / group_cols(m.kind), r);
    const half *scales = (const half *)m.scales;
    if (has_minimum(m.kind)) return __half2float(scales[2 * place]) * code + __half2float(scales[2 * place + 1]);
    return __half2float(scales[place]) * code;
}
