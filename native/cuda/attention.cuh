/* What the attention files share. */
#pragma once

#include "rope.cuh"

enum { SPAN_LEAST = 64 };

struct SpanShape {
    int h, g, p, page_size;
    int page_shift;         /* log2 of page_size, where it is a power of two */
    int splits;             /* spans of positions that blocks share, at most 32 */
    int heads;              /* query heads for each key-value head */
    int64_t row_cols, max_pages;
    float scale;
    bool gated;
};

/* Positions of one span: equal ones, at least SPAN_LEAST, so that short texts use few. */
__device__ inline int span_of(int length, int splits) { return max((int)SPAN_LEAST, ((length + splits - 1) / splits + 15) / 16 * 16); }

static inline bool prefill_supports(int p, int page_size) { return (p == 64 || p == 128 || p == 256) && page_size >= 8 && (page_size & page_size - 1) == 0; }
int attend_prompt(tops_stream *stream, __nv_bfloat16 *out, const __nv_bfloat16 *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s);

/* out [n, h, p] from the partial results of its spans: [n, h, splits, p] unnormalised, and their maxima and sums (0: an empty span) */
template <typename T> int merge(tops_stream *stream, T *out, const T *qkv, const float *partial, const float *maxima, const float *sums, int64_t n, SpanShape s);

/* At most 16 rows over bf16 caches, merged in the same launch; with `rope`, queries, keys and values are as a product left them */
bool decode_supports(const tops_kv *kv, int64_t n, const SpanShape &s, int dtype);
int attend_decode(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, SpanShape s, const Rope *rope);
