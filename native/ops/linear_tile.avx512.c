/* Tiles for AVX-512 with VNNI. A register holds the same four columns of all 16 rows; a token's columns are broadcast.
 *
 * Per block of 32 columns, sum += scale (step dot) + minimum (step sum of the token's codes), where an offset of the codes is
 * a minimum of -offset scale: dot is exact in integers and every format takes the same four float operations.
 * A token's sums are added in the same order however many tokens share the tile: batches do not change results.
 */
#include <immintrin.h>

#include "../cpu/formats.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 halves(const unsigned char *f16) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)f16)); }
INLINE __m512 unsigned_bytes(const unsigned char *u8) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)u8))); }
INLINE __m512 signed_bytes(const unsigned char *i8) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)i8))); }

/* Values are scale * code + minimum, by halves of a block where the format has them (Q6_K). */
typedef struct {
    __m512 scale[2], minimum[2];
} affine;

INLINE affine affine_of_rows(int dtype, const unsigned char *header, const unsigned char *block) {
    affine a;
    switch (dtype) {
    case TOPS_Q4_1: case TOPS_Q5_1:
        a.scale[0] = halves(block);
        a.minimum[0] = halves(block + 32);
        break;
    case TOPS_Q4_K: case TOPS_Q5_K:
        a.scale[0] = _mm512_mul_ps(halves(header), unsigned_bytes(block));
        a.minimum[0] = _mm512_fnmadd_ps(halves(header + 32), unsigned_bytes(block + 16), _mm512_setzero_ps());
        break;
    case TOPS_Q6_K:
        for (int half = 0; half < 2; half++) {
            a.scale[half] = _mm512_mul_ps(halves(header), signed_bytes(block + 16 * half));
            a.minimum[half] = _mm512_mul_ps(a.scale[half], _mm512_set1_ps(-32));
        }
        return a;
    default:
        a.scale[0] = halves(block);
        a.minimum[0] = _mm512_mul_ps(a.scale[0], _mm512_set1_ps((float)-format_of(dtype).offset));
    }
    a.scale[1] = a.scale[0];
    a.minimum[1] = a.minimum[0];
    return a;
}

/* Unsigned codes of a block: vector v holds columns 4v .. 4v + 3. */
INLINE void codes_of(__m512i code[8], tops_format f, const unsigned char *at) {
    if (f.bits == 8) {
        for (int v = 0; v < 8; v++) code[v] = _mm512_loadu_si512(at + 64 * v);
        return;
    }
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int v = 0; v < 4; v++) {
        __m512i pair = _mm512_loadu_si512(at + 64 * v);
        code[v] = _mm512_and_si512(pair, nibble);
        code[4 + v] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), nibble);
    }
    at += 256;
    for (int bit = 4; bit < f.bits; bit++, at += 64)
        for (int v = 0; v < 8; v++)
            code[v] = _mm512_mask_add_epi8(code[v], _load_mask64((__mmask64 *)(at + 8 * v)), code[v], _mm512_set1_epi8((char)(1 << bit)));
}

/* Four neighbouring codes of a token in every lane. */
INLINE __m512i four(const int8_t *code) {
    int32_t bits;
    memcpy(&bits, code, 4);
    return _mm512_set1_epi32(bits);
}

/* dot[t] = products of `count` vectors of codes with each token's codes from x on; x's are `stride` blocks apart. */
INLINE void dots_of(__m512i dot[TILE], int tokens, const __m512i *code, int count, const int8_t *x, int64_t stride) {
    for (int t = 0; t < tokens; t++) dot[t] = _mm512_setzero_si512();
    for (int v = 0; v < count; v++)
        for (int t = 0; t < tokens; t++) dot[t] = _mm512_dpbusd_epi32(dot[t], code[v], four(x + t * stride * (int64_t)sizeof(tops_q8) + 4 * v));
}

