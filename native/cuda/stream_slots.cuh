/* A slot of weights (ring.cuh) times the inputs (stream_inputs.cuh) on tensor cores. With one token quantised codes stay integers and fp8 becomes f16;
 * otherwise all weights become bf16 in registers. */
#pragma once

#include <cuda_fp8.h>

#include "ring.cuh"
#include "stream_inputs.cuh"

#ifdef __CUDACC__
namespace stream {
/* sum += a lane's 8 columns of a tile, four registers, times the inputs of their unit. Element e is
 *   T 1: row lane / 4 of the tile, in lanes of quad 0 alone, in two parts;  T 16: token lane / 4 + 8 (e / 2), row 2 (lane % 4) + e % 2 */
template <int T> constexpr int SUMS = T == 1 ? 2 : 4;
template <int T, bool HALF = false> __device__ inline void multiply(float (&sum)[SUMS<T>], const unsigned char *unit, const uint32_t (&w)[4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (T == 1) {
        const uint2 x = *reinterpret_cast<const uint2 *>(unit + (lane % 4 * 2 + lane / 4 % 2) * 8);   /* of the columns from 2 on nothing is used */
        mma_diagonal<HALF>(sum[0], sum[1], w, x.x, x.y);
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

/* e4m3 in the lower two bytes as a pair of f16 */
__device__ inline uint32_t fp8_pair(uint32_t bytes) {
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)bytes, __NV_E4M3);
    return pair.x | (uint32_t)pair.y << 16;
}

/* A slot times the only token's integers: a lane returns a part of its row's sum, that over two blocks of columns (one of Q8_0).
 *
 * A product has a block b of the 8 rows as its upper rows, and one half a slot further as its lower ones; its right operand has columns for both
 * blocks' x, two each: the high and the low bytes, and zeros for others, which later products have their turn with. So sums of four blocks meet in one
 * accumulator, of which the upper rows count in columns 0..3, the lower ones in 4..7: a lane has the high and the low sum of its row and one block. */
template <int D> __device__ inline float multiply_fixed(const unsigned char *slot, const unsigned char *inputs, int chunk) {
    typedef Slot<D> S;
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    constexpr int HALVES = D == TOPS_Q6_K ? 2 : 1;   /* of a block that have scales of their own */
    constexpr int TILES = S::BLOCKS / 4;             /* accumulators: each has blocks 2 i, 2 i + 1 and those half a slot further */
    const uint32_t *right = reinterpret_cast<const uint32_t *>(inputs) + lane * 2 * TILES;
    uint32_t x[TILES][2];
    if constexpr (TILES == 2) {
        const uint4 v = *reinterpret_cast<const uint4 *>(right);
        x[0][0] = v.x, x[0][1] = v.y, x[1][0] = v.z, x[1][1] = v.w;
    } else {
        const uint2 v = *reinterpret_cast<const uint2 *>(right);
        x[0][0] = v.x, x[0][1] = v.y;
    }
    const unsigned char *codes = slot + 4 * quad;
    const bool turn = row / 2 % 2;   /* the lane's column is of the second of two blocks */
    const int own = quad % 2 + quad / 2 * (S::BLOCKS / 2);   /* the lane's block of the first accumulator */
    /* Everything is requested, then turned into operands, then multiplied: steps take long, and next to each other they wait together. */
    uint32_t words[S::BLOCKS][D == TOPS_Q8_0 ? 2 : 1];
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < (D == TOPS_Q8_0 ? 2 : 1); i++) words[b][i] = *reinterpret_cast<const uint32_t *>(codes + piece_place(row, D == TOPS_Q8_0 ? 2 * b + i : b));
    Block block[TILES][HALVES];
    float2 by[TILES][HALVES];
    int sums[TILES][HALVES][4] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int2 v = reinterpret_cast<const int2 *>(inputs + S::VALUES * 2)[(own + 2 * tile) * HALVES + half];
            block[tile][half] = {__int_as_float(v.x), v.y};
            if (!HAS_MINIMUM<D>) sums[tile][half][1] = sums[tile][half][3] = v.y;   /* the codes' offset, in the low bytes' columns */
            by[tile][half] = slot_affine<D>(slot, row, own + 2 * tile, half, chunk);
        }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint32_t a[4];   /* columns 4 quad .. + 3 of the upper block and of the lower, then those 16 further */
#pragma unroll
            for (int lower = 0; lower < 2; lower++) {
                const int b = 2 * tile + i + lower * (S::BLOCKS / 2);
                if constexpr (D == TOPS_Q8_0) {
                    a[lower] = words[b][0];
                    a[lower + 2] = words[b][1];
                } else {
                    a[lower] = words[b][0] & 0x0f0f0f0fu;
                    a[lower + 2] = words[b][0] >> 4 & 0x0f0f0f0fu;
#pragma unroll
                    for (int plane = 0; plane < S::HIGH_PLANES; plane++) {
                        const uint32_t bits = reinterpret_cast<const uint32_t *>(slot + S::HIGH)[plane * 64 + row * 8 + b];
                        a[lower] |= spread(bits >> (4 * quad)) << (4 + plane);
                        a[lower + 2] |= spread(bits >> (4 * quad + 16)) << (4 + plane);
                    }
                }
            }
            const uint32_t b0 = turn == i ? x[tile][0] : 0, b1 = turn == i ? x[tile][1] : 0;
            if constexpr (HALVES == 2) {
                mma_bytes(sums[tile][0], a[0], a[1], b0);
                mma_bytes(sums[tile][HALVES - 1], a[2], a[3], b1);
            } else {
                mma_bytes<D == TOPS_Q8_0>(sums[tile][0], a[0], a[1], a[2], a[3], b0, b1);
            }
        }
    float sum = 0;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int *of = sums[tile][half], whole = quad < 2 ? of[0] * 256 + of[1] : of[2] * 256 + of[3];
            sum = fmaf(by[tile][half].x, block[tile][half].step * (float)whole, sum);
            if (HAS_MINIMUM<D>) sum = fmaf(by[tile][half].y, __int_as_float(block[tile][half].sum), sum);
        }
    return sum;
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
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t a = words[2 * i], b = words[2 * i + 1];
                if constexpr (T == 1) {
                    const uint32_t w[4] = {fp8_pair(a), fp8_pair(a >> 16), fp8_pair(b), fp8_pair(b >> 16)};
                    multiply<T, true>(part, inputs + (u + i) * UNIT<T>, w);
                } else {
                    const uint32_t w[4] = {fp8_codes(a << 8), fp8_codes(a), fp8_codes(b << 8), fp8_codes(b)};
                    multiply<T>(part, inputs + (u + i) * UNIT<T>, w);
                }
            }
        }
        const float *scales = reinterpret_cast<const float *>(slot + Slot<D>::SCALES), step = T == 1 ? *reinterpret_cast<const float *>(inputs + 4 * UNIT<T>) : 1.0f;
