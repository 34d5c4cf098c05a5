/* The router of a mixture of experts: norm, logits, the k largest of them and their shares.
 *
 * A few of the block's warps choose while the others write the normed row. Not one of the k largest logits is below the k-th largest of 32 groups' own
 * largest, and few more than k are not: these are picked out and ordered by counting. */
#include "../cuda/storage.cuh"

enum { MOST = 1024, CHOICES = 32, CHOOSING = 128, NORMING = 384, SHARE = CHOOSING / 32 };   /* experts; chosen ones; threads; those of a group */

/* Larger logits have larger places, and a NaN has that of -infinity; none has 0. A key is a place and, of equal ones, larger for the lower number. */
static __device__ uint32_t place_of(float x) {
    const uint32_t bits = __float_as_uint(x == x ? x : -INFINITY);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static __device__ float logit_of(uint32_t place) { return __uint_as_float(place & 0x80000000u ? place & 0x7fffffffu : ~place); }
static __device__ uint64_t key_of(uint32_t place, int number) { return (uint64_t)place << 32 | (uint32_t)~number; }

/* How many of a list are larger than a key; SHARE threads that stand together ask the same */
static __device__ int larger(const uint64_t *keys, int count, uint64_t key) {
    int found = 0;
#pragma unroll 2
    for (int i = threadIdx.x % SHARE; i < count; i += SHARE) found += keys[i] > key;
#pragma unroll
    for (int step = SHARE / 2; step; step /= 2) found += __shfl_xor_sync(~0u, found, step);
    return found;
}
static __device__ void sync(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

/* Experts come largest first, among equals the lower number first. Group g has one number of each 32, 32 a + (g xor a): so that of logits that are all equal, or
 * come again after some, no more are picked than needed. */
template <int EACH> static __device__ void choose_experts(int32_t *experts, float *shares, const float *logits, int e, int k, int gated, int renormalize) {
    __shared__ uint64_t largest[32], picked[MOST], chosen[CHOICES], least;
    __shared__ int count;
    const int me = threadIdx.x, lane = me % 32;
    const float gate = gated && me == 0 ? logits[e] : 0;
    auto number = [&](int i) {   /* the thread's i-th */
        const int a = me % SHARE + SHARE * i;
        return 32 * a + (me / SHARE ^ a);
    };
    uint32_t place[EACH];
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        place[i] = number(i) < e ? place_of(logits[number(i)]) : 0;
        own = max(own, key_of(place[i], number(i)));
    }
#pragma unroll
    for (int step = SHARE / 2; step; step /= 2) own = max(own, (uint64_t)__shfl_xor_sync(~0u, own, step));
    largest[me / SHARE] = own;
    if (me == 0) count = 0;
    sync(1, CHOOSING);
    if (larger(largest, 32, own) == k - 1) least = own;
    sync(1, CHOOSING);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint64_t key = key_of(place[i], number(i));
        if (k && key >= least) picked[atomicAdd(&count, 1)] = key;
    }
    sync(1, CHOOSING);
#pragma unroll 1
    for (int i = me / SHARE; i - lane / SHARE < count; i += CHOOSING / SHARE) {   /* whole warps */
        const uint64_t key = picked[min(i, count - 1)];
        const int before = larger(picked, count, key);
        if (i < count && before < k) chosen[before] = key;
    }
    sync(1, CHOOSING);
    if (me >= 32) return;
    const uint64_t key = lane < k ? chosen[lane] : 0;
    const float first = logit_of((uint32_t)(__shfl_sync(~0u, key, 0) >> 32)), share = lane < k ? __expf(logit_of((uint32_t)(key >> 32)) - first) : 0;
    float all = share;
    if (!renormalize) {
        all = 0;
#pragma unroll 1
        for (int i = lane; i < e; i += 32) all += __expf(logit_of(place_of(logits[i])) - first);
    }
    all = warp_sum(all);
    if (lane < k) experts[lane] = (int)~(uint32_t)key, shares[lane] = share / all;
    if (lane == 0) shares[k] = gated ? sigmoid(gate) : 1.0f;
}

template <typename T, int EACH>
static __global__ void __launch_bounds__(CHOOSING + NORMING) choose(T *normed, int32_t *experts, float *shares, const T *x, const float *norm, const float *logits, int d, int e,
                                                                    int k, int gated, int renormalize, float eps) {
    extern __shared__ float row[];   /* [d] the norm's weights, [d] x */
    __shared__ float sums[NORMING / 32];
    launch_dependents();
    const int64_t t = blockIdx.x;
    const int lane = threadIdx.x % 32, me = threadIdx.x - CHOOSING;
    if (me < 0) {
        wait_for_inputs();
        return choose_experts<EACH>(experts + t * k, shares + t * (k + 1), logits + t * (e + gated), e, k, gated, renormalize);
    }
#pragma unroll 1
    for (int c = me; c < d; c += NORMING) row[c] = norm[c];
    wait_for_inputs();
    float sum = 0;
#pragma unroll 4
    for (int c = me; c < d; c += NORMING) {
        const float v = to_float(x[t * d + c]);
        row[d + c] = v;
        sum += v * v;
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[me / 32] = sum;
    sync(2, NORMING);
    const float factor = rsqrtf(warp_sum(lane < NORMING / 32 ? sums[lane] : 0) / d + eps);
#pragma unroll 1
    for (int c = me; c < d; c += NORMING) normed[t * d + c] = from_float<T>(row[d + c] * factor * row[c]);
}

int tops_rms_norm_route(tops_stream *stream, void *normed, float *logits, int32_t *experts, float *shares, const void *x,
                        const float *norm, const tops_weight *w, int32_t parts, int64_t n, int64_t k, int32_t renormalize, float eps,
                        int32_t dtype) {
    REQUIRE(parts == 1 || parts == 2, "parts: must be 1 or 2, not %d", parts);
    REQUIRE(k >= 0 && k <= w->rows, "k: must be in 0..%lld, not %lld", (long long)w->rows, (long long)k);
    REQUIRE(parts == 1 || w[1].rows == 1, "w[1]: must have one row, not %lld", (long long)w[1].rows);
    REQUIRE_SUPPORTED(w->rows <= MOST && k <= CHOICES, "w, k: at most %d experts and %d choices, not %lld, %lld", MOST, CHOICES, (long long)w->rows,
                      (long long)k);
    REQUIRE_SUPPORTED(w->cols <= 8192, "w: at most 8192 columns, not %lld", (long long)w->cols);
    if (n == 0) return TOPS_OK;
    int status = tops_rms_norm_linear_f32(stream, logits, x, norm, w, parts, n, eps, dtype);
    if (status) return status;
    return with_storage(dtype, [&](auto t) {
        typedef decltype(t) T;
        return launch_wide(stream, w->rows <= MOST / 2 ? choose<T, MOST / 2 / CHOOSING> : choose<T, MOST / CHOOSING>, dim3(n), CHOOSING + NORMING,
                           2 * w->cols * sizeof(float), (T *)normed, experts, shares, (const T *)x, norm, logits, (int)w->cols, (int)w->rows, (int)k, (int)(parts == 2), renormalize, eps);
    });
}
