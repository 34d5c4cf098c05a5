/* Experts of a few tokens: their numbers are read on the device, and nothing of an expert that nobody chose is read. */
#include "experts_fixed.cuh"

enum { CHOICES = 32 };

/* A warp's sums over the columns it took, by row of the tile */
static __device__ inline void leave_rows(float *red, const float (&sum)[2], int lane) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float x = sum[row];
        x += __shfl_xor_sync(0xffffffff, x, 1);
        x += __shfl_xor_sync(0xffffffff, x, 2);
        if (lane % 4 == 0) red[lane / 4 + row * 8] = x;
    }
}

/* A block takes 16 rows of gate and up of one choice of one token; half of its warps take gate, half up. */
static __global__ void __launch_bounds__(WARPS * 32, 3) gate_up_few(const __grid_constant__ expert_arguments a) {
    extern __shared__ __align__(16) unsigned char inputs[];
    __shared__ float red[WARPS][8 * TILE_ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y / (a.k + 1), j = blockIdx.y % (a.k + 1), part = warp / (WARPS / 2), first = warp % (WARPS / 2);
    /* The shared expert is known beforehand. The op behind this one may begin once the experts' numbers are there for it, too. */
    if (j != a.k) wait_for_inputs(), launch_dependents();
    const matrix m = a.chosen(t, j, part);
    with_kind(m.kind, [&](auto kind) {
        constexpr tile_kind KIND = decltype(kind)::value;
        auto take_x = [&] {
            if (j == a.k) wait_for_inputs(), launch_dependents();
            stage_inputs<KIND>(inputs, (const bf16 *)a.x + (int64_t)t * a.cols, a.cols);
        };
        if constexpr (has_scales(KIND)) {
            float sum[2] = {};
            take_groups<KIND, KIND == TILES_4 ? 4 : 2>(sum, (m.col_tiles - first + WARPS / 2 - 1) / (WARPS / 2), lane, [&](int i) {
                const int at = first + i * (WARPS / 2);
                return tile_place{tile_codes(m, blockIdx.x, at), tile_scales(m, blockIdx.x, at), inputs + at * INPUT_TILE, 1.0f};
            }, take_x);
            leave_rows(red[warp], sum, lane);
        } else {
            float sum[1][4] = {};
            take_tiles<KIND, 1, AHEAD<KIND>>(sum, m, blockIdx.x, first, WARPS / 2, inputs, 1, lane, take_x);
            leave_sums<1>(red[warp], sum, lane);
        }
    });
    __syncthreads();
    int row = threadIdx.x;
    if (row >= TILE_ROWS || blockIdx.x * TILE_ROWS + row >= a.rows) return;
    float gate = 0, up = 0;
    for (int w = 0; w < WARPS / 2; w++) gate += red[w][row], up += red[w + WARPS / 2][row];
    ((bf16 *)a.out)[(int64_t)blockIdx.y * a.rows + blockIdx.x * TILE_ROWS + row] = from_float<bf16>(silu(gate) * up);
}

int experts_gate_up_few(tops_stream *stream, const expert_arguments &a) {
    size_t bytes = (size_t)(a.cols / TILE_COLS) * INPUT_TILE;
    REQUIRE_SUPPORTED(bytes <= 200 << 10, "w: at most 100000 columns, not %d", a.cols);
    return launch_wide(stream, gate_up_few, dim3(ceil_div(a.rows, TILE_ROWS), a.n * (a.k + 1)), WARPS * 32, bytes, a);
}

/* Where a choice's tiles and scales begin */
struct place {
    const char *tiles, *scales;
};

/* Choices from..until: the warps share the columns of all their matrices, as if they were one long matrix; MANY groups or tiles of each are on their
 * way before the rows of x are there. */
template <tile_kind KIND, int MANY, typename Ready>
static __device__ void take_choices(float *red, const matrix &like, const place *places, int from, int until, const unsigned char *inputs, const float *shares,
                                    int warp, int lane, Ready ready) {
    const int begin = from * like.col_tiles + warp, end = until * like.col_tiles, count = max((end - begin + WARPS - 1) / WARPS, 0);
    auto of = [&](int at) {   /* choices follow each other in x, as tiles do here */
        matrix m = like;
        m.tiles = places[at / like.col_tiles].tiles, m.scales = places[at / like.col_tiles].scales;
        return m;
    };
    if constexpr (has_scales(KIND)) {
        float sum[2] = {};
        take_groups<KIND, MANY>(sum, count, lane, [&](int i) {
            const int at = begin + i * WARPS;
            const matrix m = of(at);
            return tile_place{tile_codes(m, blockIdx.x, at % like.col_tiles), tile_scales(m, blockIdx.x, at % like.col_tiles), inputs + at * INPUT_TILE, shares[at / like.col_tiles]};
        }, ready);
        leave_rows(red, sum, lane);
    } else {
        float total[1][4] = {};
        tile<KIND> tiles[MANY];
        for (int base = 0; base < count || base == 0; base += MANY) {
#pragma unroll
            for (int i = 0; i < MANY; i++)
                if (base + i < count) tiles[i].load(of(begin + (base + i) * WARPS), blockIdx.x, (begin + (base + i) * WARPS) % like.col_tiles, lane);
            if (base == 0) ready();
#pragma unroll
            for (int i = 0; i < MANY; i++) {
                const int at = begin + (base + i) * WARPS;
                if (base + i >= count) continue;
                float part[1][4] = {}, share = shares[at / like.col_tiles];
                const bf16 *row = (const bf16 *)(inputs + at * INPUT_TILE) + lane % 4 * 4;
                tiles[i].template multiply<1>(part, [&](int, int s) { return lane < 4 ? *(const uint2 *)(row + s * 16) : make_uint2(0, 0); });
                for (int e = 0; e < 4; e++) total[0][e] += share * part[0][e];
            }
        }
        leave_sums<1>(red, total, lane);
    }
}

/* A block takes 16 rows of the output of one token. */
static __global__ void __launch_bounds__(WARPS * 32, 2) down_few(const __grid_constant__ expert_arguments a) {
    extern __shared__ __align__(16) unsigned char inputs[];
    __shared__ float red[2][WARPS][8 * TILE_ROWS], shares[CHOICES + 1];
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
    with_kind(a.first[0].kind, [&](auto kind) {
        constexpr tile_kind KIND = decltype(kind)::value;
        take_choices<KIND, KIND == TILES_4 ? 6 : has_scales(KIND) ? 3 : 5 * AHEAD<KIND> / 2>(red[0][warp], a.first[0], places, 0, a.k + alike, inputs, shares, warp, lane, [&] {
            wait_for_inputs();
            stage_inputs<KIND>(inputs, x, (a.k + alike) * a.cols);
        });
    });
    if (!alike)
        with_kind(a.own[0].kind, [&](auto kind) {
            constexpr tile_kind KIND = decltype(kind)::value;
            take_choices<KIND, 1>(red[1][warp], a.own[0], places, a.k, a.k + 1, inputs, shares, warp, lane, [&] {
                stage_inputs<KIND>(inputs + a.k * a.cols / TILE_COLS * INPUT_TILE, x + a.k * a.cols, a.cols);
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
    size_t bytes = (size_t)(a.k + 1) * (a.cols / TILE_COLS) * INPUT_TILE;
    REQUIRE_SUPPORTED(a.k <= CHOICES && bytes <= 200 << 10, "k: at most %d choices of 100000 columns together, not %d of %d", CHOICES, a.k, a.cols);
    return launch_wide(stream, down_few, dim3(ceil_div(a.rows, TILE_ROWS), a.n), WARPS * 32, bytes, a);
}
