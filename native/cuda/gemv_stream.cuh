/* Products of up to four rows of activations, the decode step's work: every multiprocessor streams an equal share of the matrix's rows
 * through its warps' rings (ring.cuh), and the inputs are normed, rounded and laid out in shared memory by each block for itself while
 * the first weights are on their way. */
#pragma once

#include "linear.cuh"
#include "ring.cuh"

namespace stream {
constexpr int WARPS = 16, THREADS = WARPS * 32, KEPT = 2, NORM_MOST = THREADS * 4 * KEPT;

struct Shape {
    int rows;      /* of the output for each block */
    int split;     /* warps that share a row */
    int padded;    /* columns, up to whole slots */
};

#ifdef __CUDACC__
__device__ inline float4 load_row4(const void *x, bool f32, int64_t at) {
    if (f32) return __ldcg(reinterpret_cast<const float4 *>(static_cast<const float *>(x) + at));
    uint2 raw = __ldcg(reinterpret_cast<const uint2 *>(static_cast<const __nv_bfloat16 *>(x) + at));
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
}
__device__ inline float bf16_of(float x) { return __bfloat162float(__float2bfloat16(x)); }

/* Inputs in shared memory. Float weights: planes of float4 [t][piece's quarter][piece], a piece being 16 bytes of weights.
 * Integers: planes of 16 bytes [t][half][block], then float2 (scale, scale * sum) [t][block]. */
template <int D> __host__ __device__ constexpr int input_bytes(int padded) { return is_quantised(D) ? padded + padded / 4 : padded * 4; }

template <int D> __device__ inline void keep_input(unsigned char *inputs, int padded, int tokens, int t, int q, float4 v) {
    if (!is_quantised(D)) {
        constexpr int EACH = 16 / value_bytes(D);   /* values of a piece */
        float4 *planes = reinterpret_cast<float4 *>(inputs) + t * (padded / 4);
        planes[4 * q % EACH / 4 * (padded / EACH) + 4 * q / EACH] = v;
        return;
    }
    float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
    for (int step = 4; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, step));
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    const float a = rintf(v.x * inverse), b = rintf(v.y * inverse), c = rintf(v.z * inverse), d = rintf(v.w * inverse);
    float sum = a + b + c + d;
#pragma unroll
    for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    const int blocks = padded / 32, block = q / 8, word = q % 8;
    uint32_t *codes = reinterpret_cast<uint32_t *>(inputs + t * padded);
    codes[(word / 4 * blocks + block) * 4 + word % 4] =
        (uint32_t)(uint8_t)(int8_t)a | (uint32_t)(uint8_t)(int8_t)b << 8 | (uint32_t)(uint8_t)(int8_t)c << 16 | (uint32_t)(uint8_t)(int8_t)d << 24;
    float2 *steps = reinterpret_cast<float2 *>(inputs + tokens * padded) + t * blocks;
    if (word == 0) steps[block] = make_float2(most / 127.0f, most / 127.0f * sum);
}

