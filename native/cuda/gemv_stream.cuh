/* Products of up to 16 rows of activations, the work of decoding: every multiprocessor streams an equal share of the matrix's rows through its
 * warps' rings (ring.cuh) into tensor cores, 8 rows of the matrix at a time; weights become bf16 in registers. The inputs are normed,
 * rounded and laid out in shared memory by each block for itself while the first weights are on their way. */
#pragma once

#include "linear.cuh"
#include "mma.cuh"
#include "ring.cuh"

namespace stream {
constexpr int WARPS = 16, THREADS = WARPS * 32, NORM_MOST = THREADS * 8, INPUTS_MOST = 100 << 10;
/* A processor has 228 KB of shared memory, 1 KB goes with each block: of two kernels that run in turn, one takes so much that no other block
 * of its own fits beside it, the other one what is left. Otherwise some processors would get two blocks and others none. */
constexpr int SHARED_ALONE = 114 << 10, STATIC_MOST = 1 << 10;

/* A ring is as deep as the processor's shared memory allows: 228 or 164 KB, or 100 KB. */
template <int D> __host__ __device__ constexpr int stages(bool large) { return !large ? 2 : Slot<D>::BYTES > 1280 ? 4 : 5; }
static inline bool is_large(const tops_stream *stream) { return stream->shared_most > 128 << 10; }

struct Shape {
    int blocks, tiles, tiles_more;   /* tiles of 8 rows for each block; so many blocks have one more */
    int part_tiles[4];            /* before each part */
    int chunks;                   /* slots along a row */
    int phases, per_phase;        /* parts of a row whose inputs are in shared memory at once, slots in each */
    int split;                    /* warps that share a tile in a phase */
    int steps_tile, steps_piece;  /* WARPS items further */
    int least[2], more[2];        /* slots of each piece of a phase, and how many have one more; of the last phase */
};

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr bool LARGE = false;
#else
constexpr bool LARGE = true;
#endif
typedef __nv_bfloat16 bf16;

/* With one token (T 1) the matrix is the left operand, whose upper and lower 8 rows are both the tile's: a lane's 16 bytes of a row go in as
 * they are, and the right operand has what belongs to the first and third quarter of them in column 0, to the others in column 1. With more (T 16)
 * the tokens are the left operand. So inputs lie in shared memory by units of 32 columns, of which lane % 4 has 8, four pairs, as
 *   T 1:  [unit][lane % 4][pairs 0, 2 | 1, 3]
 *   T 16: [unit][pairs 0, 1 | 2, 3][t % 8][lane % 4][first pair of t, of t + 8, second pair of t, of t + 8]; 64 bytes between units
 * Pairs are of columns in the order in which the weights' codes come out of memory: quantised and fp8 weights have 0 and 2, 1 and 3. */
template <int T> constexpr int UNIT = T == 1 ? 64 : 1024 + 64;   /* bytes */

/* Four columns from c on, of tokens t and t + 8 if T is 16. */
template <int D, int T> __device__ inline void put_columns(unsigned char *inputs, int t, int c, uint2 v, uint2 w) {
    int unit = c / 32, quad = c % 32 / 8, half = c % 8 / 4;
    if (is_quantised(D)) quad = c % 16 / 4, half = c % 32 / 16;
    if (D == TOPS_FP8_E4M3) unit = c / 64 * 2 + c % 16 / 8, quad = c % 64 / 16, half = c % 8 / 4;
    if (D != TOPS_BF16) {
        v = make_uint2(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632));
        w = make_uint2(__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.x, w.y, 0x7632));
    }
    uint32_t *to = reinterpret_cast<uint32_t *>(inputs + unit * UNIT<T>);
    if (T == 1) {
        to[quad * 4 + half] = v.x;
        to[quad * 4 + half + 2] = v.y;
    } else {
        reinterpret_cast<uint4 *>(to)[(half * 8 + t) * 4 + quad] = make_uint4(v.x, w.x, v.y, w.y);
    }
}
__device__ inline uint32_t pack_pair(float a, float b) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ inline uint4 eight_columns(const Product &p, int t, int c) {   /* zeros beyond the matrix */
    return c < p.cols ? __ldcg(reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(p.x) + t * p.cols + c)) : make_uint4(0, 0, 0, 0);
}
template <int D, int T> __device__ inline void put_eight(unsigned char *inputs, int t, int c, uint4 v, uint4 w) {
    put_columns<D, T>(inputs, t, c, make_uint2(v.x, v.y), make_uint2(w.x, w.y));
    put_columns<D, T>(inputs, t, c + 4, make_uint2(v.z, v.w), make_uint2(w.z, w.w));
}

