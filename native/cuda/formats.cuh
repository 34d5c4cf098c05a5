/* Packed weights on the GPU. Float formats stay as files hold them, [rows, cols]. Quantised ones are cut into slots of 8 rows by 256 columns (Q8_0: 128), a row
 * of slots after the other, in which a warp's lane 4 r + q finds side by side what it gives to tensor cores for row r; b counts a slot's blocks of 32 columns:
 *   codes    uint4 [2][lane], eight words. Word b: byte k has column 4 q + k of block b in its low half, and in its high half the column 16 further;
 *            Q8_0: words 2 b and 2 b + 1 have both as signed bytes
 *   high     uint2 [lane] for each bit above the fourth: bit 4 b + k of its words belongs to those two columns
 *   scales   [row][place of the block, of which a lane's are neighbours]: Q4_0, Q5_0, Q8_0 half d; Q4_1, Q5_1 half2 (d, m); Q4_K, Q5_K uchar2 (sc, m);
 *            Q6_K char2 (its halves' sc)
 *   supers   [row]: Q4_K, Q5_K half2 (d, dmin); Q6_K half d
 * Rows and columns beyond the matrix are zeros. Nothing is rounded: scale = d sc, minimum = -dmin m are formed in f32 when they are used.
 */
#pragma once

#include "device.cuh"

struct Matrix {
    const unsigned char *data;
    const float *fp8_scales;
    int64_t rows, cols;
};

__host__ __device__ constexpr bool is_quantised(int dtype) { return dtype != TOPS_F32 && dtype != TOPS_F16 && dtype != TOPS_BF16 && dtype != TOPS_FP8_E4M3; }
__host__ __device__ constexpr bool is_super(int dtype) { return dtype == TOPS_Q4_K || dtype == TOPS_Q5_K || dtype == TOPS_Q6_K; }
__host__ __device__ constexpr int code_bits(int dtype) {
    return dtype == TOPS_Q8_0 ? 8 : dtype == TOPS_Q6_K ? 6 : dtype == TOPS_Q5_0 || dtype == TOPS_Q5_1 || dtype == TOPS_Q5_K ? 5 : 4;
}
__host__ __device__ constexpr int scale_bytes(int dtype) { return dtype == TOPS_Q4_1 || dtype == TOPS_Q5_1 ? 4 : 2; }
__host__ __device__ constexpr int super_scale_bytes(int dtype) { return !is_super(dtype) ? 0 : dtype == TOPS_Q6_K ? 2 : 4; }
__host__ __device__ constexpr int value_bytes(int dtype) { return dtype == TOPS_F32 ? 4 : dtype == TOPS_FP8_E4M3 ? 1 : 2; }

enum { SLOT_ROWS = 8, SLOT_CODES = 128 * SLOT_ROWS };   /* bytes of codes in a slot */
template <int D> struct Slot {
    static constexpr int VALUES = D == TOPS_Q8_0 ? 128 : 256, BLOCKS = VALUES / 32;   /* of a row */
    static constexpr int PLANES = code_bits(D) == 8 ? 0 : code_bits(D) - 4;           /* of bits above the fourth */
    static constexpr int OWN = BLOCKS / 4;   /* blocks whose scales a lane needs: its first, and those 2 further */
    static constexpr int HIGH = SLOT_CODES, SCALES = HIGH + PLANES * 256, SUPERS = SCALES + SLOT_ROWS * BLOCKS * scale_bytes(D);
    static constexpr int BYTES = SUPERS + SLOT_ROWS * super_scale_bytes(D);
    static_assert(BYTES % 16 == 0, "slots are copied in pieces of 16 bytes");

    /* Of a block's scale in its row, so that a lane's are neighbours */
    __host__ __device__ static constexpr int place(int block) { return (block % 2 + block / (BLOCKS / 2) * 2) * OWN + block % (BLOCKS / 2) / 2; }
    template <typename N> __host__ __device__ static N across(N cols) { return (cols + VALUES - 1) / VALUES; }
};

