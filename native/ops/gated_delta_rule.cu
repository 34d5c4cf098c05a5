/* The gated delta rule on a GPU (Yang, Kautz, Hatamizadeh 2024): any shape row by row, and a decode kernel for heads of 128.
 * Long prompts of such heads take gated_delta_chunks.cu. */
#include <cooperative_groups.h>

#include "gated_delta_rule.cuh"

namespace cg = cooperative_groups;

static __device__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

/* ---- any shape: a block takes a sequence and a key head with its value heads, whose memories stay in shared memory ---- */

template <typename T>
static __global__ void delta_rows(delta_arguments<T> a) {
    extern __shared__ float shared[];
    const tops_states &s = a.states;
    int sequence = blockIdx.x / s.hk, j = blockIdx.x % s.hk, before = s.taps - 1;
    int group = s.hv / s.hk, own = 2 * s.pk + group * s.pv, size = group * s.pk * s.pv, threads = blockDim.x, me = threadIdx.x;
    float *memory = shared, *raw = memory + size, *u = raw + s.taps * own, *o = u + own, *sums = o + s.pv;
    launch_dependents();
    wait_for_inputs();
    int row = a.query_starts[sequence], end = a.query_starts[sequence + 1], from = a.states_in[sequence];
    if (row == end) return;
    for (int i = me; i < size; i += threads) memory[i] = from < 0 ? 0.0f : s.memory[from * s.pitch + (int64_t)j * size + i];
    for (int i = me; i < before * own; i += threads)
        raw[own + i] = from < 0 ? 0.0f : s.inputs[from * s.pitch + i / own * a.channels + a.channel(j, i % own)];
    for (; row < end; row++) {
        const T *x = a.x + row * a.width;
        __syncthreads();
        for (int i = me; i < own; i += threads) {   /* each thread shifts its own channels */
            for (int m = 0; m < before; m++) raw[m * own + i] = raw[(m + 1) * own + i];
            raw[before * own + i] = to_float(x[a.channel(j, i)]);
            float sum = 0;
            for (int m = 0; m < s.taps; m++) sum += a.conv[a.channel(j, i) * s.taps + m] * raw[m * own + i];
            u[i] = silu(sum);
        }
        __syncthreads();
        if (me < 64) {   /* a warp norms q, another k */
            int first = me / 32 * s.pk;
            float sum = 0;
            for (int i = me % 32; i < s.pk; i += 32) sum += u[first + i] * u[first + i];
            float scale = rsqrtf(warp_sum(sum) + 1e-6f) * (first == 0 ? rsqrtf((float)s.pk) : 1.0f);
            for (int i = me % 32; i < s.pk; i += 32) u[first + i] *= scale;
        }
        __syncthreads();
        for (int i = 0; i < group; i++) {
            int head = j * group + i;
            const T *gates = x + a.channels + s.hv * s.pv;
            float beta = sigmoid(to_float(gates[head])), g = expf(a.decay[head] * softplus(to_float(gates[s.hv + head]) + a.dt_bias[head]));
            float *state = memory + i * s.pk * s.pv, squares = 0;
            for (int c = me; c < s.pv; c += threads) {
                float e = 0, y = 0;
                for (int r = 0; r < s.pk; r++) e += u[s.pk + r] * state[r * s.pv + c];
                e = beta * (u[2 * s.pk + i * s.pv + c] - g * e);
                for (int r = 0; r < s.pk; r++) {
                    float next = g * state[r * s.pv + c] + u[s.pk + r] * e;
                    state[r * s.pv + c] = next;
                    y += u[r] * next;
                }
                o[c] = y;
                squares += y * y;
            }
            squares = warp_sum(squares);
            if (me % 32 == 0) sums[me / 32] = squares;
            __syncthreads();
            squares = 0;
            for (int w = 0; w < threads / 32; w++) squares += sums[w];
            float scale = rsqrtf(squares / s.pv + a.eps);
            for (int c = me; c < s.pv; c += threads) {
                float z = to_float(x[a.channels + head * s.pv + c]);
                a.out[((int64_t)row * s.hv + head) * s.pv + c] = from_float<T>(o[c] * scale * a.norm[c] * silu(z));
            }
            __syncthreads();
        }
        int slot = a.states_out[row];
        if (slot < 0) continue;
        for (int i = me; i < size; i += threads) s.memory[slot * s.pitch + (int64_t)j * size + i] = memory[i];
        for (int i = me; i < before * own; i += threads) s.inputs[slot * s.pitch + i / own * a.channels + a.channel(j, i % own)] = raw[own + i];
    }
}