/* Rows are taken GROUP<T> at a time, all requested together: of 16 those from 4 g and 4 g + 8 on. */
template <int T> constexpr int GROUP = T == 1 ? 1 : 8;
template <int T> __device__ inline int token_of(int g, int i) { return T == 1 ? 0 : 4 * g + i % 4 + i / 4 * 8; }
template <int T> __device__ inline void get_group(uint4 (&rows)[GROUP<T>], const Product &p, int g, int c) {
#pragma unroll
    for (int i = 0; i < GROUP<T>; i++) rows[i] = token_of<T>(g, i) < p.n ? eight_columns(p, token_of<T>(g, i), c) : make_uint4(0, 0, 0, 0);
}
template <int D, int T> __device__ inline void put_group(unsigned char *inputs, int g, int c, const uint4 (&rows)[GROUP<T>]) {
#pragma unroll
    for (int i = 0; i < (GROUP<T> + 1) / 2; i++) put_eight<D, T>(inputs, token_of<T>(g, i), c, rows[i], rows[GROUP<T> / 2 + i]);
}

/* Lay out columns from..until of the rows of x, zeros where there is none. */
template <int D, int T> __device__ inline void take_inputs(unsigned char *inputs, const Product &p, int from, int until) {
    for (int c = from + threadIdx.x * 8; c < until; c += THREADS * 8)
#pragma unroll 1
        for (int g = 0; g < T / GROUP<T>; g++) {
            uint4 rows[GROUP<T>];
            get_group<T>(rows, p, g, c);
            put_group<D, T>(inputs, g, c - from, rows);
        }
    __syncthreads();
}

__device__ inline void eight_floats(uint4 v, float (&to)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

/* The same for whole rows, normed: at most NORM_MOST columns, eight for each thread. */
template <int D, int T> __device__ inline void take_normed(unsigned char *inputs, const Product &p, int until, const float4 (&norm)[2]) {
    __shared__ float4 sums[T][WARPS / 4];
    const int c = threadIdx.x * 8;
    uint4 rows[GROUP<T>];
#pragma unroll 1
    for (int g = 0; g < T / GROUP<T>; g++) {
        float sum[GROUP<T>];
        get_group<T>(rows, p, g, c);
#pragma unroll
        for (int i = 0; i < GROUP<T>; i++) {
            float v[8];
            eight_floats(rows[i], v);
            sum[i] = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) sum[i] += v[k] * v[k];
        }
#pragma unroll
        for (int step = 16; step; step /= 2)   /* side by side: a shuffle takes long */
#pragma unroll
            for (int i = 0; i < GROUP<T>; i++) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], step);
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int i = 0; i < GROUP<T>; i++) reinterpret_cast<float *>(sums[token_of<T>(g, i)])[threadIdx.x / 32] = sum[i];
    }
    __syncthreads();
    if (c < until)
