/* Attention of a few rows over bf16 caches on tensor cores: a block takes a span of positions for up to four query heads that share a
 * key-value head, a warp 16 positions at a time; the last block of a row merges the spans' softmaxes. Keys and values of earlier steps are on their
 * way before the kernel waits for its predecessor. If it is also to norm, rotate and store (FUSED), what this step adds is
 * computed by every block that needs it: less work than another launch. */
#include "../cuda/attention.cuh"
#include "../cuda/mma.cuh"
#include "../cuda/storage.cuh"

namespace {
constexpr int WARPS = 8, THREADS = WARPS * 32, TILE = WARPS * 16, SPLITS_MOST = 32, COUNTERS = 4096, HEADS = 4, ROWS = 16;

template <int P> constexpr int PITCH = P + 8;          /* of rows in shared memory, against bank conflicts */
template <int P> constexpr int RESULT_PITCH = P + 4;
template <int P> constexpr int shared_bytes() { return (HEADS + 2 * ROWS + TILE) * PITCH<P> * (int)sizeof(bf16); }

template <int P, bool FUSED>
__global__ void __launch_bounds__(THREADS, P == 256 ? 1 : 2) attend_few(bf16 *out, float *partial, float2 *softmax, unsigned *counters, const bf16 *qkv, bf16 *cache_k, bf16 *cache_v,
                                                      const __grid_constant__ tops_batch batch, const __grid_constant__ SpanShape s, const __grid_constant__ Rope rope) {
    constexpr int CHUNKS = P / 32, EACH = P / 32, WIDE = PITCH<P>;
    extern __shared__ __align__(16) unsigned char memory[];
    bf16 *queries = reinterpret_cast<bf16 *>(memory);   /* [HEADS][WIDE] */
    bf16 *fresh_keys = queries + HEADS * WIDE;          /* [ROWS][WIDE] from position `fresh` on */
    bf16 *fresh_values = fresh_keys + ROWS * WIDE;      /* the same */
    bf16 *values = fresh_values + ROWS * WIDE;          /* [TILE][WIDE]; at the end the warps' results, f32 [WARPS][HEADS][RESULT_PITCH] */
    __shared__ float2 warp_softmax[WARPS][HEADS];
    __shared__ float weights[HEADS][SPLITS_MOST];
    __shared__ bool last;
    launch_dependents();
    const int split = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row8 = lane / 4, quad = lane % 4;
    const int groups = (s.heads + HEADS - 1) / HEADS, kv_head = blockIdx.y / groups, heads = min((int)HEADS, s.heads - (int)blockIdx.y % groups * HEADS);
    const int each = min((int)HEADS, s.heads), first_head = kv_head * s.heads + (int)blockIdx.y % groups * HEADS;
    const int64_t t = blockIdx.z, place_of_row = t * gridDim.y + blockIdx.y;
    const int length = batch.positions[t] + 1, sequence = batch.sequences[t], first_row = batch.query_starts[sequence], fresh = batch.positions[first_row];
    /* Spans are whole tiles; short texts use few of the splits, which are fixed by the page table's width. */
    const int span = ((length + s.splits - 1) / s.splits + TILE - 1) / TILE * TILE, used = (length + span - 1) / span;
    const int from = split * span, until = min(length, from + span);
    if (from >= until) return;
    const int32_t *pages = batch.page_table + sequence * batch.max_pages;
    auto place = [&](int position) { return (((int64_t)pages[position >> s.page_shift] * s.g + kv_head) * s.page_size + (position & (s.page_size - 1))) * P; };
    /* Lane (row8, quad) holds columns 32 c + 8 quad .. + 7 of the keys 8 j + row8: their order in a product's sum is free. */
    uint4 key[2][CHUNKS];
    auto load_keys = [&](int tile, int begin, int end) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int position = tile + warp * 16 + 8 * j + row8;
            if (position < begin || position >= end) continue;
            const bf16 *at = cache_k + place(position) + quad * 8;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) key[j][c] = __ldcg(reinterpret_cast<const uint4 *>(at + 32 * c));
        }
    };
    auto load_values = [&](int tile, bool old) {   /* of earlier steps with zeros behind them, or those of this step */
#pragma unroll
        for (int i = lane; i < 16 * P / 8; i += 32) {
            const int row = warp * 16 + i / (P / 8), piece = i % (P / 8) * 8, position = tile + row;
            const bool there = position < until, of_step = there && position >= fresh;
            if (old != of_step) copy_async(values + row * WIDE + piece, there ? cache_v + place(position) + piece : cache_v, there);
        }
    };
    /* What earlier steps stored is older than this one and need not be waited for. */
    load_keys(from, 0, min(fresh, until));
    load_values(from, true);
    float q_weight[EACH], k_weight[EACH];
    if constexpr (FUSED) {
        for (int i = heads * WIDE + threadIdx.x; i < HEADS * WIDE; i += THREADS) queries[i] = __float2bfloat16(0.0f);
        load_norm(q_weight, rope.q_norm, lane);
        load_norm(k_weight, rope.k_norm, lane);
    }
    wait_for_inputs();
    const int new_from = max(from, fresh);
    if constexpr (FUSED) {
        /* A warp takes a query head, or a key of this step in the span. */
        for (int item = warp; item < heads + max(until - new_from, 0); item += WARPS) {
            const bool is_key = item >= heads;
            const int position = new_from + item - heads;
            const int64_t row = is_key ? first_row + position - fresh : t;
            const bf16 *x = qkv + row * s.row_cols + (int64_t)(is_key ? s.h + kv_head : first_head + item) * P;
            float head[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) head[i] = to_float(x[lane + 32 * i]);
            const float2 *turns = reinterpret_cast<const float2 *>(rope.table + row * rope.r);
            if (is_key) norm_rotate(head, k_weight, rope.k_norm != nullptr, turns, rope.r, rope.eps, lane);
            else norm_rotate(head, q_weight, rope.q_norm != nullptr, turns, rope.r, rope.eps, lane);
            bf16 *to = is_key ? fresh_keys + (position - fresh) * WIDE : queries + item * WIDE;
#pragma unroll
            for (int i = 0; i < EACH; i++) to[lane + 32 * i] = __float2bfloat16(head[i]);
            if (!is_key) continue;
            const int64_t slot = batch.slots[row], at = ((slot / s.page_size * s.g + kv_head) * s.page_size + slot % s.page_size) * P;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const bf16 v = x[(int64_t)s.g * P + lane + 32 * i];
                fresh_values[(position - fresh) * WIDE + lane + 32 * i] = v;
                if (position != length - 1 || first_head != kv_head * s.heads) continue;   /* its own row's block stores it */
                cache_k[at + lane + 32 * i] = __float2bfloat16(head[i]);
                cache_v[at + lane + 32 * i] = v;
            }
        }
    } else {
        for (int i = threadIdx.x; i < HEADS * P / 8; i += THREADS) {
            const int head = i / (P / 8), piece = i % (P / 8) * 8;
            const bf16 *x = qkv + t * s.row_cols + (int64_t)(first_head + head) * P + piece;
            *reinterpret_cast<uint4 *>(queries + head * WIDE + piece) = head < heads ? __ldcg(reinterpret_cast<const uint4 *>(x)) : make_uint4(0, 0, 0, 0);
        }
    }
    auto take_fresh = [&](int tile) {   /* keys and values of this step */
        if (tile + TILE <= fresh || until <= fresh) return;
        if constexpr (FUSED) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int position = tile + warp * 16 + 8 * j + row8;
                if (position < fresh || position >= until) continue;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) key[j][c] = *reinterpret_cast<const uint4 *>(fresh_keys + (position - fresh) * WIDE + 32 * c + 8 * quad);
            }
            const int row0 = tile + warp * 16;
            for (int position = max(row0, fresh); position < min(row0 + 16, until); position++)
                if (lane < P / 8)
                    *reinterpret_cast<uint4 *>(values + (position - tile) * WIDE + lane * 8) = *reinterpret_cast<const uint4 *>(fresh_values + (position - fresh) * WIDE + lane * 8);
        } else {
            load_keys(tile, fresh, until);
            load_values(tile, false);
        }
    };
    __syncthreads();
    /* Queries as right operands: columns 2 h and 2 h + 1 are the first and third, second and fourth pairs of head h. */
    uint2 q[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const uint32_t *pairs = reinterpret_cast<const uint32_t *>(queries + row8 / 2 * WIDE + 32 * c + 8 * quad) + row8 % 2;
        q[c] = make_uint2(pairs[0], pairs[2]);
    }
    float sum[P / 16][4] = {}, highest = -INFINITY, total = 0;   /* element e of sum d: column 16 d + row8 + 8 (e / 2) of head 2 quad + e % 2 */
    for (int tile = from; tile < until; tile += TILE) {
        take_fresh(tile);
        copy_commit();
        /* Lane (row8, quad) gets position 8 j + row8 of head quad, and wants positions 8 j + 2 quad + e of head row8 % 4. */
        float score[2][2], most = highest;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float part[2] = {};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const uint32_t left[4] = {key[j][c].x, key[j][c].y, key[j][c].z, key[j][c].w};
                mma_diagonal(part[0], part[1], left, q[c].x, q[c].y);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float x = __shfl_sync(0xffffffff, part[0] + part[1], (2 * quad + e) * 4 + row8 % 4);
                score[j][e] = tile + warp * 16 + 8 * j + 2 * quad + e < until ? x * s.scale : -INFINITY;
                most = fmaxf(most, score[j][e]);
            }
        }
        if (tile + TILE < until) load_keys(tile + TILE, 0, min(fresh, until));
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
        const float shrink = most == -INFINITY ? 1.0f : __expf(highest - most);
        total *= shrink;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                score[j][e] = score[j][e] == -INFINITY ? 0.0f : __expf(score[j][e] - most);
                total += score[j][e];
            }
        highest = most;
        const uint32_t right[2] = {pair_of(score[0][0], score[0][1]), pair_of(score[1][0], score[1][1])};
        if (tile != from) {
            const float by[2] = {__shfl_sync(0xffffffff, shrink, 8 * quad), __shfl_sync(0xffffffff, shrink, 8 * quad + 4)};
#pragma unroll
            for (int d = 0; d < P / 16; d++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[d][e] *= by[e % 2];
        }
        copy_wait<0>();
        __syncwarp();
#pragma unroll
        for (int d = 0; d < P / 16; d++) {
            uint32_t left[4];
            load_a_transposed(left, values + warp * 16 * WIDE + 16 * d, WIDE, lane);
            mma(sum[d], left, right);
        }
        __syncwarp();
        if (tile + TILE < until) load_values(tile + TILE, true);
    }
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    __syncthreads();   /* values are read */
    float *merged = reinterpret_cast<float *>(values);
