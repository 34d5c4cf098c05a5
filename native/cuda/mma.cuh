/* Products of 16 x 8 x 16 tiles of bf16 on tensor cores, and how their operands come from shared memory. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

/* Two values of an operand, the first one in the lower half */
__device__ inline uint32_t pair_of(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ inline uint32_t half_pair(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* sum [16, 8] += left [16, 16] right [16, 8]; element e of sum is row lane / 4 + e / 2 * 8, column lane % 4 * 2 + e % 2 */
__device__ inline void mma(float (&sum)[4], const uint32_t (&left)[4], const uint32_t *right) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

/* The same of f16 */
__device__ inline void mma_halves(float (&sum)[4], const uint32_t (&left)[4], const uint32_t *right) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

/* The same of which rows 0..7 of even columns and rows 8..15 of odd ones are wanted: s0 is row lane / 4, column lane % 4 * 2, s1 what stands 8 rows
 * down and one column right. With 8 rows given in two halves, and a vector in two columns, their sum is the product. */
__device__ inline void mma_diagonal(float &s0, float &s1, const uint32_t (&left)[4], uint32_t b0, uint32_t b1) {
    [[maybe_unused]] float other0, other1;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%2,%3,%1}, {%4,%5,%6,%7}, {%8,%9}, {%0,%10,%10,%1};"
        : "+f"(s0), "+f"(s1), "=f"(other0), "=f"(other1) : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ inline void load_matrices(uint32_t (&to)[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}

/* left = x [16, 16]; left = x^T of x [16, 16]; right, two tiles of 8 columns: x [16, 16], or x^T of x [16, 16]. Rows are `wide` apart. */
__device__ inline void load_a(uint32_t (&left)[4], const __nv_bfloat16 *x, int wide, int lane) {
    load_matrices(left, x + lane % 16 * wide + lane / 16 * 8);
}
__device__ inline void load_a_transposed(uint32_t (&left)[4], const __nv_bfloat16 *x, int wide, int lane) {
    load_matrices_transposed(left, x + (lane / 16 * 8 + lane % 8) * wide + lane / 8 % 2 * 8);
}
__device__ inline void load_b(uint32_t (&right)[4], const __nv_bfloat16 *x, int wide, int lane) {
    load_matrices_transposed(right, x + lane % 16 * wide + lane / 16 * 8);
}
__device__ inline void load_b_rows(uint32_t (&right)[4], const __nv_bfloat16 *x, int wide, int lane) {
    load_matrices(right, x + (lane / 16 * 8 + lane % 8) * wide + lane / 8 % 2 * 8);
}

/* 16 bytes to shared memory, or zeros; copy_wait<p> waits until at most p committed groups are under way */
__device__ inline void copy_async(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
/* What is read once in a step, weights and the cache's keys and values, leaves the second cache first: what kernels hand each other stays there. */
__device__ inline uint64_t evict_first() {
#if __CUDA_ARCH__ >= 900
    return 0x12f0000000000000u;   /* what the instruction below makes there, and would make again for every copy */
#else
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#endif
}
__device__ inline void copy_async_once(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0), "l"(evict_first()) : "memory");
}
/* Or nothing at all, instead of zeros */
__device__ inline void copy_async_once_if(void *to, const void *from, bool there) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %3; }"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"((int)there), "l"(evict_first()) : "memory");
}
/* 4 or 8 bytes, or zeros */
template <int BYTES> __device__ inline void copy_async_small(void *to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES), "r"(there ? BYTES : 0) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ inline void copy_wait() {
    if (pending == 0) asm volatile("cp.async.wait_all;" ::: "memory");
    else asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}
