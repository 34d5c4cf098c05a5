/* Tiles of bf16 weights and activations rounded to bf16, for processors that multiply pairs of them (AVX512_BF16).
 *
 * A register holds the same two columns of all 16 rows; a token's two values are broadcast. Pairs of columns are added up in two
 * chains, in the same order however many tokens share the tile: batches do not change results.
 */
#include <immintrin.h>

#include "../cpu/formats.h"

#define INLINE static inline __attribute__((always_inline))

INLINE void add_pair(__m512 *sum, int tokens, const unsigned char *weights, const uint16_t *x, int64_t pitch) {
    __m512bh w = (__m512bh)_mm512_loadu_si512(weights);
    for (int t = 0; t < tokens; t++) {
        int32_t pair;
        memcpy(&pair, x + t * pitch, 4);
        sum[t] = _mm512_dpbf16_ps(sum[t], w, (__m512bh)_mm512_set1_epi32(pair));
    }
}

INLINE void tile_bf16(int tokens, float *out, const unsigned char *group, const uint16_t *x, int64_t pitch) {
    __m512 even[TILE], odd[TILE];
    for (int t = 0; t < tokens; t++) even[t] = odd[t] = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + 4 <= pitch; c += 4, group += 128) {
        add_pair(even, tokens, group, x + c, pitch);
        add_pair(odd, tokens, group + 64, x + c + 2, pitch);
    }
    if (c < pitch) add_pair(even, tokens, group, x + c, pitch);
    for (int t = 0; t < tokens; t++) _mm512_storeu_ps(out + t * GROUP, _mm512_add_ps(even[t], odd[t]));
}

#define TAKE(T) \
    for (; tokens >= T; tokens -= T, row += T * pitch, out += T * GROUP) tile_bf16(T, out, group, row, pitch);
static void tile(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) {
    int64_t pitch = bf16_pitch(x->cols);
    const uint16_t *row = x->bf16 + first * pitch;
    (void)scales;
    TAKE(8) TAKE(4) TAKE(2) TAKE(1)
}

void tops_bf16_tile_avx512(tops_kernels *table) { table->tile_bf16 = tile; }
