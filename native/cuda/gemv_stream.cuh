/* Products of up to 16 rows of activations, the work of decoding: every multiprocessor streams an equal share of the matrix's rows through its
 * warps' rings (ring.cuh) into tensor cores, 8 rows of the matrix at a time. The inputs are normed, rounded and laid out in shared memory by
 * each block for itself while the first weights are on their way. */
#pragma once

#include <climits>

#include "stream_slots.cuh"

namespace stream {
constexpr int INPUTS_MOST = 100 << 10;   /* bytes */
/* A processor has 228 KB of shared memory, 1 KB goes with each block. A product of one token stands alone, if the kernel before it does not: it takes so
 * much that no two of its blocks fit on a processor, and has a block for every processor. Others take no more than fits beside. So a processor has one
 * block of each, whoever ends when: otherwise some would get two, and blocks that find no room there would begin late. */
constexpr int SHARED_PROCESSOR = 228 << 10, SHARED_BLOCK = 1 << 10, STATIC_MOST = 128;
constexpr int SHARED_ALONE = SHARED_PROCESSOR / 2 - SHARED_BLOCK, SHARED_BESIDE = SHARED_PROCESSOR - SHARED_ALONE - 2 * (SHARED_BLOCK + STATIC_MOST);
static inline bool is_roomy(const tops_stream *stream) { return stream->shared_most >= SHARED_PROCESSOR - SHARED_BLOCK; }
template <int T> constexpr int LINES_MOST = T == 1 ? 256 : 32;   /* whose sums are in shared memory at once */

/* Of a ring's slots so many may be under way while one is multiplied; it has one more at least, more if they have room. Processors have 228 or 164 KB, or 100 KB. */
__host__ __device__ constexpr int under_way(bool large) { return large ? 3 : 1; }
static inline bool is_large(const tops_stream *stream) { return stream->shared_most > 128 << 10; }

/* A block's rows of the matrix in tiles of 8. A line is a tile of one matrix, or, of a pair (gate and up), of one of both: lines 2 i and 2 i + 1 are of
 * one tile. Sums of so many lines have room in shared memory at once, and inputs of so many columns: a stretch is a round of tiles and a phase of columns. */
struct Shape {
    int blocks, tiles, tiles_more;   /* tiles of each block; so many blocks have one more */
    int part_tiles[4];               /* before each part; INT_MAX for those that are none */
    int pair;                        /* 1: of two matrices */
    int stages;                      /* slots of a warp's ring */
    int chunks;                      /* slots along a row */
    int phases, per_phase;           /* slots of each */
    int rounds, per_round;           /* tiles of each */
};

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr bool LARGE = false;
#else
constexpr bool LARGE = true;
#endif

/* A stretch's slots lie in a row, line after line. Warps share them alike, each takes neighbours: `left` from slot `chunk` of its line on. A line has `length`
 * slots of the stretch, which begin with slot `from` of the matrix' row. */
struct alignas(16) Run {
    int line, left;
    uint16_t chunk, from, length;

