/* What the files of the CPU library share: the stream, the thread team, errors, and the table of kernels for one instruction set. */
#ifndef TENSOR_OPS_CPU_INTERNAL_H
#define TENSOR_OPS_CPU_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>

#include "tensor_ops.h"

#define GROUP 16       /* rows of a weight that are stored interleaved and computed together */
#define BLOCK 32       /* columns that share one activation scale */
#define TILE 8         /* tokens that a tile computes together at most */

/* ---- errors: record the message, return the status ---- */
int tops_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define REQUIRE(condition, ...) do { if (!(condition)) return tops_fail(TOPS_INVALID, __VA_ARGS__); } while (0)

/* ---- team: the threads of a stream, which go through the stages of a program together ---- */
typedef struct tops_team tops_team;
typedef void (*tops_task)(void *context, int64_t item);
typedef int (*tops_body)(tops_stream *stream, void *context);

/* task(context, item) for every item in base .. base + items - 1, each on whatever thread takes it, or the serial body alone, on the
 * caller's thread. A stage sees what the ones before it have written. */
typedef struct {
    tops_body serial;
    tops_task task;
    void (*begin)(void *context);   /* null, or called by a thread before its first item */
    void *context;
    int64_t base, items;
    size_t count_at;                /* not 0: items is the int64_t in the context there, as the stages before have left it */
} tops_stage;
enum { MOST_STAGES = 2, MOST_ITEMS = 4095 };   /* stages of one op, items of one stage */

tops_team *tops_team_create(int threads);   /* with the caller; 0: tops_processors */
int tops_processors(void);
void tops_team_destroy(tops_team *team);
int tops_team_threads(const tops_team *team);
int tops_team_walk(tops_stream *stream, const tops_stage *stages, int64_t count);   /* the stages stay until tops_team_rest */
int tops_team_do(tops_stream *stream, const tops_stage *stages, int count);         /* MOST_STAGES at most, which are copied */
void tops_team_run(tops_stream *stream, int64_t items, tops_task task, void *context);   /* one stage of any number of items */
void tops_team_rest(const tops_team *team);   /* until no thread looks at a program that is over */
int tops_me(void);                  /* the calling thread's place in its team: 0 for the caller */

struct tops_stream {
    tops_team *team;
    unsigned char *scratch;
    int64_t scratch_bytes;
    tops_graph *recording;      /* null: ops run at once */
};

/* ---- ops: an op checks its arguments and does its stages, at once or recorded. Contexts are copied then; what stands in memory is
 * checked by the stages, because it differs between two launches. ---- */
int tops_do(tops_stream *stream, const tops_stage *stages, int count, void *context, size_t bytes);
#define CALL(body, type, ...) tops_do(stream, &(tops_stage){.serial = body}, 1, &(type){__VA_ARGS__}, sizeof(type))

/* A cursor through the stream's scratch; take gives null when it is too small. */
typedef struct {
    unsigned char *next, *end;
} tops_scratch;
static inline tops_scratch scratch_of(tops_stream *stream) {
    return (tops_scratch){stream->scratch, stream->scratch + stream->scratch_bytes};
}
static inline void *scratch_take(tops_scratch *scratch, int64_t bytes) {
    bytes = (bytes + 63) & ~(int64_t)63;
    if (scratch->end - scratch->next < bytes) return NULL;
    void *memory = scratch->next;
    scratch->next += bytes;
    return memory;
}
#define REQUIRE_SCRATCH(pointer) \
    REQUIRE((pointer) != NULL, "scratch: reserve more (tops_stream_reserve), %lld bytes are too few", (long long)stream->scratch_bytes)

/* ---- rows of activations, as the tiles read them: f32, and rounded to 8 bits or to bf16 where a weight asks for it ---- */
typedef struct {
    float scale;              /* x = scale * code */
    float sum, half_sum[2];   /* scale * the sum of the codes, of all and by halves */
    int8_t code[BLOCK];
} tops_q8;

typedef struct {
    float *f32;               /* [rows, cols] */
    tops_q8 *q8;              /* [rows, cols / BLOCK] or null */
    uint16_t *bf16;           /* [rows, cols rounded up to pairs] or null, for tile_bf16 */
    int64_t cols;
} tops_rows;
static inline int64_t bf16_pitch(int64_t cols) { return (cols + 1) / 2 * 2; }
/* Scratch for as many copies of n rows, each own_bytes after the one before; false if there is too little of it. */
bool tops_take_rows(tops_rows *rows, int64_t *own_bytes, tops_scratch *scratch, int64_t copies, int64_t n, int64_t cols, bool q8, bool bf16);
tops_rows tops_rows_after(const tops_rows *rows, int64_t bytes);
/* Row t = x, after rms_norm where a norm is given, rounded as there is room for. With bf16 the f32 row is rounded, too. */
void tops_prepare_row(const tops_rows *rows, int64_t t, const void *x, int dtype, const float *norm, float eps);

