/* Attention of a few rows over bf16 caches on tensor cores: a block takes a span of positions for up to four query heads that share a
 * key-value head, a warp 16 positions at a time; then the blocks of a row hand each other their sums, and each merges a part of the columns. Keys and
 * values of earlier steps are on their way before the kernel waits for its predecessor. If it is also to norm, rotate and store (FUSED), what this
 * step adds is computed by every block that needs it: less work than another launch. */
#include "../cuda/attention.cuh"
#include "../cuda/mma.cuh"
#include "../cuda/storage.cuh"

namespace {
constexpr int WARPS = 8, THREADS = WARPS * 32, SPLITS_MOST = 32, HEADS = 4, ROWS = 16;

/* Of heads of 256, two warps have the same positions and half of the columns each: with all of them the registers would fill a processor, on which the
 * product before still runs. */
__host__ __device__ constexpr int halves(int p) { return p == 256 ? 2 : 1; }
__host__ __device__ constexpr int tile_of(int p) { return WARPS / halves(p) * 16; }   /* positions that a block takes at a time */
template <int P> constexpr int PITCH = P + 8;          /* of rows in shared memory, against bank conflicts */
template <int P> constexpr int RESULT_PITCH = P + 4;
template <int P> constexpr int shared_bytes() { return (HEADS + 2 * ROWS + tile_of(P)) * PITCH<P> * (int)sizeof(bf16); }

/* What a block hands over of four columns of a head: its unnormalised sum, and in `of` its largest score and the sum of its weights */
struct Record {
    float4 sum, of;
};
static_assert(HEADS * 256 / 4 <= THREADS, "a thread hands over one record");

/* Words of all ones are not there yet: no computed float is one, since a NaN that is computed has no sign. */
__device__ inline float4 peek(const float4 *from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}
__device__ inline bool missing(float4 v) {
    return max(max(__float_as_uint(v.x), __float_as_uint(v.y)), max(__float_as_uint(v.z), __float_as_uint(v.w))) == UINT32_MAX;
}
__device__ inline Record nothing() {
    const float none = __uint_as_float(UINT32_MAX);
    return {make_float4(none, none, none, none), make_float4(none, none, none, none)};
}
/* 16 bytes from shared memory to shared memory, or nothing; without a branch */
__device__ inline void copy_shared_if(bf16 *to, const bf16 *from, bool there) {
    asm volatile("{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.s32 p, %2, 0; @p ld.shared.v4.b32 {a, b, c, d}, [%1]; @p st.shared.v4.b32 [%0], {a, b, c, d}; }"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "r"((uint32_t)__cvta_generic_to_shared(from)), "r"((int)there) : "memory");
}
/* Sums over the warp of N values, of which lane l gets that of value l / (32 / N): lanes STEP apart share what is left */
template <int STEP = 16, int N> __device__ inline float scattered_sum(const float (&v)[N], int lane) {
    if constexpr (N == 1) {
        float x = v[0];
#pragma unroll
        for (int step = STEP; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
        return x;
    } else {
        const bool upper = lane & STEP;
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) half[i] = (upper ? v[i + N / 2] : v[i]) + __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + N / 2], STEP);
        return scattered_sum<STEP / 2>(half, lane);
    }
}

