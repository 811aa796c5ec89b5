// Products on vectors: float32 multiply-adds, or AVX-512's multiply-adds of pairs of halves.
//
// The left factor is turned into columns once, two panels of 16 rows, and read a few rows at a time by broadcasts.

enum { KEEP_MORE = 1 };  // products are dear here: see block.h

static void tiles_on(void) {}
static void tiles_off(void) {}

#if defined(FP16) || defined(DOT)
// For each pair of k the rows side by side, up to so many tiles: first-level cache.
#define DEEP 12L
#ifdef FP16
#define UNITS "AVX-512 FP16"
#define CHAIN 6L  // tiles whose sum half precision holds: 96 products in each of the two sums of an element
typedef __m512h Sum;
INLINE Sum add_products(Sum sum, __m512i a, __m512i b) { return _mm512_fmadd_ph((__m512h)a, (__m512h)b, sum); }
INLINE V in_float(Sum sum) { return first_of((I)_mm512_add_ph(sum, (__m512h)_mm512_rol_epi32((__m512i)sum, 16))); }
#else
#define UNITS "AVX-512 BF16"
#define CHAIN DEEP  // float32 sums have no need to stop
typedef __m512 Sum;
INLINE Sum add_products(Sum sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
INLINE V in_float(Sum sum) { return sum; }
#endif
static _Thread_local int panel[2][DEEP * 256] ALIGNED;

INLINE void to_panel(int *o, const I t[16]) {
    for (int i = 0; i < 16; i++) store_pairs(o + i * 16, t[i]);
}

// C (rows x 16 columns) [+]= panels B over so many pairs of B's rows; the next columns' lie bn halves further. C's rows
// are ldc floats apart. Rows are written up to a multiple of 8.
INLINE void tiles_mul(long rows, int columns, long pairs, const half *b, long bn, float *c, long ldc, int add) {
    enum { ROWS = 8 };
    for (long k = 0; k < pairs; k += 16 * CHAIN, add = 1)
        for (long r0 = 0; r0 < rows; r0 += ROWS) {
            Sum sum[ROWS][2];
            const int *a = panel[r0 / 16] + k * 16 + r0 % 16;
            const half *from = b + k * 32;
            UNROLL
            for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = (Sum)_mm512_setzero_si512();
            for (long p = MIN(16 * CHAIN, pairs - k); p > 0; p--, a += 16, from += 32) {
                if (columns > 1 && r0 < 16) _mm_prefetch(from + (2 + (r0 > 0)) * bn, _MM_HINT_T0);  // of the next columns
                __m512i b0 = (__m512i)load_pairs(from), b1 = columns > 1 ? (__m512i)load_pairs(from + bn) : b0;
                UNROLL
                for (int r = 0; r < ROWS; r++) {
                    __m512i pair = _mm512_set1_epi32(a[r]);
                    sum[r][0] = add_products(sum[r][0], pair, b0);
                    if (columns > 1) sum[r][1] = add_products(sum[r][1], pair, b1);
                }
            }
            UNROLL
            for (int r = 0; r < ROWS; r++)
                UNROLL
                for (int n = 0; n < columns; n++) {
                    float *o = c + (r0 + r) * ldc + 16 * n;
                    V f = in_float(sum[r][n]);
                    store(o, add ? f + load(o) : f);
                }
        }
}
static __attribute__((noinline)) void tile_mul(long rows, long pairs, const half *b, float *c, long ldc, int add) {
    tiles_mul(rows, 1, pairs, b, 0, c, ldc, add);
}
static __attribute__((noinline)) void two_tiles_mul(long rows, long pairs, const half *b, long bn, float *c, long ldc, int add) {
    tiles_mul(rows, 2, pairs, b, bn, c, ldc, add);
}

#else
// As float32: for each k the rows side by side, up to so many tiles: first-level cache.
#define DEEP 8L
#if LANES == 16
#define UNITS "AVX-512"
#elif LANES == 8
#define UNITS "AVX2"
#elif defined(NEON)
#define UNITS "NEON"
#else
#define UNITS "plain C"
#endif
static _Thread_local float panel[2][DEEP * 512] ALIGNED;

INLINE void to_panel(float *o, const I t[16 * PARTS]) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < PARTS; j++) {
            store(o + i * 32 + j * LANES, first_of(t[i * PARTS + j]));
            store(o + i * 32 + 16 + j * LANES, second_of(t[i * PARTS + j]));
        }
}

