/* Attention of prompts on tensor cores: a block takes 64 neighbouring rows of the batch that belong to one sequence and one query head,
 * and goes through the keys 32 at a time with the softmax carried along (FlashAttention-2, Dao 2023), keys and values gathered by page. */
#include "../cuda/attention.cuh"

namespace {
constexpr int ROWS = 64, KEYS = 32, THREADS = 128;

__device__ inline uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }
__device__ inline void load_four(uint32_t (&to)[4], const void *from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
}
__device__ inline void load_four_transposed(uint32_t (&to)[4], const void *from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
}
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline uint32_t pair(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&both);
}

/* A row is P values; its 16-byte pieces are permuted by the row's number against bank conflicts. */
template <int P> __device__ inline __nv_bfloat16 *place(__nv_bfloat16 *base, int row, int piece) { return base + row * P + ((piece ^ (row & 7)) << 3); }

template <int P> __global__ void __launch_bounds__(THREADS)
attend_rows(__nv_bfloat16 *out, const __nv_bfloat16 *qkv, const __nv_bfloat16 *cache_k, const __nv_bfloat16 *cache_v, tops_batch batch, int h, int g, int page_size,
            int64_t row_cols, float scale, bool gated) {
    extern __shared__ __align__(128) unsigned char memory[];
    __nv_bfloat16 *queries = reinterpret_cast<__nv_bfloat16 *>(memory), *keys = queries + ROWS * P, *values = keys + KEYS * P;
    wait_for_inputs();
    launch_dependents();
    const int head = blockIdx.x, kv_head = head / (h / g), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    /* The block's tile among the sequences' tiles of ROWS rows. */
    int64_t sequence = 0, first = 0, end = 0, tile = blockIdx.y;
    for (; sequence < batch.b; sequence++) {
        first = batch.query_starts[sequence];
        end = batch.query_starts[sequence + 1];
        int64_t tiles = (end - first + ROWS - 1) / ROWS;
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (sequence >= batch.b) return;
    first += tile * ROWS;
    const int count = (int)(end - first < ROWS ? end - first : ROWS);
    const int32_t *pages = batch.page_table + batch.sequences[first] * batch.max_pages;
    const int begin = batch.positions[first], length = batch.positions[first + count - 1] + 1;

    for (int i = threadIdx.x; i < ROWS * P / 8; i += THREADS) {
        int row = i / (P / 8), piece = i % (P / 8);
        uint4 value = make_uint4(0, 0, 0, 0);
        if (row < count) value = *reinterpret_cast<const uint4 *>(qkv + (first + row) * row_cols + (int64_t)head * P + piece * 8);
        *reinterpret_cast<uint4 *>(place<P>(queries, row, piece)) = value;
    }
    float sum[P / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int at = 0; at < length; at += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * P / 8; i += THREADS) {
            int row = i / (P / 8), piece = i % (P / 8), position = at + row;
            uint4 key = make_uint4(0, 0, 0, 0), value = key;
            if (position < length) {
                int64_t from = (((int64_t)pages[position / page_size] * g + kv_head) * page_size + position % page_size) * P + piece * 8;
                key = *reinterpret_cast<const uint4 *>(cache_k + from);
                value = *reinterpret_cast<const uint4 *>(cache_v + from);
            }
            *reinterpret_cast<uint4 *>(place<P>(keys, row, piece)) = key;
            *reinterpret_cast<uint4 *>(place<P>(values, row, piece)) = value;
        }
        __syncthreads();
        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < P / 16; kk++) {
            uint32_t a[4];
            load_four(a, place<P>(queries, warp * 16 + lane % 16, 2 * kk + lane / 16));
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                uint32_t b[4];
                load_four(b, place<P>(keys, 16 * j + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
                multiply(score[2 * j], a, b[0], b[1]);
                multiply(score[2 * j + 1], a, b[2], b[3]);
            }
        }
        /* Element e of a tile: row lane / 4 + 8 (e / 2), key lane % 4 * 2 + e % 2. */
        float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int position = at + 8 * j + lane % 4 * 2 + e % 2, row = warp * 16 + lane / 4 + e / 2 * 8;
                score[j][e] = position <= begin + row ? score[j][e] * scale : -INFINITY;
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
            uint32_t a[4] = {pair(score[2 * kk][0], score[2 * kk][1]), pair(score[2 * kk][2], score[2 * kk][3]),
                             pair(score[2 * kk + 1][0], score[2 * kk + 1][1]), pair(score[2 * kk + 1][2], score[2 * kk + 1][3])};
#pragma unroll
            for (int j = 0; j < P / 16; j++) {
                uint32_t b[4];
                load_four_transposed(b, place<P>(values, 16 * kk + lane % 16, 2 * j + lane / 16));
                multiply(sum[2 * j], a, b[0], b[1]);
                multiply(sum[2 * j + 1], a, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
        int row = warp * 16 + lane / 4 + 8 * r;
        if (row >= count) continue;
        __nv_bfloat16 *to = out + ((first + row) * h + head) * P;
        const __nv_bfloat16 *gate = qkv + (first + row) * row_cols + (int64_t)(h + 2 * g + head) * P;
#pragma unroll
        for (int j = 0; j < P / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int c = 8 * j + lane % 4 * 2 + e;
                float value = sum[j][2 * r + e] / total[r];
                if (gated) value *= sigmoid(__bfloat162float(gate[c]));
                to[c] = __float2bfloat16(value);
            }
    }
}

template <int P> int run(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, int64_t h, int64_t g, float scale, int gated) {
    const int bytes = (ROWS + 2 * KEYS) * P * 2;
    CUDA(cudaFuncSetAttribute(attend_rows<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    /* How many tiles there are is known on the device only; each sequence adds at most one that is not full. */
    dim3 grid((unsigned)h, (unsigned)(batch->n / ROWS + batch->b));
    int64_t row_cols = ((gated ? 2 * h : h) + 2 * g) * P;
    return launch(stream, attend_rows<P>, grid, dim3(THREADS), bytes, 1, static_cast<__nv_bfloat16 *>(out), static_cast<const __nv_bfloat16 *>(qkv),
                  static_cast<const __nv_bfloat16 *>(kv->k), static_cast<const __nv_bfloat16 *>(kv->v), *batch, (int)h, (int)g, (int)kv->page_size, row_cols, scale,
                  gated != 0);
}
}   // namespace

int attend_prompt(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, int64_t h, int64_t g, int64_t p,
                  float scale, int gated) {
    if (p == 64) return run<64>(stream, out, qkv, kv, batch, h, g, scale, gated);
    if (p == 128) return run<128>(stream, out, qkv, kv, batch, h, g, scale, gated);
    return run<256>(stream, out, qkv, kv, batch, h, g, scale, gated);
}
