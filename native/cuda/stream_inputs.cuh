/* The inputs of a streaming product (gemv_stream.cuh) in shared memory. */
#pragma once

#include "fixed.cuh"
#include "linear.cuh"
#include "ring.cuh"
#include "storage.cuh"

namespace stream {
constexpr int WARPS = 16, THREADS = WARPS * 32;
static_assert(THREADS * 8 == STREAM_NORM_MOST, "a thread has eight columns of a normed row");

#ifdef __CUDACC__
/* With one token (T 1) the matrix is the left operand, whose upper and lower 8 rows are both the tile's: a lane's 16 bytes of a row go in as
 * they are, and the right operand has what belongs to the first and third quarter of them in column 0, to the others in column 1. With more (T 16)
 * the tokens are the left operand. So inputs lie in shared memory by units of 32 columns, of which lane % 4 has 8, four pairs, as
 *   T 1:  [two units][lane % 4][pairs 0, 2 of both | 1, 3 of both]
 *   T 16: [unit][pairs 0, 1 | 2, 3][t % 8][lane % 4][first pair of t, of t + 8, second pair of t, of t + 8]; 64 bytes between units
 * Pairs are of columns in the order in which the weights' codes come out of memory: with 16 tokens quantised and fp8 weights have 0 and 2, 1 and 3.
 *
 * Of one token, fp8 weights find f16 less a power of two for each slot, which stands behind the slot's units, and quantised weights find integers
 * (fixed.cuh) as multiply_fixed's lanes take them, by slot: [lane] of its column's block the bytes of columns 4 (lane % 4) .. + 3 and 16 further, of
 * each accumulator; then a Block for 32 columns, or for each 16 (Q6_K). */
template <int T> constexpr int UNIT = T == 1 ? 64 : 1024 + 64;   /* bytes */
template <int D, int T> constexpr bool FIXED = T == 1 && is_quantised(D);
template <int D> constexpr int SUM_COLUMNS = D == TOPS_Q6_K ? 16 : 32;
template <int D, int T> constexpr int SLOT_INPUTS = FIXED<D, T> ? Slot<D>::VALUES * 2 + Slot<D>::VALUES / SUM_COLUMNS<D> * 8
                                                                 : Slot<D>::VALUES / 32 * UNIT<T> + (T == 1 && D == TOPS_FP8_E4M3 ? 16 : 0);

/* Eight columns times `factor` times the norm's weights, as bf16 */
__device__ inline uint4 normed(const float (&v)[8], const float4 (&norm)[2], float factor) {
    return make_uint4(pair_of(v[0] * factor * norm[0].x, v[1] * factor * norm[0].y), pair_of(v[2] * factor * norm[0].z, v[3] * factor * norm[0].w),
                      pair_of(v[4] * factor * norm[1].x, v[5] * factor * norm[1].y), pair_of(v[6] * factor * norm[1].z, v[7] * factor * norm[1].w));
}
/* Eight columns of the only token, from a column of a slot on, if they are there; all lanes of a warp call, with neighbouring columns. */
template <int D> __device__ inline void put_one(unsigned char *to, unsigned column, uint4 v, bool there) {
    if constexpr (D == TOPS_BF16) {
        uint2 *pairs = reinterpret_cast<uint2 *>(to) + column % 32 / 8 * 4 + column / 32;
        if (there) pairs[0] = make_uint2(v.x, v.z), pairs[2] = make_uint2(v.y, v.w);
    } else {
        float x[8];
        eight_floats(v, x);
        if constexpr (D == TOPS_FP8_E4M3) {
            const float step = step_of(largest(v, 16), 14), per_step = inverse(step);
            uint2 *pairs = reinterpret_cast<uint2 *>(to) + column / 64 * 16 + column % 64 / 16 * 4 + column % 16 / 8;
            if (!there) return;
            pairs[0] = make_uint2(half_pair(x[0] * per_step, x[1] * per_step), half_pair(x[4] * per_step, x[5] * per_step));
            pairs[2] = make_uint2(half_pair(x[2] * per_step, x[3] * per_step), half_pair(x[6] * per_step, x[7] * per_step));
            if (column == 0) *reinterpret_cast<float *>(to + SLOT_INPUTS<D, 1> - 16) = step;
        } else {
            const float step = step_of(largest(v, 4), 13), per_step = inverse(step);
            uint2 high, low;
            int sum = split_four(high.x, low.x, make_float4(x[0], x[1], x[2], x[3]), per_step);
            sum += split_four(high.y, low.y, make_float4(x[4], x[5], x[6], x[7]), per_step);
            for (int lanes = 1; lanes < SUM_COLUMNS<D> / 8; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
            if (!there) return;
            constexpr int TILES = Slot<D>::OWN;
            const int place = Slot<D>::place(column / 32), pair = place / TILES, tile = place % TILES, half = column % 32 / 16, quad = column % 16 / 4;
            uint32_t *words = reinterpret_cast<uint32_t *>(to) + ((2 * pair * 4 + quad) * TILES + tile) * 2 + half;   /* of lane 8 pair + quad: the high bytes */
            words[0] = high.x;
            words[2 * TILES] = high.y;
            words[8 * TILES] = low.x;
            words[10 * TILES] = low.y;
            if (column % SUM_COLUMNS<D> == 0)
                reinterpret_cast<Block *>(to + Slot<D>::VALUES * 2)[place * (32 / SUM_COLUMNS<D>) + column % 32 / SUM_COLUMNS<D>] = block_of<D>(step, sum);
        }
    }
}

/* A thread's eight weights of the norm */
__device__ inline void get_norm(float4 (&norm)[2], const Product &p, int c) {
    const float4 *at = reinterpret_cast<const float4 *>(p.norm + c), none = make_float4(0, 0, 0, 0);
    norm[0] = c < (int)p.cols ? __ldg(at) : none, norm[1] = c < (int)p.cols ? __ldg(at + 1) : none;
}
/* Lay out columns from..until of the only token's row, normed if the product norms: the whole row, at most STREAM_NORM_MOST columns then. A thread has
 * eight columns of each piece, and asks for all of them together. */
constexpr int PIECES = 3;
template <int D> __device__ inline void take_row(unsigned char *inputs, const Product &p, int from, int until) {
    __shared__ float4 sums[WARPS / 4];
    const int first = from + threadIdx.x * 8, there = min(until, (int)p.cols), lane = threadIdx.x % 32;
    const bf16 *x = static_cast<const bf16 *>(p.x) + first;
    uint4 row[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) row[i] = first + i * THREADS * 8 < there ? __ldcg(reinterpret_cast<const uint4 *>(x + i * THREADS * 8)) : make_uint4(0, 0, 0, 0);
    if (p.norm) {
        float4 norm[2];
        get_norm(norm, p, first);
        float v[8], sum = 0;
        eight_floats(row[0], v);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += v[k] * v[k];
        sum = warp_sum(sum);
        if (lane == 0) reinterpret_cast<float *>(sums)[threadIdx.x / 32] = sum;
        __syncthreads();
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS / 4; w++) total += sums[w].x + sums[w].y + sums[w].z + sums[w].w;
        row[0] = normed(v, norm, rsqrtf(total * p.per_column + p.eps));
    }
    const unsigned column = threadIdx.x * 8 % Slot<D>::VALUES;   /* of a slot, in every piece */
    unsigned char *to = inputs + threadIdx.x * 8 / Slot<D>::VALUES * SLOT_INPUTS<D, 1>;
#pragma unroll 1
    for (int c = first; c - lane * 8 < until; c += THREADS * 8, to += THREADS * 8 / Slot<D>::VALUES * SLOT_INPUTS<D, 1>) {   /* whole warps */
        put_one<D>(to, column, row[0], c < until);
#pragma unroll
        for (int i = 0; i + 1 < PIECES; i++) row[i] = row[i + 1];
    }
    __syncthreads();
}

/* ---- 16 tokens ---- */
/* Four columns from c on, of tokens t and t + 8 */
template <int D> __device__ inline void put_columns(unsigned char *inputs, int t, int c, uint2 v, uint2 w) {
    int unit = c / 32, quad = c % 32 / 8, half = c % 8 / 4;
    if (is_quantised(D)) quad = c % 16 / 4, half = c % 32 / 16;
    if (D == TOPS_FP8_E4M3) unit = c / 64 * 2 + c % 16 / 8, quad = c % 64 / 16, half = c % 8 / 4;
    if (D != TOPS_BF16) {
        v = make_uint2(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632));
        w = make_uint2(__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.x, w.y, 0x7632));
    }
    reinterpret_cast<uint4 *>(inputs + unit * UNIT<16>)[(half * 8 + t) * 4 + quad] = make_uint4(v.x, w.x, v.y, w.y);
}
template <int D> __device__ inline void put_eight(unsigned char *inputs, int t, int c, uint4 v, uint4 w) {
    put_columns<D>(inputs, t, c, make_uint2(v.x, v.y), make_uint2(w.x, w.y));
    put_columns<D>(inputs, t, c + 4, make_uint2(v.z, v.w), make_uint2(w.z, w.w));
}
__device__ inline uint4 eight_columns(const Product &p, int t, int c) {   /* zeros beyond the matrix */
    return c < (int)p.cols ? __ldcg(reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(p.x) + t * p.cols + c)) : make_uint4(0, 0, 0, 0);
}