#pragma unroll 1
        for (int g = 0; g < T / GROUP<T>; g++) {
            if (T > 1) get_group<T>(rows, p, g, c);
#pragma unroll
            for (int i = 0; i < GROUP<T>; i++) {
                float v[8], total = 0;
#pragma unroll
                for (int w = 0; w < WARPS / 4; w++) {
                    const float4 four = sums[token_of<T>(g, i)][w];
                    total += four.x + four.y + four.z + four.w;
                }
                const float factor = rsqrtf(total / (float)p.cols + p.eps);
                eight_floats(rows[i], v);
                rows[i] = make_uint4(pack_pair(v[0] * factor * norm[0].x, v[1] * factor * norm[0].y), pack_pair(v[2] * factor * norm[0].z, v[3] * factor * norm[0].w),
                                     pack_pair(v[4] * factor * norm[1].x, v[5] * factor * norm[1].y), pack_pair(v[6] * factor * norm[1].z, v[7] * factor * norm[1].w));
            }
            put_group<D, T>(inputs, g, c, rows);
        }
    __syncthreads();
}

/* sum += a lane's 8 columns of a tile, four registers, times the inputs of their unit. Element e is
 *   T 1: row lane / 4 of the tile, in lanes of quad 0 alone, in two parts;  T 16: token lane / 4 + 8 (e / 2), row 2 (lane % 4) + e % 2 */
template <int T> constexpr int SUMS = T == 1 ? 2 : 4;
template <int T> __device__ inline void multiply(float (&sum)[SUMS<T>], const unsigned char *unit, const uint32_t (&w)[4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (T == 1) {
        const uint2 x = *reinterpret_cast<const uint2 *>(unit + (lane % 4 * 2 + lane / 4 % 2) * 8);   /* of the columns from 2 on nothing is used */
        mma_diagonal(sum[0], sum[1], w, x.x, x.y);
    } else {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const uint4 x = reinterpret_cast<const uint4 *>(unit)[m * 32 + lane];
            const uint32_t left[4] = {x.x, x.y, x.z, x.w};
            mma(sum, left, w + 2 * m);
        }
    }
}
/* Row of the tile that element e belongs to */
template <int T> __device__ inline int row_of(int e) { return T == 1 ? threadIdx.x % 32 / 4 : threadIdx.x % 4 * 2 + e % 2; }

__device__ inline uint32_t subtract(uint32_t a, uint32_t b) {
    __nv_bfloat162 d = __hsub2(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b));
    return *reinterpret_cast<uint32_t *>(&d);
}
/* Codes below 128 in bytes 0 and 2 of a word, less `offset`, as bf16: 128 + code is a bf16 whose lowest bits are the code */
__device__ inline uint32_t small_codes(uint32_t word, uint32_t mask, int offset) {
    uint32_t value;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(value) : "r"(word), "r"(mask), "r"(0x43004300u));   /* word & mask | .. */
    return subtract(value, (0x4300u + offset) * 0x10001u);
}
/* Signed bytes 0 and 2: 128 + their lower bits, less 128, or 256 where the sign is set */
__device__ inline uint32_t signed_codes(uint32_t word) { return subtract((word & 0x007f007fu) | 0x43004300u, (word & 0x00800080u) | 0x43004300u); }
/* e4m3 in bytes 1 and 3: moved to bf16's fields it is 2^120 times too small */
__device__ inline uint32_t fp8_codes(uint32_t word) {
    const uint32_t moved = (word & 0x80008000u) | (word & 0x7f007f00u) >> 4, by = 0x7b807b80u;
    __nv_bfloat162 value = __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&moved), *reinterpret_cast<const __nv_bfloat162 *>(&by));
    return *reinterpret_cast<uint32_t *>(&value);
}

