/* Linear layers: rows are prepared once (normed, rounded); a few go to gemv.cu, many to gemm.cu. */
#include "../cuda/linear.cuh"
#include "../cuda/ring.cuh"

enum { FEW = 16 };

/* A block for each 1024 columns of a row; each of them sums the whole row for its norm, which costs less than another kernel. */
template <typename T>
__global__ void prepare_rows(__nv_bfloat16 *bf16, float *f32, int8_t *q8, float2 *steps, const T *x, const float *norm, int64_t d, float eps, bool round) {
    launch_dependents();
    wait_for_inputs();
    const int64_t t = blockIdx.y, c = blockIdx.x * 1024 + threadIdx.x;
    const T *row = x + t * d;
    float value = c < d ? to_float(row[c]) : 0.0f;
    if (norm) {
        const float weight = c < d ? norm[c] : 0.0f;
        float sum = 0;
        for (int64_t i = threadIdx.x; i < d; i += 1024) sum += to_float(row[i]) * to_float(row[i]);
        value *= 1.0f / sqrtf(block_sum(sum) / (float)d + eps) * weight;
    }
    if (round) value = __bfloat162float(__float2bfloat16(value));
    if (c < d && bf16) bf16[t * d + c] = __float2bfloat16(value);
    if (c < d && f32) f32[t * d + c] = value;
    if (!q8) return;
    float most = warp_max(fabsf(value)), code = rintf(value * (most > 0 ? 127.0f / most : 0.0f)), sum = warp_sum(code);   /* a warp is a group of 32 */
    if (c >= d) return;
    q8[t * d + c] = (int8_t)code;
    if (threadIdx.x % 32 == 0) steps[(t * d + c) / 32] = make_float2(most / 127.0f, most / 127.0f * sum);
}

template <int D> __global__ void decode_rows(__nv_bfloat16 *out, Matrix w, int64_t blocks) {
    launch_dependents();
    wait_for_inputs();
    const int64_t block = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, across = w.cols / 32;
    if (block >= blocks) return;
    float values[32];
    decode_block<D>(w, block / across, (int)(block % across), values);
    uint4 packed[4];
    __nv_bfloat162 *pairs = reinterpret_cast<__nv_bfloat162 *>(packed);
#pragma unroll
    for (int i = 0; i < 16; i++) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 4; i++) reinterpret_cast<uint4 *>(out + 32 * block)[i] = packed[i];
}
template <int D> __global__ void convert_rows(__nv_bfloat16 *out, Matrix w, int64_t count) {
    launch_dependents();
    wait_for_inputs();
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
        out[i] = __float2bfloat16(value_at<D>(w, i / w.cols, i % w.cols));
}

/* The matrix as bf16: itself, or decoded into scratch. */
static int as_bf16(tops_stream *stream, const __nv_bfloat16 **out, const tops_weight *w, int64_t first, int64_t rows, __nv_bfloat16 *scratch) {
    Matrix m = matrix_of(w);
    if (w->dtype == TOPS_BF16) {
        *out = reinterpret_cast<const __nv_bfloat16 *>(m.data) + first * w->cols;
        return TOPS_OK;
    }
    *out = scratch;
    int status = TOPS_OK;
    int64_t values = rows * w->cols, skipped = first * w->cols;
    if (is_quantised(w->dtype)) {
        BY_QUANTISED(w->dtype, m.data = slot_of<D>(m, first, 0);   /* `first` is a multiple of 256 rows */
                     status = launch(stream, decode_rows<D>, dim3((unsigned)ceil_div(values / 32, 256)), dim3(256), 0, 1, scratch, m, values / 32))
    } else {
        m.data += skipped * value_bytes(w->dtype);
        if (m.fp8_scales) m.fp8_scales += first / 128 * ceil_div(w->cols, 128);
        BY_FLOAT(w->dtype, status = launch(stream, convert_rows<D>, dim3((unsigned)min(ceil_div(values, 256), (int64_t)8192)), dim3(256), 0, 1, scratch, m, values))
    }
    return status;
}

