/* Products of up to 16 rows of activations, the work of decoding: every multiprocessor streams an equal share of the matrix's rows through its
 * warps' rings (ring.cuh) into tensor cores, 8 rows of the matrix at a time. The inputs are normed, rounded and laid out in shared memory by
 * each block for itself while the first weights are on their way. */
#pragma once

#include "stream_slots.cuh"

namespace stream {
constexpr int INPUTS_MOST = 100 << 10;   /* bytes */
/* A processor has 228 KB of shared memory, 1 KB goes with each block: of two kernels that run in turn, one takes so much that no other block
 * of its own fits beside it, the other one what is left. Otherwise some processors would get two blocks and others none. */
constexpr int SHARED_PROCESSOR = 228 << 10, SHARED_BLOCK = 1 << 10, STATIC_MOST = 128;
constexpr int SHARED_ALONE = SHARED_PROCESSOR / 2 - SHARED_BLOCK, SHARED_BESIDE = SHARED_PROCESSOR - SHARED_ALONE - 2 * (SHARED_BLOCK + STATIC_MOST);

/* A ring is as deep as the processor's shared memory allows: 228 or 164 KB, or 100 KB. */
template <int D> __host__ __device__ constexpr int stages(bool large) { return !large ? 2 : Slot<D>::BYTES > 1280 ? 4 : 5; }
static inline bool is_large(const tops_stream *stream) { return stream->shared_most > 128 << 10; }

struct Shape {
    int blocks, tiles, tiles_more;   /* tiles of 8 rows for each block; so many blocks have one more */
    int part_tiles[4];            /* before each part */
    int chunks;                   /* slots along a row */
    int phases, per_phase;        /* parts of a row whose inputs are in shared memory at once, slots in each */
    int last_phase;               /* slots in the last one */
};

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr bool LARGE = false;
#else
constexpr bool LARGE = true;
#endif

/* A block's slots of a phase lie in a row, tile after tile, of two matrices first one's slots of a tile, then the other's. Its warps share them alike,
 * each takes neighbours; so a tile's sums come from one warp, or from a few that follow each other. */
struct Run {
    int tile, at, left, length;   /* the next slot and its place in the tile; slots to take, slots of a tile */