/* Norm, round and lay out the rows of x. Waits for them; the norm's weights are older. */
template <int D, int T> __device__ inline void take_inputs(unsigned char *inputs, const Product &p, int padded) {
    __shared__ float sums[WARPS][T];
    const int quads = (int)(p.cols / 4);
    float4 norm[KEPT], kept[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        int q = threadIdx.x + i * THREADS;
        norm[i] = p.norm && q < quads ? __ldg(reinterpret_cast<const float4 *>(p.norm) + q) : make_float4(1, 1, 1, 1);
    }
    wait_for_inputs();
    float factor[T];
#pragma unroll
    for (int t = 0; t < T; t++) factor[t] = 1.0f;
    if (p.norm) {
#pragma unroll
        for (int t = 0; t < T; t++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < KEPT; i++) {
                int q = threadIdx.x + i * THREADS;
                float4 v = t < p.n && q < quads ? load_row4(p.x, p.x_f32, t * p.cols + 4 * q) : make_float4(0, 0, 0, 0);
                if (T == 1) kept[i] = v;
                sum += dot(v, v);
            }
            sum = warp_sum(sum);
            if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][t] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < T; t++) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += sums[w][t];
            factor[t] = 1.0f / sqrtf(total / (float)p.cols + p.eps);
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (t >= p.n) break;
        auto put = [&](int q, float4 v, float4 scale) {
            v = make_float4(v.x * factor[t] * scale.x, v.y * factor[t] * scale.y, v.z * factor[t] * scale.z, v.w * factor[t] * scale.w);
            if (p.round) v = make_float4(bf16_of(v.x), bf16_of(v.y), bf16_of(v.z), bf16_of(v.w));
            keep_input<D>(inputs, padded, T, t, q, v);
        };
        if (p.norm) {
#pragma unroll
            for (int i = 0; i < KEPT; i++) {
                int q = threadIdx.x + i * THREADS;
                if (q >= padded / 4) break;   /* whole warps: padded is a multiple of 128 */
                float4 v = T == 1 ? kept[i] : q < quads ? load_row4(p.x, p.x_f32, t * p.cols + 4 * q) : make_float4(0, 0, 0, 0);
                put(q, v, norm[i]);
            }
        } else {
#pragma unroll 4
            for (int q = threadIdx.x; q < padded / 4; q += THREADS)
                put(q, q < quads ? load_row4(p.x, p.x_f32, t * p.cols + 4 * q) : make_float4(0, 0, 0, 0), make_float4(1, 1, 1, 1));
        }
    }
    __syncthreads();
}

/* 16 bytes of weights as floats; fp8 256 times too small. */
template <int D> __device__ inline void piece_floats(uint4 raw, float (&w)[16 / value_bytes(D)]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (D == TOPS_F32) {
            w[i] = __uint_as_float(words[i]);
        } else if (D == TOPS_BF16) {
            w[2 * i] = __uint_as_float(words[i] << 16);
            w[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        } else if (D == TOPS_F16) {
            float2 pair = __half22float2(*reinterpret_cast<const __half2 *>(&words[i]));
            w[2 * i] = pair.x;
            w[2 * i + 1] = pair.y;
        } else {
            const uint32_t left = words[i] << 8, right = words[i];   /* bytes 0 and 2, 1 and 3, in the upper bytes of halves */
            const uint32_t even = (left & 0x7f007f00u) >> 1 | (left & 0x80008000u), odd = (right & 0x7f007f00u) >> 1 | (right & 0x80008000u);
            float2 a = __half22float2(*reinterpret_cast<const __half2 *>(&even)), b = __half22float2(*reinterpret_cast<const __half2 *>(&odd));
            w[4 * i] = a.x;
            w[4 * i + 1] = b.x;
            w[4 * i + 2] = a.y;
            w[4 * i + 3] = b.y;
        }
    }
}

/* A lane's part of a slot times the inputs. */
template <int D, int T> __device__ inline void multiply_slot(float (&sum)[T], const unsigned char *slot, const unsigned char *inputs, int padded, int chunk, int n) {
    const int lane = threadIdx.x % 32, at = chunk * 32 + lane;
    if constexpr (!is_quantised(D)) {
        constexpr int EACH = 16 / value_bytes(D);
        float w[EACH];
        piece_floats<D>(*reinterpret_cast<const uint4 *>(slot + lane * 16), w);
        const float scale = D == TOPS_FP8_E4M3 ? 256.0f * reinterpret_cast<const float *>(slot + Slot<D>::SCALES)[lane / 8] : 1.0f;
#pragma unroll
        for (int t = 0; t < T; t++) {
            if (t >= n) break;
            const float4 *planes = reinterpret_cast<const float4 *>(inputs) + t * (padded / 4) + at;
            float part[2] = {};
#pragma unroll
            for (int i = 0; i < EACH / 4; i++) {
                float4 v = planes[i * (padded / EACH)];
                part[i % 2] += w[4 * i] * v.x + w[4 * i + 1] * v.y + w[4 * i + 2] * v.z + w[4 * i + 3] * v.w;
            }
            sum[t] += scale * (part[0] + part[1]);
        }
    } else {
        uint32_t codes[8];
        slot_codes<D>(slot, lane, codes);
        const float2 first = slot_affine<D>(slot, lane, 0), second = D == TOPS_Q6_K ? slot_affine<D>(slot, lane, 1) : first;
        const int blocks = padded / 32;
#pragma unroll
        for (int t = 0; t < T; t++) {
            if (t >= n) break;
            const uint4 *planes = reinterpret_cast<const uint4 *>(inputs + t * padded);
            const uint4 low = planes[at], high = planes[blocks + at];
            const float2 step = (reinterpret_cast<const float2 *>(inputs + T * padded) + t * blocks)[at];
            const uint32_t v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            int one = 0, two = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                one = __dp4a((int)codes[i], (int)v[i], one);
                two = __dp4a((int)codes[i + 4], (int)v[i + 4], two);
            }
            if (D == TOPS_Q6_K) sum[t] += step.x * (first.x * (float)one + second.x * (float)two);
            else if (D == TOPS_Q8_0) sum[t] += first.x * step.x * (float)(one + two);
            else sum[t] += first.x * (step.x * (float)(one + two) - (float)code_offset<D>() * step.y) + first.y * step.y;
        }
    }
}

