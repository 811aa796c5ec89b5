// Transformer blocks and Muon on one kind of processor: compiled once for each, with its flags and VARIANT, a suffix.

#if defined(__AVX512FP16__) && !defined(__AMX_BF16__)
#define FP16  // halves are IEEE's
#elif defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define DOT  // pairs of bfloat16 into float32 sums
#endif

#include "arguments.h"
#include "vectors.h"
#include "functions.h"

#include <omp.h>
#ifdef __linux__
#include <malloc.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define JOINED(name, variant) name##_##variant
#define EXPANDED(name, variant) JOINED(name, variant)
#define NAME(name) EXPANDED(name, VARIANT)
#define PUBLIC __attribute__((visibility("default")))

#include "tiles.h"
#include "finish.h"
#ifdef __AMX_BF16__
#include "products_amx.h"
#else
#include "products_vector.h"
#endif
#include "block.h"
#include "muon.h"
#include "peak.h"

PUBLIC const char *NAME(units) = UNITS;

// Ready to run; 0 when all is there. Ask the system for the use of tiles, where they are used. Have malloc keep what is
// freed: otherwise every large tensor of every step is mapped, faulted in page by page and unmapped again.
PUBLIC int64_t NAME(start)(void) {
    make_tables();
#ifdef M_MMAP_MAX
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_TRIM_THRESHOLD, INT32_MAX);
#endif
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023, 18);
#else
    return 0;
#endif
}