/* Many rows: tensor cores, a piece of each matrix at a time so that decoded weights fit into scratch. */
static int run_many(tops_stream *stream, void *out, int64_t out_cols, bool out_f32, bool add, const __nv_bfloat16 *x, const tops_weight *w, int parts,
                    int64_t n, Scratch scratch) {
    int64_t piece = 8192, cols = w[0].cols, row = 0;
    bool decode = false;
    for (int i = 0; i < parts; i++) decode = decode || w[i].dtype != TOPS_BF16;
    __nv_bfloat16 *decoded = nullptr;
    if (decode) {
        decoded = scratch.take<__nv_bfloat16>(piece * cols);
        REQUIRE_SCRATCH(decoded);
    }
    for (int i = 0; i < parts; i++) {
        int64_t step = w[i].dtype == TOPS_BF16 ? w[i].rows : piece;
        for (int64_t first = 0; first < w[i].rows; first += step) {
            int64_t rows = w[i].rows - first < step ? w[i].rows - first : step;
            const __nv_bfloat16 *values = nullptr;
            int status = as_bf16(stream, &values, w + i, first, rows, decoded);
            if (status) return status;
            int64_t place = row + first;
            void *to = static_cast<char *>(out) + place * (out_f32 ? 4 : 2);
            if (gemm_hopper_supports(stream, x, values, cols)) status = gemm_hopper(stream, to, out_cols, out_f32, add, x, values, nullptr, n, rows, cols);
            else status = gemm(stream, to, out_cols, out_f32, add, x, values, n, rows, cols);
            if (status) return status;
        }
        row += w[i].rows;
    }
    return TOPS_OK;
}

/* Gate and up in one product, whose blocks store silu(gate) * up. */
static int run_gate_up(tops_stream *stream, void *out, const __nv_bfloat16 *x, const tops_weight *w, int64_t n, Scratch scratch) {
    const int64_t cols = w->cols, step = w[0].dtype == TOPS_BF16 && w[1].dtype == TOPS_BF16 ? w->rows : 4096;
    __nv_bfloat16 *decoded[2] = {};
    for (int i = 0; i < 2; i++)
        if (w[i].dtype != TOPS_BF16) REQUIRE_SCRATCH(decoded[i] = scratch.take<__nv_bfloat16>(step * cols));
    for (int64_t first = 0; first < w->rows; first += step) {
        const int64_t rows = w->rows - first < step ? w->rows - first : step;
        const __nv_bfloat16 *values[2];
        int status = TOPS_OK;
        for (int i = 0; i < 2 && !status; i++) status = as_bf16(stream, &values[i], w + i, first, rows, decoded[i]);
        if (!status) status = gemm_hopper(stream, static_cast<__nv_bfloat16 *>(out) + first, w->rows, false, false, x, values[0], values[1], n, rows, cols);
        if (status) return status;
    }
    return TOPS_OK;
}

/* Up to FEW rows at a time, with one launch for neighbours in one format and one kind of activations. */
static int run_few(tops_stream *stream, void *out, const tops_weight *w, int parts, int64_t n, int mode, bool out_f32, const Inputs &in) {
    const int64_t cols = w->cols;
    int64_t rows = 0;
    int status = TOPS_OK;
    for (int i = 0; i < parts; i++) rows += w[i].rows;
    for (int64_t first = 0; first < n; first += FEW) {
        int64_t tokens = n - first < FEW ? n - first : FEW;
        Inputs here{in.bf16 ? in.bf16 + first * cols : nullptr, in.f32 ? in.f32 + first * cols : nullptr, in.q8 ? in.q8 + first * cols : nullptr,
                    in.steps ? in.steps + first * cols / 32 : nullptr};
        int64_t out_cols = mode == GATE_UP ? w->rows : rows, row = 0;
        for (int i = 0; i < parts;) {
            Product product{};
            product.mode = mode;
            product.out = static_cast<char *>(out) + first * out_cols * (out_f32 ? 4 : 2);
            product.out_f32 = out_f32;
            product.out_cols = out_cols;
            product.cols = cols;
            product.n = tokens;
            int begin = i;
            do {
                product.parts[product.count] = matrix_of(w + i);
                product.first_row[product.count++] = row;
                product.rows += w[i].rows;
                row += w[i].rows;
                i++;
            } while (i < parts && w[i].dtype == w[begin].dtype && (w[i].activations == TOPS_Q8_0) == (w[begin].activations == TOPS_Q8_0));
            REQUIRE_SUPPORTED(mode != GATE_UP || product.count == 2, "w: gate and up must be in one format");
            bool q8 = w[begin].activations == TOPS_Q8_0 && is_quantised(w[begin].dtype);
            Inputs used{q8 ? nullptr : here.bf16, q8 ? nullptr : here.f32, q8 ? here.q8 : nullptr, q8 ? here.steps : nullptr};
            if ((status = gemv(stream, product, used, w[begin].dtype))) return status;
        }
    }
    return TOPS_OK;
}

