/* A slot of weights (ring.cuh) times the inputs (stream_inputs.cuh) on tensor cores. With one token quantised codes stay integers and fp8 becomes f16;
 * otherwise all weights become bf16 in registers. */
#pragma once

#include <cuda_fp8.h>

#include "ring.cuh"
#include "stream_inputs.cuh"

#ifdef __CUDACC__
namespace stream {
/* sum += a lane's 8 columns of a tile, four registers, times 16 tokens' inputs of their unit. Element e is token lane / 4 + 8 (e / 2), row_of(e). */
__device__ inline void multiply(float (&sum)[4], const unsigned char *unit, const uint32_t (&w)[4]) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const uint4 x = reinterpret_cast<const uint4 *>(unit)[m * 32 + threadIdx.x % 32];
        const uint32_t left[4] = {x.x, x.y, x.z, x.w};
        mma(sum, left, w + 2 * m);
    }
}
/* Row of the tile that element e belongs to */
__device__ inline int row_of(int e) { return threadIdx.x % 4 * 2 + e % 2; }

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

/* A lane's codes of its row of a slot (formats.cuh) */
template <int D> struct Codes {
    uint32_t words[8];
    uint2 high[Slot<D>::PLANES > 0 ? Slot<D>::PLANES : 1];

    __device__ Codes(const unsigned char *slot, int own) {   /* own: 16 lane */
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + own + i * 512);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
#pragma unroll
        for (int plane = 0; plane < Slot<D>::PLANES; plane++) high[plane] = *reinterpret_cast<const uint2 *>(slot + Slot<D>::HIGH + plane * 256 + own / 2);
    }
    /* Columns 16 half + 4 (lane % 4) .. + 3 of a block as bytes */
    __device__ uint32_t bytes(int block, int half) const {
        if (D == TOPS_Q8_0) return words[2 * block + half];
        uint32_t v = words[block] >> (4 * half) & 0x0f0f0f0fu;
#pragma unroll
        for (int plane = 0; plane < Slot<D>::PLANES; plane++) v |= spread((half ? high[plane].y : high[plane].x) >> (4 * block)) << (4 + plane);
        return v;
    }
    /* The same as bf16, less the codes' offset: columns 0 and 2, 1 and 3 of both halves */
    __device__ void numbers(uint32_t (&to)[4], int block) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (D == TOPS_Q8_0) to[i] = signed_codes(bytes(block, i / 2) >> (i % 2 * 8));
            else if (Slot<D>::PLANES == 0) to[i] = small_codes(words[block] >> (i % 2 * 8 + i / 2 * 4), 0x000f000fu, code_offset<D>());
            else to[i] = small_codes(bytes(block, i / 2) >> (i % 2 * 8), 0x00ff00ffu, code_offset<D>());
        }
    }
};

/* Four e4m3 as two pairs of f16 */
__device__ inline void fp8_pairs(uint32_t &lower, uint32_t &upper, uint32_t bytes) {
#if __CUDA_ARCH__ >= 890
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }" : "=r"(lower), "=r"(upper) : "r"(bytes));
#else
    const __half2_raw pairs[2] = {__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)bytes, __NV_E4M3), __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(bytes >> 16), __NV_E4M3)};
    lower = pairs[0].x | (uint32_t)pairs[0].y << 16, upper = pairs[1].x | (uint32_t)pairs[1].y << 16;
#endif
}

