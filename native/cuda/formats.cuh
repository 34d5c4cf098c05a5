/* Packed weights on the GPU. Float formats stay as files hold them, [rows, cols]. Quantised ones are split into planes, so that a
 * lane loads the codes of a block of 32 columns with one or two 16-byte loads:
 *   low      4-bit codes [rows, cols / 32, 16]: byte j holds column j in its low and column 16 + j in its high half;
 *            Q8_0: signed bytes [rows, cols]
 *   high     u32 [rows, cols / 32] for each bit above the fourth: bit j belongs to column j
 *   scales   by block of 32: Q4_0, Q5_0, Q8_0 half d; Q4_1, Q5_1 half2 (d, m); Q4_K, Q5_K uchar2 (sc, m); Q6_K char2 (its halves' sc)
 *   supers   by 256 columns: Q4_K, Q5_K half2 (d, dmin); Q6_K half d
 * Nothing is rounded: scale = d sc, minimum = -dmin m are formed in f32 when they are used.
 */
#pragma once

#include "device.cuh"

struct Matrix {
    const unsigned char *low;
    const uint32_t *high, *higher;
    const void *scales, *supers;
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

static inline int64_t plane(int64_t bytes) { return (bytes + 255) / 256 * 256; }

static inline bool format_known(int dtype) {
    switch (dtype) {
    case TOPS_F32: case TOPS_F16: case TOPS_BF16: case TOPS_FP8_E4M3: case TOPS_Q4_0: case TOPS_Q4_1: case TOPS_Q5_0: case TOPS_Q5_1:
    case TOPS_Q8_0: case TOPS_Q4_K: case TOPS_Q5_K: case TOPS_Q6_K: return true;
    default: return false;
    }
}

/* Bytes of each plane in the order low, high, higher, scales, supers. */
static inline void plane_bytes(int dtype, int64_t rows, int64_t cols, int64_t (&bytes)[5]) {
    int bits = code_bits(dtype);
    if (!is_quantised(dtype)) {
        bytes[0] = plane(rows * cols * value_bytes(dtype));
        bytes[1] = bytes[2] = bytes[3] = bytes[4] = 0;
        return;
    }
    bytes[0] = plane(rows * cols * (bits == 8 ? 8 : 4) / 8);
    bytes[1] = bits == 5 || bits == 6 ? plane(rows * cols / 8) : 0;
    bytes[2] = bits == 6 ? plane(rows * cols / 8) : 0;
    bytes[3] = plane(rows * cols / 32 * scale_bytes(dtype));
    bytes[4] = plane(rows * cols / 256 * super_scale_bytes(dtype));
}

static inline Matrix matrix_at(const void *data, const float *fp8_scales, int dtype, int64_t rows, int64_t cols) {
    int64_t bytes[5];
    plane_bytes(dtype, rows, cols, bytes);
    const unsigned char *at = static_cast<const unsigned char *>(data);
    return Matrix{at, reinterpret_cast<const uint32_t *>(at + bytes[0]), reinterpret_cast<const uint32_t *>(at + bytes[0] + bytes[1]),
                  at + bytes[0] + bytes[1] + bytes[2], at + bytes[0] + bytes[1] + bytes[2] + bytes[3], fp8_scales, rows, cols};
}
static inline Matrix matrix_of(const tops_weight *w) { return matrix_at(w->data, w->scales, w->dtype, w->rows, w->cols); }

#ifdef __CUDACC__
/* Scale and minimum of columns 16 half .. of a block; block counts blocks of 32 over the whole matrix. */
template <int D> __device__ inline float2 affine(const Matrix &w, int64_t block, int half) {
    if (D == TOPS_Q4_0 || D == TOPS_Q5_0 || D == TOPS_Q8_0) return make_float2(__half2float(static_cast<const __half *>(w.scales)[block]), 0.0f);
    if (D == TOPS_Q4_1 || D == TOPS_Q5_1) return __half22float2(static_cast<const __half2 *>(w.scales)[block]);
    if (D == TOPS_Q6_K) {
        char2 sc = static_cast<const char2 *>(w.scales)[block];
        return make_float2(__half2float(static_cast<const __half *>(w.supers)[block / 8]) * (float)(half ? sc.y : sc.x), 0.0f);
    }
    uchar2 sc = static_cast<const uchar2 *>(w.scales)[block];
    float2 d = __half22float2(static_cast<const __half2 *>(w.supers)[block / 8]);
    return make_float2(d.x * (float)sc.x, -(d.y * (float)sc.y));
}

template <int D> constexpr bool HAS_MINIMUM = D == TOPS_Q4_1 || D == TOPS_Q5_1 || D == TOPS_Q4_K || D == TOPS_Q5_K;
template <int D> __host__ __device__ constexpr int code_offset() { return D == TOPS_Q4_0 ? 8 : D == TOPS_Q5_0 ? 16 : D == TOPS_Q6_K ? 32 : 0; }

/* Four bits become the lowest bits of four bytes. */
__device__ inline uint32_t spread(uint32_t bits) { return ((bits & 15) * 0x00204081u) & 0x01010101u; }

/* The codes of a block as bytes, four columns a word, columns in order; offset not taken out. */
template <int D> __device__ inline void load_codes(const Matrix &w, int64_t block, uint32_t (&codes)[8]) {
    const uint4 *at = reinterpret_cast<const uint4 *>(w.low);
    if (D == TOPS_Q8_0) {
        uint4 a = __ldg(at + 2 * block), b = __ldg(at + 2 * block + 1);
        codes[0] = a.x; codes[1] = a.y; codes[2] = a.z; codes[3] = a.w;
        codes[4] = b.x; codes[5] = b.y; codes[6] = b.z; codes[7] = b.w;
        return;
    }
    uint4 raw = __ldg(at + block);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        codes[i] = words[i] & 0x0f0f0f0fu;
        codes[i + 4] = words[i] >> 4 & 0x0f0f0f0fu;
    }
    if (code_bits(D) >= 5) {
        uint32_t bits = __ldg(w.high + block);
#pragma unroll
        for (int i = 0; i < 8; i++) codes[i] |= spread(bits >> (4 * i)) << 4;
    }
    if (code_bits(D) == 6) {
        uint32_t bits = __ldg(w.higher + block);
#pragma unroll
        for (int i = 0; i < 8; i++) codes[i] |= spread(bits >> (4 * i)) << 5;
    }
}

/* A block of 32 columns as f32. */
template <int D> __device__ inline void decode_block(const Matrix &w, int64_t block, float (&out)[32]) {
    uint32_t codes[8];
    load_codes<D>(w, block, codes);
    float2 first = affine<D>(w, block, 0), second = affine<D>(w, block, 1);
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
    if (D == TOPS_F32) return reinterpret_cast<const float *>(w.low)[at];
    if (D == TOPS_F16) return __half2float(reinterpret_cast<const __half *>(w.low)[at]);
    if (D == TOPS_BF16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(w.low)[at]);
    return fp8_to_float(w.low[at]) * (w.fp8_scales ? w.fp8_scales[row / 128 * ((w.cols + 127) / 128) + c / 128] : 1.0f);
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