    /* How many of them are of the first line; the run goes on behind these */
    __device__ int next_line() {
        const int count = min(left, length - chunk);
        left -= count;
        chunk = 0;
        line++;
        return count;
    }
};
/* The warp that takes a slot, where each takes `least` and the last `more` take one more: the first ones will have to write, too */
__device__ inline int warp_of(int least, int more, int slot) {
    const int short_ones = (WARPS - more) * least;
    return slot < short_ones ? divide(slot, least) : WARPS - more + divide(slot - short_ones, least + 1);
}

/* What a block does: `block` counts those of this product. Most of it runs once in a kernel, and instructions that run once come from far away: a step stands
 * in one place, loops are not unrolled unless they go round often, and begin before there is anything to do for all of their body. */
template <int D, int T> __device__ __forceinline__ void stream_rows(const Product &p, const Shape &s, int block) {
    constexpr int BYTES = Slot<D>::BYTES, SLOT = SLOT_INPUTS<D, T>, PART = T * SLOT_ROWS;
    extern __shared__ __align__(128) unsigned char memory[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = s.pair;
    const int first_tile = block * s.tiles + min(block, s.tiles_more), tiles = s.tiles + (block < s.tiles_more);
    if (!tiles) return wait_for_inputs();   /* keeps others out until then */
    const int lines_most = s.per_round << pair, sums = lines_most + WARPS - 1, stretches = s.rounds * s.phases;
    unsigned char *inputs = memory + WARPS * s.stages * BYTES;
    Run *runs = reinterpret_cast<Run *>(inputs + s.per_phase * SLOT);               /* [stretch][warp] */
    float *partial = reinterpret_cast<float *>(runs + stretches * WARPS);           /* [phase][line + warp, which no two warps share][t][8 rows] */
    int *places = reinterpret_cast<int *>(partial + s.phases * sums * PART);        /* [row of the block] in a row of the output, or -1 */
    uchar2 *spans = reinterpret_cast<uchar2 *>(places + tiles * SLOT_ROWS);         /* [stretch][line]: first warp, and how many */
    auto part_of = [&](int tile) { return pair ? 0 : (tile >= s.part_tiles[1]) + (tile >= s.part_tiles[2]) + (tile >= s.part_tiles[3]); };
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * SLOT_ROWS; i += THREADS) {
        const int tile = first_tile + i / SLOT_ROWS, part = part_of(tile), row = (tile - s.part_tiles[part]) * SLOT_ROWS + i % SLOT_ROWS;
        places[i] = row < (int)p.parts[part].rows ? (int)p.first_row[part] + row : -1;
    }
#pragma unroll 1
    for (int stretch = 0, round = 0, phase = 0; stretch < stretches; stretch++) {
        const int from = phase * s.per_phase, length = min(s.per_phase, s.chunks - from), first_line = round * lines_most;
        const int lines = min(lines_most, (tiles << pair) - first_line), slots = lines * length, least = slots / WARPS, more = slots % WARPS;
        if (lane == 0) {
            const int begin = warp * least + max(warp - (WARPS - more), 0), line = divide(begin, length);
            runs[stretch * WARPS + warp] = {first_line + line, least + (warp >= WARPS - more), (uint16_t)(begin - line * length), (uint16_t)from, (uint16_t)length};
        }
#pragma unroll 1
        for (int line = threadIdx.x; line < lines; line += THREADS) {
            const int first = warp_of(least, more, line * length);
            spans[stretch * lines_most + line] = make_uchar2((unsigned char)first, (unsigned char)(warp_of(least, more, line * length + length - 1) - first + 1));
        }
        if (++phase == s.phases) phase = 0, round++;
    }
    __syncwarp();

    /* The warp asks for its slots in order, as many ahead as its ring has. */
    int own = own_place<D>(lane), own_x = own_inputs(lane);
    asm("" : "+r"(own), "+r"(own_x));   /* kept, not worked out anew for every slot; so are others below */
    Run asked = runs[warp];
    int asked_stretch = 0, asks = 0;   /* slots that follow the last one in memory; behind the last of all there is nothing to ask for any more */
    bool there = true;
    Source<D> source{};
    auto find_next = [&] {
        while (!asked.left && ++asked_stretch < stretches) asked = runs[asked_stretch * WARPS + warp];
        there = asked.left;
        asks = INT_MAX;
        if (!there) return;
        const int tile = first_tile + (asked.line >> pair), part = part_of(tile);
        source.begin(p.parts[pair ? asked.line & 1 : part], (tile - s.part_tiles[part]) * SLOT_ROWS, asked.from + asked.chunk, lane);
        asks = asked.next_line();
    };
    /* Where output `index` of a round, [tile][t][8 rows], belongs, or -1; and what stands there, if it is to be added to */
    auto place_of = [&](int index, int round) {
        if (T == 1) return index < (tiles - round * s.per_round) * SLOT_ROWS ? places[round * s.per_round * SLOT_ROWS + index] : -1;
        const int t = index / SLOT_ROWS % T, tile = round * s.per_round + index / PART, place = tile < tiles ? places[tile * SLOT_ROWS + index % SLOT_ROWS] : -1;
        return place >= 0 && t < (int)p.n ? t * (int)p.out_cols + place : -1;
    };
    auto residual = [&](int at) -> uint32_t {   /* its bits, of the lower half if it is bf16: whoever makes a number of them waits for them */
        if (at < 0 || p.mode != ADD) return 0;
        return p.out_f32 ? __ldcg(static_cast<const uint32_t *>(p.out) + at) : __ldcg(static_cast<const uint16_t *>(p.out) + at);
    };
    uint32_t before = 0;   /* of the thread's first output */
    [[maybe_unused]] Turns<FIXED<D, T> ? D : TOPS_Q8_0> turns;
    int slot = warp * s.stages * BYTES, ring_end = slot + s.stages * BYTES;   /* bytes of `memory` */
    asm("" : "+r"(ring_end));
    int round = 0, phase = 0;
    Run run = {-1, s.stages, 0, 0, UINT16_MAX};   /* of no line: slots are asked for, and there is nothing to multiply yet */
#pragma unroll 1
    for (int stretch = -1;;) {
        float *to = partial + (phase * sums - round * lines_most + warp) * PART, sum[4] = {};
#pragma unroll 1
        while (run.left) {
            const int line = run.line;
            const unsigned char *x = inputs + run.chunk * SLOT;
#pragma unroll 1
            for (int left = run.next_line(), count; left; left -= count) {
                if (asks == 0) find_next();
                count = min(left, asks);
                asks -= count;
#pragma unroll 1
                for (int i = count; i; i--) {
                    if (line >= 0) {
                        copy_wait<under_way(LARGE)>();
                        __syncwarp();
                        if constexpr (FIXED<D, T>) multiply_fixed<D>(sum[0], turns, memory + slot, x, own);
                        else if constexpr (T == 1) multiply_floats<D>(sum, memory + slot, x, own, own_x);
                        else multiply_slot<D>(sum, memory + slot, x);
                        x += SLOT;
                        __syncwarp();
                    } else {
                        copy_wait<is_quantised(D) ? 1 : 0>();   /* few at a time are enough for the memory; more would stand in the way of what kernels before this one read */
                    }
                    source.fetch(memory + slot, own, there);
                    copy_commit();
                    slot += BYTES;
                    if (slot == ring_end) slot -= s.stages * BYTES;
                    asm("" : "+r"(slot));
                }
            }
            if (line < 0) break;
            if (T == 1) {
                const float value = FIXED<D, T> ? quad_sum(sum[0]) : sum[0] + sum[3];
                if (lane % 4 == 0) to[line * PART + lane / 4] = value;
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++) to[line * PART + (lane / 4 + e / 2 * 8) * SLOT_ROWS + row_of(e)] = sum[e];
            }
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e] = 0;
        }
        if (stretch >= 0 && ++phase < s.phases) {
            __syncthreads();
        } else if (stretch >= 0) {
            const int outputs = min(s.per_round, tiles - round * s.per_round) * PART;
            int index = threadIdx.x, at = place_of(index, round);
            __syncthreads();   /* the round's sums are there */
#pragma unroll 1
            for (; index < outputs; index += THREADS, at = place_of(index, round)) {
                float value = 0, first = 0;
                if (at < 0) continue;
                if (round || index != (int)threadIdx.x) before = residual(at);
#pragma unroll 1
                for (int r = 0; r <= pair; r++) {
                    const int line = (index / PART << pair) + r;
                    first = value, value = 0;
#pragma unroll 1
                    for (int k = 0; k < s.phases; k++) {
                        const uchar2 span = spans[(round * s.phases + k) * lines_most + line];
                        const float *from = partial + (k * sums + line + span.x) * PART + index % PART;
#pragma unroll 1
                        for (int w = 0; w < span.y; w += 4)
#pragma unroll
                            for (int i = 0; i < 4; i++) value += w + i < span.y ? from[(w + i) * PART] : 0.0f;
                    }
                }
                value = pair ? __fdividef(first, 1.0f + __expf(-first)) * value : __uint_as_float(p.out_f32 ? before : before << 16) + value;   /* SiLU, rounded to bf16 below */
                if (p.out_f32) static_cast<float *>(p.out)[at] = value;
                else static_cast<bf16 *>(p.out)[at] = __float2bfloat16(value);
            }
            phase = 0, round++;
            if (round < s.rounds) __syncthreads();   /* before others take the sums' places */
        }
        if (++stretch == stretches) break;
        if (stretch == 0) {
            if (p.norm && (int)threadIdx.x * 8 < p.cols) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + threadIdx.x * 8));   /* in registers it would be in the way */
            if (T > 1) __syncthreads();   /* a thread's first place is its own otherwise */
            const int first = place_of(threadIdx.x, 0);
            wait_for_inputs();
            before = residual(first);
        }
        if (stretch == 0 || s.phases > 1) {
            const int from = phase * s.per_phase * Slot<D>::VALUES, until = min((phase + 1) * s.per_phase, s.chunks) * Slot<D>::VALUES;
            if constexpr (T == 1) take_row<D>(inputs, p, from, until);
            else if (p.norm) take_normed_rows<D>(inputs, p, until);
            else take_rows<D>(inputs, p, from, until);
        }
        run = runs[stretch * WARPS + warp];
    }
}