template <int D, int T, bool PAIR> __global__ void __launch_bounds__(THREADS, T == 1 ? 2 : 1) gemv_kernel(Product p, Shape s) {
    constexpr int R = PAIR ? 2 : 1, STAGES = Slot<D>::STAGES, BYTES = Slot<D>::BYTES;
    extern __shared__ __align__(128) unsigned char memory[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char *ring = memory + warp * STAGES * BYTES, *inputs = memory + WARPS * STAGES * BYTES;
    float *partial = reinterpret_cast<float *>(inputs + T * input_bytes<D>(s.padded));   /* [row][matrix][split][t] */
    const int64_t all = PAIR ? p.parts[0].rows : p.rows, first_row = blockIdx.x * (int64_t)s.rows;
    const int rows = (int)min((int64_t)s.rows, all - first_row), items = rows * R * s.split, chunks = s.padded / Slot<D>::VALUES;

    /* An item is a row of a matrix, or one of `split` parts of it. The warp asks for its items' slots in order, STAGES ahead. */
    int asked = warp, slots_left = 0;
    Source<D> source{};
    auto begin = [&]() {
        if (asked >= items) return;
        const int piece = asked % s.split, line = asked / s.split, chunk = piece * chunks / s.split;
        slots_left = (piece + 1) * chunks / s.split - chunk;
        int64_t row = first_row + line / R;
        int part = PAIR ? line % R : 0;
        if (!PAIR) while (part + 1 < p.count && row >= p.parts[part].rows) row -= p.parts[part++].rows;
        source.begin(p.parts[part], row, chunk, lane);
    };
    auto ask = [&](unsigned char *slot) {
        if (asked < items) {
            source.fetch(slot, lane);
            if (--slots_left == 0) {
                asked += WARPS;
                begin();
            }
        }
        copies_commit();
    };
    begin();
#pragma unroll
    for (int slot = 0; slot < STAGES; slot++) ask(ring + slot * BYTES);

    take_inputs<D, T>(inputs, p, s.padded);
    const bool adds = p.mode == ADD && (int)threadIdx.x < rows * T;
    float before = 0;   /* the residual of the output that this thread will write first */
    auto place_of = [&](int index) {
        int64_t line = first_row + index / T;
        int of = 0;
        if (!PAIR) while (of + 1 < p.count && line >= p.parts[of].rows) line -= p.parts[of++].rows;
        return (index % T) * p.out_cols + p.first_row[of] + line;
    };
    auto residual = [&](int64_t at) { return p.out_f32 ? __ldcg(static_cast<const float *>(p.out) + at) : __bfloat162float(__ldcg(static_cast<const __nv_bfloat16 *>(p.out) + at)); };
    if (adds && (int)threadIdx.x % T < p.n) before = residual(place_of(threadIdx.x));

    unsigned char *slot = ring;
    for (int item = warp; item < items; item += WARPS) {
        const int piece = item % s.split, end = (piece + 1) * chunks / s.split;
        float sum[T] = {};
        for (int chunk = piece * chunks / s.split; chunk < end; chunk++) {
            copies_wait<STAGES - 1>();
            if (Slot<D>::SHARED) __syncwarp();
            multiply_slot<D, T>(sum, slot, inputs, s.padded, chunk, (int)p.n);
            if (Slot<D>::SHARED) __syncwarp();
            ask(slot);
            slot = slot + BYTES == ring + STAGES * BYTES ? ring : slot + BYTES;
        }
#pragma unroll
        for (int t = 0; t < T; t++) {
            sum[t] = warp_sum(sum[t]);
            if (lane == 0) partial[item * T + t] = sum[t];
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < rows * T; index += THREADS) {
        const int t = index % T;
        if (t >= p.n) continue;
        float value[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float *from = partial + ((index / T * R + r) * s.split) * T + t;
            value[r] = 0;
            for (int i = 0; i < s.split; i++) value[r] += from[i * T];
        }
        float result = PAIR ? silu(value[0]) * value[R - 1] : value[0];
        const int64_t at = place_of(index);
        if (p.mode == ADD) result += index == (int)threadIdx.x ? before : residual(at);
        if (p.out_f32) static_cast<float *>(p.out)[at] = result;
        else static_cast<__nv_bfloat16 *>(p.out)[at] = __float2bfloat16(result);
    }
}

template <int D, int T, bool PAIR> int start(tops_stream *stream, const Product &p, const Shape &s, int blocks, int shared) {
    CUDA(cudaFuncSetAttribute(gemv_kernel<D, T, PAIR>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    return launch(stream, gemv_kernel<D, T, PAIR>, dim3((unsigned)blocks), dim3(THREADS), (size_t)shared, 1, p, s);
}

/* Bytes of shared memory for a shape that suits this product; the shape goes to `s`. */
template <int D> int plan(Shape &s, int &blocks, const Product &p, int tokens, int multiprocessors) {
    const int64_t rows = p.mode == GATE_UP ? p.parts[0].rows : p.rows;
    const int lines = p.mode == GATE_UP ? 2 : 1;
    s.rows = (int)ceil_div(rows, min((int64_t)multiprocessors, rows));
    blocks = (int)ceil_div(rows, s.rows);
    s.padded = (int)(ceil_div(p.cols, Slot<D>::VALUES) * Slot<D>::VALUES);
    const int chunks = s.padded / Slot<D>::VALUES;
    int64_t best = INT64_MAX;
    for (int split = 1; split <= WARPS && split <= chunks; split *= 2) {
        if (split > 1 && s.rows * lines * split * tokens > 4096) break;
        int64_t cost = ceil_div(s.rows * lines * split, WARPS) * (ceil_div(chunks, split) + 1);
        if (cost < best) {
            best = cost;
            s.split = split;
        }
    }
    return WARPS * Slot<D>::STAGES * Slot<D>::BYTES + tokens * input_bytes<D>(s.padded) + s.rows * lines * s.split * tokens * 4;
}

/* As many of the product's rows of x as fit, at most four; how many goes to `done`. */
template <int D> int run(tops_stream *stream, Product p, int64_t &done) {
    constexpr int SHARED_MOST = 220 << 10;
    const bool pair = p.mode == GATE_UP;
    Shape s{};
    int blocks = 0, tokens = p.n >= 2 ? 4 : 1, shared = plan<D>(s, blocks, p, tokens, stream->multiprocessors);
    if (shared > SHARED_MOST && tokens > 1) shared = plan<D>(s, blocks, p, tokens = 1, stream->multiprocessors);
    done = p.n = min(p.n, (int64_t)tokens);
    REQUIRE_SUPPORTED(shared <= SHARED_MOST, "cols: %lld are too many for this kernel", (long long)p.cols);
    if (tokens == 1) return pair ? start<D, 1, true>(stream, p, s, blocks, shared) : start<D, 1, false>(stream, p, s, blocks, shared);
    return pair ? start<D, 4, true>(stream, p, s, blocks, shared) : start<D, 4, false>(stream, p, s, blocks, shared);
}
#endif
}   // namespace stream
