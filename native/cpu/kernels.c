/* The float kernels and the plain tiles, compiled once for each instruction set: the compiler vectorises these loops.
 * Integer tiles for AVX2 and AVX-512 stand in ops/linear_tile.*.c. */
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "formats.h"

#define PASTE(a, b) a##b
#define NAMED(a, b) PASTE(a, b)
#define KERNELS NAMED(tops_kernels_, TOPS_ISA_NAME)
#define STRING(a) #a
#define TEXT(a) STRING(a)

/* ---- rows ---- */
static inline void load_halves(float *restrict out, const uint16_t *restrict in, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)   /* compilers do not find these instructions in the loop below */
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(in + i))));
#endif
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(in + i))));
#endif
    for (; i < count; i++) out[i] = float_of_f16(in[i]);
}

static inline void store_halves(uint16_t *restrict out, const float *restrict in, int64_t count) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) _mm_storeu_si128((void *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) out[i] = f16_of_float(in[i]);
}

static void load_row(float *restrict out, const void *restrict in, int dtype, int64_t count) {
    const uint16_t *half = in;
    if (dtype == TOPS_F32) memcpy(out, in, (size_t)count * 4);
    else if (dtype == TOPS_BF16) for (int64_t i = 0; i < count; i++) out[i] = float_of_bf16(half[i]);
    else load_halves(out, in, count);
}

static void store_row(void *restrict out, const float *restrict in, int dtype, int64_t count) {
    uint16_t *half = out;
    if (dtype == TOPS_F32) memcpy(out, in, (size_t)count * 4);
    else if (dtype == TOPS_BF16) for (int64_t i = 0; i < count; i++) half[i] = bf16_of_float(in[i]);
    else store_halves(out, in, count);
}

static void load_cached(float *restrict out, const unsigned char *restrict in, int dtype, int64_t p) {
    if (dtype != TOPS_Q8_0) {
        load_row(out, in, dtype, p);
        return;
    }
    float scale;
    memcpy(&scale, in + p, sizeof scale);
    for (int64_t i = 0; i < p; i++) out[i] = scale * (float)(int8_t)in[i];
}

static void store_cached(void *restrict out, const float *restrict in, int dtype, int64_t p) {
    if (dtype != TOPS_Q8_0) {
        store_row(out, in, dtype, p);
        return;
    }
    float most = 0;
    for (int64_t i = 0; i < p; i++) most = fabsf(in[i]) > most ? fabsf(in[i]) : most;
    float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0;
    int8_t *codes = out;
    for (int64_t i = 0; i < p; i++) codes[i] = (int8_t)rintf(in[i] * inverse);
    memcpy(codes + p, &scale, sizeof scale);
}

static void rms_norm(float *restrict out, const float *restrict x, const float *restrict weight, int64_t d, float eps) {
    float sum = 0;
    for (int64_t i = 0; i < d; i++) sum += x[i] * x[i];
    float factor = 1.0f / sqrtf(sum / (float)d + eps);
    for (int64_t i = 0; i < d; i++) out[i] = x[i] * factor * weight[i];
}

static void silu_mul(float *out, const float *gate, const float *up, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = silu(gate[i]) * up[i];
}

/* Codes of a block, their sums by halves, and the largest magnitude. Compilers keep to one value at a time here, because the largest of
 * values that may be NaN depends on their order. */
static inline float largest_of_block(const float *x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x)), _mm512_abs_ps(_mm512_loadu_ps(x + 16))));
#elif defined(__AVX2__)
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_and_ps(_mm256_loadu_ps(x), magnitude);
    for (int c = 8; c < BLOCK; c += 8) most = _mm256_max_ps(most, _mm256_and_ps(_mm256_loadu_ps(x + c), magnitude));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
    float most = 0;
    for (int c = 0; c < BLOCK; c++) most = fabsf(x[c]) > most ? fabsf(x[c]) : most;
    return most;
#endif
}

static inline int32_t codes_of_half(int8_t *code, const float *x, float inverse) {
#if defined(__AVX512F__)
    __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
    _mm_storeu_si128((void *)code, _mm512_cvtepi32_epi8(codes));
    return _mm512_reduce_add_epi32(codes);
#elif defined(__AVX2__)
    __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(inverse)));
    __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), _mm256_set1_ps(inverse)));
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8), all = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    _mm_storeu_si128((void *)code, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1);
#else
    int32_t sum = 0;
    for (int c = 0; c < BLOCK / 2; c++) {
        int32_t one = (int32_t)rintf(x[c] * inverse);
        code[c] = (int8_t)one;
        sum += one;
    }
    return sum;