/* Right operands of the only token's integers, of which a lane gives those of one in two blocks: the others stay zeros throughout. */
template <int D> struct Turns {
    uint32_t x[2][Slot<D>::OWN * 2] = {};

    __device__ void load(const unsigned char *inputs, int own) {
        const uint32_t from = (uint32_t)__cvta_generic_to_shared(inputs + own / (16 / (int)sizeof x[0]));
        load(x[0], from, own & 128);
        load(x[1], from, ~own & 128);
    }
    /* Where `other` is 0. A choice between values would take more instructions. */
    __device__ static void load(uint32_t (&to)[4], uint32_t from, int other) {
        asm volatile("{ .reg .pred p; setp.eq.s32 p, %5, 0; @p ld.shared.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                     : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3]) : "r"(from), "r"(other));
    }
    __device__ static void load(uint32_t (&to)[2], uint32_t from, int other) {
        asm volatile("{ .reg .pred p; setp.eq.s32 p, %3, 0; @p ld.shared.v2.u32 {%0,%1}, [%2]; }" : "+r"(to[0]), "+r"(to[1]) : "r"(from), "r"(other));
    }
};

/* A slot times the only token's integers: a lane adds a part of its row's sum, that over two blocks of columns (one of Q8_0).
 *
 * A product has a block b of the 8 rows as its upper rows, and one half a slot further as its lower ones; its right operand has columns for both
 * blocks' x, two each: the high and the low bytes, and zeros for others, which the next product has its turn with. So sums of four blocks meet in one
 * accumulator, of which the upper rows count in columns 0..3, the lower ones in 4..7: a lane has the high and the low sum of its row and one block. */
template <int D> __device__ inline void multiply_fixed(float &sum, Turns<D> &turns, const unsigned char *slot, const unsigned char *inputs, int own) {
    typedef Slot<D> S;
    constexpr int HALVES = D == TOPS_Q6_K ? 2 : 1;   /* of a block that have scales of their own */
    constexpr int TILES = S::OWN;                    /* accumulators: each has blocks 2 i, 2 i + 1 and those half a slot further */
    const int quad16 = own & 48;
    /* Everything is requested, then turned into operands, then multiplied: steps take long, and next to each other they wait together. */
    const Codes<D> codes(slot, own);
    turns.load(inputs, own);
    const unsigned char *scales = slot + S::SCALES + own / 16 * (TILES * scale_bytes(D));
    uint32_t scale[2], super = super_at<D>(slot, own / 64);
    if constexpr (TILES == 1) {
        scale[0] = *reinterpret_cast<const uint16_t *>(scales);
    } else if constexpr (scale_bytes(D) == 4) {
        const uint2 v = *reinterpret_cast<const uint2 *>(scales);
        scale[0] = v.x, scale[1] = v.y;
    } else {
        scale[0] = *reinterpret_cast<const uint32_t *>(scales);
        scale[1] = scale[0] >> 16;
    }
    int4 blocks[HALVES];   /* of the lane: two Blocks each */
#pragma unroll
    for (int i = 0; i < HALVES; i++) {
        if constexpr (TILES == 1) {
            const int2 v = *reinterpret_cast<const int2 *>(inputs + S::VALUES * 2 + quad16 / 2);
            blocks[i] = make_int4(v.x, v.y, 0, 0);
        } else {
            blocks[i] = *reinterpret_cast<const int4 *>(inputs + S::VALUES * 2 + quad16 * HALVES + i * 16);
        }
    }
    int sums[TILES][HALVES][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int upper = 2 * tile + i, lower = upper + S::BLOCKS / 2;
            const uint32_t b0 = turns.x[i][2 * tile], b1 = turns.x[i][2 * tile + 1];
            if constexpr (HALVES == 2) {
                mma_bytes(sums[tile][0], codes.bytes(upper, 0), codes.bytes(lower, 0), b0);
                mma_bytes(sums[tile][HALVES - 1], codes.bytes(upper, 1), codes.bytes(lower, 1), b1);
            } else {
                mma_bytes<D == TOPS_Q8_0>(sums[tile][0], codes.bytes(upper, 0), codes.bytes(lower, 0), codes.bytes(upper, 1), codes.bytes(lower, 1), b0, b1);
            }
        }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int *of = sums[tile][half];
            const int4 two = blocks[HALVES == 2 ? tile : 0];
            const bool second = HALVES == 2 ? half : tile;
            const float step = __int_as_float(second ? two.z : two.x);
            const int more = second ? two.w : two.y, whole = (quad16 < 32 ? of[0] * 256 + of[1] : of[2] * 256 + of[3]) + (HAS_MINIMUM<D> ? 0 : more);
            const float2 by = affine_of<D>(scale[tile], super, half);
            sum = fmaf(by.x, step * (float)whole, sum);
            if (HAS_MINIMUM<D>) sum = fmaf(by.y, __int_as_float(more), sum);
        }
}

