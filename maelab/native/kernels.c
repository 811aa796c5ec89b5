// One pre-norm Transformer block, forward and backward, in 16 bits: on Intel AMX, or else on AVX-512.
//
// A thread takes a few samples at a time (a chunk) through the whole block, so that every activation between the
// block's input and its output stays in the core's own cache. Only the input and attention's results are kept for the
// backward pass, which computes the rest again: that costs less than writing it to memory and reading it back. Matrix
// products run on 16x16 tiles (factors of 16 bits, float32 sums); norms, softmax, GELU, residuals and sums are float32.
// Without AMX the same tiles are multiplied by vector instructions: IEEE half precision where the processor multiplies
// it, summed over at most CHAIN tiles before it goes on in float32; bfloat16 in pairs where FAST_BF16 says that this is
// worth it (it is on AMD's, twice the rate of float32, and not on Intel's, half of it); or else float32. Products are dear
// then, and q, k, v and what goes into GELU are kept as well.
//
// Every sum runs in an order that depends only on the sizes and on the number of threads: same input, same bits.

#include <immintrin.h>
#include <malloc.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t half;  // bfloat16, or IEEE half precision (FP16)
typedef struct {
    int64_t B, L, T, D, H, F;  // samples, tokens in, tokens out (the last T), width, heads, hidden width of the MLP
    int64_t threads, rows;     // rows: about how many tokens to take at a time
    float eps;
    const float *x, *scale1, *scale2;  // (B, L, D); stochastic depth per sample (B,) of each branch, or NULL
    const float *n1w, *n1b, *qkvb, *projb, *n2w, *n2b, *fc1b, *fc2b, *qkvw, *projw, *fc1w, *fc2w;  // qkvb may be NULL
    float *y;           // (B, T, D)
    half *packed;       // (12 D^2 for F = 4 D) weights in tile order, for the forward products
    half *kept;         // for the backward pass, or NULL: see block_kept
    const float *dy;    // backward: (B, T, D)
    float *dx, *grads;  // (B, L, D); gradients one after the other, in the order of the parameters above
    char *work;
    int64_t need_weights;
} Block;

#define INLINE static inline __attribute__((always_inline))
#define UP(n, m) (((n) + (m) - 1) / (m) * (m))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#ifdef __AMX_BF16__
#define UNITS "AMX"
enum { KEEP_MORE = 0 };
#elif defined(__AVX512FP16__)
#define UNITS "AVX-512 FP16"
#define FP16
enum { KEEP_MORE = 1 };
#elif defined(FAST_BF16) && defined(__AVX512BF16__)
#define UNITS "AVX-512 BF16"
#define DOT
enum { KEEP_MORE = 1 };
#else
#define UNITS "AVX-512"
enum { KEEP_MORE = 1 };
#endif
const char *units = UNITS;

// ------------------------------------------------------------------------------------------------- small helpers

#ifdef FP16
INLINE __m512 from_half(const half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE __m256i one_to_half(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE __m512i two_to_half(__m512 low, __m512 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(one_to_half(low)), one_to_half(high), 1);
}
// The two numbers in each 32 bits, of which the first is the lower half.
INLINE __m512 first_of(__m512i pairs) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)); }
INLINE __m512 second_of(__m512i pairs) { return first_of(_mm512_srli_epi32(pairs, 16)); }
#else
INLINE __m512 from_half(const half *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
#ifdef __AVX512BF16__
INLINE __m256i one_to_half(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
INLINE __m512i two_to_half(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else
INLINE __m256i one_to_half(__m512 v) {  // to the nearest, ties to even
    __m512i bits = _mm512_castps_si512(v), lowest = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(lowest, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
INLINE __m512i two_to_half(__m512 low, __m512 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(one_to_half(low)), one_to_half(high), 1);
}
#endif
INLINE __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE __m512 second_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))); }
#endif
INLINE void to_half(half *p, __m512 v) { _mm256_storeu_si256((void *)p, one_to_half(v)); }
INLINE __m512 add_pairs(__m512 sum, __m512i pairs) { return _mm512_add_ps(_mm512_add_ps(sum, first_of(pairs)), second_of(pairs)); }

INLINE __m512 exp2_(__m512 x) {  // 2^x, relative error 3e-6
    __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n), p = _mm512_set1_ps(9.57002e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.591780e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4024746e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9312182e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9999926e-1f));
    return _mm512_scalef_ps(p, n);
}

// gelu(x) = x Phi(x): Phi and gelu's slope as quadratics on 32 pieces of [-4, 3.87], constant beyond. Off by at
// most 1.3e-4 and 5e-4, where bfloat16 rounds numbers near one to 2e-3. One permutation looks up 16 numbers of a table.
static float cdf[3][32] __attribute__((aligned(64))), derivative[3][32] __attribute__((aligned(64)));

static void make_tables(void) {  // each quadratic meets its function in the three Chebyshev points of the piece
    for (int i = 0; i < 32; i++) {
        double x[3], c[2][3];
        for (int j = 0; j < 3; j++) {
            x[j] = (i - 16 + cos(M_PI * (2 * j + 1) / 6) / 2) / 4;
            c[0][j] = 0.5 + 0.5 * erf(x[j] * M_SQRT1_2);
            c[1][j] = c[0][j] + x[j] * exp(-x[j] * x[j] / 2) / sqrt(2 * M_PI);
        }
        for (int f = 0; f < 2; f++) {  // Newton's form, then by powers
            double a = (c[f][1] - c[f][0]) / (x[1] - x[0]);
            double b = ((c[f][2] - c[f][1]) / (x[2] - x[1]) - a) / (x[2] - x[0]);
            float(*table)[32] = f ? derivative : cdf;
            table[2][i] = b, table[1][i] = a - b * (x[0] + x[1]), table[0][i] = c[f][0] - x[0] * (a - b * x[1]);
        }
    }
}
INLINE __m512 quadratic(const float table[3][32], __m512i piece, __m512 x) {
    __m512 c[3];
    for (int i = 0; i < 3; i++)
        c[i] = _mm512_permutex2var_ps(_mm512_load_ps(table[i]), piece, _mm512_load_ps(table[i] + 16));
    return _mm512_fmadd_ps(_mm512_fmadd_ps(c[2], x, c[1]), x, c[0]);
}
INLINE void gelu(__m512 v[4], __m512 *slope) {
    for (int j = 0; j < 4; j++) {
        v[j] = _mm512_max_ps(v[j], _mm512_set1_ps(-4.0f));
        __m512 x = _mm512_min_ps(v[j], _mm512_set1_ps(3.87f));
        // Adding 1.5 * 2^23 rounds to whole numbers, in the lowest bits.
        __m512i piece = (__m512i)_mm512_fmadd_ps(x, _mm512_set1_ps(4.0f), _mm512_set1_ps(12582912.0f + 16.0f));
        v[j] = _mm512_mul_ps(v[j], quadratic(cdf, piece, x));
        if (slope) slope[j] = quadratic(derivative, piece, x);
    }
}