#endif
}

static void quantize_row(tops_q8 *restrict q, const float *restrict x, int64_t cols) {
    for (int64_t b = 0; b < cols / BLOCK; b++, x += BLOCK, q++) {
        float most = largest_of_block(x), inverse = most > 0 ? 127.0f / most : 0;
        q->scale = most / 127.0f;
        int32_t sum[2];
        for (int half = 0; half < 2; half++) {
            sum[half] = codes_of_half(q->code + 16 * half, x + 16 * half, inverse);
            q->half_sum[half] = q->scale * (float)sum[half];
        }
        q->sum = q->scale * (float)(sum[0] + sum[1]);
    }
}

static float sum_bytes(const void *in, int64_t bytes) {
    enum { WORDS = 64 };   /* eight cache lines at a time, in independent sums */
    const unsigned char *at = in;
    uint64_t sum[WORDS] = {0}, total = 0;
    for (; bytes >= 8 * WORDS; bytes -= 8 * WORDS, at += 8 * WORDS)
        for (int i = 0; i < WORDS; i++) {
            uint64_t word;
            memcpy(&word, at + 8 * i, 8);
            sum[i] += word;
        }
    for (int i = 0; i < WORDS; i++) total += sum[i];
    for (int64_t i = 0; i < bytes; i++) total += at[i];
    return (float)total;
}

#include "../ops/attention.kernels.h"
#include "../ops/gated_delta_rule.kernels.h"

static float maximum(const float *x, int64_t count) {
    enum { ACROSS = 4 };
    vec lane[ACROSS];
    float most = -INFINITY;
    int64_t i = 0;
    for (int j = 0; j < ACROSS; j++) lane[j] = (vec){0} - INFINITY;
    for (; i + ACROSS * LANES <= count; i += ACROSS * LANES)
        for (int j = 0; j < ACROSS; j++) {
            vec next;
            memcpy(&next, x + i + j * LANES, sizeof next);
            lane[j] = larger(next, lane[j]);
        }
    for (; i < count; i++) most = x[i] > most ? x[i] : most;
    for (int j = 0; j < ACROSS; j++)
        for (int k = 0; k < LANES; k++) most = lane[j][k] > most ? lane[j][k] : most;
    return most;
}

/* ---- tiles ---- */

/* Columns first .. first + count - 1 (at most BLOCK) of a group as f32 [count, GROUP]. */
static inline __attribute__((always_inline)) void decode(float (*restrict w)[GROUP], const unsigned char *group, int dtype, int64_t first,
                                                         int count, const float *scales) {
    tops_format f = format_of(dtype);
    if (f.super) {
        const unsigned char *header = header_at(f, group, first / BLOCK), *block = block_at(f, group, first / BLOCK);
        float scale[2][GROUP], minimum[2][GROUP];
        for (int half = 0; half < 2; half++)
            for (int row = 0; row < GROUP; row++) affine_of(dtype, header, block, row, half, &scale[half][row], &minimum[half][row]);
        for (int c = 0; c < BLOCK; c++)
            for (int row = 0; row < GROUP; row++) w[c][row] = scale[c / 16][row] * (float)(code_at(f, block, row, c) - f.offset) + minimum[c / 16][row];
        return;
    }
    for (int c = 0; c < count; c++) {
        int64_t place = (first + c) * GROUP;
        if (dtype == TOPS_F32) memcpy(w[c], group + place * 4, sizeof w[c]);
        else if (dtype == TOPS_F16) for (int row = 0; row < GROUP; row++) w[c][row] = float_of_f16(u16_at(group, place + row));
        else if (dtype == TOPS_BF16)
            for (int row = 0; row < GROUP; row++) w[c][row] = float_of_bf16(u16_at(group, ((first + c) / 2 * GROUP + row) * 2 + (first + c) % 2));
        else {
            float block_scale = scales ? scales[(first + c) / 128] : 1.0f;
            for (int row = 0; row < GROUP; row++) w[c][row] = float_of_fp8(group[place + row]) * block_scale;
        }
    }
}

