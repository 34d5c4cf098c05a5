/* Tiles of one token's experts as integers: the token's activations are split into bytes (fixed.cuh), quantised codes stay bytes.
 *
 * x lies in shared memory by tiles of 64 columns, INPUT_TILE bytes each: by 32 columns the high, then the low bytes, as [lane % 4][columns 4 (lane % 4)
 * .. + 3, those 16 further], in the order 0, 2, 1, 3 in which codes of 4 bits come out of their words; then by 32 columns (step, sums of q over each
 * 16). Tiles of other kinds take x as rows of bf16 at the same places. */
#pragma once
#include "../cuda/fixed.cuh"
#include "experts.cuh"

template <tile_kind KIND> constexpr int tile_offset = KIND == TILES_4 ? 8 : KIND == TILES_4_MIN ? 0 : 128;

/* Columns of a row as threads load them, eight each at a time, MANY ahead of their use */
template <int MANY> struct row_pieces {
    static constexpr int STEP = WARPS * 32 * 8;
    uint4 ahead[MANY];
    const bf16 *x;
    int count;

    __device__ uint4 get(int c) const { return c < count ? *(const uint4 *)(x + c) : make_uint4(0, 0, 0, 0); }
    __device__ void begin(const bf16 *row, int columns) {
        x = row, count = columns;
#pragma unroll
        for (int i = 0; i < MANY; i++) ahead[i] = get(threadIdx.x * 8 + i * STEP);
    }
    __device__ uint4 next(int c) {   /* at c, a thread's columns in order */
        const uint4 v = ahead[0];
#pragma unroll
        for (int i = 0; i + 1 < MANY; i++) ahead[i] = ahead[i + 1];
        ahead[MANY - 1] = get(c + MANY * STEP);
        return v;
    }
};

/* The row's columns, those of tiles with scales times share(column), zeros up to the end of their last tile; all threads of the block call. */
template <tile_kind KIND, int MANY, typename Share> static __device__ inline void stage_inputs(unsigned char *to, row_pieces<MANY> &row, Share share) {
    const int padded = (row.count + TILE_COLS - 1) / TILE_COLS * TILE_COLS, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int c = threadIdx.x * 8; c - lane * 8 < padded; c += row.STEP) {   /* whole warps */
        const uint4 v = row.next(c);
        unsigned char *tile = to + c / TILE_COLS * INPUT_TILE;
        if constexpr (!has_scales(KIND)) {
            if (c < padded) *(uint4 *)(tile + c % TILE_COLS * 2) = v;
        } else {
            float value[8];
            eight_floats(v, value);
            const float step = step_of(largest(v, 4), 13), per_step = inverse(step);
            uint2 high, low;
            int sum = split_four(high.x, low.x, make_float4(value[0], value[2], value[1], value[3]), per_step);
            sum += split_four(high.y, low.y, make_float4(value[4], value[6], value[5], value[7]), per_step);
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            const int second = __shfl_down_sync(0xffffffff, sum, 2);
            if (c >= padded) continue;
            uint32_t *codes = (uint32_t *)(tile + c % TILE_COLS / 32 * 64) + c % 16 / 4 * 2 + c % 32 / 16;
            codes[0] = high.x, codes[2] = high.y, codes[8] = low.x, codes[10] = low.y;
            if (c % 32 == 0) *(int4 *)(tile + 128 + c % TILE_COLS / 32 * 16) = make_int4(__float_as_int(step * share(c)), sum, second, 0);
        }
    }
    __syncthreads();
}

/* Four groups of columns, as many as meet in one accumulator: of one tile or of two. They come through shared memory, where a lane writes and reads
 * what is its own: SLOT bytes of a warp. */
