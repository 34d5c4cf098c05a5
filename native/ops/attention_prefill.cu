/* Attention of prompts on tensor cores: a block takes 128 neighbouring rows of one sequence and one query head, and goes through the
 * keys 64 at a time with the softmax carried along (FlashAttention-2, Dao 2023). Keys and values are gathered by page into two stages
 * of shared memory, so that the next ones travel while these are used. Of few rows behind a long past (PACKED) a block takes 16 for all query
 * heads of a key-value head, a head for each warp, and the past is cut into spans, as in decoding. */
#include "../cuda/attention.cuh"
#include "../cuda/storage.cuh"

namespace {
constexpr int ROWS = 128, KEYS = 64, THREADS = 256, FEW = 16;

/* A row is P values; its 16-byte pieces are permuted by the row's number against bank conflicts. */
template <int P> __device__ inline __nv_bfloat16 *place(__nv_bfloat16 *base, int row, int piece) { return base + row * P + ((piece ^ (row & 7)) << 3); }

template <int P> __device__ inline void load_keys(__nv_bfloat16 *keys, const __nv_bfloat16 *cache_k, const __nv_bfloat16 *cache_v, const int32_t *pages, int at, int until,
                                                  int kv_head, const SpanShape &s) {
    for (int i = threadIdx.x; i < KEYS * P / 8; i += THREADS) {
        int row = i / (P / 8), piece = i % (P / 8), position = at + row;
        bool there = position < until;
        int64_t from = there ? (((int64_t)pages[position >> s.page_shift] * s.g + kv_head << s.page_shift) + (position & s.page_size - 1)) * P + piece * 8 : 0;
        copy_async(place<P>(keys, row, piece), cache_k + from, there);
        copy_async(place<P>(keys + KEYS * P, row, piece), cache_v + from, there);
    }
    copy_commit();
}

template <int P, bool PACKED> __global__ void __launch_bounds__(THREADS)
attend_rows(__nv_bfloat16 *out, float *partial, float *maxima, float *sums, const __nv_bfloat16 *qkv, const __nv_bfloat16 *cache_k, const __nv_bfloat16 *cache_v,
            tops_batch batch, SpanShape s) {
    extern __shared__ __align__(128) unsigned char memory[];
    __nv_bfloat16 *queries = reinterpret_cast<__nv_bfloat16 *>(memory), *stages = queries + ROWS * P;
    launch_dependents();
    wait_for_inputs();
    constexpr int TOKENS = PACKED ? FEW : ROWS;
    const int split = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int kv_head = PACKED ? blockIdx.x : blockIdx.x / s.heads, first_head = PACKED ? kv_head * s.heads : blockIdx.x;
    const int head = first_head + (PACKED ? min(warp, s.heads - 1) : 0), warp_row = PACKED ? 0 : warp * 16;   /* what the warp works on */
    /* The block's tile among the sequences' tiles of TOKENS rows; the last ones, which have most keys, begin first. */
    int64_t sequence = 0, first = 0, end = 0, tile = gridDim.y - 1 - blockIdx.y;
    for (; sequence < batch.b; sequence++) {
        first = batch.query_starts[sequence];
        end = batch.query_starts[sequence + 1];
        int64_t tiles = (end - first + TOKENS - 1) / TOKENS;
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (sequence >= batch.b) return;
    first += tile * TOKENS;
    const int count = (int)(end - first < TOKENS ? end - first : TOKENS);
    const int32_t *pages = batch.page_table + batch.sequences[first] * batch.max_pages;
    const int begin = batch.positions[first], length = batch.positions[first + count - 1] + 1;
    const int span = s.splits == 1 ? length : span_of(length, s.splits), from = split * span, until = min(length, from + span);

    for (int i = threadIdx.x; i < ROWS * P / 8; i += THREADS) {
        int row = i / (P / 8), piece = i % (P / 8);
        const int t = row % TOKENS, h = row / TOKENS;
        const bool there = t < count && h < (PACKED ? s.heads : 1);
        copy_async(place<P>(queries, row, piece), qkv + (there ? (first + t) * s.row_cols + (int64_t)(first_head + h) * P + piece * 8 : 0), there);
    }
    if (from < until) load_keys<P>(stages, cache_k, cache_v, pages, from, until, kv_head, s);
    float sum[P / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int at = from, stage = 0; at < until; at += KEYS, stage ^= 1) {
        __nv_bfloat16 *keys = stages + stage * 2 * KEYS * P, *values = keys + KEYS * P;
        if (at + KEYS < until) {
            load_keys<P>(stages + (stage ^ 1) * 2 * KEYS * P, cache_k, cache_v, pages, at + KEYS, until, kv_head, s);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        if (PACKED ? warp < s.heads : warp_row < count) {
        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < P / 16; kk++) {
            uint32_t a[4];
            load_matrices(a, place<P>(queries, warp * 16 + lane % 16, 2 * kk + lane / 16));
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                uint32_t b[4];
                load_matrices(b, place<P>(keys, 16 * j + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
                mma(score[2 * j], a, b);
                mma(score[2 * j + 1], a, b + 2);
            }
        }
        /* Element e of a tile: row lane / 4 + 8 (e / 2), key lane % 4 * 2 + e % 2. */
        float highest[2] = {maximum[0], maximum[1]};
        const bool whole = at + KEYS <= until && at + KEYS - 1 <= begin + warp_row;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int position = at + 8 * j + lane % 4 * 2 + e % 2, row = warp_row + lane / 4 + e / 2 * 8;
                score[j][e] = whole || (position <= begin + row && position < until) ? score[j][e] * s.scale : -INFINITY;
                highest[e / 2] = fmaxf(highest[e / 2], score[j][e]);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffff, highest[r], 1));
            highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffff, highest[r], 2));
            float shrink = highest[r] == -INFINITY ? 1.0f : __expf(maximum[r] - highest[r]);
            total[r] *= shrink;
#pragma unroll
            for (int j = 0; j < P / 8; j++) {
                sum[j][2 * r] *= shrink;
                sum[j][2 * r + 1] *= shrink;
            }
            maximum[r] = highest[r];
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                score[j][e] = score[j][e] == -INFINITY ? 0.0f : __expf(score[j][e] - highest[e / 2]);
                total[e / 2] += score[j][e];
            }
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; kk++) {
            uint32_t a[4] = {pair_of(score[2 * kk][0], score[2 * kk][1]), pair_of(score[2 * kk][2], score[2 * kk][3]),
                             pair_of(score[2 * kk + 1][0], score[2 * kk + 1][1]), pair_of(score[2 * kk + 1][2], score[2 * kk + 1][3])};
#pragma unroll
            for (int j = 0; j < P / 16; j++) {
                uint32_t b[4];
                load_matrices_transposed(b, place<P>(values, 16 * kk + lane % 16, 2 * j + lane / 16));
                mma(sum[2 * j], a, b);
                mma(sum[2 * j + 1], a, b + 2);
            }
        }
        }
        __syncthreads();   /* before the other stage is written over */
    }
    copy_wait<0>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
        const int row = warp_row + lane / 4 + 8 * r;
        if (row >= count || (PACKED && warp >= s.heads)) continue;
        const int64_t place = ((first + row) * s.h + head) * s.splits + split;
        if (s.splits > 1 && lane % 4 == 0) {
            maxima[place] = maximum[r];
            sums[place] = total[r];
        }
        const __nv_bfloat16 *gate = qkv + (first + row) * s.row_cols + (int64_t)(s.h + 2 * s.g + head) * P;