template <int P, bool FUSED>
__global__ void __launch_bounds__(THREADS, 2) attend_few(bf16 *out, Record *handover, const bf16 *qkv, bf16 *cache_k, bf16 *cache_v,
                                                      const __grid_constant__ tops_batch batch, const __grid_constant__ SpanShape s, const __grid_constant__ Rope rope) {
    constexpr int HALVES = halves(P), READERS = WARPS / HALVES, TILE = tile_of(P), OWN = P / HALVES;   /* warps with positions of their own, columns of a warp */
    constexpr int CHUNKS = OWN / 32, EACH = P / 32, WIDE = PITCH<P>;
    extern __shared__ __align__(16) unsigned char memory[];
    bf16 *queries = reinterpret_cast<bf16 *>(memory);   /* [HEADS][WIDE] */
    bf16 *fresh_keys = queries + HEADS * WIDE;          /* [ROWS][WIDE] from position `fresh` on */
    bf16 *fresh_values = fresh_keys + ROWS * WIDE;      /* the same */
    bf16 *values = fresh_values + ROWS * WIDE;          /* [TILE][WIDE]; at the end the warps' results, f32 [READERS][HEADS][RESULT_PITCH] */
    __shared__ float2 warp_softmax[READERS][HEADS];
    __shared__ float halves_of[HALVES == 2 ? 2 : 1][HALVES][READERS][2][32];   /* of scores, by turns */
    launch_dependents();
    if (!FUSED) wait_for_inputs();
    const int split = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row8 = lane / 4, quad = lane % 4;
    const int reader = warp % READERS, first_column = warp / READERS * OWN;
    const int groups = (s.heads + HEADS - 1) / HEADS, kv_head = divide(blockIdx.y, groups), group = (int)blockIdx.y - kv_head * groups;
    const int each = min((int)HEADS, s.heads), heads = min((int)HEADS, s.heads - group * HEADS), first_head = kv_head * s.heads + group * HEADS;
    const int64_t t = blockIdx.z;
    const int length = batch.positions[t] + 1, sequence = batch.sequences[t], own_slot = FUSED ? batch.slots[t] : 0;
    /* Positions from `fresh` on are of this step. A row alone need not look for its sequence's first. */
    const int first_row = !FUSED || batch.n == 1 ? 0 : batch.query_starts[sequence], fresh = !FUSED ? length : batch.n == 1 ? length - 1 : batch.positions[first_row];
    /* Spans are whole tiles; short texts use few of the splits, which are fixed by the page table's width. */
    const int span = (divide(length + s.splits - 1, s.splits) + TILE - 1) / TILE * TILE, used = divide(length + span - 1, span);
    const int from = split * span, until = min(length, from + span);
    if (from >= until) return;
    const int32_t *pages = batch.page_table + sequence * batch.max_pages;
    /* Which row of the cache has a position, in vectors of P */
    auto row_of = [&](int page, int position) { return (uint32_t)(page * s.g + kv_head) << s.page_shift | (position & (s.page_size - 1)); };
    float q_weight[EACH], k_weight[EACH];
    if constexpr (FUSED) {
        load_norm(q_weight, rope.q_norm, lane);
        load_norm(k_weight, rope.k_norm, lane);
    }
    /* Lane (row8, quad) holds the warp's columns 32 c + 8 quad .. + 7 of the keys 8 j + row8: their order in a product's sum is free. */
    uint4 key[2][CHUNKS] = {};
    uint2 q[CHUNKS];   /* right operands: columns 2 h and 2 h + 1 are the first and third, second and fourth pairs of head h */
    float sum[OWN / 16][4] = {}, highest = -INFINITY, total = 0;   /* element e of sum d: the warp's column 16 d + row8 + 8 (e / 2) of head 2 quad + e % 2 */
    /* Each tile is requested while the one before is computed; before the first one stands none. */
#pragma unroll 1
    for (int tile = from - TILE; tile < until; tile += TILE) {
        const bool computes = tile >= from;
        const int next = tile + TILE, own = next + reader * 16 + lane % 16;
        const uint32_t cache_row = own < until ? row_of(pages[own >> s.page_shift], own) : 0;   /* of the lane's position: looked up together */
        float score[2][2] = {};
        if (computes) {
            if constexpr (FUSED) {   /* keys and values of this step. All blocks come this way: instructions that few run are far away, and the others would wait for these few */
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int position = tile + reader * 16 + 8 * j + row8;
                    const bool own = position >= fresh && position < until;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++)
                        if (own) key[j][c] = *reinterpret_cast<const uint4 *>(fresh_keys + (position - fresh) * WIDE + first_column + 32 * c + 8 * quad);
                }
                const int row0 = tile + reader * 16, piece = first_column + lane * 8;
                int position = max(row0, fresh);
#pragma unroll 1
                do {
                    copy_shared_if(values + (position - tile) * WIDE + piece, fresh_values + (position - fresh) * WIDE + piece, position < min(row0 + 16, until) && lane < OWN / 8);
                } while (++position < min(row0 + 16, until));
            }
            /* Lane (row8, quad) gets position 8 j + row8 of head quad, and wants positions 8 j + 2 quad + e of head row8 % 4. */
            float whole[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float part[2] = {};
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    const uint32_t left[4] = {key[j][c].x, key[j][c].y, key[j][c].z, key[j][c].w};
                    mma_diagonal(part[0], part[1], left, q[c].x, q[c].y);
                }
                whole[j] = part[0] + part[1];
            }
            if constexpr (HALVES == 2) {
                auto &turn = halves_of[(tile - from) / TILE % 2];
#pragma unroll
                for (int j = 0; j < 2; j++) turn[warp / READERS][reader][j][lane] = whole[j];
                asm volatile("bar.sync %0, 64;" ::"r"(1 + reader) : "memory");   /* of both warps with these positions */
#pragma unroll
                for (int j = 0; j < 2; j++) whole[j] += turn[1 - warp / READERS][reader][j][lane];
            }
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float x = __shfl_sync(0xffffffff, whole[j], (2 * quad + e) * 4 + row8 % 4);
                    score[j][e] = tile + reader * 16 + 8 * j + 2 * quad + e < until ? x * s.scale : -INFINITY;
                }
        }
        if (next < until) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int position = next + reader * 16 + 8 * j + row8;
                const bf16 *at = cache_k + (int64_t)__shfl_sync(0xffffffff, cache_row, 8 * j + row8) * P + first_column + quad * 8;
                if (position >= min(fresh, until)) continue;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) key[j][c] = __ldcs(reinterpret_cast<const uint4 *>(at + 32 * c));   /* written in earlier steps, so the first cache may hold them */
            }
        }
        if (computes) {
            float most = fmaxf(fmaxf(highest, fmaxf(score[0][0], score[0][1])), fmaxf(score[1][0], score[1][1]));
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
                for (int d = 0; d < OWN / 16; d++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sum[d][e] *= by[e % 2];
            }
            copy_wait<0>();
            __syncwarp();
#pragma unroll
            for (int d = 0; d < OWN / 16; d++) {
                uint32_t left[4];
                load_a_transposed(left, values + reader * 16 * WIDE + first_column + 16 * d, WIDE, lane);
                mma(sum[d], left, right);
            }
            __syncwarp();
        }
        if (next < until) {   /* of earlier steps, with zeros behind the last position */
#pragma unroll 4
            for (int i = lane; i < 16 * OWN / 8; i += 32) {
                const int row = i / (OWN / 8), piece = first_column + i % (OWN / 8) * 8, position = next + reader * 16 + row;
                const bf16 *at = cache_v + (int64_t)__shfl_sync(0xffffffff, cache_row, row) * P + piece;
                if (position < fresh || position >= until) copy_async_once(values + (reader * 16 + row) * WIDE + piece, at, position < until);
            }
            copy_commit();
        }
        if (computes) continue;
        if constexpr (FUSED) {
            for (int i = heads * WIDE + threadIdx.x; i < HEADS * WIDE; i += THREADS) queries[i] = __float2bfloat16(0.0f);
            wait_for_inputs();
            /* A warp takes a query head, or a key of this step in the span. */
            const int new_from = max(from, fresh);
#pragma unroll 1
            for (int item = warp; item < heads + max(until - new_from, 0); item += WARPS) {
                const bool is_key = item >= heads;
                const int position = new_from + item - heads;
                const int64_t row = is_key ? first_row + position - fresh : t;
                const bf16 *x = qkv + row * s.row_cols + (int64_t)(is_key ? s.h + kv_head : first_head + item) * P;
                float head[EACH], weight[EACH];
#pragma unroll
                for (int i = 0; i < EACH; i++) head[i] = to_float(x[lane + 32 * i]), weight[i] = is_key ? k_weight[i] : q_weight[i];
                norm_rotate(head, weight, (is_key ? rope.k_norm : rope.q_norm) != nullptr, reinterpret_cast<const float2 *>(rope.table + row * rope.r), rope.r, rope.eps, lane);
                bf16 *to = is_key ? fresh_keys + (position - fresh) * WIDE : queries + item * WIDE;
#pragma unroll
                for (int i = 0; i < EACH; i++) to[lane + 32 * i] = __float2bfloat16(head[i]);
                if (!is_key) continue;
#pragma unroll
                for (int i = 0; i < EACH; i++) fresh_values[(position - fresh) * WIDE + lane + 32 * i] = x[(int64_t)s.g * P + lane + 32 * i];
            }
        } else {
            for (int i = threadIdx.x; i < HEADS * P / 8; i += THREADS) {
                const int head = i / (P / 8), piece = i % (P / 8) * 8;
                const bf16 *x = qkv + t * s.row_cols + (int64_t)(first_head + head) * P + piece;
                *reinterpret_cast<uint4 *>(queries + head * WIDE + piece) = head < heads ? __ldcg(reinterpret_cast<const uint4 *>(x)) : make_uint4(0, 0, 0, 0);
            }
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const uint32_t *pairs = reinterpret_cast<const uint32_t *>(queries + row8 / 2 * WIDE + first_column + 32 * c + 8 * quad) + row8 % 2;
            q[c] = make_uint2(pairs[0], pairs[2]);
        }
    }
    total = quad_sum(total);
    __syncthreads();   /* values are read */
    float *results = reinterpret_cast<float *>(values);
