/* The router of a mixture of experts: norm, logits, the k largest of them and their shares.
 *
 * One warp has all logits in registers and takes the largest k times, while the others write the normed row. */
#include "../cuda/storage.cuh"

enum { MOST = 1024, CHOICES = 32, THREADS = 512 };      /* experts, MOST / 32 for each lane; chosen ones, one for each lane */

/* Larger floats have larger keys; a NaN counts as -infinity, nothing as 0. */
static __device__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x == x ? x : -INFINITY);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static __device__ float of_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/* sm_80 has these for integers */
static __device__ uint32_t largest(uint32_t x) { return __reduce_max_sync(~0u, x); }
static __device__ uint32_t smallest(uint32_t x) { return __reduce_min_sync(~0u, x); }

/* Lane l has logits l + 32 i. Experts come largest first, among equals the lower number first. */
template <int EACH> static __device__ void choose_experts(int32_t *experts, float *shares, const float (&logit)[EACH], float gate, int e, int k, int gated, int renormalize) {
    const int lane = threadIdx.x % 32;
    uint32_t key[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) key[i] = lane + 32 * i < e ? key_of(logit[i]) : 0;
    float first = 0, own = 0;   /* the largest, and the one that this lane will keep */
    int number = 0;
    for (int round = 0; round < k; round++) {
        uint32_t best = 0;
        int at = 0;
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--)
            if (key[i] >= best) best = key[i], at = i;
        const uint32_t most = largest(best), winner = smallest(best == most ? (uint32_t)(lane + 32 * at) : UINT32_MAX);
        if (round == 0) first = of_key(most);
        if (lane == round) own = of_key(most), number = (int)winner;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if ((uint32_t)(lane + 32 * i) == winner) key[i] = 0;
    }
    const float share = lane < k ? __expf(own - first) : 0;
    float all = share;
    if (!renormalize) {
        all = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + 32 * i < e) all += __expf(of_key(key_of(logit[i])) - first);
    }
    all = warp_sum(all);
    if (lane < k) experts[lane] = number, shares[lane] = share / all;
    if (lane == 0) shares[k] = gated ? sigmoid(gate) : 1.0f;
}

template <typename T, int EACH>
static __global__ void __launch_bounds__(THREADS) choose(T *normed, int32_t *experts, float *shares, const T *x, const float *norm, const float *logits, int d, int e, int k,
                                                         int gated, int renormalize, float eps) {
    launch_dependents();
    wait_for_inputs();
    const int64_t t = blockIdx.x;
    const int me = threadIdx.x, lane = me % 32;
    x += t * d, normed += t * d;
    float logit[EACH], gate = 0, sum = 0;
    if (me < 32) {
        const float *l = logits + t * (e + gated);
#pragma unroll
        for (int i = 0; i < EACH; i++) logit[i] = lane + 32 * i < e ? l[lane + 32 * i] : 0;
        if (gated) gate = l[e];
    }
    for (int c = me; c < d; c += THREADS) sum += to_float(x[c]) * to_float(x[c]);
    const float factor = rsqrtf(block_sum(sum) / d + eps);
    if (me < 32) return choose_experts<EACH>(experts + t * k, shares + t * (k + 1), logit, gate, e, k, gated, renormalize);
    for (int c = me - 32; c < d; c += THREADS - 32) normed[c] = from_float<T>(to_float(x[c]) * factor * norm[c]);
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
        return launch(stream, w->rows <= 512 ? choose<T, 16> : choose<T, MOST / 32>, dim3(n), THREADS, 0, 1, (T *)normed, experts, shares, (const T *)x, norm, logits,
                      (int)w->cols, (int)w->rows, (int)k, (int)(parts == 2), renormalize, eps);
    });
}
