/* From chunk to chunk (gated_delta_chunks.cu has the formulas), then the gated norm, and the inputs that kept states remember. */
#include "gated_delta_rule.cuh"

struct scan_stage {
    bf16 w[CHUNK * WIDE], q[CHUNK * WIDE], k[CHUNK * WIDE], p[CHUNK * NARROW], u[CHUNK * SLIM];
    float c[CHUNK];
    int slots[CHUNK];
};

struct scan_shared {
    scan_stage stage[2];
    bf16 state[HEAD * SLIM], v[CHUNK * SLIM], scaled[CHUNK * SLIM];     /* S, V' and V' with the decay to the end of the chunk */
};

/* 16 rows of S, from `row` on, in f32: S = decay S + K^T v */
static __device__ void update(float (&state)[4][4], float decay, const bf16 *k, const bf16 *v, int row, int lane) {
    for (int t = 0; t < 4; t++)
        for (int e = 0; e < 4; e++) state[t][e] *= decay;
    for (int s = 0; s < CHUNK; s += 16) {
        uint32_t left[4], right[4];
        load_a_transposed(left, k + s * WIDE + row, WIDE, lane);
        for (int t = 0; t < 4; t += 2) {
            load_b(right, v + s * SLIM + t * 8, SLIM, lane);
            mma(state[t], left, right);
            mma(state[t + 1], left, right + 2);
        }
    }
}

/* 16 rows of x y by 16 columns; x rows `wide` apart, y [length, ..] from its column */
static __device__ void multiply(float (&sum)[2][4], const bf16 *x, int wide, const bf16 *y, int length, int lane) {
    for (int s = 0; s < length; s += 16) {
        uint32_t left[4], right[4];
        load_a(left, x + s, wide, lane);
        load_b(right, y + s * SLIM, SLIM, lane);
        mma(sum[0], left, right);
        mma(sum[1], left, right + 2);
    }
}

static __device__ void load_stage(scan_stage &s, const delta_arguments<bf16> &a, const chunk_scratch &io, int head, int column, int first, int count) {
    int hk = a.states.hk, hv = a.states.hv, j = head / (hv / hk), me = threadIdx.x;
    int64_t keys = ((int64_t)first * hk + j) * HEAD, values = ((int64_t)first * hv + head) * HEAD;
    load_tile(s.w, WIDE, io.w + values, (int64_t)hv * HEAD, HEAD, count, me, 256);
    load_tile(s.q, WIDE, io.q + keys, (int64_t)hk * HEAD, HEAD, count, me, 256);
    load_tile(s.k, WIDE, io.k + keys, (int64_t)hk * HEAD, HEAD, count, me, 256);
    load_tile(s.p, NARROW, io.p + ((int64_t)first * hv + head) * CHUNK, (int64_t)hv * CHUNK, CHUNK, count, me, 256);
    load_tile(s.u, SLIM, io.v + values + column, (int64_t)hv * HEAD, COLUMNS, count, me, 256);
    if (me < CHUNK) {
        s.c[me] = me < count ? io.c[(int64_t)(first + me) * hv + head] : 0;
        s.slots[me] = me < count ? a.states_out[first + me] : -1;
    }
    copy_commit();
}

static __device__ void keep(const tops_states &s, int slot, int64_t place, const float (&state)[4][4]) {
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < 2; h++)
            *(float2 *)(s.memory + slot * s.pitch + place + h * 8 * HEAD + t * 8) = make_float2(state[t][2 * h], state[t][2 * h + 1]);
}