/* Whether the streaming kernels (gemv_stream.cuh) take these matrices: they norm and lay out rows of x for themselves. */
static bool streams(const tops_weight *w, int parts, int64_t n, bool norm, int dtype) {
    if (dtype != TOPS_BF16 || n > FEW || w->cols % 8 || (norm && w->cols > STREAM_NORM_MOST)) return false;
    for (int i = 0; i < parts; i++)
        if (!ring_supports(w + i) || (is_quantised(w[i].dtype) && w[i].activations == TOPS_Q8_0)) return false;
    return true;
}

static int stream_product(tops_stream *stream, const Product &product, const Product *kept, int format) {
    if (!is_quantised(format)) return gemv_stream_floats(stream, product, kept, format);
    return code_bits(format) == 4 ? gemv_stream_small(stream, product, kept, format) : gemv_stream_wide(stream, product, kept, format);
}

static int run_streams(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int parts, int64_t n, float eps, int mode, bool out_f32) {
    Product groups[4] = {};
    int formats[4], count = 0;
    int64_t rows = 0, row = 0;
    for (int i = 0; i < parts; i++) rows += w[i].rows;
    for (int i = 0; i < parts; count++) {
        Product &product = groups[count];
        product.mode = mode;
        product.out = out;
        product.out_f32 = out_f32;
        product.out_cols = mode == GATE_UP ? w->rows : rows;
        product.cols = w->cols;
        product.n = n;
        product.x = x;
        product.norm = norm;
        product.eps = eps;
        product.per_column = 1.0f / (float)w->cols;
        formats[count] = w[i].dtype;
        do {   /* neighbours in one format go together */
            product.parts[product.count] = matrix_of(w + i);
            product.first_row[product.count++] = row;
            product.rows += w[i].rows;
            row += w[i].rows;
            i++;
        } while (i < parts && w[i].dtype == formats[count]);
        if (mode == GATE_UP && product.count != 2) return TOPS_UNSUPPORTED;
    }
    for (int i = 0; i < count; i++) {
        if (!groups[i].rows) continue;
        const bool with_next = i + 1 < count && formats[i] != TOPS_BF16 && formats[i + 1] == TOPS_BF16 && groups[i + 1].rows > 0 && groups[i + 1].rows <= 1024;
        int status = stream_product(stream, groups[i], with_next ? &groups[i + 1] : nullptr, formats[i]);
        if (status) return status;
        i += with_next;
    }
    return TOPS_OK;
}

