/* The streaming product for quantised formats with 8-bit activations. */
#include "gemv_stream.cuh"

int gemv_stream_integers(tops_stream *stream, const Product &product, int dtype, int64_t &done) {
    int status = TOPS_OK;
    BY_QUANTISED(dtype, status = stream::run<D>(stream, product, done))
    return status;
}
