/* Streams, memory and copies of the CPU library: everything is done when a call returns. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include "internal.h"

static _Thread_local char last_error[512];

int tops_fail(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

int32_t tops_abi(void) { return TOPS_ABI; }
const char *tops_last_error(void) { return last_error; }

const char *tops_build(void) {
    static char text[128];
    snprintf(text, sizeof text, "cpu, %s, %s", tops_cpu->name, __VERSION__);
    return text;
}

int tops_device_count(int32_t *count) {
    *count = 1;
    return TOPS_OK;
}

int tops_device_name(int32_t device, char *name, int64_t capacity) {
    if (device != 0) return tops_fail(TOPS_NO_DEVICE, "device: the CPU library has device 0 only, not %d", device);
    snprintf(name, (size_t)capacity, "CPU");
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (file && fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon) continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(name, (size_t)capacity, "%s", colon + 2);
        break;
    }
    if (file) fclose(file);
    return TOPS_OK;
}

/* Free is what could be had without swapping, which is what MemAvailable estimates, within the control group's limit. */
int tops_memory_info(int32_t device, int64_t *free_bytes, int64_t *total_bytes) {
    if (device != 0) return tops_fail(TOPS_NO_DEVICE, "device: the CPU library has device 0 only, not %d", device);
    *total_bytes = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    *free_bytes = *total_bytes / 2;
    FILE *file = fopen("/proc/meminfo", "r");
    char line[128];
    long long kilobytes;
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "MemAvailable: %lld kB", &kilobytes) == 1) *free_bytes = kilobytes * 1024;
    }
    if (file) fclose(file);
    long long limit = 0, used = 0;
    if ((file = fopen("/sys/fs/cgroup/memory.max", "r"))) {
        if (fscanf(file, "%lld", &limit) != 1) limit = 0;
        fclose(file);
    }
    if (limit > 0 && (file = fopen("/sys/fs/cgroup/memory.current", "r"))) {
        if (fscanf(file, "%lld", &used) == 1 && limit - used < *free_bytes) *free_bytes = limit - used;
        if (limit < *total_bytes) *total_bytes = limit;
        fclose(file);
    }
    return TOPS_OK;
}

int tops_stream_create(tops_stream **stream, int32_t device, int32_t threads) {
    REQUIRE(threads >= 0 && threads <= 1024, "threads: must be in 0..1024, not %d", threads);
    if (device != 0) return tops_fail(TOPS_NO_DEVICE, "device: the CPU library has device 0 only, not %d", device);
    tops_stream *created = calloc(1, sizeof *created);
    if (!created || !(created->team = tops_team_create(threads))) {
        free(created);
        return tops_fail(TOPS_OUT_OF_MEMORY, "stream: no memory for it");
    }
    *stream = created;
    return TOPS_OK;
}

int tops_stream_destroy(tops_stream *stream) {
    if (!stream) return TOPS_OK;
    tops_team_destroy(stream->team);
    tops_free(stream, stream->scratch, stream->scratch_bytes);
    free(stream);
    return TOPS_OK;
}

int tops_stream_synchronize(tops_stream *stream) {
    (void)stream;
    return TOPS_OK;
}

/* The widest user is a linear layer: rows of f32, of 8-bit integers with their scales and sums; then attention's partial results. */
int64_t tops_scratch_bytes(int64_t n, int64_t widest, int64_t h, int64_t p) {
    return (n + TILE) * (widest + BLOCK) * 8 + (n + 64) * h * (p + 18) * 8 + widest * 16 + (1 << 20);
}

int tops_stream_reserve(tops_stream *stream, int64_t scratch_bytes) {
    if (scratch_bytes <= stream->scratch_bytes) return TOPS_OK;
    void *grown;
    int status = tops_alloc(stream, &grown, scratch_bytes);
    if (status) return status;
    tops_free(stream, stream->scratch, stream->scratch_bytes);
    stream->scratch = grown;
    stream->scratch_bytes = scratch_bytes;
    return TOPS_OK;
}

/* Large blocks come from the system at 2 MB boundaries, so that it can back them with 2 MB pages: weights are read from end to
 * end in every step, and small pages cost a third of the bandwidth in misses of the translation buffer. */
enum { LARGE = 4 << 20, HUGE_PAGE = 2 << 20 };
static int64_t mapped_bytes(int64_t bytes) { return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; }

