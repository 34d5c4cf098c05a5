/* Tiles for AVX2: the arithmetic of linear_tile.avx512.c, for rows 0 .. 7 of a group and then for rows 8 .. 15 (`side`).
 *
 * maddubs multiplies unsigned codes by signed activations and adds neighbours in 16 bits. That leaves room for four such sums of 4-
 * and 5-bit codes and for two of 6 bits. Codes of 8 bits go in as absolute values, their signs moved to the activations.
 */
#include <immintrin.h>

#include "../cpu/formats.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m256 halves(const unsigned char *f16) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)f16)); }
INLINE __m256 unsigned_bytes(const unsigned char *u8) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)u8))); }
INLINE __m256 signed_bytes(const unsigned char *i8) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)i8))); }

/* Values are scale * code + minimum, by halves of a block where the format has them (Q6_K). */
typedef struct {
    __m256 scale[2], minimum[2];
} affine;

INLINE affine affine_of_rows(int dtype, const unsigned char *header, const unsigned char *block, int side) {
    affine a;
    int offset = dtype == TOPS_Q8_0 ? 0 : format_of(dtype).offset;
    header += 16 * side;
    switch (dtype) {
    case TOPS_Q4_1: case TOPS_Q5_1:
        a.scale[0] = halves(block + 16 * side);
        a.minimum[0] = halves(block + 32 + 16 * side);
        break;
    case TOPS_Q4_K: case TOPS_Q5_K:
        a.scale[0] = _mm256_mul_ps(halves(header), unsigned_bytes(block + 8 * side));
        a.minimum[0] = _mm256_fnmadd_ps(halves(header + 32), unsigned_bytes(block + 16 + 8 * side), _mm256_setzero_ps());
        break;
    case TOPS_Q6_K:
        for (int half = 0; half < 2; half++) {
            a.scale[half] = _mm256_mul_ps(halves(header), signed_bytes(block + 16 * half + 8 * side));
            a.minimum[half] = _mm256_mul_ps(a.scale[half], _mm256_set1_ps((float)-offset));
        }
        return a;
    default:
        a.scale[0] = halves(block + 16 * side);
        a.minimum[0] = _mm256_mul_ps(a.scale[0], _mm256_set1_ps((float)-offset));
    }
    a.scale[1] = a.scale[0];
    a.minimum[1] = a.minimum[0];
    return a;
}

/* `value` in every byte whose bit is set. */
INLINE __m256i spread_bits(const unsigned char *at, int value) {
    int32_t bits;
    memcpy(&bits, at, 4);
    const __m256i place = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i select = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), place), select);
    return _mm256_and_si256(_mm256_cmpeq_epi8(set, select), _mm256_set1_epi8((char)value));
}

/* Codes of a block, signed for Q8_0 and unsigned otherwise: vector v holds columns 4v .. 4v + 3. */
INLINE void codes_of(__m256i code[8], tops_format f, const unsigned char *at, int side) {
    for (int v = 0; v < 8; v++) {
        if (f.bits == 8) {
            code[v] = _mm256_xor_si256(_mm256_loadu_si256((const void *)(at + 64 * v + 32 * side)), _mm256_set1_epi8((char)0x80));
            continue;
        }
        __m256i pair = _mm256_loadu_si256((const void *)(at + 64 * (v % 4) + 32 * side));
        code[v] = _mm256_and_si256(v < 4 ? pair : _mm256_srli_epi16(pair, 4), _mm256_set1_epi8(15));
        for (int bit = 4; bit < f.bits; bit++)
            code[v] = _mm256_or_si256(code[v], spread_bits(at + 64 * bit + 8 * v + 4 * side, 1 << bit));
    }
}

/* Four neighbouring codes of a token in every lane. */
INLINE __m256i four(const int8_t *code) {
    int32_t bits;
    memcpy(&bits, code, 4);
    return _mm256_set1_epi32(bits);
}

