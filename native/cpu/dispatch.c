/* Chooses the kernels for the processor when the library is loaded. TOPS_ISA (c, avx2 or avx512) lowers the choice, for tests. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static tops_kernels table;
const tops_kernels *tops_cpu = &table;

__attribute__((constructor)) static void choose(void) {
    tops_kernels_c(&table);
#if defined(__x86_64__)
    const char *most = getenv("TOPS_ISA");
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
                  && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (avx2 && (!most || strcmp(most, "c") != 0)) {
        tops_kernels_avx2(&table);
        tops_tiles_avx2(&table);
        tops_float_tiles_avx2(&table);
    }
    if (avx512 && (!most || strcmp(most, "avx512") == 0)) {
        tops_kernels_avx512(&table);
        tops_tiles_avx512(&table);
        if (__builtin_cpu_supports("avx512bf16")) tops_bf16_tile_avx512(&table);
    }
#endif
}