int tops_alloc(tops_stream *stream, void **memory, int64_t bytes) {
    (void)stream;
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    *memory = NULL;
    if (bytes < LARGE) {
        size_t rounded = ((size_t)bytes + 64) / 64 * 64;
        *memory = aligned_alloc(64, rounded);
        if (*memory) memset(*memory, 0, rounded);
    }
#if defined(__linux__) || defined(__APPLE__)
    else {
        int64_t size = mapped_bytes(bytes);
        unsigned char *raw = mmap(NULL, (size_t)(size + HUGE_PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (raw != MAP_FAILED) {
            unsigned char *aligned = (unsigned char *)(((uintptr_t)raw + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
            if (aligned > raw) munmap(raw, (size_t)(aligned - raw));
            if (aligned - raw < HUGE_PAGE) munmap(aligned + size, (size_t)(HUGE_PAGE - (aligned - raw)));
#ifdef MADV_HUGEPAGE
            madvise(aligned, (size_t)size, MADV_HUGEPAGE);
#endif
            *memory = aligned;
        }
    }
#else
    else {
        *memory = aligned_alloc(64, ((size_t)bytes + 63) / 64 * 64);
        if (*memory) memset(*memory, 0, (size_t)bytes);
    }
#endif
    if (!*memory) return tops_fail(TOPS_OUT_OF_MEMORY, "the system has no %lld bytes of memory left", (long long)bytes);
    return TOPS_OK;
}

int tops_free(tops_stream *stream, void *memory, int64_t bytes) {
    (void)stream;
    if (!memory) return TOPS_OK;
#if defined(__linux__) || defined(__APPLE__)
    if (bytes >= LARGE) munmap(memory, (size_t)mapped_bytes(bytes));
    else
#endif
        free(memory);
    return TOPS_OK;
}

int tops_alloc_host(tops_stream *stream, void **memory, int64_t bytes) { return tops_alloc(stream, memory, bytes); }
int tops_free_host(tops_stream *stream, void *memory, int64_t bytes) { return tops_free(stream, memory, bytes); }

int tops_copy_in(tops_stream *stream, void *out, const void *host, int64_t bytes) {
    (void)stream;
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    if (bytes) memmove(out, host, (size_t)bytes);
    return TOPS_OK;
}

typedef struct {
    unsigned char *out;
    const void *const *hosts;
    int64_t bytes;
} pieces_job;

static void copy_piece(void *context, int64_t piece) {
    const pieces_job *job = context;
    memcpy(job->out + piece * job->bytes, job->hosts[piece], (size_t)job->bytes);
}

int tops_copy_in_pieces(tops_stream *stream, void *out, const void *const *hosts, int64_t count, int64_t bytes) {
    REQUIRE(count >= 0 && bytes >= 0, "count, bytes: must be at least 0, not %lld, %lld", (long long)count, (long long)bytes);
    pieces_job job = {out, hosts, bytes};
    if (bytes) tops_team_run(stream, count, copy_piece, &job);
    return TOPS_OK;
}

int tops_copy_out(tops_stream *stream, void *host, const void *in, int64_t bytes) { return tops_copy_in(stream, host, in, bytes); }
int tops_copy_in_async(tops_stream *stream, void *out, const void *pinned, int64_t bytes) { return tops_copy_in(stream, out, pinned, bytes); }
int tops_copy_out_async(tops_stream *stream, void *pinned, const void *in, int64_t bytes) { return tops_copy_in(stream, pinned, in, bytes); }

int tops_copy_2d(tops_stream *stream, void *out, int64_t out_pitch, const void *in, int64_t in_pitch, int64_t width, int64_t height) {
    (void)stream;
    REQUIRE(width >= 0 && height >= 0, "width, height: must be at least 0, not %lld, %lld", (long long)width, (long long)height);
    for (int64_t row = 0; width && row < height; row++)
        memmove((unsigned char *)out + row * out_pitch, (const unsigned char *)in + row * in_pitch, (size_t)width);
    return TOPS_OK;
}

int tops_zero(tops_stream *stream, void *out, int64_t bytes) {
    (void)stream;
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    if (bytes) memset(out, 0, (size_t)bytes);
    return TOPS_OK;
}

/* ---- read: every thread sums pieces of 1 MB ---- */
enum { PIECE = 1 << 20 };
typedef struct {
    const unsigned char *in;
    int64_t bytes;
    _Atomic uint32_t total_bits;
} read_job;

static void read_piece(void *context, int64_t item) {
    read_job *job = context;
    int64_t bytes = job->bytes - item * PIECE < PIECE ? job->bytes - item * PIECE : PIECE;
    float sum = tops_cpu->sum_bytes(job->in + item * PIECE, bytes), total;
    uint32_t seen = atomic_load(&job->total_bits), next;
    do {
        memcpy(&total, &seen, 4);
        total += sum;
        memcpy(&next, &total, 4);
    } while (!atomic_compare_exchange_weak(&job->total_bits, &seen, next));
}

int tops_read(tops_stream *stream, float *out, const void *in, int64_t bytes) {
    REQUIRE(bytes >= 0, "bytes: must be at least 0, not %lld", (long long)bytes);
    read_job job = {.in = in, .bytes = bytes};
    tops_team_run(stream, (bytes + PIECE - 1) / PIECE, read_piece, &job);
    uint32_t bits = atomic_load(&job.total_bits);
    memcpy(out, &bits, 4);
    return TOPS_OK;
}
