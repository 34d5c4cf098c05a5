/* Products with the experts that each token chose, and with the shared one: which kernels, and the plain ones. */
#include "experts.cuh"

/* A warp takes a row of a matrix and one pair of token and choice. */
template <typename T>
static __global__ void gate_up_plain(expert_arguments a) {
    launch_dependents();
    wait_for_inputs();
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y / (a.k + 1), j = blockIdx.y % (a.k + 1);
    if (row >= a.rows) return;
    matrix gate = a.chosen(t, j, 0), up = a.chosen(t, j, 1);
    float sum[2] = {};
    for (int c = lane; c < a.cols; c += 32) {
        float x = to_float(((const T *)a.x)[(int64_t)t * a.cols + c]);
        sum[0] += x * value_at(gate, row, c), sum[1] += x * value_at(up, row, c);
    }
    sum[0] = warp_sum(sum[0]), sum[1] = warp_sum(sum[1]);
    if (lane == 0) ((T *)a.out)[(int64_t)blockIdx.y * a.rows + row] = from_float<T>(silu(sum[0]) * sum[1]);
}

template <typename T>
static __global__ void down_plain(expert_arguments a) {
    launch_dependents();
    wait_for_inputs();
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y;
    if (row >= a.rows) return;
    float total = 0;
    for (int j = 0; j <= a.k; j++) {
        matrix down = a.chosen(t, j, 0);
        const T *x = (const T *)a.x + ((int64_t)t * (a.k + 1) + j) * a.cols;
        float sum = 0;
        for (int c = lane; c < a.cols; c += 32) sum += to_float(x[c]) * value_at(down, row, c);
        total += a.shares[t * (a.k + 1) + j] * warp_sum(sum);
    }
    T *out = (T *)a.out + (int64_t)t * a.rows + row;
    if (lane == 0) *out = from_float<T>(to_float(*out) + total);
}

static int check(const char *name, const tops_weight *w, int64_t e, int64_t rows, int64_t cols) {
    REQUIRE(w->cols == cols && w->rows == e * rows, "%s: must be %lld matrices of %lld x %lld, not %lld x %lld in all", name, (long long)e,
            (long long)rows, (long long)cols, (long long)w->rows, (long long)w->cols);
    REQUIRE(tops_packed_expert_bytes(w->dtype, rows, cols) >= 0, "%s: number format %d has no rows of %lld", name, w->dtype, (long long)cols);
    REQUIRE(w->dtype != TOPS_FP8_E4M3 || w->scales, "%s: fp8 needs scales", name);
    return TOPS_OK;
}

/* bf16 and tiles throughout, and rows of whole tiles */
static bool by_tiles(const tops_weight *w, const tops_weight *shared, int parts, int32_t dtype) {
    bool tiles = dtype == TOPS_BF16 && w->cols % TILE_COLS == 0;
    for (int part = 0; part < parts; part++)
        tiles = tiles && !is_rows(kind_of(w[part].dtype)) && !is_rows(kind_of(shared[part].dtype)) && w[part].dtype == w[0].dtype &&
                shared[part].dtype == shared[0].dtype;
    return tiles;
}

static int prepare(expert_arguments &a, int parts, void *out, const void *x, const int32_t *experts, const float *shares, const tops_weight *w,
                   const tops_weight *shared, int64_t n, int64_t e, int64_t k) {
    REQUIRE(n >= 0 && e > 0 && k >= 0 && k <= e, "n, e, k: must be n >= 0 and k <= e, not %lld, %lld, %lld", (long long)n, (long long)e, (long long)k);
    for (int part = 0; part < parts; part++) {
        int status = check("w", &w[part], e, shared->rows, w->cols);
        if (!status) status = check("shared", &shared[part], 1, shared->rows, w->cols);
        if (status) return status;
        a.first[part] = expert_matrix(w[part], 0, e), a.own[part] = expert_matrix(shared[part], 0, 1);
        a.stride[part] = a.scale_stride[part] = packed_bytes(a.first[part].kind, a.first[part].rows, a.first[part].cols);
        if (a.first[part].kind == TILES_FP8) a.scale_stride[part] = ceil_div(a.first[part].rows, 128) * ceil_div(a.first[part].cols, 128) * 4;
    }
    a.experts = experts, a.shares = shares, a.x = x, a.out = out;
    a.n = (int)n, a.e = (int)e, a.k = (int)k, a.rows = (int)shared->rows, a.cols = (int)w->cols;
    return TOPS_OK;
}

int tops_experts_gate_up_silu(tops_stream *stream, void *out, const void *x, const int32_t *experts, const tops_weight *w,
                              const tops_weight *shared, int64_t n, int64_t e, int64_t k, int32_t dtype) {
    expert_arguments a = {};
    int status = prepare(a, 2, out, x, experts, nullptr, w, shared, n, e, k);
    if (status || n == 0) return status;
    if (by_tiles(w, shared, 2, dtype)) return n <= FEW ? experts_gate_up_few(stream, a) : experts_gate_up_many(stream, a);
    return with_storage(dtype, [&](auto t) { return launch(stream, gate_up_plain<decltype(t)>, dim3(ceil_div(a.rows, 8), n * (k + 1)), 256, 0, 1, a); });
}

int tops_experts_down_add(tops_stream *stream, void *out, const void *x, const int32_t *experts, const float *shares,
                          const tops_weight *w, const tops_weight *shared, int64_t n, int64_t e, int64_t k, int32_t dtype) {
    expert_arguments a = {};
    int status = prepare(a, 1, out, x, experts, shares, w, shared, n, e, k);
    if (status || n == 0) return status;
    if (by_tiles(w, shared, 1, dtype)) return n <= FEW ? experts_down_few(stream, a) : experts_down_many(stream, a);
    return with_storage(dtype, [&](auto t) { return launch(stream, down_plain<decltype(t)>, dim3(ceil_div(a.rows, 8), n), 256, 0, 1, a); });
}
