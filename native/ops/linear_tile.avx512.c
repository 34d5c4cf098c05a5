/* Tiles for AVX-512 with VNNI: a register holds 16 rows, 4 columns each as bytes or one column each as floats.
 *
 * Integer tiles: for each block of 32 columns, dpbusd adds four products of unsigned codes and signed activations into each row's
 * lane; the sum becomes a float once, times the activation's scale and the row's. An offset of the codes is taken out beforehand, by
 * starting the integer sum at -offset * (sum of activations). */
#include <immintrin.h>

#include "../cpu/formats.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 half_to_float(const unsigned char *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }
INLINE __m512 bytes_to_float(const unsigned char *at) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at))); }
INLINE __m512 signed_bytes_to_float(const unsigned char *at) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at))); }

INLINE __mmask64 bits_at(const unsigned char *at) {
    uint64_t bits;
    memcpy(&bits, at, 8);
    return _cvtu64_mask64(bits);
}

/* The 8 vectors of codes of a block: vector v holds columns 4 v .. 4 v + 3 of every row. */
INLINE void load_codes(tops_format f, __m512i *w, const unsigned char *codes) {
    const __m512i low = _mm512_set1_epi8(15);
    if (f.bits == 8) {
        for (int v = 0; v < 8; v++) w[v] = _mm512_loadu_si512(codes + 64 * v);
        return;
    }
    for (int v = 0; v < 4; v++) {
        __m512i raw = _mm512_loadu_si512(codes + 64 * v);
        w[v] = _mm512_and_si512(raw, low);
        w[v + 4] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
    }
    for (int bit = 4; bit < f.bits; bit++)
        for (int v = 0; v < 8; v++) {
            __mmask64 set = bits_at(codes + 256 + (bit - 4) * 64 + 8 * v);
            w[v] = _mm512_mask_add_epi8(w[v], set, w[v], _mm512_set1_epi8((char)(1 << bit)));
        }
}

INLINE __m512i activations_at(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm512_set1_epi32(four);
}

INLINE void q8_tile(int dtype, float *out, const unsigned char *group, const tops_rows *x, int64_t first, const int T) {
    const tops_format f = format_of(dtype);
    const bool halves = dtype == TOPS_Q6_K;   /* each half of a block has its own scale */
    const int64_t blocks = x->cols / BLOCK, per_super = f.super / BLOCK;
    const int8_t *q = x->q8 + first * x->cols;
    const float *steps = x->scales + first * blocks;
    const int32_t *sums = x->sums + first * 2 * blocks;
    __m512 total[TILE], d = _mm512_setzero_ps(), d_minimum = d;
    for (int t = 0; t < T; t++) total[t] = _mm512_setzero_ps();
    const unsigned char *at = group;
    for (int64_t b = 0; b < blocks; b++) {
        if (f.header && b % per_super == 0) {
            d = half_to_float(at);
            if (f.minimum) d_minimum = half_to_float(at + 32);
            at += f.header;
        }
        __m512i w[8];
        load_codes(f, w, at + f.affine);
        __m512 scale, other = d, minimum = d;
        if (halves) {
            scale = _mm512_mul_ps(d, signed_bytes_to_float(at));
            other = _mm512_mul_ps(d, signed_bytes_to_float(at + 16));
        } else if (f.header) {
            scale = _mm512_mul_ps(d, bytes_to_float(at));
            minimum = _mm512_mul_ps(d_minimum, bytes_to_float(at + 16));
        } else {
            scale = half_to_float(at);
            if (f.minimum) minimum = half_to_float(at + 32);
        }
        for (int t = 0; t < T; t++) {
            const int8_t *row = q + t * x->cols + b * BLOCK;
            const int32_t *sum = sums + 2 * (t * blocks + b);
            __m512i one = _mm512_set1_epi32(-f.offset * (halves ? sum[0] : sum[0] + sum[1]));
            __m512i two = halves ? _mm512_set1_epi32(-f.offset * sum[1]) : _mm512_setzero_si512();
            for (int v = 0; v < 4; v++) {
                one = _mm512_dpbusd_epi32(one, w[v], activations_at(row + 4 * v));
                two = _mm512_dpbusd_epi32(two, w[v + 4], activations_at(row + 16 + 4 * v));
            }
            float step = steps[t * blocks + b];
            if (halves) {
                total[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(one), _mm512_set1_ps(step)), scale, total[t]);
                total[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(two), _mm512_set1_ps(step)), other, total[t]);
                continue;
            }
            __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(one, two));
            total[t] = _mm512_fmadd_ps(_mm512_mul_ps(dot, _mm512_set1_ps(step)), scale, total[t]);
            if (f.minimum) {
                __m512 shift = _mm512_set1_ps(step * (float)(sum[0] + sum[1]));
                total[t] = f.header ? _mm512_fnmadd_ps(shift, minimum, total[t]) : _mm512_fmadd_ps(shift, minimum, total[t]);
            }
        }
        at += block_bytes(f);
    }
    for (int t = 0; t < T; t++) _mm512_storeu_ps(out + t * GROUP, total[t]);
}