/* ---- heads of 128, a few rows: a cluster takes a sequence and a key head, a block 32 columns of one value head's memory, in registers.
 *      Thread (warp w, lane 8 r + c) holds rows 16 w + 4 r .. + 3 of columns 4 c .. 4 c + 3. ---- */

enum { WARPS = 8, OWN = 2 * HEAD + COLUMNS };

template <typename T>
static __global__ void __launch_bounds__(WARPS * 32, 4) delta_decode(delta_arguments<T> a) {
    __shared__ float raw[TAPS][OWN], u[OWN], red[2][WARPS][COLUMNS], o[DECODE_ROWS][COLUMNS], squares[DECODE_ROWS];
    const tops_states &s = a.states;
#if __CUDA_ARCH__ >= 900
    cg::cluster_group cluster = cg::this_cluster();
    int group = s.hv / s.hk, rank = cluster.block_rank(), item = blockIdx.x / (SPLIT * group);
    int sequence = item / s.hk, j = item % s.hk, head = j * group + rank / SPLIT, column = rank % SPLIT * COLUMNS;
    int me = threadIdx.x, warp = me / 32, lane = me % 32, k0 = warp * 16 + lane / 8 * 4, c0 = lane % 8 * 4;
    auto channel = [&](int i) { return i < HEAD ? j * HEAD + i : i < 2 * HEAD ? (s.hk + j) * HEAD + i - HEAD
                                       : 2 * s.hk * HEAD + head * HEAD + column + i - 2 * HEAD; };
    /* States and weights are older than the step: they may be read before the op before this one is done. */
    int row = a.query_starts[sequence], first = row, end = a.query_starts[sequence + 1], from = a.states_in[sequence];
    float4 memory[4];
    int64_t place = (int64_t)head * HEAD * HEAD + k0 * HEAD + column + c0;
    for (int r = 0; r < 4; r++)
        memory[r] = from < 0 ? make_float4(0, 0, 0, 0) : *(const float4 *)(s.memory + from * s.pitch + place + r * HEAD);
    float w[2][TAPS];
#pragma unroll
    for (int h = 0; h < 2; h++) {   /* a thread's channels: me, and the last 32 for the first warp */
        int i = me + h * WARPS * 32;
        if (i >= OWN) break;
        *(float4 *)w[h] = *(const float4 *)(a.conv + channel(i) * TAPS);
        for (int m = 1; m < TAPS; m++) raw[m][i] = from < 0 ? 0.0f : s.inputs[from * s.pitch + (m - 1) * a.channels + channel(i)];
    }
    float decay = a.decay[head], dt_bias = a.dt_bias[head], norm = a.norm[column + lane];
    cluster.sync();   /* every block has read the slot that one of them may write */
    launch_dependents();
    wait_for_inputs();
    auto keep = [&](int row) {
        const int slot = a.states_out[row];
        if (slot < 0) return;
        for (int r = 0; r < 4; r++) *(float4 *)(s.memory + slot * s.pitch + place + r * HEAD) = memory[r];
        for (int i = me; i < OWN; i += WARPS * 32)   /* q and k by the first block of the cluster, v by each */
            if (i >= 2 * HEAD || rank == 0)
                for (int m = 1; m < TAPS; m++) s.inputs[slot * s.pitch + (m - 1) * a.channels + channel(i)] = raw[m][i];
    };
    /* The gate is wanted last: its first row is on its way meanwhile. */
    float z_first = row < end ? to_float(a.x[row * a.width + a.channels + head * HEAD + column + lane]) : 0;
    for (; row < end; row++) {
        const T *x = a.x + row * a.width;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = me + h * WARPS * 32;
            if (i >= OWN) break;
            float sum = 0;
            for (int m = 0; m < TAPS - 1; m++) sum += w[h][m] * (raw[m][i] = raw[m + 1][i]);
            u[i] = silu(sum + w[h][TAPS - 1] * (raw[TAPS - 1][i] = to_float(x[channel(i)])));
        }
        const T *gates = x + a.channels + s.hv * HEAD + head;
        float beta = sigmoid(to_float(gates[0])), g = expf(decay * softplus(to_float(gates[s.hv]) + dt_bias));
        __syncthreads();
        float4 q = *(const float4 *)&u[lane * 4], k = *(const float4 *)&u[HEAD + lane * 4];
        float q_scale = rsqrtf(warp_sum(dot(q, q)) + 1e-6f) * rsqrtf((float)HEAD), k_scale = rsqrtf(warp_sum(dot(k, k)) + 1e-6f);
        float qk = warp_sum(dot(q, k)) * q_scale * k_scale;
        float4 e = make_float4(0, 0, 0, 0), y = e;
        float kr[4], qr;
        for (int r = 0; r < 4; r++) {
            kr[r] = u[HEAD + k0 + r] * k_scale;
            qr = u[k0 + r] * q_scale;
            add_scaled(e, kr[r], memory[r]);
            add_scaled(y, qr, memory[r]);
        }
        for (int step = 8; step < 32; step *= 2) {
            e = add(e, shuffle_xor(e, step));
            y = add(y, shuffle_xor(y, step));
        }
        if (lane < 8) {
            *(float4 *)&red[0][warp][c0] = e;
            *(float4 *)&red[1][warp][c0] = y;
        }
        __syncthreads();
        e = y = make_float4(0, 0, 0, 0);
        for (int other = 0; other < WARPS; other++) {
            e = add(e, *(const float4 *)&red[0][other][c0]);
            y = add(y, *(const float4 *)&red[1][other][c0]);
        }
        float4 v = *(const float4 *)&u[2 * HEAD + c0];
        e = make_float4(beta * (v.x - g * e.x), beta * (v.y - g * e.y), beta * (v.z - g * e.z), beta * (v.w - g * e.w));
        y = make_float4(g * y.x + qk * e.x, g * y.y + qk * e.y, g * y.z + qk * e.z, g * y.w + qk * e.w);
        for (int r = 0; r < 4; r++)
            memory[r] = make_float4(g * memory[r].x + kr[r] * e.x, g * memory[r].y + kr[r] * e.y, g * memory[r].z + kr[r] * e.z, g * memory[r].w + kr[r] * e.w);
        if (me < 8) {
            *(float4 *)&o[row - first][c0] = y;
            float sum = dot(y, y);
            for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xff, sum, step);
            if (me == 0) squares[row - first] = sum;
        }
        if (row + 1 < end) keep(row);
        __syncthreads();
    }
    /* The cluster's barrier waits for stores before it: the last state is stored behind it. */
    cluster.barrier_arrive();
    if (first < end) keep(end - 1);
    cluster.barrier_wait();
    for (int i = me; i < (end - first) * COLUMNS; i += WARPS * 32) {
        int t = i / COLUMNS, c = lane;
        float sum = 0;
        for (int split = 0; split < SPLIT; split++) sum += *cluster.map_shared_rank(&squares[t], rank / SPLIT * SPLIT + split);
        float z = t == 0 ? z_first : to_float(a.x[(first + t) * a.width + a.channels + head * HEAD + column + c]);
        a.out[((int64_t)(first + t) * s.hv + head) * HEAD + column + c] =
            from_float<T>(o[t][c] * rsqrtf(sum / HEAD + a.eps) * norm * silu(z));
    }
    cluster.sync();   /* until the others have read our squares */