INLINE void transpose(__m512i r[16]) {  // 16 x 16 elements of 32 bits
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// --------------------------------------------------------------------------------------------------------- tiles
//
// A tile is 16 rows of 64 bytes. C (16 x 16 float32) += A (16 x 32 halves) B, where B holds 32 x 16 elements as
// pairs of rows: B[p][n] = (b[2 p][n], b[2 p + 1][n]).

#ifdef __AMX_BF16__
static void tiles_on(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

static void tiles_off(void) { _tile_release(); }

// C (16 mt x 16 nt) [+]= A B over kt tiles. Strides in bytes: A from tile to tile down (am), right (ak) and from row
// to row (lda); B's columns of tiles are bn apart, its tiles 1024; C's rows are ldc apart.
INLINE void tile_mul(int mt, int nt, long kt, const void *a_, long am, long ak, long lda, const void *b_, long bn,
                     void *c_, long ldc, int add) {
    const char *a = a_, *b = b_;
    char *c = c_;
    __asm__ volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, c, ldc);
        if (nt > 1) _tile_loadd(1, c + 64, ldc);
        if (mt > 1) _tile_loadd(2, c + 16 * ldc, ldc);
        if (mt > 1 && nt > 1) _tile_loadd(3, c + 16 * ldc + 64, ldc);
    } else {
        _tile_zero(0);
        if (nt > 1) _tile_zero(1);
        if (mt > 1) _tile_zero(2);
        if (mt > 1 && nt > 1) _tile_zero(3);
    }
    for (long k = 0; k < kt; k++, a += ak, b += 1024) {
        _tile_loadd(4, a, lda);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (nt > 1) {
            _tile_loadd(7, b + bn, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (mt > 1) {
            _tile_loadd(5, a + am, lda);
            _tile_dpbf16ps(2, 5, 6);
            if (nt > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, ldc);
    if (nt > 1) _tile_stored(1, c + 64, ldc);
    if (mt > 1) _tile_stored(2, c + 16 * ldc, ldc);
    if (mt > 1 && nt > 1) _tile_stored(3, c + 16 * ldc + 64, ldc);
    __asm__ volatile("" ::: "memory");
}

static void mul(long mt, long nt, long kt, const void *a_, long am, long ak, long lda, const void *b_, void *c_,
                long ldc) {
    for (long m = 0; m < mt; m += 2)
        for (long n = 0; n < nt; n += 2) {
            const char *a = (const char *)a_ + m * am, *b = (const char *)b_ + n * kt * 1024;
            char *c = (char *)c_ + m * 16 * ldc + n * 64;
            if (m + 1 < mt && n + 1 < nt) tile_mul(2, 2, kt, a, am, ak, lda, b, kt * 1024, c, ldc, 0);
            else if (m + 1 < mt) tile_mul(2, 1, kt, a, am, ak, lda, b, 0, c, ldc, 0);
            else if (n + 1 < nt) tile_mul(1, 2, kt, a, am, ak, lda, b, kt * 1024, c, ldc, 0);
            else tile_mul(1, 1, kt, a, am, ak, lda, b, 0, c, ldc, 0);
        }
}

#else
static void tiles_on(void) {}
static void tiles_off(void) {}

#if defined(FP16) || defined(DOT)
// The left factor, two panels of 16 rows: for each pair of k the rows side by side, up to so many tiles: first-level cache.
#define DEEP 12L
#ifdef FP16
#define CHAIN 6L  // tiles whose sum half precision holds: 96 products in each of the two sums of an element
typedef __m512h Sum;
INLINE Sum add_products(Sum sum, __m512i a, __m512i b) { return _mm512_fmadd_ph((__m512h)a, (__m512h)b, sum); }
INLINE __m512 in_float(Sum sum) { return first_of((__m512i)_mm512_add_ph(sum, (__m512h)_mm512_rol_epi32((__m512i)sum, 16))); }
#else
#define CHAIN DEEP  // float32 sums have no need to stop
typedef __m512 Sum;
INLINE Sum add_products(Sum sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
INLINE __m512 in_float(Sum sum) { return sum; }
#endif
static _Thread_local int panel[2][DEEP * 256] __attribute__((aligned(64)));

static void make_panel(int which, long kt, const half *a, long ak, long lda) {
    for (long k = 0; k < kt; k++, a += ak / 2) {
        __m512i t[16];
        for (int i = 0; i < 16; i++) t[i] = _mm512_loadu_si512(a + i * lda / 2);
        transpose(t);
        for (int i = 0; i < 16; i++) _mm512_store_si512(panel[which] + k * 256 + i * 16, t[i]);
    }
}

// C (16 panels x 16 columns) [+]= panels B over kt tiles of B, one after the other; the next columns' lie bn halves
// further. C's rows are ldc bytes apart.
INLINE void tiles_mul(int panels, int columns, long kt, const half *b, long bn, float *c, long ldc, int add) {
    enum { ROWS = 8 };
    for (long k = 0; k < kt; k += CHAIN, add = 1)
        for (int r0 = 0; r0 < 16 * panels; r0 += ROWS) {
            Sum sum[ROWS][2];
            const int *a = panel[r0 / 16] + k * 256 + r0 % 16;
            const half *from = b + k * 512;
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = (Sum)_mm512_setzero_si512();
            for (long p = 16 * MIN(CHAIN, kt - k); p > 0; p--, a += 16, from += 32) {
                if (columns > 1 && r0 < 16) _mm_prefetch(from + (2 + (r0 > 0)) * bn, _MM_HINT_T0);  // of the next columns
                __m512i b0 = _mm512_load_si512(from), b1 = columns > 1 ? _mm512_load_si512(from + bn) : b0;
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    __m512i pair = _mm512_set1_epi32(a[r]);
                    sum[r][0] = add_products(sum[r][0], pair, b0);
                    if (columns > 1) sum[r][1] = add_products(sum[r][1], pair, b1);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int n = 0; n < columns; n++) {
                    float *o = c + (r0 + r) * ldc / 4 + 16 * n;
                    __m512 f = in_float(sum[r][n]);
                    _mm512_store_ps(o, add ? _mm512_add_ps(f, _mm512_load_ps(o)) : f);
                }
        }
}
static __attribute__((noinline)) void tile_mul(long kt, const half *b, float *c, long ldc, int add) {
    tiles_mul(1, 1, kt, b, 0, c, ldc, add);
}
static __attribute__((noinline)) void two_tiles_mul(int panels, long kt, const half *b, long bn, float *c, long ldc, int add) {
    tiles_mul(panels, 2, kt, b, bn, c, ldc, add);
}

#else
// The left factor as float32, two panels of 16 rows: for each k the rows side by side, up to so many tiles: first-level cache.
#define DEEP 8L
static _Thread_local float panel[2][DEEP * 512] __attribute__((aligned(64)));

static void make_panel(int which, long kt, const half *a, long ak, long lda) {
    float *o = panel[which];
    for (long k = 0; k < kt; k++, a += ak / 2) {
        __m512i t[16];
        for (int i = 0; i < 16; i++) t[i] = _mm512_loadu_si512(a + i * lda / 2);
        transpose(t);
        for (int i = 0; i < 16; i++, o += 32) {
            _mm512_store_ps(o, first_of(t[i]));
            _mm512_store_ps(o + 16, second_of(t[i]));
        }
    }
}

// C (16 x 16) [+]= panel B over kt tiles of B, one after the other. C's rows are ldc bytes apart.
static __attribute__((noinline)) void panel_mul(const float *a, long kt, const half *b, float *c, long ldc, int add) {
    __m512 sum[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) sum[r] = add ? _mm512_load_ps(c + r * ldc / 4) : _mm512_setzero_ps();
    for (long p = 0; p < 16 * kt; p++, a += 32, b += 32) {
        __m512i pairs = _mm512_load_si512(b);
        __m512 first = first_of(pairs), second = second_of(pairs);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[r]), first, sum[r]);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[r + 16]), second, sum[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) _mm512_store_ps(c + r * ldc / 4, sum[r]);
}
static void tile_mul(long kt, const half *b, float *c, long ldc, int add) { panel_mul(panel[0], kt, b, c, ldc, add); }
static void two_tiles_mul(int panels, long kt, const half *b, long bn, float *c, long ldc, int add) {
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < panels; i++) panel_mul(panel[i], kt, b + n * bn, c + i * 4 * ldc + 16 * n, ldc, add);
}
#endif

static void mul(long mt, long nt, long kt, const void *a, long am, long ak, long lda, const void *b, void *c, long ldc) {
    for (long m = 0; m < mt; m++)
        for (long k = 0; k < kt; k += DEEP) {
            long steps = MIN(DEEP, kt - k);
            make_panel(0, steps, (const half *)a + (m * am + k * ak) / 2, ak, lda);
            for (long n = 0; n < nt; n += 2) {
                const half *from = (const half *)b + (n * kt + k) * 512;
                float *to = (float *)c + (m * ldc * 16 + n * 64) / 4;
                if (n + 1 < nt) two_tiles_mul(1, steps, from, kt * 512, to, ldc, k > 0);
                else tile_mul(steps, from, to, ldc, k > 0);
            }
        }
}
#endif

// Packing matrices that are summed over their rows leaves each group of 32 columns in the order in which the unpack
// instructions deal them out: position p of tile t is column 8 (p / 4) + 4 t + p % 4.
INLINE long position(long column) {
    long c = column & 31;
    return (column & ~31L) + ((c & 4) << 2) + ((c >> 3) << 2) + (c & 3);
}
INLINE void in_order(__m512 *low, __m512 *high) {  // two tiles' rows -> columns 0..15 and 16..31
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512 l = _mm512_permutex2var_ps(*low, first, *high);
    *high = _mm512_permutex2var_ps(*low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), *high);
    *low = l;
}

// src (rows, cols), rows `ld` apart, as one factor of a product summed over the rows: the right one (B), or
// transposed the left one (A). Rows are filled with zeros to a multiple of 32. Tile (i, k) is the (i RB + k)-th for
// columns 16 i... and rows 32 k..., RB = rows / 32 rounded up. Also adds the sum of each column to `sums`, if given.
INLINE void pack_rows(const half *src, long ld, long rows, long cols, half *out, int left, float *sums) {
    long RB = UP(rows, 32) / 32;
    for (long c = 0; c < cols; c += 32) {
        __mmask32 mask = cols - c >= 32 ? 0xffffffffu : 0xffffu;
        __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
        for (long k = 0; k < RB; k++) {
            __m512i low[16], high[16];
            half *o = out + ((c / 16) * RB + k) * 512;
            for (int i = 0; i < 16; i++) {
                long r = k * 32 + 2 * i;
                __m512i a = r < rows ? _mm512_maskz_loadu_epi16(mask, src + r * ld + c) : _mm512_setzero_si512();
                __m512i b = r + 1 < rows ? _mm512_maskz_loadu_epi16(mask, src + r * ld + ld + c) : _mm512_setzero_si512();
                low[i] = _mm512_unpacklo_epi16(a, b);
                high[i] = _mm512_unpackhi_epi16(a, b);
                if (sums) {
                    sum0 = add_pairs(sum0, low[i]);
                    sum1 = add_pairs(sum1, high[i]);
                }
            }
            if (left) transpose(low);
            for (int i = 0; i < 16; i++) _mm512_store_si512(o + i * 32, low[i]);
            if (left) transpose(high);
            for (int i = 0; i < 16; i++) _mm512_store_si512(o + RB * 512 + i * 32, high[i]);
        }
        if (sums) {
            in_order(&sum0, &sum1);
            _mm512_storeu_ps(sums + c, _mm512_add_ps(_mm512_loadu_ps(sums + c), sum0));
            if (cols - c >= 32) _mm512_storeu_ps(sums + c + 16, _mm512_add_ps(_mm512_loadu_ps(sums + c + 16), sum1));
        }
    }
}
static void pack_left(const half *src, long ld, long rows, long cols, half *out, float *sums) {
    if (sums) pack_rows(src, ld, rows, cols, out, 1, sums);
    else pack_rows(src, ld, rows, cols, out, 1, 0);
}
static void pack_right(const half *src, long ld, long rows, long cols, half *out, float *sums) {
    if (sums) pack_rows(src, ld, rows, cols, out, 0, sums);
    else pack_rows(src, ld, rows, cols, out, 0, 0);
}

// src (rows, cols) as right factor of a product summed over its columns (k^T in q k^T), zeros beyond.
static void pack_columns(const half *src, long ld, long rows, long cols, half *out) {
    for (long r = 0; r < rows; r += 16)
        for (long c = 0; c < cols; c += 32, out += 512) {
            __m512i t[16];
            __mmask32 mask = cols - c >= 32 ? 0xffffffffu : 0xffffu;
            for (int i = 0; i < 16; i++)
                t[i] = r + i < rows ? _mm512_maskz_loadu_epi16(mask, src + (r + i) * ld + c) : _mm512_setzero_si512();
            transpose(t);
            for (int i = 0; i < 16; i++) _mm512_store_si512(out + i * 32, t[i]);
        }
}

// Weights w (N, K) float32 -> right factor of x w^T (forward) or of g w (backward): tiles [from, to) of 32 columns.
static void pack_weight(const float *w, long N, long K, half *out, int backward, long from, long to) {
    __m512i t[32];
    for (long g = from; g < to; g++)
        for (long k = 0; k < (backward ? N : K); k += 32) {
            const float *s = backward ? w + k * K + g * 32 : w + g * 32 * K + k;  // 32 x 32 elements
            for (int i = 0; i < 32; i++)
                t[i] = two_to_half(_mm512_loadu_ps(s + i * K), _mm512_loadu_ps(s + i * K + 16));
            half *o = out + g * 32 * (backward ? N : K) + k * 16, *p = o + 16 * (backward ? N : K);
            if (backward) {
                __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                                 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
                __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
                for (int i = 0; i < 16; i++) {
                    _mm512_storeu_si512(o + i * 32, _mm512_permutex2var_epi16(t[2 * i], first, t[2 * i + 1]));
                    _mm512_storeu_si512(p + i * 32, _mm512_permutex2var_epi16(t[2 * i], second, t[2 * i + 1]));
                }
            } else {
                transpose(t);
                transpose(t + 16);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(o + i * 32, t[i]);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(p + i * 32, t[16 + i]);
            }
        }
}

// -------------------------------------------------------------------------------------------- products by weights

enum { STORE, ADD_TO, GELU, GELU_BOTH, TIMES, STORE_F32, ADD_F32 };
#define SLICE 192L  // of the MLP's hidden width, taken at a time on the way back: its weights and sums stay in cache

// What becomes of 32 columns of one row of a product, v, at `at` in the result:
//   STORE       out = v + bias                      GELU       out = gelu(v + bias), grad = v + bias if it is given
//   ADD_TO      sum = from + scale (v + bias)       GELU_BOTH  packed = gelu(v + bias), grad = gelu'(v + bias)
//   STORE_F32   sum = v;  ADD_F32  sum += v         TIMES      grad *= v, packed = grad, sum += sums of columns
// where `packed` is what pack_right makes of the result.
typedef struct {
    half *out, *grad, *packed;
    const float *bias, *from, *scale;
    float *sum;
} Finish;

// Rows `row` and `row + 1`. Those beyond the last are zero in `packed`, and what `grad` and `sum` hold there of a
// caller's workspace does not matter.
INLINE void finish_rows(int kind, const Finish *f, const float *c, long row, long rows, long n, long N) {
    __m512 v[4], slope[4], b0 = _mm512_setzero_ps(), b1 = b0;
    __m512i result[2];
    long at[2] = {row * N + n, row * N + N + n};
    if (f->bias) b0 = _mm512_loadu_ps(f->bias + n), b1 = _mm512_loadu_ps(f->bias + n + 16);
    for (int j = 0; j < 4; j++) v[j] = _mm512_load_ps(c + 16 * j);
    if (f->bias)
        for (int j = 0; j < 4; j++) v[j] = _mm512_add_ps(v[j], j & 1 ? b1 : b0);
    if (kind == GELU && f->grad)
        for (int r = 0; r < 2 && row + r < rows; r++) _mm512_storeu_si512(f->grad + at[r], two_to_half(v[2 * r], v[2 * r + 1]));
    if (kind == GELU) gelu(v, 0);
    if (kind == GELU_BOTH) gelu(v, slope);
    for (int r = 0; r < 2; r++) {
        __m512 low = v[2 * r], high = v[2 * r + 1];
        if (kind == ADD_F32) {
            _mm512_storeu_ps(f->sum + at[r], _mm512_add_ps(low, _mm512_loadu_ps(f->sum + at[r])));
            _mm512_storeu_ps(f->sum + at[r] + 16, _mm512_add_ps(high, _mm512_loadu_ps(f->sum + at[r] + 16)));
        } else if (kind == STORE_F32) {
            _mm512_storeu_ps(f->sum + at[r], low);
            _mm512_storeu_ps(f->sum + at[r] + 16, high);
        } else if (kind == ADD_TO) {
            if (row + r >= rows) break;
            __m512 s = _mm512_set1_ps(f->scale[row + r]);
            _mm512_storeu_ps(f->sum + at[r], _mm512_fmadd_ps(low, s, _mm512_loadu_ps(f->from + at[r])));
            _mm512_storeu_ps(f->sum + at[r] + 16, _mm512_fmadd_ps(high, s, _mm512_loadu_ps(f->from + at[r] + 16)));
        } else if (kind == STORE || kind == GELU) {
            if (row + r >= rows) break;
            _mm512_storeu_si512(f->out + at[r], two_to_half(low, high));
        } else if (kind == GELU_BOTH) {
            _mm512_storeu_si512(f->grad + at[r], two_to_half(slope[2 * r], slope[2 * r + 1]));
            result[r] = two_to_half(low, high);
        } else {
            low = _mm512_mul_ps(low, from_half(f->grad + at[r])), high = _mm512_mul_ps(high, from_half(f->grad + at[r] + 16));
            result[r] = two_to_half(low, high);
            _mm512_storeu_si512(f->grad + at[r], result[r]);
        }
    }
    if (kind != GELU_BOTH && kind != TIMES) return;
    for (int r = 0; r < 2; r++) result[r] = _mm512_maskz_mov_epi16(row + r < rows ? 0xffffffffu : 0, result[r]);
    __m512i low = _mm512_unpacklo_epi16(result[0], result[1]), high = _mm512_unpackhi_epi16(result[0], result[1]);
    long RB = UP(rows, 32) / 32;
    half *o = f->packed + (n / 16 * RB + row / 32) * 512 + row % 32 * 16;
    _mm512_storeu_si512(o, low);
    _mm512_storeu_si512(o + RB * 512, high);
    if (kind == TIMES) {  // in packing order
        _mm512_storeu_ps(f->sum + n, add_pairs(_mm512_loadu_ps(f->sum + n), low));
        _mm512_storeu_ps(f->sum + n + 16, add_pairs(_mm512_loadu_ps(f->sum + n + 16), high));
    }
}

#ifdef __AMX_BF16__
// x (rows, K) times packed weights -> (rows, N), by pieces of 32 x 32. The rows of one piece are finished between the
// tile instructions of the next, so that the vector units work while the tile unit does. Long products go in parts of
// K that fit the first-level cache; `c` holds the sums, max(N, 64) x 32.
static __attribute__((noinline)) void linear(int kind, long rows, long N, long K, const half *x, const half *w, float *c, Finish f) {
    long parts = K >= 512 && N > 32 ? (K + 255) / 256 : 1, KT = K / 32;
    const float *ready = 0;  // the piece to finish, at row and column:
    long ready_m = 0, ready_n = 0, ready_pairs = 0, turn = 0;
    for (long m = 0; m < rows; m += 32)
        for (long part = 0; part < parts; part++) {
            long from = KT * part / parts, steps = KT * (part + 1) / parts - from;
            for (long n = 0; n < N; n += 32) {
                float *o = c + (parts > 1 ? n * 32 : (turn++ & 1) * 1024);
                int two = rows - m > 16;
                const char *a = (const char *)(x + m * K + from * 32), *b = (const char *)(w + n * K + from * 512);
                __asm__ volatile("" ::: "memory");
                if (part) {
                    _tile_loadd(0, o, 128);
                    _tile_loadd(1, o + 16, 128);
                    if (two) _tile_loadd(2, o + 512, 128);
                    if (two) _tile_loadd(3, o + 528, 128);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                long done = 0, share = 0;
                for (long k = 0; k < steps; k++, a += 64, b += 1024) {
                    _tile_loadd(4, a, 2 * K);
                    _tile_loadd(6, b, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, b + 32 * K, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    if (two) {
                        _tile_loadd(5, a + 32 * K, 2 * K);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                    for (share += ready_pairs; share >= steps; share -= steps, done += 2)
                        finish_rows(kind, &f, ready + done * 32, ready_m + done, rows, ready_n, N);
                }
                _tile_stored(0, o, 128);
                _tile_stored(1, o + 16, 128);
                if (two) _tile_stored(2, o + 512, 128);
                if (two) _tile_stored(3, o + 528, 128);
                __asm__ volatile("" ::: "memory");
                ready = o, ready_m = m, ready_n = n, ready_pairs = part < parts - 1 ? 0 : kind == GELU_BOTH || kind == TIMES ? 16 : MIN(rows - m + 1, 32) / 2;
            }
        }
    for (long i = 0; i < 2 * ready_pairs; i += 2) finish_rows(kind, &f, ready + i * 32, ready_m + i, rows, ready_n, N);
}

// Gradient of weights: += a^T b for a (rows, M) and b (rows, N), packed, as 32 x 32 pieces of 4 KB, `ld` in
// a row of `out`.
static void accumulate(long rows, long M, long N, const half *a, const half *b, float *out, long ld, int add) {
    long RB = UP(rows, 32) / 32;
    for (long m = 0; m < M; m += 32, out += ld * 1024)
        for (long n = 0; n < N; n += 32)
            tile_mul(2, 2, RB, a + m * RB * 32, RB * 1024, 1024, 64, b + n * RB * 32, RB * 1024, out + n * 32, 128, add);
}

#else
// x (rows, K) times packed weights -> (rows, N), by pieces of 32 x 32. `c` holds the sums, max(N, 64) x 32.
static __attribute__((noinline)) void linear(int kind, long rows, long N, long K, const half *x, const half *w, float *c, Finish f) {
    long KT = K / 32, parts = (KT + DEEP - 1) / DEEP, last = kind == TIMES ? UP(rows, 32) : rows;
    for (long m = 0; m < rows; m += 32)
        for (long part = 0; part < parts; part++) {
            long from = KT * part / parts, steps = KT * (part + 1) / parts - from, panels = rows - m > 16 ? 2 : 1;
            for (long i = 0; i < panels; i++) make_panel(i, steps, x + (m + 16 * i) * K + from * 32, 64, 2 * K);
            for (long n = 0; n < N; n += 32) {
                float *o = c + (parts > 1 ? n * 32 : 0);
                two_tiles_mul(panels, steps, w + n * K + from * 512, 16 * K, o, 128, part > 0);
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
            long from = RB * part / parts, steps = RB * (part + 1) / parts - from;
            for (long i = 0; i < 2; i++) make_panel(i, steps, a + ((m / 16 + i) * RB + from) * 512, 1024, 64);
            for (long n = 0; n < N; n += 32)
                two_tiles_mul(2, steps, b + (n * RB / 16 + from) * 512, RB * 512, out + (m / 32 * ld + n / 32) * 1024, 128,
                              add || part > 0);
        }
}

// GELU_BOTH for a product that was kept: z (rows, N), rows `ld` apart.
static void gelu_again(long rows, long N, const half *z, long ld, Finish f) {
    float c[64] __attribute__((aligned(64)));
    for (long m = 0; m < UP(rows, 32); m += 2)
        for (long n = 0; n < N; n += 32) {
            for (int j = 0; j < 4; j++) _mm512_store_ps(c + 16 * j, from_half(z + MIN(m + j / 2, rows - 1) * ld + n + j % 2 * 16));
            finish_rows(GELU_BOTH, &f, c, m, rows, n, N);
        }
}
#endif

// Sum the pieces of all parts in order and write them, times `scale`, as a row-major matrix (M, N), or (N, M) when transposed.
static void unpack(const float *acc, long stride, long parts, long M, long N, int transposed, float scale, float *out, long from,
                   long to) {
    for (long piece = from; piece < to; piece++) {
        long m = piece / (N / 32) * 32, n = piece % (N / 32) * 32;
        __m512i low[32], high[32];
        for (int r = 0; r < 32; r++) {
            const float *s = acc + piece * 1024 + position(r) * 32;
            __m512 l = _mm512_loadu_ps(s), h = _mm512_loadu_ps(s + 16);
            for (long p = 1; p < parts; p++) {
                l = _mm512_add_ps(l, _mm512_loadu_ps(s + p * stride));
                h = _mm512_add_ps(h, _mm512_loadu_ps(s + p * stride + 16));
            }
            l = _mm512_mul_ps(l, _mm512_set1_ps(scale)), h = _mm512_mul_ps(h, _mm512_set1_ps(scale));
            in_order(&l, &h);
            if (!transposed) {
                _mm512_storeu_ps(out + (m + r) * N + n, l);
                _mm512_storeu_ps(out + (m + r) * N + n + 16, h);
            } else low[r] = _mm512_castps_si512(l), high[r] = _mm512_castps_si512(h);
        }
        if (!transposed) continue;
        for (int side = 0; side < 2; side++) {
            transpose(low + 16 * side);
            transpose(high + 16 * side);
            for (int i = 0; i < 16; i++) {
                _mm512_storeu_si512(out + (n + i) * M + m + 16 * side, low[16 * side + i]);
                _mm512_storeu_si512(out + (n + 16 + i) * M + m + 16 * side, high[16 * side + i]);
            }
        }
    }
}

// --------------------------------------------------------------------------------------------------------- norms

INLINE void norm_row(const float *x, long D, float eps, const float *w, const float *b, half *out, float *stats) {
    // One pass over deviations from the first element, which is near enough to the mean for the difference below.
    __m512 first = _mm512_set1_ps(x[0]), sum[2] = {0}, square[2] = {0};
    for (long i = 0; i < D; i += 32)  // D is a multiple of 32
        for (int j = 0; j < 2; j++) {
            __m512 v = _mm512_sub_ps(_mm512_loadu_ps(x + i + 16 * j), first);
            sum[j] = _mm512_add_ps(sum[j], v);
            square[j] = _mm512_fmadd_ps(v, v, square[j]);
        }
    float shift = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / D;
    float var = _mm512_reduce_add_ps(_mm512_add_ps(square[0], square[1])) / D - shift * shift;
    float inverse = 1.0f / sqrtf((var > 0 ? var : 0) + eps);
    __m512 mean = _mm512_set1_ps(x[0] + shift);
    __m512 r = _mm512_set1_ps(inverse);
    for (long i = 0; i < D; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), r);
        to_half(out + i, _mm512_fmadd_ps(v, _mm512_loadu_ps(w + i), _mm512_loadu_ps(b + i)));
    }
    stats[0] = _mm512_cvtss_f32(mean), stats[1] = inverse;
}

// out = scale (scale_other other + the gradient through the norm of row x), given g, that of its result; adds to dw, db.
INLINE void norm_row_grad(const float *g, const float *x, long D, const float *stats, const float *w, float *dw,
                          float *db, float scale_other, const float *other, float scale, float *out) {
    __m512 mean = _mm512_set1_ps(stats[0]), r = _mm512_set1_ps(stats[1]), sum = _mm512_setzero_ps(), dot = sum;
    for (long i = 0; i < D; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), r), d = _mm512_loadu_ps(g + i);
        _mm512_storeu_ps(db + i, _mm512_add_ps(_mm512_loadu_ps(db + i), d));
        _mm512_storeu_ps(dw + i, _mm512_fmadd_ps(d, v, _mm512_loadu_ps(dw + i)));
        d = _mm512_mul_ps(d, _mm512_loadu_ps(w + i));
        sum = _mm512_add_ps(sum, d);
        dot = _mm512_fmadd_ps(d, v, dot);
    }
    __m512 a = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D), b = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / D);
    for (long i = 0; i < D; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), r);
        __m512 d = _mm512_fmsub_ps(_mm512_loadu_ps(g + i), _mm512_loadu_ps(w + i), _mm512_fmadd_ps(v, b, a));
        __m512 o = other ? _mm512_mul_ps(_mm512_set1_ps(scale_other), _mm512_loadu_ps(other + i)) : _mm512_setzero_ps();
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_fmadd_ps(d, r, o)));
    }
}

