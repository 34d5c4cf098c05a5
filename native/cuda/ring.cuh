/* Weights on their way through a warp's ring in shared memory: each lane copies 16 bytes at a time (cp.async) and reads back its own, so
 * tens of kilobytes for each multiprocessor are under way without registers or barriers, and before a kernel's inputs are there.
 *
 * A slot holds 512 bytes of a row of a float format, or 32 blocks of 32 columns of a quantised one, and what turns those into numbers:
 *   low (Q8_0: two planes of 16 bytes for each lane) | high, higher u32 | scales by block (fp8: f32 by 128 columns) | supers by 8 blocks */
#pragma once

#include "formats.cuh"

template <int D> struct Slot {
    static constexpr bool QUANTISED = is_quantised(D);
    static constexpr int VALUES = QUANTISED ? 1024 : 512 / value_bytes(D);   /* columns in a slot */
    static constexpr int HIGH = D == TOPS_Q8_0 ? 1024 : 512;
    static constexpr int SCALES = HIGH + (QUANTISED && code_bits(D) == 5 ? 128 : QUANTISED && code_bits(D) == 6 ? 256 : 0);
    static constexpr int SUPERS = SCALES + (QUANTISED ? 32 * scale_bytes(D) : D == TOPS_FP8_E4M3 ? 16 : 0);
    static constexpr int BYTES = (SUPERS + (QUANTISED ? 4 * super_scale_bytes(D) : 0) + 15) / 16 * 16;
    static constexpr bool SHARED = BYTES > 512 && D != TOPS_BF16;             /* lanes read what others copied */
    static constexpr int STAGES = D == TOPS_Q8_0 ? 4 : 8;
};

/* Copies are of 4 or 16 bytes, so a row's scales must begin at a multiple of 4. */
static inline bool ring_supports(const tops_weight *w) {
    int dtype = w->dtype;
    if (dtype == TOPS_FP8_E4M3 && !w->scales) return false;
    if (!is_quantised(dtype)) return w->cols * value_bytes(dtype) % 16 == 0;
    return w->cols % (dtype == TOPS_Q6_K ? 512 : is_super(dtype) ? 256 : 64) == 0;
}

#ifdef __CUDACC__
template <int BYTES> __device__ inline void copy_async(void *to, const void *from, bool there) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

/* Where a lane copies the next slot of a row from; what lies beyond the row's end becomes zeros. */
template <int D> struct Source {
    const unsigned char *low, *scales, *supers;
    const uint32_t *high, *higher;
    int left;   /* pieces of 16 bytes (float formats) or blocks from the slot's start to the row's end */

    __device__ void begin(const Matrix &w, int64_t row, int chunk, int lane) {
        const int pieces = (int)(is_quantised(D) ? w.cols / 32 : w.cols * value_bytes(D) / 16);
        const int64_t at = row * pieces + chunk * 32;
        left = pieces - chunk * 32;
        low = w.low + (at + lane) * (D == TOPS_Q8_0 ? 32 : 16);
        if (D == TOPS_FP8_E4M3) scales = reinterpret_cast<const unsigned char *>(w.fp8_scales + row / 128 * ((w.cols + 127) / 128) + chunk * 4 + lane);
        if (!is_quantised(D)) return;
        if (code_bits(D) == 5 || code_bits(D) == 6) high = w.high + at + lane;
        if (code_bits(D) == 6) higher = w.higher + at + lane;
        scales = static_cast<const unsigned char *>(w.scales) + at * scale_bytes(D) + lane * 4;
        supers = static_cast<const unsigned char *>(w.supers) + at / 8 * super_scale_bytes(D) + lane * 4;
    }
    __device__ void fetch(unsigned char *slot, int lane) {
        const bool there = lane < left;
        copy_async<16>(slot + lane * 16, low, there);
        if (D == TOPS_Q8_0) copy_async<16>(slot + 512 + lane * 16, low + 16, there);
        low += D == TOPS_Q8_0 ? 1024 : 512;
        if (D == TOPS_FP8_E4M3) {
            if (lane < 4) copy_async<4>(slot + Slot<D>::SCALES + lane * 4, scales, lane * 8 < left);
            scales += 16;
        }
        if (is_quantised(D)) {
            if (code_bits(D) == 5 || code_bits(D) == 6) copy_async<4>(slot + Slot<D>::HIGH + lane * 4, high, there);
            if (code_bits(D) == 6) copy_async<4>(slot + Slot<D>::HIGH + 128 + lane * 4, higher, there);
            high += 32;
            higher += 32;
            if (scale_bytes(D) == 4) copy_async<4>(slot + Slot<D>::SCALES + lane * 4, scales, there);
            else if (lane < 16) copy_async<4>(slot + Slot<D>::SCALES + lane * 4, scales, 2 * lane < left);
            scales += 32 * scale_bytes(D);
            constexpr int SUPER = super_scale_bytes(D);
            if (SUPER && lane < SUPER) copy_async<4>(slot + Slot<D>::SUPERS + lane * 4, supers, lane * (SUPER == 4 ? 8 : 16) < left);
            supers += 4 * SUPER;
        }
        left -= 32;
    }
};

