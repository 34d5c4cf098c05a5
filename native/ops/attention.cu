/* Attention over paged keys and values.
 *
 * Few rows (decoding): a block for each (row, key-value head, span of positions); a second kernel merges the spans' softmaxes.
 * The number of spans is fixed by the page table's width, not by positions, so that a recorded graph serves any length.
 * Many rows (prompts): tensor cores, in attention_prefill.cu. */
#include "../cuda/attention.cuh"

enum { WARPS = 4, SPAN_LEAST = 64, SPLITS_MOST = 32, HEADS_MOST = 16 };

struct DecodeShape {
    int h, g, p, page_size, splits, heads;
    int64_t row_cols, max_pages;
    float scale;
    bool gated;
};

/* Positions of one split: equal spans, rounded up so that short texts use few of them. */
__device__ inline int span_of(int length, int splits) { return max(SPAN_LEAST, ((length + splits - 1) / splits + 15) / 16 * 16); }

template <typename T, typename C, int PER_LANE>   /* PER_LANE values of a head for each lane: p <= 32 PER_LANE */
__global__ void __launch_bounds__(WARPS * 32) attend_spans(float *partial, float *maxima, float *sums, const T *qkv, const C *cache_k, const C *cache_v,
                                                           const int32_t *positions, const int32_t *sequences, const int32_t *page_table, DecodeShape s) {
    wait_for_inputs();
    launch_dependents();
    const int split = blockIdx.x, kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t t = blockIdx.z;
    const int length = positions[t] + 1, span = span_of(length, s.splits);
    const int from = split * span, until = min(length, from + span);
    const int32_t *pages = page_table + sequences[t] * s.max_pages;
    __shared__ float merged[WARPS][32 * PER_LANE], warp_maximum[WARPS], warp_sum_[WARPS];
    for (int j = 0; j < s.heads; j++) {
        const int head = kv_head * s.heads + j;
        const int64_t place = (t * s.h + head) * s.splits + split;
        if (from >= until) {
            if (threadIdx.x == 0) sums[place] = 0;
            continue;
        }
        float q[PER_LANE], out[PER_LANE] = {}, maximum = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int c = lane * PER_LANE + i;
            q[i] = c < s.p ? to_float(qkv[t * s.row_cols + (int64_t)head * s.p + c]) * s.scale : 0.0f;
        }
        /* Four positions at a time for each warp, so that their loads are under way together. */
        for (int at = from + warp * 4; at < until; at += WARPS * 4) {
            float score[4], value[4][PER_LANE];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                score[k] = 0;
                int position = min(at + k, until - 1);
                int64_t row = ((int64_t)pages[position / s.page_size] * s.g + kv_head) * s.page_size + position % s.page_size;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) {
                    int c = lane * PER_LANE + i;
                    score[k] += c < s.p ? q[i] * to_float(cache_k[row * s.p + c]) : 0.0f;
                    value[k][i] = c < s.p ? to_float(cache_v[row * s.p + c]) : 0.0f;
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                score[k] = warp_sum(score[k]);
                if (at + k >= until) score[k] = -INFINITY;
            }
            float highest = fmaxf(fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3])), maximum);
            float shrink = __expf(maximum - highest);
            sum *= shrink;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) out[i] *= shrink;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float weight = __expf(score[k] - highest);
                sum += weight;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) out[i] += weight * value[k][i];
            }
            maximum = highest;
        }
        if (lane == 0) {
            warp_maximum[warp] = maximum;
            warp_sum_[warp] = sum;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) merged[warp][lane * PER_LANE + i] = out[i];
        __syncthreads();
        float highest = -INFINITY, total = 0;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, warp_maximum[w]);
        for (int w = 0; w < WARPS; w++) total += warp_sum_[w] > 0 ? warp_sum_[w] * __expf(warp_maximum[w] - highest) : 0.0f;
        for (int c = threadIdx.x; c < s.p; c += WARPS * 32) {
            float value = 0;
            for (int w = 0; w < WARPS; w++)
                if (warp_sum_[w] > 0) value += merged[w][c] * __expf(warp_maximum[w] - highest);
            partial[place * s.p + c] = value;
        }
        if (threadIdx.x == 0) {
            maxima[place] = highest;
            sums[place] = total;
        }
        __syncthreads();
    }
}

