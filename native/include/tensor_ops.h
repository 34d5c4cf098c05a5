/*
 * libtensor_ops: tensors in, tensors out.
 *
 * The whole C surface of the kernel library, and the declaration that Python reads (the text between CDEF-BEGIN and CDEF-END
 * goes to cffi as it is). Two libraries export exactly these names: libtensor_ops.so computes on the CPU,
 * libtensor_ops_cuda.so on an NVIDIA GPU. Which library is open decides the device.
 *
 * The library knows pointers, shapes and number formats; it has never heard of a model, a request or a file.
 *
 * Rules of every op
 *   - tops_<op>(stream, out, inputs, sizes, scalars) -> status. Out first. Work is ordered by the stream and may run on after the
 *     call returns (CUDA); the only calls that wait are copy_out, stream_synchronize and stream_destroy.
 *   - Pointers are the library's memory (tops_alloc), except where a comment says host. The CPU library takes any host memory.
 *   - Nothing is allocated, printed or exited; scratch is reserved once for each stream. A size of 0 is a valid no-op.
 *   - Sums, norms, softmax and rotations are computed in f32 whatever the storage; storage is rounded to nearest even.
 *   - A status other than TOPS_OK comes with tops_last_error(): the argument, what is required of it and its value.
 *   - What differs between two decode steps is in device memory, never in an argument: a recorded graph replays any step.
 *
 * Letters: n tokens, d width, i feed-forward width, h query heads, g key-value heads, p head width, v vocabulary, b sequences.
 * Arrays are row-major; [n, d] is n rows of d.
 */
#ifndef TENSOR_OPS_H
#define TENSOR_OPS_H

#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

/* CDEF-BEGIN */
enum { TOPS_ABI = 1 };

/* Every function returns one of these unless its line says otherwise. */
typedef enum {
    TOPS_OK = 0,
    TOPS_INVALID = 1,       /* an argument breaks its contract: a mistake of the caller */
    TOPS_UNSUPPORTED = 2,   /* this library does not have that combination */
    TOPS_NO_DEVICE = 3,     /* no driver, a driver too old, or no such device */
    TOPS_OUT_OF_MEMORY = 4,
    TOPS_DEVICE_FAILED = 5  /* a kernel failed; the stream is lost */
} tops_status;

/* Number formats; the values are those of GGUF files where GGUF has the format. */
typedef enum {
    TOPS_F32 = 0, TOPS_F16 = 1, TOPS_BF16 = 30,
    TOPS_Q4_0 = 2, TOPS_Q4_1 = 3, TOPS_Q5_0 = 6, TOPS_Q5_1 = 7, TOPS_Q8_0 = 8,
    TOPS_Q4_K = 12, TOPS_Q5_K = 13, TOPS_Q6_K = 14,
    TOPS_FP8_E4M3 = 100     /* with one scale for each block of 128 x 128 */
} tops_dtype;

typedef struct tops_stream tops_stream;
typedef struct tops_graph tops_graph;

/* A matrix W [rows, cols] as tops_pack left it; a linear layer computes y = x W^T.
 * `scales` is null but for TOPS_FP8_E4M3: f32 [ceil(rows/128), ceil(cols/128)], multiplied in.
 * `activations` is how x is rounded before the product: TOPS_F32 and TOPS_BF16 (not at all, or to bf16), TOPS_Q8_0 (to 8-bit
 * integers in groups of 32 with one f32 scale, which is what makes integer dot products possible; weights in f32, f16, bf16
 * and fp8 ignore it).
 * `in_place` is null but for a stack of experts that is not packed: where the rows of each expert lie as files hold them. */
typedef struct {
    const void *data;
    const float *scales;
    int64_t rows, cols;
    int32_t dtype;
    int32_t activations;
    const void *const *in_place;
} tops_weight;

