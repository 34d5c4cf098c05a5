/* The streaming product for weights of 4 bits. */
#include "gemv_stream.cuh"

int gemv_stream_small(tops_stream *stream, const Product &product, const Product *kept, int dtype) {
    switch (dtype) {
    case TOPS_Q4_0: return stream::run<TOPS_Q4_0>(stream, product, kept);
    case TOPS_Q4_1: return stream::run<TOPS_Q4_1>(stream, product, kept);
    case TOPS_Q4_K: return stream::run<TOPS_Q4_K>(stream, product, kept);
    default: return tops_fail(TOPS_UNSUPPORTED, "w: no streaming kernel for dtype %d", dtype);
    }
}
