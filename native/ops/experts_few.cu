/* Experts of a few tokens: their numbers are read on the device, and nothing of an expert that nobody chose is read. */
#include "experts.cuh"

enum { CHOICES = 32 };

/* A block takes 16 rows of gate and up of one choice of one token; half of its warps take gate, half up. */
static __global__ void __launch_bounds__(WARPS * 32, 3) gate_up_few(const __grid_constant__ expert_arguments a) {
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
        take_tiles<KIND, 1, KIND == TILES_4 ? 8 : AHEAD<KIND>>(sum, m, blockIdx.x, warp % (WARPS / 2), WARPS / 2, x, pitch, 1, lane, [&] {
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

/* Where a choice's tiles and scales begin */
struct place {
    const char *tiles, *scales;
};

/* Choices from..until: the warps share the columns of all their matrices, as if they were one long matrix; MANY tiles of each are on their
 * way before the rows of x are there. */
template <tile_kind KIND, int MANY, typename Ready>
static __device__ void take_choices(float (&total)[1][4], const matrix &like, const place *places, int from, int until, const bf16 *x, const float *shares,
                                    int warp, int lane, Ready ready) {
    const int begin = from * like.col_tiles + warp, end = until * like.col_tiles;
    tile<KIND> tiles[MANY];
    for (int base = begin; base < end || base == begin; base += MANY * WARPS) {
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            const int at = base + i * WARPS;
            if (at >= end) continue;
            matrix m = like;
            m.tiles = places[at / like.col_tiles].tiles, m.scales = places[at / like.col_tiles].scales;
            tiles[i].load(m, blockIdx.x, at % like.col_tiles, lane);
        }
        if (base == begin) ready();
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            const int at = base + i * WARPS;
            if (at >= end) continue;
            float part[1][4] = {}, share = shares[at / like.col_tiles];
            const bf16 *row = x + at * TILE_COLS + lane % 4 * 4;     /* choices follow each other in x, as tiles do here */
            tiles[i].template multiply<1>(part, [&](int, int s) { return lane < 4 ? *(const uint2 *)(row + s * 16) : make_uint2(0, 0); });
            for (int e = 0; e < 4; e++) total[0][e] += share * part[0][e];
        }
    }
}

/* A block takes 16 rows of the output of one token. */
static __global__ void __launch_bounds__(WARPS * 32, 2) down_few(const __grid_constant__ expert_arguments a) {
    extern __shared__ __align__(16) char bytes[];
    __shared__ float red[WARPS][8 * TILE_ROWS], shares[CHOICES + 1];
    __shared__ place places[CHOICES + 1];
    int me = threadIdx.x, warp = me / 32, lane = me % 32, t = blockIdx.y, values = (a.k + 1) * a.cols;
    bf16 *x = (bf16 *)bytes;
    float total[1][4] = {};
    launch_dependents();
    if (me <= a.k) {     /* what the router chose is older than the op before this one, which waited for it */
        const matrix m = a.chosen(t, me, 0);
        places[me] = {m.tiles, m.scales};
        shares[me] = a.shares[t * (a.k + 1) + me];
    }
    __syncthreads();
    auto take_x = [&] {
        wait_for_inputs();
#pragma unroll 4
        for (int c = me * 8; c < values; c += WARPS * 32 * 8) *(uint4 *)(x + c) = *(const uint4 *)((const bf16 *)a.x + (int64_t)t * values + c);
        __syncthreads();
    };
    const bool alike = a.first[0].kind == a.own[0].kind;
    with_kind(a.first[0].kind, [&](auto kind) {
        constexpr tile_kind KIND = decltype(kind)::value;
        take_choices<KIND, KIND == TILES_4 ? 11 : 5 * AHEAD<KIND> / 2>(total, a.first[0], places, 0, a.k + alike, x, shares, warp, lane, take_x);
    });
    if (!alike)
        with_kind(a.own[0].kind, [&](auto kind) { take_choices<decltype(kind)::value, 1>(total, a.own[0], places, a.k, a.k + 1, x, shares, warp, lane, [] {}); });
    leave_sums<1>(red[warp], total, lane);
    __syncthreads();
    if (me >= TILE_ROWS || blockIdx.x * TILE_ROWS + me >= a.rows) return;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += red[w][me];
    bf16 *out = (bf16 *)a.out + (int64_t)t * a.rows + blockIdx.x * TILE_ROWS + me;
    *out = from_float<bf16>(to_float(*out) + sum);
}

int experts_down_few(tops_stream *stream, const expert_arguments &a) {
    size_t bytes = (size_t)(a.k + 1) * a.cols * sizeof(bf16);
    REQUIRE_SUPPORTED(a.k <= CHOICES && bytes <= 200 << 10, "k: at most %d choices of 100000 columns together, not %d of %d", CHOICES, a.k, a.cols);
    return launch_wide(stream, down_few, dim3(ceil_div(a.rows, TILE_ROWS), a.n), WARPS * 32, bytes, a);
}