INLINE __m512 add_part(__m512 sum, __m512 scale, __m512 minimum, __m512i dot, float step, float token_sum) {
    sum = _mm512_fmadd_ps(scale, _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(step)), sum);
    return _mm512_fmadd_ps(minimum, _mm512_set1_ps(token_sum), sum);
}

INLINE void add_block(__m512 sum[TILE], int dtype, int tokens, affine a, const __m512i code[8], const tops_q8 *x, int64_t stride) {
    __m512i dot[TILE];
    if (dtype == TOPS_Q6_K) {
        dots_of(dot, tokens, code, 4, x->code, stride);
        for (int t = 0; t < tokens; t++) sum[t] = add_part(sum[t], a.scale[0], a.minimum[0], dot[t], x[t * stride].scale, x[t * stride].half_sum[0]);
        dots_of(dot, tokens, code + 4, 4, x->code + 16, stride);
        for (int t = 0; t < tokens; t++) sum[t] = add_part(sum[t], a.scale[1], a.minimum[1], dot[t], x[t * stride].scale, x[t * stride].half_sum[1]);
        return;
    }
    dots_of(dot, tokens, code, 8, x->code, stride);
    for (int t = 0; t < tokens; t++) sum[t] = add_part(sum[t], a.scale[0], a.minimum[0], dot[t], x[t * stride].scale, x[t * stride].sum);
}

INLINE void tile_q8(int dtype, int tokens, float *out, const unsigned char *group, const tops_q8 *x, int64_t blocks) {
    tops_format f = format_of(dtype);
    int in_super = f.super / BLOCK;
    __m512 sum[TILE];
    for (int t = 0; t < tokens; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; group += super_bytes(f)) {
        const unsigned char *block = group + f.header;
        for (int i = 0; i < in_super; i++, b++, block += block_bytes(f)) {
            ask_ahead(block, block_bytes(f));
            __m512i code[8];
            codes_of(code, f, block + f.affine);
            affine a = affine_of_rows(dtype, group, block);
            add_block(sum, dtype, tokens, a, code, x + b, blocks);
        }
    }
    for (int t = 0; t < tokens; t++) _mm512_storeu_ps(out + t * GROUP, sum[t]);
}

/* Column c of a float format, 16 rows. */
INLINE __m512 column_of(int dtype, const unsigned char *group, int64_t c, const float *scales) {
    if (dtype == TOPS_F32) return _mm512_loadu_ps(group + 64 * c);
    if (dtype == TOPS_F16) return halves(group + 32 * c);
    if (dtype == TOPS_BF16) {
        __m512i pair = _mm512_loadu_si512(group + 64 * (c / 2));
        return _mm512_castsi512_ps(c % 2 ? _mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(pair, 16));
    }
    /* e4m3 moved to the place of f16's fields is 256 times too small. */
    __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(group + 16 * c)));
    __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x7f)), 7);
    __m256i f16 = _mm256_or_si256(magnitude, _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8));
    return _mm512_mul_ps(_mm512_cvtph_ps(f16), _mm512_set1_ps(256.0f * (scales ? scales[c / 128] : 1.0f)));
}

INLINE void add_column(__m512 *sum, int tokens, __m512 w, const float *x, int64_t cols) {
    for (int t = 0; t < tokens; t++) sum[t] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[t * cols]), sum[t]);
}

