/* Weights on their way through a warp's ring in shared memory (cp.async): tens of kilobytes for each multiprocessor are under way
 * without registers or block-wide barriers, and before a kernel's inputs are there.
 *
 * A slot holds 128 bytes of each of 8 rows, as 8 pieces of 16 bytes whose place depends on the row, so that lanes of different rows meet in
 * different banks; then what turns those into numbers, row by row:
 *   low | high, higher u32 by block (5 and 6 bits) | scales by block (fp8: f32 by 128 columns) | supers by 256 columns */
#pragma once

#include "formats.cuh"
#include "mma.cuh"

enum { STREAM_ROWS = 8 };

template <int D> struct Slot {
    static constexpr bool QUANTISED = is_quantised(D);
    static constexpr int VALUES = !QUANTISED ? 128 / value_bytes(D) : D == TOPS_Q8_0 ? 128 : 256;   /* columns */
    static constexpr int BLOCKS = VALUES / 32;
    static constexpr int HIGH_PLANES = code_bits(D) == 8 ? 0 : code_bits(D) - 4;
    static constexpr int SCALE_ROW = D == TOPS_FP8_E4M3 ? 4 : QUANTISED ? BLOCKS * scale_bytes(D) : 0;   /* bytes of a row's scales */
    static constexpr int SUPER_ROW = QUANTISED && is_super(D) ? 4 : 0;
    static constexpr int HIGH = 128 * STREAM_ROWS, SCALES = HIGH + (QUANTISED ? HIGH_PLANES * 4 * BLOCKS * STREAM_ROWS : 0);
    static constexpr int SUPERS = SCALES + SCALE_ROW * STREAM_ROWS;
    static constexpr int BYTES = SUPERS + SUPER_ROW * STREAM_ROWS;
};

/* Copies are of 4 or 16 bytes, so a row's scales must begin at a multiple of 4. */
static inline bool ring_supports(const tops_weight *w) {
    int dtype = w->dtype;
    if (dtype == TOPS_F32 || dtype == TOPS_F16 || (dtype == TOPS_FP8_E4M3 && !w->scales)) return false;
    if (!is_quantised(dtype)) return w->cols * value_bytes(dtype) % 16 == 0;
    return w->cols % (dtype == TOPS_Q6_K ? 512 : is_super(dtype) ? 256 : 64) == 0;
}

#ifdef __CUDACC__
__device__ inline int piece_place(int row, int piece) { return row * 128 + ((piece ^ ((row & 1) << 2 | row >> 1)) << 4); }

/* Where a lane copies the next slots of 8 rows of a matrix from; columns beyond the matrix become zeros, rows beyond it the last one. */
template <int D> struct Source {
    typedef Slot<D> S;
    static constexpr int PIECE_VALUES = S::VALUES / 8, SCALE_WORDS = S::SCALE_ROW / 4, SCALE_COPIES = (SCALE_WORDS * STREAM_ROWS + 31) / 32;
    const unsigned char *low, *scales, *supers;
    const uint32_t *high, *higher;
    int low_step;                 /* bytes from a row to the one four further */
    int left, scales_left, supers_left;   /* columns from the lane's piece on, from its scales on; at most 0: there is nothing to copy */
    int scales_step;

    __device__ void begin(const Matrix &m, int row, int chunk, int lane) {
        const int rows = (int)m.rows, cols = (int)m.cols, columns = cols - chunk * S::VALUES, pieces = cols / PIECE_VALUES;
        const uint32_t place = (uint32_t)min(row + lane / 8, rows - 1) * pieces + chunk * 8 + lane % 8;   /* 64 GB */
        low = m.low + (uint64_t)place * 16;
        low_step = row + lane / 8 + 4 < rows ? 64 * pieces : 0;
        left = columns - lane % 8 * PIECE_VALUES;
        if (S::QUANTISED && S::HIGH_PLANES) high = m.high + place;
        if (S::QUANTISED && S::HIGH_PLANES > 1) higher = m.higher + place;
        if constexpr (SCALE_COPIES > 0) {   /* a lane's word; of two, the second lies 32 / SCALE_WORDS rows further down */
            const int scale_row = min(lane / SCALE_WORDS, (int)STREAM_ROWS - 1), word = lane % SCALE_WORDS;
            const uint32_t from = min(row + scale_row, rows - 1);
            if (D == TOPS_FP8_E4M3) scales = reinterpret_cast<const unsigned char *>(m.fp8_scales + from / 128 * ((cols + 127) / 128) + chunk);
            else scales = static_cast<const unsigned char *>(m.scales) + (uint64_t)(from * (cols / 32) + chunk * S::BLOCKS) * scale_bytes(D) + word * 4;
            scales_left = columns - (D == TOPS_FP8_E4M3 ? 0 : word * 128 / scale_bytes(D));
            scales_step = row + scale_row + 4 < rows ? cols / 32 * scale_bytes(D) * 4 : 0;
        }
        if (S::SUPER_ROW) {   /* Q6_K has two bytes: the word that holds them is copied, in which odd slots' stand above */
            const uint32_t super = (uint32_t)min(row + lane % 8, rows - 1) * (cols / 256) + chunk;
            supers = static_cast<const unsigned char *>(m.supers) + ((uint64_t)super * super_scale_bytes(D) & ~(uint64_t)3);
            supers_left = columns;
        }
    }
    __device__ void fetch(unsigned char *slot, int place, int chunk, int lane) {   /* place: of the lane's first piece */
#pragma unroll
        for (int i = 0; i < 2; i++) {
            copy_async(slot + (i ? (place ^ 32) + 512 : place), low + i * low_step, left > 0);
            if (S::QUANTISED && S::HIGH_PLANES) copy_async_small<4>(slot + S::HIGH + (lane + 32 * i) * 4, high + i * (low_step / 16), left > 0);
            if (S::QUANTISED && S::HIGH_PLANES > 1) copy_async_small<4>(slot + S::HIGH + (64 + lane + 32 * i) * 4, higher + i * (low_step / 16), left > 0);
        }
        left -= S::VALUES;
        low += 128;
        high += 8;
        higher += 8;
        if constexpr (SCALE_COPIES > 0) {
            if (SCALE_COPIES * 32 == SCALE_WORDS * STREAM_ROWS || lane < SCALE_WORDS * STREAM_ROWS) copy_async_small<4>(slot + S::SCALES + lane * 4, scales, scales_left > 0);
            if (SCALE_COPIES > 1) copy_async_small<4>(slot + S::SCALES + (lane + 32) * 4, scales + scales_step, scales_left > 0);
            scales += S::SCALE_ROW;
            scales_left -= S::VALUES;
        }
        if (S::SUPER_ROW) {
            if (lane < STREAM_ROWS) copy_async_small<4>(slot + S::SUPERS + lane * 4, supers, supers_left > 0);
            supers_left -= S::VALUES;
            supers += D == TOPS_Q6_K ? chunk % 2 * 4 : 4;
        }
    }
};
#endif
