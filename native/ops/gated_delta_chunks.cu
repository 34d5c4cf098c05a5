/*
 * The gated delta rule over long prompts, in chunks of 64 rows (Yang, Kautz, Hatamizadeh 2024, section 3.3), heads of 128, bf16.
 *
 * With c the summed log decays inside a chunk, D_ij = exp(c_i - c_j) for i >= j, and A_ij = beta_i (k_i k_j) D_ij for i > j:
 *   T = (I + A)^-1,  U = T diag(beta) V,  W = T diag(beta e^c) K,  P_ij = (q_i k_j) D_ij       for all chunks at once
 *   V' = U - W S,  O = e^c Q S + P V',  S = e^(c_last) S + (diag(e^(c_last - c)) K)^T V'        chunk after chunk
 * The inverse is computed in f32 and S stays in f32; products take bf16 and add in f32.
 */
#include "gated_delta_rule.cuh"

/* ---- convolution, norms of q and k, gates: a warp takes ROWS rows of 128 channels ---- */
enum { ROWS = 8 };

/* Channels `at` .. + 3 of the convolution's input at a row, which may lie before the step's first row of the sequence. */
static __device__ float4 input_at(const delta_arguments<bf16> &a, int sequence, int start, int row, int64_t at) {
    if (row >= start) return load4(a.x + row * a.width + at);
    int slot = a.states_in[sequence];
    if (slot < 0) return make_float4(0, 0, 0, 0);
    return *(const float4 *)(a.states.inputs + slot * a.states.pitch + (TAPS - 1 + row - start) * a.channels + at);
}

static __global__ void delta_prepare(delta_arguments<bf16> a, chunk_scratch to) {
    launch_dependents();
    wait_for_inputs();
    int hk = a.states.hk, hv = a.states.hv, units = 2 * hk + hv, lane = threadIdx.x % 32;
    int64_t item = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    int unit = item % units, first = item / units * ROWS, last = min(first + ROWS, (int)a.n);
    int64_t at = (int64_t)unit * HEAD + lane * 4;
    float4 w[4], x[TAPS];
    for (int i = 0; i < 4; i++) w[i] = *(const float4 *)(a.conv + (at + i) * TAPS);
    for (int row = first, start = -1; row < last; row++) {
        int sequence = a.sequences[row];
        if (row == first || a.query_starts[sequence] != start) {
            start = a.query_starts[sequence];
            for (int m = 1; m < TAPS; m++) x[m] = input_at(a, sequence, start, row - TAPS + m, at);
        }
        x[0] = x[1], x[1] = x[2], x[2] = x[3];
        x[3] = load4(a.x + row * a.width + at);
        float4 y;
        y.x = silu(w[0].x * x[0].x + w[0].y * x[1].x + w[0].z * x[2].x + w[0].w * x[3].x);
        y.y = silu(w[1].x * x[0].y + w[1].y * x[1].y + w[1].z * x[2].y + w[1].w * x[3].y);
        y.z = silu(w[2].x * x[0].z + w[2].y * x[1].z + w[2].z * x[2].z + w[2].w * x[3].z);
        y.w = silu(w[3].x * x[0].w + w[3].y * x[1].w + w[3].z * x[2].w + w[3].w * x[3].w);
        if (unit >= 2 * hk) {
            store4(to.v + ((int64_t)row * hv + unit - 2 * hk) * HEAD + lane * 4, y);
        } else {
            float scale = rsqrtf(warp_sum(dot(y, y)) + 1e-6f) * (unit < hk ? rsqrtf((float)HEAD) : 1.0f);
            store4((unit < hk ? to.q : to.k) + ((int64_t)row * hk + unit % hk) * HEAD + lane * 4,
                   make_float4(y.x * scale, y.y * scale, y.z * scale, y.w * scale));
        }
        if (unit == 0)
            for (int head = lane; head < hv; head += 32) {
                const bf16 *gates = a.x + row * a.width + a.channels + hv * HEAD + head;
                float step = to_float(gates[hv]) + a.dt_bias[head];
                to.beta[row * hv + head] = sigmoid(to_float(gates[0]));
                to.c[row * hv + head] = a.decay[head] * (step > 20.0f ? step : log1pf(expf(step)));
            }
    }
}