#endif
}

/* ---- which of the three ---- */

static int64_t lay_out(chunk_scratch *to, char *base, int64_t n, int64_t hk, int64_t hv) {
    char *at = base;
    auto take = [&](auto *&pointer, int64_t count) {
        pointer = (decltype(pointer + 0))at;
        at += (count * (int64_t)sizeof *pointer + 255) / 256 * 256;
    };
    take(to->q, n * hk * HEAD), take(to->k, n * hk * HEAD), take(to->v, n * hv * HEAD);
    take(to->w, n * hv * HEAD), take(to->p, n * hv * CHUNK), take(to->c, n * hv), take(to->beta, n * hv);
    return at - base;
}

template <typename T>
static int run_rows(tops_stream *stream, const delta_arguments<T> &a) {
    const tops_states &s = a.states;
    int64_t group = s.hv / s.hk, own = 2 * s.pk + group * s.pv, bytes = (group * s.pk * s.pv + (s.taps + 1) * own + s.pv + 32) * 4;
    int capability = 0;     /* clusters came with Hopper */
    CUDA(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, stream->device));
    if (capability >= 9 && s.pk == HEAD && s.pv == HEAD && s.taps == TAPS && a.n <= DECODE_ROWS && group * SPLIT <= 8)
        return launch(stream, delta_decode<T>, dim3(a.b * s.hv * SPLIT), WARPS * 32, 0, (int)(group * SPLIT), a);
    REQUIRE_SUPPORTED(bytes <= 227 << 10, "states: value heads of one key head must fit in 227 KB of shared memory, not %lld bytes", (long long)bytes);
    return launch_wide(stream, delta_rows<T>, dim3(a.b * s.hk), 256, bytes, a);
}

