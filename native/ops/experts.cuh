/* Products with experts, shared by the files that have their kernels. */
#pragma once
#include "../cuda/tile.cuh"

enum { FEW = 16 };      /* tokens that take the kernels for few */

struct expert_arguments {
    matrix first[2], own[2];           /* gate and up, or down: of expert 0 of the stack, of the shared expert */
    int64_t stride[2], scale_stride[2];/* bytes from one expert to the next */
    const int32_t *experts;            /* [n, k] */
    const float *shares;               /* [n, k + 1] */
    const void *x;
    void *out;
    int n, e, k, rows, cols;           /* of one matrix */

    /* Matrix `part` of choice j of token t: the last choice is the shared expert. An expert beyond the stack gives the first. */
    __device__ matrix chosen(int t, int j, int part) const {
        if (j == k) return own[part];
        const int expert = experts[t * k + j];
        matrix m = first[part];
        if (expert >= 0 && expert < e) m.tiles += expert * stride[part], m.scales += expert * scale_stride[part];
        return m;
    }
};

int experts_gate_up_few(tops_stream *stream, const expert_arguments &a);
int experts_down_few(tops_stream *stream, const expert_arguments &a);
int experts_gate_up_many(tops_stream *stream, const expert_arguments &a);
int experts_down_many(tops_stream *stream, const expert_arguments &a);

/* ---- a few tokens: what a block does. All its weights are on their way before its inputs are. ---- */
enum { WARPS = 8, INPUT_TILE = 160 };      /* bytes of a token's inputs for a tile (experts_fixed.cuh) */

template <tile_kind KIND> constexpr int AHEAD = tile_bytes(KIND) > 1024 ? 1 : 2048 / tile_bytes(KIND);      /* tiles on their way */

/* sum += rows of a tile of m times x, over column tiles kw, kw + step, ..; ready() is called once the first tiles are on their way.
 * x: a row of bf16 by tile */
template <tile_kind KIND, int AHEAD, typename Ready>
static __device__ inline void take_tiles(float (&sum)[4], const matrix &m, int row_tile, int kw, int step, const unsigned char *x, int lane, Ready ready) {
    tile<KIND> tiles[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (kw + i * step < m.col_tiles) tiles[i].load(m, row_tile, kw + i * step, lane);
    ready();
    for (int base = kw; base < m.col_tiles; base += AHEAD * step) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int c = base + i * step;
            if (c >= m.col_tiles) break;
            tiles[i].multiply(sum, x + c * INPUT_TILE, lane);
            if (c + AHEAD * step < m.col_tiles) tiles[i].load(m, row_tile, c + AHEAD * step, lane);
        }
    }
}

/* ---- many tokens ---- */
struct many_arguments {
    matrix m[2];                        /* of expert 0; gate and up where there are two */
    int64_t stride[2], scale_stride[2]; /* bytes from one expert to the next */
    const bf16 *x;
    int pitch;                          /* of x's rows, a multiple of 64, zeros behind the columns */
    /* Which rows. Without a list: token t takes row t x_step + x_first of x and gives row t out_step + out_first of out.
     * With one: entry y of the list is (expert, place in order) and stands for up to 64 places; pair i = order[place] is choice i % k of
     * token i / k; it takes row token (by_token) or its own of x and gives its own of out, its own being token (k + 1) + choice. */
    int n, x_step, x_first, out_step, out_first;
    const int2 *list;
    const int32_t *list_length, *order, *starts;
    int k, by_token;
    bf16 *out;
    int out_cols;
};

/* blocks: of 64 tokens, or entries of the list at most */
int many_rows(tops_stream *stream, const many_arguments &a, int matrices, int64_t blocks);
