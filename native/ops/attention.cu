/* Attention over paged keys and values.
 *
 * One row of each sequence (decoding): a block for each (row, key-value head, span of positions); a second kernel merges the spans'
 * softmaxes. The number of spans is fixed by the page table's width, not by positions, so that a recorded graph serves any length.
 * Several rows of a sequence (prompts): tensor cores, in attention_prefill.cu. */
#include "../cuda/attention.cuh"

enum { WARPS = 4, SPLITS_MOST = 32, UNROLL = 4 };

template <typename C> __device__ inline void load_eight(float (&out)[8], const C *from) {
    if (sizeof(C) == 4) {
        const float4 *at = reinterpret_cast<const float4 *>(from);
        float4 a = at[0], b = at[1];
        out[0] = a.x; out[1] = a.y; out[2] = a.z; out[3] = a.w;
        out[4] = b.x; out[5] = b.y; out[6] = b.z; out[7] = b.w;
    } else {
        uint4 raw = *reinterpret_cast<const uint4 *>(from);
        const C *values = reinterpret_cast<const C *>(&raw);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = to_float(values[i]);
    }
}

/* Eight values, of which those from `p` on are zeros: for heads whose width is no power of two. */
template <bool EXACT, typename C> __device__ inline void load_part(float (&out)[8], const C *row, int lane, int p) {
    if (EXACT) {
        load_eight(out, row + lane * 8);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = lane * 8 + i < p ? to_float(row[lane * 8 + i]) : 0.0f;
    }
}

/* LANES lanes share a position, 8 values each, so a warp looks at 32 / LANES positions at once; every such group carries its own
 * softmax for up to H query heads of the key-value head, and all are merged at the end of the span. */
template <typename T, typename C, int LANES, int H, bool EXACT>
__global__ void __launch_bounds__(WARPS * 32) attend_spans(float *partial, float *maxima, float *sums, const T *qkv, const C *cache_k, const C *cache_v,
                                                           const int32_t *positions, const int32_t *sequences, const int32_t *page_table, SpanShape s) {
    constexpr int P = LANES * 8, GROUPS = WARPS * 32 / LANES;
    __shared__ float group_out[GROUPS][H][P], group_maximum[GROUPS][H], group_sum[GROUPS][H];
    launch_dependents();
    wait_for_inputs();
    const int split = blockIdx.x, chunks = (s.heads + H - 1) / H, kv_head = blockIdx.y / chunks, first_head = kv_head * s.heads + blockIdx.y % chunks * H;
    const int heads = min(H, (kv_head + 1) * s.heads - first_head), group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t t = blockIdx.z;
    const int length = positions[t] + 1, span = span_of(length, s.splits), from = split * span, until = min(length, from + span);
    if (from >= until) {
        if ((int)threadIdx.x < heads) sums[(t * s.h + first_head + threadIdx.x) * s.splits + split] = 0;
        return;
    }
    const int32_t *pages = page_table + sequences[t] * s.max_pages;
    float q[H][8], out[H][8] = {}, maximum[H], sum[H] = {};
#pragma unroll
    for (int j = 0; j < H; j++) {
        maximum[j] = -INFINITY;
        load_part<EXACT>(q[j], qkv + t * s.row_cols + (int64_t)(first_head + min(j, heads - 1)) * s.p, lane, s.p);
#pragma unroll
        for (int i = 0; i < 8; i++) q[j][i] *= s.scale;
    }
    for (int base = from; base < until; base += GROUPS * UNROLL) {   /* the same for all lanes: they shuffle */
        const int at = base + group;
        float key[UNROLL][8], value[UNROLL][8];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int position = min(at + u * GROUPS, until - 1);
            int64_t row = (((int64_t)pages[position / s.page_size] * s.g + kv_head) * s.page_size + position % s.page_size) * (EXACT ? P : s.p);
            load_part<EXACT>(key[u], cache_k + row, lane, s.p);
            load_part<EXACT>(value[u], cache_v + row, lane, s.p);
        }
#pragma unroll
        for (int j = 0; j < H; j++) {
            float score[UNROLL], highest = maximum[j];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                score[u] = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) score[u] += q[j][i] * key[u][i];
#pragma unroll
                for (int step = LANES / 2; step; step /= 2) score[u] += __shfl_xor_sync(0xffffffff, score[u], step);
                if (at + u * GROUPS >= until) score[u] = -INFINITY;
                highest = fmaxf(highest, score[u]);
            }
            if (highest == -INFINITY) continue;   /* none of the positions is this group's */
            float shrink = __expf(maximum[j] - highest);
            sum[j] *= shrink;
