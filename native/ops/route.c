/* The router of a mixture of experts: norm, logits, the k largest of them and their shares. */
#include <math.h>

#include "../cpu/internal.h"

typedef struct {
    const float *logits;
    int32_t *experts;
    float *shares;
    int64_t n, e, k;
    bool gated, renormalize;
} route_call;

/* Is logit a before logit b in the order of choice? A NaN comes last. */
static bool before(const float *l, int32_t a, int32_t b) { return l[a] > l[b] || (l[b] != l[b] && l[a] == l[a]) || (l[a] == l[b] && a < b); }

/* The k first of e, in order, by insertion: most candidates are turned away by one comparison. */
static void choose(int32_t *experts, const float *l, int64_t e, int64_t k) {
    for (int32_t i = 0; i < e; i++) {
        int64_t place = i < k ? i : k;
        while (place > 0 && before(l, i, experts[place - 1])) {
            if (place < k) experts[place] = experts[place - 1];
            place--;
        }
        if (place < k) experts[place] = i;
    }
}

static void route_row(void *context, int64_t t) {
    const route_call *call = context;
    int64_t e = call->e, k = call->k;
    const float *l = call->logits + t * (e + call->gated);
    int32_t *experts = call->experts + t * k;
    float *shares = call->shares + t * (k + 1), chosen = 0, all = 0, largest;
    choose(experts, l, e, k);
    largest = k ? l[experts[0]] : 0;
    for (int64_t j = 0; j < k; j++) chosen += shares[j] = expf(l[experts[j]] - largest);
    if (!call->renormalize)
        for (int64_t i = 0; i < e; i++) all += expf(l[i] - largest);
    for (int64_t j = 0; j < k; j++) shares[j] /= call->renormalize ? chosen : all;
    shares[k] = call->gated ? 1.0f / (1.0f + expf(-l[e])) : 1.0f;
}

static int route(tops_stream *stream, void *arguments) {
    route_call *call = arguments;
    if (call->n < 8) for (int64_t t = 0; t < call->n; t++) route_row(call, t);
    else tops_team_run(stream, call->n, route_row, call);
    return TOPS_OK;
}

int tops_rms_norm_route(tops_stream *stream, void *normed, float *logits, int32_t *experts, float *shares, const void *x,
                        const float *norm, const tops_weight *w, int32_t parts, int64_t n, int64_t k, int32_t renormalize, float eps,
                        int32_t dtype) {
    REQUIRE(parts == 1 || parts == 2, "parts: must be 1 or 2, not %d", parts);
    REQUIRE(k >= 0 && k <= w->rows, "k: must be in 0..%lld, not %lld", (long long)w->rows, (long long)k);
    REQUIRE(parts == 1 || w[1].rows == 1, "w[1]: must have one row, not %lld", (long long)w[1].rows);
    int status = tops_rms_norm(stream, normed, x, norm, n, w->cols, eps, dtype);
    if (!status) status = tops_rms_norm_linear_f32(stream, logits, x, norm, w, parts, n, eps, dtype);
    if (status) return status;
    return CALL(route, route_call, logits, experts, shares, n, w->rows, k, parts == 2, renormalize);
}