/* Scale and minimum of a block of a row of the slot, of its second half where that has its own. */
template <int D> __device__ inline float2 slot_affine(const unsigned char *slot, int row, int block, int half, int chunk) {
    const unsigned char *scales = slot + Slot<D>::SCALES + row * Slot<D>::SCALE_ROW, *supers = slot + Slot<D>::SUPERS + row * 4;
    if (D == TOPS_Q4_0 || D == TOPS_Q5_0 || D == TOPS_Q8_0) return make_float2(__half2float(reinterpret_cast<const __half *>(scales)[block]), 0.0f);
    if (D == TOPS_Q4_1 || D == TOPS_Q5_1) return __half22float2(reinterpret_cast<const __half2 *>(scales)[block]);
    if (D == TOPS_Q6_K) {
        const char2 sc = reinterpret_cast<const char2 *>(scales)[block];
        return make_float2(__half2float(reinterpret_cast<const __half *>(supers)[chunk % 2]) * (float)(half ? sc.y : sc.x), 0.0f);
    }
    const uchar2 sc = reinterpret_cast<const uchar2 *>(scales)[block];
    const float2 d = __half22float2(*reinterpret_cast<const __half2 *>(supers));
    return make_float2(d.x * (float)sc.x, -(d.y * (float)sc.y));
}

/* All scales of a row of the slot, where a block has just one */
template <int D> struct RowScales {
    static constexpr bool THERE = D == TOPS_Q4_0 || D == TOPS_Q5_0 || D == TOPS_Q8_0;
    uint32_t words[Slot<D>::BLOCKS / 2];
    __device__ RowScales(const unsigned char *slot, int row) {
        const unsigned char *from = slot + Slot<D>::SCALES + row * Slot<D>::SCALE_ROW;
        if (D == TOPS_Q8_0) {
            const uint2 raw = *reinterpret_cast<const uint2 *>(from);
            words[0] = raw.x;
            words[1] = raw.y;
        } else if (THERE) {
            const uint4 raw = *reinterpret_cast<const uint4 *>(from);
            words[0] = raw.x;
            words[1] = raw.y;
            words[Slot<D>::BLOCKS / 2 - 2] = raw.z;
            words[Slot<D>::BLOCKS / 2 - 1] = raw.w;
        }
    }
    __device__ float at(int block) const { return __half2float(__ushort_as_half((uint16_t)(words[block / 2] >> (block % 2 * 16)))); }
};

/* A lane's codes of a block of its row as bf16: columns 4 (lane % 4) + {0, 2}, {1, 3} of both halves of the block */
template <int D, int OFFSET> __device__ inline void block_codes(uint32_t (&w)[4], const unsigned char *slot, int block) {
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    if constexpr (D == TOPS_Q8_0) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t word = reinterpret_cast<const uint32_t *>(slot + piece_place(row, 2 * block + half))[quad];
            w[2 * half] = signed_codes(word);
            w[2 * half + 1] = signed_codes(word >> 8);
        }
    } else {
        const uint32_t word = reinterpret_cast<const uint32_t *>(slot + piece_place(row, block))[quad];
        if constexpr (Slot<D>::HIGH_PLANES == 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = small_codes(word >> (i % 2 * 8 + i / 2 * 4), 0x000f000fu, OFFSET);
        } else {
            uint32_t bytes[2] = {word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu};
#pragma unroll
            for (int plane = 0; plane < Slot<D>::HIGH_PLANES; plane++) {
                const uint32_t bits = reinterpret_cast<const uint32_t *>(slot + Slot<D>::HIGH)[plane * 64 + row * 8 + block];
#pragma unroll
                for (int half = 0; half < 2; half++) bytes[half] |= spread(bits >> (16 * half + 4 * quad)) << (4 + plane);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = small_codes(bytes[i / 2] >> (i % 2 * 8), 0x00ff00ffu, OFFSET);
        }
    }
}

