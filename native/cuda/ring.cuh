/* Weights on their way through a warp's ring in shared memory (cp.async): tens of kilobytes for each multiprocessor are under way
 * without registers or block-wide barriers, and before a kernel's inputs are there.
 *
 * A slot holds 128 bytes of each of 8 rows: of quantised weights as it lies in memory (formats.cuh), of float ones as 8 pieces of 16 bytes whose place depends
 * on the row, so that lanes of different rows meet in different banks; behind them fp8 has its scale. */
#pragma once

#include "formats.cuh"
#include "mma.cuh"

template <> struct Slot<TOPS_BF16> {
    static constexpr int VALUES = 64, BYTES = SLOT_CODES;
};
template <> struct Slot<TOPS_FP8_E4M3> {
    static constexpr int VALUES = 128, SCALE = SLOT_CODES, BYTES = SCALE + 16;
};

static inline bool ring_supports(const tops_weight *w) {
    const int dtype = w->dtype;
    if (is_quantised(dtype)) return true;
    return dtype != TOPS_F32 && dtype != TOPS_F16 && (dtype != TOPS_FP8_E4M3 || w->scales) && w->cols * value_bytes(dtype) % 16 == 0;
}

#ifdef __CUDACC__
__device__ inline int piece_place(int row, int piece) { return row * 128 + ((piece ^ ((row & 1) << 2 | row >> 1)) << 4); }

/* Where a lane copies the next slots of 8 rows of a matrix from */
template <int D> struct Source {
    static constexpr int PIECES = Slot<D>::BYTES / 16;
    const unsigned char *from;

    __device__ void begin(const Matrix &m, int row, int chunk, int lane) {
        from = m.data + ((uint32_t)row / SLOT_ROWS * Slot<D>::across((uint32_t)m.cols) + chunk) * (uint64_t)Slot<D>::BYTES + lane * 16;
    }
    __device__ void fetch(unsigned char *slot, int own, bool there) {   /* own: bytes to the lane's first piece */
#pragma unroll
        for (int i = 0; i < PIECES; i += 32) copy_async_once_if(slot + i * 16 + own, from + i * 16, there && (i + 32 <= PIECES || own < (PIECES - i) * 16));
        from += Slot<D>::BYTES;
    }
};

/* Of float weights: columns beyond the matrix become zeros, rows beyond it the last one. */
template <int D> struct RowSource {
    static constexpr int VALUES = Slot<D>::VALUES, PIECE_VALUES = VALUES / 8;
    const unsigned char *low;
    const float *scale;
    int place;                    /* of the lane's first piece in a slot */
    int step;                     /* bytes from a row to the one four further */
    int left;                     /* columns from the lane's piece on; at most 0: there is nothing to copy */

    __device__ void begin(const Matrix &m, int row, int chunk, int lane) {
        const int rows = (int)m.rows, cols = (int)m.cols, pieces = cols / PIECE_VALUES;
        low = m.data + (uint64_t)((uint32_t)min(row + lane / 8, rows - 1) * pieces + chunk * 8 + lane % 8) * 16;   /* 64 GB */
        place = piece_place(lane / 8, lane % 8);
        step = row + lane / 8 + 4 < rows ? 64 * pieces : 0;
        left = cols - chunk * VALUES - lane % 8 * PIECE_VALUES;
        if (D == TOPS_FP8_E4M3) scale = m.fp8_scales + row / 128 * ((cols + 127) / 128) + chunk;
    }
    __device__ void fetch(unsigned char *slot, int, bool there) {
        if (!there) return;
        copy_async_once(slot + place, low, left > 0);
        copy_async_once(slot + (place ^ 32) + 512, low + step, left > 0);
        left -= VALUES;
        low += 128;
        if constexpr (D == TOPS_FP8_E4M3) {
            if (place == 0) copy_async_small<4>(slot + Slot<D>::SCALE, scale, true);   /* one lane */
            scale++;
        }
    }
};
template <> struct Source<TOPS_BF16> : RowSource<TOPS_BF16> {};
template <> struct Source<TOPS_FP8_E4M3> : RowSource<TOPS_FP8_E4M3> {};
#endif