/* Float weights: two columns of every row at a time. */
INLINE void load_pair(int dtype, __m512 *even, __m512 *odd, const unsigned char *group, int64_t c, const float *scales) {
    if (dtype == TOPS_BF16) {
        __m512i raw = _mm512_loadu_si512(group + c * GROUP * 2);
        *even = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
        *odd = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32((int)0xffff0000)));
    } else if (dtype == TOPS_F16) {
        *even = half_to_float(group + c * GROUP * 2);
        *odd = half_to_float(group + (c + 1) * GROUP * 2);
    } else if (dtype == TOPS_F32) {
        *even = _mm512_loadu_ps(group + c * GROUP * 4);
        *odd = _mm512_loadu_ps(group + (c + 1) * GROUP * 4);
    } else {
        /* e4m3 moved to the place of f16's fields is 256 times too small. */
        __m512i raw = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(group + c * GROUP)));
        __m512i magnitude = _mm512_slli_epi16(_mm512_and_si512(raw, _mm512_set1_epi16(0x7f)), 7);
        __m512i half = _mm512_or_si512(magnitude, _mm512_slli_epi16(_mm512_and_si512(raw, _mm512_set1_epi16(0x80)), 8));
        __m512 scale = _mm512_set1_ps(256.0f * (scales ? scales[c / 128] : 1.0f));
        *even = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), scale);
        *odd = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), scale);
    }
}

INLINE void float_tile(int dtype, float *out, const unsigned char *group, const tops_rows *x, int64_t first, const int T, const float *scales) {
    const int64_t cols = x->cols;
    const float *rows = x->f32 + first * cols;
    __m512 even[TILE], odd[TILE], w0, w1, w2, w3;
    for (int t = 0; t < T; t++) even[t] = odd[t] = _mm512_setzero_ps();
    __m512 third = _mm512_setzero_ps(), fourth = _mm512_setzero_ps();
    int64_t c = 0;
    if (T == 1) {   /* four sums, because one chain of additions would wait for itself */
        for (; c + 4 <= cols; c += 4) {
            load_pair(dtype, &w0, &w1, group, c, scales);
            load_pair(dtype, &w2, &w3, group, c + 2, scales);
            even[0] = _mm512_fmadd_ps(w0, _mm512_set1_ps(rows[c]), even[0]);
            odd[0] = _mm512_fmadd_ps(w1, _mm512_set1_ps(rows[c + 1]), odd[0]);
            third = _mm512_fmadd_ps(w2, _mm512_set1_ps(rows[c + 2]), third);
            fourth = _mm512_fmadd_ps(w3, _mm512_set1_ps(rows[c + 3]), fourth);
        }
        even[0] = _mm512_add_ps(even[0], third);
        odd[0] = _mm512_add_ps(odd[0], fourth);
    }
    for (; c + 2 <= cols; c += 2) {
        load_pair(dtype, &w0, &w1, group, c, scales);
        for (int t = 0; t < T; t++) {
            even[t] = _mm512_fmadd_ps(w0, _mm512_set1_ps(rows[t * cols + c]), even[t]);
            odd[t] = _mm512_fmadd_ps(w1, _mm512_set1_ps(rows[t * cols + c + 1]), odd[t]);
        }
    }
    if (c < cols) {   /* an odd last column stands alone; only bf16 has a place for its neighbour */
        unsigned char pair[GROUP * 8] = {0};
        int64_t size = dtype == TOPS_BF16 ? 4 : dtype == TOPS_F32 ? 4 : dtype == TOPS_F16 ? 2 : 1;
        memcpy(pair, group + c * GROUP * (dtype == TOPS_BF16 ? 2 : size), (size_t)(GROUP * size));
        load_pair(dtype, &w0, &w1, pair, 0, scales ? scales + c / 128 : NULL);
        for (int t = 0; t < T; t++) even[t] = _mm512_fmadd_ps(w0, _mm512_set1_ps(rows[t * cols + c]), even[t]);
    }
    for (int t = 0; t < T; t++) _mm512_storeu_ps(out + t * GROUP, _mm512_add_ps(even[t], odd[t]));
}