// ------------------------------------------------------------------------------------------------- one thread's work

typedef struct {
    long n, R, Q, Lk, Tp, dk;  // samples of a chunk; rows in and out; L to 32, T to 16, head width to 32
    half *xn1, *qkv, *ao, *xn2, *a, *da, *g, *dqkv, *left, *left2, *right, *p, *heads[4];
    float *x1, *dx1, *dxn, *s, *o, *c, *stats1, *stats2, *scale1, *scale2;
    float *vectors, *qkvw, *projw, *fc1w, *fc2w;  // sums of gradients
    long matrices;                                // how many floats the four last hold together
    float up, down;                               // see range_scale
} Work;

static long vector_count(const Block *p) { return 9 * p->D + p->F; }  // norm1 2, qkv 3, proj 1, norm2 2, fc2 1; fc1

// Lay out a thread's workspace from `base` on; returns its size in bytes.
static size_t layout(const Block *p, Work *w, char *base, int backward) {
    size_t used = 0;
    long D = p->D, F = p->F, d = D / p->H;
    w->n = p->rows / p->L > 0 ? p->rows / p->L : 1;
    w->n = MIN(w->n, p->B);
    w->R = w->n * p->L, w->Q = w->n * p->T;
    w->Lk = UP(p->L, 32), w->Tp = UP(p->T, 32), w->dk = UP(d, 32);
    long R = UP(w->R, 32) + 32, Q = UP(w->Q, 32) + 32;
#define TAKE(field, count) (w->field = (void *)(base + used), used += UP((count) * sizeof(*w->field), 64))
    size_t first = used;
    TAKE(xn1, R * D);
    TAKE(qkv, (R + w->Lk) * 3 * D);  // heads are read in whole tiles, beyond the last row
    if (!backward && used < first + 2 * Q * F) used = first + UP(2 * Q * F, 64);
    TAKE(ao, (Q + w->Lk) * D);
    TAKE(x1, Q * D);
    TAKE(xn2, Q * D);
    if (backward) TAKE(a, Q * MIN(SLICE, F));
    else w->a = (void *)(base + first);  // in place of what is no longer needed then
    TAKE(p, w->Tp * w->Lk);
    TAKE(s, w->Tp * w->Lk);
    TAKE(o, w->Lk * w->dk);
    TAKE(c, 32 * (3 * D > F ? 3 * D : F));  // D is 32 at least
    for (int i = 0; i < 4; i++) TAKE(heads[i], w->Lk * (i < 2 ? w->dk : w->Tp > w->dk ? w->Tp : w->dk));
    TAKE(stats1, 2 * R);
    TAKE(stats2, 2 * Q);
    TAKE(scale1, Q);
    TAKE(scale2, Q);
    if (backward) {
        TAKE(da, Q * MIN(SLICE, F));
        TAKE(g, (Q + w->Lk) * D);
        TAKE(dx1, Q * D);
        TAKE(dxn, R * D);
        TAKE(dqkv, R * 3 * D);
        TAKE(left, R * D);
        TAKE(left2, Q * D);
        TAKE(right, R * (3 * D > SLICE ? 3 * D : SLICE));
        TAKE(vectors, vector_count(p));
        TAKE(qkvw, 3 * D * D);
        TAKE(projw, D * D);
        TAKE(fc1w, D * F);
        TAKE(fc2w, D * F);
        w->matrices = 4 * D * D + 2 * D * F;
    }
#undef TAKE
    return UP(used, 4096) + 192;  // not a multiple of the cache's period
}

