/* The streaming product for weights of 5, 6 and 8 bits. */
#include "gemv_stream.cuh"

int gemv_stream_wide(tops_stream *stream, const Product &product, const Product *kept, int dtype) {
    switch (dtype) {
    case TOPS_Q5_0: return stream::run<TOPS_Q5_0>(stream, product, kept);
    case TOPS_Q5_1: return stream::run<TOPS_Q5_1>(stream, product, kept);
    case TOPS_Q5_K: return stream::run<TOPS_Q5_K>(stream, product, kept);
    case TOPS_Q6_K: return stream::run<TOPS_Q6_K>(stream, product, kept);
    case TOPS_Q8_0: return stream::run<TOPS_Q8_0>(stream, product, kept);
    default: return tops_fail(TOPS_UNSUPPORTED, "w: no streaming kernel for dtype %d", dtype);
    }
}
