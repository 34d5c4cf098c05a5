/* Attention of a few rows over 16-bit caches: a block takes a span of positions for all query heads that share a key-value head, so keys
 * and values are read once, in 16-byte pieces that are all requested together; the last block of a row merges the spans' softmaxes. */
#include "../cuda/attention.cuh"

namespace {
constexpr int WARPS = 4, THREADS = WARPS * 32, SPLITS_MOST = 32, COUNTERS = 4096;

template <typename C> __device__ inline void eight_floats(uint4 raw, float (&out)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = sizeof(C) == sizeof(__half) && !__is_same(C, __nv_bfloat16)
                          ? __half22float2(*reinterpret_cast<const __half2 *>(&words[i]))
                          : make_float2(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

/* P values of a head, H query heads at most for a key-value head. LANES lanes share a position, so a warp takes PER positions at once. */
template <typename T, typename C, int P, int H>
__global__ void __launch_bounds__(THREADS) attend_heads(T *out, float *partial, float2 *softmax, unsigned *counters, const T *qkv, const C *cache_k,
                                                        const C *cache_v, const int32_t *positions, const int32_t *sequences,
                                                        const int32_t *page_table, const int32_t *query_starts, SpanShape s) {
    constexpr int LANES = P / 8, PER = 32 / LANES, STEPS = H > 4 ? 4 : 8, TILE = WARPS * STEPS * PER;
    __shared__ float merged[WARPS][H][P];
    __shared__ float2 warp_softmax[WARPS][H];
    __shared__ bool last;
    launch_dependents();
    const int split = blockIdx.x, kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane / LANES, dim = lane % LANES * 8;
    const int64_t t = blockIdx.z;
    const int length = positions[t] + 1, sequence = sequences[t], fresh = positions[query_starts[sequence]];
    /* Spans are whole tiles; short texts use few of the splits, which are fixed by the page table's width. */
    const int span = ((length + s.splits - 1) / s.splits + TILE - 1) / TILE * TILE, used = (length + span - 1) / span;
    const int from = split * span, until = min(length, from + span);
    if (from >= until) return;
    const int32_t *pages = page_table + sequence * s.max_pages;
    uint4 key[STEPS], value[STEPS];
    auto place = [&](int tile, int k) {
        const int position = min(tile + (warp * STEPS + k) * PER + sub, until - 1);
        return (((int64_t)pages[position >> s.page_shift] * s.g + kv_head) * s.page_size + (position & (s.page_size - 1))) * P + dim;
    };
    auto load = [&](const C *cache, int64_t at) { return __ldcg(reinterpret_cast<const uint4 *>(cache + at)); };
    /* What earlier steps stored is older than this one and need not be waited for. */
    auto old = [&](int k) { return min(from + (warp * STEPS + k) * PER + sub, until - 1) < fresh; };
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        if (old(k)) {
            const int64_t at = place(from, k);
            key[k] = load(cache_k, at);
            value[k] = load(cache_v, at);
        }
    wait_for_inputs();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        if (!old(k)) {
            const int64_t at = place(from, k);
            key[k] = load(cache_k, at);
            value[k] = load(cache_v, at);
        }
    float q[H][8], sum[H][8] = {}, highest[H], total[H] = {};
#pragma unroll
    for (int j = 0; j < H; j++) {
        highest[j] = -INFINITY;
        const T *from_q = qkv + t * s.row_cols + (int64_t)(kv_head * s.heads + min(j, s.heads - 1)) * P + dim;
        if constexpr (sizeof(T) == 2) {
            eight_floats<T>(__ldcg(reinterpret_cast<const uint4 *>(from_q)), q[j]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) q[j][i] = from_q[i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) q[j][i] *= s.scale;
    }
    for (int tile = from; tile < until; tile += TILE) {
        const int first = tile + warp * STEPS * PER + sub, next = tile + TILE;
        float score[H][STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            float x[8];
            eight_floats<C>(key[k], x);
#pragma unroll
            for (int j = 0; j < H; j++) {
                float part = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) part += q[j][i] * x[i];
#pragma unroll
                for (int step = LANES / 2; step; step /= 2) part += __shfl_xor_sync(0xffffffff, part, step);
                score[j][k] = first + k * PER < until ? part : -INFINITY;
            }
        }
        if (next < until)
#pragma unroll
            for (int k = 0; k < STEPS; k++) key[k] = load(cache_k, place(next, k));
#pragma unroll
        for (int j = 0; j < H; j++) {
            float most = highest[j];
#pragma unroll
            for (int k = 0; k < STEPS; k++) most = fmaxf(most, score[j][k]);
#pragma unroll
            for (int step = LANES; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, step));
            const float shrink = most == -INFINITY ? 1.0f : __expf(highest[j] - most);
            total[j] *= shrink;
#pragma unroll
            for (int i = 0; i < 8; i++) sum[j][i] *= shrink;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                score[j][k] = most == -INFINITY ? 0.0f : __expf(score[j][k] - most);
                total[j] += score[j][k];
            }
            highest[j] = most;
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            float x[8];
            eight_floats<C>(value[k], x);
#pragma unroll
            for (int j = 0; j < H; j++)
#pragma unroll
                for (int i = 0; i < 8; i++) sum[j][i] += score[j][k] * x[i];
        }
        if (next < until)
#pragma unroll
            for (int k = 0; k < STEPS; k++) value[k] = load(cache_v, place(next, k));
    }
#pragma unroll
    for (int j = 0; j < H; j++) {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            total[j] += __shfl_xor_sync(0xffffffff, total[j], step);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[j][i] += __shfl_xor_sync(0xffffffff, sum[j][i], step);
        }
        if (sub == 0) {
            *reinterpret_cast<float4 *>(&merged[warp][j][dim]) = make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
            *reinterpret_cast<float4 *>(&merged[warp][j][dim + 4]) = make_float4(sum[j][4], sum[j][5], sum[j][6], sum[j][7]);
        }
        if (lane == 0) warp_softmax[warp][j] = make_float2(highest[j], total[j]);
    }
    __syncthreads();
    auto finish = [&](int head, int c, float4 v, float over) {
        const int64_t at = (t * s.h + kv_head * s.heads + head) * P + c;
        const float x[4] = {v.x / over, v.y / over, v.z / over, v.w / over};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float gate = s.gated ? sigmoid(to_float(qkv[t * s.row_cols + (int64_t)(s.h + 2 * s.g + kv_head * s.heads + head) * P + c + i])) : 1.0f;
            out[at + i] = from_float<T>(x[i] * gate);
        }
    };
    const int64_t base = (t * s.g + kv_head) * s.splits;   /* [splits][heads] of this row and head */
    for (int index = threadIdx.x; index < s.heads * P / 4; index += THREADS) {
        const int head = index / (P / 4), c = index % (P / 4) * 4;
        float most = -INFINITY, over = 0;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, warp_softmax[w][head].x);
        float4 v = make_float4(0, 0, 0, 0);
        for (int w = 0; w < WARPS; w++) {
            float weight = __expf(warp_softmax[w][head].x - most);
            over += warp_softmax[w][head].y * weight;
            add_scaled(v, weight, *reinterpret_cast<const float4 *>(&merged[w][head][c]));
        }
        if (used == 1) {
            finish(head, c, v, over);
        } else {
            reinterpret_cast<float4 *>(partial)[((base + split) * s.heads + head) * (P / 4) + c / 4] = v;
            if (c == 0) softmax[(base + split) * s.heads + head] = make_float2(most, over);
        }
    }
    if (used == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(counters + t * s.g + kv_head, (unsigned)used - 1) == (unsigned)used - 1;   /* back to 0 by itself */
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int index = threadIdx.x; index < s.heads * P / 4; index += THREADS) {
        const int head = index / (P / 4), c = index % (P / 4) * 4;
        float most = -INFINITY, over = 0;
        for (int i = 0; i < used; i++) most = fmaxf(most, __ldcg(&softmax[(base + i) * s.heads + head]).x);
        float4 v = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int i = 0; i < used; i++) {
            float2 one = __ldcg(&softmax[(base + i) * s.heads + head]);
            float weight = __expf(one.x - most);
            over += one.y * weight;
            add_scaled(v, weight, __ldcg(reinterpret_cast<const float4 *>(partial) + ((base + i) * s.heads + head) * (P / 4) + c / 4));
        }
        finish(head, c, v, over);
    }
}

