/* The router of a mixture of experts: norm, logits, the k largest of them and their shares. A warp chooses, from its registers. */
#include "../cuda/tensor_core.cuh"

enum { EACH = 32 };      /* logits in a lane: up to 1024 experts */

template <typename T>
static __global__ void choose(T *normed, int32_t *experts, float *shares, const T *x, const float *norm, const float *logits, int d, int e, int k,
                              int gated, int renormalize, float eps) {
    launch_dependents();
    int64_t t = blockIdx.x;
    int lane = threadIdx.x % 32;
    wait_for_inputs();
    const float *l = logits + t * (e + gated);
    x += t * d, normed += t * d, experts += t * k, shares += t * (k + 1);
    float sum = 0;
    for (int c = threadIdx.x; c < d; c += blockDim.x) sum += to_float(x[c]) * to_float(x[c]);
    float factor = rsqrtf(block_sum(sum) / d + eps);
    for (int c = threadIdx.x; c < d; c += blockDim.x) normed[c] = from_float<T>(to_float(x[c]) * factor * norm[c]);
    if (threadIdx.x >= 32) return;
    float value[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float at = lane + 32 * i < e ? l[lane + 32 * i] : -INFINITY;
        value[i] = at != at ? -INFINITY : at;     /* a NaN comes last */
    }
    uint32_t taken = 0;
    float highest = 0, chosen = 0, all = 0, mine = 0;
    for (int j = 0; j < k; j++) {
        float best = -INFINITY;
        int index = 0x7fffffff;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (!(taken >> i & 1) && lane + 32 * i < e && (value[i] > best || index == 0x7fffffff)) best = value[i], index = lane + 32 * i;
        for (int step = 16; step; step /= 2) {
            float other = __shfl_xor_sync(~0u, best, step);
            int at = __shfl_xor_sync(~0u, index, step);
            if (other > best || (other == best && at < index)) best = other, index = at;
        }
        if (index % 32 == lane) taken |= 1u << index / 32;
        if (j == 0) highest = best;
        float share = __expf(best - highest);
        chosen += share;
        if (lane == 0) experts[j] = index;
        if (lane == j % 32) mine = share;
        if (j % 32 == 31 || j == k - 1) {
            if (lane <= j % 32) shares[j / 32 * 32 + lane] = mine;
        }
    }
    if (!renormalize) {
#pragma unroll
        for (int i = 0; i < EACH; i++) all += lane + 32 * i < e ? __expf(value[i] - highest) : 0;
        all = warp_sum(all);
    }
    __syncwarp();
    for (int j = lane; j < k; j += 32) shares[j] /= renormalize ? chosen : all;
    if (lane == 0) shares[k] = gated ? sigmoid(l[e]) : 1.0f;
}

int tops_rms_norm_route(tops_stream *stream, void *normed, float *logits, int32_t *experts, float *shares, const void *x,
                        const float *norm, const tops_weight *w, int32_t parts, int64_t n, int64_t k, int32_t renormalize, float eps,
                        int32_t dtype) {
    REQUIRE(parts == 1 || parts == 2, "parts: must be 1 or 2, not %d", parts);
    REQUIRE(k >= 0 && k <= w->rows, "k: must be in 0..%lld, not %lld", (long long)w->rows, (long long)k);
    REQUIRE(parts == 1 || w[1].rows == 1, "w[1]: must have one row, not %lld", (long long)w[1].rows);
    REQUIRE_SUPPORTED(w->rows <= 32 * EACH, "w: at most %d experts, not %lld", 32 * EACH, (long long)w->rows);
    int status = tops_rms_norm_linear_f32(stream, logits, x, norm, w, parts, n, eps, dtype);
    if (status) return status;
    return with_storage(dtype, [&](auto t) {
        typedef decltype(t) T;
        return launch(stream, choose<T>, dim3(n), 256, 0, 1, (T *)normed, experts, shares, (const T *)x, norm, logits, (int)w->cols, (int)w->rows, (int)k, (int)(parts == 2), renormalize, eps);
    });
}
