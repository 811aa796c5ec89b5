// What the units that multiply can do at best: products summed in registers, from registers.

#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

#ifdef __AMX_BF16__
enum { PER_ROUND = 4 * 2 * 16 * 16 * 32 };
static void round_of_products(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}
#define ROUNDS(count) for (long i = 0; i < count; i++) round_of_products()
#else
#if defined(FP16) || defined(DOT)
typedef Sum Chain;
enum { PER_ROUND = 12 * 2 * 32 };
INLINE Chain next(Chain c, __m512i a) { return add_products(c, a, a); }
#define FACTOR _mm512_setzero_si512()
#define IN_REGISTER "+v"
#else
typedef V Chain;
enum { PER_ROUND = 12 * 2 * LANES };
INLINE Chain next(Chain c, V a) { return muladd(a, a, c); }
#define FACTOR ((V){0})
#ifdef __aarch64__
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+x"
#endif
#endif
// Twelve sums, so that none waits for itself; the empty assembly keeps the compiler from leaving any of it out.
#define ROUNDS(count)                                                                                          \
    Chain c[12];                                                                                               \
    memset(c, 0, sizeof c);                                                                                    \
    for (long i = 0; i < count; i++) {                                                                         \
        UNROLL                                                                                                 \
        for (int j = 0; j < 12; j++) c[j] = next(c[j], FACTOR);                                                \
        __asm__ volatile("" : IN_REGISTER(c[0]), IN_REGISTER(c[1]), IN_REGISTER(c[2]), IN_REGISTER(c[3]),      \
                         IN_REGISTER(c[4]), IN_REGISTER(c[5]), IN_REGISTER(c[6]), IN_REGISTER(c[7]),           \
                         IN_REGISTER(c[8]), IN_REGISTER(c[9]), IN_REGISTER(c[10]), IN_REGISTER(c[11]));        \
    }
#endif

// Floating-point operations a second of one core, two in each multiply-add; the best of some tries.
PUBLIC double NAME(peak)(void) {
    enum { COUNT = 200000 };
    double best = 1e9;
    tiles_on();
    for (int try = 0; try < 10; try++) {
        double begun = now();
        ROUNDS(COUNT);
        double seconds = now() - begun;
        best = MIN(best, seconds);
    }
    tiles_off();
    return (double)COUNT * PER_ROUND / best;
}