    __device__ Run(int tiles, int slots_tile, int warp) : length(slots_tile) {
        const int slots = tiles * length, least = slots / WARPS, more = slots % WARPS, begin = warp * least + min(warp, more);
        left = least + (warp < more);
        tile = begin / length;
        at = begin % length;
    }
    /* Whether that was the last slot of its tile */
    __device__ bool next() {
        left--;
        if (++at < length) return false;
        at = 0;
        tile++;
        return true;
    }
};
/* The warp that takes a slot */
__device__ inline int warp_of(int slots, int slot) {
    const int least = slots / WARPS, more = slots % WARPS, longer = more * (least + 1);
    return slot < longer ? slot / (least + 1) : more + (slot - longer) / least;
}

/* What a block does: `block` counts those of this product. */
template <int D, int T, bool PAIR> __device__ __forceinline__ void stream_rows(const Product &p, const Shape &s, int block) {
    constexpr int R = PAIR ? 2 : 1, STAGES = stages<D>(LARGE), BYTES = Slot<D>::BYTES, SLOT = SLOT_INPUTS<D, T>;
    extern __shared__ __align__(128) unsigned char memory[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char *ring = memory + warp * STAGES * BYTES, *inputs = memory + WARPS * STAGES * BYTES;
    float *partial = reinterpret_cast<float *>(inputs + s.per_phase * SLOT);   /* [phase][warp][of a tile it ends or goes on with, begins][matrix][t][8 rows] */
    constexpr int PART = R * T * STREAM_ROWS;
    const int first_tile = block * s.tiles + min(block, s.tiles_more), tiles = s.tiles + (block < s.tiles_more);
    uchar2 *spans = reinterpret_cast<uchar2 *>(partial + s.phases * WARPS * 2 * PART);   /* [phase][tile]: first warp, and how many */
    auto chunks_of = [&](int phase) { return phase == s.phases - 1 ? s.last_phase : s.per_phase; };
    auto part_of = [&](int tile) {
        int part = 0;
        if (!PAIR) while (part + 1 < p.count && tile >= s.part_tiles[part + 1]) part++;
        return part;
    };

    /* The warp asks for its slots in order, STAGES ahead. */
    int place = piece_place(lane / 8, lane % 8);
    asm("" : "+r"(place));   /* kept, not worked out anew for every slot */
    int asked_phase = 0, chunk = 0;
    Run asked(tiles, chunks_of(0) * R, warp);
    Source<D> source{};
    auto begin = [&]() {
        while (!asked.left && asked_phase + 1 < s.phases) asked_phase++, asked = Run(tiles, chunks_of(asked_phase) * R, warp);
        if (!asked.left) return;
        const int tile = first_tile + asked.tile, second = PAIR && asked.at >= asked.length / 2, part = PAIR ? second : part_of(tile);
        chunk = asked_phase * s.per_phase + asked.at - (second ? asked.length / 2 : 0);
        source.begin(p.parts[part], (int64_t)(tile - (PAIR ? 0 : s.part_tiles[part])) * STREAM_ROWS, chunk, lane);
    };
    auto ask = [&](unsigned char *slot) {
        if (asked.left) {
            source.fetch(slot, place, chunk++, lane);
            if (asked.next() || !asked.left || (PAIR && asked.at == asked.length / 2)) begin();
        }
        copy_commit();
    };
    begin();
#pragma unroll 1
    for (int slot = 0; slot < STAGES; slot++) ask(ring + slot * BYTES);

    for (int index = threadIdx.x; index < tiles * s.phases; index += THREADS) {
        const int length = chunks_of(index / tiles) * R, from = index % tiles * length, first = warp_of(tiles * length, from);
        spans[index] = make_uchar2((unsigned char)first, (unsigned char)(warp_of(tiles * length, from + length - 1) - first + 1));
    }
    if (p.norm && (int)threadIdx.x * 8 < p.cols) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + threadIdx.x * 8));   /* in registers it would be in the way */
    /* Place of a row of a tile in the output, or -1 where the matrix has no such row */
    auto place_of = [&](int t, int tile, int row) {
        const int part = part_of(first_tile + tile);
        const int at = (first_tile + tile - (PAIR ? 0 : s.part_tiles[part])) * STREAM_ROWS + row;
        return at < (int)p.parts[part].rows && t < (int)p.n ? t * (int)p.out_cols + (int)p.first_row[part] + at : -1;
    };
    auto residual = [&](int at) { return p.out_f32 ? __ldcg(static_cast<const float *>(p.out) + at) : __bfloat162float(__ldcg(static_cast<const bf16 *>(p.out) + at)); };
    const int outputs = tiles * STREAM_ROWS * T;
    wait_for_inputs();
    float before = 0;   /* where this thread will write first */
    if (p.mode == ADD && (int)threadIdx.x < outputs) {
        const int at = place_of(threadIdx.x / STREAM_ROWS % T, threadIdx.x / (STREAM_ROWS * T), threadIdx.x % STREAM_ROWS);
        if (at >= 0) before = residual(at);
    }
    auto finish = [&](int at, float first, float second, bool known) {
        if (at < 0) return;
        const float value = PAIR ? silu(first) * second : p.mode == ADD ? (known ? before : residual(at)) + second : second;
        if (p.out_f32) static_cast<float *>(p.out)[at] = value;
        else static_cast<bf16 *>(p.out)[at] = __float2bfloat16(value);
    };