int64_t block_workspace(const Block *p, int64_t backward) {
    Work w;
    size_t weights = UP(2 * (4 * p->D * p->D + 2 * p->D * p->F), 4096);
    return p->threads * layout(p, &w, 0, backward) + (backward ? weights : 0) + 4096;
}

// What is kept, one after the other: attention's probabilities (B, H, T, L to 32) and results (B, T, D); q, k, v
// (B, L, 3 D) and the product that goes into GELU (B, T, F). Each with room behind it, for whole tiles are read.
INLINE half *kept_prob(const Block *p, const Work *w, long s) { return p->kept + s * p->H * p->T * w->Lk; }
INLINE half *kept_ao(const Block *p, const Work *w, long s) {
    return kept_prob(p, w, p->B) + 32 * w->Lk + s * p->T * p->D;
}
INLINE half *kept_qkv(const Block *p, const Work *w, long s) {
    return kept_ao(p, w, p->B) + 32 * p->D + s * p->L * 3 * p->D;
}
INLINE half *kept_z(const Block *p, const Work *w, long s) {
    return kept_qkv(p, w, p->B) + w->Lk * 3 * p->D + s * p->T * p->F;
}
int64_t block_kept(const Block *p) {  // how many numbers
    Work w = {.Lk = UP(p->L, 32)};
    Block none = *p;
    none.kept = 0;
    return (KEEP_MORE ? kept_z(&none, &w, p->B) : kept_qkv(&none, &w, 0)) - (half *)0;
}

