// What the units that multiply can do at best: products summed in registers, from registers.

#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

#ifdef __AMX_BF16__
enum { PER_ROUND = 4 * 2 * 16 * 16 * 32 };
static void rounds(long count) {
    for (long i = 0; i < count; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}
#else
#if defined(FP16) || defined(DOT)
typedef Sum Chain;
enum { PER_ROUND = 12 * 2 * 32 };
INLINE Chain next(Chain c, V a) { return add_products(c, (__m512i)a, (__m512i)a); }
#else
typedef V Chain;
enum { PER_ROUND = 12 * 2 * LANES };
INLINE Chain next(Chain c, V a) { return muladd(a, a, c); }
#endif
#ifdef __aarch64__
#define HELD(v) __asm__ volatile("" : "+w"(v))
#else
#define HELD(v) __asm__ volatile("" : "+x"(v))
#endif
static void rounds(long count) {  // twelve sums, so that none waits for itself; HELD keeps the compiler from leaving one out
    Chain a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0}, i = {0}, j = {0}, k = {0}, l = {0};
    V factor = {0};
    HELD(factor);
    for (long n = 0; n < count; n++) {
        a = next(a, factor), b = next(b, factor), c = next(c, factor), d = next(d, factor);
        e = next(e, factor), f = next(f, factor), g = next(g, factor), h = next(h, factor);
        i = next(i, factor), j = next(j, factor), k = next(k, factor), l = next(l, factor);
        HELD(a); HELD(b); HELD(c); HELD(d); HELD(e); HELD(f); HELD(g); HELD(h); HELD(i); HELD(j); HELD(k); HELD(l);
    }
}
#endif

// Floating-point operations a second of one core, two in each multiply-add; the best of some tries.
PUBLIC double NAME(peak)(void) {
    enum { COUNT = 200000 };
    double best = 1e9;
    tiles_on();
    for (int try = 0; try < 10; try++) {
        double begun = now();
        rounds(COUNT);
        double seconds = now() - begun;
        best = MIN(best, seconds);
    }
    tiles_off();
    return (double)COUNT * PER_ROUND / best;
}