// C (rows x 16) [+]= a B over so many pairs of B's rows; `a` is a panel from some row on. C's rows are ldc floats apart.
INLINE void rows_mul(int rows, const float *a, long pairs, const half *b, float *c, long ldc, int add) {
    V sum[16][PARTS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int j = 0; j < PARTS; j++) sum[r][j] = add ? load(c + r * ldc + j * LANES) : (V){0};
    for (long p = 0; p < pairs; p++, a += 32, b += 32)
        UNROLL
        for (int which = 0; which < 2; which++) {  // the first of each pair, then the second
            V right[PARTS];
            UNROLL
            for (int j = 0; j < PARTS; j++) {
                I pairs = load_pairs(b + j * 2 * LANES);
                right[j] = which ? second_of(pairs) : first_of(pairs);
            }
            UNROLL
            for (int r = 0; r < rows; r++) add_row(sum[r], a + 16 * which + r, right);
        }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int j = 0; j < PARTS; j++) store(c + r * ldc + j * LANES, sum[r][j]);
}
// Up to sixteen rows, in shares as equal as can be, none with more sums than there are registers.
static __attribute__((noinline)) void panel_mul(const float *a, long rows, long pairs, const half *b, float *c, long ldc, int add) {
    enum { MOST = LANES == 16 ? 16 : 6 };
    for (long shares = UP(rows, MOST) / MOST; shares > 0; shares--) {
        long share = UP(rows, shares) / shares;
        switch (LANES == 16 ? UP(share, 4) : share) {  // the panel and C have room for so many
#define CASE(n) case n: rows_mul(n, a, pairs, b, c, ldc, add); break;
#if LANES == 16
            CASE(4) CASE(8) CASE(12) CASE(16)
#else
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#endif
#undef CASE
        }
        a += share, c += share * ldc, rows -= share;
    }
}
static void tile_mul(long rows, long pairs, const half *b, float *c, long ldc, int add) {
    panel_mul(panel[0], rows, pairs, b, c, ldc, add);
}
static void two_tiles_mul(long rows, long pairs, const half *b, long bn, float *c, long ldc, int add) {
    for (int n = 0; n < 2; n++)
        for (long i = 0; 16 * i < rows; i++)
            panel_mul(panel[i], MIN(16, rows - 16 * i), pairs, b + n * bn, c + i * 16 * ldc + 16 * n, ldc, add);
}
#endif

// 16 rows of kt tiles, ak halves apart, as a panel; the rows are lda halves apart.
static void make_panel(int which, long kt, const half *a, long ak, long lda) {
    for (long k = 0; k < kt; k++, a += ak) {
        I t[16 * PARTS];
        UNROLL
        for (int i = 0; i < 16; i++)
            UNROLL
            for (int j = 0; j < PARTS; j++) t[i * PARTS + j] = load_pairs(a + i * lda + j * 2 * LANES);
        transpose(t);
        to_panel(panel[which] + k * (sizeof panel[0] / sizeof panel[0][0] / DEEP), t);
    }
}

// C (rows x 16 nt) = A B over K terms. Strides in bytes: A from tile to tile down (am), right (ak) and from row to row
// (lda); C's rows are ldc apart. `dealt`: A's rows, and so C's, are in packing order.
static void mul(long rows, int dealt, long nt, long K, const void *a, long am, long ak, long lda, const void *b, void *c, long ldc) {
    long kt = UP(K, 32) / 32, pairs = (K + 1) / 2;
    for (long m = 0; m < (dealt ? UP(rows, 32) : UP(rows, 16)) / 16; m++) {
        long here = dealt ? dealt_rows(m, rows) : MIN(16, rows - 16 * m);
        for (long k = 0; k < kt && here; k += DEEP) {
            long steps = MIN(DEEP, kt - k), terms = MIN(16 * DEEP, pairs - 16 * k);
            make_panel(0, steps, (const half *)a + (m * am + k * ak) / 2, ak / 2, lda / 2);
            for (long n = 0; n < nt; n += 2) {
                const half *from = (const half *)b + (n * kt + k) * 512;
                float *to = (float *)c + (m * ldc * 16 + n * 64) / 4;
                if (n + 1 < nt) two_tiles_mul(here, terms, from, kt * 512, to, ldc / 4, k > 0);
                else tile_mul(here, terms, from, to, ldc / 4, k > 0);
            }
        }
    }
}

// x (rows, K) times packed weights -> (rows, N), by pieces of 32 x 32. `c` holds the sums, max(N, 64) x 32.
static __attribute__((noinline)) void linear(int kind, long rows, long N, long K, const half *x, const half *w, float *c, Finish f) {
    long KT = K / 32, parts = (KT + DEEP - 1) / DEEP, last = kind == TIMES ? UP(rows, 32) : rows;
    for (long m = 0; m < rows; m += 32)
        for (long part = 0; part < parts; part++) {
            long from = KT * part / parts, steps = KT * (part + 1) / parts - from, panels = rows - m > 16 ? 2 : 1;
            for (long i = 0; i < panels; i++) make_panel(i, steps, x + (m + 16 * i) * K + from * 32, 32, K);
            for (long n = 0; n < N; n += 32) {
                float *o = c + (parts > 1 ? n * 32 : 0);
                two_tiles_mul(MIN(32, rows - m), 16 * steps, w + n * K + from * 512, 16 * K, o, 32, part > 0);
                if (part == parts - 1)
                    for (long i = 0; i < MIN(32, last - m); i += 2) finish_rows(kind, &f, o + i * 32, m + i, rows, n, N);
            }
        }
}

// Gradient of weights: += a^T b for a (rows, M) and b (rows, N), packed, as 32 x 32 pieces of 4 KB, `ld` in
// a row of `out`.
static void accumulate(long rows, long M, long N, const half *a, const half *b, float *out, long ld, int add) {
    long RB = UP(rows, 32) / 32, parts = (RB + DEEP - 1) / DEEP;
    for (long m = 0; m < M; m += 32)
        for (long part = 0; part < parts; part++) {
            long from = RB * part / parts, steps = RB * (part + 1) / parts - from, pairs = MIN(16 * steps, (rows + 1) / 2 - 16 * from);
            for (long i = 0; i < 2; i++) make_panel(i, steps, a + ((m / 16 + i) * RB + from) * 512, 512, 32);
            for (long n = 0; n < N; n += 32)
                two_tiles_mul(32, pairs, b + (n * RB / 16 + from) * 512, RB * 512, out + (m / 32 * ld + n / 32) * 1024, 32,
                              add || part > 0);
        }
}