/* A block takes a sequence and 32 columns of a value head's S, a warp 16 rows of S. */
static __global__ void __launch_bounds__(256) delta_scan(delta_arguments<bf16> a, chunk_scratch io) {
    launch_dependents();
    wait_for_inputs();
    extern __shared__ __align__(16) char bytes[];
    scan_shared &s = *(scan_shared *)bytes;
    int hv = a.states.hv, head = blockIdx.x / SPLIT, column = blockIdx.x % SPLIT * COLUMNS, sequence = blockIdx.y;
    int me = threadIdx.x, warp = me / 32, lane = me % 32, first = a.query_starts[sequence], end = a.query_starts[sequence + 1];
    if (first == end) return;
    int r0 = lane / 4, c0 = lane % 4 * 2, row = warp * 16, from = a.states_in[sequence];
    int token = warp / 2 * 16, half = warp % 2 * 16;        /* the warp's part of V' and O: 16 rows, 16 columns */
    int64_t place = ((int64_t)head * HEAD + row + r0) * HEAD + column + c0;
    float state[4][4];
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < 2; h++) {
            float2 pair = from < 0 ? make_float2(0, 0) : *(const float2 *)(a.states.memory + from * a.states.pitch + place + h * 8 * HEAD + t * 8);
            state[t][2 * h] = pair.x, state[t][2 * h + 1] = pair.y;
        }
    load_stage(s.stage[0], a, io, head, column, first, min(CHUNK, end - first));
    for (int parity = 0; first < end; first += CHUNK, parity ^= 1) {
        scan_stage &now = s.stage[parity];
        int count = min(CHUNK, end - first), next = first + CHUNK;
        if (next < end) load_stage(s.stage[parity ^ 1], a, io, head, column, next, min(CHUNK, end - next));
        else copy_commit();
        for (int t = 0; t < 4; t++)
            for (int h = 0; h < 2; h++)
                *(__nv_bfloat162 *)(s.state + (row + r0 + h * 8) * SLIM + t * 8 + c0) = __floats2bfloat162_rn(state[t][2 * h], state[t][2 * h + 1]);
        copy_wait<1>();
        __syncthreads();
        float v[2][4] = {}, o[2][4] = {}, last = now.c[count - 1];
        multiply(v, now.w + token * WIDE, WIDE, s.state + half, HEAD, lane);
        multiply(o, now.q + token * WIDE, WIDE, s.state + half, HEAD, lane);
        for (int t = 0; t < 2; t++)
            for (int h = 0; h < 2; h++) {
                int i = token + r0 + h * 8, at = i * SLIM + half + t * 8 + c0;
                float2 u = __bfloat1622float2(*(__nv_bfloat162 *)(now.u + at));
                float low = u.x - v[t][2 * h], high = u.y - v[t][2 * h + 1], left = i < count ? expf(last - now.c[i]) : 0, gone = expf(now.c[i]);
                *(__nv_bfloat162 *)(s.v + at) = __floats2bfloat162_rn(low, high);
                *(__nv_bfloat162 *)(s.scaled + at) = __floats2bfloat162_rn(low * left, high * left);
                o[t][2 * h] *= gone, o[t][2 * h + 1] *= gone;
            }
        __syncthreads();
        multiply(o, now.p + token * NARROW, NARROW, s.v + half, CHUNK, lane);
        for (int t = 0; t < 2; t++)
            for (int h = 0; h < 2; h++)
                if (token + r0 + h * 8 < count)
                    *(__nv_bfloat162 *)(io.v + ((int64_t)(first + token + r0 + h * 8) * hv + head) * HEAD + column + half + t * 8 + c0) =
                        __floats2bfloat162_rn(o[t][2 * h], o[t][2 * h + 1]);
        float before[4][4];
        for (int t = 0; t < 4; t++)
            for (int e = 0; e < 4; e++) before[t][e] = state[t][e];
        update(state, expf(last), now.k, s.scaled, row, lane);
        if (now.slots[count - 1] >= 0) keep(a.states, now.slots[count - 1], place, state);
        uint64_t kept = __ballot_sync(~0u, now.slots[lane] >= 0) | (uint64_t)__ballot_sync(~0u, now.slots[lane + 32] >= 0) << 32;
        for (kept &= ~(1ull << (count - 1)); kept; kept &= kept - 1) {      /* in the middle of the chunk: the same update with the decay to row r */
            int r = __ffsll(kept) - 1;
            __syncthreads();
            for (int i = me; i < CHUNK * COLUMNS; i += 256) {
                int t = i / COLUMNS, at = t * SLIM + i % COLUMNS;
                s.scaled[at] = __float2bfloat16(t <= r ? __bfloat162float(s.v[at]) * expf(now.c[r] - now.c[t]) : 0);
            }
            __syncthreads();
            float middle[4][4];
            for (int t = 0; t < 4; t++)
                for (int e = 0; e < 4; e++) middle[t][e] = before[t][e];
            update(middle, expf(now.c[r]), now.k, s.scaled, row, lane);
            keep(a.states, now.slots[r], place, middle);
        }
        __syncthreads();
    }
}

