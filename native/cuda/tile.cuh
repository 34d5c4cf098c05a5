/* Tiles of packed weights in a warp's registers, as left operands of tensor cores (format.cuh has the layout). */
#pragma once

#include "tile_format.cuh"
#include "storage.cuh"

static __device__ inline uint4 load_once(const void *from) {   /* read once per step: not worth a place in the first cache */
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

/* What a lane holds of one tile: codes as they lie in memory, scales of rows lane / 4 and + 8 by group of columns. */
template <tile_kind KIND> struct tile {
    static constexpr int words = tile_bytes(KIND) / 512, groups = has_scales(KIND) ? TILE_COLS / group_cols(KIND) : 1;
    uint4 codes[words];
    __align__(16) half2 scales[groups][has_minimum(KIND) ? 2 : 1];     /* by group: of both rows, or (scale, minimum) of each row */
    float block_scale;                                   /* fp8 */

    __device__ float scale(int g, int row) const {
        if (KIND == TILES_FP8) return block_scale;
        if (has_minimum(KIND)) return __low2float(scales[g][has_minimum(KIND) ? row : 0]);
        return row ? __high2float(scales[g][0]) : __low2float(scales[g][0]);
    }
    __device__ float minimum(int g, int row) const { return __high2float(scales[g][has_minimum(KIND) ? row : 0]); }

    __device__ void load(const matrix &m, int row_tile, int col_tile, int lane) {
        int64_t index = (int64_t)row_tile * m.col_tiles + col_tile;
        const char *at = m.tiles + index * tile_bytes(KIND);
#pragma unroll
        for (int i = 0; i < words; i++) codes[i] = load_once(at + (i * 32 + lane) * 16);
        if (KIND == TILES_FP8) {
            const float *blocks = (const float *)m.scales + row_tile / 8 * ((m.cols + 127) / 128) + col_tile / 2;
            block_scale = *blocks;
        }
        if (!has_scales(KIND)) return;
        /* As they lie in memory: nothing waits for them before they are used. */
        constexpr int BYTES = sizeof scales;
        const char *own = m.scales + (index * 8 + lane / 4) * BYTES;
        if constexpr (BYTES == 8) *(uint2 *)scales = __ldg((const uint2 *)own);
        else
#pragma unroll
            for (int i = 0; i < BYTES / 16; i++) ((uint4 *)scales)[i] = __ldg((const uint4 *)own + i);
    }

    /* Registers of step s (16 columns): the codes as numbers, without their scale */
    __device__ void left(uint32_t (&to)[4], int s) const {
        if (KIND == TILES_BF16) {
            uint4 v = codes[s];
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else if (KIND == TILES_4 || KIND == TILES_4_MIN) {
            uint32_t word = s == 0 ? codes[0].x : s == 1 ? codes[0].y : s == 2 ? codes[0].z : codes[0].w;
            /* 128 + code is a bf16 whose lowest bits are the code */
            __nv_bfloat162 zero = __float2bfloat162_rn(KIND == TILES_4 ? 136.0f : 128.0f);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t bits = (word >> (4 * i) & 0x000f000fu) | 0x43004300u;
                __nv_bfloat162 value = __hsub2(*(__nv_bfloat162 *)&bits, zero);
                to[i] = *(uint32_t *)&value;
            }
        } else {
            uint4 v = codes[s / 2];
#pragma unroll
            for (int half_word = 0; half_word < 2; half_word++) {
                uint32_t word = s % 2 ? (half_word ? v.w : v.z) : (half_word ? v.y : v.x);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (KIND == TILES_FP8) {
                        __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(word >> (16 * i)), __NV_E4M3);
                        float2 both = __half22float2(half2(raw));
                        to[half_word * 2 + i] = pair_of(both.x, both.y);
                    } else {   /* 2^23 + byte is an f32 whose lowest bits are the byte */
                        float low = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 + 2 * i)) - 8388736.0f;
                        float high = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7541 + 2 * i)) - 8388736.0f;
                        to[half_word * 2 + i] = pair_of(low, high);
                    }
                }
            }
        }
    }

    /* The same with scale and minimum applied, rounded to bf16 */
    __device__ void left_scaled(uint32_t (&to)[4], int s) const {
        left(to, s);
        if (KIND == TILES_BF16) return;
        constexpr int steps = TILE_COLS / 16 / groups;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float low = __uint_as_float(to[i] << 16), high = __uint_as_float(to[i] & 0xffff0000u), by = scale(s / steps, i % 2);
            float add = has_minimum(KIND) ? minimum(s / steps, i % 2) : 0.0f;
            to[i] = pair_of(low * by + add, high * by + add);
        }
    }

    /* sum [16 rows, 8 tokens] += tile x^T, of which only the first token's is wanted: its row of bf16, 64 columns. Of tiles without scales by group. */
    __device__ void multiply(float (&sum)[4], const unsigned char *x, int lane) const {
        static_assert(!has_scales(KIND), "integers: experts_fixed.cuh");
        float part[4] = {};
#pragma unroll
        for (int s = 0; s < TILE_COLS / 16; s++) {
            uint32_t a[4];
            left(a, s);
            const uint2 b = lane < 4 ? *(const uint2 *)(x + s * 32 + lane * 8) : make_uint2(0, 0);
            const uint32_t both[2] = {b.x, b.y};
            mma(KIND == TILES_BF16 ? sum : part, a, both);
        }
        if constexpr (KIND == TILES_FP8)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e] += block_scale * part[e];
    }
};

template <tile_kind KIND> struct kind_tag { static constexpr tile_kind value = KIND; };

/* f(kind as a constant) for the kinds that are tiles */
template <typename Function> static __device__ inline void with_kind(tile_kind kind, Function f) {
    switch (kind) {
    case TILES_BF16: f(kind_tag<TILES_BF16>()); break;
    case TILES_FP8: f(kind_tag<TILES_FP8>()); break;
    case TILES_4: f(kind_tag<TILES_4>()); break;
    case TILES_4_MIN: f(kind_tag<TILES_4_MIN>()); break;
    case TILES_8: f(kind_tag<TILES_8>()); break;
    case TILES_8_MIN: f(kind_tag<TILES_8_MIN>()); break;
    default: break;
    }
}