static inline bool format_known(int dtype) {
    switch (dtype) {
    case TOPS_F32: case TOPS_F16: case TOPS_BF16: case TOPS_FP8_E4M3: case TOPS_Q4_0: case TOPS_Q4_1: case TOPS_Q5_0: case TOPS_Q5_1:
    case TOPS_Q8_0: case TOPS_Q4_K: case TOPS_Q5_K: case TOPS_Q6_K: return true;
    default: return false;
    }
}

static inline Matrix matrix_of(const tops_weight *w) { return Matrix{static_cast<const unsigned char *>(w->data), w->scales, w->rows, w->cols}; }

/* The slot that has a block of 32 columns of a row, of which it is block % BLOCKS of row % SLOT_ROWS */
template <int D> __host__ __device__ inline const unsigned char *slot_of(const Matrix &w, int64_t row, int block) {
    return w.data + (row / SLOT_ROWS * Slot<D>::across(w.cols) + block / Slot<D>::BLOCKS) * Slot<D>::BYTES;
}

#ifdef __CUDACC__
/* Scale and minimum of columns 16 half .. of a block, from what stands for the block and for its row of the slot */
template <int D> __device__ inline float2 affine_of(uint32_t scale, uint32_t super, int half) {
    if (scale_bytes(D) == 4) return __half22float2(*reinterpret_cast<const __half2 *>(&scale));
    if (!is_super(D)) return make_float2(__half2float(__ushort_as_half((unsigned short)scale)), 0.0f);
    const float2 d = __half22float2(*reinterpret_cast<const __half2 *>(&super));
    if (D == TOPS_Q6_K) return make_float2(d.x * (float)(int8_t)(half ? scale >> 8 : scale), 0.0f);
    return make_float2(d.x * (float)(scale & 255), -(d.y * (float)(scale >> 8 & 255)));
}
template <int D> __device__ inline uint32_t super_at(const unsigned char *slot, int row) {
    const unsigned char *supers = slot + Slot<D>::SUPERS;
    return !is_super(D) ? 0 : D == TOPS_Q6_K ? reinterpret_cast<const uint16_t *>(supers)[row] : reinterpret_cast<const uint32_t *>(supers)[row];
}
template <int D> __device__ inline uint32_t scale_at(const unsigned char *slot, int row, int block) {
    const unsigned char *scales = slot + Slot<D>::SCALES;
    const int at = row * Slot<D>::BLOCKS + Slot<D>::place(block);
    return scale_bytes(D) == 4 ? reinterpret_cast<const uint32_t *>(scales)[at] : reinterpret_cast<const uint16_t *>(scales)[at];
}
template <int D> __device__ inline float2 affine(const Matrix &w, int64_t row, int block, int half) {
    const unsigned char *slot = slot_of<D>(w, row, block);
    const int r = (int)(row % SLOT_ROWS);
    return affine_of<D>(scale_at<D>(slot, r, block % Slot<D>::BLOCKS), super_at<D>(slot, r), half);
}

template <int D> constexpr bool HAS_MINIMUM = D == TOPS_Q4_1 || D == TOPS_Q5_1 || D == TOPS_Q4_K || D == TOPS_Q5_K;
template <int D> __host__ __device__ constexpr int code_offset() { return D == TOPS_Q4_0 ? 8 : D == TOPS_Q5_0 ? 16 : D == TOPS_Q6_K ? 32 : 0; }

/* Four bits become the lowest bits of four bytes. */
__device__ inline uint32_t spread(uint32_t bits) { return ((bits & 15) * 0x00204081u) & 0x01010101u; }