/* Inverse of I + A for a lower triangle of 32 x 32 in place; one warp, lane = column. */
static __device__ void invert_32(float *a, int lane) {
    float t[32];
#pragma unroll
    for (int i = 0; i < 32; i++) {
        float sum = i == lane ? 1.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < i; j++) sum -= a[i * (CHUNK + 4) + j] * t[j];
        t[i] = sum;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 32; i++) a[i * (CHUNK + 4) + lane] = t[i];
}

/* out [32, 32] = sign x y, all [32, 32] with rows CHUNK + 4 apart; 128 threads */
static __device__ void multiply_32(float *out, const float *x, const float *y, float sign, int me) {
    int row = me / 4, first = me % 4 * 8;
    float sum[8] = {};
    for (int j = 0; j < 32; j++)
        for (int c = 0; c < 8; c++) sum[c] += x[row * (CHUNK + 4) + j] * y[j * (CHUNK + 4) + first + c];
    for (int c = 0; c < 8; c++) out[row * (CHUNK + 4) + first + c] = sign * sum[c];
}

struct chunk_shared {
    bf16 k[CHUNK * WIDE], v[CHUNK * WIDE], t1[CHUNK * NARROW], t2[CHUNK * NARROW];
    float a[CHUNK * (CHUNK + 4)], x[32 * (CHUNK + 4)], c[CHUNK], beta[CHUNK];
};

/* 16 rows of x y^T by 64 columns: x rows from `row`, y all rows, both [64, 128] */
static __device__ void scores(float (&sum)[8][4], const bf16 *x, const bf16 *y, int row, int lane) {
    for (int s = 0; s < HEAD; s += 16) {
        uint32_t left[4], right[4];
        load_a(left, x + row * WIDE + s, WIDE, lane);
        for (int t = 0; t < 8; t += 2) {
            load_b_rows(right, y + t * 8 * WIDE + s, WIDE, lane);
            mma(sum[t], left, right);
            mma(sum[t + 1], left, right + 2);
        }
    }
}

/* 16 rows of t y: t [64, 64] rows from `row`, y [64, 128] */
static __device__ void combine(float (&sum)[16][4], const bf16 *t, const bf16 *y, int row, int lane) {
    for (int s = 0; s < CHUNK; s += 16) {
        uint32_t left[4], right[4];
        load_a(left, t + row * NARROW + s, NARROW, lane);
        for (int c = 0; c < 16; c += 2) {
            load_b(right, y + s * WIDE + c * 8, WIDE, lane);
            mma(sum[c], left, right);
            mma(sum[c + 1], left, right + 2);
        }
    }
}