// softmax(q k^T / sqrt(d)) into `prob` (T, Lk), then o = prob v. q: the last T tokens of one sample's head.
static void attend(const Block *p, Work *w, const half *q, const half *k, const half *v, half *prob, half *out) {
    long L = p->L, T = p->T, D = p->D, d = D / p->H, ld = 3 * D, Lk = w->Lk, dk = w->dk, lt = UP(L, 16) / 16;
    pack_columns(k, ld, L, d, w->heads[0]);
    pack_right(v, ld, L, d, w->heads[1], 0);
    mul(UP(T, 16) / 16, lt, dk / 32, q, 32 * ld, 64, 2 * ld, w->heads[0], w->s, 4 * Lk);
    __m512 scale = _mm512_set1_ps(1.44269504f / sqrtf(d));
    __mmask16 last = L % 16 ? (1u << L % 16) - 1 : 0xffff;
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    for (long t = 0; t < T; t++) {
        float *s = w->s + t * Lk;
        half *o = prob + t * Lk;
        __m512 top = lowest, sum = _mm512_setzero_ps();
        _mm512_store_ps(s + (lt - 1) * 16, _mm512_mask_mov_ps(lowest, last, _mm512_load_ps(s + (lt - 1) * 16)));
        for (long i = 0; i < lt; i++) top = _mm512_max_ps(top, _mm512_load_ps(s + i * 16));
        top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(top)), scale);
        for (long i = 0; i < lt; i++) {
            __m512 e = exp2_(_mm512_fmsub_ps(_mm512_load_ps(s + i * 16), scale, top));
            sum = _mm512_add_ps(sum, e);
            _mm512_store_ps(s + i * 16, e);
        }
        __m512 r = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
        for (long i = 0; i < lt; i++) to_half(o + i * 16, _mm512_mul_ps(_mm512_load_ps(s + i * 16), r));
        if (lt * 16 < Lk) _mm256_storeu_si256((void *)(o + lt * 16), _mm256_setzero_si256());
    }
    mul(UP(T, 16) / 16, dk / 16, Lk / 32, prob, 32 * Lk, 64, 2 * Lk, w->heads[1], w->o, 4 * dk);
    for (long c = 0; c < d; c += 32) {
        __mmask32 mask = d - c >= 32 ? 0xffffffffu : 0xffffu;
        for (long t = 0; t < T; t++) {
            __m512 low = _mm512_load_ps(w->o + t * dk + c), high = _mm512_load_ps(w->o + t * dk + c + 16);
            in_order(&low, &high);
            _mm512_mask_storeu_epi16(out + t * D + c, mask, two_to_half(low, high));
        }
    }
}

