/* Activations in bf16: four at a time, by the type of their storage, and launches with much shared memory. */
#pragma once
#include "device.cuh"
#include "mma.cuh"

typedef __nv_bfloat16 bf16;

__device__ inline float4 load4(const bf16 *x) {
    uint2 raw = *(const uint2 *)x;
    float2 low = __bfloat1622float2(*(__nv_bfloat162 *)&raw.x), high = __bfloat1622float2(*(__nv_bfloat162 *)&raw.y);
    return make_float4(low.x, low.y, high.x, high.y);
}
__device__ inline void store4(bf16 *x, float4 v) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
    *(uint2 *)x = *(uint2 *)pair;
}

/* f(T()) with T the storage of activations */
template <typename Function> static int with_storage(int32_t dtype, Function f) {
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    return dtype == TOPS_F32 ? f(float()) : f(bf16());
}

/* launch() of a kernel that may want more shared memory than every kernel may have: 48 KB, of which what it declares takes a part */
template <typename... P, typename... A>
static int launch_wide(tops_stream *stream, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
    CUDA(cudaSetDevice(stream->device));
    if (shared > 32 << 10) CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    return launch(stream, kernel, grid, block, shared, 1, arguments...);
}
