// Which variants of the kernels this processor can run well, by its own word.

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Bit `bit` of register `which` (0 eax, 1 ebx, 2 ecx, 3 edx) of cpuid's leaf 7.
static int has(unsigned leaf, int which, int bit) {
    unsigned r[4];
    return __get_cpuid_count(7, leaf, r, r + 1, r + 2, r + 3) && r[which] >> bit & 1;
}

// Whether the system hands out tiles. Asking changes nothing.
static int tiles_granted(void) {
    uint64_t features = 0;
    return syscall(SYS_arch_prctl, 0x1021, &features) == 0 && features >> 18 & 1;
}
#endif

// Any variant may be asked for; "portable", the reference for the others, is never one that runs well.
__attribute__((visibility("default"))) int64_t serves(const char *variant) {
#ifdef __x86_64__
    __builtin_cpu_init();
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(variant, "amx")) return avx512 && has(1, 0, 5) && has(0, 3, 22) && has(0, 3, 24) && tiles_granted();
    if (!strcmp(variant, "avx512_fp16")) return avx512 && has(0, 3, 23);
    // AMD's instruction for pairs of bfloat16 does twice the work of a float32 multiply-add in the same time; Intel's, half.
    if (!strcmp(variant, "avx512_bf16")) return avx512 && has(1, 0, 5) && __builtin_cpu_is("amd");
    if (!strcmp(variant, "avx512")) return avx512;
    if (!strcmp(variant, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef __aarch64__
    if (!strcmp(variant, "neon")) return 1;
#endif
    return 0;
}
