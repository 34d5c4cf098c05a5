/* What the files of the linear layers share. */
#pragma once

#include "formats.cuh"

enum Mode { STORE, ADD, STORE_F32, GATE_UP };
enum { STREAM_NORM_MOST = 4096 };   /* columns that a streaming product norms */

/* A row of activations as a product reads it: bf16, f32, or 8-bit integers with (scale, scale * sum) for each 32 of them. */
struct Inputs {
    const __nv_bfloat16 *bf16;
    const float *f32;
    const int8_t *q8;
    const float2 *steps;
};

/* One launch: matrices of one format, whose rows follow each other in the output; GATE_UP has two of equal rows, computed in pairs. */
struct Product {
    Matrix parts[4];
    int64_t first_row[4];       /* of each part in the output */
    int count;
    int64_t rows, cols, out_cols, n;
    void *out;
    bool out_f32;
    int mode;
    /* What the streaming kernels read instead of Inputs: bf16 rows as the op got them. */
    const void *x;
    const float *norm;          /* null: not normed */
    float eps, per_column;      /* 1 / cols */
};

/* At most 16 rows of bf16 (gemv_stream.cuh); `kept`, or null: rows in bf16 that follow quantised or fp8 ones */
int gemv_stream_floats(tops_stream *stream, const Product &product, const Product *kept, int dtype);
int gemv_stream_small(tops_stream *stream, const Product &product, const Product *kept, int dtype);
int gemv_stream_wide(tops_stream *stream, const Product &product, const Product *kept, int dtype);
/* The same for everything else, from prepared rows */
int gemv(tops_stream *stream, const Product &product, const Inputs &x, int dtype);
/* out [n, rows] (+)= x [n, cols] w [rows, cols]^T on tensor cores; cols a multiple of 8 */
int gemm(tops_stream *stream, void *out, int64_t out_cols, bool out_f32, bool add, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t n,
         int64_t rows, int64_t cols);
/* The same on an H100's own instructions; with `up`, out = silu(x w^T) * (x up^T) */
bool gemm_hopper_supports(tops_stream *stream, const void *x, const void *w, int64_t cols);
int gemm_hopper(tops_stream *stream, void *out, int64_t out_cols, bool out_f32, bool add, const __nv_bfloat16 *x, const __nv_bfloat16 *w, const __nv_bfloat16 *up,
                int64_t n, int64_t rows, int64_t cols);