// Write rows of w->o (n, d), whose columns (and rows, if `both`) are in packing order, as halves.
static void write_head(const Work *w, long n, long d, int both, half *out, long ld) {
    for (long c = 0; c < d; c += 32) {
        __mmask32 mask = d - c >= 32 ? 0xffffffffu : 0xffffu;
        for (long t = 0; t < n; t++) {
            const float *row = w->o + (both ? position(t) : t) * w->dk + c;
            __m512 low = _mm512_load_ps(row), high = _mm512_load_ps(row + 16);
            in_order(&low, &high);
            _mm512_mask_storeu_epi16(out + t * ld + c, mask, two_to_half(low, high));
        }
    }
}

static void attend_grad(const Block *p, Work *w, const half *q, const half *k, const half *v, const half *prob,
                        const half *g, half *dq, half *dk_, half *dv) {
    long L = p->L, T = p->T, D = p->D, d = D / p->H, ld = 3 * D, Lk = w->Lk, dk = w->dk, lt = UP(L, 16) / 16;
    long tt = UP(T, 16) / 16, tb = UP(T, 32) / 32;
    half *turned = w->heads[2], *right = w->heads[3], *ds = w->p;
    // dv = prob^T g
    pack_left(prob, Lk, T, Lk, turned, 0);
    pack_right(g, D, T, d, right, 0);
    mul(Lk / 16, dk / 16, tb, turned, tb * 1024, 1024, 64, right, w->o, 4 * dk);
    write_head(w, L, d, 1, dv, ld);
    // ds = prob (g v^T - sum) / sqrt(d)
    pack_columns(v, ld, L, d, w->heads[0]);
    mul(tt, lt, dk / 32, g, 32 * D, 64, 2 * D, w->heads[0], w->s, 4 * Lk);
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(d));
    for (long t = 0; t < T; t++) {
        const float *s = w->s + t * Lk;
        const half *from = prob + t * Lk;
        half *o = ds + t * Lk;
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < lt; i++) sum = _mm512_fmadd_ps(_mm512_load_ps(s + i * 16), from_half(from + i * 16), sum);
        sum = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (long i = 0; i < lt; i++) {
            __m512 e = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s + i * 16), sum), from_half(from + i * 16));
            to_half(o + i * 16, _mm512_mul_ps(e, scale));
        }
        if (lt * 16 < Lk) _mm256_storeu_si256((void *)(o + lt * 16), _mm256_setzero_si256());
    }
    // dq = ds k
    pack_right(k, ld, L, d, w->heads[1], 0);
    mul(tt, dk / 16, Lk / 32, ds, 32 * Lk, 64, 2 * Lk, w->heads[1], w->o, 4 * dk);
    write_head(w, T, d, 0, dq, ld);
    // dk = ds^T q
    pack_left(ds, Lk, T, Lk, turned, 0);
    pack_right(q, ld, T, d, right, 0);
    mul(Lk / 16, dk / 16, tb, turned, tb * 1024, 1024, 64, right, w->o, 4 * dk);
    write_head(w, L, d, 1, dk_, ld);
}

// Samples [s0, s0 + n) through the block. With `backward`, take what is kept and compute the rest up to fc1 again.
static void forward_chunk(const Block *p, Work *w, long s0, long n, int backward) {
    long L = p->L, T = p->T, D = p->D, F = p->F, H = p->H, d = D / H, R = n * L, Q = n * T;
    const half *qkvw = p->packed, *projw = qkvw + 3 * D * D, *fc1w = projw + D * D, *fc2w = fc1w + D * F;
    for (long s = 0; s < n; s++)
        for (long t = 0; t < L; t++) {
            const float *x = p->x + ((s0 + s) * L + t) * D;
            norm_row(x, D, p->eps, p->n1w, p->n1b, w->xn1 + (s * L + t) * D, w->stats1 + 2 * (s * L + t));
            long q = s * T + t - (L - T);
            if (t < L - T) continue;
            memcpy(w->x1 + q * D, x, D * sizeof(float));
            w->scale1[q] = p->scale1 ? p->scale1[s0 + s] : 1.0f;
            w->scale2[q] = p->scale2 ? p->scale2[s0 + s] : 1.0f;
        }
    int more = KEEP_MORE && p->kept;
    if (more) w->qkv = kept_qkv(p, w, s0);
    if (!more || !backward) linear(STORE, R, 3 * D, D, w->xn1, qkvw, w->c, (Finish){.out = w->qkv, .bias = p->qkvb});
    half *prob = p->kept ? kept_prob(p, w, s0) : w->p, *ao = p->kept ? kept_ao(p, w, s0) : w->ao;
    for (long s = 0; s < n && !backward; s++)
        for (long h = 0; h < H; h++) {
            const half *k = w->qkv + s * L * 3 * D + D + h * d;
            attend(p, w, k - D + (L - T) * 3 * D, k, k + D, p->kept ? prob + (s * H + h) * T * w->Lk : prob,
                   ao + s * T * D + h * d);
        }
    linear(ADD_TO, Q, D, D, ao, projw, w->c, (Finish){.sum = w->x1, .from = w->x1, .bias = p->projb, .scale = w->scale1});
    for (long q = 0; q < Q; q++)
        norm_row(w->x1 + q * D, D, p->eps, p->n2w, p->n2b, w->xn2 + q * D, w->stats2 + 2 * q);
    if (backward) return;
    Finish hidden = {.out = w->a, .bias = p->fc1b, .grad = more ? kept_z(p, w, s0) : 0};
    linear(GELU, Q, F, D, w->xn2, fc1w, w->c, hidden);
    Finish last = {.sum = p->y + s0 * T * D, .from = w->x1, .bias = p->fc2b, .scale = w->scale2};
    linear(ADD_TO, Q, D, F, w->a, fc2w, w->c, last);
}

