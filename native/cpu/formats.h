/* Packed weights: GROUP (16) rows are stored interleaved, so that one vector register holds the same columns of all of them.
 *
 * Quantised formats, for each block of 32 columns:
 *   low     [4][16][4]  nibble pairs: byte [v][row][c] holds column 4v + c in its low and column 16 + 4v + c in its high half
 *   bits    [8][16][4] bits, once for each bit above the fourth: bit (row, c) of word v belongs to column 4v + c
 *   codes   [8][16][4]  whole bytes instead, for Q8_0 (stored + 128, so that all codes are unsigned)
 * preceded by what turns codes into values: value = scale * (code - offset) + minimum.
 *   Q4_0, Q5_0, Q8_0:   scale f16 [16]
 *   Q4_1, Q5_1:         scale f16 [16], minimum f16 [16]
 *   Q4_K, Q5_K:         by 256 columns d f16 [16], dmin f16 [16]; by block u8 sc [16], m [16]; scale = d sc, minimum = -dmin m
 *   Q6_K:               by 256 columns d f16 [16]; by block i8 sc [2][16] for its halves of 16 columns; scale = d sc
 * f32, f16 and fp8:     [cols][16].   bf16: [ceil(cols / 2)][16][2].
 * Nothing is rounded: a packed weight decodes to exactly what the file's rows decode to. Missing rows of the last group are zeros.
 */
#ifndef TENSOR_OPS_CPU_FORMATS_H
#define TENSOR_OPS_CPU_FORMATS_H

#include "internal.h"
#include "number.h"

typedef struct {
    int super;          /* columns that share a header: 32 or 256 */
    int header;         /* bytes before the blocks of a super-block */
    int affine;         /* bytes of each block before its codes */
    int bits;           /* of a code */
    int offset;
    bool minimum;
} tops_format;

static inline tops_format format_of(int dtype) {
    switch (dtype) {
    case TOPS_Q4_0: return (tops_format){32, 0, 32, 4, 8, false};
    case TOPS_Q4_1: return (tops_format){32, 0, 64, 4, 0, true};
    case TOPS_Q5_0: return (tops_format){32, 0, 32, 5, 16, false};
    case TOPS_Q5_1: return (tops_format){32, 0, 64, 5, 0, true};
    case TOPS_Q8_0: return (tops_format){32, 0, 32, 8, 128, false};
    case TOPS_Q4_K: return (tops_format){256, 64, 32, 4, 0, true};
    case TOPS_Q5_K: return (tops_format){256, 64, 32, 5, 0, true};
    case TOPS_Q6_K: return (tops_format){256, 32, 32, 6, 32, false};
    default: return (tops_format){0, 0, 0, 0, 0, false};
    }
}

static inline int64_t block_bytes(tops_format f) { return f.affine + (int64_t)GROUP * BLOCK * f.bits / 8; }
static inline int64_t super_bytes(tops_format f) { return f.header + f.super / BLOCK * block_bytes(f); }

/* Of a value of a format without blocks. */
static inline int64_t float_bytes(int dtype) { return dtype == TOPS_F32 ? 4 : dtype == TOPS_FP8_E4M3 ? 1 : 2; }

/* Block b (of 32 columns) of a group: its super-block's header and its own bytes. */
static inline const unsigned char *header_at(tops_format f, const unsigned char *group, int64_t b) {
    return group + b / (f.super / BLOCK) * super_bytes(f);
}
static inline const unsigned char *block_at(tops_format f, const unsigned char *group, int64_t b) {
    return header_at(f, group, b) + f.header + b % (f.super / BLOCK) * block_bytes(f);
}

/* Ask for as many bytes further on, so that they come while these are multiplied: a processor's own prefetching ends at boundaries of
 * 4 kB, and looks no further while it has work. */
static inline void ask_ahead(const unsigned char *at, int64_t bytes) {
    enum { AHEAD = 8192 };
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + AHEAD + line);
}

static inline uint16_t u16_at(const unsigned char *bytes, int64_t index) {
    uint16_t value;
    memcpy(&value, bytes + 2 * index, 2);
    return value;
}

/* Scale and minimum of a row in columns 16 half .. of a block. */
static inline void affine_of(int dtype, const unsigned char *header, const unsigned char *block, int row, int half, float *scale, float *minimum) {
    *minimum = 0;
    switch (dtype) {
    case TOPS_Q4_1: case TOPS_Q5_1:
        *minimum = float_of_f16(u16_at(block + 32, row));   /* fall through */
    case TOPS_Q4_0: case TOPS_Q5_0: case TOPS_Q8_0:
        *scale = float_of_f16(u16_at(block, row));
        break;
    case TOPS_Q4_K: case TOPS_Q5_K:
        *scale = float_of_f16(u16_at(header, row)) * block[row];
        *minimum = -(float_of_f16(u16_at(header + 32, row)) * block[16 + row]);
        break;
    default:
        *scale = float_of_f16(u16_at(header, row)) * (int8_t)block[16 * half + row];
    }
}

/* The code of (row, column c) in a block. */
static inline int code_at(tops_format f, const unsigned char *block, int row, int c) {
    const unsigned char *codes = block + f.affine;
    int vector = c / 4, lane = row * 4 + c % 4;
    if (f.bits == 8) return codes[vector * 64 + lane];
    int code = codes[vector % 4 * 64 + lane] >> (vector / 4 * 4) & 15;
    for (int bit = 4; bit < f.bits; bit++) code |= (codes[256 + (bit - 4) * 64 + vector * 8 + lane / 8] >> lane % 8 & 1) << bit;
    return code;
}

/* All codes of a row in a block that was zeros: a word of four columns at a time, which is how they lie together. */
static inline void set_codes(tops_format f, unsigned char *block, int row, const unsigned char codes[BLOCK]) {
    unsigned char *out = block + f.affine, pairs[BLOCK / 2];
    if (f.bits == 8) {
        for (int v = 0; v < 8; v++) memcpy(out + v * 64 + row * 4, codes + 4 * v, 4);
        return;
    }
    for (int c = 0; c < BLOCK / 2; c++) pairs[c] = (unsigned char)((codes[c] & 15) | codes[c + BLOCK / 2] << 4);
    for (int v = 0; v < 4; v++) memcpy(out + v * 64 + row * 4, pairs + 4 * v, 4);
    for (int bit = 4; bit < f.bits; bit++)
        for (int v = 0; v < 8; v++) {
            uint32_t four;
            memcpy(&four, codes + 4 * v, 4);
            four = (four >> bit & 0x01010101) * 0x01020408 >> 24;   /* bit 8 c goes to bit c */
            out[256 + (bit - 4) * 64 + v * 8 + row / 2] |= (unsigned char)((four & 15) << row % 2 * 4);
        }
}

#endif
