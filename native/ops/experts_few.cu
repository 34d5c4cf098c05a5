/* Experts of a few tokens: their numbers are read on the device, and nothing of an expert that nobody chose is read. */
#include "experts.cuh"

/* A block takes 16 rows of gate and up of one choice of one token; half of its warps take gate, half up. */
static __global__ void __launch_bounds__(WARPS * 32, 3) gate_up_few(expert_arguments a) {
    extern __shared__ __align__(16) char shared[];
    __shared__ float red[WARPS][8 * TILE_ROWS];
    bf16 *x = (bf16 *)shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y / (a.k + 1), j = blockIdx.y % (a.k + 1), part = warp / (WARPS / 2);
    int pitch = a.cols + PAD;
    float sum[1][4] = {};
    /* The shared expert is known beforehand. The op behind this one may begin once the experts' numbers are there for it, too. */
    if (j != a.k) wait_for_inputs(), launch_dependents();
    matrix m = a.chosen(t, j, part);
    with_kind(m.kind, [&](auto kind) {
        constexpr tile_kind KIND = decltype(kind)::value;
        take_tiles<KIND, 1, AHEAD<KIND>>(sum, m, blockIdx.x, warp % (WARPS / 2), WARPS / 2, x, pitch, 1, lane, [&] {
            if (j == a.k) wait_for_inputs(), launch_dependents();
            stage_rows(x, pitch, (const bf16 *)a.x + (int64_t)t * a.cols, a.cols, nullptr, 0, 1, a.cols, nullptr);
        });
    });
    leave_sums<1>(red[warp], sum, lane);
    __syncthreads();
    int row = threadIdx.x;
    if (row >= TILE_ROWS || blockIdx.x * TILE_ROWS + row >= a.rows) return;
    float gate = 0, up = 0;
    for (int w = 0; w < WARPS / 2; w++) gate += red[w][row], up += red[w + WARPS / 2][row];
    ((bf16 *)a.out)[(int64_t)blockIdx.y * a.rows + blockIdx.x * TILE_ROWS + row] = from_float<bf16>(silu(gate) * up);
}

int experts_gate_up_few(tops_stream *stream, const expert_arguments &a) {
    size_t bytes = (size_t)(a.cols + PAD) * sizeof(bf16);
    REQUIRE_SUPPORTED(bytes <= 200 << 10, "w: at most 100000 columns, not %d", a.cols);
    return launch_wide(stream, gate_up_few, dim3(ceil_div(a.rows, TILE_ROWS), a.n * (a.k + 1)), WARPS * 32, bytes, a);
}

/* A block takes 16 rows of the output of one token: its warps share the columns of all choices' matrices, as if they were one long
 * matrix. MANY tiles are on their way before the rows of x are there. */
template <tile_kind KIND, int MANY>
static __device__ void take_choices(float (&total)[1][4], const expert_arguments &a, int t, const bf16 *x, int warp, int lane, bool is_shared) {
    int col_tiles = a.cols / TILE_COLS, first = is_shared ? a.k * col_tiles : 0, end = is_shared ? (a.k + 1) * col_tiles : a.k * col_tiles;
    tile<KIND> tiles[MANY];
    for (int base = first + warp; base < end; base += MANY * WARPS) {
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            int at = base + i * WARPS;
            if (at < end) tiles[i].load(a.chosen(t, at / col_tiles, 0), blockIdx.x, at % col_tiles, lane);
        }
        if (base == first + warp && !is_shared) wait_for_inputs();
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            int at = base + i * WARPS;
            if (at >= end) break;
            float part[1][4] = {}, share = a.shares[t * (a.k + 1) + at / col_tiles];
            const bf16 *row = x + (int64_t)at * TILE_COLS + lane % 4 * 4;     /* choices follow each other in x, as tiles do here */
            tiles[i].template multiply<1>(part, [&](int, int s) { return lane < 4 ? *(const uint2 *)(row + s * 16) : make_uint2(0, 0); });
            for (int e = 0; e < 4; e++) total[0][e] += share * part[0][e];
        }
    }
}

static __global__ void __launch_bounds__(WARPS * 32) down_few(expert_arguments a) {
    __shared__ float red[WARPS][8 * TILE_ROWS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y;
    const bf16 *x = (const bf16 *)a.x + (int64_t)t * (a.k + 1) * a.cols;
    float total[1][4] = {};
    launch_dependents();
    with_kind(kind_of(a.w[0].dtype), [&](auto kind) {
        constexpr tile_kind KIND = decltype(kind)::value;
        take_choices<KIND, tile_bytes(KIND) == 512 ? 10 : tile_bytes(KIND) == 1024 ? 4 : 2>(total, a, t, x, warp, lane, false);
    });
    wait_for_inputs();     /* a warp that had no tile has not waited yet */
    with_kind(kind_of(a.shared[0].dtype), [&](auto kind) { take_choices<decltype(kind)::value, 1>(total, a, t, x, warp, lane, true); });
    leave_sums<1>(red[warp], total, lane);
    __syncthreads();
    int row = threadIdx.x;
    if (row >= TILE_ROWS || blockIdx.x * TILE_ROWS + row >= a.rows) return;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += red[w][row];
    bf16 *out = (bf16 *)a.out + (int64_t)t * a.rows + blockIdx.x * TILE_ROWS + row;
    *out = from_float<bf16>(to_float(*out) + sum);
}

int experts_down_few(tops_stream *stream, const expert_arguments &a) {
    return launch(stream, down_few, dim3(ceil_div(a.rows, TILE_ROWS), a.n), WARPS * 32, 0, 1, a);
}
