/* Attention of a few rows to a span of paged positions; cpu/kernels.c compiles it once for each instruction set.
 *
 * Positions are taken CHUNK at a time, as f32, and the softmax is carried along (Milakov and Gimelshein 2018). Many rows pay for a
 * transposed copy of the keys, so that scores are a matrix product with a position in each lane; a few rows take dot products.
 * Heads are padded with zeros to `width`, a multiple of 16.
 */
#ifndef TENSOR_OPS_ATTENTION_KERNELS_H
#define TENSOR_OPS_ATTENTION_KERNELS_H

#include "../cpu/internal.h"
#include "../cpu/number.h"

#if defined(__AVX512F__)
#define IOTA 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
enum { LANES = 16 };
#elif defined(__AVX2__)
#define IOTA 0, 1, 2, 3, 4, 5, 6, 7
enum { LANES = 8 };
#else
#define IOTA 0, 1, 2, 3
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

enum { WIDTH = 256, CHUNK = 32, ROWS = 32 };   /* widest head; positions and rows taken at once */
enum { FEW = 8, MOST = LANES == 16 ? 16 : 12 };  /* below FEW rows dot products; vectors of a product in registers */

#define INLINE static inline __attribute__((always_inline))
INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec x) { *(vec *)at = x; }

/* out [rows, cols] += a [rows, inner] b [inner, cols]; a's rows are a_cols apart. `rows` rows of `across` vectors in registers. */
INLINE void product_tile(int rows, int across, float *out, int64_t cols, const float *a, int64_t a_cols, const float *b, int64_t inner) {
    vec sum[MOST];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < across; v++) sum[r * across + v] = load(out + r * cols + v * LANES);
    for (int64_t i = 0; i < inner; i++)
        for (int v = 0; v < across; v++) {
            vec y = load(b + i * cols + v * LANES);
            for (int r = 0; r < rows; r++) sum[r * across + v] += a[r * a_cols + i] * y;
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < across; v++) store(out + r * cols + v * LANES, sum[r * across + v]);
}

static void product(float *out, int64_t cols, const float *a, int64_t a_cols, const float *b, int64_t inner, int rows) {
#define TAKE(TILE_ROWS, ACROSS) \
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS, out += TILE_ROWS * cols, a += TILE_ROWS * a_cols) { \
        int64_t c = 0; \
        for (; c + ACROSS * LANES <= cols; c += ACROSS * LANES) product_tile(TILE_ROWS, ACROSS, out + c, cols, a, a_cols, b + c, inner); \
        for (; c < cols; c += LANES) product_tile(TILE_ROWS, 1, out + c, cols, a, a_cols, b + c, inner); \
    }
    TAKE(8, MOST / 8) TAKE(4, 2) TAKE(3, 4) TAKE(2, 4) TAKE(1, 4)
#undef TAKE
}

/* [a0 + a1, a2 + a3, ..., b0 + b1, b2 + b3, ...] */
INLINE vec add_pairs(vec a, vec b) {
    const lanes even = 2 * (lanes){IOTA};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

/* Dot products of q with LANES neighbouring keys. */
INLINE vec dots(const float *q, const float *keys, int64_t width) {
    vec sum[LANES] = {{0}};
    for (int64_t c = 0; c < width; c += LANES) {
        vec x = load(q + c);
        for (int s = 0; s < LANES; s++) sum[s] += x * load(keys + s * width + c);
    }
    for (int count = LANES / 2; count; count /= 2)
        for (int i = 0; i < count; i++) sum[i] = add_pairs(sum[2 * i], sum[2 * i + 1]);
    return sum[0];
}

/* out [width, CHUNK] = keys [CHUNK, width] turned. A perfect shuffle of 2^k vectors of 2^k lanes, k times, turns them. */
static void transpose(float *out, const float *keys, int64_t width) {
    const lanes low = (lanes){IOTA} / 2 + ((lanes){IOTA} & 1) * LANES, high = low + LANES / 2;
    for (int64_t c = 0; c < width; c += LANES)
        for (int s = 0; s < CHUNK; s += LANES) {
            vec x[LANES], y[LANES];
            for (int i = 0; i < LANES; i++) x[i] = load(keys + (s + i) * width + c);
            for (int round = LANES; round > 1; round /= 2) {
                for (int i = 0; i < LANES / 2; i++) {
                    y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
                    y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], high);
                }
                memcpy(x, y, sizeof x);
            }
            for (int i = 0; i < LANES; i++) store(out + (c + i) * CHUNK + s, x[i]);
        }
}

/* b where a is NaN */
INLINE vec larger(vec a, vec b) {
    lanes greater = a > b;
    return (vec)(((lanes)a & greater) | ((lanes)b & ~greater));
}

INLINE float largest(const float *score) {
    vec most = load(score);
    for (int s = LANES; s < CHUNK; s += LANES) most = larger(most, load(score + s));
    for (int step = LANES / 2; step; step /= 2) most = larger(most, __builtin_shuffle(most, (lanes){IOTA} ^ step));
    return most[0];
}