template <int D, int T> __global__ void __launch_bounds__(THREADS, T == 1 ? 2 : 1) gemv_kernel(const __grid_constant__ Product p, const __grid_constant__ Shape s) {
    stream_rows<D, T>(p, s, (int)blockIdx.x);
}

/* Two products of the same inputs in one launch: the last blocks take the rows kept in bf16. */
template <int D, int T> __global__ void __launch_bounds__(THREADS, T == 1 ? 2 : 1)
gemv_mixed(const __grid_constant__ Product p, const __grid_constant__ Shape s, const __grid_constant__ Product kept, const __grid_constant__ Shape kept_shape) {
    if ((int)blockIdx.x < s.blocks) stream_rows<D, T>(p, s, (int)blockIdx.x);
    else stream_rows<TOPS_BF16, T>(kept, kept_shape, (int)blockIdx.x - s.blocks);
}

/* Bytes of shared memory for a product on at most so many blocks; 0: it has too many columns. */
template <int D, int T> int plan(Shape &s, const tops_stream *stream, const Product &p, int blocks, bool alone) {
    const int slot_inputs = SLOT_INPUTS<D, T>, stage = WARPS * Slot<D>::BYTES, part = T * SLOT_ROWS * 4;
    s.stages = under_way(is_large(stream)) + 1;
    s.pair = p.mode == GATE_UP;
    int tiles = 0;
    for (int i = 0; i < 4; i++) {
        const bool there = i < (s.pair ? 1 : p.count);
        s.part_tiles[i] = there ? tiles : INT_MAX;
        if (there) tiles += (int)ceil_div(p.parts[i].rows, SLOT_ROWS);
    }
    s.blocks = alone ? blocks : min(blocks, tiles);
    s.tiles = tiles / s.blocks;
    s.tiles_more = tiles % s.blocks;
    s.chunks = (int)ceil_div(p.cols, Slot<D>::VALUES);
    /* One token's inputs leave room for the kernels before and behind this one, if they can. */
    const int most = (int)ceil_div(tiles, s.blocks), lines = min(most << s.pair, LINES_MOST<T>), beside = T == 1 ? SHARED_BESIDE - s.stages * stage - 4096 : 0;
    const int inputs_most = beside < 8 << 10 ? INPUTS_MOST : min(beside, PIECES * THREADS * 8 / Slot<D>::VALUES * slot_inputs);
    s.phases = p.norm ? 1 : (int)ceil_div((int64_t)s.chunks * slot_inputs, inputs_most);
    s.per_phase = (int)ceil_div(s.chunks, s.phases);
    s.phases = (int)ceil_div(s.chunks, s.per_phase);
    s.per_round = lines >> s.pair;
    s.rounds = (int)ceil_div(most, s.per_round);
    int shared = s.stages * stage + s.per_phase * slot_inputs + s.rounds * s.phases * (WARPS * (int)sizeof(Run) + lines * 2) + s.phases * (lines + WARPS - 1) * part + most * SLOT_ROWS * 4;
    if (s.chunks > UINT16_MAX || shared + (T == 1 ? STATIC_MOST : 1 << 10) > stream->shared_most) return 0;
    if (T == 1 && !is_quantised(D) && is_roomy(stream))   /* quantised matrices are so small that it takes longer to fill more slots than they gain */
        for (; s.stages < ceil_div((most << s.pair) * s.chunks, WARPS) && shared + stage <= min(SHARED_ALONE, SHARED_BESIDE); s.stages++) shared += stage;
    return alone ? max(shared, SHARED_ALONE) : shared;
}