#pragma unroll
    for (int d = 0; d < OWN / 16; d++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int head = 2 * quad + e % 2;
            if (head < heads) results[(reader * HEADS + head) * RESULT_PITCH<P> + first_column + 16 * d + row8 + e / 2 * 8] = sum[d][e];
        }
    if (row8 < HEADS && quad == 0 && first_column == 0) warp_softmax[reader][row8] = make_float2(highest, total);
    __syncthreads();

    /* The warps' sums become the block's, handed over as [split][head][P / 4]. A lane knows the softmax of warp lane / 4 and head lane % 4. */
    const int units = each * (P / 4), own = heads * (P / 4), unit = threadIdx.x;
    Record *const records = handover + (t * gridDim.y + blockIdx.y) * s.splits * units;
    {
        const float2 of = row8 < READERS ? warp_softmax[row8 % READERS][quad] : make_float2(-INFINITY, 0);
        float most = of.x;
#pragma unroll
        for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, step));
        const float weight = most == -INFINITY ? 0.0f : __expf(of.x - most);
        float over = of.y * weight;
#pragma unroll
        for (int step = 4; step < 32; step *= 2) over += __shfl_xor_sync(0xffffffff, over, step);
        const int head = unit / (P / 4) % HEADS, c = unit % (P / 4) * 4;
        float4 v = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < READERS; w++) add_scaled(v, __shfl_sync(0xffffffff, weight, w * 4 + head), *reinterpret_cast<const float4 *>(results + (w * HEADS + head) * RESULT_PITCH<P> + c));
        most = __shfl_sync(0xffffffff, most, head), over = __shfl_sync(0xffffffff, over, head);
        if (unit < own) {
            Record *to = records + split * units + unit;
            __stcg(&to->sum, v);
            __stcg(&to->of, make_float4(most, over, 0, 0));
        }
    }
    /* The row's own key and value into the cache: not before the others have this block's sums, since what reads shared memory waits behind stores. */
    if (FUSED && until == length && group == 0 && warp == WARPS - 1 && lane < P / 8) {
        const int64_t at = (int64_t)row_of(own_slot >> s.page_shift, own_slot) * P + lane * 8;
        const int place = (length - 1 - fresh) * WIDE + lane * 8;
        *reinterpret_cast<uint4 *>(cache_k + at) = *reinterpret_cast<const uint4 *>(fresh_keys + place);
        *reinterpret_cast<uint4 *>(cache_v + at) = *reinterpret_cast<const uint4 *>(fresh_values + place);
    }
    /* A warp merges AHEAD of the units that are the block's part, in each a lane a span. The blocks of a row wait for each other here, and can: there are no more
     * of them than processors, and a GPU begins blocks in their order, so those before them end by themselves and make room for all of these. */
    constexpr int AHEAD = P > 64 ? 2 : 1, N = 4 * AHEAD;