/* Scores of the first `visible` positions become weights, the others 0; out, maximum and sum of the row follow. */
INLINE void soften(float *score, int64_t visible, float *out, int64_t width, float *maximum, float *sum) {
    for (int64_t s = visible > 0 ? visible : 0; s < CHUNK; s++) score[s] = -INFINITY;
    float most = largest(score), highest = most > *maximum ? most : *maximum, total = 0;
    if (visible <= 0) highest = 0;   /* the row has not seen anything and does not now: weights of 0 */
    for (int s = 0; s < CHUNK; s++) {
        float weight = fast_exp(score[s] - highest);
        score[s] = s < visible ? weight : 0;
        total += score[s];
    }
    if (visible <= 0) return;
    float shrink = fast_exp(*maximum - highest);
    *sum = *sum * shrink + total;
    *maximum = highest;
    if (shrink != 1.0f)
        for (int64_t c = 0; c < width; c += LANES) store(out + c, load(out + c) * shrink);
}

/* The positions at .. of a page that holds them, `count` at most: how many there are, and where they begin. */
INLINE int64_t piece_of(const unsigned char **piece, const void *cache, const tops_attention_item *item, int64_t at, int64_t count) {
    int64_t page_size = item->kv->page_size, page = at / page_size, in_page = at - page * page_size;
    int64_t row = (item->pages[page] * item->g + item->head) * page_size + in_page;
    *piece = (const unsigned char *)cache + row * cached_row_bytes(item->kv->dtype, item->p);
    return count < page_size - in_page ? count : page_size - in_page;
}

/* Keys or values of `count` positions from `at` on as f32 [CHUNK, width]; rows beyond them are left as they are. Those of the next
 * chunk are asked for at the same time: pages do not lie in order, so the processor would not guess them. */
static void load_positions(float *out, const void *cache, const tops_attention_item *item, int64_t at, int64_t count) {
    int64_t p = item->p, width = item->width, bytes = cached_row_bytes(item->kv->dtype, p), many;
    const unsigned char *piece;
    for (int64_t s = 0; s < count && at + s + CHUNK < item->until; s += many) {
        many = piece_of(&piece, cache, item, at + s + CHUNK, count - s);
        for (int64_t i = 0; i < many * bytes; i += 64) __builtin_prefetch(piece + i);
    }
    for (int64_t s = 0; s < count; s += many, out += many * width) {
        many = piece_of(&piece, cache, item, at + s, count - s);
        if (p == width && item->kv->dtype != TOPS_Q8_0) {
            load_row(out, piece, item->kv->dtype, many * p);
            continue;
        }
        for (int64_t i = 0; i < many; i++) {
            load_cached(out + i * width, piece + i * bytes, item->kv->dtype, p);
            for (int64_t c = p; c < width; c++) out[i * width + c] = 0;
        }
    }
}

#include "attention_few.kernels.h"

static void attend(const tops_attention_item *item) {
    int rows = item->tokens * item->heads;
    int64_t width = item->width;
    _Alignas(64) float keys[CHUNK * WIDTH], turned[CHUNK * WIDTH], values[CHUNK * WIDTH], scores[ROWS * CHUNK];
    for (int r = 0; r < rows; r++) {
        item->maximum[r] = -INFINITY;
        item->sum[r] = 0;
    }
    memset(item->out, 0, (size_t)(rows * width) * sizeof(float));
    if (rows < FEW && item->p == width) {
        attend_few(item);
        return;
    }
    for (int64_t at = item->from; at < item->until; at += CHUNK) {
        int64_t count = item->until - at < CHUNK ? item->until - at : CHUNK;
        load_positions(keys, item->kv->k, item, at, count);
        load_positions(values, item->kv->v, item, at, count);
        if (rows >= FEW) transpose(turned, keys, width);
        for (int first = 0; first < rows; first += ROWS) {
            int many = rows - first < ROWS ? rows - first : ROWS;
            const float *q = item->q + first * width;
            float *out = item->out + first * width;
            if (rows >= FEW) {
                memset(scores, 0, (size_t)(many * CHUNK) * sizeof(float));
                product(scores, CHUNK, q, width, turned, width, many);
            } else {
                for (int r = 0; r < many; r++)
                    for (int s = 0; s < CHUNK; s += LANES) store(scores + r * CHUNK + s, dots(q + r * width, keys + s * width, width));
            }
            for (int r = 0; r < many; r++) {
                int64_t visible = item->positions[(first + r) / item->heads] + 1 - at;
                soften(scores + r * CHUNK, visible < count ? visible : count, out + r * width, width, item->maximum + first + r, item->sum + first + r);
            }
            product(out, width, scores, CHUNK, values, count, many);
        }
    }
}

#undef INLINE
#endif
