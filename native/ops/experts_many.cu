/* Experts of a prompt: pairs of token and choice are sorted by expert, each expert's pairs are one product, and what belongs to a token
 * is added in the order of its choices. */
#include "experts.cuh"

enum { THREADS = 1024, ENTRY = 64 };

/* list: (expert, first place in order) for every 64 pairs of an expert */
static __global__ void make_list(int2 *list, int32_t *length, const int32_t *starts, int e) {
    __shared__ int sums[32], carried;
    launch_dependents();
    wait_for_inputs();
    int me = threadIdx.x, lane = me % 32, warp = me / 32;
    if (me == 0) carried = 0;
    __syncthreads();
    for (int base = 0; base < e; base += THREADS) {
        int expert = base + me, entries = expert < e ? (starts[expert + 1] - starts[expert] + ENTRY - 1) / ENTRY : 0, at = entries;
        for (int step = 1; step < 32; step *= 2) {
            int below = __shfl_up_sync(~0u, at, step);
            if (lane >= step) at += below;
        }
        if (lane == 31) sums[warp] = at;
        __syncthreads();
        for (int w = 0; w < warp; w++) at += sums[w];
        at += carried;
        __syncthreads();
        if (me == THREADS - 1) carried = at;
        for (int i = 0; i < entries; i++) list[at - entries + i] = make_int2(expert, starts[expert] + i * ENTRY);
        __syncthreads();
    }
    if (me == 0) *length = carried;
}

struct sorted_pairs {
    int32_t *order, *starts, *length;
    int2 *list;
    int64_t entries;      /* at most */
};

static int sort_pairs(tops_stream *stream, const expert_arguments &a, Scratch &scratch, sorted_pairs &s) {
    int64_t pairs = (int64_t)a.n * a.k;
    s.entries = pairs / ENTRY + a.e;
    s.order = scratch.take<int32_t>(pairs), s.starts = scratch.take<int32_t>(a.e + 1), s.length = scratch.take<int32_t>(1);
    s.list = scratch.take<int2>(s.entries);
    REQUIRE_SCRATCH(s.order && s.starts && s.length ? s.list : nullptr);
    int status = tops_gather_by_value(stream, s.order, s.starts, a.experts, pairs, a.e);
    return status ? status : launch(stream, make_list, dim3(1), THREADS, 0, 1, s.list, s.length, (const int32_t *)s.starts, a.e);
}

/* The routed pairs, then the shared expert, into rows token (k + 1) + choice of out. */
static int multiply(tops_stream *stream, const expert_arguments &a, const sorted_pairs &s, bf16 *out, int matrices) {
    many_arguments job = {};
    for (int i = 0; i < matrices; i++) job.m[i] = a.first[i], job.stride[i] = a.stride[i], job.scale_stride[i] = a.scale_stride[i];
    job.x = (const bf16 *)a.x, job.pitch = a.cols, job.n = a.n * a.k;
    job.list = s.list, job.list_length = s.length, job.order = s.order, job.starts = s.starts, job.k = a.k, job.by_token = matrices == 2;
    job.out = out, job.out_cols = a.rows;
    int status = many_rows(stream, job, matrices, s.entries);
    job.list = nullptr;
    for (int i = 0; i < matrices; i++) job.m[i] = a.own[i], job.stride[i] = job.scale_stride[i] = 0;
    job.n = a.n, job.x_step = matrices == 2 ? 1 : a.k + 1, job.x_first = matrices == 2 ? 0 : a.k, job.out_step = a.k + 1, job.out_first = a.k;
    return status ? status : many_rows(stream, job, matrices, ceil_div(a.n, 64));
}

int experts_gate_up_many(tops_stream *stream, const expert_arguments &a) {
    Scratch scratch(stream);
    sorted_pairs s;
    int status = sort_pairs(stream, a, scratch, s);
    return status ? status : multiply(stream, a, s, (bf16 *)a.out, 2);
}

static __global__ void combine(bf16 *out, const bf16 *y, const float *shares, int choices, int d) {
    launch_dependents();
    wait_for_inputs();
    int64_t t = blockIdx.y;
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (c >= d) return;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int j = 0; j < choices; j++) add_scaled(sum, shares[t * choices + j], load4(y + (t * choices + j) * d + c));
    store4(out + t * d + c, add(load4(out + t * d + c), sum));
}

int experts_down_many(tops_stream *stream, const expert_arguments &a) {
    Scratch scratch(stream);
    sorted_pairs s;
    bf16 *y = scratch.take<bf16>((int64_t)a.n * (a.k + 1) * a.rows);
    REQUIRE_SCRATCH(y);
    REQUIRE_SUPPORTED(a.rows % 4 == 0, "w: rows must be a multiple of 4, not %d", a.rows);
    int status = sort_pairs(stream, a, scratch, s);
    if (!status) status = multiply(stream, a, s, y, 1);
    return status ? status : launch(stream, combine, dim3(ceil_div(a.rows, 1024), a.n), 256, 0, 1, (bf16 *)a.out, (const bf16 *)y, a.shares, a.k + 1, a.rows);
}