template <typename T, typename C> int attend(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, const SpanShape &s) {
    const int64_t n = batch->n;
    Scratch scratch(stream);
    float *partial = scratch.take<float>(n * s.h * s.splits * s.p);
    float2 *softmax = scratch.take<float2>(n * s.h * s.splits);
    REQUIRE_SCRATCH(softmax);
    dim3 grid((unsigned)s.splits, (unsigned)s.g, (unsigned)n);
    int status = TOPS_OK;
#define ATTEND(P, H) \
    status = launch(stream, attend_heads<T, C, P, H>, grid, dim3(THREADS), 0, 1, static_cast<T *>(out), partial, softmax, stream->counters, \
                    static_cast<const T *>(qkv), static_cast<const C *>(kv->k), static_cast<const C *>(kv->v), batch->positions, batch->sequences, \
                    batch->page_table, batch->query_starts, s)
#define BY_HEADS(P) do { if (s.heads <= 2) ATTEND(P, 2); else if (s.heads <= 4) ATTEND(P, 4); else ATTEND(P, 8); } while (0)
    if (s.p == 64) BY_HEADS(64);
    else if (s.p == 128) BY_HEADS(128);
    else BY_HEADS(256);
    return status;
}
}   // namespace

bool decode_supports(const tops_kv *kv, int64_t n, const SpanShape &s) {
    return (s.p == 64 || s.p == 128 || s.p == 256) && kv->dtype != TOPS_F32 && s.heads <= 8 && n <= 16 && n * s.g <= COUNTERS && s.page_size == 1 << s.page_shift;
}

int attend_decode(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s, int dtype) {
    s.splits = (int)min(ceil_div(batch->max_pages * kv->page_size, 64), (int64_t)SPLITS_MOST);
    int status = TOPS_OK;
    BY_STORAGE(dtype, {
        if (kv->dtype == TOPS_F16) status = attend<T, __half>(stream, out, qkv, kv, batch, s);
        else status = attend<T, __nv_bfloat16>(stream, out, qkv, kv, batch, s);
    });
    return status;
}