#pragma unroll
    for (int d = 0; d < P / 16; d++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int head = 2 * quad + e % 2;
            if (head < heads) merged[(warp * HEADS + head) * RESULT_PITCH<P> + 16 * d + row8 + e / 2 * 8] = sum[d][e];
        }
    if (row8 < heads && quad == 0) warp_softmax[warp][row8] = make_float2(highest, total);
    __syncthreads();
    auto finish = [&](int head, int c, float4 v, float by) {
        const int query_head = first_head + head;
        float4 x = make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
        if (s.gated) {
            const float4 gate = load4(qkv + t * s.row_cols + (int64_t)(s.h + 2 * s.g + query_head) * P + c);
            x = make_float4(x.x * sigmoid(gate.x), x.y * sigmoid(gate.y), x.z * sigmoid(gate.z), x.w * sigmoid(gate.w));
        }
        store4(out + (t * s.h + query_head) * P + c, x);
    };
    const int64_t base = place_of_row * s.splits;   /* [splits][each] of this row and these heads */
    for (int index = threadIdx.x; index < heads * P / 4; index += THREADS) {
        const int head = index / (P / 4), c = index % (P / 4) * 4;
        float most = -INFINITY, over = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, warp_softmax[w][head].x);
        float4 v = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = __expf(warp_softmax[w][head].x - most);
            over += warp_softmax[w][head].y * weight;
            add_scaled(v, weight, *reinterpret_cast<const float4 *>(merged + (w * HEADS + head) * RESULT_PITCH<P> + c));
        }
        if (used == 1) {
            finish(head, c, v, 1.0f / over);
        } else {
            __stcg(reinterpret_cast<float4 *>(partial) + ((base + split) * each + head) * (P / 4) + c / 4, v);
            if (c == 0) __stcg(softmax + (base + split) * each + head, make_float2(most, over));
        }
    }
    if (used == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();   /* of what the whole block wrote: the barrier comes before it */
        last = atomicInc(counters + place_of_row, (unsigned)used - 1) == (unsigned)used - 1;   /* back to 0 by itself */
    }
    __syncthreads();
    if (!last) return;   /* what the others wrote lies in the second cache, where __ldcg reads it */
    auto load_parts = [&](float4 (&part)[16], int i, int index) {   /* all requested together */
        const int head = index / (P / 4), c = index % (P / 4);
#pragma unroll
        for (int k = 0; k < 16; k++)
            part[k] = i + k < used ? __ldcg(reinterpret_cast<const float4 *>(partial) + ((base + i + k) * each + head) * (P / 4) + c) : make_float4(0, 0, 0, 0);
    };
    float4 part[16];
    load_parts(part, 0, min((int)threadIdx.x, heads * P / 4 - 1));
    for (int head = warp; head < heads; head += WARPS) {   /* a lane takes a span */
        const float2 one = lane < used ? __ldcg(softmax + (base + lane) * each + head) : make_float2(-INFINITY, 0.0f);
        const float weight = __expf(one.x - warp_max(one.x)), over = warp_sum(one.y * weight);
        weights[head][lane] = weight / over;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < heads * P / 4; index += THREADS) {
        float4 v = make_float4(0, 0, 0, 0);
        for (int i = 0; i < used; i += 16) {
            if (i || index >= THREADS) load_parts(part, i, index);
#pragma unroll
            for (int k = 0; k < 16; k++)
                if (i + k < used) add_scaled(v, weights[index / (P / 4)][i + k], part[k]);
        }
        finish(index / (P / 4), index % (P / 4) * 4, v, 1.0f);
    }
}
}   // namespace

