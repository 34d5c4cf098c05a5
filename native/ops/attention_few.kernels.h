/* Attention of fewer than FEW rows (attention.kernels.h includes this): keys and values are read where they lie and widened in
 * registers. A copy in f32, which many rows pay for, would cost more than it saves. Heads have no padding here: p = width.
 */
typedef uint16_t half_lanes __attribute__((vector_size(2 * LANES)));
typedef int8_t code_lanes __attribute__((vector_size(LANES)));

/* LANES neighbouring values of a cache, as f32; codes of 8 bits are not scaled yet. */
INLINE vec widened(const unsigned char *at, int dtype) {
    vec x;
    half_lanes half;
    code_lanes codes;
    if (dtype == TOPS_Q8_0) {
        memcpy(&codes, at, sizeof codes);
#if defined(__AVX512F__)
        return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
#else
        return __builtin_convertvector(__builtin_convertvector(codes, lanes), vec);
#endif
    }
    if (dtype == TOPS_F32) {
        memcpy(&x, at, sizeof x);
        return x;
    }
    memcpy(&half, at, sizeof half);
    if (dtype == TOPS_BF16) return (vec)(__builtin_convertvector(half, lanes) << 16);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps((__m256i)half);
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps((__m128i)half);
#else
    for (int i = 0; i < LANES; i++) x[i] = float_of_f16(half[i]);
    return x;
#endif
}

/* Where the keys and values of a chunk lie. */
typedef struct {
    const unsigned char *key[CHUNK], *value[CHUNK];
} places;

/* scores [rows, CHUNK] times the scales of the chunk's rows in 8 bits, which stand behind their codes. */
INLINE void scale_by(int rows, float *scores, const unsigned char *const *at, int64_t width) {
    float scale[CHUNK];
    for (int s = 0; s < CHUNK; s++) memcpy(scale + s, at[s] + width, sizeof *scale);
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < CHUNK; s++) scores[r * CHUNK + s] *= scale[s];
}

static void find(places *found, const tops_attention_item *item, int64_t at) {
    int64_t bytes = cached_row_bytes(item->kv->dtype, item->p), many, count = item->until - at < CHUNK ? item->until - at : CHUNK;
    for (int64_t s = 0; s < count; s += many) {
        const unsigned char *key, *value;
        many = piece_of(&key, item->kv->k, item, at + s, count - s);
        piece_of(&value, item->kv->v, item, at + s, count - s);
        for (int64_t i = 0; i < many; i++) {
            found->key[s + i] = key + i * bytes;
            found->value[s + i] = value + i * bytes;
        }
    }
    for (int64_t s = count > 0 ? count : 0; s < CHUNK && count > 0; s++) {   /* read, and then not seen */
        found->key[s] = found->key[count - 1];
        found->value[s] = found->value[count - 1];
    }
}

INLINE void ask_for(const unsigned char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

/* scores [rows, CHUNK] = q [rows, width] times the chunk's keys, `across` of them at once so that all sums are in registers. */
INLINE void scores_of(int rows, int across, int dtype, float *scores, const float *q, int64_t width, const places *now, const places *next) {
    int64_t size = cached_bytes(dtype);
    for (int s = 0; s < CHUNK; s += across) {
        vec sum[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) sum[i] = (vec){0};
        for (int i = 0; i < across; i++) ask_for(next->key[s + i], cached_row_bytes(dtype, width));
        for (int64_t c = 0; c < width; c += LANES)
#pragma GCC unroll 16
            for (int i = 0; i < across; i++) {
                vec key = widened(now->key[s + i] + c * size, dtype);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) sum[r * across + i] += load(q + r * width + c) * key;
            }
#pragma GCC unroll 4
        for (int count = LANES / 2; count; count /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < count; i++) sum[i] = add_pairs(sum[2 * i], sum[2 * i + 1]);
        for (int r = 0; r < rows; r++) memcpy(scores + r * CHUNK + s, (const float *)sum + r * across, (size_t)across * sizeof(float));
    }
    if (dtype == TOPS_Q8_0) scale_by(rows, scores, now->key, width);
}

