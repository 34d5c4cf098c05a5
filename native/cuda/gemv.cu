/* Products of up to 16 rows of activations that do not stream (gemv_stream.cuh): f32 storage, f32 and f16 weights, 8-bit activations, odd widths.
 * Each weight is read once, in 16-byte pieces, by one warp for each row of the matrix; the first pieces are requested before the kernel waits for
 * its predecessor: weights never change. */
#include "linear.cuh"

enum { WARPS = 8 };

__device__ inline void find_part(const Product &p, int64_t &row, int &part) {
    part = 0;
    while (part + 1 < p.count && row >= p.parts[part].rows) row -= p.parts[part++].rows;
}

__device__ inline void finish(const Product &p, int64_t place, int64_t t, float sum, float up) {
    if (p.mode == GATE_UP) sum = silu(sum) * up;
    int64_t at = t * p.out_cols + place;
    if (p.out_f32) {
        float *out = static_cast<float *>(p.out);
        out[at] = p.mode == ADD ? out[at] + sum : sum;
    } else {
        __nv_bfloat16 *out = static_cast<__nv_bfloat16 *>(p.out);
        out[at] = __float2bfloat16(p.mode == ADD ? __bfloat162float(out[at]) + sum : sum);
    }
}

/* ---- float weights: CHUNK values in 16 bytes ---- */
template <int D> __device__ constexpr int chunk_values() { return 16 / value_bytes(D); }

template <int D> __device__ inline void chunk_floats(uint4 raw, float (&w)[chunk_values<D>()]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    if (D == TOPS_F32) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = __uint_as_float(words[i]);
    } else if (D == TOPS_BF16) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[2 * i] = __uint_as_float(words[i] << 16);
            w[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    } else if (D == TOPS_F16) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = __half22float2(*reinterpret_cast<const __half2 *>(&words[i]));
            w[2 * i] = pair.x;
            w[2 * i + 1] = pair.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t b = words[i] >> (8 * j);
                w[4 * i + j] = __half2float(__ushort_as_half((uint16_t)((b & 0x80) << 8 | (b & 0x7f) << 7)));   /* times 256 in the block's scale */
            }
    }
}

template <int CHUNK> __device__ inline void inputs_at(const Inputs &x, int64_t at, float (&out)[CHUNK]) {
    if (x.bf16) {
        if (CHUNK == 4) {
            uint2 raw = *reinterpret_cast<const uint2 *>(x.bf16 + at);
            out[0] = __uint_as_float(raw.x << 16); out[1] = __uint_as_float(raw.x & 0xffff0000u);
            out[2] = __uint_as_float(raw.y << 16); out[3] = __uint_as_float(raw.y & 0xffff0000u);
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; i += 8) {
                uint4 raw = *reinterpret_cast<const uint4 *>(x.bf16 + at + i);
                const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    out[i + 2 * j] = __uint_as_float(words[j] << 16);
                    out[i + 2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
                }
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < CHUNK; i += 4) {
            float4 v = *reinterpret_cast<const float4 *>(x.f32 + at + i);
            out[i] = v.x; out[i + 1] = v.y; out[i + 2] = v.z; out[i + 3] = v.w;
        }
    }
}

/* A warp's row of the matrix (or pair of rows: gate and up). */
template <int D, int R> struct FloatRows {
    const uint4 *weights[R];
    const float *scales[R];
    int part;

    __device__ void find(const Product &p, int64_t row, int64_t chunks) {
        part = 0;
        if (R == 1) find_part(p, row, part);
#pragma unroll
        for (int r = 0; r < R; r++) {
            const Matrix &m = p.parts[R == 2 ? r : part];
            weights[r] = reinterpret_cast<const uint4 *>(m.data) + row * chunks;
            scales[r] = D == TOPS_FP8_E4M3 && m.fp8_scales ? m.fp8_scales + row / 128 * ((p.cols + 127) / 128) : nullptr;
        }
    }
};