/* One layer's keys and values, [pages, g, page_size, p] each; slot s is row s % page_size of page s / page_size. In TOPS_Q8_0 a row
 * is p codes of 8 bits and behind them one f32, their scale: largest value / 127 (the CPU library only). */
typedef struct {
    void *k, *v;
    int64_t pages;
    int32_t page_size;
    int32_t dtype;          /* TOPS_F32, TOPS_F16, TOPS_BF16 or TOPS_Q8_0 */
} tops_kv;

/* Where the n tokens of a step stand. Rows of one sequence are neighbours, in order of position; a row attends to positions
 * 0 .. positions[row] of its sequence. Padding rows name a sequence whose pages are all page 0, which nothing else uses. */
typedef struct {
    const int32_t *positions;     /* [n] index of the token in its sequence */
    const int32_t *slots;         /* [n] where its key and value are stored */
    const int32_t *sequences;     /* [n] row of page_table */
    const int32_t *page_table;    /* [b, max_pages] */
    const int32_t *query_starts;  /* [b + 1] first row of each sequence */
    const int32_t *states_in;     /* [b] slot of the recurrent state that a sequence starts from; -1: zeros */
    const int32_t *states_out;    /* [n] slot that keeps the recurrent state as it is after the row; -1: none */
    int64_t n, b, max_pages;
} tops_batch;

/* One layer's recurrent states: hk key heads of pk, hv value heads of pv (value head j reads key head j / (hv / hk)), c = 2 hk pk +
 * hv pv channels of a causal convolution of `taps`. Slot s begins s * pitch values after slot 0. */
typedef struct {
    float *inputs;          /* [taps - 1, c] the convolution's last inputs, oldest first */
    float *memory;          /* [hv, pk, pv] */
    int64_t slots, pitch;
    int32_t hk, hv, pk, pv, taps;
} tops_states;

/* How one row of logits becomes a token. temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch those off.
 * The draw depends on (seed, position) alone: the same on every library and in every batch. */
typedef struct {
    float temperature, top_p, min_p, repetition_penalty, presence_penalty;
    int32_t top_k;
    uint64_t seed;
} tops_sampling;

/* ---- the library ------------------------------------------------------------------------------------------------------- */
int32_t tops_abi(void);                                   /* TOPS_ABI of the library that is open */
const char *tops_build(void);                             /* device kind, compiler, instruction set or architectures */
const char *tops_last_error(void);                        /* of the calling thread; valid until its next failing call */
int tops_device_count(int32_t *count);                    /* CPU: 1 */
int tops_device_name(int32_t device, char *name, int64_t capacity);
int tops_memory_info(int32_t device, int64_t *free_bytes, int64_t *total_bytes);

/* ---- streams, memory, graphs ------------------------------------------------------------------------------------------- */
/* threads: size of the CPU team including the caller, 0 for one per physical core; the CUDA library ignores it.
 * A stream is used by one thread at a time. */
int tops_stream_create(tops_stream **stream, int32_t device, int32_t threads);
int tops_stream_destroy(tops_stream *stream);
int tops_stream_synchronize(tops_stream *stream);
int64_t tops_scratch_bytes(int64_t n, int64_t widest, int64_t h, int64_t p);  /* enough for any op of n tokens, widest row or column */
int tops_stream_reserve(tops_stream *stream, int64_t scratch_bytes);          /* grows, never shrinks; waits */