/* A slot times the inputs, which begin with the slot's first unit. */
template <int D, int T> __device__ inline void multiply_slot(float (&sum)[SUMS<T>], const unsigned char *slot, const unsigned char *inputs, int chunk) {
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    if constexpr (D == TOPS_BF16) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + piece_place(row, 4 * u + quad));
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
            multiply<T>(sum, inputs + u * UNIT<T>, w);
        }
    } else if constexpr (D == TOPS_FP8_E4M3) {
        float part[SUMS<T>] = {};
#pragma unroll
        for (int u = 0; u < 4; u += 2) {
            const uint4 v = *reinterpret_cast<const uint4 *>(slot + piece_place(row, 2 * u + quad));
            const uint32_t first[4] = {fp8_codes(v.x << 8), fp8_codes(v.x), fp8_codes(v.y << 8), fp8_codes(v.y)};
            const uint32_t second[4] = {fp8_codes(v.z << 8), fp8_codes(v.z), fp8_codes(v.w << 8), fp8_codes(v.w)};
            multiply<T>(part, inputs + u * UNIT<T>, first);
            multiply<T>(part, inputs + (u + 1) * UNIT<T>, second);
        }
        const float *scales = reinterpret_cast<const float *>(slot + Slot<D>::SCALES);
#pragma unroll
        for (int e = 0; e < SUMS<T>; e++) sum[e] += scales[row_of<T>(e)] * part[e];
    } else {
        constexpr int OFFSET = D == TOPS_Q4_0 ? 8 : D == TOPS_Q5_0 ? 16 : D == TOPS_Q6_K ? 32 : 0;
        constexpr bool MINIMUM = D == TOPS_Q4_1 || D == TOPS_Q5_1 || D == TOPS_Q4_K || D == TOPS_Q5_K, HALVES = D == TOPS_Q6_K;
        const RowScales<D> plain(slot, row);
        constexpr int GROUP = T == 1 && Slot<D>::HIGH_PLANES == 0 ? 4 : 1;   /* blocks side by side: products take long */
#pragma unroll
        for (int group = 0; group < Slot<D>::BLOCKS; group += GROUP) {
            float part[GROUP][SUMS<T>] = {}, upper[GROUP][SUMS<T>] = {}, whole[GROUP][SUMS<T>] = {};
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                uint32_t w[4];
                block_codes<D, OFFSET>(w, slot, group + i);
                const unsigned char *unit = inputs + (group + i) * UNIT<T>;
                const uint32_t first[4] = {w[0], w[1], HALVES ? 0 : w[2], HALVES ? 0 : w[3]}, second[4] = {0, 0, w[2], w[3]};
                const uint32_t all[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};   /* ones */
                multiply<T>(part[i], unit, first);
                if (HALVES) multiply<T>(upper[i], unit, second);
                if (MINIMUM) multiply<T>(whole[i], unit, all);
            }
#pragma unroll
            for (int i = 0; i < GROUP; i++)
#pragma unroll
                for (int e = 0; e < SUMS<T>; e++) {
                    const float2 by = T == 1 && RowScales<D>::THERE ? make_float2(plain.at(group + i), 0.0f) : slot_affine<D>(slot, row_of<T>(e), group + i, 0, chunk);
                    sum[e] += by.x * part[i][e];
                    if (HALVES) sum[e] += slot_affine<D>(slot, row_of<T>(e), group + i, 1, chunk).x * upper[i][e];
                    if (MINIMUM) sum[e] += by.y * whole[i][e];
                }
        }
    }
}

/* Which slots a warp takes: items, each of them a tile or one of `split` parts of it, WARPS apart, phase by phase. */
struct Items {
    int tile, piece, phase, tiles, chunk, end;

    __device__ void begin(const Shape &s, int warp, int block_tiles) {
        tiles = block_tiles;
        tile = warp / s.split;
        piece = warp % s.split;
        phase = 0;
        settle(s);
    }
    __device__ void next(const Shape &s) {
        tile += s.steps_tile;
        piece += s.steps_piece;
        if (piece >= s.split) piece -= s.split, tile++;
        settle(s);
    }
    __device__ void settle(const Shape &s) {
        while (tile >= tiles && phase < s.phases) tile -= tiles, phase++;
        const bool last = phase == s.phases - 1;
        const int least = s.least[last], more = s.more[last];
        chunk = phase * s.per_phase + piece * least + min(piece, more);
        end = chunk + least + (piece < more);
    }
    __device__ bool there(const Shape &s) const { return phase < s.phases; }
    __device__ int index(const Shape &s) const { return (phase * tiles + tile) * s.split + piece; }
};