#pragma unroll
            for (int i = 0; i < 8; i++) out[j][i] *= shrink;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float weight = __expf(score[u] - highest);
                sum[j] += weight;
#pragma unroll
                for (int i = 0; i < 8; i++) out[j][i] += weight * value[u][i];
            }
            maximum[j] = highest;
        }
    }
#pragma unroll
    for (int j = 0; j < H; j++) {
#pragma unroll
        for (int i = 0; i < 8; i++) group_out[group][j][lane * 8 + i] = out[j][i];
        if (lane == 0) {
            group_maximum[group][j] = maximum[j];
            group_sum[group][j] = sum[j];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * P; i += WARPS * 32) {
        int j = i / P, c = i % P;
        float highest = -INFINITY, total = 0, merged = 0;
        for (int w = 0; w < GROUPS; w++) highest = fmaxf(highest, group_maximum[w][j]);
        for (int w = 0; w < GROUPS; w++) {
            float share = group_sum[w][j] > 0 ? __expf(group_maximum[w][j] - highest) : 0.0f;
            total += share * group_sum[w][j];
            merged += share * group_out[w][j][c];
        }
        int64_t place = (t * s.h + first_head + j) * s.splits + split;
        if (c < s.p) partial[place * s.p + c] = merged;
        if (c == 0) {
            maxima[place] = highest;
            sums[place] = total;
        }
    }
}

template <typename T>
__global__ void merge_spans(T *out, const T *qkv, const float *partial, const float *maxima, const float *sums, SpanShape s) {
    __shared__ float shares[32];
    launch_dependents();
    wait_for_inputs();
    const int64_t t = blockIdx.y, head = blockIdx.x, first = (t * s.h + head) * s.splits;
    if (threadIdx.x < 32) {   /* a lane for each split: at most 32 */
        const int i = threadIdx.x;
        float sum = i < s.splits ? sums[first + i] : 0.0f, maximum = sum > 0 ? maxima[first + i] : -INFINITY;
        const float most = warp_max(maximum), share = sum > 0 ? __expf(maximum - most) : 0.0f;
        shares[i] = share / warp_sum(share * sum);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < s.p; c += blockDim.x) {
        float value = 0;
#pragma unroll 8
        for (int i = 0; i < s.splits; i++)   /* an empty span left nothing */
            value += shares[i] > 0 ? __ldcg(partial + (first + i) * s.p + c) * shares[i] : 0.0f;
        if (s.gated) value *= sigmoid(to_float(qkv[t * s.row_cols + (int64_t)(s.h + 2 * s.g + head) * s.p + c]));
        out[(t * s.h + head) * s.p + c] = from_float<T>(value);
    }
}

template <typename T, typename C>
static int attend_few(tops_stream *stream, T *out, const T *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s) {
    int64_t n = batch->n;
    Scratch scratch(stream);
    float *partial = scratch.take<float>(n * s.h * s.splits * s.p), *maxima = scratch.take<float>(n * s.h * s.splits), *sums = scratch.take<float>(n * s.h * s.splits);
    REQUIRE_SCRATCH(sums);
    int status = TOPS_OK;
#define ATTEND(LANES, H, EXACT) \
    status = launch(stream, attend_spans<T, C, LANES, H, EXACT>, dim3((unsigned)s.splits, (unsigned)(s.g * ceil_div(s.heads, H)), (unsigned)n), dim3(WARPS * 32), 0, 1, \
                    partial, maxima, sums, qkv, static_cast<const C *>(kv->k), static_cast<const C *>(kv->v), batch->positions, batch->sequences, \
                    batch->page_table, s)
#define ATTEND_HEADS(LANES) \
    if (s.p != LANES * 8) ATTEND(LANES, 4, false); \
    else if (s.heads == 1) ATTEND(LANES, 1, true); \
    else if (s.heads == 2) ATTEND(LANES, 2, true); \
    else if (s.heads <= 4) ATTEND(LANES, 4, true); \
    else ATTEND(LANES, 8, true)
    if (s.p <= 8) { ATTEND_HEADS(1); }
    else if (s.p <= 16) { ATTEND_HEADS(2); }
    else if (s.p <= 32) { ATTEND_HEADS(4); }
    else if (s.p <= 64) { ATTEND_HEADS(8); }
    else if (s.p <= 128) { ATTEND_HEADS(16); }
    else { ATTEND_HEADS(32); }
    if (status) return status;
    return merge(stream, out, qkv, partial, maxima, sums, n, s);
}

