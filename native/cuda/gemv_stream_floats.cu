/* The streaming product for bf16 and fp8 weights. */
#include "gemv_stream.cuh"

int gemv_stream_floats(tops_stream *stream, const Product &product, const Product *kept, int dtype) {
    switch (dtype) {
    case TOPS_BF16: return stream::run<TOPS_BF16>(stream, product, kept);
    case TOPS_FP8_E4M3: return stream::run<TOPS_FP8_E4M3>(stream, product, kept);
    default: return tops_fail(TOPS_UNSUPPORTED, "w: no streaming kernel for dtype %d", dtype);
    }
}
