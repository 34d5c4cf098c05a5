/* From rows as files hold them to slots (formats.cuh), and back to f32; rounding f32 to what files hold. */
#include "formats.cuh"

int64_t tops_packed_bytes(int32_t dtype, int64_t rows, int64_t cols) {
    if (!format_known(dtype) || rows < 0 || cols < 0) return -1;
    if (is_quantised(dtype) && cols % (is_super(dtype) ? 256 : 32)) return -1;
    int64_t bytes = rows * cols * value_bytes(dtype);
    BY_QUANTISED(dtype, bytes = ceil_div(rows, SLOT_ROWS) * Slot<D>::across(cols) * Slot<D>::BYTES)
    return ceil_div(bytes, 256) * 256;
}

__device__ inline uint16_t u16_at(const unsigned char *at) { return (uint16_t)(at[0] | at[1] << 8); }

__device__ inline void scale_min(const unsigned char *packed, int j, unsigned char &scale, unsigned char &minimum) {
    if (j < 4) {
        scale = packed[j] & 63;
        minimum = packed[j + 4] & 63;
    } else {
        scale = (unsigned char)((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
        minimum = (unsigned char)(packed[j + 4] >> 4 | (packed[j] >> 6) << 4);
    }
}

/* A block of 32 columns as files hold it: its codes, and what slots have of its scales */
struct FileBlock {
    unsigned char codes[32];
    uint32_t scale, super;
};
template <int D> __device__ inline FileBlock file_block(const unsigned char *in, int64_t block) {
    FileBlock to;
    if (!is_super(D)) {
        constexpr int words = scale_bytes(D) / 2, size = 2 * words + 4 * code_bits(D);
        const unsigned char *at = in + block * size;
        to.scale = u16_at(at) | (words == 2 ? (uint32_t)u16_at(at + 2) << 16 : 0);
        to.super = 0;
        at += 2 * words;
        uint32_t high = 0;
        if (code_bits(D) == 5) {
            high = (uint32_t)u16_at(at) | (uint32_t)u16_at(at + 2) << 16;
            at += 4;
        }
        for (int c = 0; c < 32; c++) to.codes[c] = D == TOPS_Q8_0 ? at[c] : (unsigned char)((at[c % 16] >> (c / 16 * 4) & 15) | (high >> c & 1) << 4);
        return to;
    }
    constexpr int size = D == TOPS_Q4_K ? 144 : D == TOPS_Q5_K ? 176 : 210;
    const unsigned char *at = in + block / 8 * size;
    int s = (int)(block % 8);
    if (D == TOPS_Q6_K) {
        to.super = u16_at(at + 208);
        to.scale = u16_at(at + 192 + 2 * s);
    } else {
        unsigned char scale, minimum;
        scale_min(at + 4, s, scale, minimum);
        to.super = u16_at(at) | (uint32_t)u16_at(at + 2) << 16;
        to.scale = scale | (uint32_t)minimum << 8;
    }
    for (int c = 0; c < 32; c++) {
        if (D == TOPS_Q6_K)
            to.codes[c] = (unsigned char)((at[s / 4 * 64 + s % 2 * 32 + c] >> (s % 4 / 2 * 4) & 15) | (at[128 + s / 4 * 32 + c] >> (s % 4 * 2) & 3) << 4);
        else
            to.codes[c] = (unsigned char)((at[(D == TOPS_Q5_K ? 48 : 16) + s / 2 * 32 + c] >> (s % 2 * 4) & 15)
                                          | (D == TOPS_Q5_K ? (at[16 + c] >> s & 1) << 4 : 0));
    }
    return to;
}

/* A thread for each block of 32 columns, those of padding included; those of a row of a slot stand together, for bits that share a word. */
template <int D> __global__ void pack_blocks(unsigned char *out, const unsigned char *in, int64_t rows, int64_t cols, int64_t blocks) {
    typedef Slot<D> S;
    wait_for_inputs();
    const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, slot = i / (S::BLOCKS * SLOT_ROWS);
    const int r = (int)(i / S::BLOCKS % SLOT_ROWS), b = (int)(i % S::BLOCKS);
    const int64_t row = slot / S::across(cols) * SLOT_ROWS + r, column = (slot % S::across(cols) * S::BLOCKS + b) * 32;
    FileBlock block{};
    if (row < rows && column < cols) block = file_block<D>(in, (row * cols + column) / 32);
    unsigned char *const to = out + slot * S::BYTES;
    const bool writes = i < blocks;
    for (int quad = 0; quad < 4; quad++) {
        uint32_t words[2] = {}, bits[2][2] = {};   /* [plane][half] */
        for (int k = 0; k < 4; k++)
            for (int half = 0; half < 2; half++) {
                const uint32_t code = block.codes[16 * half + 4 * quad + k];
                if (D == TOPS_Q8_0) words[half] |= code << (8 * k);
                else words[0] |= (code & 15) << (8 * k + 4 * half);
                for (int plane = 0; plane < 2; plane++) bits[plane][half] |= (code >> (4 + plane) & 1) << (4 * b + k);
            }
        for (int i = 0; i < (D == TOPS_Q8_0 ? 2 : 1); i++) {
            const int word = D == TOPS_Q8_0 ? 2 * b + i : b;
            if (writes) reinterpret_cast<uint32_t *>(to)[(word / 4 * 32 + 4 * r + quad) * 4 + word % 4] = words[i];
        }
        for (int plane = 0; plane < S::PLANES; plane++)
            for (int half = 0; half < 2; half++) {
                uint32_t all = bits[plane][half];
                for (int step = 1; step < S::BLOCKS; step *= 2) all |= __shfl_xor_sync(0xffffffff, all, step);
                if (writes && b == 0) reinterpret_cast<uint32_t *>(to + S::HIGH)[(plane * 32 + 4 * r + quad) * 2 + half] = all;
            }
    }
    if (!writes) return;
    const int at = r * S::BLOCKS + S::place(b);
    if (scale_bytes(D) == 4) reinterpret_cast<uint32_t *>(to + S::SCALES)[at] = block.scale;
    else reinterpret_cast<uint16_t *>(to + S::SCALES)[at] = (uint16_t)block.scale;
    if (b || !is_super(D)) return;
    if (D == TOPS_Q6_K) reinterpret_cast<uint16_t *>(to + S::SUPERS)[r] = (uint16_t)block.super;
    else reinterpret_cast<uint32_t *>(to + S::SUPERS)[r] = block.super;
}

int tops_pack(tops_stream *stream, void *out, const void *in, int32_t dtype, int64_t rows, int64_t cols) {
    if (tops_packed_bytes(dtype, rows, cols) < 0)
        return tops_fail(TOPS_UNSUPPORTED, "dtype: no packed layout for dtype %d with %lld x %lld", dtype, (long long)rows, (long long)cols);
    if (rows == 0 || cols == 0) return TOPS_OK;
    if (!is_quantised(dtype)) {
        CUDA(cudaMemcpyAsync(out, in, (size_t)(rows * cols * value_bytes(dtype)), cudaMemcpyDeviceToDevice, stream->cuda));
        return TOPS_OK;
    }
    int status = TOPS_OK;
    BY_QUANTISED(dtype, const int64_t blocks = ceil_div(rows, SLOT_ROWS) * SLOT_ROWS * Slot<D>::across(cols) * Slot<D>::BLOCKS;
                 status = launch(stream, pack_blocks<D>, dim3((unsigned)ceil_div(blocks, 128)), dim3(128), 0, 1, static_cast<unsigned char *>(out),
                                 static_cast<const unsigned char *>(in), rows, cols, blocks))
    return status;
}

int32_t tops_reads_in_place(int32_t, int64_t) { return 0; }   /* a file is in the host's memory */

template <int D> __global__ void unpack_quantised(float *out, Matrix w, int64_t first, int64_t blocks) {
    wait_for_inputs();
    int64_t block = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, across = w.cols / 32;
    if (block >= blocks) return;
    float values[32];
    decode_block<D>(w, first + block / across, (int)(block % across), values);
    for (int c = 0; c < 32; c++) out[32 * block + c] = values[c];
}
template <int D> __global__ void unpack_floats(float *out, Matrix w, int64_t first, int64_t count) {
    wait_for_inputs();
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i < count * w.cols) out[i] = value_at<D>(w, first + i / w.cols, i % w.cols);
}

int tops_unpack_rows(tops_stream *stream, float *out, const tops_weight *w, int64_t first, int64_t count) {
    REQUIRE(tops_packed_bytes(w->dtype, w->rows, w->cols) >= 0, "w: no packed layout for dtype %d with %lld columns", w->dtype, (long long)w->cols);
    REQUIRE(first >= 0 && count >= 0 && first + count <= w->rows, "rows: %lld..%lld of %lld", (long long)first, (long long)(first + count), (long long)w->rows);
    int64_t values = count * w->cols;
    if (values == 0) return TOPS_OK;
    Matrix m = matrix_of(w);
    int status = TOPS_OK;
    if (is_quantised(w->dtype)) {
        BY_QUANTISED(w->dtype, status = launch(stream, unpack_quantised<D>, dim3((unsigned)ceil_div(values / 32, 128)), dim3(128), 0, 1, out, m, first, values / 32))
    } else {
        BY_FLOAT(w->dtype, status = launch(stream, unpack_floats<D>, dim3((unsigned)ceil_div(values, 256)), dim3(256), 0, 1, out, m, first, count))
    }
    return status;
}

/* ---- rounding ---- */
__global__ void quantize_blocks(unsigned char *out, const float *in, int64_t blocks, bool q8) {
    wait_for_inputs();
    int64_t block = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (block >= blocks) return;
    const float *x = in + 32 * block;
    unsigned char *to = out + block * (q8 ? 34 : 18);
    float most = 0, signed_most = 0;
    for (int c = 0; c < 32; c++)
        if (fabsf(x[c]) > most) {
            most = fabsf(x[c]);
            signed_most = x[c];
        }
    float scale = q8 ? most / 127 : signed_most / -8, inverse = scale != 0 ? 1 / scale : 0;
    *reinterpret_cast<__half *>(to) = __float2half(scale);   /* blocks are an even number of bytes */
    for (int c = 0; c < (q8 ? 32 : 16); c++) {
        if (q8) {
            to[2 + c] = (unsigned char)(int8_t)roundf(x[c] * inverse);
        } else {
            /* Two roundings, as on the CPU: fused into one, a value in the middle between two codes would get the other. */
            auto code = [&](float value) { return min((int)__fadd_rn(__fmul_rn(value, inverse), 8.5f), 15); };
            int low = code(x[c]), high = code(x[c + 16]);
            to[2 + c] = (unsigned char)(low | high << 4);
        }
    }
}

int tops_quantize(tops_stream *stream, void *out, const float *in, int32_t dtype, int64_t rows, int64_t cols) {
    if (dtype == TOPS_F16 || dtype == TOPS_BF16) return tops_convert(stream, out, dtype, in, TOPS_F32, rows * cols);
    REQUIRE_SUPPORTED(dtype == TOPS_Q8_0 || dtype == TOPS_Q4_0, "dtype: rounds to Q8_0, Q4_0, f16 and bf16, not %d", dtype);
    REQUIRE(cols % 32 == 0, "cols: must be a multiple of 32, not %lld", (long long)cols);
    int64_t blocks = rows * cols / 32;
    if (blocks == 0) return TOPS_OK;
    return launch(stream, quantize_blocks, dim3((unsigned)ceil_div(blocks, 128)), dim3(128), 0, 1, static_cast<unsigned char *>(out), in, blocks, dtype == TOPS_Q8_0);
}

template <typename Out, typename In> __global__ void convert_values(Out *out, const In *in, int64_t count) {
    wait_for_inputs();
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) out[i] = from_float<Out>(to_float(in[i]));
}
template <typename Out> static int convert_to(tops_stream *stream, void *out, const void *in, int in_dtype, int64_t count) {
    dim3 grid((unsigned)min(ceil_div(count, 256), (int64_t)4096)), block(256);
    if (in_dtype == TOPS_F32) return launch(stream, convert_values<Out, float>, grid, block, 0, 1, static_cast<Out *>(out), static_cast<const float *>(in), count);
    if (in_dtype == TOPS_F16) return launch(stream, convert_values<Out, __half>, grid, block, 0, 1, static_cast<Out *>(out), static_cast<const __half *>(in), count);
    return launch(stream, convert_values<Out, __nv_bfloat16>, grid, block, 0, 1, static_cast<Out *>(out), static_cast<const __nv_bfloat16 *>(in), count);
}

int tops_convert(tops_stream *stream, void *out, int32_t out_dtype, const void *in, int32_t in_dtype, int64_t count) {
    for (int i = 0; i < 2; i++) {
        int dtype = i ? in_dtype : out_dtype;
        REQUIRE(dtype == TOPS_F32 || dtype == TOPS_F16 || dtype == TOPS_BF16, "%s_dtype: must be f32, f16 or bf16, not %d", i ? "in" : "out", dtype);
    }
    if (count <= 0) return TOPS_OK;
    if (out_dtype == TOPS_F32) return convert_to<float>(stream, out, in, in_dtype, count);
    if (out_dtype == TOPS_F16) return convert_to<__half>(stream, out, in, in_dtype, count);
    return convert_to<__nv_bfloat16>(stream, out, in, in_dtype, count);
}
