/* Norm and rotation of a head whose values a warp holds: lane l has x[i] = value l + 32 i, so both halves of its rotated pairs. */
#pragma once

#include "device.cuh"

/* What queries and keys need before attention. The table is written by an op of the same step; norms are weights. */
struct Rope {
    const float *table, *q_norm, *k_norm;
    int r;
    float eps;
};

static inline bool halves_supported(int64_t p, int64_t r, int pairs) { return !pairs && (p == 64 || p == 128 || p == 256) && (r == 64 || r == 128 || r == 256) && r <= p; }

#ifdef __CUDACC__
template <int EACH> __device__ inline void load_norm(float (&weight)[EACH], const float *norm, int lane) {
#pragma unroll
    for (int i = 0; i < EACH; i++) weight[i] = norm ? norm[lane + 32 * i] : 1.0f;
}

/* turns: the row's (cos, sin) [r / 2]; half-split rotation, r / 2 a multiple of 32 */
template <int EACH> __device__ inline void norm_rotate(float (&x)[EACH], const float (&weight)[EACH], bool normed, const float2 *turns, int r, float eps, int lane) {
    float2 turn[EACH / 2];
#pragma unroll
    for (int i = 0; i < EACH / 2; i++) turn[i] = 32 * i < r / 2 ? turns[lane + 32 * i] : make_float2(1.0f, 0.0f);
    if (normed) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) sum += x[i] * x[i];
        const float factor = rsqrtf(warp_sum(sum) / (float)(32 * EACH) + eps);
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = x[i] * factor * weight[i];
    }
#pragma unroll
    for (int half = EACH / 2; half; half /= 2)   /* r / 2 = 32 half */
        if (r == 64 * half)
#pragma unroll
            for (int i = 0; i < half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a * turn[i].x - b * turn[i].y;
                x[i + half] = b * turn[i].x + a * turn[i].y;
            }
}
#endif