/* Where a lane finds its first 16 bytes of a slot; float weights have the next ones at ^ 64 */
template <int D> __device__ inline int own_place(int lane) { return is_quantised(D) ? lane * 16 : piece_place(lane / 4, lane % 4); }
/* And of the only token's inputs of two units of columns */
__device__ inline int own_inputs(int lane) { return (lane % 4 * 2 + lane / 4 % 2) * 16; }   /* of products' columns from 2 on nothing is used */

/* A slot of float weights times the only token's inputs, which begin with the slot's first unit. Lanes of quad 0 get row lane / 4 in two parts, 0 and 3. */
template <int D> __device__ inline void multiply_floats(float (&sum)[4], const unsigned char *slot, const unsigned char *inputs, int own, int own_x) {
    if constexpr (D == TOPS_BF16) {
        const uint4 x = *reinterpret_cast<const uint4 *>(inputs + own_x);
        const uint32_t right[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + (own ^ 64 * u));
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
            mma(sum, w, right + 2 * u);
        }
    } else {
        float part[2][4] = {};   /* two sums: a product takes long, and the next one of its sum waits */
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const uint4 x = *reinterpret_cast<const uint4 *>(inputs + own_x + 2 * u * UNIT<1>), v = *reinterpret_cast<const uint4 *>(slot + (own ^ 64 * u));
            const uint32_t right[4] = {x.x, x.y, x.z, x.w}, words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t w[4];
                fp8_pairs(w[0], w[1], words[2 * i]);
                fp8_pairs(w[2], w[3], words[2 * i + 1]);
                mma_halves(part[u], w, right + 2 * i);
            }
        }
        const float by = *reinterpret_cast<const float *>(slot + Slot<D>::SCALE) * *reinterpret_cast<const float *>(inputs + 4 * UNIT<1>);
        sum[0] = fmaf(by, part[0][0] + part[1][0], sum[0]);
        sum[3] = fmaf(by, part[0][3] + part[1][3], sum[3]);
    }
}

/* A slot times the inputs of 16 tokens */
template <int D> __device__ inline void multiply_slot(float (&sum)[4], const unsigned char *slot, const unsigned char *inputs) {
    constexpr int T = 16;
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    if constexpr (D == TOPS_BF16) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + piece_place(row, 4 * u + quad));
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
            multiply(sum, inputs + u * UNIT<T>, w);
        }
    } else if constexpr (D == TOPS_FP8_E4M3) {
        float part[4] = {};
#pragma unroll
        for (int u = 0; u < 4; u += 2) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + piece_place(row, 2 * u + quad));
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t a = words[2 * i], b = words[2 * i + 1];
                const uint32_t w[4] = {fp8_codes(a << 8), fp8_codes(a), fp8_codes(b << 8), fp8_codes(b)};
                multiply(part, inputs + (u + i) * UNIT<T>, w);
            }
        }
        const float scale = *reinterpret_cast<const float *>(slot + Slot<D>::SCALE);
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e] += scale * part[e];
    } else {
        constexpr bool HALVES = D == TOPS_Q6_K;
        const Codes<D> codes(slot, lane * 16);
#pragma unroll
        for (int block = 0; block < Slot<D>::BLOCKS; block++) {
            float part[4] = {}, upper[4] = {}, whole[4] = {};
            uint32_t w[4];
            codes.numbers(w, block);
            const unsigned char *unit = inputs + block * UNIT<T>;
            const uint32_t first[4] = {w[0], w[1], HALVES ? 0 : w[2], HALVES ? 0 : w[3]}, second[4] = {0, 0, w[2], w[3]};
            const uint32_t all[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};   /* ones */
            multiply(part, unit, first);
            if (HALVES) multiply(upper, unit, second);
            if (HAS_MINIMUM<D>) multiply(whole, unit, all);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const uint32_t scale = scale_at<D>(slot, row_of(e), block), super = super_at<D>(slot, row_of(e));
                const float2 by = affine_of<D>(scale, super, 0);
                sum[e] += by.x * part[e];
                if (HALVES) sum[e] += affine_of<D>(scale, super, 1).x * upper[e];
                if (HAS_MINIMUM<D>) sum[e] += by.y * whole[e];
            }
        }
    }
}
}   // namespace stream
#endif
