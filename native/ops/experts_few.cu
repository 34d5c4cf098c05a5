/* Experts of a few tokens: their numbers are read on the device, and nothing of an expert that nobody chose is read. */
#include "experts_fixed.cuh"

/* Groups under way in the two kernels: all that a warp takes of a gate of 2,048 columns, or of ten choices of 512. Three blocks of the first and one of the
 * second fit on a processor, so that the second one's weights travel while the first one computes. */
enum { CHOICES = 32, GATE_UP_GROUPS = 4, DOWN_GROUPS = 6 };

/* A warp's sums over the columns it took, by row of the tile: x, y of lanes of quad 0 */
static __device__ inline void leave_rows(float *red, float x, float y, int lane) {
    if (lane % 4 == 0) red[lane / 4] = x, red[lane / 4 + 8] = y;
}

/* A block takes 16 rows of gate and up of one choice of one token; half of its warps take gate, half up. */
static __global__ void __launch_bounds__(WARPS * 32, 4) gate_up_few(const __grid_constant__ expert_arguments a) {
    extern __shared__ __align__(16) unsigned char inputs[];
    __shared__ float red[WARPS][TILE_ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = divide(blockIdx.y, a.k + 1), j = blockIdx.y - t * (a.k + 1), part = warp / (WARPS / 2), first = warp % (WARPS / 2);
    /* The shared expert is known beforehand. The op behind this one may begin once the experts' numbers are there for it, too. */
    const bool chosen = j != a.k;
    row_pieces<1> row;
    auto take_x = [&] {
        wait_for_inputs(), launch_dependents();
        row.begin((const bf16 *)a.x + (int64_t)t * a.cols, a.cols);
    };
    if (chosen) take_x();
    const matrix m = a.chosen(t, j, part);
    with_kind(m.kind, [&](auto kind) {
        constexpr tile_kind KIND = decltype(kind)::value;
        auto ready = [&] {
            if (!chosen) take_x();
            stage_inputs<KIND>(inputs, row, [](int) { return 1.0f; });
        };
        if constexpr (has_scales(KIND)) {
            float sum[2] = {};
            unsigned char *rings = inputs + a.cols / TILE_COLS * INPUT_TILE;
            auto place = [&](int i, const char *&codes, const char *&scales) {
                codes = tile_codes(m, blockIdx.x, first + i * (WARPS / 2)), scales = tile_scales(m, blockIdx.x, first + i * (WARPS / 2));
            };
            take_groups<KIND, GATE_UP_GROUPS>(sum, rings, (m.col_tiles - first + WARPS / 2 - 1) / (WARPS / 2), inputs + first * INPUT_TILE, WARPS / 2 * INPUT_TILE, lane, place, ready);
            leave_rows(red[warp], quad_sum(sum[0]), quad_sum(sum[1]), lane);
        } else {
            float sum[4] = {};
            take_tiles<KIND, AHEAD<KIND>>(sum, m, blockIdx.x, first, WARPS / 2, inputs, lane, ready);
            leave_rows(red[warp], sum[0], sum[2], lane);
        }
    });
    __syncthreads();
    int r = threadIdx.x;
    if (r >= TILE_ROWS || blockIdx.x * TILE_ROWS + r >= a.rows) return;
    float gate = 0, up = 0;
    for (int w = 0; w < WARPS / 2; w++) gate += red[w][r], up += red[w + WARPS / 2][r];
    ((bf16 *)a.out)[(int64_t)blockIdx.y * a.rows + blockIdx.x * TILE_ROWS + r] = from_float<bf16>(silu(gate) * up);
}

int experts_gate_up_few(tops_stream *stream, const expert_arguments &a) {
    size_t bytes = (size_t)(a.cols / TILE_COLS) * INPUT_TILE + max(ring_bytes(a.first[0].kind, GATE_UP_GROUPS), ring_bytes(a.own[0].kind, GATE_UP_GROUPS));
    REQUIRE_SUPPORTED(bytes <= 200 << 10, "w: at most 50000 columns, not %d", a.cols);
    return launch_wide(stream, gate_up_few, dim3(ceil_div(a.rows, TILE_ROWS), a.n * (a.k + 1)), WARPS * 32, bytes, a);
}

/* Where a choice's tiles and scales begin */
struct place {
    const char *tiles, *scales;
};

/* Choices from..until: the warps share the columns of all their matrices, as if they were one long matrix; the first are on their way before the rows of
 * x are there. */
template <tile_kind KIND, typename Ready>
static __device__ void take_choices(float *red, const matrix &like, const place *places, int from, int until, const unsigned char *inputs, unsigned char *rings, const float *shares,
                                    int warp, int lane, Ready ready) {
    const int begin = from * like.col_tiles + warp, end = until * like.col_tiles, count = max((end - begin + WARPS - 1) / WARPS, 0);
    /* The matrix of a tile, and its column there: matrices follow each other, as they do in x */
    auto of = [&](int at, int &column) {
        matrix m = like;
        const int choice = divide(at, like.col_tiles);
        column = at - choice * like.col_tiles;
        m.tiles = places[choice].tiles, m.scales = places[choice].scales;
        return m;
    };
    int column;
    if constexpr (has_scales(KIND)) {
        float sum[2] = {};
        auto place = [&](int i, const char *&codes, const char *&scales) {
            const matrix m = of(begin + i * WARPS, column);
            codes = tile_codes(m, blockIdx.x, column), scales = tile_scales(m, blockIdx.x, column);
        };
        take_groups<KIND, DOWN_GROUPS>(sum, rings, count, inputs + begin * INPUT_TILE, WARPS * INPUT_TILE, lane, place, ready);
        leave_rows(red, quad_sum(sum[0]), quad_sum(sum[1]), lane);
    } else {
        constexpr int MANY = AHEAD<KIND>;
        float total[4] = {};
        tile<KIND> tiles[MANY];
        for (int base = 0; base < count || base == 0; base += MANY) {
#pragma unroll
            for (int i = 0; i < MANY; i++)
                if (base + i < count) {
                    const matrix m = of(begin + (base + i) * WARPS, column);
                    tiles[i].load(m, blockIdx.x, column, lane);
                }
            if (base == 0) ready();
#pragma unroll
            for (int i = 0; i < MANY; i++) {
                const int at = begin + (base + i) * WARPS;
                if (base + i >= count) continue;
                float part[4] = {}, share = shares[divide(at, like.col_tiles)];
                tiles[i].multiply(part, inputs + at * INPUT_TILE, lane);
                for (int e = 0; e < 4; e++) total[e] += share * part[e];
            }
        }
        leave_rows(red, total[0], total[2], lane);
    }
}

/* A block takes 16 rows of the output of one token. */
static __global__ void __launch_bounds__(WARPS * 32, 4) down_few(const __grid_constant__ expert_arguments a) {
    extern __shared__ __align__(16) unsigned char inputs[];
    __shared__ float red[2][WARPS][TILE_ROWS], shares[CHOICES + 1];
    __shared__ place places[CHOICES + 1];
    const int me = threadIdx.x, warp = me / 32, lane = me % 32, t = blockIdx.y;
    launch_dependents();
    if (me <= a.k) {     /* what the router chose is older than the op before this one, which waited for it */
        const matrix m = a.chosen(t, me, 0);
        places[me] = {m.tiles, m.scales};
        shares[me] = a.shares[t * (a.k + 1) + me];
    }
    __syncthreads();
    const bf16 *x = (const bf16 *)a.x + (int64_t)t * (a.k + 1) * a.cols;
    const bool alike = a.first[0].kind == a.own[0].kind;
    unsigned char *rings = inputs + (a.k + 1) * (a.cols / TILE_COLS) * INPUT_TILE;
    row_pieces<3> row;
    with_kind(a.first[0].kind, [&](auto kind) {
        constexpr tile_kind KIND = decltype(kind)::value;
        take_choices<KIND>(red[0][warp], a.first[0], places, 0, a.k + alike, inputs, rings, shares, warp, lane, [&] {
            wait_for_inputs();
            row.begin(x, (a.k + alike) * a.cols);
            stage_inputs<KIND>(inputs, row, [&](int c) { return shares[divide(c, a.cols)]; });
        });
    });
    if (!alike)
        with_kind(a.own[0].kind, [&](auto kind) {
            constexpr tile_kind KIND = decltype(kind)::value;
            take_choices<KIND>(red[1][warp], a.own[0], places, a.k, a.k + 1, inputs, rings, shares, warp, lane, [&] {
                row.begin(x + a.k * a.cols, a.cols);
                stage_inputs<KIND>(inputs + a.k * a.cols / TILE_COLS * INPUT_TILE, row, [&](int) { return shares[a.k]; });
            });
        });
    __syncthreads();
    if (me >= TILE_ROWS || blockIdx.x * TILE_ROWS + me >= a.rows) return;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += red[0][w][me];
    if (!alike)
        for (int w = 0; w < WARPS; w++) sum += red[1][w][me];
    bf16 *out = (bf16 *)a.out + (int64_t)t * a.rows + blockIdx.x * TILE_ROWS + me;
    *out = from_float<bf16>(to_float(*out) + sum);
}

int experts_down_few(tops_stream *stream, const expert_arguments &a) {
    size_t bytes = (size_t)(a.k + 1) * (a.cols / TILE_COLS) * INPUT_TILE + max(ring_bytes(a.first[0].kind, DOWN_GROUPS), ring_bytes(a.own[0].kind, DOWN_GROUPS));
    REQUIRE_SUPPORTED(a.k <= CHOICES && bytes <= 200 << 10, "k: at most %d choices of 50000 columns together, not %d of %d", CHOICES, a.k, a.cols);
    return launch_wide(stream, down_few, dim3(ceil_div(a.rows, TILE_ROWS), a.n), WARPS * 32, bytes, a);
}
