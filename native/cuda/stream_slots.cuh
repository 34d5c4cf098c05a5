/* A slot of weights (ring.cuh) times the inputs (stream_inputs.cuh): weights become bf16 in registers and go into tensor cores. */
#pragma once

#include "ring.cuh"
#include "stream_inputs.cuh"

#ifdef __CUDACC__
namespace stream {
/* sum += a lane's 8 columns of a tile, four registers, times the inputs of their unit. Element e is
 *   T 1: row lane / 4 of the tile, in lanes of quad 0 alone, in two parts;  T 16: token lane / 4 + 8 (e / 2), row 2 (lane % 4) + e % 2 */
template <int T> constexpr int SUMS = T == 1 ? 2 : 4;
template <int T> __device__ inline void multiply(float (&sum)[SUMS<T>], const unsigned char *unit, const uint32_t (&w)[4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (T == 1) {
        const uint2 x = *reinterpret_cast<const uint2 *>(unit + (lane % 4 * 2 + lane / 4 % 2) * 8);   /* of the columns from 2 on nothing is used */
        mma_diagonal(sum[0], sum[1], w, x.x, x.y);
    } else {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const uint4 x = reinterpret_cast<const uint4 *>(unit)[m * 32 + lane];
            const uint32_t left[4] = {x.x, x.y, x.z, x.w};
            mma(sum, left, w + 2 * m);
        }
    }
}
/* Row of the tile that element e belongs to */
template <int T> __device__ inline int row_of(int e) { return T == 1 ? threadIdx.x % 32 / 4 : threadIdx.x % 4 * 2 + e % 2; }

__device__ inline uint32_t subtract(uint32_t a, uint32_t b) {
    __nv_bfloat162 d = __hsub2(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b));
    return *reinterpret_cast<uint32_t *>(&d);
}
/* Codes below 128 in bytes 0 and 2 of a word, less `offset`, as bf16: 128 + code is a bf16 whose lowest bits are the code */
__device__ inline uint32_t small_codes(uint32_t word, uint32_t mask, int offset) {
    uint32_t value;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(value) : "r"(word), "r"(mask), "r"(0x43004300u));   /* word & mask | .. */
    return subtract(value, (0x4300u + offset) * 0x10001u);
}
/* Signed bytes 0 and 2: 128 + their lower bits, less 128, or 256 where the sign is set */
__device__ inline uint32_t signed_codes(uint32_t word) { return subtract((word & 0x007f007fu) | 0x43004300u, (word & 0x00800080u) | 0x43004300u); }
/* e4m3 in bytes 1 and 3: moved to bf16's fields it is 2^120 times too small */
__device__ inline uint32_t fp8_codes(uint32_t word) {
    const uint32_t moved = (word & 0x80008000u) | (word & 0x7f007f00u) >> 4, by = 0x7b807b80u;
    __nv_bfloat162 value = __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&moved), *reinterpret_cast<const __nv_bfloat162 *>(&by));
    return *reinterpret_cast<uint32_t *>(&value);
}

/* Scale and minimum of a block of a row of the slot, of its second half where that has its own. */
template <int D> __device__ inline float2 slot_affine(const unsigned char *slot, int row, int block, int half, int chunk) {
    const unsigned char *scales = slot + Slot<D>::SCALES + row * Slot<D>::SCALE_ROW, *supers = slot + Slot<D>::SUPERS + row * 4;
    if (D == TOPS_Q4_0 || D == TOPS_Q5_0 || D == TOPS_Q8_0) return make_float2(__half2float(reinterpret_cast<const __half *>(scales)[block]), 0.0f);
    if (D == TOPS_Q4_1 || D == TOPS_Q5_1) return __half22float2(reinterpret_cast<const __half2 *>(scales)[block]);
    if (D == TOPS_Q6_K) {
        const char2 sc = reinterpret_cast<const char2 *>(scales)[block];
        return make_float2(__half2float(reinterpret_cast<const __half *>(supers)[chunk % 2]) * (float)(half ? sc.y : sc.x), 0.0f);
    }
    const uchar2 sc = reinterpret_cast<const uchar2 *>(scales)[block];
    const float2 d = __half22float2(*reinterpret_cast<const __half2 *>(supers));
    return make_float2(d.x * (float)sc.x, -(d.y * (float)sc.y));
}

/* All scales of a row of the slot, where a block has just one */
template <int D> struct RowScales {
    static constexpr bool THERE = D == TOPS_Q4_0 || D == TOPS_Q5_0 || D == TOPS_Q8_0;
    uint32_t words[Slot<D>::BLOCKS / 2];
    __device__ RowScales(const unsigned char *slot, int row) {
        const unsigned char *from = slot + Slot<D>::SCALES + row * Slot<D>::SCALE_ROW;
        if (D == TOPS_Q8_0) {
            const uint2 raw = *reinterpret_cast<const uint2 *>(from);
            words[0] = raw.x;
            words[1] = raw.y;
        } else if (THERE) {
            const uint4 raw = *reinterpret_cast<const uint4 *>(from);
            words[0] = raw.x;
            words[1] = raw.y;
            words[Slot<D>::BLOCKS / 2 - 2] = raw.z;
            words[Slot<D>::BLOCKS / 2 - 1] = raw.w;
        }
    }
    __device__ float at(int block) const { return __half2float(__ushort_as_half((uint16_t)(words[block / 2] >> (block % 2 * 16)))); }
};