/* tokens is cut into powers of two, so that sums stay in registers. */
#define BY_TOKENS(CALL) \
    for (int done = 0; done < tokens;) { \
        int left = tokens - done, T = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; \
        float *to = out + done * GROUP; \
        int64_t from = first + done; \
        switch (T) { \
        case 8: CALL(8); break; \
        case 4: CALL(4); break; \
        case 2: CALL(2); break; \
        default: CALL(1); \
        } \
        done += T; \
    }

#define Q8(NAME) \
    static void q8_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        (void)scales; \
        BY_TOKENS(CALL_##NAME) \
    }
#define CALL_Q4_0(T) q8_tile(TOPS_Q4_0, to, group, x, from, T)
#define CALL_Q4_1(T) q8_tile(TOPS_Q4_1, to, group, x, from, T)
#define CALL_Q5_0(T) q8_tile(TOPS_Q5_0, to, group, x, from, T)
#define CALL_Q5_1(T) q8_tile(TOPS_Q5_1, to, group, x, from, T)
#define CALL_Q8_0(T) q8_tile(TOPS_Q8_0, to, group, x, from, T)
#define CALL_Q4_K(T) q8_tile(TOPS_Q4_K, to, group, x, from, T)
#define CALL_Q5_K(T) q8_tile(TOPS_Q5_K, to, group, x, from, T)
#define CALL_Q6_K(T) q8_tile(TOPS_Q6_K, to, group, x, from, T)
Q8(Q4_0) Q8(Q4_1) Q8(Q5_0) Q8(Q5_1) Q8(Q8_0) Q8(Q4_K) Q8(Q5_K) Q8(Q6_K)

#define FLOAT(NAME) \
    static void float_##NAME(float *out, const unsigned char *group, const tops_rows *x, int64_t first, int tokens, const float *scales) { \
        BY_TOKENS(CALL_##NAME) \
    }
#define CALL_F32(T) float_tile(TOPS_F32, to, group, x, from, T, scales)
#define CALL_F16(T) float_tile(TOPS_F16, to, group, x, from, T, scales)
#define CALL_BF16(T) float_tile(TOPS_BF16, to, group, x, from, T, scales)
#define CALL_FP8_E4M3(T) float_tile(TOPS_FP8_E4M3, to, group, x, from, T, scales)
FLOAT(F32) FLOAT(F16) FLOAT(BF16) FLOAT(FP8_E4M3)

void tops_tiles_avx512(tops_kernels *table) {
#define PUT_Q8(NAME) table->tile_q8[TOPS_##NAME] = q8_##NAME;
#define PUT_FLOAT(NAME) table->tile_f32[dtype_slot(TOPS_##NAME)] = float_##NAME;
    PUT_Q8(Q4_0) PUT_Q8(Q4_1) PUT_Q8(Q5_0) PUT_Q8(Q5_1) PUT_Q8(Q8_0) PUT_Q8(Q4_K) PUT_Q8(Q5_K) PUT_Q8(Q6_K)
    PUT_FLOAT(F32) PUT_FLOAT(F16) PUT_FLOAT(BF16) PUT_FLOAT(FP8_E4M3)
}
