/* From logits to tokens.
 *
 * Drawing is by the Gumbel-max rule: argmax over the kept tokens of log-probability - log(-log u), u from a hash of (seed, position,
 * token). It needs no running sum, so the result depends neither on the order of summation nor on what else is in the batch.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../cpu/internal.h"
#include "../cpu/number.h"

typedef struct {
    float *logits;
    const uint32_t *allowed;
    const tops_sampling *sampling;
    const int32_t *history, *lengths;
    int64_t n, v, vocabulary, capacity;
} restrict_call;

static int restrict_logits(tops_stream *stream, void *arguments) {
    const restrict_call *call = arguments;
    int64_t v = call->v, vocabulary = call->vocabulary;
    const uint32_t *allowed = call->allowed;
    (void)stream;
    for (int64_t t = 0; t < call->n; t++) {
        float *row = call->logits + t * v;
        int32_t length = call->lengths[t];
        REQUIRE(length >= 0 && length <= call->capacity, "lengths[%lld]: must be in 0..%lld, not %d", (long long)t, (long long)call->capacity, length);
        for (int64_t i = vocabulary; i < v; i++) row[i] = -INFINITY;
        for (int64_t i = 0; allowed && i < vocabulary; i++)
            if (!(allowed[t * ((v + 31) / 32) + i / 32] >> i % 32 & 1)) row[i] = -INFINITY;
        const int32_t *past = call->history + t * call->capacity;
        for (int32_t j = 0; j < length; j++) {
            int32_t id = past[j];
            bool first = id >= 0 && id < v;
            for (int32_t k = 0; first && k < j; k++) first = past[k] != id;
            if (!first) continue;   /* a token is penalised once, however often it occurred */
            float penalty = call->sampling[t].repetition_penalty;
            row[id] = row[id] > 0 ? row[id] / penalty : row[id] * penalty;
            row[id] -= call->sampling[t].presence_penalty;
        }
    }
    return TOPS_OK;
}

int tops_restrict_logits(tops_stream *stream, float *logits, const uint32_t *allowed, const tops_sampling *sampling,
                         const int32_t *history, const int32_t *lengths, int64_t n, int64_t v, int64_t vocabulary, int64_t capacity) {
    REQUIRE(vocabulary >= 0 && vocabulary <= v, "vocabulary: must be in 0..%lld, not %lld", (long long)v, (long long)vocabulary);
    return CALL(restrict_logits, restrict_call, logits, allowed, sampling, history, lengths, n, v, vocabulary, capacity);
}

/* Uniform in (0, 1) by the finaliser of splitmix64 (Steele, Lea and Flood 2014), from the token up. */
static double uniform(uint64_t seed, int32_t position, int64_t token) {
    uint64_t z = seed + 0x9e3779b97f4a7c15u * ((uint64_t)(uint32_t)position + 1) + 0xd1342543de82ef95u * ((uint64_t)token + 1);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return ((double)(z >> 11) + 0.5) * 0x1p-53;
}

typedef struct {
    float logit;
    int32_t id;
} candidate;

static int descending(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* Below e-40 of the likeliest, nothing can be drawn in the lifetime of a machine; most answers are decided above e-10. */
enum { LEAST = -40, LIKELY = -10 };

/* The tokens above e^floor of the likeliest, what they weigh and what all of them weigh. */
static int64_t above(candidate *kept, double *weight, double *total, const float *row, int64_t v, float temperature, float highest, int floor) {
    int64_t count = 0;
    *weight = *total = 0;
    for (int64_t i = 0; i < v; i++) {
        float x = (row[i] - highest) / temperature;
        if (!(x > LEAST)) continue;
        double e = fast_exp(x);
        *total += e;
        if (x <= floor) continue;
        *weight += e;
        kept[count++] = (candidate){x, (int32_t)i};
    }
    return count;
}

/* The tokens that top_k, top_p and min_p keep, in that order, of the distribution at this temperature (as transformers does). They are
 * sorted, which for a whole vocabulary takes longer than a small model's step: mostly the likely tokens settle what is kept. */
static int64_t keep(candidate *kept, const float *row, int64_t v, const tops_sampling *s, float highest) {
    bool all = s->top_k <= 0 && s->top_p >= 1 && !(s->min_p > 0);
    double weight, total, sum = 0;
    int64_t count = above(kept, &weight, &total, row, v, s->temperature, highest, all ? LEAST : LIKELY);
    if (all) return count;
    bool settled = s->top_k > 0 ? count >= s->top_k
                                : (s->top_p < 1 && weight >= s->top_p * total) || (s->min_p > 0 && logf(s->min_p) > LIKELY);
    if (!settled) count = above(kept, &weight, &total, row, v, s->temperature, highest, LEAST);
    qsort(kept, (size_t)count, sizeof *kept, descending);
    if (s->top_k > 0) {
        if (count > s->top_k) count = s->top_k;
        total = 0;
        for (int64_t i = 0; i < count; i++) total += exp(kept[i].logit);
    }
    if (s->top_p < 1) {
        int64_t i = 0;
        while (i < count && sum < s->top_p * total) sum += exp(kept[i++].logit);
        count = i > 0 ? i : 1;
    }
    while (s->min_p > 0 && count > 1 && kept[count - 1].logit < logf(s->min_p)) count--;
    return count;
}

/* The first of the largest, by parts, so that only one is gone through twice. */
static int64_t largest(const float *row, int64_t v) {
    enum { PART = 1024 };
    float highest = -INFINITY;
    int64_t best = 0;
    for (int64_t first = 0; first < v; first += PART) {
        float most = tops_cpu->maximum(row + first, v - first < PART ? v - first : PART);
        if (most > highest) {
            highest = most;
            best = first;
        }
    }
    while (best < v && row[best] != highest) best++;
    return best < v ? best : 0;
}

typedef struct {
    int32_t *ids;
    float *logprobs;
    const float *logits;
    const tops_sampling *sampling;
    const int32_t *positions;
    int64_t n, v;
} sample_call;

static int sample(tops_stream *stream, void *arguments) {
    const sample_call *call = arguments;
    int64_t v = call->v;
    tops_scratch scratch = scratch_of(stream);
    candidate *kept = scratch_take(&scratch, v * (int64_t)sizeof *kept);
    REQUIRE_SCRATCH(kept);
    for (int64_t t = 0; t < call->n; t++) {
        const float *row = call->logits + t * v;
        const tops_sampling *s = call->sampling + t;
        int64_t best = largest(row, v);
        int32_t id = (int32_t)best;
        float highest = row[best];
        if (s->temperature > 0) {
            int64_t count = keep(kept, row, v, s, highest);
            double most = -INFINITY;
            for (int64_t i = 0; i < count; i++) {
                double score = kept[i].logit - log(-log(uniform(s->seed, call->positions[t], kept[i].id)));
                if (score > most || (score == most && kept[i].id < id)) {
                    most = score;
                    id = kept[i].id;
                }
            }
        }
        call->ids[t] = id;
        if (call->logprobs) {
            double total = 0;
            for (int64_t i = 0; i < v; i++) total += exp((double)row[i] - highest);
            call->logprobs[t] = (float)(row[id] - highest - log(total));
        }
    }
    return TOPS_OK;
}

int tops_sample(tops_stream *stream, int32_t *ids, float *logprobs, const float *logits, const tops_sampling *sampling,
                const int32_t *positions, int64_t n, int64_t v) {
    REQUIRE(v >= 1, "v: must be at least 1, not %lld", (long long)v);
    return CALL(sample, sample_call, ids, logprobs, logits, sampling, positions, n, v);
}