int tops_alloc(tops_stream *stream, void **memory, int64_t bytes);            /* zeros, 64-byte aligned; CPU: 2 MB pages where allowed */
int tops_free(tops_stream *stream, void *memory, int64_t bytes);
int tops_alloc_host(tops_stream *stream, void **memory, int64_t bytes);       /* host memory the device copies from fastest; not zeroed */
int tops_free_host(tops_stream *stream, void *memory, int64_t bytes);
int tops_copy_in(tops_stream *stream, void *out, const void *host, int64_t bytes);   /* host may be reused when it returns */
/* count pieces of `bytes` each, from anywhere in the host's memory, one after the other into out: for files, on several threads */
int tops_copy_in_pieces(tops_stream *stream, void *out, const void *const *hosts, int64_t count, int64_t bytes);
int tops_copy_out(tops_stream *stream, void *host, const void *in, int64_t bytes);   /* waits */
int tops_copy_in_async(tops_stream *stream, void *out, const void *pinned, int64_t bytes);  /* from tops_alloc_host, untouched until done */
int tops_copy_out_async(tops_stream *stream, void *pinned, const void *in, int64_t bytes);
/* height pieces of width bytes, each pitch bytes after the one before, within the library's memory */
int tops_copy_2d(tops_stream *stream, void *out, int64_t out_pitch, const void *in, int64_t in_pitch, int64_t width, int64_t height);
int tops_zero(tops_stream *stream, void *out, int64_t bytes);
int tops_read(tops_stream *stream, float *out, const void *in, int64_t bytes);       /* out[0] = a sum over all of it: measures read bandwidth */

/* Between begin and end, ops are recorded and not run; structs that an op is given are copied. */
int tops_graph_begin(tops_stream *stream);
int tops_graph_end(tops_stream *stream, tops_graph **graph);
int tops_graph_launch(tops_stream *stream, tops_graph *graph);
int tops_graph_free(tops_stream *stream, tops_graph *graph);

/* ---- weights ----------------------------------------------------------------------------------------------------------- */
/* A library keeps each format in the layout its kernels read best. packed_bytes says how large that is (-1: format or shape
 * not supported), pack makes it from rows as files hold them, unpack_rows decodes rows to f32 exactly. */
int64_t tops_packed_bytes(int32_t dtype, int64_t rows, int64_t cols);
int tops_pack(tops_stream *stream, void *out, const void *in, int32_t dtype, int64_t rows, int64_t cols);
int tops_unpack_rows(tops_stream *stream, float *out, const tops_weight *w, int64_t first, int64_t count);
/* The same for a matrix of an expert, which a library may lay out in another way. */
int64_t tops_packed_expert_bytes(int32_t dtype, int64_t rows, int64_t cols);
int tops_pack_expert(tops_stream *stream, void *out, const void *in, int32_t dtype, int64_t rows, int64_t cols);
int32_t tops_reads_in_place(int32_t dtype, int64_t cols);   /* 1: experts of that format need not be packed (tops_weight) */
/* in f32 [rows, cols] -> file layout of dtype Q8_0 or Q4_0 (round to nearest), bf16 or f16 */
int tops_quantize(tops_stream *stream, void *out, const float *in, int32_t dtype, int64_t rows, int64_t cols);
int tops_convert(tops_stream *stream, void *out, int32_t out_dtype, const void *in, int32_t in_dtype, int64_t count);  /* f32, f16, bf16 */

/* ---- ops; `dtype` is the storage of activations, TOPS_F32 or TOPS_BF16; norm weights are f32 ----------------------------- */
/* out[t] = row ids[t] of w; an id outside the matrix gives zeros */
int tops_embed(tops_stream *stream, void *out, const tops_weight *w, const int32_t *ids, int64_t n, int32_t dtype);
/* out[t] = in[rows[t]], rows of d */
int tops_gather_rows(tops_stream *stream, void *out, const void *in, const int32_t *rows, int64_t n, int64_t d, int32_t dtype);
/* out = x * rsqrt(mean(x^2) + eps) * weight, rows of d */
int tops_rms_norm(tops_stream *stream, void *out, const void *x, const float *weight, int64_t n, int64_t d, float eps, int32_t dtype);
/* out[t] = silu(gate) * up, where x[t] = [gate of i | up of i] */
int tops_silu_mul(tops_stream *stream, void *out, const void *x, int64_t n, int64_t i, int32_t dtype);

