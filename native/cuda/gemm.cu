/* out [n, rows] = x [n, cols] w [rows, cols]^T in bf16 on tensor cores (mma.sync m16n8k16), for prompts.
 *
 * A block computes 128 x 128 of the output: 8 warps of 64 x 32, columns in steps of 64 through three stages of shared memory. Rows of
 * a stage are 128 bytes; their 16-byte pieces are permuted by the row's number so that ldmatrix reads without bank conflicts. */
#include "linear.cuh"
#include "mma.cuh"

namespace {
constexpr int M = 128, N = 128, K = 64, STAGES = 3, THREADS = 256;
constexpr int STAGE = (M + N) * K, STAGE_BYTES = STAGE * 2;

/* Where piece (8 values) `piece` of row `row` lies in a stage's half. */
__device__ inline int place(int row, int piece) { return row * K + ((piece ^ (row & 7)) << 3); }

/* A thread copies the same piece of every 32nd row of both operands; its addresses only move along the columns. */
struct Loader {
    const __nv_bfloat16 *from[(M + N) / 32];
    uint32_t there;
    int to, column;
    int64_t k;

    __device__ Loader(const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t m0, int64_t n0, int64_t m, int64_t n, int64_t k_) : there(0), k(k_) {
        const int row = threadIdx.x / 8;
        column = threadIdx.x % 8 * 8;
        to = place(row, threadIdx.x % 8);   /* 32 rows further down the permutation is the same */
#pragma unroll
        for (int i = 0; i < (M + N) / 32; i++) {
            const bool left = i < M / 32;
            int64_t at = (left ? m0 + 32 * i : n0 + 32 * (i - M / 32)) + row;
            bool inside = at < (left ? m : n);
            there |= (uint32_t)inside << i;
            from[i] = (left ? x : w) + (inside ? at * k : 0) + column;
        }
    }
    __device__ void load(__nv_bfloat16 *stage, int64_t k0) const {
        const bool inside = k0 + column < k;
#pragma unroll
        for (int i = 0; i < (M + N) / 32; i++) {
            const bool copied = inside && (there >> i & 1);
            copy_async(stage + 32 * i * K + to, copied ? from[i] + k0 : from[i], copied);
        }
        copy_commit();
    }
};

template <bool F32, bool SUM> __global__ void __launch_bounds__(THREADS, 2)
gemm_kernel(void *out, int64_t out_cols, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t m, int64_t n, int64_t k) {
    extern __shared__ __align__(128) unsigned char memory[];
    __nv_bfloat16 *stages = reinterpret_cast<__nv_bfloat16 *>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;
    const int64_t m0 = blockIdx.x * (int64_t)M, n0 = blockIdx.y * (int64_t)N, steps = (k + K - 1) / K;
    const Loader loader(x, w, m0, n0, m, n, k);
    launch_dependents();
    wait_for_inputs();
    float sum[4][4][4] = {};
    for (int s = 0; s < STAGES - 1; s++) loader.load(stages + s * STAGE, (int64_t)s * K);   /* beyond the last column: zeros */
    for (int64_t step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        loader.load(stages + (step + STAGES - 1) % STAGES * STAGE, (step + STAGES - 1) * K);
        const __nv_bfloat16 *left = stages + step % STAGES * STAGE, *right = left + M * K;
#pragma unroll
        for (int kk = 0; kk < K / 16; kk++) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) load_matrices(a[i], left + place(warp_m + 16 * i + lane % 16, 2 * kk + lane / 16));
#pragma unroll
            for (int j = 0; j < 2; j++) load_matrices(b[j], right + place(warp_n + 16 * j + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma(sum[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }
    copy_wait<0>();
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int64_t row = m0 + warp_m + 16 * i + lane / 4 + e / 2 * 8, column = n0 + warp_n + 8 * j + lane % 4 * 2 + e % 2;
                if (row >= m || column >= n) continue;
                int64_t at = row * out_cols + column;
                if (F32) {
                    float *to = static_cast<float *>(out);
                    to[at] = SUM ? to[at] + sum[i][j][e] : sum[i][j][e];
                } else {
                    __nv_bfloat16 *to = static_cast<__nv_bfloat16 *>(out);
                    to[at] = __float2bfloat16(SUM ? __bfloat162float(to[at]) + sum[i][j][e] : sum[i][j][e]);
                }
            }
}
}   // namespace

int gemm(tops_stream *stream, void *out, int64_t out_cols, bool out_f32, bool add, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t n,
         int64_t rows, int64_t cols) {
    auto kernel = out_f32 ? (add ? gemm_kernel<true, true> : gemm_kernel<true, false>) : (add ? gemm_kernel<false, true> : gemm_kernel<false, false>);
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, STAGES * STAGE_BYTES));
    /* Blocks that run together share rows of w: tokens are the fast dimension of the grid. */
    dim3 grid((unsigned)ceil_div(n, M), (unsigned)ceil_div(rows, N));
    REQUIRE(grid.y < 65536, "rows: at most 8388480 in a product, not %lld", (long long)rows);
    return launch(stream, kernel, grid, dim3(THREADS), STAGES * STAGE_BYTES, 1, out, out_cols, x, w, n, rows, cols);
}
