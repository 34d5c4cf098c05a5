/* Conversions and exp in plain C that compilers vectorise: no branches, no library calls. */
#ifndef TENSOR_OPS_CPU_NUMBER_H
#define TENSOR_OPS_CPU_NUMBER_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float float_of_bf16(uint16_t h) { return float_of_bits((uint32_t)h << 16); }

static inline uint16_t bf16_of_float(float x) {   /* to nearest even; NaN stays NaN */
    uint32_t bits = bits_of_float(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

static inline float float_of_f16(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    /* Moving the exponent by a product makes subnormals come out right; infinity and NaN need the largest exponent. */
    uint32_t scaled = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    return float_of_bits(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled));
}

static inline uint16_t f16_of_float(float x) {
    _Float16 h = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}

static inline float float_of_fp8(uint8_t b) {   /* e4m3: no infinities, 0x7f and 0xff are NaN */
    float magnitude = float_of_f16((uint16_t)((b & 0x7f) << 7)) * 256.0f;
    magnitude = (b & 0x7f) == 0x7f ? NAN : magnitude;
    return b & 0x80 ? -magnitude : magnitude;
}

/* exp(x) within 2 ulp on the range of floats: 2^n by the exponent field, the rest by a degree-6 polynomial (Cephes expf). */
static inline float fast_exp(float x) {
    x = x > 88.3762626647949f ? 88.3762626647949f : x;
    x = x < -87.3365447504019f ? -87.3365447504019f : x;
    float n = floorf(x * 1.44269504088896341f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
               + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * float_of_bits((uint32_t)((int32_t)n + 127) << 23);
}

static inline float silu(float x) { return x / (1.0f + fast_exp(-x)); }

#endif