/* A stack of `parts` matrices with equal cols and their own formats; their rows follow each other in the output.
 * linear:                out = x W^T                                       x [n, cols] -> out [n, sum of rows]
 * linear_add:            out += x W^T                                      (one part)
 * rms_norm_linear:       out = rms_norm(x, norm, eps) W^T
 * rms_norm_gate_up_silu: g, u = rms_norm(x) Wgate^T, rms_norm(x) Wup^T;  out = silu(g) * u      w = {gate, up} of equal rows
 * linear_f32 and rms_norm_linear_f32 write f32 whatever dtype is: logits. */
int tops_linear(tops_stream *stream, void *out, const void *x, const tops_weight *w, int32_t parts, int64_t n, int32_t dtype);
int tops_linear_add(tops_stream *stream, void *out, const void *x, const tops_weight *w, int64_t n, int32_t dtype);
int tops_rms_norm_linear(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                         int64_t n, float eps, int32_t dtype);
int tops_rms_norm_linear_f32(tops_stream *stream, float *out, const void *x, const float *norm, const tops_weight *w, int32_t parts,
                             int64_t n, float eps, int32_t dtype);
int tops_rms_norm_gate_up_silu(tops_stream *stream, void *out, const void *x, const float *norm, const tops_weight *w,
                               int64_t n, float eps, int32_t dtype);

/* table[t] = (cos, sin) of positions[t] * inv_freq[j] for j < r/2, interleaved f32 [n, r/2, 2]; once a step, shared by layers */
int tops_rope_table(tops_stream *stream, float *table, const int32_t *positions, const float *inv_freq, int64_t n, int64_t r);
/* For each row of qkv = [q of h heads | k of g heads | v of g heads], heads of p: norm q and k by head where the norm weights
 * are not null (f32 [p]), rotate their first r dimensions, leave q in place and store k and v in their slots.
 * pairs: 0 rotates (x[j], x[j + r/2]) (half-split, NeoX), 1 rotates (x[2j], x[2j + 1]).
 * gated: rows are [q | k | v | gate of h heads]; paged_attention multiplies its result by sigmoid(gate). */
int tops_qk_norm_rope_store(tops_stream *stream, void *qkv, const tops_kv *kv, const tops_batch *batch, const float *table,
                            const float *q_norm, const float *k_norm, int64_t h, int64_t g, int64_t p, int64_t r,
                            int32_t pairs, int32_t gated, float eps, int32_t dtype);
/* out [n, h p] = softmax(scale q k^T) v, causal, query head j reads key-value head j / (h / g); q as qkv rows left by the op above */
int tops_paged_attention(tops_stream *stream, void *out, const void *qkv, const tops_kv *kv, const tops_batch *batch,
                         int64_t h, int64_t g, int64_t p, float scale, int32_t gated, int32_t dtype);
/* The two above, one after the other; a GPU decodes with them in one launch. Where q is left is not said: qkv may change. */
int tops_rope_attention(tops_stream *stream, void *out, void *qkv, const tops_kv *kv, const tops_batch *batch, const float *table,
                        const float *q_norm, const float *k_norm, int64_t h, int64_t g, int64_t p, int64_t r,
                        int32_t pairs, int32_t gated, float scale, float eps, int32_t dtype);

/* ---- recurrent layers: the gated delta rule ----------------------------------------------------------------------------- */
/* For each row of x = [q of hk heads | k of hk heads | v of hv heads | z of hv heads | b [hv] | a [hv]]:
 *   [q | k | v] = silu(conv [c, taps] over the sequence's rows), by head q = q / |q| / sqrt(pk), k = k / |k|  (|x|^2 = sum + 1e-6)
 *   g = exp(decay softplus(a + dt_bias)), decay < 0;  S = g S;  S = S + k (sigmoid(b) (v - S^T k))^T;  o = S^T q
 *   out [n, hv pv] = rms_norm(o of a head, norm [pv], eps) * silu(z)
 * S and the convolution's inputs come from slot batch->states_in and go to the slots of batch->states_out. No two rows of a step
 * keep the same slot, and a slot that is kept is read by its own sequence at most. */
