/* Products of up to 16 rows of activations, the work of decoding: every multiprocessor streams an equal share of the matrix's rows through its
 * warps' rings (ring.cuh) into tensor cores, 8 rows of the matrix at a time; weights become bf16 in registers. The inputs are normed,
 * rounded and laid out in shared memory by each block for itself while the first weights are on their way. */
#pragma once

#include "stream_slots.cuh"

namespace stream {
constexpr int INPUTS_MOST = 100 << 10;   /* bytes */
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
        copy_commit();
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
                    copy_wait<STAGES - 1>();
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