/* Products of four columns of codes and of a token, added by pairs in 16 bits. */
INLINE __m256i pairs(tops_format f, __m256i code, const int8_t *x) {
    if (f.bits == 8) return _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(four(x), code));
    return _mm256_maddubs_epi16(code, four(x));
}

/* The dot product of half a block, 16 columns. */
INLINE __m256i dot_half(tops_format f, const __m256i code[4], const int8_t *x) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[4];
    int room = f.bits < 6 ? 4 : f.bits == 6 ? 2 : 1;
    for (int v = 0; v < 4; v++) {
        __m256i next = pairs(f, code[v], x + 4 * v);
        sum[v / room] = v % room ? _mm256_add_epi16(sum[v / room], next) : next;
    }
    __m256i dot = _mm256_madd_epi16(sum[0], ones);
    for (int i = 1; i < 4 / room; i++) dot = _mm256_add_epi32(dot, _mm256_madd_epi16(sum[i], ones));
    return dot;
}

INLINE __m256 add_part(__m256 sum, __m256 scale, __m256 minimum, __m256i dot, float step, float token_sum) {
    sum = _mm256_fmadd_ps(scale, _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(step)), sum);
    return _mm256_fmadd_ps(minimum, _mm256_set1_ps(token_sum), sum);
}

INLINE void tile_q8(int dtype, int tokens, int side, float *out, const unsigned char *group, const tops_q8 *x, int64_t blocks) {
    tops_format f = format_of(dtype);
    int in_super = f.super / BLOCK;
    __m256 sum[TILE];
    for (int t = 0; t < tokens; t++) sum[t] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; group += super_bytes(f)) {
        const unsigned char *block = group + f.header;
        for (int i = 0; i < in_super; i++, b++, block += block_bytes(f)) {
            if (side == 0) ask_ahead(block, block_bytes(f));
            __m256i code[8];
            codes_of(code, f, block + f.affine, side);
            affine a = affine_of_rows(dtype, group, block, side);
            for (int t = 0; t < tokens; t++) {
                const tops_q8 *token = x + t * blocks + b;
                __m256i first = dot_half(f, code, token->code), second = dot_half(f, code + 4, token->code + 16);
                if (dtype == TOPS_Q6_K) {
                    sum[t] = add_part(sum[t], a.scale[0], a.minimum[0], first, token->scale, token->half_sum[0]);
                    sum[t] = add_part(sum[t], a.scale[1], a.minimum[1], second, token->scale, token->half_sum[1]);
                } else {
                    sum[t] = add_part(sum[t], a.scale[0], a.minimum[0], _mm256_add_epi32(first, second), token->scale, token->sum);
                }
            }
        }
    }
    for (int t = 0; t < tokens; t++) _mm256_storeu_ps(out + t * GROUP + 8 * side, sum[t]);
}

/* A tile of any number of tokens from those of 4, 2 and 1: there are 16 registers. */
#define TAKE(NAME, T) \
    for (; tokens >= T; tokens -= T, row += T * blocks, out += T * GROUP) \
        for (int side = 0; side < 2; side++) tile_q8(TOPS_##NAME, T, side, out, group, row, blocks);
#define CODES(NAME) \
    static void tile_q8_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        int64_t blocks = x->cols / BLOCK; \
        const tops_q8 *row = x->q8 + first * blocks; \
        (void)scales; \
        TAKE(NAME, 4) TAKE(NAME, 2) TAKE(NAME, 1) \
    }
CODES(Q4_0) CODES(Q4_1) CODES(Q5_0) CODES(Q5_1) CODES(Q8_0) CODES(Q4_K) CODES(Q5_K) CODES(Q6_K)

void tops_tiles_avx2(tops_kernels *table) {
#define PUT(NAME) table->tile_q8[TOPS_##NAME] = tile_q8_##NAME;
    PUT(Q4_0) PUT(Q4_1) PUT(Q5_0) PUT(Q5_1) PUT(Q8_0) PUT(Q4_K) PUT(Q5_K) PUT(Q6_K)
}
