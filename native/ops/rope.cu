/* Rotary position embedding (Su et al. 2021), with the norm of queries and keys and the store into the cache in one pass. */
#include "../cuda/rope.cuh"

enum { HEAD_MAX = 256 };

__global__ void rope_angles(float *table, const int32_t *positions, const float *inv_freq, int64_t n, int64_t half) {
    launch_dependents();
    wait_for_inputs();
    int64_t at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (at >= n * half) return;
    float s, c;
    sincosf((float)positions[at / half] * inv_freq[at % half], &s, &c);
    table[2 * at] = c;
    table[2 * at + 1] = s;
}

int tops_rope_table(tops_stream *stream, float *table, const int32_t *positions, const float *inv_freq, int64_t n, int64_t r) {
    REQUIRE(r >= 0 && r % 2 == 0, "r: must be even and at least 0, not %lld", (long long)r);
    if (n * r <= 0) return TOPS_OK;
    return launch(stream, rope_angles, dim3((unsigned)ceil_div(n * r / 2, 128)), dim3(128), 0, 1, table, positions, inv_freq, n, r / 2);
}

/* A warp for each (head, row): q heads stay in place, k and v heads go to their slot. */
template <typename T, typename C>
__global__ void norm_rope_store(T *qkv, C *cache_k, C *cache_v, const int32_t *slots, const float *table, const float *q_norm, const float *k_norm,
                                int h, int g, int p, int r, int pairs, int64_t row_cols, int page_size, float eps) {
    launch_dependents();
    wait_for_inputs();
    int head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t t = blockIdx.y;
    if (head >= h + 2 * g) return;
    T *from = qkv + t * row_cols + (int64_t)head * p;
    __shared__ float heads[4][HEAD_MAX];
    float *x = heads[threadIdx.x / 32];
    for (int c = lane; c < p; c += 32) x[c] = to_float(from[c]);
    __syncwarp();
    if (head < h + g) {
        const float *norm = head < h ? q_norm : k_norm;
        if (norm) {
            float sum = 0;
            for (int c = lane; c < p; c += 32) sum += x[c] * x[c];
            float factor = 1.0f / sqrtf(warp_sum(sum) / (float)p + eps);
            for (int c = lane; c < p; c += 32) x[c] = x[c] * factor * norm[c];
            __syncwarp();
        }
        const float *row = table + t * r;
        for (int j = lane; j < r / 2; j += 32) {
            int first = pairs ? 2 * j : j, second = pairs ? 2 * j + 1 : j + r / 2;
            float a = x[first], b = x[second], c = row[2 * j], s = row[2 * j + 1];
            x[first] = a * c - b * s;
            x[second] = b * c + a * s;
        }
        __syncwarp();
    }
    if (head < h) {
        for (int c = lane; c < p; c += 32) from[c] = from_float<T>(x[c]);
        return;
    }
    int64_t slot = slots[t], page = slot / page_size, in_page = slot % page_size;
    C *to = (head < h + g ? cache_k : cache_v) + ((page * g + (head - h) % g) * page_size + in_page) * p;
    for (int c = lane; c < p; c += 32) to[c] = from_float<C>(x[c]);
}

/* The same where each lane holds both halves of its rotated pairs: half-split, r / 2 a multiple of 32. p = 32 EACH. */
template <typename T, typename C, int EACH>
__global__ void __launch_bounds__(128) norm_rotate_store(T *qkv, C *cache_k, C *cache_v, const int32_t *slots, const float *table, const float *q_norm, const float *k_norm,
                                                         int h, int g, int r, int64_t row_cols, int page_size, float eps) {
    constexpr int P = 32 * EACH;
    launch_dependents();
    const int head = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t t = blockIdx.y;
    if (head >= h + 2 * g) return;
    const float *norm = head < h ? q_norm : head < h + g ? k_norm : nullptr;
    const int slot = slots[t];
    float weight[EACH], x[EACH];
    load_norm(weight, norm, lane);
    wait_for_inputs();
    T *from = qkv + t * row_cols + (int64_t)head * P;
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] = to_float(from[lane + 32 * i]);
    if (head < h + g) norm_rotate(x, weight, norm != nullptr, reinterpret_cast<const float2 *>(table + t * r), r, eps, lane);
    if (head < h) {
#pragma unroll
        for (int i = 0; i < EACH; i++) from[lane + 32 * i] = from_float<T>(x[i]);
        return;
    }
    const int64_t page = slot / page_size, in_page = slot % page_size;
    C *to = (head < h + g ? cache_k : cache_v) + ((page * g + (head - h) % g) * page_size + in_page) * P;
#pragma unroll
    for (int i = 0; i < EACH; i++) to[lane + 32 * i] = from_float<C>(x[i]);
}

int tops_qk_norm_rope_store(tops_stream *stream, void *qkv, const tops_kv *kv, const tops_batch *batch, const float *table,
                            const float *q_norm, const float *k_norm, int64_t h, int64_t g, int64_t p, int64_t r,
                            int32_t pairs, int32_t gated, float eps, int32_t dtype) {
    REQUIRE(p >= 1 && p <= HEAD_MAX, "p: must be in 1..256, not %lld", (long long)p);
    REQUIRE(r >= 0 && r <= p && r % 2 == 0, "r: must be even and at most p, not %lld", (long long)r);
    REQUIRE_SUPPORTED(kv->dtype == TOPS_F32 || kv->dtype == TOPS_F16 || kv->dtype == TOPS_BF16, "kv: must be f32, f16 or bf16, not %d", kv->dtype);
    REQUIRE(batch->n < 65536, "n: at most 65535 rows in a step, not %lld", (long long)batch->n);
    if (batch->n == 0) return TOPS_OK;
    dim3 grid((unsigned)ceil_div(h + 2 * g, 4), (unsigned)batch->n), block(128);
    int64_t row_cols = ((gated ? 2 * h : h) + 2 * g) * p;
    int status = TOPS_OK;
    const bool halves = halves_supported(p, r, pairs);
#define ROTATE_AS(C, EACH) \
    BY_STORAGE(dtype, status = launch(stream, norm_rotate_store<T, C, EACH>, grid, block, 0, 1, static_cast<T *>(qkv), static_cast<C *>(kv->k), static_cast<C *>(kv->v), \
                                      batch->slots, table, q_norm, k_norm, (int)h, (int)g, (int)r, row_cols, (int)kv->page_size, eps))
#define ROTATE(EACH) \
    do { \
        if (kv->dtype == TOPS_F32) ROTATE_AS(float, EACH); \
        else if (kv->dtype == TOPS_F16) ROTATE_AS(__half, EACH); \
        else ROTATE_AS(__nv_bfloat16, EACH); \
        return status; \
    } while (0)
    if (halves && p == 64) ROTATE(2);
    if (halves && p == 128) ROTATE(4);
    if (halves && p == 256) ROTATE(8);
#define STORE_AS(C) \
    BY_STORAGE(dtype, status = launch(stream, norm_rope_store<T, C>, grid, block, 0, 1, static_cast<T *>(qkv), static_cast<C *>(kv->k), static_cast<C *>(kv->v), \
                                      batch->slots, table, q_norm, k_norm, (int)h, (int)g, (int)p, (int)r, (int)pairs, row_cols, (int)kv->page_size, eps))
    if (kv->dtype == TOPS_F32) STORE_AS(float);
    else if (kv->dtype == TOPS_F16) STORE_AS(__half);
    else STORE_AS(__nv_bfloat16);
    return status;
}