/* Rows are taken eight at a time, all requested together: those from 4 g and 4 g + 8 on. */
constexpr int GROUP = 8;
__device__ inline int token_of(int g, int i) { return 4 * g + i % 4 + i / 4 * 8; }
__device__ inline void get_group(uint4 (&rows)[GROUP], const Product &p, int g, int c) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) rows[i] = token_of(g, i) < p.n ? eight_columns(p, token_of(g, i), c) : make_uint4(0, 0, 0, 0);
}
template <int D> __device__ inline void put_group(unsigned char *inputs, int g, int c, const uint4 (&rows)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP / 2; i++) put_eight<D>(inputs, token_of(g, i), c, rows[i], rows[GROUP / 2 + i]);
}

/* Lay out columns from..until of the rows of x, zeros where there is none. */
template <int D> __device__ inline void take_rows(unsigned char *inputs, const Product &p, int from, int until) {
    for (int c = from + threadIdx.x * 8; c < until; c += THREADS * 8)
#pragma unroll 1
        for (int g = 0; g < 16 / GROUP; g++) {
            uint4 rows[GROUP];
            get_group(rows, p, g, c);
            put_group<D>(inputs, g, c - from, rows);
        }
    __syncthreads();
}
/* The same for whole rows, normed */
template <int D> __device__ inline void take_normed_rows(unsigned char *inputs, const Product &p, int until) {
    __shared__ float4 sums[16][WARPS / 4];
    const int c = threadIdx.x * 8;
    uint4 rows[GROUP];
    float4 norm[2];
    get_norm(norm, p, c);
#pragma unroll 1
    for (int g = 0; g < 16 / GROUP; g++) {
        float sum[GROUP];
        get_group(rows, p, g, c);
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            float v[8];
            eight_floats(rows[i], v);
            sum[i] = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) sum[i] += v[k] * v[k];
        }
#pragma unroll
        for (int step = 16; step; step /= 2)   /* side by side: a shuffle takes long */
#pragma unroll
            for (int i = 0; i < GROUP; i++) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], step);
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int i = 0; i < GROUP; i++) reinterpret_cast<float *>(sums[token_of(g, i)])[threadIdx.x / 32] = sum[i];
    }
    __syncthreads();
    if (c < until)
#pragma unroll 1
        for (int g = 0; g < 16 / GROUP; g++) {
            get_group(rows, p, g, c);
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                float v[8], total = 0;
#pragma unroll
                for (int w = 0; w < WARPS / 4; w++) {
                    const float4 four = sums[token_of(g, i)][w];
                    total += four.x + four.y + four.z + four.w;
                }
                eight_floats(rows[i], v);
                rows[i] = normed(v, norm, rsqrtf(total * p.per_column + p.eps));
            }
            put_group<D>(inputs, g, c, rows);
        }
    __syncthreads();
}
#endif
}   // namespace stream
