/* What the two files of the gated delta rule share. */
#pragma once
#include "../cuda/device.cuh"
#include "../cuda/storage.cuh"

enum { TAPS = 4, DECODE_ROWS = 16 };    /* of the kernels for one shape: taps of the convolution; rows of a step that take them one by one */

template <typename T>
struct delta_arguments {
    T *out;
    const T *x;
    const float *conv, *decay, *dt_bias, *norm;
    tops_states states;
    const int32_t *query_starts, *sequences, *states_in, *states_out;
    int64_t n, b, channels, width;      /* channels of the convolution; of a row of x */
    float eps;

    /* Channel i of key head j's own [q | k | v of its value heads] */
    __device__ int64_t channel(int j, int i) const {
        if (i < 2 * states.pk) return ((int64_t)(i >= states.pk) * states.hk + j) * states.pk + i % states.pk;
        return 2 * states.hk * states.pk + (int64_t)j * (states.hv / states.hk) * states.pv + i - 2 * states.pk;
    }
};

/* ---- chunks: gated_delta_chunks.cu computes what lies within them, gated_delta_scan.cu goes from one to the next ---- */
enum { HEAD = 128, CHUNK = 64, COLUMNS = 32, SPLIT = HEAD / COLUMNS };   /* heads of 128; a block of the scan takes 32 columns of S */
enum { WIDE = HEAD + 8, NARROW = CHUNK + 8, SLIM = COLUMNS + 8 };        /* rows of tiles, padded against bank conflicts */

/* q, k [n, hk, 128] and v [n, hv, 128] after the convolution; U, then the output take v's place. p [n, hv, 64], the rest [n, hv]. */
struct chunk_scratch {
    bf16 *q, *k, *v, *w, *p;
    float *c, *beta;
};

int delta_within_chunks(tops_stream *stream, const delta_arguments<bf16> &a, const chunk_scratch &scratch);
int delta_across_chunks(tops_stream *stream, const delta_arguments<bf16> &a, const chunk_scratch &scratch);

/* The rows of chunk `index` of the step: those of a sequence are cut from its first row on. False: there is no such chunk. */
__device__ inline bool find_chunk(const delta_arguments<bf16> &a, int index, int *row, int *count) {
    for (int sequence = 0; sequence < a.b; sequence++) {
        int start = a.query_starts[sequence], end = a.query_starts[sequence + 1], chunks = (end - start + CHUNK - 1) / CHUNK;
        if (index < chunks) {
            *row = start + index * CHUNK;
            *count = min(CHUNK, end - *row);
            return true;
        }
        index -= chunks;
    }
    return false;
}

/* tile[r][..] = rows of `length` values, pitch apart, zeros from row count on; 16 bytes at a time */
__device__ inline void load_tile(bf16 *tile, int wide, const bf16 *in, int64_t pitch, int length, int count, int me, int threads) {
    int per_row = length / 8;
    for (int i = me; i < CHUNK * per_row; i += threads) {
        int r = i / per_row, at = i % per_row * 8;
        copy_async(tile + r * wide + at, r < count ? in + r * pitch + at : in, r < count);
    }
}

__device__ inline void store_tile(bf16 *out, int64_t pitch, const bf16 *tile, int wide, int length, int count, int me, int threads) {
    int per_row = length / 8;
    for (int i = me; i < count * per_row; i += threads)
        *(uint4 *)(out + i / per_row * pitch + i % per_row * 8) = *(const uint4 *)(tile + i / per_row * wide + i % per_row * 8);
}
