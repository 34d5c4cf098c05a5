/* Ops on single rows: embedding, gathering, norm, SiLU product. */
#include "../cuda/formats.cuh"

template <int D, typename T> __global__ void embed_rows(T *out, Matrix w, const int32_t *ids) {
    launch_dependents();
    wait_for_inputs();
    int64_t id = ids[blockIdx.x];
    T *to = out + blockIdx.x * w.cols;
    if (id < 0 || id >= w.rows) {
        for (int64_t c = threadIdx.x; c < w.cols; c += blockDim.x) to[c] = from_float<T>(0.0f);
        return;
    }
    if constexpr (is_quantised(D)) {
        for (int64_t b = threadIdx.x; b < w.cols / 32; b += blockDim.x) {
            float values[32];
            decode_block<D>(w, id, (int)b, values);
            for (int c = 0; c < 32; c++) to[32 * b + c] = from_float<T>(values[c]);
        }
    } else {
        for (int64_t c = threadIdx.x; c < w.cols; c += blockDim.x) to[c] = from_float<T>(value_at<D>(w, id, c));
    }
}

int tops_embed(tops_stream *stream, void *out, const tops_weight *w, const int32_t *ids, int64_t n, int32_t dtype) {
    REQUIRE(format_known(w->dtype), "w: unknown dtype %d", w->dtype);
    if (n <= 0) return TOPS_OK;
    Matrix m = matrix_of(w);
    int status = TOPS_OK;
    BY_STORAGE(dtype, {
        if (is_quantised(w->dtype)) {
            BY_QUANTISED(w->dtype, status = launch(stream, embed_rows<(is_quantised(D) ? D : TOPS_Q8_0), T>, dim3((unsigned)n), dim3(128), 0, 1, static_cast<T *>(out), m, ids))
        } else {
            BY_FLOAT(w->dtype, status = launch(stream, embed_rows<D, T>, dim3((unsigned)n), dim3(128), 0, 1, static_cast<T *>(out), m, ids))
        }
    });
    return status;
}

template <typename T> __global__ void gather(T *out, const T *in, const int32_t *rows, int64_t d) {
    launch_dependents();
    wait_for_inputs();
    const T *from = in + rows[blockIdx.x] * d;
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) out[blockIdx.x * d + c] = from[c];
}

int tops_gather_rows(tops_stream *stream, void *out, const void *in, const int32_t *rows, int64_t n, int64_t d, int32_t dtype) {
    if (n <= 0) return TOPS_OK;
    int status = TOPS_OK;
    BY_STORAGE(dtype, status = launch(stream, gather<T>, dim3((unsigned)n), dim3(256), 0, 1, static_cast<T *>(out), static_cast<const T *>(in), rows, d));
    return status;
}

template <typename T> __global__ void norm_rows(T *out, const T *x, const float *weight, int64_t d, float eps) {
    launch_dependents();
    wait_for_inputs();
    const T *row = x + blockIdx.x * d;
    float sum = 0;
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) sum += to_float(row[c]) * to_float(row[c]);
    float factor = 1.0f / sqrtf(block_sum(sum) / (float)d + eps);
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) out[blockIdx.x * d + c] = from_float<T>(to_float(row[c]) * factor * weight[c]);
}

int tops_rms_norm(tops_stream *stream, void *out, const void *x, const float *weight, int64_t n, int64_t d, float eps, int32_t dtype) {
    if (n <= 0) return TOPS_OK;
    int status = TOPS_OK;
    BY_STORAGE(dtype, status = launch(stream, norm_rows<T>, dim3((unsigned)n), dim3(256), 0, 1, static_cast<T *>(out), static_cast<const T *>(x), weight, d, eps));
    return status;
}

template <typename T> __global__ void silu_products(T *out, const T *x, int64_t n, int64_t i) {
    launch_dependents();
    wait_for_inputs();
    for (int64_t at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; at < n * i; at += (int64_t)gridDim.x * blockDim.x) {
        const T *row = x + at / i * 2 * i;
        out[at] = from_float<T>(silu(to_float(row[at % i])) * to_float(row[i + at % i]));
    }
}

int tops_silu_mul(tops_stream *stream, void *out, const void *x, int64_t n, int64_t i, int32_t dtype) {
    if (n <= 0 || i <= 0) return TOPS_OK;
    int status = TOPS_OK;
    BY_STORAGE(dtype, status = launch(stream, silu_products<T>, dim3((unsigned)min(ceil_div(n * i, 256), (int64_t)8192)), dim3(256), 0, 1,
                                      static_cast<T *>(out), static_cast<const T *>(x), n, i));
    return status;
}