template <tile_kind KIND> struct tile_group {
    static constexpr int TILES = group_cols(KIND) == 32 ? 2 : 1, WORDS = tile_bytes(KIND) / 512, GROUPS = TILE_COLS / group_cols(KIND);
    static constexpr int GROUP_BYTES = has_minimum(KIND) ? 8 : 4;   /* scales of both rows of a lane */
    static constexpr int SLOT = TILES * WORDS * 512 + 256;
    uint4 codes[TILES][WORDS];
    uint2 scales;   /* of group lane % 4: f16 of both rows, or pairs with the minimum; zeros where there is no tile */

    /* Where tiles begin, lanes know: `first` and those behind it; `left` of them are there. */
    static __device__ void fetch(unsigned char *slot, const char *codes, const char *scales, int first, int left, int lane) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const char *from = (const char *)__shfl_sync(~0u, (long long)codes, first + i) + lane * 16;
#pragma unroll
            for (int w = 0; w < WORDS; w++) copy_async_once(slot + ((i * WORDS + w) * 32 + lane) * 16, from + w * 512, i < left);
        }
        const int mine = TILES == 2 ? lane % 4 / GROUPS : 0;
        const char *from = (const char *)__shfl_sync(~0u, (long long)scales, first + mine);
        copy_async_small<GROUP_BYTES>(slot + TILES * WORDS * 512 + lane * 8, from + (lane / 4 * GROUPS + lane % 4 % GROUPS) * GROUP_BYTES, mine < left);
    }
    __device__ void load(const unsigned char *slot, int lane) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int w = 0; w < WORDS; w++) codes[i][w] = *(const uint4 *)(slot + ((i * WORDS + w) * 32 + lane) * 16);
        scales = *(const uint2 *)(slot + TILES * WORDS * 512 + lane * 8);   /* without minima the upper half is not looked at */
    }
    /* sum of rows lane / 4 and + 8 += the group's share of them; x of each tile */
    __device__ void multiply(float (&sum)[2], const unsigned char *x0, const unsigned char *x1, int lane) const {
        const int column = lane / 8, mine = lane % 4;   /* the group whose x this lane gives, that whose sums it gets */
        int part[4] = {};
        const int4 own = *(const int4 *)((TILES == 2 && mine / GROUPS ? x1 : x0) + 128 + (TILES == 2 ? mine % 2 : mine / 2) * 16);
        const int q = TILES == 2 ? own.y + own.z : mine % 2 ? own.z : own.y;
        part[1] = part[3] = -tile_offset<KIND> * q;
        const unsigned char *x = (TILES == 2 && column / 2 ? x1 : x0) + (TILES == 2 ? column % 2 : column / 2) * 64 + lane / 4 % 2 * 32 + lane % 4 * 8;
        const uint2 bytes = *(const uint2 *)x;
#pragma unroll
        for (int group = 0; group < 4; group++) {
            const bool turn = column == group;
            uint32_t a[2][2];   /* [16 columns][row, row + 8] */
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const int step = TILES == 2 ? group % 2 * 2 + i : group;
                const uint4 *from = codes[TILES == 2 ? group / 2 : 0];
                if (KIND == TILES_4 || KIND == TILES_4_MIN) {
                    const uint32_t word = step == 0 ? from[0].x : step == 1 ? from[0].y : step == 2 ? from[0].z : from[0].w;
                    a[i][0] = word & 0x0f0f0f0fu;
                    a[i][1] = word >> 4 & 0x0f0f0f0fu;
                } else {
                    const uint4 v = from[WORDS == 2 ? step / 2 : 0];
                    const uint32_t first = step % 2 ? v.z : v.x, second = step % 2 ? v.w : v.y;
                    a[i][0] = __byte_perm(first, second, 0x5140);
                    a[i][1] = __byte_perm(first, second, 0x7362);
                }
            }
            if constexpr (TILES == 2) mma_bytes<false>(part, a[0][0], a[0][1], a[1][0], a[1][1], turn ? bytes.x : 0, turn ? bytes.y : 0);
            else mma_bytes(part, a[0][0], a[0][1], turn ? (group % 2 ? bytes.y : bytes.x) : 0);
        }
        const float step = __int_as_float(own.x);
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const float whole = (float)(part[2 * row] * 256 + part[2 * row + 1]);
            if (has_minimum(KIND)) {
                const uint32_t word = row ? scales.y : scales.x;
                const float2 by = __half22float2(*(const half2 *)&word);
                sum[row] = fmaf(by.x, step * whole, fmaf(by.y, step * (float)q, sum[row]));
            } else {
                const float2 by = __half22float2(*(const half2 *)&scales.x);
                sum[row] = fmaf(row ? by.y : by.x, step * whole, sum[row]);
            }
        }
    }
};

/* Groups that a warp has on their way at once, where it would have so many of 4 bits; and the bytes that they take in all warps */
template <tile_kind KIND> constexpr int depth_of(int groups) { return tile_group<KIND>::SLOT <= 1280 ? groups : groups / 2; }
static inline int ring_bytes(tile_kind kind, int groups) {
    switch (kind) {
    case TILES_4: case TILES_4_MIN: return WARPS * groups * tile_group<TILES_4>::SLOT;
    case TILES_8: return WARPS * depth_of<TILES_8>(groups) * tile_group<TILES_8>::SLOT;
    case TILES_8_MIN: return WARPS * depth_of<TILES_8_MIN>(groups) * tile_group<TILES_8_MIN>::SLOT;
    default: return 0;
    }
}

/* Tiles 0 .. count - 1 of the warp; place(i, codes, scales) finds where they begin, and x, x + x_step, .. are their inputs. GROUPS of 4 bits are on their
 * way before ready() is called. `rings`: of all warps. */
template <tile_kind KIND, int GROUPS, typename Place, typename Ready>
static __device__ inline void take_groups(float (&sum)[2], unsigned char *rings, int count, const unsigned char *x, int x_step, int lane, Place place, Ready ready) {
    typedef tile_group<KIND> Group;
    constexpr int TILES = Group::TILES, DEPTH = depth_of<KIND>(GROUPS);
    unsigned char *ring = rings + threadIdx.x / 32 * DEPTH * Group::SLOT, *slot = ring;
    const char *codes = nullptr, *scales = nullptr;   /* of tile `lane` of 32 */
#pragma unroll 1
    for (int at = -DEPTH * TILES; at < max(count, 1); at += TILES) {
        if (at == 0) ready();
        if (at >= 0 && at < count) {
            copy_wait<DEPTH - 1>();
            Group group;
            group.load(slot, lane);
            group.multiply(sum, x, at + 1 < count ? x + x_step : x, lane);
            x += TILES * x_step;
        }
        const int next = at + DEPTH * TILES;
        if (next < count) {
            if (next % 32 == 0) place(min(next + lane, count - 1), codes, scales);
            Group::fetch(slot, codes, scales, next % 32, count - next, lane);
        }
        copy_commit();
        slot = slot + Group::SLOT == ring + DEPTH * Group::SLOT ? ring : slot + Group::SLOT;
    }
}