/* out [tokens, GROUP] = rows first .. first + tokens - 1 of x times one group of packed weight rows; fp8 scales by 128 columns */
typedef void (*tops_tile)(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales);

/* The same for bf16 weights and rows, up to PAIR_TILE tokens, with one group or with two, which share what is loaded of the rows.
 * Weights `ahead` bytes further on are asked for, while those here are multiplied. */
#define PAIR_TILE 12
typedef void (*tops_pair_tile)(float *const out[2], const unsigned char *const group[2], int groups, const tops_rows *x, int64_t first, int tokens,
                               int64_t ahead);

/* Queries of `tokens` neighbouring rows of one sequence and `heads` query heads that share key-value head `head`, against the
 * positions from .. until - 1: unnormalised output, running maximum and sum for each (token, head). Heads of p values lie `width`
 * apart, p rounded up to 16, with zeros in between; q and out are aligned to 64 bytes. */
typedef struct {
    const float *q;           /* [tokens * heads, width], already scaled */
    const int32_t *pages;     /* the sequence's row of the page table */
    const tops_kv *kv;
    int64_t g, p, width, head;
    int tokens, heads;
    const int32_t *positions; /* [tokens] */
    int64_t from, until;
    float *out, *maximum, *sum;
} tops_attention_item;

#define DTYPES 31   /* F32 .. BF16 by number, FP8 in slot 29 */
static inline int dtype_slot(int dtype) { return dtype == TOPS_FP8_E4M3 ? 29 : dtype; }

/* Everything whose speed depends on the instruction set. */
typedef struct {
    const char *name;
    tops_tile tile_f32[DTYPES], tile_q8[DTYPES];
    tops_pair_tile tile_bf16; /* of bf16 weights and activations; null: tile_f32 does it */
    void (*rms_norm)(float *out, const float *x, const float *weight, int64_t d, float eps);
    void (*quantize_row)(tops_q8 *q, const float *x, int64_t cols);
    void (*silu_mul)(float *out, const float *gate, const float *up, int64_t count);
    void (*attend)(const tops_attention_item *item);
    void (*load_row)(float *out, const void *in, int dtype, int64_t count);
    void (*store_row)(void *out, const float *in, int dtype, int64_t count);
    void (*store_cached)(void *out, const float *in, int dtype, int64_t p);   /* a key or value of a head */
    float (*maximum)(const float *x, int64_t count);   /* -inf for none; NaN is never larger */
    float (*sum_bytes)(const void *in, int64_t bytes);
    void (*convolve_silu)(float *out, const float *in, const float *w, int64_t taps, int64_t count);
    void (*delta_step)(float *o, float *memory, const float *q, const float *k, const float *v, float g, float beta, int64_t pk, int64_t pv);
} tops_kernels;

extern const tops_kernels *tops_cpu;   /* chosen when the library is loaded */
void tops_kernels_c(tops_kernels *table);
void tops_kernels_avx2(tops_kernels *table);
void tops_kernels_avx512(tops_kernels *table);
void tops_tiles_avx2(tops_kernels *table);     /* the integer and float tiles that are written for them */
void tops_tiles_avx512(tops_kernels *table);
void tops_float_tiles_avx2(tops_kernels *table);
void tops_bf16_tile_avx512(tops_kernels *table);   /* needs AVX512_BF16 */

/* ---- packed weights ---- */
bool tops_is_quantised(int dtype);
int64_t tops_group_bytes(int dtype, int64_t cols);   /* of GROUP rows; -1: not supported */
int64_t tops_file_row_bytes(int dtype, int64_t cols);
void tops_pack_group(unsigned char *group, const unsigned char *in, int dtype, int64_t cols, int rows);   /* at most GROUP rows of a file */
static inline int64_t group_count(int64_t rows) { return (rows + GROUP - 1) / GROUP; }
static inline size_t storage_bytes(int dtype) { return dtype == TOPS_F32 ? 4 : 2; }

/* ---- the cache: bytes of a value, and of a head's key or value in a slot (tops_kv) ---- */
static inline int64_t cached_bytes(int dtype) { return dtype == TOPS_F32 ? 4 : dtype == TOPS_Q8_0 ? 1 : 2; }
static inline int64_t cached_row_bytes(int dtype, int64_t p) { return p * cached_bytes(dtype) + (dtype == TOPS_Q8_0 ? (int64_t)sizeof(float) : 0); }
static inline int check_cache(const tops_kv *kv) {
    REQUIRE(kv->dtype == TOPS_F32 || kv->dtype == TOPS_F16 || kv->dtype == TOPS_BF16 || kv->dtype == TOPS_Q8_0,
            "kv: must be f32, f16, bf16 or Q8_0, not %d", kv->dtype);
    return TOPS_OK;
}

#endif
