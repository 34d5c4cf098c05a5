/* out [n, rows] = x [n, cols] w [rows, cols]^T in bf16 on Hopper's tensor cores, for prompts.
 *
 * A block computes 128 x 128 of the output. One warp keeps the copy engine busy (TMA, 64 columns a stage, completion by mbarrier), two
 * warp groups of 64 rows each multiply straight from shared memory (wgmma). Two blocks share a multiprocessor, so that one multiplies
 * while the other begins or stores. For gate and up the tile is 64 rows of each, and the block stores silu(gate) * up. */
#include <cuda.h>

#include "linear.cuh"

namespace {
constexpr int M = 128, N = 128, K = 64, STAGES = 3, THREADS = 288;
constexpr int LEFT_BYTES = M * K * 2, HALF_BYTES = N / 2 * K * 2, STAGE_BYTES = LEFT_BYTES + 2 * HALF_BYTES, SHARED_BYTES = STAGES * STAGE_BYTES + 1024;
constexpr int PITCH = N + 8;   /* values of a row on its way out, padded against bank conflicts */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ inline uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }
__device__ inline void barrier_init(uint64_t *barrier, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)); }
__device__ inline void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint64_t *barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"); }
__device__ inline void barrier_wait(uint64_t *barrier, int phase) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@done bra END;\nbra AGAIN;\nEND:\n}" ::"r"(shared_address(barrier)),
                 "r"(phase)
                 : "memory");
}
__device__ inline void copy_tile(void *to, const CUtensorMap *map, uint64_t *barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)), "l"(map),
                 "r"(shared_address(barrier)), "r"(column), "r"(row)
                 : "memory");
}
/* Rows of 128 bytes, swizzled by 128 bytes, 8 rows to 1024 bytes. */
__device__ inline uint64_t descriptor(const void *at) {
    return (uint64_t)((shared_address(at) & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
__device__ inline void multiply(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
          "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]),
          "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]),
          "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b));
}
#endif

struct Out {
    void *at;
    int64_t cols, n, rows;   /* of the whole output; tokens; rows of the matrix, or of gate and of up each */
    bool f32, add;
};

template <bool PAIR> __global__ void __launch_bounds__(THREADS, 2)
gemm_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap first, const __grid_constant__ CUtensorMap second, Out out, int steps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    unsigned char *stages = memory + (1024 - (shared_address(memory) & 1023)) % 1024;
    constexpr int WIDTH = PAIR ? N / 2 : N;   /* columns of the output */
    const int m0 = blockIdx.x * M, n0 = blockIdx.y * WIDTH, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&full[s], 1);
            barrier_init(&empty[s], 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    launch_dependents();
    wait_for_inputs();
    if (warp == 8) {
        if (lane == 0)
            for (int step = 0; step < steps; step++) {
                const int s = step % STAGES;
                unsigned char *stage = stages + s * STAGE_BYTES;
                if (step >= STAGES) barrier_wait(&empty[s], (step / STAGES + 1) & 1);
                barrier_expect(&full[s], STAGE_BYTES);
                copy_tile(stage, &x, &full[s], step * K, m0);
                copy_tile(stage + LEFT_BYTES, &first, &full[s], step * K, n0);
                copy_tile(stage + LEFT_BYTES + HALF_BYTES, PAIR ? &second : &first, &full[s], step * K, PAIR ? n0 : n0 + N / 2);
            }
        return;
    }
    const int group = warp / 4;
    float sum[64];
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] = 0;
    for (int step = 0; step < steps; step++) {
        const int s = step % STAGES;
        const unsigned char *stage = stages + s * STAGE_BYTES;
        barrier_wait(&full[s], (step / STAGES) & 1);
        const uint64_t left = descriptor(stage + group * (LEFT_BYTES / 2)), right = descriptor(stage + LEFT_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < K / 16; k++) multiply(sum, left + 2 * k, right + 2 * k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        /* The products of the step before are done: its stage may be filled again. */
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > 0 && threadIdx.x % 128 == 0) barrier_arrive(&empty[(step - 1) % STAGES]);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : "+f"(sum[i])::"memory");
    if (PAIR)
#pragma unroll
        for (int i = 0; i < 32; i++) sum[i] = silu(sum[i]) * sum[i + 32];
    /* Register 4 j + e: row lane / 4 + 8 (e / 2), column 8 j + lane % 4 * 2 + e % 2. */
    if (out.f32) {
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) {
            const int64_t row = m0 + warp * 16 + lane / 4 + i % 4 / 2 * 8, column = n0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (row >= out.n || column >= out.rows) continue;
            float *to = static_cast<float *>(out.at) + row * out.cols + column;
            *to = out.add ? *to + sum[i] : sum[i];
        }
        return;
    }
    asm volatile("bar.sync 1, 256;" ::: "memory");   /* nobody multiplies any more: the stages are free */
    __nv_bfloat16 *rows = reinterpret_cast<__nv_bfloat16 *>(stages) + warp * 16 * PITCH;
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i += 2)
        *reinterpret_cast<__nv_bfloat162 *>(rows + (lane / 4 + i % 4 / 2 * 8) * PITCH + i / 4 * 8 + lane % 4 * 2) = __floats2bfloat162_rn(sum[i], sum[i + 1]);
    __syncwarp();
    constexpr int PIECES = WIDTH / 8;