bool decode_supports(const tops_kv *kv, int64_t n, const SpanShape &s, int dtype) {
    return dtype == TOPS_BF16 && kv->dtype == TOPS_BF16 && (s.p == 64 || s.p == 128 || s.p == 256) && n <= ROWS && n * s.g * ceil_div(s.heads, HEADS) <= COUNTERS &&
           s.page_size == 1 << s.page_shift;
}

int attend_decode(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s, const Rope *rope) {
    s.splits = (int)max(min(ceil_div(batch->max_pages * kv->page_size, TILE), (int64_t)SPLITS_MOST), (int64_t)1);
    const int64_t n = batch->n, columns = s.g * ceil_div(s.heads, HEADS), each = min((int)HEADS, s.heads);
    Scratch scratch(stream);
    float *partial = scratch.take<float>(n * columns * each * s.splits * s.p);
    float2 *softmax = scratch.take<float2>(n * columns * each * s.splits);
    REQUIRE_SCRATCH(softmax);
    auto start = [&](auto kernel, int shared) {
        return launch_wide(stream, kernel, dim3((unsigned)s.splits, (unsigned)columns, (unsigned)n), dim3(THREADS), (size_t)shared, static_cast<bf16 *>(out), partial, softmax,
                           stream->counters, static_cast<const bf16 *>(qkv), static_cast<bf16 *>(kv->k), static_cast<bf16 *>(kv->v), *batch, s, rope ? *rope : Rope{});
    };
    if (s.p == 64) return rope ? start(attend_few<64, true>, shared_bytes<64>()) : start(attend_few<64, false>, shared_bytes<64>());
    if (s.p == 128) return rope ? start(attend_few<128, true>, shared_bytes<128>()) : start(attend_few<128, false>, shared_bytes<128>());
    return rope ? start(attend_few<256, true>, shared_bytes<256>()) : start(attend_few<256, false>, shared_bytes<256>());
}