#pragma unroll 1
    for (int first = split + used * warp; first < own; first += used * WARPS * AHEAD) {
        const int index = lane / (32 / N), mine = first + index / 4 * used * WARPS;   /* the value that this lane will write: its unit */
        const int64_t query_head = first_head + mine / (P / 4), c = mine % (P / 4) * 4 + index % 4;
        const bool writes = mine < own && lane % (32 / N) == 0;
        const float gate = writes && s.gated ? sigmoid(to_float(qkv[t * s.row_cols + (s.h + 2 * s.g + query_head) * P + c])) : 1.0f;
        Record *const from = records + lane * units + first;
        float4 sum[AHEAD], of[AHEAD];
        bool complete;
        do {   /* all are asked for together: a look takes long */
            complete = true;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const bool there = lane < used && first + i * used * WARPS < own;
                sum[i] = there ? peek(&from[i * used * WARPS].sum) : make_float4(0, 0, 0, 0);
                of[i] = there ? peek(&from[i * used * WARPS].of) : make_float4(-INFINITY, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) complete = complete && !missing(sum[i]) && !missing(of[i]);
        } while (__any_sync(0xffffffff, !complete));
        float value[N], over[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float most = warp_max(of[i].x), weight = most == -INFINITY ? 0.0f : __expf(of[i].x - most);
            value[4 * i] = sum[i].x * weight, value[4 * i + 1] = sum[i].y * weight, value[4 * i + 2] = sum[i].z * weight, value[4 * i + 3] = sum[i].w * weight;
            over[i] = of[i].y * weight;
        }
        const float result = scattered_sum(value, lane) / scattered_sum(over, lane) * gate;
        if (writes) out[(t * s.h + query_head) * P + c] = __float2bfloat16(result);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (lane < used && first + i * used * WARPS < own) from[i * used * WARPS] = nothing();   /* for the next step's */
    }
}
}   // namespace

