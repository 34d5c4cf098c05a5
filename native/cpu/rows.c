/* Rows of activations as tiles read them: normed, rounded to 8 bits in groups or to bf16, and in f32. */
#include "internal.h"

bool tops_take_rows(tops_rows *rows, int64_t *own_bytes, tops_scratch *scratch, int64_t copies, int64_t n, int64_t cols, bool q8, bool bf16) {
    int64_t f32_bytes = (n * cols * 4 + 63) & ~(int64_t)63;
    int64_t q8_bytes = q8 ? (n * (cols / BLOCK) * (int64_t)sizeof(tops_q8) + 63) & ~(int64_t)63 : 0;
    int64_t bf16_bytes = bf16 ? (n * bf16_pitch(cols) * 2 + 63) & ~(int64_t)63 : 0;
    *own_bytes = f32_bytes + q8_bytes + bf16_bytes;
    unsigned char *memory = scratch_take(scratch, copies * *own_bytes);
    *rows = (tops_rows){.f32 = (float *)memory, .q8 = q8 ? (tops_q8 *)(memory + f32_bytes) : NULL,
                        .bf16 = bf16 ? (uint16_t *)(memory + f32_bytes + q8_bytes) : NULL, .cols = cols};
    return memory;
}

tops_rows tops_rows_after(const tops_rows *rows, int64_t bytes) {
    return (tops_rows){.f32 = (float *)((unsigned char *)rows->f32 + bytes), .q8 = rows->q8 ? (tops_q8 *)((unsigned char *)rows->q8 + bytes) : NULL,
                       .bf16 = rows->bf16 ? (uint16_t *)((unsigned char *)rows->bf16 + bytes) : NULL, .cols = rows->cols};
}

void tops_prepare_row(const tops_rows *rows, int64_t t, const void *x, int dtype, const float *norm, float eps) {
    int64_t cols = rows->cols;
    float *row = rows->f32 + t * cols;
    tops_cpu->load_row(row, x, dtype, cols);
    if (norm) tops_cpu->rms_norm(row, row, norm, cols, eps);
    if (rows->bf16) {
        uint16_t *half = rows->bf16 + t * bf16_pitch(cols);
        half[bf16_pitch(cols) - 1] = 0;
        tops_cpu->store_row(half, row, TOPS_BF16, cols);
        tops_cpu->load_row(row, half, TOPS_BF16, cols);
    }
    if (rows->q8) tops_cpu->quantize_row(rows->q8 + t * (cols / BLOCK), row, cols);
}