template <typename T>
__global__ void merge_spans(T *out, const T *qkv, const float *partial, const float *maxima, const float *sums, DecodeShape s) {
    wait_for_inputs();
    launch_dependents();
    const int64_t t = blockIdx.y, head = blockIdx.x, first = (t * s.h + head) * s.splits;
    float highest = -INFINITY, total = 0;
    for (int i = 0; i < s.splits; i++)
        if (sums[first + i] > 0) highest = fmaxf(highest, maxima[first + i]);
    for (int i = 0; i < s.splits; i++)
        if (sums[first + i] > 0) total += sums[first + i] * __expf(maxima[first + i] - highest);
    for (int c = threadIdx.x; c < s.p; c += blockDim.x) {
        float value = 0;
        for (int i = 0; i < s.splits; i++)
            if (sums[first + i] > 0) value += partial[(first + i) * s.p + c] * __expf(maxima[first + i] - highest);
        value /= total;
        if (s.gated) value *= sigmoid(to_float(qkv[t * s.row_cols + (int64_t)(s.h + 2 * s.g + head) * s.p + c]));
        out[(t * s.h + head) * s.p + c] = from_float<T>(value);
    }
}

template <typename T, typename C>
static int attend_few(tops_stream *stream, T *out, const T *qkv, const tops_kv *kv, const tops_batch *batch, DecodeShape s) {
    int64_t n = batch->n;
    Scratch scratch(stream);
    float *partial = scratch.take<float>(n * s.h * s.splits * s.p), *maxima = scratch.take<float>(n * s.h * s.splits), *sums = scratch.take<float>(n * s.h * s.splits);
    REQUIRE_SCRATCH(sums);
    dim3 grid((unsigned)s.splits, (unsigned)s.g, (unsigned)n), block(WARPS * 32);
    int status = TOPS_OK;
#define ATTEND(PER_LANE) \
    status = launch(stream, attend_spans<T, C, PER_LANE>, grid, block, 0, 1, partial, maxima, sums, qkv, static_cast<const C *>(kv->k), \
                    static_cast<const C *>(kv->v), batch->positions, batch->sequences, batch->page_table, s)
    if (s.p <= 32) ATTEND(1);
    else if (s.p <= 64) ATTEND(2);
    else if (s.p <= 128) ATTEND(4);
    else ATTEND(8);
    if (status) return status;
    return launch(stream, merge_spans<T>, dim3((unsigned)s.h, (unsigned)n), dim3(128), 0, 1, out, qkv, partial, maxima, sums, s);
}

int tops_paged_attention(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch,
                         int64_t h, int64_t g, int64_t p, float scale, int32_t gated, int32_t dtype) {
    int64_t n = batch->n;
    REQUIRE(g >= 1 && h % g == 0, "h: must be a multiple of g = %lld, not %lld", (long long)g, (long long)h);
    REQUIRE(p >= 1 && p <= 256, "p: must be in 1..256, not %lld", (long long)p);
    REQUIRE(n < 65536 && g < 65536, "n, g: at most 65535, not %lld, %lld", (long long)n, (long long)g);
    if (n == 0) return TOPS_OK;
    if (dtype == TOPS_BF16 && kv->dtype == TOPS_BF16 && n > 16 && prefill_supports((int)p, (int)kv->page_size))
        return attend_prompt(stream, out, qkv, kv, batch, h, g, p, scale, gated);
    int64_t longest = batch->max_pages * kv->page_size;
    int splits = (int)min(ceil_div(longest, SPAN_LEAST), n > 16 ? (int64_t)1 : (int64_t)SPLITS_MOST);
    DecodeShape s{(int)h, (int)g, (int)p, (int)kv->page_size, splits, (int)(h / g), ((gated ? 2 * h : h) + 2 * g) * p, batch->max_pages, scale, gated != 0};
    int status = TOPS_OK;
    BY_STORAGE(dtype, {
        const T *in = static_cast<const T *>(qkv);
        T *to = static_cast<T *>(out);
        if (kv->dtype == TOPS_F32) status = attend_few<T, float>(stream, to, in, kv, batch, s);
        else if (kv->dtype == TOPS_F16) status = attend_few<T, __half>(stream, to, in, kv, batch, s);
        else status = attend_few<T, __nv_bfloat16>(stream, to, in, kv, batch, s);
    });
    return status;
}
