/* Rows by the value that sends them somewhere: a stable counting sort in one block, and its way back. */
#include "../cuda/storage.cuh"

enum { THREADS = 1024 };

/* Each thread counts a stretch of the values; places are handed out value by value, stretch by stretch, so the order is stable.
 * With many values a thread takes values instead: e counters of all stretches would not fit. */
static __global__ void gather_by_value(int32_t *order, int32_t *starts, const int32_t *values, int64_t n, int64_t e) {
    __shared__ int sums[32];
    __shared__ int carried;
    launch_dependents();
    wait_for_inputs();
    int me = threadIdx.x, lane = me % 32, warp = me / 32;
    for (int64_t v = me; v <= e; v += THREADS) starts[v] = 0;
    if (me == 0) carried = 0;
    __syncthreads();
    for (int64_t i = me; i < n; i += THREADS)
        if (values[i] >= 0 && values[i] < e) atomicAdd(&starts[values[i] + 1], 1);
    __syncthreads();
    for (int64_t base = 1; base <= e; base += THREADS) {      /* running sums */
        int64_t v = base + me;
        int count = v <= e ? starts[v] : 0;
        for (int step = 1; step < 32; step *= 2) {
            int below = __shfl_up_sync(~0u, count, step);
            if (lane >= step) count += below;
        }
        if (lane == 31) sums[warp] = count;
        __syncthreads();
        for (int w = 0; w < warp; w++) count += sums[w];
        count += carried;
        __syncthreads();
        if (v <= e) starts[v] = count;
        if (me == THREADS - 1) carried = count;
        __syncthreads();
    }
    for (int64_t v = warp; v < e; v += THREADS / 32) {        /* a warp finds the indices of its value, in order */
        int at = starts[v], end = starts[v + 1];
        for (int64_t base = 0; base < n && at < end; base += 32) {
            bool mine = base + lane < n && values[base + lane] == v;
            unsigned found = __ballot_sync(~0u, mine);
            if (mine) order[at + __popc(found & ((1u << lane) - 1))] = (int32_t)(base + lane);
            at += __popc(found);
        }
    }
}

int tops_gather_by_value(tops_stream *stream, int32_t *order, int32_t *starts, const int32_t *values, int64_t n, int64_t e) {
    REQUIRE(n >= 0 && e >= 0 && n <= INT32_MAX, "n, e: must be in 0..2^31 - 1, not %lld, %lld", (long long)n, (long long)e);
    return launch(stream, gather_by_value, dim3(1), THREADS, 0, 1, order, starts, values, n, e);
}

/* A thread owns a column: rows that meet in one place are added in the order of t. */
template <typename T>
static __global__ void scatter_add(T *out, const T *in, const int32_t *index, const float *scale, int64_t n, int64_t rows, int64_t d) {
    launch_dependents();
    wait_for_inputs();
    int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= d) return;
    for (int64_t t = 0; t < n; t++) {
        int to = index[t];
        if (to < 0 || to >= rows) continue;
        out[to * d + c] = from_float<T>(to_float(out[to * d + c]) + (scale ? scale[t] : 1.0f) * to_float(in[t * d + c]));
    }
}

int tops_scatter_add_by_index(tops_stream *stream, void *out, const void *in, const int32_t *index, const float *scale,
                              int64_t n, int64_t rows, int64_t d, int32_t dtype) {
    REQUIRE(n >= 0 && rows >= 0 && d >= 0, "n, rows, d: must be at least 0, not %lld, %lld, %lld", (long long)n, (long long)rows, (long long)d);
    return with_storage(dtype, [&](auto t) {
        return launch(stream, scatter_add<decltype(t)>, dim3(ceil_div(d, 64)), 64, 0, 1, (decltype(t) *)out, (const decltype(t) *)in, index, scale, n, rows, d);
    });
}
