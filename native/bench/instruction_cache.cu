/* What instructions cost that run once: a graph of kernels as decoding has them (every block reads a row, norms it and writes some values), each with so many
 * straight instructions more, from one kernel again and again or from several in turn.
 *   nvcc -O3 -arch=sm_90 -o instruction_cache native/bench/instruction_cache.cu && ./instruction_cache */
#include <algorithm>
#include <cstdio>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

constexpr int BLOCKS = 132, THREADS = 512, COLS = 2560, ROWS = 20, LAUNCHES = 140, SHARED = 113 << 10;
#define CHECK(call) do { cudaError_t e_ = (call); if (e_ != cudaSuccess) { fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e_)); exit(1); } } while (0)

__device__ inline float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <int ID, int INSTRUCTIONS> __global__ void __launch_bounds__(THREADS, 1) step(const uint4 *in, __nv_bfloat16 *out, int *never) {
    extern __shared__ uint4 row[];
    __shared__ float sums[THREADS / 32];
    asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
    const int me = threadIdx.x, warp = me / 32, lane = me % 32;
    const uint4 x = me < COLS / 8 ? __ldcg(in + me) : make_uint4(0, 0, 0, 0);
    const float a = __uint_as_float(x.x << 16), b = __uint_as_float(x.w << 16), sum = warp_sum(a * a + b * b);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < THREADS / 32; w++) total += sums[w];
    total = rsqrtf(total + 1.0f);
    if (me < COLS / 8) row[me] = x;
    if (me < 128) {   /* a warp on each of the processor's four parts */
        float v[8];
        for (int k = 0; k < 8; k++) v[k] = total + k;
#pragma unroll
        for (int k = 0; k < INSTRUCTIONS; k++) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v[k % 8]) : "f"(0.5f), "f"(total));
        if (v[0] + v[1] + v[2] + v[3] + v[4] + v[5] + v[6] + v[7] == 1e30f) *never = ID;
    }
    __syncthreads();
    const float value = warp_sum(reinterpret_cast<const float *>(row)[lane * 8 + warp] * 1e-3f) + total;
    for (int r = warp; r < ROWS; r += THREADS / 32)
        if (lane == 0 && blockIdx.x * ROWS + r < COLS) out[blockIdx.x * ROWS + r] = __float2bfloat16(fabsf(value) < 1e3f ? value : 1.0f);
}

/* Microseconds a kernel, so many different ones in turn */
template <int INSTRUCTIONS> float measure(int distinct, unsigned char *rows, int *never) {
    typedef void (*Kernel)(const uint4 *, __nv_bfloat16 *, int *);
    const Kernel kernels[] = {step<0, INSTRUCTIONS>, step<1, INSTRUCTIONS>, step<2, INSTRUCTIONS>, step<3, INSTRUCTIONS>,
                              step<4, INSTRUCTIONS>, step<5, INSTRUCTIONS>, step<6, INSTRUCTIONS>, step<7, INSTRUCTIONS>};
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cudaEvent_t begin, end;
    CHECK(cudaStreamCreate(&stream));
    for (Kernel kernel : kernels) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < LAUNCHES; i++) {
        cudaLaunchAttribute dependent = {};
        dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        dependent.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = BLOCKS, config.blockDim = THREADS, config.dynamicSmemBytes = SHARED, config.stream = stream, config.attrs = &dependent, config.numAttrs = i > 0;
        CHECK(cudaLaunchKernelEx(&config, kernels[i % distinct], (const uint4 *)(rows + i % 2 * 16384), (__nv_bfloat16 *)(rows + (i + 1) % 2 * 16384), never));
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times(31);
    for (float &time : times) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(executable, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&time, begin, end));
    }
    std::nth_element(times.begin(), times.begin() + 15, times.end());
    return times[15] * 1e3f / LAUNCHES;
}

template <int INSTRUCTIONS> void show(unsigned char *rows, int *never) {
    printf("%5d instructions (%2d KB): ", INSTRUCTIONS, INSTRUCTIONS * 16 / 1024);
    for (int distinct : {1, 2, 4, 8}) printf(" %d in turn %6.2f us", distinct, measure<INSTRUCTIONS>(distinct, rows, never));
    printf("\n");
}

int main() {
    unsigned char *rows;
    int *never;
    CHECK(cudaMalloc(&rows, 2 * 16384));
    CHECK(cudaMalloc(&never, sizeof *never));
    CHECK(cudaMemset(rows, 0x11, 2 * 16384));
    show<8>(rows, never), show<256>(rows, never), show<512>(rows, never), show<1024>(rows, never), show<2048>(rows, never), show<4096>(rows, never);
}