/* out = rms_norm(o) silu(z): a warp takes a head of a row */
static __global__ void delta_norm(delta_arguments<bf16> a, const bf16 *o) {
    launch_dependents();
    wait_for_inputs();
    int hv = a.states.hv, lane = threadIdx.x % 32;
    int64_t item = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, row = item / hv, head = item % hv;
    if (row >= a.n) return;
    float4 y = load4(o + item * HEAD + lane * 4), z = load4(a.x + row * a.width + a.channels + head * HEAD + lane * 4);
    float4 w = *(const float4 *)(a.norm + lane * 4);
    float scale = rsqrtf(warp_sum(dot(y, y)) / HEAD + a.eps);
    store4(a.out + item * HEAD + lane * 4,
           make_float4(y.x * scale * w.x * silu(z.x), y.y * scale * w.y * silu(z.y), y.z * scale * w.z * silu(z.z), y.w * scale * w.w * silu(z.w)));
}

/* The convolution's last inputs, for every row that is kept. A thread has one channel of one sequence: it reads the slot it starts
 * from before it writes any, and nobody else touches that channel of the slots. */
static __global__ void delta_inputs(delta_arguments<bf16> a) {
    launch_dependents();
    wait_for_inputs();
    int sequence = blockIdx.y, start = a.query_starts[sequence], end = a.query_starts[sequence + 1], from = a.states_in[sequence];
    int64_t channel = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    float old[TAPS - 1];
    bool there = channel < a.channels;
    for (int m = 0; m < TAPS - 1; m++)
        old[m] = from < 0 || !there ? 0 : a.states.inputs[from * a.states.pitch + m * a.channels + channel];
    for (int base = start; base < end; base += 32) {
        int lane = base + threadIdx.x % 32;
        unsigned kept = __ballot_sync(~0u, lane < end && a.states_out[lane] >= 0);
        for (; kept; kept &= kept - 1) {
            int row = base + __ffs(kept) - 1;
            float *to = a.states.inputs + a.states_out[row] * a.states.pitch + channel;
            for (int m = 0; m < TAPS - 1 && there; m++) {
                int at = row - (TAPS - 2) + m;
                float value = 0;
                if (at >= start) value = to_float(a.x[at * a.width + channel]);
                else
                    for (int i = 0; i < TAPS - 1; i++)     /* an index known to the compiler keeps old in registers */
                        if (i == TAPS - 1 + at - start) value = old[i];
                to[m * a.channels] = value;
            }
        }
    }
}

int delta_across_chunks(tops_stream *stream, const delta_arguments<bf16> &a, const chunk_scratch &scratch) {
    int status = launch_wide(stream, delta_scan, dim3(a.states.hv * SPLIT, a.b), 256, sizeof(scan_shared), a, scratch);
    if (!status) status = launch(stream, delta_norm, dim3(ceil_div(a.n * a.states.hv, 8)), 256, 0, 1, a, (const bf16 *)scratch.v);
    return status ? status : launch(stream, delta_inputs, dim3(ceil_div(a.channels, 256), a.b), 256, 0, 1, a);
}