/* out [rows, width] += weights [rows, CHUNK] times the chunk's values, `across` vectors of a row at once. */
INLINE void add_values(int rows, int across, int dtype, float *out, const float *weights, int64_t width, int64_t count, const places *now,
                       const places *next) {
    int64_t size = cached_bytes(dtype);
    for (int s = 0; s < CHUNK; s++) ask_for(next->value[s], cached_row_bytes(dtype, width));
    for (int64_t c = 0; c < width; c += across * LANES) {
        vec sum[MOST];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < across; v++) sum[r * across + v] = load(out + r * width + c + v * LANES);
        for (int64_t s = 0; s < count; s++)
            for (int v = 0; v < across; v++) {
                vec value = widened(now->value[s] + (c + v * LANES) * size, dtype);
                for (int r = 0; r < rows; r++) sum[r * across + v] += weights[r * CHUNK + s] * value;
            }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < across; v++) store(out + r * width + c + v * LANES, sum[r * across + v]);
    }
}

/* Rows first .. first + rows - 1 of the item. */
INLINE void attend_rows(int rows, int dtype, const tops_attention_item *item, int first) {
    int64_t width = item->width;
    _Alignas(64) float scores[4 * CHUNK];
    float *out = item->out + first * width;
    places found[2];
    find(&found[0], item, item->from);
    for (int s = 0; first == 0 && s < CHUNK && item->from < item->until; s++) {   /* all at once, before the first one is waited for */
        ask_for(found[0].key[s], cached_row_bytes(dtype, item->p));
        ask_for(found[0].value[s], cached_row_bytes(dtype, item->p));
    }
    for (int64_t at = item->from, turn = 0; at < item->until; at += CHUNK, turn ^= 1) {
        const places *now = &found[turn], *next = now;
        int64_t count = item->until - at < CHUNK ? item->until - at : CHUNK;
        if (at + CHUNK < item->until) find(&found[turn ^ 1], item, at + CHUNK), next = &found[turn ^ 1];
        scores_of(rows, rows == 1 ? LANES : rows == 2 ? LANES / 2 : LANES / 4, dtype, scores, item->q + first * width, width, now, next);
        for (int r = 0; r < rows; r++) {
            int64_t visible = item->positions[(first + r) / item->heads] + 1 - at;
            soften(scores + r * CHUNK, visible < count ? visible : count, out + r * width, width, item->maximum + first + r, item->sum + first + r);
        }
        if (dtype == TOPS_Q8_0) scale_by(rows, scores, now->value, width);
        if (rows < 4 && width % (4 * LANES) == 0) add_values(rows, 4, dtype, out, scores, width, count, now, next);
        else if (width % (2 * LANES) == 0) add_values(rows, 2, dtype, out, scores, width, count, now, next);
        else add_values(rows, 1, dtype, out, scores, width, count, now, next);
    }
}

INLINE void attend_few_in(int dtype, const tops_attention_item *item) {
    int rows = item->tokens * item->heads, first = 0;
    for (; rows - first >= 4; first += 4) attend_rows(4, dtype, item, first);
    if (rows - first == 3) attend_rows(3, dtype, item, first);
    if (rows - first == 2) attend_rows(2, dtype, item, first);
    if (rows - first == 1) attend_rows(1, dtype, item, first);
}

static void attend_few(const tops_attention_item *item) {
    switch (item->kv->dtype) {
    case TOPS_F32: attend_few_in(TOPS_F32, item); break;
    case TOPS_F16: attend_few_in(TOPS_F16, item); break;
    case TOPS_Q8_0: attend_few_in(TOPS_Q8_0, item); break;
    default: attend_few_in(TOPS_BF16, item);
    }
}