// g = times scale[row] d as halves
static void scaled(const float *d, const float *scale, float times, long rows, long D, half *g) {
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < D; i += 16)
            to_half(g + r * D + i, _mm512_mul_ps(_mm512_set1_ps(times * scale[r]), _mm512_loadu_ps(d + r * D + i)));
}

// On the way back every gradient of a block is carried as a multiple of itself by a power of two, which keeps it in the
// range of half precision (6e-5 to 65504): the largest of dy lands in [8, 16). bfloat16 has float32's range.
static float range_scale(const float *dy, long count) {
#ifdef FP16
    __m512 top = _mm512_setzero_ps();
    for (long i = 0; i < count; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(dy + i)));
    float largest = _mm512_reduce_max_ps(top);
    int power = largest > 0 && isfinite(largest) ? 3 - ilogbf(largest) : 0;
    return ldexpf(1.0f, MIN(power, 120));
#else
    return 1.0f;
#endif
}

// `packed`: the weights for the way back. `add`: the sums of weight gradients hold something already.
static void backward_chunk(const Block *p, Work *w, const half *packed, long s0, long n, int add) {
    long L = p->L, T = p->T, D = p->D, F = p->F, H = p->H, d = D / H, R = n * L, Q = n * T;
    const half *qkvw = packed, *projw = qkvw + 3 * D * D, *fc1w = projw + D * D, *fc2w = fc1w + D * F;
    const float *dy = p->dy + s0 * T * D;
    float *n1w = w->vectors, *n1b = n1w + D, *qkvb = n1b + D, *projb = qkvb + 3 * D, *n2w = projb + D, *n2b = n2w + D,
          *fc1b = n2b + D, *fc2b = fc1b + F;
    forward_chunk(p, w, s0, n, 1);

    scaled(dy, w->scale2, w->up, Q, D, w->g);
    if (p->need_weights) {
        pack_left(w->g, D, Q, D, w->left, fc2b);
        pack_left(w->xn2, D, Q, D, w->left2, 0);
    }
    for (long f = 0; f < F; f += SLICE) {
        long N = MIN(SLICE, F - f);
        Finish both = {.packed = w->a, .grad = w->da, .bias = KEEP_MORE ? 0 : p->fc1b + f};
#ifdef __AMX_BF16__
        linear(GELU_BOTH, Q, N, D, w->xn2, p->packed + (4 * D + f) * D, w->c, both);
#else
        gelu_again(Q, N, kept_z(p, w, s0) + f, F, both);
#endif
        linear(TIMES, Q, N, D, w->g, fc2w + f * D, w->c, (Finish){.grad = w->da, .packed = w->right, .sum = fc1b + f});
        if (p->need_weights) {
            accumulate(Q, D, N, w->left, w->a, w->fc2w + f * 32, F / 32, add);
            accumulate(Q, D, N, w->left2, w->right, w->fc1w + f * 32, F / 32, add);
        }
        linear(f ? ADD_F32 : STORE_F32, Q, D, N, w->da, fc1w + f * D, w->c, (Finish){.sum = w->dxn});
    }
    for (long q = 0; q < Q; q++)
        norm_row_grad(w->dxn + q * D, w->x1 + q * D, D, w->stats2 + 2 * q, p->n2w, n2w, n2b, w->up, dy + q * D, 1.0f,
                      w->dx1 + q * D);

    scaled(w->dx1, w->scale1, 1.0f, Q, D, w->g);
    if (p->need_weights) {
        pack_left(w->g, D, Q, D, w->left, projb);
        pack_right(kept_ao(p, w, s0), D, Q, D, w->right, 0);
        accumulate(Q, D, D, w->left, w->right, w->projw, D / 32, add);
    }
    linear(STORE, Q, D, D, w->g, projw, w->c, (Finish){.out = w->ao});  // its gradient
    memset(w->ao + Q * D, 0, 32 * sizeof(half));  // a head of 16 columns reads so far beyond the last row: 0 * NaN is NaN
    for (long s = 0; s < n; s++)
        for (long h = 0; h < H; h++) {
            const half *k = w->qkv + s * L * 3 * D + D + h * d;
            half *dk = w->dqkv + s * L * 3 * D + D + h * d;
            for (long t = 0; t < L - T; t++) memset(dk - D + t * 3 * D, 0, d * sizeof(half));
            attend_grad(p, w, k - D + (L - T) * 3 * D, k, k + D, kept_prob(p, w, s0) + (s * H + h) * T * w->Lk,
                        w->ao + s * T * D + h * d, dk - D + (L - T) * 3 * D, dk, dk + D);
        }
    if (p->need_weights) {
        pack_left(w->xn1, D, R, D, w->left, 0);
        pack_right(w->dqkv, 3 * D, R, 3 * D, w->right, qkvb);
        accumulate(R, D, 3 * D, w->left, w->right, w->qkvw, 3 * D / 32, add);
    }
    linear(STORE_F32, R, D, 3 * D, w->dqkv, qkvw, w->c, (Finish){.sum = w->dxn});
    for (long s = 0; s < n; s++)
        for (long t = 0; t < L; t++) {
            long r = s * L + t, q = s * T + t - (L - T), at = ((s0 + s) * L + t) * D;
            norm_row_grad(w->dxn + r * D, p->x + at, D, w->stats1 + 2 * r, p->n1w, n1w, n1b, 1.0f,
                          t < L - T ? 0 : w->dx1 + q * D, w->down, p->dx + at);
        }
}

// Share `part` of `parts` of packing all four matrices.
static void pack_block(const Block *p, half *out, int backward, long part, long parts) {
    const float *w[] = {p->qkvw, p->projw, p->fc1w, p->fc2w};
    long D = p->D, F = p->F, N[] = {3 * D, D, F, D}, K[] = {D, D, D, F};
    for (int i = 0; i < 4; out += N[i] * K[i], i++) {
        long groups = (backward ? K[i] : N[i]) / 32, step = backward && i == 2 ? SLICE : N[i];
        for (long f = 0; f < N[i]; f += step)
            pack_weight(w[i] + f * K[i], MIN(step, N[i] - f), K[i], out + f * K[i], backward, groups * part / parts,
                        groups * (part + 1) / parts);
    }
}

void block_forward(const Block *p) {
    long parts = p->threads;
#pragma omp parallel num_threads(parts)
#pragma omp for schedule(static, 1)
    for (long part = 0; part < parts; part++) pack_block(p, p->packed, 0, part, parts);
#pragma omp parallel num_threads(parts)
#pragma omp for schedule(static, 1)
    for (long part = 0; part < parts; part++) {
        Work w;
        size_t size = layout(p, &w, 0, 0);
        layout(p, &w, (char *)UP((uintptr_t)p->work, 64) + part * size, 0);
        tiles_on();
        long end = p->B * (part + 1) / parts;
        for (long s = p->B * part / parts; s < end; s += w.n) forward_chunk(p, &w, s, MIN(w.n, end - s), 0);
        tiles_off();
    }
}

