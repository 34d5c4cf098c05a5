/* From logits to tokens: the rules and the random numbers of sample.c, a block for each row.
 *
 * top_k, top_p and min_p are found as one threshold on the logits by bisection over their bits, so nothing is sorted; tokens that tie
 * with the last one kept are kept, too. */
#include <cfloat>
#include <cmath>

#include "../cuda/device.cuh"

enum { THREADS = 1024 };

__global__ void restrict_rows(float *logits, const uint32_t *allowed, int64_t v, int64_t vocabulary) {
    wait_for_inputs();
    float *row = logits + blockIdx.y * v;
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i >= v) return;
    if (i >= vocabulary || (allowed && !(allowed[blockIdx.y * ((v + 31) / 32) + i / 32] >> (i % 32) & 1))) row[i] = -INFINITY;
}

__global__ void penalise(float *logits, const tops_sampling *sampling, const int32_t *history, const int32_t *lengths, int64_t v, int64_t capacity) {
    wait_for_inputs();
    int64_t t = blockIdx.x;
    const int32_t *past = history + t * capacity;
    tops_sampling s = sampling[t];
    for (int j = threadIdx.x; j < lengths[t]; j += blockDim.x) {
        int32_t id = past[j];
        bool first = id >= 0 && id < v;
        for (int k = 0; first && k < j; k++) first = past[k] != id;
        if (!first) continue;   /* a token is penalised once, however often it occurred */
        float x = logits[t * v + id];
        logits[t * v + id] = (x > 0 ? x / s.repetition_penalty : x * s.repetition_penalty) - s.presence_penalty;
    }
}

int tops_restrict_logits(tops_stream *stream, float *logits, const uint32_t *allowed, const tops_sampling *sampling,
                         const int32_t *history, const int32_t *lengths, int64_t n, int64_t v, int64_t vocabulary, int64_t capacity) {
    REQUIRE(vocabulary >= 0 && vocabulary <= v, "vocabulary: must be in 0..%lld, not %lld", (long long)v, (long long)vocabulary);
    if (n <= 0) return TOPS_OK;
    int status = launch(stream, restrict_rows, dim3((unsigned)ceil_div(v, 256), (unsigned)n), dim3(256), 0, 1, logits, allowed, v, vocabulary);
    if (status) return status;
    return launch(stream, penalise, dim3((unsigned)n), dim3(256), 0, 1, logits, sampling, history, lengths, v, capacity);
}

struct Best {
    double score;
    int64_t id;
};

/* The larger score, the lower id of equals; known to all threads. */
__device__ Best block_best(Best mine) {
    __shared__ Best all[32];
    for (int step = 16; step; step /= 2) {
        Best other{__shfl_xor_sync(0xffffffff, mine.score, step), __shfl_xor_sync(0xffffffff, mine.id, step)};
        if (other.score > mine.score || (other.score == mine.score && other.id < mine.id)) mine = other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = mine;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; w++)
        if (all[w].score > mine.score || (all[w].score == mine.score && all[w].id < mine.id)) mine = all[w];
    return mine;
}

/* splitmix64's finaliser (Steele, Lea and Flood 2014), as in sample.c. */
__device__ double uniform(uint64_t seed, int32_t position, int64_t token) {
    uint64_t z = seed + 0x9e3779b97f4a7c15u * ((uint64_t)(uint32_t)position + 1) + 0xd1342543de82ef95u * ((uint64_t)token + 1);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return ((double)(z >> 11) + 0.5) * 0x1p-53;
}

/* Floats in the order of unsigned integers. */
__device__ uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The highest threshold for which the tokens at or above it number at least `count` and have at least `mass`. */
__device__ uint32_t threshold(const float *row, int64_t v, float highest, float inverse, uint32_t least, float count, float mass) {
    uint32_t low = least, high = ordered(0.0f);
    while (low < high) {
        uint32_t middle = low + (high - low + 1) / 2;
        float found = 0, sum = 0;
        for (int64_t i = threadIdx.x; i < v; i += blockDim.x) {
            float x = (row[i] - highest) * inverse;
            if (ordered(x) >= middle) {
                found += 1;
                sum += expf(x);
            }
        }
        found = block_sum(found);
        sum = block_sum(sum);
        if (found >= count && sum >= mass) low = middle;
        else high = middle - 1;
    }
    return low;
}

__global__ void draw(int32_t *ids, float *logprobs, const float *logits, const tops_sampling *sampling, const int32_t *positions, int64_t v) {
    launch_dependents();
    wait_for_inputs();
    int64_t t = blockIdx.x;
    const float *row = logits + t * v;
    tops_sampling s = sampling[t];
    Best best{-INFINITY, v - 1};
    for (int64_t i = threadIdx.x; i < v; i += blockDim.x)
        if (row[i] > best.score || (row[i] == best.score && i < best.id)) best = Best{row[i], i};
    best = block_best(best);
    float highest = (float)best.score;
    if (s.temperature > 0) {
        float inverse = 1.0f / s.temperature;
        uint32_t least = ordered(-40.0f);
        if (s.top_k > 0 && s.top_k < v) least = max(least, threshold(row, v, highest, inverse, least, (float)s.top_k, 0.0f));
        if (s.top_p < 1) {
            float total = 0;
            for (int64_t i = threadIdx.x; i < v; i += blockDim.x) {
                float x = (row[i] - highest) * inverse;
                if (ordered(x) >= least) total += expf(x);
            }
            total = block_sum(total);
            least = max(least, threshold(row, v, highest, inverse, least, 0.0f, s.top_p * total));
        }
        if (s.min_p > 0) least = max(least, ordered(logf(s.min_p)));
        best = Best{-INFINITY, v - 1};
        for (int64_t i = threadIdx.x; i < v; i += blockDim.x) {
            float x = (row[i] - highest) * inverse;
            if (ordered(x) < least) continue;
            double score = x - log(-log(uniform(s.seed, positions[t], i)));
            if (score > best.score || (score == best.score && i < best.id)) best = Best{score, i};
        }
        best = block_best(best);
    }
    if (threadIdx.x == 0) ids[t] = (int32_t)best.id;
    if (!logprobs) return;
    float total = 0;
    for (int64_t i = threadIdx.x; i < v; i += blockDim.x) total += expf(row[i] - highest);
    total = block_sum(total);
    if (threadIdx.x == 0) logprobs[t] = row[best.id] - highest - logf(total);
}

int tops_sample(tops_stream *stream, int32_t *ids, float *logprobs, const float *logits, const tops_sampling *sampling,
                const int32_t *positions, int64_t n, int64_t v) {
    REQUIRE(v >= 1, "v: must be at least 1, not %lld", (long long)v);
    if (n <= 0) return TOPS_OK;
    return launch(stream, draw, dim3((unsigned)n), dim3(THREADS), 0, 1, ids, logprobs, logits, sampling, positions, v);
}