/* The codes of a block as bytes, four columns a word, columns in order; offset not taken out. */
template <int D> __device__ inline void load_codes(const Matrix &w, int64_t row, int block, uint32_t (&codes)[8]) {
    const unsigned char *slot = slot_of<D>(w, row, block);
    const int lane = (int)(row % SLOT_ROWS) * 4, b = block % Slot<D>::BLOCKS;
    auto word = [&](int quad, int i) { return __ldg(reinterpret_cast<const uint32_t *>(slot) + (i / 4 * 32 + lane + quad) * 4 + i % 4); };
#pragma unroll
    for (int quad = 0; quad < 4; quad++) {
        if (D == TOPS_Q8_0) {
            codes[quad] = word(quad, 2 * b);
            codes[quad + 4] = word(quad, 2 * b + 1);
            continue;
        }
        const uint32_t both = word(quad, b);
        codes[quad] = both & 0x0f0f0f0fu;
        codes[quad + 4] = both >> 4 & 0x0f0f0f0fu;
#pragma unroll
        for (int plane = 0; plane < Slot<D>::PLANES; plane++) {
            const uint2 bits = __ldg(reinterpret_cast<const uint2 *>(slot + Slot<D>::HIGH) + plane * 32 + lane + quad);
            codes[quad] |= spread(bits.x >> (4 * b)) << (4 + plane);
            codes[quad + 4] |= spread(bits.y >> (4 * b)) << (4 + plane);
        }
    }
}

/* A block of 32 columns as f32. */
template <int D> __device__ inline void decode_block(const Matrix &w, int64_t row, int block, float (&out)[32]) {
    uint32_t codes[8];
    load_codes<D>(w, row, block, codes);
    float2 first = affine<D>(w, row, block, 0), second = affine<D>(w, row, block, 1);
#pragma unroll
    for (int c = 0; c < 32; c++) {
        int code = D == TOPS_Q8_0 ? (int)(int8_t)(codes[c / 4] >> (c % 4 * 8)) : (int)(codes[c / 4] >> (c % 4 * 8) & 255) - code_offset<D>();
        float2 a = c < 16 ? first : second;
        out[c] = __fadd_rn(__fmul_rn(a.x, (float)code), a.y);   /* as the CPU and the files' own decoders do: not fused */
    }
}

/* One value of a float format. */
template <int D> __device__ inline float value_at(const Matrix &w, int64_t row, int64_t c) {
    int64_t at = row * w.cols + c;
    if (D == TOPS_F32) return reinterpret_cast<const float *>(w.data)[at];
    if (D == TOPS_F16) return __half2float(reinterpret_cast<const __half *>(w.data)[at]);
    if (D == TOPS_BF16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(w.data)[at]);
    return fp8_to_float(w.data[at]) * (w.fp8_scales ? w.fp8_scales[row / 128 * ((w.cols + 127) / 128) + c / 128] : 1.0f);
}
#endif

/* Call body with D as the compile-time number format. */
#define FORMAT_CASE_(NAME, ...) case TOPS_##NAME: { constexpr int D = TOPS_##NAME; __VA_ARGS__; break; }
#define BY_QUANTISED(dtype, ...) \
    switch (dtype) { \
        FORMAT_CASE_(Q4_0, __VA_ARGS__) FORMAT_CASE_(Q4_1, __VA_ARGS__) FORMAT_CASE_(Q5_0, __VA_ARGS__) FORMAT_CASE_(Q5_1, __VA_ARGS__) \
        FORMAT_CASE_(Q8_0, __VA_ARGS__) FORMAT_CASE_(Q4_K, __VA_ARGS__) FORMAT_CASE_(Q5_K, __VA_ARGS__) FORMAT_CASE_(Q6_K, __VA_ARGS__) \
    }
#define BY_FLOAT(dtype, ...) \
    switch (dtype) { \
        FORMAT_CASE_(F32, __VA_ARGS__) FORMAT_CASE_(F16, __VA_ARGS__) FORMAT_CASE_(BF16, __VA_ARGS__) FORMAT_CASE_(FP8_E4M3, __VA_ARGS__) \
    }
