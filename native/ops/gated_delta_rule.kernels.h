/* The inner loops of the gated delta rule; cpu/kernels.c compiles them once for each instruction set. */
#ifndef TENSOR_OPS_GATED_DELTA_RULE_KERNELS_H
#define TENSOR_OPS_GATED_DELTA_RULE_KERNELS_H

#include "../cpu/number.h"

/* out = silu of the sum over m of w[m] * in[m], rows of count */
static void convolve_silu(float *restrict out, const float *restrict in, const float *restrict w, int64_t taps, int64_t count) {
    for (int64_t c = 0; c < count; c++) {
        float sum = 0;
        for (int64_t m = 0; m < taps; m++) sum += w[m * count + c] * in[m * count + c];
        out[c] = silu(sum);
    }
}

enum { DELTA_COLUMNS = 64 };    /* columns of S whose sums stay in registers */

static inline __attribute__((always_inline)) void delta_columns(float *restrict o, float *restrict memory, const float *q, const float *k, const float *v,
                                                                float qk, float g, float beta, int64_t pk, int64_t pv, int count) {
    float e[DELTA_COLUMNS] = {0}, y[DELTA_COLUMNS] = {0};
    for (int64_t i = 0; i < pk; i++) {
        const float *restrict row = memory + i * pv;
        for (int c = 0; c < count; c++) {
            e[c] += k[i] * row[c];
            y[c] += q[i] * row[c];
        }
    }
    for (int c = 0; c < count; c++) {
        e[c] = beta * (v[c] - g * e[c]);
        o[c] = g * y[c] + qk * e[c];
    }
    for (int64_t i = 0; i < pk; i++) {
        float *restrict row = memory + i * pv;
        for (int c = 0; c < count; c++) row[c] = g * row[c] + k[i] * e[c];
    }
}

/* With S = memory [pk, pv]: e = beta (v - g S^T k), o = g S^T q + (q k) e, S = g S + k e^T. Two passes over S. */
static void delta_step(float *o, float *memory, const float *q, const float *k, const float *v, float g, float beta, int64_t pk, int64_t pv) {
    float qk = 0;
    for (int64_t i = 0; i < pk; i++) qk += q[i] * k[i];
    int64_t c = 0;
    for (; c + DELTA_COLUMNS <= pv; c += DELTA_COLUMNS) delta_columns(o + c, memory + c, q, k, v + c, qk, g, beta, pk, pv, DELTA_COLUMNS);
    if (c < pv) delta_columns(o + c, memory + c, q, k, v + c, qk, g, beta, pk, pv, (int)(pv - c));
}

#endif