int tops_gated_delta_rule(tops_stream *stream, void *out, const void *x, const float *conv, const float *decay, const float *dt_bias,
                          const float *norm, const tops_states *states, const tops_batch *batch, float eps, int32_t dtype);

/* ---- mixtures of experts: e experts of width i, k of them and a shared one for each token ------------------------------------ */
/* normed = rms_norm(x, norm, eps); l = normed W^T with w = {router [e, d], gate of the shared expert [1, d]} (parts 1: no gate)
 * logits f32 [n, rows of w]: l and the gate before its sigmoid;  experts [n, k]: those with the largest l, largest first, ties to the lower number
 * shares [n, k + 1]: softmax(l) at experts, divided by its sum where renormalize is 1; last sigmoid(gate), 1 without */
int tops_rms_norm_route(tops_stream *stream, void *normed, float *logits, int32_t *experts, float *shares, const void *x,
                        const float *norm, const tops_weight *w, int32_t parts, int64_t n, int64_t k, int32_t renormalize, float eps,
                        int32_t dtype);
/* w, a stack of e experts, holds e matrices of rows / e rows, each as tops_pack_expert left it, one after the other; so do its
 * scales. The shared expert is a stack of one. A GPU rounds the scales of Q4_K, Q5_K and Q6_K experts to f16 (2^-11).
 * gate_up_silu: out [n, k + 1, i] = silu(x Wgate^T) * (x Wup^T) with w = {gate, up} of the token's k experts, then of the shared one
 * down_add: out [n, d] += sum over j of shares[j] x[j] Wdown^T,  x [n, k + 1, i] */
int tops_experts_gate_up_silu(tops_stream *stream, void *out, const void *x, const int32_t *experts, const tops_weight *w,
                              const tops_weight *shared, int64_t n, int64_t e, int64_t k, int32_t dtype);
int tops_experts_down_add(tops_stream *stream, void *out, const void *x, const int32_t *experts, const float *shares,
                          const tops_weight *w, const tops_weight *shared, int64_t n, int64_t e, int64_t k, int32_t dtype);
/* order: the indices of values [n] in 0 .. e-1, by value, then by index; those of value v are order[starts[v] .. starts[v + 1]) */
int tops_gather_by_value(tops_stream *stream, int32_t *order, int32_t *starts, const int32_t *values, int64_t n, int64_t e);
/* out[index[t]] += scale[t] * in[t] (scale null: 1), rows of d, in order of t; an index outside 0 .. rows - 1 is left out */
int tops_scatter_add_by_index(tops_stream *stream, void *out, const void *in, const int32_t *index, const float *scale,
                              int64_t n, int64_t rows, int64_t d, int32_t dtype);

/* ---- from logits to tokens: logits f32 [n, v] --------------------------------------------------------------------------- */
/* Sets logits of tokens >= vocabulary, and of those whose bit in allowed [n, ceil(v/32)] is 0 (null: all allowed), to -inf, then
 * applies the penalties to the tokens in history [n, capacity], of which the first lengths[t] count. */
int tops_restrict_logits(tops_stream *stream, float *logits, const uint32_t *allowed, const tops_sampling *sampling,
                         const int32_t *history, const int32_t *lengths, int64_t n, int64_t v, int64_t vocabulary, int64_t capacity);
/* ids[t] drawn from logits[t]; ties go to the lower id; positions [n] feed the random numbers; logprobs[t] (null: not wanted) is
 * the token's log-probability under the unmodified softmax of that row */
int tops_sample(tops_stream *stream, int32_t *ids, float *logprobs, const float *logits, const tops_sampling *sampling,
                const int32_t *positions, int64_t n, int64_t v);
/* CDEF-END */

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#endif