static __global__ void __launch_bounds__(128) delta_chunks(delta_arguments<bf16> a, chunk_scratch io) {
    launch_dependents();
    wait_for_inputs();
    extern __shared__ __align__(16) char bytes[];
    chunk_shared &s = *(chunk_shared *)bytes;
    int hk = a.states.hk, hv = a.states.hv, head = blockIdx.y, j = head / (hv / hk), me = threadIdx.x, warp = me / 32, lane = me % 32;
    int first, count;
    if (!find_chunk(a, blockIdx.x, &first, &count)) return;
    int64_t keys = ((int64_t)first * hk + j) * HEAD, values = ((int64_t)first * hv + head) * HEAD;
    load_tile(s.k, WIDE, io.k + keys, (int64_t)hk * HEAD, HEAD, count, me, 128);
    load_tile(s.v, WIDE, io.q + keys, (int64_t)hk * HEAD, HEAD, count, me, 128);
    if (warp == 0) {   /* running sum of the log decays */
        float low = lane < count ? io.c[(int64_t)(first + lane) * hv + head] : 0;
        float high = lane + 32 < count ? io.c[(int64_t)(first + lane + 32) * hv + head] : 0;
        for (int step = 1; step < 32; step *= 2) {
            float below = __shfl_up_sync(~0u, low, step), above = __shfl_up_sync(~0u, high, step);
            if (lane >= step) low += below, high += above;
        }
        s.c[lane] = low;
        s.c[lane + 32] = high + __shfl_sync(~0u, low, 31);
        for (int i = lane; i < CHUNK; i += 32) s.beta[i] = i < count ? io.beta[(int64_t)(first + i) * hv + head] : 0;
    }
    copy_wait<0>();
    __syncthreads();
    int row = warp * 16, r0 = row + lane / 4, c0 = lane % 4 * 2;
    float kk[8][4] = {}, qk[8][4] = {};
    scores(kk, s.k, s.k, row, lane);
    scores(qk, s.v, s.k, row, lane);
    for (int t = 0; t < 8; t++)
        for (int e = 0; e < 4; e++) {
            int i = r0 + e / 2 * 8, c = t * 8 + c0 + e % 2;
            float decay = i >= c ? expf(s.c[i] - s.c[c]) : 0;
            s.a[i * (CHUNK + 4) + c] = i > c ? s.beta[i] * kk[t][e] * decay : 0;
            s.t1[i * NARROW + c] = __float2bfloat16(qk[t][e] * decay);
        }
    __syncthreads();
    if (warp < 2) {
        invert_32(s.a + warp * 32 * (CHUNK + 4) + warp * 32, lane);
    } else {
        load_tile(s.v, WIDE, io.v + values, (int64_t)hv * HEAD, HEAD, count, me - 64, 64);
        store_tile(io.p + ((int64_t)first * hv + head) * CHUNK, (int64_t)hv * CHUNK, s.t1, NARROW, CHUNK, count, me - 64, 64);
        copy_wait<0>();
    }
    if (me < count) io.c[(int64_t)(first + me) * hv + head] = s.c[me];
    __syncthreads();
    float *low = s.a + 32 * (CHUNK + 4);   /* T21 = -T22 A21 T11 */
    multiply_32(s.x, low, s.a, 1.0f, me);
    __syncthreads();
    multiply_32(low, low + 32, s.x, -1.0f, me);
    __syncthreads();
    for (int i = me; i < CHUNK * CHUNK; i += 128) {
        int r = i / CHUNK, c = i % CHUNK;
        float t = c <= r ? s.a[r * (CHUNK + 4) + c] * s.beta[c] : 0;
        s.t1[r * NARROW + c] = __float2bfloat16(t);
        s.t2[r * NARROW + c] = __float2bfloat16(t * expf(s.c[c]));
    }
    __syncthreads();
    float u[16][4] = {}, w[16][4] = {};
    combine(u, s.t1, s.v, row, lane);
    combine(w, s.t2, s.k, row, lane);
    __syncthreads();
    for (int t = 0; t < 16; t++)
        for (int h = 0; h < 2; h++) {
            *(__nv_bfloat162 *)(s.v + (r0 + h * 8) * WIDE + t * 8 + c0) = __floats2bfloat162_rn(u[t][2 * h], u[t][2 * h + 1]);
            *(__nv_bfloat162 *)(s.k + (r0 + h * 8) * WIDE + t * 8 + c0) = __floats2bfloat162_rn(w[t][2 * h], w[t][2 * h + 1]);
        }
    __syncthreads();
    store_tile(io.v + values, (int64_t)hv * HEAD, s.v, WIDE, HEAD, count, me, 128);
    store_tile(io.w + values, (int64_t)hv * HEAD, s.k, WIDE, HEAD, count, me, 128);
}

int delta_within_chunks(tops_stream *stream, const delta_arguments<bf16> &a, const chunk_scratch &scratch) {
    int warps = 8;
    int64_t items = ceil_div(a.n, ROWS) * (2 * a.states.hk + a.states.hv);
    int status = launch(stream, delta_prepare, dim3(ceil_div(items, warps)), warps * 32, 0, 1, a, scratch);
    return status ? status : launch_wide(stream, delta_chunks, dim3(a.n / CHUNK + a.b, a.states.hv), 128, sizeof(chunk_shared), a, scratch);
}