INLINE void tile_f32(int dtype, int tokens, float *out, const unsigned char *group, const float *x, int64_t cols, const float *scales) {
    tops_format f = format_of(dtype);
    __m512 even[TILE], odd[TILE];   /* two chains of additions, because one would wait for itself */
    for (int t = 0; t < tokens; t++) even[t] = odd[t] = _mm512_setzero_ps();
    if (f.super) {
        for (int64_t b = 0; b < cols / BLOCK; b++, x += BLOCK) {
            const unsigned char *block = block_at(f, group, b);
            ask_ahead(block, block_bytes(f));
            affine a = affine_of_rows(dtype, header_at(f, group, b), block);
            __m512i code[8];
            codes_of(code, f, block + f.affine);
            for (int c = 0; c < BLOCK; c++) {
                __m512i column = _mm512_and_si512(_mm512_srli_epi32(code[c / 4], (unsigned)(c % 4 * 8)), _mm512_set1_epi32(255));
                __m512 w = _mm512_fmadd_ps(a.scale[c / 16], _mm512_cvtepi32_ps(column), a.minimum[c / 16]);
                add_column(c % 2 ? odd : even, tokens, w, x + c, cols);
            }
        }
    } else {
        int64_t c = 0, two_columns = 2 * GROUP * float_bytes(dtype);
        for (; c + 2 <= cols; c += 2) {
            ask_ahead(group + c / 2 * two_columns, two_columns);
            add_column(even, tokens, column_of(dtype, group, c, scales), x + c, cols);
            add_column(odd, tokens, column_of(dtype, group, c + 1, scales), x + c + 1, cols);
        }
        if (c < cols) add_column(even, tokens, column_of(dtype, group, c, scales), x + c, cols);
    }
    for (int t = 0; t < tokens; t++) _mm512_storeu_ps(out + t * GROUP, _mm512_add_ps(even[t], odd[t]));
}

/* A tile of any number of tokens from those of 8, 4, 2 and 1, whose sums stay in registers. */
#define TAKE(T, CALL) \
    for (; tokens >= T; tokens -= T, first += T, out += T * GROUP) CALL;
#define FLOATS(NAME) \
    static void tile_f32_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        TAKE(8, tile_f32(TOPS_##NAME, 8, out, group, x->f32 + first * x->cols, x->cols, scales)) \
        TAKE(4, tile_f32(TOPS_##NAME, 4, out, group, x->f32 + first * x->cols, x->cols, scales)) \
        TAKE(2, tile_f32(TOPS_##NAME, 2, out, group, x->f32 + first * x->cols, x->cols, scales)) \
        TAKE(1, tile_f32(TOPS_##NAME, 1, out, group, x->f32 + first * x->cols, x->cols, scales)) \
    }
#define CODES(NAME) \
    FLOATS(NAME) \
    static void tile_q8_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        int64_t blocks = x->cols / BLOCK; \
        (void)scales; \
        TAKE(8, tile_q8(TOPS_##NAME, 8, out, group, x->q8 + first * blocks, blocks)) \
        TAKE(4, tile_q8(TOPS_##NAME, 4, out, group, x->q8 + first * blocks, blocks)) \
        TAKE(2, tile_q8(TOPS_##NAME, 2, out, group, x->q8 + first * blocks, blocks)) \
        TAKE(1, tile_q8(TOPS_##NAME, 1, out, group, x->q8 + first * blocks, blocks)) \
    }
FLOATS(F32) FLOATS(F16) FLOATS(BF16) FLOATS(FP8_E4M3)
CODES(Q4_0) CODES(Q4_1) CODES(Q5_0) CODES(Q5_1) CODES(Q8_0) CODES(Q4_K) CODES(Q5_K) CODES(Q6_K)

void tops_tiles_avx512(tops_kernels *table) {
#define PUT_FLOATS(NAME) table->tile_f32[dtype_slot(TOPS_##NAME)] = tile_f32_##NAME;
#define PUT_CODES(NAME) PUT_FLOATS(NAME) table->tile_q8[TOPS_##NAME] = tile_q8_##NAME;
    PUT_FLOATS(F32) PUT_FLOATS(F16) PUT_FLOATS(BF16) PUT_FLOATS(FP8_E4M3)
    PUT_CODES(Q4_0) PUT_CODES(Q4_1) PUT_CODES(Q5_0) PUT_CODES(Q5_1) PUT_CODES(Q8_0) PUT_CODES(Q4_K) PUT_CODES(Q5_K) PUT_CODES(Q6_K)
}
