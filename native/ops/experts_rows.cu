/* Products of many tokens: a block takes 128 rows of the weights and up to 64 or 128 tokens. Weights go straight to registers, in the
 * order of the tensor cores; tokens go through shared memory, which all warps read. */
#include "experts.cuh"

enum { MANY_WARPS = 8, XWIDE = TILE_COLS + 16 };     /* rows of x in shared memory: four neighbours in different banks */

template <tile_kind KIND, int MATRICES, int NT>
static __global__ void __launch_bounds__(MANY_WARPS * 32) many(many_arguments a) {
    __shared__ __align__(16) bf16 xs[2][NT * 8 * XWIDE];
    __shared__ int from[NT * 8], to[NT * 8];
    launch_dependents();
    wait_for_inputs();
    int me = threadIdx.x, warp = me / 32, lane = me % 32, expert = 0, first = blockIdx.y * NT * 8, count = a.n - first;
    if (a.list) {
        if (blockIdx.y >= *a.list_length) return;
        expert = a.list[blockIdx.y].x, first = a.list[blockIdx.y].y, count = a.starts[expert + 1] - first;
    }
    count = min(count, NT * 8);
    for (int i = me; i < NT * 8; i += blockDim.x) {
        int t = first + min(i, count - 1);
        from[i] = t * a.x_step + a.x_first, to[i] = t * a.out_step + a.out_first;
        if (a.list) {
            int pair = a.order[t], token = pair / a.k;
            to[i] = token * (a.k + 1) + pair % a.k, from[i] = a.by_token ? token : to[i];
        }
    }
    matrix m[MATRICES];
    for (int i = 0; i < MATRICES; i++) m[i] = a.m[i], m[i].tiles += expert * a.stride[i], m[i].scales += expert * a.scale_stride[i];
    int row_tile = blockIdx.x * MANY_WARPS + warp, last = m[0].row_tiles - 1, col_tiles = m[0].col_tiles;
    bool there = row_tile <= last;
    row_tile = min(row_tile, last);
    __syncthreads();
    auto stage = [&](int c) {
        for (int i = me; i < NT * 8 * 8; i += blockDim.x)
            copy_async(&xs[c & 1][i / 8 * XWIDE + i % 8 * 8], a.x + (int64_t)from[i / 8] * a.pitch + c * TILE_COLS + i % 8 * 8, true);
        copy_commit();
    };
    float sum[MATRICES][NT][4] = {};
    tile<KIND> now[MATRICES], next[MATRICES];
    stage(0);
    for (int i = 0; i < MATRICES; i++) now[i].load(m[i], row_tile, 0, lane);
    for (int c = 0; c < col_tiles; c++) {
        if (c + 1 < col_tiles) {
            stage(c + 1);
            for (int i = 0; i < MATRICES; i++) next[i].load(m[i], row_tile, c + 1, lane);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        const bf16 *x = xs[c & 1] + lane / 4 * XWIDE + lane % 4 * 4;
#pragma unroll
        for (int s = 0; s < 4; s++) {
            uint32_t left[MATRICES][4];
            for (int i = 0; i < MATRICES; i++) now[i].left_scaled(left[i], s);
#pragma unroll
            for (int t = 0; t < NT; t++) {
                uint2 b = *(const uint2 *)(x + t * 8 * XWIDE + s * 16);
                uint32_t right[2] = {b.x, b.y};
                for (int i = 0; i < MATRICES; i++) mma(sum[i][t], left[i], right);
            }
        }
        __syncthreads();
        for (int i = 0; i < MATRICES; i++) now[i] = next[i];
    }
    if (!there) return;
    for (int t = 0; t < NT; t++)
        for (int e = 0; e < 4; e++) {
            int i = t * 8 + lane % 4 * 2 + e % 2, row = row_tile * TILE_ROWS + lane / 4 + e / 2 * 8;
            if (i >= count || row >= m[0].rows) continue;
            int64_t at = (int64_t)to[i] * a.out_cols + row;
            float value = MATRICES == 2 ? silu(sum[0][t][e]) * sum[MATRICES - 1][t][e] : sum[0][t][e];
            a.out[at] = from_float<bf16>(value);
        }
}

template <tile_kind KIND> static int run(tops_stream *stream, const many_arguments &a, int matrices, int64_t blocks) {
    dim3 grid(ceil_div(a.m[0].row_tiles, MANY_WARPS), blocks);
    if (matrices == 2) return launch(stream, many<KIND, 2, 8>, dim3(grid), MANY_WARPS * 32, 0, 1, a);
    return launch(stream, many<KIND, 1, 8>, dim3(grid), MANY_WARPS * 32, 0, 1, a);
}

int many_rows(tops_stream *stream, const many_arguments &a, int matrices, int64_t blocks) {
    switch (a.m[0].kind) {
    case TILES_BF16: return run<TILES_BF16>(stream, a, matrices, blocks);
    case TILES_FP8: return run<TILES_FP8>(stream, a, matrices, blocks);
    case TILES_4: return run<TILES_4>(stream, a, matrices, blocks);
    case TILES_4_MIN: return run<TILES_4_MIN>(stream, a, matrices, blocks);
    case TILES_8: return run<TILES_8>(stream, a, matrices, blocks);
    default: return run<TILES_8_MIN>(stream, a, matrices, blocks);
    }
}
