/* Streams, memory, copies and graphs. Nothing here needs a driver until a device is asked for. */
#include <cstdarg>
#include <cstdio>

#include "device.cuh"

static thread_local char last_error[512];

int tops_fail(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

int tops_cuda_failed(cudaError_t error, const char *what) {
    cudaGetLastError();
    switch (error) {
    case cudaErrorNoDevice: case cudaErrorInvalidDevice: case cudaErrorSystemNotReady:
        return tops_fail(TOPS_NO_DEVICE, "no such CUDA device (%s)", cudaGetErrorString(error));
    case cudaErrorInsufficientDriver: {
        int driver = 0, runtime = 0;
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        if (driver == 0) return tops_fail(TOPS_NO_DEVICE, "no NVIDIA driver is installed");
        return tops_fail(TOPS_NO_DEVICE, "the NVIDIA driver is for CUDA %d.%d and too old: this library needs %d.%d; update the driver",
                         driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    }
    case cudaErrorMemoryAllocation: return tops_fail(TOPS_OUT_OF_MEMORY, "the device has not enough free memory");
    case cudaErrorNoKernelImageForDevice:
        return tops_fail(TOPS_NO_DEVICE, "this library was not built for the architecture of the device (PIO_CUDA_ARCHS)");
    default: return tops_fail(TOPS_DEVICE_FAILED, "%s: %s", what, cudaGetErrorString(error));
    }
}

int32_t tops_abi(void) { return TOPS_ABI; }
const char *tops_last_error(void) { return last_error; }

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
const char *tops_build(void) { return "cuda " TEXT(__CUDACC_VER_MAJOR__) "." TEXT(__CUDACC_VER_MINOR__); }

int tops_device_count(int32_t *count) {
    int found = 0;
    CUDA(cudaGetDeviceCount(&found));
    *count = found;
    return TOPS_OK;
}

int tops_device_name(int32_t device, char *name, int64_t capacity) {
    cudaDeviceProp properties;
    CUDA(cudaGetDeviceProperties(&properties, device));
    snprintf(name, (size_t)capacity, "%s", properties.name);
    return TOPS_OK;
}

int tops_memory_info(int32_t device, int64_t *free_bytes, int64_t *total_bytes) {
    size_t available, total;
    CUDA(cudaSetDevice(device));
    CUDA(cudaMemGetInfo(&available, &total));
    *free_bytes = (int64_t)available;
    *total_bytes = (int64_t)total;
    return TOPS_OK;
}

int tops_stream_create(tops_stream **stream, int32_t device, int32_t threads) {
    (void)threads;
    CUDA(cudaSetDevice(device));
    tops_stream *created = new tops_stream();
    created->device = device;
    cudaError_t error = cudaDeviceGetAttribute(&created->multiprocessors, cudaDevAttrMultiProcessorCount, device);
    int major = 0, minor = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    created->architecture = 10 * major + minor;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&created->shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&created->cuda, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMalloc(&created->handover, HANDOVER_BYTES);
    if (error == cudaSuccess) error = cudaMemsetAsync(created->handover, 0xff, HANDOVER_BYTES, created->cuda);
    int status = error == cudaSuccess ? tops_carrier_create(&created->carrier) : tops_cuda_failed(error, "creating a stream");
    if (status) {
        cudaFree(created->handover);
        if (created->cuda) cudaStreamDestroy(created->cuda);
        delete created;
        return status;
    }
    *stream = created;
    return TOPS_OK;
}

int tops_stream_destroy(tops_stream *stream) {
    if (!stream) return TOPS_OK;
    cudaStreamSynchronize(stream->cuda);
    cudaFree(stream->scratch);
    cudaFree(stream->handover);
    tops_carrier_destroy(stream->carrier);
    cudaStreamDestroy(stream->cuda);
    delete stream;
    cudaGetLastError();
    return TOPS_OK;
}

int tops_stream_synchronize(tops_stream *stream) {
    CUDA(cudaStreamSynchronize(stream->cuda));
    CUDA(cudaGetLastError());
    return TOPS_OK;
}

/* The largest users: rows of activations prepared in two forms, a weight decoded to bf16 for a long prompt, partial attention. */
int64_t tops_scratch_bytes(int64_t n, int64_t widest, int64_t h, int64_t p) {
    return n * widest * 16 + (n < 64 ? 64 * n : n + 4096) * h * (p + 2) * 4 + (n > 16 ? 2 * widest * 8192 * 2 : 0) + (8 << 20);
}

int tops_stream_reserve(tops_stream *stream, int64_t scratch_bytes) {
    if (scratch_bytes <= stream->scratch_bytes) return TOPS_OK;
    CUDA(cudaSetDevice(stream->device));
    CUDA(cudaStreamSynchronize(stream->cuda));
    void *grown;
    CUDA(cudaMalloc(&grown, (size_t)scratch_bytes));
    cudaFree(stream->scratch);
    stream->scratch = static_cast<unsigned char *>(grown);
    stream->scratch_bytes = scratch_bytes;
    return TOPS_OK;
}

int tops_alloc(tops_stream *stream, void **memory, int64_t bytes) {
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    CUDA(cudaSetDevice(stream->device));
    CUDA(cudaMalloc(memory, bytes ? (size_t)bytes : 1));
    CUDA(cudaMemsetAsync(*memory, 0, (size_t)bytes, stream->cuda));
    return TOPS_OK;
}

int tops_free(tops_stream *stream, void *memory, int64_t bytes) {
    (void)bytes;
    CUDA(cudaStreamSynchronize(stream->cuda));
    CUDA(cudaFree(memory));
    return TOPS_OK;
}

int tops_zero(tops_stream *stream, void *out, int64_t bytes) {
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    if (bytes) CUDA(cudaMemsetAsync(out, 0, (size_t)bytes, stream->cuda));
    return TOPS_OK;
}

__global__ void read_all(float *out, const uint4 *in, int64_t count, const unsigned char *tail, int rest) {
    wait_for_inputs();
    uint32_t sum = 0;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        uint4 v = __ldcs(in + i);
        sum += v.x + v.y + v.z + v.w;
    }
    if (blockIdx.x == 0 && (int)threadIdx.x < rest) sum += tail[threadIdx.x];
    float total = block_sum((float)sum);
    if (threadIdx.x == 0) atomicAdd(out, total);
}

int tops_read(tops_stream *stream, float *out, const void *in, int64_t bytes) {
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    CUDA(cudaMemsetAsync(out, 0, sizeof(float), stream->cuda));
    int64_t vectors = bytes / 16;
    return launch(stream, read_all, dim3(132 * 8), dim3(512), 0, 1, out, static_cast<const uint4 *>(in), vectors,
                  static_cast<const unsigned char *>(in) + vectors * 16, (int)(bytes % 16));
}

/* ---- graphs ---- */
struct tops_graph { cudaGraphExec_t native; };

int tops_graph_begin(tops_stream *stream) {
    CUDA(cudaStreamBeginCapture(stream->cuda, cudaStreamCaptureModeThreadLocal));
    return TOPS_OK;
}

int tops_graph_end(tops_stream *stream, tops_graph **graph) {
    cudaGraph_t captured;
    CUDA(cudaStreamEndCapture(stream->cuda, &captured));
    cudaGraphExec_t native;
    cudaError_t error = cudaGraphInstantiate(&native, captured, 0);
    cudaGraphDestroy(captured);
    if (error != cudaSuccess) return tops_cuda_failed(error, "building a graph");
    *graph = new tops_graph{native};
    return TOPS_OK;
}

int tops_graph_launch(tops_stream *stream, tops_graph *graph) {
    CUDA(cudaGraphLaunch(graph->native, stream->cuda));
    return TOPS_OK;
}

int tops_graph_free(tops_stream *stream, tops_graph *graph) {
    (void)stream;
    CUDA(cudaGraphExecDestroy(graph->native));
    delete graph;
    return TOPS_OK;
}
