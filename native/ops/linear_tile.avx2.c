/* Tiles for AVX2: as linear_tile.avx512.c, with a group's 16 rows in two registers of 8, one after the other.
 *
 * maddubs multiplies unsigned codes by signed activations and adds neighbours in 16 bits. Codes of 4 and 5 bits leave room for four
 * such sums, 6 bits for two; 8-bit codes go in as their absolute values, with their signs moved to the activations. */
#include <immintrin.h>

#include "../cpu/formats.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m256 half_to_float(const unsigned char *at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }
INLINE __m256 bytes_to_float(const unsigned char *at) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at))); }
INLINE __m256 signed_bytes_to_float(const unsigned char *at) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at))); }

/* `value` in every byte whose bit is set. */
INLINE __m256i spread_bits(const unsigned char *at, int value) {
    int32_t bits;
    memcpy(&bits, at, 4);
    const __m256i place = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i select = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), place), select);
    return _mm256_and_si256(_mm256_cmpeq_epi8(set, select), _mm256_set1_epi8((char)value));
}

/* Vector v of the codes of 8 rows: columns 4 v .. 4 v + 3; side is 0 for rows 0..7 of the group and 1 for the others. */
INLINE __m256i load_codes(tops_format f, const unsigned char *codes, int v, int side) {
    if (f.bits == 8) return _mm256_loadu_si256((const __m256i *)(codes + 64 * v + 32 * side));
    __m256i w = _mm256_loadu_si256((const __m256i *)(codes + 64 * (v % 4) + 32 * side));
    w = _mm256_and_si256(v < 4 ? w : _mm256_srli_epi16(w, 4), _mm256_set1_epi8(15));
    for (int bit = 4; bit < f.bits; bit++)
        w = _mm256_or_si256(w, spread_bits(codes + 256 + (bit - 4) * 64 + 8 * v + 4 * side, 1 << bit));
    return w;
}

INLINE __m256i activations_at(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}

/* Sum of code * activation over 16 columns in each row's lane; 8-bit codes count from -128, the others from 0. */
INLINE __m256i dot_half(tops_format f, const __m256i *w, const int8_t *q) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (f.bits == 8) {
        __m256i sum = _mm256_setzero_si256();
        for (int v = 0; v < 4; v++) {
            __m256i code = _mm256_xor_si256(w[v], _mm256_set1_epi8((char)0x80));
            __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(activations_at(q + 4 * v), code));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
        }
        return sum;
    }
    __m256i one = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], activations_at(q)), _mm256_maddubs_epi16(w[1], activations_at(q + 4)));
    __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], activations_at(q + 8)), _mm256_maddubs_epi16(w[3], activations_at(q + 12)));
    if (f.bits < 6) return _mm256_madd_epi16(_mm256_add_epi16(one, two), ones);
    return _mm256_add_epi32(_mm256_madd_epi16(one, ones), _mm256_madd_epi16(two, ones));
}

INLINE void q8_side(int dtype, float *out, const unsigned char *group, const tops_rows *x, int64_t first, const int T, int side) {
    const tops_format f = format_of(dtype);
    const bool halves = dtype == TOPS_Q6_K;
    const int offset = f.bits == 8 ? 0 : f.offset;
    const int64_t blocks = x->cols / BLOCK, per_super = f.super / BLOCK;
    const int8_t *q = x->q8 + first * x->cols;
    const float *steps = x->scales + first * blocks;
    const int32_t *sums = x->sums + first * 2 * blocks;
    __m256 total[TILE], d = _mm256_setzero_ps(), d_minimum = d;
    for (int t = 0; t < T; t++) total[t] = _mm256_setzero_ps();
    const unsigned char *at = group;
    for (int64_t b = 0; b < blocks; b++) {
        if (f.header && b % per_super == 0) {
            d = half_to_float(at + 16 * side);
            if (f.minimum) d_minimum = half_to_float(at + 32 + 16 * side);
            at += f.header;
        }
        __m256i w[8];
        for (int v = 0; v < 8; v++) w[v] = load_codes(f, at + f.affine, v, side);
        __m256 scale, other = d, minimum = d;
        if (halves) {
            scale = _mm256_mul_ps(d, signed_bytes_to_float(at + 8 * side));
            other = _mm256_mul_ps(d, signed_bytes_to_float(at + 16 + 8 * side));
        } else if (f.header) {
            scale = _mm256_mul_ps(d, bytes_to_float(at + 8 * side));
            minimum = _mm256_mul_ps(d_minimum, bytes_to_float(at + 16 + 8 * side));
        } else {
            scale = half_to_float(at + 16 * side);
            if (f.minimum) minimum = half_to_float(at + 32 + 16 * side);
        }
        for (int t = 0; t < T; t++) {
            const int8_t *row = q + t * x->cols + b * BLOCK;
            const int32_t *sum = sums + 2 * (t * blocks + b);
            __m256i one = _mm256_sub_epi32(dot_half(f, w, row), _mm256_set1_epi32(offset * sum[0]));
            __m256i two = _mm256_sub_epi32(dot_half(f, w + 4, row + 16), _mm256_set1_epi32(offset * sum[1]));
            __m256 step = _mm256_set1_ps(steps[t * blocks + b]);
            if (halves) {
                total[t] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(one), step), scale, total[t]);
                total[t] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(two), step), other, total[t]);
                continue;
            }
            __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(one, two));
            total[t] = _mm256_fmadd_ps(_mm256_mul_ps(dot, step), scale, total[t]);
            if (f.minimum) {
                __m256 shift = _mm256_mul_ps(step, _mm256_set1_ps((float)(sum[0] + sum[1])));
                total[t] = f.header ? _mm256_fnmadd_ps(shift, minimum, total[t]) : _mm256_fmadd_ps(shift, minimum, total[t]);
            }
        }
        at += block_bytes(f);
    }
    for (int t = 0; t < T; t++) _mm256_storeu_ps(out + t * GROUP + 8 * side, total[t]);
}

/* tokens is cut into fours, twos and ones, so that sums stay in the 16 registers. */
#define Q8(NAME) \
    static void q8_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        (void)scales; \
        for (int side = 0; side < 2; side++) \
            for (int done = 0; done < tokens;) { \
                int left = tokens - done, T = left >= 4 ? 4 : left >= 2 ? 2 : 1; \
                if (T == 4) q8_side(TOPS_##NAME, out + done * GROUP, group, x, first + done, 4, side); \
                else if (T == 2) q8_side(TOPS_##NAME, out + done * GROUP, group, x, first + done, 2, side); \
                else q8_side(TOPS_##NAME, out + done * GROUP, group, x, first + done, 1, side); \
                done += T; \
            } \
    }
Q8(Q4_0) Q8(Q4_1) Q8(Q5_0) Q8(Q5_1) Q8(Q8_0) Q8(Q4_K) Q8(Q5_K) Q8(Q6_K)

void tops_tiles_avx2(tops_kernels *table) {
#define PUT(NAME) table->tile_q8[TOPS_##NAME] = q8_##NAME;
    PUT(Q4_0) PUT(Q4_1) PUT(Q5_0) PUT(Q5_1) PUT(Q8_0) PUT(Q4_K) PUT(Q5_K) PUT(Q6_K)
}