    unsigned char *slot = ring;
    for (int phase = 0; phase < s.phases; phase++) {
        if (phase) __syncthreads();
        const int from = phase * s.per_phase * Slot<D>::VALUES, until = min((phase + 1) * s.per_phase, s.chunks) * Slot<D>::VALUES;
        if constexpr (T == 1) {
            auto get = [&](int c) { return eight_columns(p, 0, c); };
            if (p.norm) take_normed_row<D>(inputs, p, until, get);
            else take_row<D>(inputs, from, until, get);
        } else if (p.norm) {
            take_normed_rows<D>(inputs, p, until);
        } else {
            take_rows<D>(inputs, p, from, until);
        }
        Run run(tiles, chunks_of(phase) * R, warp);
        float sum[SUMS<T>] = {}, gate[SUMS<T>] = {};
        bool begun = run.at == 0;   /* by this warp */
        while (run.left) {
            const int c = run.at - (PAIR && run.at >= run.length / 2 ? run.length / 2 : 0), tile = run.tile;
            copy_wait<STAGES - 1>();
            __syncwarp();
            if constexpr (FIXED<D, T>) sum[0] += multiply_fixed<D>(slot, inputs + c * SLOT, phase * s.per_phase + c);
            else multiply_slot<D, T>(sum, slot, inputs + c * SLOT, phase * s.per_phase + c);
            __syncwarp();
            ask(slot);
            slot = slot + BYTES == ring + STAGES * BYTES ? ring : slot + BYTES;
            const bool ended = run.next();
            if (PAIR && run.at == run.length / 2) {
#pragma unroll
                for (int e = 0; e < SUMS<T>; e++) gate[e] = sum[e], sum[e] = 0;
            }
            if (!ended && run.left) continue;
            const bool second = PAIR && (ended || run.at > run.length / 2);   /* otherwise all that was summed is of the first matrix */
            if (PAIR && !second && run.at < run.length / 2) {
#pragma unroll
                for (int e = 0; e < SUMS<T>; e++) gate[e] = sum[e], sum[e] = 0;
            }
            float *to = partial + ((phase * WARPS + warp) * 2 + begun) * PART;
#pragma unroll
            for (int e = 0; e < (T == 1 ? 1 : SUMS<T>); e++) {
                const int t = T == 1 ? 0 : lane / 4 + e / 2 * 8, row = row_of<T>(e);
                float value = T > 1 || FIXED<D, T> ? sum[e] : sum[0] + sum[SUMS<T> - 1], first = T > 1 || FIXED<D, T> ? gate[e] : gate[0] + gate[SUMS<T> - 1];
                if (FIXED<D, T>) {
                    value += __shfl_xor_sync(0xffffffff, value, 1), value += __shfl_xor_sync(0xffffffff, value, 2);
                    if (PAIR) first += __shfl_xor_sync(0xffffffff, first, 1), first += __shfl_xor_sync(0xffffffff, first, 2);
                }
                if (T == 1 && lane % 4) continue;
                if (begun && ended && s.phases == 1) {   /* the whole tile */
                    finish(place_of(t, tile, row), first, value, false);
                } else {
                    to[t * STREAM_ROWS + row] = PAIR ? first : value;
                    if (PAIR) to[(T + t) * STREAM_ROWS + row] = value;
                }
            }
#pragma unroll
            for (int e = 0; e < SUMS<T>; e++) sum[e] = gate[e] = 0;
            begun = true;
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < outputs; index += THREADS) {
        const int row = index % STREAM_ROWS, t = index / STREAM_ROWS % T, tile = index / (STREAM_ROWS * T);
        if (s.phases == 1 && spans[tile].y == 1) continue;
        const int at = place_of(t, tile, row);
        float value[R] = {};
        for (int phase = 0; phase < s.phases; phase++) {
            const uchar2 span = spans[phase * tiles + tile];
            for (int w = 0; w < span.y; w++) {
                const float *from = partial + ((phase * WARPS + span.x + w) * 2 + (w == 0)) * PART + t * STREAM_ROWS + row;
#pragma unroll
                for (int r = 0; r < R; r++) value[r] += from[r * T * STREAM_ROWS];
            }
        }
        finish(at, value[0], value[R - 1], index == (int)threadIdx.x);
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
    const int lines = pair ? 2 : 1, slot_inputs = SLOT_INPUTS<D, T>, ring = WARPS * stages<D>(is_large(stream)) * Slot<D>::BYTES;
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
    /* One token's inputs leave room for the kernels before and behind this one, if they can. */
    const int beside = T == 1 ? SHARED_BESIDE - ring - WARPS * 2 * STREAM_ROWS * 4 - 64 : 0, inputs_most = beside < 8 << 10 ? INPUTS_MOST : beside;
    s.phases = p.norm ? 1 : (int)ceil_div((int64_t)s.chunks * slot_inputs, inputs_most);
    s.per_phase = (int)ceil_div(s.chunks, s.phases);
    s.phases = (int)ceil_div(s.chunks, s.per_phase);
    s.last_phase = s.chunks - (s.phases - 1) * s.per_phase;
    if (s.phases > 1 && ceil_div(most * s.per_phase * lines, WARPS) > s.per_phase * lines) return 0;   /* a warp would have more than two tiles' sums */
    const int shared = ring + s.per_phase * slot_inputs + s.phases * (WARPS * 2 * lines * T * STREAM_ROWS * 4 + most * 2);
    if (shared + STATIC_MOST > stream->shared_most) return 0;
    return T == 1 && p.norm && shared < SHARED_ALONE && stream->shared_most > 200 << 10 ? SHARED_ALONE : shared;
}

template <int D, int T> int run(tops_stream *stream, const Product &p, const Product *kept) {
    auto start = [&](auto kernel, int blocks, int shared, auto... arguments) {
        return launch_wide(stream, kernel, dim3((unsigned)blocks), dim3(THREADS), (size_t)shared, arguments...);
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
