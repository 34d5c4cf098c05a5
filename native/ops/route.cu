/* The router of a mixture of experts: norm, logits, the k largest of them and their shares.
 *
 * A warp sorts 32 logits; the first k of every warp are the candidates, and a candidate's place is the number of candidates before it. */
#include "../cuda/storage.cuh"

enum { MOST = 1024, CHOICES = 32 };      /* experts, one for each thread; chosen ones, one for each lane */

/* Larger first, among equals the lower number; a NaN comes last (as -infinity). */
static __device__ bool comes_first(float a, int i, float b, int j) { return a > b || (a == b && i < j); }

template <typename T>
static __global__ void choose(T *normed, int32_t *experts, float *shares, const T *x, const float *norm, const float *logits, int d, int e, int k,
                              int gated, int renormalize, float eps) {
    __shared__ float values[MOST], chosen[CHOICES];
    __shared__ int numbers[MOST];
    launch_dependents();
    int64_t t = blockIdx.x;
    int me = threadIdx.x, lane = me % 32, warp = me / 32, candidates = blockDim.x / 32 * k;
    wait_for_inputs();
    const float *l = logits + t * (e + gated);
    x += t * d, normed += t * d, experts += t * k, shares += t * (k + 1);
    float value = me < e ? l[me] : -INFINITY, gate = gated ? l[e] : 0, sum = 0;
    int number = me;
    if (value != value) value = -INFINITY;
    for (int c = me; c < d; c += blockDim.x) sum += to_float(x[c]) * to_float(x[c]);
    float factor = rsqrtf(block_sum(sum) / d + eps);
    for (int c = me; c < d; c += blockDim.x) normed[c] = from_float<T>(to_float(x[c]) * factor * norm[c]);
    float all = 0, own = value;
    for (int size = 2; size <= 32; size *= 2)      /* bitonic */
        for (int step = size / 2; step; step /= 2) {
            float other = __shfl_xor_sync(~0u, value, step);
            int at = __shfl_xor_sync(~0u, number, step);
            bool first = comes_first(value, number, other, at), wanted = ((lane & size) == 0) == ((lane & step) == 0);
            if (first != wanted) value = other, number = at;
        }
    if (lane < k) values[warp * k + lane] = value, numbers[warp * k + lane] = number;
    __syncthreads();
    if (me < candidates) {
        value = values[me], number = numbers[me];
        int place = 0;
        for (int i = 0; i < candidates; i++) place += comes_first(values[i], numbers[i], value, number);
        if (place < k) experts[place] = number, chosen[place] = value;
    }
    __syncthreads();
    if (!renormalize) all = block_sum(me < e ? __expf(own - chosen[0]) : 0);
    if (warp) return;
    float share = lane < k ? __expf(chosen[lane] - chosen[0]) : 0, total = warp_sum(share);
    if (lane < k) shares[lane] = share / (renormalize ? total : all);
    if (lane == 0) shares[k] = gated ? sigmoid(gate) : 1.0f;
}

int tops_rms_norm_route(tops_stream *stream, void *normed, float *logits, int32_t *experts, float *shares, const void *x,
                        const float *norm, const tops_weight *w, int32_t parts, int64_t n, int64_t k, int32_t renormalize, float eps,
                        int32_t dtype) {
    REQUIRE(parts == 1 || parts == 2, "parts: must be 1 or 2, not %d", parts);
    REQUIRE(k >= 0 && k <= w->rows, "k: must be in 0..%lld, not %lld", (long long)w->rows, (long long)k);
    REQUIRE(parts == 1 || w[1].rows == 1, "w[1]: must have one row, not %lld", (long long)w[1].rows);
    REQUIRE_SUPPORTED(w->rows <= MOST && k <= CHOICES, "w, k: at most %d experts and %d choices, not %lld, %lld", MOST, CHOICES, (long long)w->rows,
                      (long long)k);
    if (n == 0) return TOPS_OK;
    int status = tops_rms_norm_linear_f32(stream, logits, x, norm, w, parts, n, eps, dtype);
    if (status) return status;
    return with_storage(dtype, [&](auto t) {
        typedef decltype(t) T;
        return launch(stream, choose<T>, dim3(n), (int)ceil_div(w->rows, 32) * 32, 0, 1, (T *)normed, experts, shares, (const T *)x, norm, logits, (int)w->cols, (int)w->rows, (int)k, (int)(parts == 2), renormalize, eps);
    });
}