template <typename T>
static int run(tops_stream *stream, void *out, const void *x, const float *conv, const float *decay, const float *dt_bias,
               const float *norm, const tops_states *s, const tops_batch *batch, float eps) {
    delta_arguments<T> a = {(T *)out, (const T *)x, conv, decay, dt_bias, norm, *s, batch->query_starts, batch->sequences, batch->states_in,
                            batch->states_out, batch->n, batch->b, 2 * s->hk * s->pk + s->hv * s->pv, 0, eps};
    a.width = a.channels + s->hv * s->pv + 2 * s->hv;
    if constexpr (sizeof(T) == sizeof(bf16))
        if (s->pk == HEAD && s->pv == HEAD && s->taps == TAPS && a.n > DECODE_ROWS) {
            chunk_scratch scratch;
            int64_t bytes = lay_out(&scratch, (char *)stream->scratch, a.n, s->hk, s->hv);
            REQUIRE(bytes <= stream->scratch_bytes, "scratch: reserve %lld bytes (tops_stream_reserve), %lld are too few", (long long)bytes,
                    (long long)stream->scratch_bytes);
            int status = delta_within_chunks(stream, a, scratch);
            return status ? status : delta_across_chunks(stream, a, scratch);
        }
    return run_rows(stream, a);
}

int tops_gated_delta_rule(tops_stream *stream, void *out, const void *x, const float *conv, const float *decay, const float *dt_bias,
                          const float *norm, const tops_states *states, const tops_batch *batch, float eps, int32_t dtype) {
    const tops_states *s = states;
    REQUIRE(dtype == TOPS_F32 || dtype == TOPS_BF16, "dtype: must be f32 or bf16, not %d", dtype);
    REQUIRE(s->hk > 0 && s->hv > 0 && s->hv % s->hk == 0, "states: hv must be a multiple of hk, not %d of %d", s->hv, s->hk);
    REQUIRE(s->pk > 0 && s->pv > 0 && s->taps > 0, "states: pk, pv and taps must be positive, not %d, %d, %d", s->pk, s->pv, s->taps);
    if (batch->n == 0) return TOPS_OK;
    return dtype == TOPS_F32 ? run<float>(stream, out, x, conv, decay, dt_bias, norm, s, batch, eps)
                             : run<bf16>(stream, out, x, conv, decay, dt_bias, norm, s, batch, eps);
}
