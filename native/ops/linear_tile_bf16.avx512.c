/* Tiles of bf16 weights and activations rounded to bf16, for processors that multiply pairs of them (AVX512_BF16).
 *
 * A register holds the same two columns of all 16 rows; a token's two values are broadcast, for one group of rows or for two. Pairs of
 * columns are added up in two chains, in the same order however many tokens share the tile: batches do not change results. A few
 * tokens take both chains at once, because one would wait for itself; many fill the registers with one, and take the other after it.
 */
#include <immintrin.h>

#include "../cpu/formats.h"

#define INLINE static inline __attribute__((always_inline))

/* Columns c and c + 1. PAIR_TILE tokens with two groups fill 24 of the 32 registers with sums. */
INLINE void add_pair(int groups, int tokens, __m512 (*sum)[PAIR_TILE], const unsigned char *const *group, const uint16_t *x, int64_t pitch, int64_t c) {
    __m512bh w[2];
    for (int g = 0; g < groups; g++) w[g] = (__m512bh)_mm512_loadu_si512(group[g] + 32 * c);
    for (int t = 0; t < tokens; t++) {
        int32_t pair;
        memcpy(&pair, x + t * pitch + c, 4);
        __m512bh values = (__m512bh)_mm512_set1_epi32(pair);
        for (int g = 0; g < groups; g++) sum[g][t] = _mm512_dpbf16_ps(sum[g][t], w[g], values);
    }
}

INLINE void tile_few(int tokens, float *out, const unsigned char *group, const uint16_t *x, int64_t pitch) {
    __m512 even[1][PAIR_TILE], odd[1][PAIR_TILE];
    for (int t = 0; t < tokens; t++) even[0][t] = odd[0][t] = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + 4 <= pitch; c += 4) {
        ask_ahead(group + 32 * c, 128);
        add_pair(1, tokens, even, &group, x, pitch, c);
        add_pair(1, tokens, odd, &group, x, pitch, c + 2);
    }
    if (c < pitch) add_pair(1, tokens, even, &group, x, pitch, c);
    for (int t = 0; t < tokens; t++) _mm512_storeu_ps(out + t * GROUP, _mm512_add_ps(even[0][t], odd[0][t]));
}

INLINE void tile_many(int groups, int tokens, float *const out[2], const unsigned char *const group[2], const uint16_t *x, int64_t pitch,
                      int64_t ahead) {
    for (int odd = 0; odd < 2; odd++) {
        __m512 sum[2][PAIR_TILE];
        for (int g = 0; g < groups; g++)
            for (int t = 0; t < tokens; t++) sum[g][t] = _mm512_setzero_ps();
        for (int64_t c = 2 * odd; c < pitch; c += 4) {
            for (int g = 0; g < groups; g++) __builtin_prefetch(group[g] + ahead + 32 * c);
            add_pair(groups, tokens, sum, group, x, pitch, c);
        }
        for (int g = 0; g < groups; g++)
            for (int t = 0; t < tokens; t++) {
                float *place = out[g] + t * GROUP;
                _mm512_storeu_ps(place, odd ? _mm512_add_ps(_mm512_loadu_ps(place), sum[g][t]) : sum[g][t]);
            }
    }
}

#define TAKE(T, CALL) \
    for (; tokens >= T; tokens -= T, row += T * pitch, at[0] += T * GROUP, at[1] += T * GROUP) CALL
#define MANY(T) \
    TAKE(T, if (groups == 2) tile_many(2, T, at, group, row, pitch, ahead); else tile_many(1, T, at, group, row, pitch, ahead);)
#define FEW(T) \
    TAKE(T, for (int g = 0; g < groups; g++) tile_few(T, at[g], group[g], row, pitch);)
static void tile(float *const out[2], const unsigned char *const group[2], int groups, const tops_rows *x, int64_t first, int tokens,
                 int64_t ahead) {
    int64_t pitch = bf16_pitch(x->cols);
    const uint16_t *row = x->bf16 + first * pitch;
    float *at[2] = {out[0], out[1]};
    MANY(12) MANY(8) FEW(4) FEW(2) FEW(1)
}

void tops_bf16_tile_avx512(tops_kernels *table) { table->tile_bf16 = tile; }