template <int D, int T, int R> __global__ void __launch_bounds__(WARPS * 32) float_gemv(Product p, Inputs x) {
    constexpr int CHUNK = chunk_values<D>(), AHEAD = R == 2 ? 2 : 4;
    launch_dependents();
    const int lane = threadIdx.x % 32;
    const int64_t rows = R == 2 ? p.parts[0].rows : p.rows, chunks = p.cols / CHUNK, step = gridDim.x * (int64_t)WARPS;
    int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    FloatRows<D, R> at;
    uint4 raw[R][AHEAD];
    auto request = [&](int64_t base) {
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int64_t c = base + a * 32 + lane;
                raw[r][a] = row < rows && c < chunks ? __ldcs(at.weights[r] + c) : make_uint4(0, 0, 0, 0);
            }
    };
    if (row < rows) at.find(p, row, chunks);
    request(0);
    wait_for_inputs();
    while (row < rows) {
        const FloatRows<D, R> here = at;
        const int64_t this_row = row;
        float sum[R][T] = {};
        for (int64_t base = 0; base < chunks; base += AHEAD * 32) {
            uint4 now[R][AHEAD];
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int a = 0; a < AHEAD; a++) now[r][a] = raw[r][a];
            if (base + AHEAD * 32 < chunks) {
                request(base + AHEAD * 32);
            } else {   /* the next row's first pieces travel while this row ends */
                row += step;
                if (row < rows) at.find(p, row, chunks);
                request(0);
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int64_t c = base + a * 32 + lane;
                if (c >= chunks) break;
                float w[R][CHUNK];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    chunk_floats<D>(now[r][a], w[r]);
                    if (D == TOPS_FP8_E4M3) {
                        float scale = 256.0f * (here.scales[r] ? here.scales[r][c * CHUNK / 128] : 1.0f);
#pragma unroll
                        for (int i = 0; i < CHUNK; i++) w[r][i] *= scale;
                    }
                }
#pragma unroll
                for (int t = 0; t < T; t++) {
                    if (t >= p.n) break;
                    float v[CHUNK];
                    inputs_at<CHUNK>(x, t * p.cols + c * CHUNK, v);
#pragma unroll
                    for (int r = 0; r < R; r++)
#pragma unroll
                        for (int i = 0; i < CHUNK; i++) sum[r][t] += w[r][i] * v[i];
                }
            }
        }
        int64_t local = this_row;
        int part = 0;
        if (R == 1) find_part(p, local, part);
#pragma unroll
        for (int t = 0; t < T; t++) {
            if (t >= p.n) break;
            float first = warp_sum(sum[0][t]), second = R == 2 ? warp_sum(sum[R - 1][t]) : 0.0f;
            if (lane == 0) finish(p, p.first_row[part] + local, t, first, second);
        }
    }
}

/* Any width and alignment, a value at a time. */
template <int D> __global__ void __launch_bounds__(WARPS * 32) plain_gemv(Product p, Inputs x) {
    wait_for_inputs();
    const int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32, t = blockIdx.y;
    const bool pair = p.mode == GATE_UP;
    if (row >= (pair ? p.parts[0].rows : p.rows)) return;
    int part = 0;
    if (!pair) find_part(p, row, part);
    float sum[2] = {};
    for (int64_t c = lane; c < p.cols; c += 32) {
        float v = x.bf16 ? __bfloat162float(x.bf16[t * p.cols + c]) : x.f32[t * p.cols + c];
        sum[0] += value_at<D>(p.parts[part], row, c) * v;
        if (pair) sum[1] += value_at<D>(p.parts[1], row, c) * v;
    }
    float first = warp_sum(sum[0]), second = warp_sum(sum[1]);
    if (lane == 0) finish(p, p.first_row[part] + row, t, first, second);
}