/* Scale and minimum of a lane's block, of its second half where that has its own. */
template <int D> __device__ inline float2 slot_affine(const unsigned char *slot, int lane, int half) {
    const unsigned char *scales = slot + Slot<D>::SCALES, *supers = slot + Slot<D>::SUPERS;
    if (D == TOPS_Q4_0 || D == TOPS_Q5_0 || D == TOPS_Q8_0) return make_float2(__half2float(reinterpret_cast<const __half *>(scales)[lane]), 0.0f);
    if (D == TOPS_Q4_1 || D == TOPS_Q5_1) return __half22float2(reinterpret_cast<const __half2 *>(scales)[lane]);
    if (D == TOPS_Q6_K) {
        char2 sc = reinterpret_cast<const char2 *>(scales)[lane];
        return make_float2(__half2float(reinterpret_cast<const __half *>(supers)[lane / 8]) * (float)(half ? sc.y : sc.x), 0.0f);
    }
    uchar2 sc = reinterpret_cast<const uchar2 *>(scales)[lane];
    float2 d = __half22float2(reinterpret_cast<const __half2 *>(supers)[lane / 8]);
    return make_float2(d.x * (float)sc.x, -(d.y * (float)sc.y));
}

/* The codes of a lane's block as bytes, columns in order; Q6_K with its offset taken out. */
template <int D> __device__ inline void slot_codes(const unsigned char *slot, int lane, uint32_t (&codes)[8]) {
    const uint4 raw = *reinterpret_cast<const uint4 *>(slot + lane * 16);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    if (D == TOPS_Q8_0) {
        const uint4 rest = *reinterpret_cast<const uint4 *>(slot + 512 + lane * 16);
        const uint32_t more[4] = {rest.x, rest.y, rest.z, rest.w};
#pragma unroll
        for (int i = 0; i < 4; i++) codes[i] = words[i], codes[i + 4] = more[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        codes[i] = words[i] & 0x0f0f0f0fu;
        codes[i + 4] = words[i] >> 4 & 0x0f0f0f0fu;
    }
    if (code_bits(D) >= 5) {
        const uint32_t bits = *reinterpret_cast<const uint32_t *>(slot + Slot<D>::HIGH + lane * 4);
#pragma unroll
        for (int i = 0; i < 8; i++) codes[i] |= spread(bits >> (4 * i)) << 4;
    }
    if (code_bits(D) == 6) {
        const uint32_t bits = *reinterpret_cast<const uint32_t *>(slot + Slot<D>::HIGH + 128 + lane * 4);
#pragma unroll
        for (int i = 0; i < 8; i++) codes[i] = __vsub4(codes[i] | spread(bits >> (4 * i)) << 5, 0x20202020u);
    }
}
#endif