#pragma unroll
        for (int j = 0; j < P / 8; j++) {
            const int c = 8 * j + lane % 4 * 2;
            if (s.splits > 1) {
                *reinterpret_cast<float2 *>(partial + place * P + c) = make_float2(sum[j][2 * r], sum[j][2 * r + 1]);
                continue;
            }
            float low = sum[j][2 * r] / total[r], high = sum[j][2 * r + 1] / total[r];
            if (s.gated) {
                low *= sigmoid(__bfloat162float(gate[c]));
                high *= sigmoid(__bfloat162float(gate[c + 1]));
            }
            *reinterpret_cast<__nv_bfloat162 *>(out + place * P + c) = __floats2bfloat162_rn(low, high);
        }
    }
}

template <int P> int run(tops_stream *stream, __nv_bfloat16 *out, const __nv_bfloat16 *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s) {
    const int bytes = (ROWS + 4 * KEYS) * P * 2;
    /* How many tiles there are is known on the device only; each sequence adds at most one that is not full. */
    const int64_t n = batch->n, heads = s.heads;
    const bool packed = n <= 64 && heads * FEW <= ROWS;
    const int64_t tiles = n / (packed ? FEW : ROWS) + batch->b, columns = packed ? s.g : s.h;
    float *partial = nullptr, *maxima = nullptr, *sums = nullptr;
    if (tiles * columns < 132 && n <= 64) {
        s.splits = (int)min(min(ceil_div(264, max(n / FEW, (int64_t)1) * columns), (int64_t)32), ceil_div(s.max_pages * s.page_size, SPAN_LEAST));
        Scratch scratch(stream);
        partial = scratch.take<float>(n * s.h * s.splits * P);
        maxima = scratch.take<float>(n * s.h * s.splits);
        REQUIRE_SCRATCH(sums = scratch.take<float>(n * s.h * s.splits));
    }
    auto start = [&](auto kernel) {
        return launch_wide(stream, kernel, dim3((unsigned)columns, (unsigned)tiles, (unsigned)s.splits), dim3(THREADS), bytes, out, partial, maxima, sums, qkv,
                      static_cast<const __nv_bfloat16 *>(kv->k), static_cast<const __nv_bfloat16 *>(kv->v), *batch, s);
    };
    int status = packed ? start(attend_rows<P, true>) : start(attend_rows<P, false>);
    if (status || s.splits == 1) return status;
    return merge(stream, out, qkv, partial, maxima, sums, n, s);
}
}   // namespace

int attend_prompt(tops_stream *stream, __nv_bfloat16 *out, const __nv_bfloat16 *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s) {
    if (s.p == 64) return run<64>(stream, out, qkv, kv, batch, s);
    if (s.p == 128) return run<128>(stream, out, qkv, kv, batch, s);
    return run<256>(stream, out, qkv, kv, batch, s);
}