/* ---- quantised weights, a block of 32 columns for each lane ---- */
template <int D, int T, int R, bool INTEGERS> __global__ void __launch_bounds__(WARPS * 32) block_gemv(Product p, Inputs x) {
    launch_dependents();
    const int lane = threadIdx.x % 32;
    const int64_t rows = R == 2 ? p.parts[0].rows : p.rows, blocks = p.cols / 32, step = gridDim.x * (int64_t)WARPS;
    int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32, local = row;
    int part = 0;
    uint32_t next[R][8];
    float2 next_first[R], next_second[R];
    auto request = [&](int64_t b) {
        if (row >= rows || b >= blocks) return;
#pragma unroll
        for (int r = 0; r < R; r++) {
            const Matrix &m = p.parts[R == 2 ? r : part];
            load_codes<D>(m, local, (int)b, next[r]);
            next_first[r] = affine<D>(m, local, (int)b, 0);
            next_second[r] = D == TOPS_Q6_K ? affine<D>(m, local, (int)b, 1) : next_first[r];
        }
    };
    if (R == 1 && row < rows) find_part(p, local, part);
    request(lane);
    wait_for_inputs();
    while (row < rows) {
    const int64_t place = p.first_row[part] + local;
    float sum[R][T] = {};
    for (int64_t base = 0; base < blocks; base += 32) {
        const int64_t b = base + lane;
        uint32_t codes[R][8];
        float2 first[R], second[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 8; i++) codes[r][i] = next[r][i];
            first[r] = next_first[r];
            second[r] = next_second[r];
        }
        if (base + 32 < blocks) {
            request(b + 32);
        } else {   /* the next row's first blocks travel while this row ends */
            row += step;
            local = row;
            part = 0;
            if (R == 1 && row < rows) find_part(p, local, part);
            request(lane);
        }
        if (b >= blocks) continue;
        if (INTEGERS) {
#pragma unroll
            for (int r = 0; r < R; r++)
                if (D == TOPS_Q6_K)
#pragma unroll
                    for (int i = 0; i < 8; i++) codes[r][i] = __vsub4(codes[r][i], 0x20202020u);
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (t >= p.n) break;
                const uint4 *at = reinterpret_cast<const uint4 *>(x.q8 + t * p.cols + 32 * b);
                uint4 low = at[0], high = at[1];
                const uint32_t v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                float2 step = x.steps[t * blocks + b];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    int one = 0, two = 0;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        one = __dp4a((int)codes[r][i], (int)v[i], one);
                        two = __dp4a((int)codes[r][i + 4], (int)v[i + 4], two);
                    }
                    if (D == TOPS_Q6_K) sum[r][t] += step.x * (first[r].x * (float)one + second[r].x * (float)two);
                    else if (D == TOPS_Q8_0) sum[r][t] += first[r].x * step.x * (float)(one + two);
                    else sum[r][t] += first[r].x * (step.x * (float)(one + two) - (float)code_offset<D>() * step.y) + first[r].y * step.y;
                }
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float w[R][16];
#pragma unroll
                for (int r = 0; r < R; r++)
#pragma unroll
                    for (int c = 0; c < 16; c++) {
                        uint32_t byte = codes[r][4 * half + c / 4] >> (c % 4 * 8) & 255;
                        int code = D == TOPS_Q8_0 ? (int)(int8_t)byte : (int)byte - code_offset<D>();
                        float2 a = half ? second[r] : first[r];
                        w[r][c] = a.x * (float)code + a.y;
                    }
#pragma unroll
                for (int t = 0; t < T; t++) {
                    if (t >= p.n) break;
                    float v[16];
                    inputs_at<16>(x, t * p.cols + 32 * b + 16 * half, v);
#pragma unroll
                    for (int r = 0; r < R; r++)
#pragma unroll
                        for (int c = 0; c < 16; c++) sum[r][t] += w[r][c] * v[c];
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (t >= p.n) break;
        float one = warp_sum(sum[0][t]), two = R == 2 ? warp_sum(sum[R - 1][t]) : 0.0f;
        if (lane == 0) finish(p, place, t, one, two);
    }
    }
}

#define BY_TOKENS(n, ...) \
    do { \
        if ((n) == 1) { constexpr int T = 1; __VA_ARGS__; } \
        else if ((n) <= 4) { constexpr int T = 4; __VA_ARGS__; } \
        else { constexpr int T = 16; __VA_ARGS__; } \
    } while (0)

int gemv(tops_stream *stream, const Product &product, const Inputs &x, int dtype) {
    const bool pair = product.mode == GATE_UP;
    const int64_t rows = pair ? product.parts[0].rows : product.rows, needed = ceil_div(rows, WARPS);
    if (rows == 0) return TOPS_OK;
    int status = TOPS_OK;
    dim3 block(WARPS * 32);
    if (!is_quantised(dtype) && (product.cols * value_bytes(dtype) % 16 || product.cols % 16)) {
        BY_FLOAT(dtype, status = launch(stream, plain_gemv<D>, dim3((unsigned)needed, (unsigned)product.n), block, 0, 1, product, x))
        return status;
    }
    /* Every warp gets the same number of rows, and two blocks stand on a processor at once: the next kernel's find room beside them
     * and request their first weights while these still run. */
    const int64_t rounds = ceil_div(needed, 132 * 2);
    dim3 grid((unsigned)ceil_div(needed, rounds));
    BY_TOKENS(product.n, {
        if (is_quantised(dtype)) {
            if (x.q8 && pair) { BY_QUANTISED(dtype, status = launch(stream, block_gemv<D, T, 2, true>, grid, block, 0, 1, product, x)) }
            else if (x.q8) { BY_QUANTISED(dtype, status = launch(stream, block_gemv<D, T, 1, true>, grid, block, 0, 1, product, x)) }
            else if (pair) { BY_QUANTISED(dtype, status = launch(stream, block_gemv<D, T, 2, false>, grid, block, 0, 1, product, x)) }
            else { BY_QUANTISED(dtype, status = launch(stream, block_gemv<D, T, 1, false>, grid, block, 0, 1, product, x)) }
        } else if (pair) {
            BY_FLOAT(dtype, status = launch(stream, float_gemv<D, T, 2>, grid, block, 0, 1, product, x))
        } else {
            BY_FLOAT(dtype, status = launch(stream, float_gemv<D, T, 1>, grid, block, 0, 1, product, x))
        }
    });
    return status;
}