#pragma unroll
    for (int i = 0; i < 16 * PIECES / 32; i++) {
        const int local = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
        const int64_t row = m0 + warp * 16 + local, column = n0 + piece * 8;
        if (row >= out.n || column >= out.rows) continue;
        __nv_bfloat16 *to = static_cast<__nv_bfloat16 *>(out.at) + row * out.cols + column;
        uint4 raw = *reinterpret_cast<const uint4 *>(rows + local * PITCH + piece * 8);
        const __nv_bfloat162 *mine = reinterpret_cast<const __nv_bfloat162 *>(&raw);
        const bool whole = column + 8 <= out.rows && out.cols % 8 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
        if (whole) {
            if (out.add) {
                uint4 before = *reinterpret_cast<const uint4 *>(to);
                __nv_bfloat162 *old = reinterpret_cast<__nv_bfloat162 *>(&before);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 a = __bfloat1622float2(old[j]), b = __bfloat1622float2(mine[j]);
                    old[j] = __floats2bfloat162_rn(a.x + b.x, a.y + b.y);
                }
                raw = before;
            }
            *reinterpret_cast<uint4 *>(to) = raw;
        } else {
            const __nv_bfloat16 *values = reinterpret_cast<const __nv_bfloat16 *>(&raw);
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (column + j < out.rows) to[j] = out.add ? __float2bfloat16(__bfloat162float(to[j]) + __bfloat162float(values[j])) : values[j];
        }
    }
#endif
}

/* Tiles of `box` rows by 64 columns. The driver's function is looked up, so that the library loads without a driver. */
int tile_map(CUtensorMap *map, const __nv_bfloat16 *data, int64_t rows, int64_t cols, int box) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                               CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode = nullptr;
    if (!encode) {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
        REQUIRE_SUPPORTED(found != nullptr, "the driver has no tensor maps: update it");
        encode = reinterpret_cast<Encode>(found);
    }
    const cuuint64_t sizes[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, pitch[1] = {(cuuint64_t)cols * 2};
    const cuuint32_t extent[2] = {K, (cuuint32_t)box}, one[2] = {1, 1};
    CUresult status = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16 *>(data), sizes, pitch, extent, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? TOPS_OK : tops_fail(TOPS_DEVICE_FAILED, "a tensor map of %lld x %lld was refused (%d)", (long long)rows, (long long)cols, (int)status);
}
}   // namespace

bool gemm_hopper_supports(tops_stream *stream, const void *x, const void *w, int64_t cols) {
    return stream->architecture == 90 && cols % 8 == 0 && (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(w)) % 16 == 0;
}

int gemm_hopper(tops_stream *stream, void *out, int64_t out_cols, bool out_f32, bool add, const __nv_bfloat16 *x, const __nv_bfloat16 *w, const __nv_bfloat16 *up,
                int64_t n, int64_t rows, int64_t cols) {
    CUtensorMap left, first, second;
    int status = tile_map(&left, x, n, cols, M);
    if (!status) status = tile_map(&first, w, rows, cols, N / 2);
    if (!status) status = tile_map(&second, up ? up : w, rows, cols, N / 2);
    if (status) return status;
    auto kernel = up ? gemm_kernel<true> : gemm_kernel<false>;
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    dim3 grid((unsigned)ceil_div(n, M), (unsigned)ceil_div(rows, up ? N / 2 : N));   /* blocks that run together share rows of w */
    REQUIRE(grid.y < 65536, "rows: at most 4194240 in a product, not %lld", (long long)rows);
    return launch(stream, kernel, grid, dim3(THREADS), SHARED_BYTES, 1, left, first, second, Out{out, out_cols, n, rows, out_f32, add}, (int)ceil_div(cols, K));
}
