/* Copies between the host's memory and the device's.
 *
 * The device fetches from pinned memory only. What lies elsewhere is first copied into slots of it, each of which may be filled again
 * when its last content has arrived: a small copy goes on where the one before ended, the many bytes of a checkpoint's file are carried
 * by several threads, each with two slots of its own. One thread reads 7 to 10 GB/s from mapped pages that it sees for the first time; the
 * link to an H100 takes about 50. */
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "device.cuh"

static const int64_t SLOT = 2 << 20;
enum { CARRIERS = 4, SLOTS = 2 + 2 * CARRIERS };   /* the first two are for small copies */

struct tops_carrier {
    unsigned char *memory;      /* [SLOTS][SLOT] pinned */
    cudaEvent_t arrived[SLOTS];
    int current;                /* slot of small copies */
    int64_t used;               /* bytes of it */
    unsigned char *slot(int index) { return memory + index * SLOT; }
};

int tops_carrier_create(tops_carrier **carrier) {
    tops_carrier *created = new tops_carrier();
    cudaError_t error = cudaMallocHost(reinterpret_cast<void **>(&created->memory), (size_t)(SLOTS * SLOT));
    for (int i = 0; i < SLOTS && error == cudaSuccess; i++) error = cudaEventCreateWithFlags(&created->arrived[i], cudaEventDisableTiming);
    if (error != cudaSuccess) {
        tops_carrier_destroy(created);
        return tops_cuda_failed(error, "pinned memory for copies");
    }
    *carrier = created;
    return TOPS_OK;
}

void tops_carrier_destroy(tops_carrier *carrier) {
    for (cudaEvent_t event : carrier->arrived)
        if (event) cudaEventDestroy(event);
    if (carrier->memory) cudaFreeHost(carrier->memory);
    delete carrier;
}

static int copy_small(tops_stream *stream, void *out, const void *host, int64_t bytes) {
    tops_carrier *carrier = stream->carrier;
    if (carrier->used + bytes > SLOT) {
        CUDA(cudaEventRecord(carrier->arrived[carrier->current], stream->cuda));
        carrier->current = !carrier->current;
        carrier->used = 0;
        CUDA(cudaEventSynchronize(carrier->arrived[carrier->current]));
    }
    unsigned char *pinned = carrier->slot(carrier->current) + carrier->used;
    memcpy(pinned, host, (size_t)bytes);
    CUDA(cudaMemcpyAsync(out, pinned, (size_t)bytes, cudaMemcpyHostToDevice, stream->cuda));
    carrier->used += (bytes + 255) / 256 * 256;
    return TOPS_OK;
}

struct cargo {
    tops_stream *stream;
    unsigned char *out;
    const void *const *hosts;   /* [count] pieces of `bytes`, which follow each other in out */
    int64_t count, bytes;
    std::atomic<int64_t> next;  /* byte of out that nobody carries yet */
    std::atomic<int> error;
};

static void gather(unsigned char *to, const cargo &all, int64_t first, int64_t size) {
    while (size > 0) {
        int64_t piece = first / all.bytes, at = first % all.bytes, part = size < all.bytes - at ? size : all.bytes - at;
        memcpy(to, static_cast<const unsigned char *>(all.hosts[piece]) + at, (size_t)part);
        to += part;
        first += part;
        size -= part;
    }
}

static void carry(cargo *all, int index) {
    tops_stream *stream = all->stream;
    tops_carrier *carrier = stream->carrier;
    int64_t total = all->count * all->bytes;
    cudaError_t error = cudaSetDevice(stream->device);
    for (int turn = 0; error == cudaSuccess; turn = !turn) {
        int64_t first = all->next.fetch_add(SLOT), size = total - first < SLOT ? total - first : SLOT;
        if (size <= 0) return;
        int slot = 2 + 2 * index + turn;
        error = cudaEventSynchronize(carrier->arrived[slot]);
        if (error != cudaSuccess) break;
        gather(carrier->slot(slot), *all, first, size);
        error = cudaMemcpyAsync(all->out + first, carrier->slot(slot), (size_t)size, cudaMemcpyHostToDevice, stream->cuda);
        if (error == cudaSuccess) error = cudaEventRecord(carrier->arrived[slot], stream->cuda);
    }
    all->error = error;
    all->next = total;   /* nobody else need begin */
}