template <int D, int T> int run(tops_stream *stream, const Product &p, const Product *kept) {
    Shape s{}, kept_shape{};
    int blocks = stream->multiprocessors, shared = 1;
    if constexpr (D != TOPS_BF16)
        if (kept) {   /* two tiles for each of its blocks, and as many less for the others */
            shared = plan<TOPS_BF16, T>(kept_shape, stream, *kept, max((int)ceil_div(kept->rows, 2 * SLOT_ROWS), 1), false);
            blocks = max(blocks - kept_shape.blocks, 1);
        }
    const bool alone = T == 1 && !stream->alone && is_roomy(stream);
    const int own = plan<D, T>(s, stream, p, blocks, alone);
    if (!own || !shared) return TOPS_UNSUPPORTED;   /* the caller has other kernels */
    auto start = [&](auto kernel, int blocks, int shared, auto... arguments) {
        const int status = launch_wide(stream, kernel, dim3((unsigned)blocks), dim3(THREADS), (size_t)shared, arguments...);
        stream->alone = alone;
        return status;
    };
    if constexpr (D != TOPS_BF16)
        if (kept) return start(gemv_mixed<D, T>, s.blocks + kept_shape.blocks, max(own, shared), p, s, *kept, kept_shape);
    return start(gemv_kernel<D, T>, s.blocks, own, p, s);
}
template <int D> int run(tops_stream *stream, const Product &p, const Product *kept) {
    return p.n == 1 ? run<D, 1>(stream, p, kept) : run<D, 16>(stream, p, kept);
}
#endif
}   // namespace stream