void block_backward(const Block *p) {
    long D = p->D, F = p->F, parts = p->threads;
    half *packed = (half *)UP((uintptr_t)p->work, 64);
    char *base = (char *)packed + UP(2 * (4 * D * D + 2 * D * F), 4096);
    Work first;
    size_t size = layout(p, &first, 0, 1);
    layout(p, &first, base, 1);
    float up = range_scale(p->dy, p->B * p->T * D), down = 1.0f / up;
#pragma omp parallel num_threads(parts)
#pragma omp for schedule(static, 1)
    for (long part = 0; part < parts; part++) pack_block(p, packed, 1, part, parts);
#pragma omp parallel num_threads(parts)
#pragma omp for schedule(static, 1)
    for (long part = 0; part < parts; part++) {
        Work w;
        layout(p, &w, base + part * size, 1);
        w.up = up, w.down = down;
        memset(w.vectors, 0, vector_count(p) * sizeof(float));
        tiles_on();
        long begin = p->B * part / parts, end = p->B * (part + 1) / parts;
        for (long s = begin; s < end; s += w.n) backward_chunk(p, &w, packed, s, MIN(w.n, end - s), s > begin);
        tiles_off();
    }
    long count = vector_count(p), stride = size / sizeof(float), fc1b = 8 * D;
    for (long i = 0; i < count; i++) {
        long from = i >= fc1b && i < fc1b + F ? fc1b + position(i - fc1b) : i;  // fc1's are in packing order
        float sum = first.vectors[from];
        for (long part = 1; part < parts; part++) sum += first.vectors[from + part * stride];
        p->grads[i] = down * sum;
    }
    if (!p->need_weights) return;
    struct { float *acc; long M, N; int transposed; } m[] = {
        {first.qkvw, D, 3 * D, 1}, {first.projw, D, D, 0}, {first.fc1w, D, F, 1}, {first.fc2w, D, F, 0}};
#pragma omp parallel num_threads(parts)
#pragma omp for schedule(static, 1)
    for (long part = 0; part < parts; part++) {
        float *out = p->grads + count;
        for (int i = 0; i < 4; out += m[i].M * m[i].N, i++) {
            long pieces = m[i].M * m[i].N / 1024;
            unpack(m[i].acc, stride, parts, m[i].M, m[i].N, m[i].transposed, down, out, pieces * part / parts,
                   pieces * (part + 1) / parts);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- Muon

typedef struct {
    float *weight, *momentum;
    const float *grad;
    int64_t rows, cols;  // multiples of 32
    float lr, decay;     // of this matrix, adjusted for its shape; decay is already multiplied by the rate
} Matrix;

typedef struct { half *x, *gram, *left, *right; float *c; } MuonWork;

static size_t muon_layout(long m, long n, char *base, MuonWork *w) {
    w->x = (void *)base;
    w->left = w->x + m * n;
    w->right = w->left + m * n;
    w->gram = w->right + m * n;
    w->c = (float *)(w->gram + m * m);
    return UP(10 * m * n + 2 * m * m, 4096) + 192;
}

int64_t muon_workspace(int64_t shortest, int64_t longest, int64_t threads) {
    MuonWork w;
    return threads * muon_layout(shortest, longest, 0, &w) + 4096;
}

// Five Newton-Schulz steps of Muon (Jordan et al. 2024) on x (rows, cols): x = a x + (b G + c G G) x with G = x x^T, or
// from the other side where x is tall.
static void orthogonalize(long rows, long cols, const MuonWork *w, const float *abc) {
    __m512 ka = _mm512_set1_ps(abc[0]), kb = _mm512_set1_ps(abc[1]), kc = _mm512_set1_ps(abc[2]);
    half *x = w->x, *gram = w->gram;
    float *c = w->c;
    int tall = rows > cols;
    long m = tall ? cols : rows;
    for (int step = 0; step < 5; step++) {
        if (tall) {
            pack_left(x, cols, rows, cols, w->left, 0);
            pack_right(x, cols, rows, cols, w->right, 0);
            mul(m / 16, m / 16, rows / 32, w->left, rows * 32, 1024, 64, w->right, c, 4 * m);
        } else {
            pack_columns(x, cols, rows, cols, w->right);
            mul(m / 16, m / 16, cols / 32, x, 32 * cols, 64, 2 * cols, w->right, c, 4 * m);
        }
        for (long i = 0; i < m; i++)
            for (long j = 0; j < m; j += 32) {
                const float *s = c + (tall ? position(i) : i) * m + j;
                __m512 low = _mm512_loadu_ps(s), high = _mm512_loadu_ps(s + 16);
                if (tall) in_order(&low, &high);
                _mm512_storeu_si512(gram + i * m + j, two_to_half(low, high));
            }
        pack_columns(gram, m, m, m, w->right);  // symmetric: as good as its rows
        mul(m / 16, m / 16, m / 32, gram, 32 * m, 64, 2 * m, w->right, c, 4 * m);
        for (long i = 0; i < m * m; i += 16)
            to_half(gram + i, _mm512_fmadd_ps(kc, _mm512_loadu_ps(c + i), _mm512_mul_ps(kb, from_half(gram + i))));
        if (tall) {
            pack_columns(gram, m, m, m, w->right);
            mul(rows / 16, m / 16, m / 32, x, 32 * m, 64, 2 * m, w->right, c, 4 * m);
        } else {
            pack_right(x, cols, rows, cols, w->right, 0);
            mul(m / 16, cols / 16, m / 32, gram, 32 * m, 64, 2 * m, w->right, c, 4 * cols);
        }
        for (long i = 0; i < rows * cols; i += 32) {
            __m512 low = _mm512_loadu_ps(c + i), high = _mm512_loadu_ps(c + i + 16);
            if (!tall) in_order(&low, &high);
            low = _mm512_fmadd_ps(ka, from_half(x + i), low), high = _mm512_fmadd_ps(ka, from_half(x + i + 16), high);
            _mm512_storeu_si512(x + i, two_to_half(low, high));
        }
    }
}

// One step of Muon with Nesterov momentum for every matrix; a thread takes one matrix at a time.
void muon(const Matrix *all, int64_t count, float momentum, const float *abc, char *work, int64_t stride, int64_t threads) {
    work = (char *)UP((uintptr_t)work, 64);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long j = 0; j < count; j++) {
        const Matrix *p = all + j;
        long size = p->rows * p->cols, m = MIN(p->rows, p->cols);
        MuonWork w;
        muon_layout(m, size / m, work + omp_get_thread_num() * stride, &w);
        __m512 keep = _mm512_set1_ps(momentum), square = _mm512_setzero_ps();
        for (long i = 0; i < size; i += 16) {
            __m512 g = _mm512_loadu_ps(p->grad + i), b = _mm512_loadu_ps(p->momentum + i);
            b = _mm512_fmadd_ps(_mm512_sub_ps(b, g), keep, g);
            _mm512_storeu_ps(p->momentum + i, b);
            g = _mm512_fmadd_ps(_mm512_sub_ps(b, g), keep, g);
            square = _mm512_fmadd_ps(g, g, square);
        }
        float norm = sqrtf(_mm512_reduce_add_ps(square));
        __m512 scale = _mm512_set1_ps(1.0f / (norm > 1e-7f ? norm : 1e-7f));
        for (long i = 0; i < size; i += 16) {
            __m512 g = _mm512_loadu_ps(p->grad + i), b = _mm512_loadu_ps(p->momentum + i);
            to_half(w.x + i, _mm512_mul_ps(_mm512_fmadd_ps(_mm512_sub_ps(b, g), keep, g), scale));
        }
        tiles_on();
        orthogonalize(p->rows, p->cols, &w, abc);
        tiles_off();
        for (long i = 0; i < size; i += 16) {
            __m512 v = _mm512_mul_ps(_mm512_loadu_ps(p->weight + i), _mm512_set1_ps(1.0f - p->decay));
            _mm512_storeu_ps(p->weight + i, _mm512_fnmadd_ps(from_half(w.x + i), _mm512_set1_ps(p->lr), v));
        }
    }
}

// Whether the system hands out tiles, where they are used. Asking changes nothing.
int64_t granted(void) {
#ifdef __AMX_BF16__
    uint64_t features = 0;
    return syscall(SYS_arch_prctl, 0x1021, &features) == 0 && features >> 18 & 1;
#else
    return 1;
#endif
}

// Ask the system for the use of tiles, where they are used; 0 when they are there. Have malloc keep what is freed:
// otherwise every large tensor of every step is mapped, faulted in page by page and unmapped again.
int64_t start(void) {
    make_tables();
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_TRIM_THRESHOLD, INT32_MAX);
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023, 18);
#else
    return 0;
#endif
}
