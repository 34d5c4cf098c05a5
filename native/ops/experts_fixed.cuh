/* Tiles of one token's experts as integers: the token's activations are split into bytes (fixed.cuh), quantised codes stay bytes.
 *
 * x lies in shared memory by tiles of 64 columns, INPUT_TILE bytes each: by 32 columns the high, then the low bytes, as [lane % 4][columns 4 (lane % 4)
 * .. + 3, those 16 further], in the order 0, 2, 1, 3 in which codes of 4 bits come out of their words; then by 32 columns (step, sums of q over each
 * 16). Tiles of other kinds take x as rows of bf16 at the same places. */
#pragma once
#include "../cuda/fixed.cuh"
#include "experts.cuh"

template <tile_kind KIND> constexpr int tile_offset = KIND == TILES_4 ? 8 : KIND == TILES_4_MIN ? 0 : 128;

/* Columns 0 .. count - 1 of a row, zeros up to the end of their last tile; all threads of the block call. */
template <tile_kind KIND> static __device__ inline void stage_inputs(unsigned char *to, const bf16 *x, int count) {
    const int padded = (count + TILE_COLS - 1) / TILE_COLS * TILE_COLS, lane = threadIdx.x % 32;
    for (int c = threadIdx.x * 8; c - lane * 8 < padded; c += WARPS * 32 * 8) {   /* whole warps */
        const uint4 v = c < count ? *(const uint4 *)(x + c) : make_uint4(0, 0, 0, 0);
        unsigned char *tile = to + c / TILE_COLS * INPUT_TILE;
        if constexpr (!has_scales(KIND)) {
            if (c < padded) *(uint4 *)(tile + c % TILE_COLS * 2) = v;
        } else {
            float value[8];
            eight_floats(v, value);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
            uint32_t most = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) most = max(most, max(words[i] << 16 & 0x7fffffffu, words[i] & 0x7fff0000u));
            most = max(most, __shfl_xor_sync(0xffffffff, most, 1));
            most = max(most, __shfl_xor_sync(0xffffffff, most, 2));
            const float step = step_of(most, 13), per_step = inverse(step);
            uint2 high, low;
            int sum = split_four(high.x, low.x, make_float4(value[0], value[2], value[1], value[3]), per_step);
            sum += split_four(high.y, low.y, make_float4(value[4], value[6], value[5], value[7]), per_step);
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            const int second = __shfl_down_sync(0xffffffff, sum, 2);
            if (c >= padded) continue;
            uint32_t *codes = (uint32_t *)(tile + c % TILE_COLS / 32 * 64) + c % 16 / 4 * 2 + c % 32 / 16;
            codes[0] = high.x, codes[2] = high.y, codes[8] = low.x, codes[10] = low.y;
            if (c % 32 == 0) *(int4 *)(tile + 128 + c % TILE_COLS / 32 * 16) = make_int4(__float_as_int(step), sum, second, 0);
        }
    }
    __syncthreads();
}

/* One of the tiles that a warp takes: where its codes, its scales and its inputs lie, and what its sums count */
struct tile_place {
    const char *codes, *scales;
    const unsigned char *x;
    float share;
};

/* Four groups of columns, as many as meet in one accumulator: of one tile or of two */
template <tile_kind KIND> struct tile_group {
    static constexpr int TILES = group_cols(KIND) == 32 ? 2 : 1, WORDS = tile_bytes(KIND) / 512, GROUPS = TILE_COLS / group_cols(KIND);
    static constexpr int GROUP_BYTES = has_minimum(KIND) ? 8 : 4;   /* scales of both rows of a lane */
    uint4 codes[TILES][WORDS];
    uint2 scales;   /* of group lane % 4: f16 of both rows, or pairs with the minimum; zeros where there is no tile */

    __device__ void load(const tile_place (&at)[TILES], const bool (&there)[TILES], int lane) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int w = 0; w < WORDS; w++) codes[i][w] = there[i] ? load_once(at[i].codes + (w * 32 + lane) * 16) : make_uint4(0, 0, 0, 0);
        const int mine = lane % 4 / GROUPS;
        const char *own = (TILES == 2 && mine ? at[TILES - 1].scales : at[0].scales) + (lane / 4 * GROUPS + lane % 4 % GROUPS) * GROUP_BYTES;
        scales = make_uint2(0, 0);
        if (!(TILES == 2 && mine ? there[TILES - 1] : there[0])) return;
        if (has_minimum(KIND)) scales = __ldg((const uint2 *)own);
        else scales.x = __ldg((const uint32_t *)own);
    }
    /* sum of rows lane / 4 and + 8 += the group's share of them */
    __device__ void multiply(float (&sum)[2], const tile_place (&at)[TILES], int lane) const {
        const int column = lane / 8, mine = lane % 4;   /* the group whose x this lane gives, that whose sums it gets */
        int part[4] = {};
        const int4 own = *(const int4 *)((TILES == 2 && mine / GROUPS ? at[TILES - 1].x : at[0].x) + 128 + (TILES == 2 ? mine % 2 : mine / 2) * 16);
        const int q = TILES == 2 ? own.y + own.z : mine % 2 ? own.z : own.y;
        part[1] = part[3] = -tile_offset<KIND> * q;
        const unsigned char *x = (TILES == 2 && column / 2 ? at[TILES - 1].x : at[0].x) + (TILES == 2 ? column % 2 : column / 2) * 64 + lane / 4 % 2 * 32 + lane % 4 * 8;
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
        const float share = TILES == 2 && mine / GROUPS ? at[TILES - 1].share : at[0].share, step = __int_as_float(own.x) * share;
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

/* Tiles 0 .. count - 1 of the warp, which place(i) finds; MANY groups are on their way before ready() is called. What a tile's sums count is known
 * only then. */
template <tile_kind KIND, int MANY, typename Place, typename Ready>
static __device__ inline void take_groups(float (&sum)[2], int count, int lane, Place place, Ready ready) {
    typedef tile_group<KIND> Group;
    constexpr int TILES = Group::TILES;
    Group groups[MANY];
    for (int base = 0; base < count || base == 0; base += MANY * TILES) {
        auto for_each = [&](auto act) {
#pragma unroll
            for (int i = 0; i < MANY; i++) {
                if (base + i * TILES >= count) continue;
                tile_place at[TILES];
                bool there[TILES];
#pragma unroll
                for (int j = 0; j < TILES; j++) there[j] = base + i * TILES + j < count, at[j] = place(there[j] ? base + i * TILES + j : 0);
                act(groups[i], at, there);
            }
        };
        for_each([&](Group &group, const tile_place (&at)[TILES], const bool (&there)[TILES]) { group.load(at, there, lane); });
        if (base == 0) ready();
        for_each([&](const Group &group, const tile_place (&at)[TILES], const bool (&)[TILES]) { group.multiply(sum, at, lane); });
    }
}
