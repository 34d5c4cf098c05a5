/* The inputs of a streaming product (gemv_stream.cuh) in shared memory. */
#pragma once

#include "linear.cuh"
#include "storage.cuh"

namespace stream {
constexpr int WARPS = 16, THREADS = WARPS * 32;
static_assert(THREADS * 8 == STREAM_NORM_MOST, "a thread has eight columns of a normed row");

#ifdef __CUDACC__
/* With one token (T 1) the matrix is the left operand, whose upper and lower 8 rows are both the tile's: a lane's 16 bytes of a row go in as
 * they are, and the right operand has what belongs to the first and third quarter of them in column 0, to the others in column 1. With more (T 16)
 * the tokens are the left operand. So inputs lie in shared memory by units of 32 columns, of which lane % 4 has 8, four pairs, as
 *   T 1:  [unit][lane % 4][pairs 0, 2 | 1, 3]
 *   T 16: [unit][pairs 0, 1 | 2, 3][t % 8][lane % 4][first pair of t, of t + 8, second pair of t, of t + 8]; 64 bytes between units
 * Pairs are of columns in the order in which the weights' codes come out of memory: quantised and fp8 weights have 0 and 2, 1 and 3. */
template <int T> constexpr int UNIT = T == 1 ? 64 : 1024 + 64;   /* bytes */

/* Four columns from c on, of tokens t and t + 8 if T is 16. */
template <int D, int T> __device__ inline void put_columns(unsigned char *inputs, int t, int c, uint2 v, uint2 w) {
    int unit = c / 32, quad = c % 32 / 8, half = c % 8 / 4;
    if (is_quantised(D)) quad = c % 16 / 4, half = c % 32 / 16;
    if (D == TOPS_FP8_E4M3) unit = c / 64 * 2 + c % 16 / 8, quad = c % 64 / 16, half = c % 8 / 4;
    if (D != TOPS_BF16) {
        v = make_uint2(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632));
        w = make_uint2(__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.x, w.y, 0x7632));
    }
    uint32_t *to = reinterpret_cast<uint32_t *>(inputs + unit * UNIT<T>);
    if (T == 1) {
        to[quad * 4 + half] = v.x;
        to[quad * 4 + half + 2] = v.y;
    } else {
        reinterpret_cast<uint4 *>(to)[(half * 8 + t) * 4 + quad] = make_uint4(v.x, w.x, v.y, w.y);
    }
}

__device__ inline uint4 eight_columns(const Product &p, int t, int c) {   /* zeros beyond the matrix */
    return c < p.cols ? __ldcg(reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(p.x) + t * p.cols + c)) : make_uint4(0, 0, 0, 0);
}
template <int D, int T> __device__ inline void put_eight(unsigned char *inputs, int t, int c, uint4 v, uint4 w) {
    put_columns<D, T>(inputs, t, c, make_uint2(v.x, v.y), make_uint2(w.x, w.y));
    put_columns<D, T>(inputs, t, c + 4, make_uint2(v.z, v.w), make_uint2(w.z, w.w));
}

/* Rows are taken GROUP<T> at a time, all requested together: of 16 those from 4 g and 4 g + 8 on. */
template <int T> constexpr int GROUP = T == 1 ? 1 : 8;
template <int T> __device__ inline int token_of(int g, int i) { return T == 1 ? 0 : 4 * g + i % 4 + i / 4 * 8; }
template <int T> __device__ inline void get_group(uint4 (&rows)[GROUP<T>], const Product &p, int g, int c) {
#pragma unroll
    for (int i = 0; i < GROUP<T>; i++) rows[i] = token_of<T>(g, i) < p.n ? eight_columns(p, token_of<T>(g, i), c) : make_uint4(0, 0, 0, 0);
}
template <int D, int T> __device__ inline void put_group(unsigned char *inputs, int g, int c, const uint4 (&rows)[GROUP<T>]) {
#pragma unroll
    for (int i = 0; i < (GROUP<T> + 1) / 2; i++) put_eight<D, T>(inputs, token_of<T>(g, i), c, rows[i], rows[GROUP<T> / 2 + i]);
}

/* Lay out columns from..until of the rows of x, zeros where there is none. */
template <int D, int T> __device__ inline void take_inputs(unsigned char *inputs, const Product &p, int from, int until) {
    for (int c = from + threadIdx.x * 8; c < until; c += THREADS * 8)
#pragma unroll 1
        for (int g = 0; g < T / GROUP<T>; g++) {
            uint4 rows[GROUP<T>];
            get_group<T>(rows, p, g, c);
            put_group<D, T>(inputs, g, c - from, rows);
        }
    __syncthreads();
}

__device__ inline void eight_floats(uint4 v, float (&to)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

/* The same for whole rows, normed: at most STREAM_NORM_MOST columns, eight for each thread. */
template <int D, int T> __device__ inline void take_normed(unsigned char *inputs, const Product &p, int until, const float4 (&norm)[2]) {
    __shared__ float4 sums[T][WARPS / 4];
    const int c = threadIdx.x * 8;
    uint4 rows[GROUP<T>];
#pragma unroll 1
    for (int g = 0; g < T / GROUP<T>; g++) {
        float sum[GROUP<T>];
        get_group<T>(rows, p, g, c);
#pragma unroll
        for (int i = 0; i < GROUP<T>; i++) {
            float v[8];
            eight_floats(rows[i], v);
            sum[i] = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) sum[i] += v[k] * v[k];
        }
#pragma unroll
        for (int step = 16; step; step /= 2)   /* side by side: a shuffle takes long */
#pragma unroll
            for (int i = 0; i < GROUP<T>; i++) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], step);
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int i = 0; i < GROUP<T>; i++) reinterpret_cast<float *>(sums[token_of<T>(g, i)])[threadIdx.x / 32] = sum[i];
    }
    __syncthreads();
    if (c < until)
#pragma unroll 1
        for (int g = 0; g < T / GROUP<T>; g++) {
            if (T > 1) get_group<T>(rows, p, g, c);
#pragma unroll
            for (int i = 0; i < GROUP<T>; i++) {
                float v[8], total = 0;
#pragma unroll
                for (int w = 0; w < WARPS / 4; w++) {
                    const float4 four = sums[token_of<T>(g, i)][w];
                    total += four.x + four.y + four.z + four.w;
                }
                const float factor = rsqrtf(total / (float)p.cols + p.eps);
                eight_floats(rows[i], v);
                rows[i] = make_uint4(pair_of(v[0] * factor * norm[0].x, v[1] * factor * norm[0].y), pair_of(v[2] * factor * norm[0].z, v[3] * factor * norm[0].w),
                                     pair_of(v[4] * factor * norm[1].x, v[5] * factor * norm[1].y), pair_of(v[6] * factor * norm[1].z, v[7] * factor * norm[1].w));
            }
            put_group<D, T>(inputs, g, c, rows);
        }
    __syncthreads();
}
#endif
}   // namespace stream