/* Splits of whose blocks the stream can hold what they hand over */
static int64_t splits_held(int64_t n, const SpanShape &s) {
    return HANDOVER_BYTES / (int64_t)(n * s.g * ceil_div(s.heads, HEADS) * min((int)HEADS, s.heads) * (s.p / 4) * sizeof(Record));
}

bool decode_supports(const tops_kv *kv, int64_t n, const SpanShape &s, int dtype) {
    return dtype == TOPS_BF16 && kv->dtype == TOPS_BF16 && (s.p == 64 || s.p == 128 || s.p == 256) && n <= ROWS && splits_held(n, s) > 0 && s.page_size == 1 << s.page_shift;
}

int attend_decode(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s, const Rope *rope) {
    const int64_t n = batch->n, columns = s.g * ceil_div(s.heads, HEADS);
    const int64_t most = min(min((int64_t)SPLITS_MOST, splits_held(n, s)), (int64_t)stream->multiprocessors);
    s.splits = (int)max(min(ceil_div(batch->max_pages * kv->page_size, tile_of(s.p)), most), (int64_t)1);
    auto start = [&](auto kernel, int shared) {
        return launch_wide(stream, kernel, dim3((unsigned)s.splits, (unsigned)columns, (unsigned)n), dim3(THREADS), (size_t)shared, static_cast<bf16 *>(out),
                           static_cast<Record *>(stream->handover), static_cast<const bf16 *>(qkv), static_cast<bf16 *>(kv->k), static_cast<bf16 *>(kv->v), *batch, s, rope ? *rope : Rope{});
    };
    if (s.p == 64) return rope ? start(attend_few<64, true>, shared_bytes<64>()) : start(attend_few<64, false>, shared_bytes<64>());
    if (s.p == 128) return rope ? start(attend_few<128, true>, shared_bytes<128>()) : start(attend_few<128, false>, shared_bytes<128>());
    return rope ? start(attend_few<256, true>, shared_bytes<256>()) : start(attend_few<256, false>, shared_bytes<256>());
}
