/* Tiles of float formats for AVX2: a column of a group is two registers of 8 rows, and a token's value, broadcast, meets both.
 *
 * Even and odd columns are added up apart, because one chain of additions would wait for itself; a token's sums are added in the same
 * order however many tokens share the tile, so batches do not change results.
 */
#include <immintrin.h>

#include "../cpu/formats.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    __m256 side[2];   /* rows 0 .. 7 and 8 .. 15 */
} column;

INLINE column column_of(int dtype, const unsigned char *group, int64_t c, const float *scales) {
    column w;
    if (dtype == TOPS_FP8_E4M3) {   /* e4m3 moved to the place of f16's fields is 256 times too small */
        __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(group + 16 * c)));
        __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x7f)), 7);
        __m256i f16 = _mm256_or_si256(magnitude, _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8));
        __m256 scale = _mm256_set1_ps(256.0f * (scales ? scales[c / 128] : 1.0f));
        w.side[0] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(f16)), scale);
        w.side[1] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(f16, 1)), scale);
        return w;
    }
    for (int side = 0; side < 2; side++) {
        if (dtype == TOPS_F32) {
            w.side[side] = _mm256_loadu_ps((const void *)(group + 64 * c + 32 * side));
        } else if (dtype == TOPS_F16) {
            w.side[side] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(group + 32 * c + 16 * side)));
        } else {
            __m256i pair = _mm256_loadu_si256((const void *)(group + 64 * (c / 2) + 32 * side));
            w.side[side] = _mm256_castsi256_ps(c % 2 ? _mm256_and_si256(pair, _mm256_set1_epi32((int)0xffff0000)) : _mm256_slli_epi32(pair, 16));
        }
    }
    return w;
}

INLINE void add_column(__m256 (*sum)[2], int tokens, column w, const float *x, int64_t cols) {
    for (int t = 0; t < tokens; t++) {
        __m256 value = _mm256_broadcast_ss(x + t * cols);
        for (int side = 0; side < 2; side++) sum[t][side] = _mm256_fmadd_ps(w.side[side], value, sum[t][side]);
    }
}

INLINE void tile_f32(int dtype, int tokens, float *out, const unsigned char *group, const float *x, int64_t cols, const float *scales) {
    __m256 even[3][2], odd[3][2];
    for (int t = 0; t < tokens; t++)
        for (int side = 0; side < 2; side++) even[t][side] = odd[t][side] = _mm256_setzero_ps();
    int64_t c = 0;
    int64_t two_columns = 2 * GROUP * float_bytes(dtype);
    for (; c + 2 <= cols; c += 2) {
        ask_ahead(group + c / 2 * two_columns, two_columns);
        add_column(even, tokens, column_of(dtype, group, c, scales), x + c, cols);
        add_column(odd, tokens, column_of(dtype, group, c + 1, scales), x + c + 1, cols);
    }
    if (c < cols) add_column(even, tokens, column_of(dtype, group, c, scales), x + c, cols);
    for (int t = 0; t < tokens; t++)
        for (int side = 0; side < 2; side++) _mm256_storeu_ps(out + t * GROUP + 8 * side, _mm256_add_ps(even[t][side], odd[t][side]));
}

/* A tile of any number of tokens from those of 3, 2 and 1, whose sums are 12 of the 16 registers at most. */
#define TAKE(NAME, T) \
    for (; tokens >= T; tokens -= T, row += T * x->cols, out += T * GROUP) tile_f32(TOPS_##NAME, T, out, group, row, x->cols, scales);
#define FLOATS(NAME) \
    static void tile_f32_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        const float *row = x->f32 + first * x->cols; \
        TAKE(NAME, 3) TAKE(NAME, 2) TAKE(NAME, 1) \
    }
FLOATS(F32) FLOATS(F16) FLOATS(BF16) FLOATS(FP8_E4M3)

void tops_float_tiles_avx2(tops_kernels *table) {
#define PUT(NAME) table->tile_f32[dtype_slot(TOPS_##NAME)] = tile_f32_##NAME;
    PUT(F32) PUT(F16) PUT(BF16) PUT(FP8_E4M3)
}