static int run(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int parts, int64_t n, float eps, int dtype, int mode) {
    REQUIRE(n >= 0, "n: must be at least 0, not %lld", (long long)n);
    REQUIRE(parts >= 1 && parts <= 4, "parts: must be in 1..4, not %d", parts);
    REQUIRE(n < 65536, "n: at most 65535 rows in a step, not %lld", (long long)n);
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    const int64_t cols = w->cols;
    int64_t rows = 0;
    bool round = dtype == TOPS_BF16, integers = false, others = false;
    for (int i = 0; i < parts; i++) {
        REQUIRE(w[i].cols == cols, "w[%d].cols: must be %lld as in the first part, not %lld", i, (long long)cols, (long long)w[i].cols);
        REQUIRE(tops_packed_bytes(w[i].dtype, w[i].rows, cols) >= 0, "w[%d]: no kernel for dtype %d with %lld columns", i, w[i].dtype, (long long)cols);
        rows += w[i].rows;
        bool q8 = w[i].activations == TOPS_Q8_0 && is_quantised(w[i].dtype);
        integers = integers || q8;
        others = others || !q8;
        round = round || w[i].activations == TOPS_BF16;
    }
    if (n == 0 || rows == 0) return TOPS_OK;
    int status = TOPS_OK;
    const bool out_f32 = mode == STORE_F32 || dtype == TOPS_F32;
    const bool many = n > FEW && round && cols % 8 == 0 && dtype == TOPS_BF16;
    if (many) integers = false, others = true;

    if (!many && streams(w, parts, n, norm != nullptr, dtype)) {
        status = run_streams(stream, out, x, norm, w, parts, n, eps, mode, out_f32);
        if (status != TOPS_UNSUPPORTED) return status;   /* otherwise the inputs do not fit into shared memory */
        status = TOPS_OK;
    }

    Scratch scratch(stream);
    Inputs in{};
    if (others && round && dtype == TOPS_BF16 && !norm) in.bf16 = static_cast<const __nv_bfloat16 *>(x);
    else if (others && round) REQUIRE_SCRATCH(in.bf16 = scratch.take<__nv_bfloat16>(n * cols));
    else if (others) REQUIRE_SCRATCH(in.f32 = scratch.take<float>(n * cols));
    if (integers) {
        in.q8 = scratch.take<int8_t>(n * cols);
        REQUIRE_SCRATCH(in.steps = scratch.take<float2>(n * cols / 32));
    }
    if (integers || in.f32 || static_cast<const void *>(in.bf16) != x)
        BY_STORAGE(dtype, status = launch(stream, prepare_rows<T>, dim3((unsigned)ceil_div(cols, 1024), (unsigned)n), dim3(1024), 0, 1,
                                          static_cast<const void *>(in.bf16) == x ? nullptr : const_cast<__nv_bfloat16 *>(in.bf16), const_cast<float *>(in.f32),
                                          const_cast<int8_t *>(in.q8), const_cast<float2 *>(in.steps), static_cast<const T *>(x), norm, cols, eps, round));
    if (status) return status;

    if (many && mode == GATE_UP && gemm_hopper_supports(stream, in.bf16, w->data, cols)) return run_gate_up(stream, out, in.bf16, w, n, scratch);
    if (many && mode == GATE_UP) {
        __nv_bfloat16 *both = scratch.take<__nv_bfloat16>(n * rows);
        REQUIRE_SCRATCH(both);
        if ((status = run_many(stream, both, rows, false, false, in.bf16, w, parts, n, scratch))) return status;
        return tops_silu_mul(stream, out, both, n, rows / 2, dtype);
    }
    if (many) return run_many(stream, out, rows, out_f32, mode == ADD, in.bf16, w, parts, n, scratch);
    return run_few(stream, out, w, parts, n, mode, out_f32, in);
}

int tops_linear(tops_stream *stream, void *out, const void *x, const tops_weight *w, int32_t parts, int64_t n, int32_t dtype) {
    return run(stream, out, x, nullptr, w, parts, n, 0, dtype, STORE);
}
int tops_linear_add(tops_stream *stream, void *out, const void *x, const tops_weight *w, int64_t n, int32_t dtype) {
    return run(stream, out, x, nullptr, w, 1, n, 0, dtype, ADD);
}
int tops_rms_norm_linear(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                         int64_t n, float eps, int32_t dtype) {
    return run(stream, out, x, norm, w, parts, n, eps, dtype, STORE);
}
int tops_rms_norm_linear_f32(tops_stream *stream, float *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                             int64_t n, float eps, int32_t dtype) {
    return run(stream, out, x, norm, w, parts, n, eps, dtype, STORE_F32);
}
int tops_rms_norm_gate_up_silu(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w,
                               int64_t n, float eps, int32_t dtype) {
    REQUIRE(w[0].rows == w[1].rows, "w: gate and up must have equal rows, not %lld and %lld", (long long)w[0].rows, (long long)w[1].rows);
    return run(stream, out, x, norm, w, 2, n, eps, dtype, GATE_UP);
}
