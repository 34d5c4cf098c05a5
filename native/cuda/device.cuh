/* What the files of the CUDA library share: the stream, errors, launches, and small device functions. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "tensor_ops.h"

struct tops_stream {
    int device, multiprocessors, architecture;   /* 90: compute capability 9.0 */
    int shared_most;            /* bytes of shared memory that a block may ask for */
    cudaStream_t cuda;
    unsigned char *scratch;
    int64_t scratch_bytes;
    struct tops_carrier *carrier;   /* of copies from the host's memory (copies.cu) */
    bool alone;                 /* no two blocks of the last kernel fit on a processor (gemv_stream.cuh) */
    void *handover;             /* HANDOVER_BYTES of ones: what blocks of a kernel hand each other; who takes it leaves ones behind */
};

enum { HANDOVER_BYTES = 4 << 20 };

int tops_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
int tops_cuda_failed(cudaError_t error, const char *what);
int tops_carrier_create(struct tops_carrier **carrier);
void tops_carrier_destroy(struct tops_carrier *carrier);

#define REQUIRE(condition, ...) do { if (!(condition)) return tops_fail(TOPS_INVALID, __VA_ARGS__); } while (0)
#define REQUIRE_SUPPORTED(condition, ...) do { if (!(condition)) return tops_fail(TOPS_UNSUPPORTED, __VA_ARGS__); } while (0)
#define CUDA(call) do { cudaError_t error_ = (call); if (error_ != cudaSuccess) return tops_cuda_failed(error_, #call); } while (0)

static inline int64_t storage_bytes(int dtype) { return dtype == TOPS_F32 ? 4 : 2; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A cursor through the stream's scratch. */
struct Scratch {
    unsigned char *next, *end;
    explicit Scratch(tops_stream *stream) : next(stream->scratch), end(stream->scratch + stream->scratch_bytes) {}
    template <typename T> T *take(int64_t count) {
        int64_t bytes = (count * (int64_t)sizeof(T) + 255) & ~(int64_t)255;
        if (end - next < bytes) return nullptr;
        T *memory = reinterpret_cast<T *>(next);
        next += bytes;
        return memory;
    }
};
#define REQUIRE_SCRATCH(pointer) \
    REQUIRE((pointer) != nullptr, "scratch: reserve more (tops_stream_reserve), %lld bytes are too few", (long long)stream->scratch_bytes)

/* Launch with programmatic dependent launch: the kernel may begin while the one before still runs, and must call wait_for_inputs
 * before it reads what that one writes. */
template <typename... P, typename... A>
int launch(tops_stream *stream, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, int cluster, A... arguments) {
    CUDA(cudaSetDevice(stream->device));   /* of the calling thread, which may not be the one that made the stream */
    /* All kernels split a multiprocessor's memory alike: one that did not would wait until it is empty. */
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    cudaLaunchAttribute attributes[2] = {};
    int count = 0;
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = (unsigned)cluster;
        attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
        count++;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream->cuda;
    config.attrs = attributes;
    config.numAttrs = (unsigned)count;
    CUDA(cudaLaunchKernelEx(&config, kernel, P(arguments)...));
    stream->alone = false;
    return TOPS_OK;
}

#ifdef __CUDACC__
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half(x); }

/* e4m3: moved to the place of f16's fields it is 256 times too small. */
__device__ inline float fp8_to_float(uint8_t b) {
    if ((b & 0x7f) == 0x7f) return nanf("");
    uint16_t bits = (uint16_t)((b & 0x80) << 8 | (b & 0x7f) << 7);
    return __half2float(__ushort_as_half(bits)) * 256.0f;
}

/* a / b for 0 <= a < 2^21, a shorter way than that of integers: what floats find is at most one off */
__device__ inline int divide(int a, int b) {
    const int about = (int)__fdividef((float)a, (float)b);
    return about - (about * b > a) + (about * b + b <= a);
}
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ inline float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}
/* Sum over four lanes that stand together */
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}
/* Sum over the block, known to all its threads. */
__device__ inline float block_sum(float x) {
    __shared__ float sums[32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (unsigned w = 0; w < (blockDim.x + 31) / 32; w++) total += sums[w];
    return total;
}
__device__ inline float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ inline float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ inline void add_scaled(float4 &a, float s, float4 b) {
    a.x += s * b.x;
    a.y += s * b.y;
    a.z += s * b.z;
    a.w += s * b.w;
}
__device__ inline float4 shuffle_xor(float4 a, int step) {
    return make_float4(__shfl_xor_sync(0xffffffff, a.x, step), __shfl_xor_sync(0xffffffff, a.y, step), __shfl_xor_sync(0xffffffff, a.z, step),
                       __shfl_xor_sync(0xffffffff, a.w, step));
}
#endif

/* Call body with T as the storage type of activations. */
#define BY_STORAGE(dtype, ...) \
    do { \
        REQUIRE((dtype) == TOPS_F32 || (dtype) == TOPS_BF16, "dtype: must be f32 or bf16, not %d", (int)(dtype)); \
        if ((dtype) == TOPS_F32) { using T = float; __VA_ARGS__; } else { using T = __nv_bfloat16; __VA_ARGS__; } \
    } while (0)