/* A lane's codes of a block of its row as bf16: columns 4 (lane % 4) + {0, 2}, {1, 3} of both halves of the block */
template <int D, int OFFSET> __device__ inline void block_codes(uint32_t (&w)[4], const unsigned char *slot, int block) {
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    if constexpr (D == TOPS_Q8_0) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t word = reinterpret_cast<const uint32_t *>(slot + piece_place(row, 2 * block + half))[quad];
            w[2 * half] = signed_codes(word);
            w[2 * half + 1] = signed_codes(word >> 8);
        }
    } else {
        const uint32_t word = reinterpret_cast<const uint32_t *>(slot + piece_place(row, block))[quad];
        if constexpr (Slot<D>::HIGH_PLANES == 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = small_codes(word >> (i % 2 * 8 + i / 2 * 4), 0x000f000fu, OFFSET);
        } else {
            uint32_t bytes[2] = {word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu};
#pragma unroll
            for (int plane = 0; plane < Slot<D>::HIGH_PLANES; plane++) {
                const uint32_t bits = reinterpret_cast<const uint32_t *>(slot + Slot<D>::HIGH)[plane * 64 + row * 8 + block];
#pragma unroll
                for (int half = 0; half < 2; half++) bytes[half] |= spread(bits >> (16 * half + 4 * quad)) << (4 + plane);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = small_codes(bytes[i / 2] >> (i % 2 * 8), 0x00ff00ffu, OFFSET);
        }
    }
}

/* A slot times the inputs, which begin with the slot's first unit. */
template <int D, int T> __device__ inline void multiply_slot(float (&sum)[SUMS<T>], const unsigned char *slot, const unsigned char *inputs, int chunk) {
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    if constexpr (D == TOPS_BF16) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + piece_place(row, 4 * u + quad));
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
            multiply<T>(sum, inputs + u * UNIT<T>, w);
        }
    } else if constexpr (D == TOPS_FP8_E4M3) {
        float part[SUMS<T>] = {};
#pragma unroll
        for (int u = 0; u < 4; u += 2) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + piece_place(row, 2 * u + quad));
            const uint32_t first[4] = {fp8_codes(v.x << 8), fp8_codes(v.x), fp8_codes(v.y << 8), fp8_codes(v.y)};
            const uint32_t second[4] = {fp8_codes(v.z << 8), fp8_codes(v.z), fp8_codes(v.w << 8), fp8_codes(v.w)};
            multiply<T>(part, inputs + u * UNIT<T>, first);
            multiply<T>(part, inputs + (u + 1) * UNIT<T>, second);
        }
        const float *scales = reinterpret_cast<const float *>(slot + Slot<D>::SCALES);
#pragma unroll
        for (int e = 0; e < SUMS<T>; e++) sum[e] += scales[row_of<T>(e)] * part[e];
    } else {
        constexpr int OFFSET = D == TOPS_Q4_0 ? 8 : D == TOPS_Q5_0 ? 16 : D == TOPS_Q6_K ? 32 : 0;
        constexpr bool MINIMUM = D == TOPS_Q4_1 || D == TOPS_Q5_1 || D == TOPS_Q4_K || D == TOPS_Q5_K, HALVES = D == TOPS_Q6_K;
        const RowScales<D> plain(slot, row);
        constexpr int GROUP = T == 1 && Slot<D>::HIGH_PLANES == 0 ? 4 : 1;   /* blocks side by side: products take long */
#pragma unroll
        for (int group = 0; group < Slot<D>::BLOCKS; group += GROUP) {
            float part[GROUP][SUMS<T>] = {}, upper[GROUP][SUMS<T>] = {}, whole[GROUP][SUMS<T>] = {};
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                uint32_t w[4];
                block_codes<D, OFFSET>(w, slot, group + i);
                const unsigned char *unit = inputs + (group + i) * UNIT<T>;
                const uint32_t first[4] = {w[0], w[1], HALVES ? 0 : w[2], HALVES ? 0 : w[3]}, second[4] = {0, 0, w[2], w[3]};
                const uint32_t all[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};   /* ones */
                multiply<T>(part[i], unit, first);
                if (HALVES) multiply<T>(upper[i], unit, second);
                if (MINIMUM) multiply<T>(whole[i], unit, all);
            }
#pragma unroll
            for (int i = 0; i < GROUP; i++)
#pragma unroll
                for (int e = 0; e < SUMS<T>; e++) {
                    const float2 by = T == 1 && RowScales<D>::THERE ? make_float2(plain.at(group + i), 0.0f) : slot_affine<D>(slot, row_of<T>(e), group + i, 0, chunk);
                    sum[e] += by.x * part[i][e];
                    if (HALVES) sum[e] += slot_affine<D>(slot, row_of<T>(e), group + i, 1, chunk).x * upper[i][e];
                    if (MINIMUM) sum[e] += by.y * whole[i][e];
                }
        }
    }
}
}   // namespace stream
#endif
