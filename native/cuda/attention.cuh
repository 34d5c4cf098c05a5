/* What the two attention files know of each other. */
#pragma once

#include "device.cuh"

static inline bool prefill_supports(int p, int page_size) { return (p == 64 || p == 128 || p == 256) && page_size % 8 == 0; }
int attend_prompt(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch, int64_t h, int64_t g, int64_t p,
                  float scale, int gated);