template <typename T> int merge(tops_stream *stream, T *out, const T *qkv, const float *partial, const float *maxima, const float *sums, int64_t n, SpanShape s) {
    return launch(stream, merge_spans<T>, dim3((unsigned)s.h, (unsigned)n), dim3((unsigned)(s.p < 64 ? 32 : s.p)), 0, 1, out, qkv, partial, maxima, sums, s);
}
template int merge<__nv_bfloat16>(tops_stream *, __nv_bfloat16 *, const __nv_bfloat16 *, const float *, const float *, const float *, int64_t, SpanShape);

static int check(SpanShape &s, const tops_kv *kv, const tops_batch *batch, int64_t h, int64_t g, int64_t p, float scale, int32_t gated) {
    REQUIRE(g >= 1 && h % g == 0, "h: must be a multiple of g = %lld, not %lld", (long long)g, (long long)h);
    REQUIRE(p >= 1 && p <= 256, "p: must be in 1..256, not %lld", (long long)p);
    REQUIRE_SUPPORTED(kv->dtype == TOPS_F32 || kv->dtype == TOPS_F16 || kv->dtype == TOPS_BF16, "kv: must be f32, f16 or bf16, not %d", kv->dtype);
    REQUIRE(batch->n < 65536 && g < 65536, "n, g: at most 65535, not %lld, %lld", (long long)batch->n, (long long)g);
    s = SpanShape{(int)h, (int)g, (int)p, (int)kv->page_size, __builtin_ctz((unsigned)kv->page_size | 1u << 30), 1, (int)(h / g), ((gated ? 2 * h : h) + 2 * g) * p, batch->max_pages, scale, gated != 0};
    return TOPS_OK;
}

int tops_paged_attention(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch,
                         int64_t h, int64_t g, int64_t p, float scale, int32_t gated, int32_t dtype) {
    const int64_t n = batch->n;
    SpanShape s;
    int status = check(s, kv, batch, h, g, p, scale, gated);
    if (status || n == 0) return status;
    if (dtype == TOPS_BF16 && kv->dtype == TOPS_BF16 && batch->b < n && prefill_supports((int)p, (int)kv->page_size))
        return attend_prompt(stream, static_cast<__nv_bfloat16 *>(out), static_cast<const __nv_bfloat16 *>(qkv), kv, batch, s);
    if (decode_supports(kv, n, s, dtype)) return attend_decode(stream, out, qkv, kv, batch, s, nullptr);
    if (n <= 64) s.splits = (int)min(ceil_div(batch->max_pages * kv->page_size, SPAN_LEAST), (int64_t)SPLITS_MOST);
    BY_STORAGE(dtype, {
        const T *in = static_cast<const T *>(qkv);
        T *to = static_cast<T *>(out);
        if (kv->dtype == TOPS_F32) status = attend_few<T, float>(stream, to, in, kv, batch, s);
        else if (kv->dtype == TOPS_F16) status = attend_few<T, __half>(stream, to, in, kv, batch, s);
        else status = attend_few<T, __nv_bfloat16>(stream, to, in, kv, batch, s);
    });
    return status;
}

int tops_rope_attention(tops_stream *stream, void *out, void *qkv, const tops_kv *kv, const tops_batch *batch, const float *table,
                        const float *q_norm, const float *k_norm, int64_t h, int64_t g, int64_t p, int64_t r,
                        int32_t pairs, int32_t gated, float scale, float eps, int32_t dtype) {
    SpanShape s;
    int status = check(s, kv, batch, h, g, p, scale, gated);
    if (status || batch->n == 0) return status;
    if (batch->b == batch->n && halves_supported(p, r, pairs) && decode_supports(kv, batch->n, s, dtype)) {
        const Rope rope{table, q_norm, k_norm, (int)r, eps};
        return attend_decode(stream, out, qkv, kv, batch, s, &rope);
    }
    status = tops_qk_norm_rope_store(stream, qkv, kv, batch, table, q_norm, k_norm, h, g, p, r, pairs, gated, eps, dtype);
    return status ? status : tops_paged_attention(stream, out, qkv, kv, batch, h, g, p, scale, gated, dtype);
}
