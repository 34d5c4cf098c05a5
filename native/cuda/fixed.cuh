/* One token's activations as 16-bit integers, so that quantised codes go into tensor cores as the bytes they are.
 *
 * Columns share a step, a power of two, in blocks: x = step q, |q| < 2^14. A bf16 within 2^6 of its block's largest is exact, a smaller one off by
 * at most 2^-14 of the largest. q = 256 high + low, signed bytes, two operands of a product whose integer sums are exact. */
#pragma once

#include "formats.cuh"
#include "mma.cuh"

/* What a block's sums are scaled with: step, and a sum over its q: times minus the codes' offset, as an integer, or times the step, as a float */
struct Block {
    float step;
    int32_t sum;
};

#ifdef __CUDACC__
/* sum [16, 8] += left [16, 32] right [32, 8], bytes: of left unsigned or signed, of right signed. A lane's registers of left are rows lane / 4 and
 * + 8 of columns 4 (lane % 4) .. + 3, then both of columns + 16; right has columns of x there, for column lane / 4 of sum. */
template <bool SIGNED> __device__ inline void mma_bytes(int (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    if (SIGNED)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* The same for 16 columns */
__device__ inline void mma_bytes(int (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3]) : "r"(a0), "r"(a1), "r"(b));
}

/* Eight columns of bf16 */
__device__ inline void eight_floats(uint4 v, float (&to)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

/* The largest magnitude of eight columns and of those of the neighbours, so many lanes together, as a float's bits */
__device__ inline uint32_t largest(uint4 v, int lanes) {
    const uint32_t magnitudes = 0x7fff7fffu;   /* of two columns, whose order is that of integers */
    uint32_t most = __vmaxu2(__vmaxu2(v.x & magnitudes, v.y & magnitudes), __vmaxu2(v.z & magnitudes, v.w & magnitudes));
    for (int step = 1; step < lanes; step *= 2) most = __vmaxu2(most, __shfl_xor_sync(0xffffffff, most, step));
    return max(most << 16, most & 0x7fff0000u);
}

/* 2^-bits of the largest power of two in a block, given its largest magnitude as bits (which order as magnitudes do, NaN last); NaN where that is
 * not finite, so that sums become it */
__device__ inline float step_of(uint32_t most, int bits) {
    const uint32_t exponent = most & 0x7f800000u;
    return __uint_as_float(exponent == 0x7f800000u ? 0x7fffffffu : max(exponent, (uint32_t)(bits + 1) << 23) - ((uint32_t)bits << 23));
}
/* 1 / step, for powers of two */
__device__ inline float inverse(float step) { return __uint_as_float((254u << 23) - __float_as_uint(step)); }

template <int D> __device__ inline Block block_of(float step, int sum) {
    return {step, HAS_MINIMUM<D> ? __float_as_int(step * (float)sum) : -code_offset<D>() * sum};
}

/* q of four columns, high and low bytes in words of their own; returns the sum of q */
__device__ inline int split_four(uint32_t &high, uint32_t &low, float4 x, float per_step) {
    const float magic = 12582912.0f;   /* 1.5 2^23: added, what is below 1 is rounded away, and q stands in the lowest bits */
    const uint32_t q[4] = {__float_as_uint(fmaf(x.x, per_step, magic)), __float_as_uint(fmaf(x.y, per_step, magic)),
                           __float_as_uint(fmaf(x.z, per_step, magic)), __float_as_uint(fmaf(x.w, per_step, magic))};
    low = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
    high = __byte_perm(__byte_perm(q[0] + 128, q[1] + 128, 0x0051), __byte_perm(q[2] + 128, q[3] + 128, 0x0051), 0x5410);
    return (int)(q[0] + q[1] + q[2] + q[3] - 4 * 0x4b400000u);
}
#endif