static inline __attribute__((always_inline)) void tile_f32(int dtype, float *restrict out, const unsigned char *group, const tops_rows *x,
                                                           int64_t first, int tokens, const float *scales) {
    float sum[TILE][GROUP] = {{0}}, w[BLOCK][GROUP];
    for (int64_t c = 0; c < x->cols; c += BLOCK) {
        int count = x->cols - c < BLOCK ? (int)(x->cols - c) : BLOCK;
        decode(w, group, dtype, c, count, scales);
        for (int t = 0; t < tokens; t++) {
            const float *row = x->f32 + (first + t) * x->cols + c;
            float part[GROUP];
            memcpy(part, sum[t], sizeof part);
            for (int i = 0; i < count; i++)
                for (int r = 0; r < GROUP; r++) part[r] += w[i][r] * row[i];
            memcpy(sum[t], part, sizeof part);
        }
    }
    memcpy(out, sum, (size_t)tokens * GROUP * sizeof(float));
}

/* Integer dot products by halves of a block, scaled afterwards; an offset of the codes counts as a minimum of -offset scale. */
static inline __attribute__((always_inline)) void tile_q8(int dtype, float *restrict out, const unsigned char *group, const tops_rows *x,
                                                          int64_t first, int tokens) {
    tops_format f = format_of(dtype);
    int64_t blocks = x->cols / BLOCK;
    for (int i = 0; i < tokens * GROUP; i++) out[i] = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const unsigned char *header = header_at(f, group, b), *block = block_at(f, group, b);
        for (int half = 0; half < 2; half++) {
            int32_t code[16][GROUP];
            float scale[GROUP], minimum[GROUP];
            for (int r = 0; r < GROUP; r++) affine_of(dtype, header, block, r, half, &scale[r], &minimum[r]);
            for (int r = 0; r < GROUP; r++) minimum[r] -= (float)f.offset * scale[r];
            for (int c = 0; c < 16; c++)
                for (int r = 0; r < GROUP; r++) code[c][r] = code_at(f, block, r, 16 * half + c);
            for (int t = 0; t < tokens; t++) {
                const tops_q8 *q = x->q8 + (first + t) * blocks + b;
                int32_t dot[GROUP] = {0};
                for (int c = 0; c < 16; c++)
                    for (int r = 0; r < GROUP; r++) dot[r] += code[c][r] * q->code[16 * half + c];
                for (int r = 0; r < GROUP; r++) out[t * GROUP + r] += scale[r] * (q->scale * (float)dot[r]) + minimum[r] * q->half_sum[half];
            }
        }
    }
}

#define TILE_F32(NAME) \
    static void tile_f32_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        tile_f32(TOPS_##NAME, out, group, x, first, tokens, scales); \
    }
#define TILES(NAME) \
    TILE_F32(NAME) \
    static void tile_q8_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        (void)scales; \
        tile_q8(TOPS_##NAME, out, group, x, first, tokens); \
    }
TILE_F32(F32) TILE_F32(F16) TILE_F32(BF16) TILE_F32(FP8_E4M3)
TILES(Q4_0) TILES(Q4_1) TILES(Q5_0) TILES(Q5_1) TILES(Q8_0) TILES(Q4_K) TILES(Q5_K) TILES(Q6_K)

void KERNELS(tops_kernels *table) {
    table->name = TEXT(TOPS_ISA_NAME);
#define PUT_F32(NAME) table->tile_f32[dtype_slot(TOPS_##NAME)] = tile_f32_##NAME;
#define PUT(NAME) PUT_F32(NAME) table->tile_q8[TOPS_##NAME] = tile_q8_##NAME;
    PUT_F32(F32) PUT_F32(F16) PUT_F32(BF16) PUT_F32(FP8_E4M3)
    PUT(Q4_0) PUT(Q4_1) PUT(Q5_0) PUT(Q5_1) PUT(Q8_0) PUT(Q4_K) PUT(Q5_K) PUT(Q6_K)
    table->rms_norm = rms_norm;
    table->quantize_row = quantize_row;
    table->silu_mul = silu_mul;
    table->attend = attend;
    table->load_row = load_row;
    table->store_row = store_row;
    table->store_cached = store_cached;
    table->sum_bytes = sum_bytes;
    table->maximum = maximum;
    table->convolve_silu = convolve_silu;
    table->delta_step = delta_step;
}