#pragma unroll
        for (int e = 0; e < SUMS<T>; e++) sum[e] += scales[row_of<T>(e)] * step * part[e];
    } else {
        constexpr bool HALVES = D == TOPS_Q6_K;
#pragma unroll
        for (int block = 0; block < Slot<D>::BLOCKS; block++) {
            float part[SUMS<T>] = {}, upper[SUMS<T>] = {}, whole[SUMS<T>] = {};
            uint32_t w[4];
            block_codes<D, code_offset<D>()>(w, slot, block);
            const unsigned char *unit = inputs + block * UNIT<T>;
            const uint32_t first[4] = {w[0], w[1], HALVES ? 0 : w[2], HALVES ? 0 : w[3]}, second[4] = {0, 0, w[2], w[3]};
            const uint32_t all[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};   /* ones */
            multiply<T>(part, unit, first);
            if (HALVES) multiply<T>(upper, unit, second);
            if (HAS_MINIMUM<D>) multiply<T>(whole, unit, all);
#pragma unroll
            for (int e = 0; e < SUMS<T>; e++) {
                const float2 by = slot_affine<D>(slot, row_of<T>(e), block, 0, chunk);
                sum[e] += by.x * part[e];
                if (HALVES) sum[e] += slot_affine<D>(slot, row_of<T>(e), block, 1, chunk).x * upper[e];
                if (HAS_MINIMUM<D>) sum[e] += by.y * whole[e];
            }
        }
    }
}
}   // namespace stream
#endif