/* What a block does: `block` counts those of this product. */
template <int D, int T, bool PAIR> __device__ __forceinline__ void stream_rows(const Product &p, const Shape &s, int block) {
    constexpr int R = PAIR ? 2 : 1, STAGES = stages<D>(LARGE), BYTES = Slot<D>::BYTES, SLOT_INPUTS = Slot<D>::VALUES / 32 * UNIT<T>;
    extern __shared__ __align__(128) unsigned char memory[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char *ring = memory + warp * STAGES * BYTES, *inputs = memory + WARPS * STAGES * BYTES;
    float *partial = reinterpret_cast<float *>(inputs + s.per_phase * SLOT_INPUTS);   /* [item][matrix][t][8 rows] */
    const int first_tile = block * s.tiles + min(block, s.tiles_more), tiles = s.tiles + (block < s.tiles_more);
    auto part_of = [&](int tile) {
        int part = 0;
        if (!PAIR) while (part + 1 < p.count && tile >= s.part_tiles[part + 1]) part++;
        return part;
    };

    /* The warp asks for its items' slots in order, STAGES ahead. */
    Items item, asked;
    item.begin(s, warp, tiles);
    asked = item;
    int matrix = 0, chunk = 0;
    const int place = piece_place(lane / 8, lane % 8);
    Source<D> source{};
    auto begin = [&]() {
        chunk = asked.chunk;
        if (!asked.there(s)) return;
        const int tile = first_tile + asked.tile, part = PAIR ? matrix : part_of(tile);
        source.begin(p.parts[part], (int64_t)(tile - (PAIR ? 0 : s.part_tiles[part])) * STREAM_ROWS, chunk, lane);
    };
    auto ask = [&](unsigned char *slot) {
        while (chunk == asked.end && asked.there(s)) {
            if (++matrix == R) {
                matrix = 0;
                asked.next(s);
            }
            begin();
        }
        if (asked.there(s)) source.fetch(slot, place, chunk++, lane);
        copies_commit();
    };
    begin();
#pragma unroll 1
    for (int slot = 0; slot < STAGES; slot++) ask(ring + slot * BYTES);

    const float4 *norm_at = reinterpret_cast<const float4 *>(p.norm) + 2 * threadIdx.x;
    float4 norm[2] = {};
    if (p.norm && (int)threadIdx.x * 8 < p.cols) norm[0] = __ldg(norm_at), norm[1] = __ldg(norm_at + 1);
    /* Place of a row of a tile in the output, or -1 where the matrix has no such row */
    auto place_of = [&](int t, int tile, int row) {
        const int part = part_of(first_tile + tile);
        const int64_t at = (int64_t)(first_tile + tile - (PAIR ? 0 : s.part_tiles[part])) * STREAM_ROWS + row;
        return at < p.parts[part].rows && t < p.n ? t * p.out_cols + p.first_row[part] + at : -1;
    };
    auto residual = [&](int64_t at) { return p.out_f32 ? __ldcg(static_cast<const float *>(p.out) + at) : __bfloat162float(__ldcg(static_cast<const bf16 *>(p.out) + at)); };
    auto store = [&](int64_t at, float value) {
        if (p.out_f32) static_cast<float *>(p.out)[at] = value;
        else static_cast<bf16 *>(p.out)[at] = __float2bfloat16(value);
    };
    const bool direct = s.split * s.phases == 1;   /* a warp has whole sums */
    const int outputs = tiles * STREAM_ROWS * T;
    /* What this thread will write first, if sums meet in shared memory, and the residual there */
    const int64_t first_place = !direct && (int)threadIdx.x < outputs ? place_of(threadIdx.x / STREAM_ROWS % T, threadIdx.x / (STREAM_ROWS * T), threadIdx.x % STREAM_ROWS) : -1;
    wait_for_inputs();
    const float before = p.mode == ADD && first_place >= 0 ? residual(first_place) : 0.0f;

    unsigned char *slot = ring;
    for (int phase = 0; phase < s.phases; phase++) {
        if (phase) __syncthreads();
        if (p.norm) take_normed<D, T>(inputs, p, s.chunks * Slot<D>::VALUES, norm);
        else take_inputs<D, T>(inputs, p, phase * s.per_phase * Slot<D>::VALUES, min((phase + 1) * s.per_phase, s.chunks) * Slot<D>::VALUES);
        for (; item.phase == phase; item.next(s)) {
            float sum[R][SUMS<T>] = {};
#pragma unroll
            for (int r = 0; r < R; r++)
                for (int c = item.chunk; c < item.end; c++) {
                    copies_wait<STAGES - 1>();
                    __syncwarp();
                    multiply_slot<D, T>(sum[r], slot, inputs + (c - phase * s.per_phase) * SLOT_INPUTS, c);
                    __syncwarp();
                    ask(slot);
                    slot = slot + BYTES == ring + STAGES * BYTES ? ring : slot + BYTES;
                }
            if (T == 1 && lane % 4) continue;
#pragma unroll
            for (int e = 0; e < (T == 1 ? 1 : SUMS<T>); e++) {
                const int t = T == 1 ? 0 : lane / 4 + e / 2 * 8, row = row_of<T>(e);
                float value[R];
#pragma unroll
                for (int r = 0; r < R; r++) value[r] = T == 1 ? sum[r][0] + sum[r][1] : sum[r][e];
                if (!direct) {
#pragma unroll
                    for (int r = 0; r < R; r++) partial[((item.index(s) * R + r) * T + t) * STREAM_ROWS + row] = value[r];
                } else {
                    const int64_t at = place_of(t, item.tile, row);
                    if (at >= 0) store(at, PAIR ? silu(value[0]) * value[R - 1] : p.mode == ADD ? residual(at) + value[0] : value[0]);
                }
            }
        }
    }
    if (direct) return;
    __syncthreads();
    for (int index = threadIdx.x; index < outputs; index += THREADS) {
        const int row = index % STREAM_ROWS, t = index / STREAM_ROWS % T, tile = index / (STREAM_ROWS * T);
        const int64_t at = index == (int)threadIdx.x ? first_place : place_of(t, tile, row);
        if (at < 0) continue;
        float value[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            value[r] = 0;
            for (int phase = 0; phase < s.phases; phase++)
#pragma unroll 4
                for (int piece = 0; piece < s.split; piece++) value[r] += partial[((((phase * tiles + tile) * s.split + piece) * R + r) * T + t) * STREAM_ROWS + row];
        }
        store(at, PAIR ? silu(value[0]) * value[R - 1] : p.mode == ADD ? value[0] + (index == (int)threadIdx.x ? before : residual(at)) : value[0]);
    }
}

template <int D, int T, bool PAIR> __global__ void __launch_bounds__(THREADS, T == 1 ? 2 : 1) gemv_kernel(const __grid_constant__ Product p, const __grid_constant__ Shape s) {
    stream_rows<D, T, PAIR>(p, s, (int)blockIdx.x);
}

/* Two products of the same inputs in one launch: the last blocks take the rows kept in bf16. */
template <int D, int T> __global__ void __launch_bounds__(THREADS, T == 1 ? 2 : 1)
gemv_mixed(const __grid_constant__ Product p, const __grid_constant__ Shape s, const __grid_constant__ Product kept, const __grid_constant__ Shape kept_shape) {
    if ((int)blockIdx.x < s.blocks) stream_rows<D, T, false>(p, s, (int)blockIdx.x);
    else stream_rows<TOPS_BF16, T, false>(kept, kept_shape, (int)blockIdx.x - s.blocks);
}

/* Bytes of shared memory for a product on at most so many blocks; 0: it has too many columns. */
template <int D, int T> int plan(Shape &s, const tops_stream *stream, const Product &p, int blocks) {
    const bool pair = p.mode == GATE_UP;
    const int lines = pair ? 2 : 1, slot_inputs = Slot<D>::VALUES / 32 * UNIT<T>, ring = WARPS * stages<D>(is_large(stream)) * Slot<D>::BYTES;
    int tiles = 0;
    for (int i = 0; i < (pair ? 1 : p.count); i++) {
        s.part_tiles[i] = tiles;
        tiles += (int)ceil_div(p.parts[i].rows, STREAM_ROWS);
    }
    s.blocks = min(blocks, tiles);
    const int most = (int)ceil_div(tiles, s.blocks);
    s.tiles = tiles / s.blocks;
    s.tiles_more = tiles % s.blocks;
    s.chunks = (int)ceil_div(p.cols, Slot<D>::VALUES);
    s.phases = p.norm ? 1 : (int)ceil_div((int64_t)s.chunks * slot_inputs, INPUTS_MOST);
    s.per_phase = (int)ceil_div(s.chunks, s.phases);
    s.phases = (int)ceil_div(s.chunks, s.per_phase);
    /* A warp's time is its slots and about one more for each item. */
    int64_t best = INT64_MAX;
    int shared = 0;
    for (int split = 1; split <= WARPS; split++) {
        const int64_t cost = ceil_div(most * split, WARPS) * (ceil_div(s.per_phase, split) * lines + 1);
        const int partial = split * s.phases == 1 ? 0 : most * split * s.phases * lines * T * STREAM_ROWS * 4, needed = ring + s.per_phase * slot_inputs + partial;
        if (cost < best && needed + STATIC_MOST <= stream->shared_most) best = cost, s.split = split, shared = needed;
    }
    if (!shared) return 0;
    s.steps_tile = WARPS / s.split;
    s.steps_piece = WARPS % s.split;
    for (int last = 0; last < 2; last++) {
        const int count = last ? s.chunks - (s.phases - 1) * s.per_phase : s.per_phase;
        s.least[last] = count / s.split;
        s.more[last] = count % s.split;
    }
    return T == 1 && p.norm && shared < SHARED_ALONE && stream->shared_most > 2 * SHARED_ALONE - (4 << 10) ? SHARED_ALONE : shared;
}

template <int D, int T> int run(tops_stream *stream, const Product &p, const Product *kept) {
    auto start = [&](auto kernel, int blocks, int shared, auto... arguments) {
        CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        return launch(stream, kernel, dim3((unsigned)blocks), dim3(THREADS), (size_t)shared, 1, arguments...);
    };
    Shape s{}, kept_shape{};
    int blocks = stream->multiprocessors, shared = 1;
    if constexpr (D != TOPS_BF16)
        if (kept) {   /* two tiles for each of its blocks, and as many less for the others */
            shared = plan<TOPS_BF16, T>(kept_shape, stream, *kept, max((int)ceil_div(kept->rows, 2 * STREAM_ROWS), 1));
            blocks = max(blocks - kept_shape.blocks, 1);
        }
    const int own = plan<D, T>(s, stream, p, blocks);
    if (!own || !shared) return TOPS_UNSUPPORTED;   /* the caller has other kernels */
    if constexpr (D != TOPS_BF16)
        if (kept) return start(gemv_mixed<D, T>, s.blocks + kept_shape.blocks, max(own, shared), p, s, *kept, kept_shape);
    return p.mode == GATE_UP ? start(gemv_kernel<D, T, true>, s.blocks, own, p, s) : start(gemv_kernel<D, T, false>, s.blocks, own, p, s);
}
template <int D> int run(tops_stream *stream, const Product &p, const Product *kept) {
    return p.n == 1 ? run<D, 1>(stream, p, kept) : run<D, 16>(stream, p, kept);
}
#endif
}   // namespace stream