int tops_copy_in_pieces(tops_stream *stream, void *out, const void *const *hosts, int64_t count, int64_t bytes) {
    REQUIRE(count >= 0 && bytes >= 0, "count, bytes: must be at least 0, not %lld, %lld", (long long)count, (long long)bytes);
    if (count == 0 || bytes == 0) return TOPS_OK;
    cargo all = {stream, static_cast<unsigned char *>(out), hosts, count, bytes, {0}, {cudaSuccess}};
    std::vector<std::thread> others;
    for (int index = 1; index < CARRIERS && index < ceil_div(count * bytes, SLOT); index++) {
        try {
            others.emplace_back(carry, &all, index);
        } catch (const std::system_error &) {
            break;   /* no more threads to be had: fewer carry it all */
        }
    }
    carry(&all, 0);
    for (std::thread &other : others) other.join();
    CUDA(static_cast<cudaError_t>(all.error.load()));
    return TOPS_OK;
}

int tops_copy_in(tops_stream *stream, void *out, const void *host, int64_t bytes) {
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    return bytes <= SLOT / 2 ? copy_small(stream, out, host, bytes) : tops_copy_in_pieces(stream, out, &host, 1, bytes);
}

int tops_alloc_host(tops_stream *stream, void **memory, int64_t bytes) {
    CUDA(cudaSetDevice(stream->device));
    CUDA(cudaMallocHost(memory, bytes ? (size_t)bytes : 1));
    return TOPS_OK;
}

int tops_free_host(tops_stream *stream, void *memory, int64_t bytes) {
    (void)bytes;
    CUDA(cudaStreamSynchronize(stream->cuda));
    CUDA(cudaFreeHost(memory));
    return TOPS_OK;
}

int tops_copy_out(tops_stream *stream, void *host, const void *in, int64_t bytes) {
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    CUDA(cudaMemcpyAsync(host, in, (size_t)bytes, cudaMemcpyDeviceToHost, stream->cuda));
    return tops_stream_synchronize(stream);
}

int tops_copy_in_async(tops_stream *stream, void *out, const void *pinned, int64_t bytes) {
    CUDA(cudaMemcpyAsync(out, pinned, (size_t)bytes, cudaMemcpyHostToDevice, stream->cuda));
    return TOPS_OK;
}

int tops_copy_out_async(tops_stream *stream, void *pinned, const void *in, int64_t bytes) {
    CUDA(cudaMemcpyAsync(pinned, in, (size_t)bytes, cudaMemcpyDeviceToHost, stream->cuda));
    return TOPS_OK;
}

__global__ void copy_pieces(unsigned char *out, int64_t out_pitch, const unsigned char *in, int64_t in_pitch, int64_t width) {
    wait_for_inputs();
    out += blockIdx.y * out_pitch;
    in += blockIdx.y * in_pitch;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < width; i += (int64_t)gridDim.x * blockDim.x) out[i] = in[i];
}
__global__ void copy_vectors(uint4 *out, int64_t out_pitch, const uint4 *in, int64_t in_pitch, int64_t width) {
    wait_for_inputs();
    out += blockIdx.y * out_pitch;
    in += blockIdx.y * in_pitch;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < width; i += (int64_t)gridDim.x * blockDim.x) out[i] = in[i];
}

int tops_copy_2d(tops_stream *stream, void *out, int64_t out_pitch, const void *in, int64_t in_pitch, int64_t width, int64_t height) {
    REQUIRE(width >= 0 && height >= 0, "width, height: must be at least 0, not %lld, %lld", (long long)width, (long long)height);
    if (width == 0 || height == 0) return TOPS_OK;
    REQUIRE_SUPPORTED(height < 65536, "height: at most 65535 pieces, not %lld", (long long)height);
    int64_t all = (int64_t)((uintptr_t)out | (uintptr_t)in) | out_pitch | in_pitch | width;
    if (all % 16 == 0)
        return launch(stream, copy_vectors, dim3((unsigned)min(ceil_div(width / 16, 256), (int64_t)64), (unsigned)height), dim3(256), 0, 1,
                      static_cast<uint4 *>(out), out_pitch / 16, static_cast<const uint4 *>(in), in_pitch / 16, width / 16);
    return launch(stream, copy_pieces, dim3((unsigned)min(ceil_div(width, 256), (int64_t)1024), (unsigned)height), dim3(256), 0, 1,
                  static_cast<unsigned char *>(out), out_pitch, static_cast<const unsigned char *>(in), in_pitch, width);
}
