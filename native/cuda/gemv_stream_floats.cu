/* The streaming product for float formats. */
#include "gemv_stream.cuh"

int gemv_stream_floats(tops_stream *stream, const Product &product, int dtype, int64_t &done) {
    int status = TOPS_OK;
    BY_FLOAT(dtype, status = stream::run<D>(stream, product, done))
    return status;
}
