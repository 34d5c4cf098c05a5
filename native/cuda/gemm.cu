/* out [n, rows] = x [n, cols] w [rows, cols]^T in bf16 on tensor cores (mma.sync m16n8k16), for prompts.
 *
 * A block computes 128 x 128 of the output: 8 warps of 64 x 32, columns in steps of 64 through three stages of shared memory. Rows of
 * a stage are 128 bytes; their 16-byte pieces are permuted by the row's number so that ldmatrix reads without bank conflicts. */
#include "linear.cuh"

namespace {
constexpr int M = 128, N = 128, K = 64, STAGES = 3, THREADS = 256;
constexpr int STAGE_BYTES = (M + N) * K * 2;

__device__ inline uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

__device__ inline void copy_piece(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ inline void load_four(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Byte of piece (16 bytes) `piece` of row `row` in a stage's half. */
__device__ inline int place(int row, int piece) { return row * K * 2 + ((piece ^ (row & 7)) << 4); }

__device__ inline void load_stage(unsigned char *stage, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t m0, int64_t n0, int64_t k0, int64_t m, int64_t n,
                                  int64_t k) {
#pragma unroll
    for (int i = threadIdx.x; i < (M + N) * K / 8; i += THREADS) {
        int row = i / (K / 8), piece = i % (K / 8);
        bool left = row < M;
        int local = left ? row : row - M;
        int64_t at = (left ? m0 : n0) + local, column = k0 + piece * 8;
        bool there = at < (left ? m : n) && column < k;
        const __nv_bfloat16 *from = (left ? x : w) + (there ? at * k + column : 0);
        copy_piece(stage + (left ? 0 : M * K * 2) + place(local, piece), from, there);
    }
}

template <bool F32, bool SUM> __global__ void __launch_bounds__(THREADS, 2)
gemm_kernel(void *out, int64_t out_cols, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t m, int64_t n, int64_t k) {
    extern __shared__ __align__(128) unsigned char stages[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;
    const int64_t m0 = blockIdx.x * (int64_t)M, n0 = blockIdx.y * (int64_t)N, steps = (k + K - 1) / K;
    wait_for_inputs();
    launch_dependents();
    float sum[4][4][4] = {};
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load_stage(stages + s * STAGE_BYTES, x, w, m0, n0, (int64_t)s * K, m, n, k);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int64_t step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        int64_t ahead = step + STAGES - 1;
        if (ahead < steps) load_stage(stages + ahead % STAGES * STAGE_BYTES, x, w, m0, n0, ahead * K, m, n, k);
        asm volatile("cp.async.commit_group;" ::: "memory");
        const uint32_t left = shared_address(stages + step % STAGES * STAGE_BYTES), right = left + M * K * 2;
#pragma unroll
        for (int kk = 0; kk < K / 16; kk++) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) load_four(a[i], left + place(warp_m + 16 * i + lane % 16, 2 * kk + lane / 16));
#pragma unroll
            for (int j = 0; j < 2; j++) load_four(b[j], right + place(warp_n + 16 * j + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) multiply(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
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
