// Vectors as wide as the processor's: LANES numbers. All other files are written in the words of this one.
//
// V holds float32. Numbers of 16 bits ("halves") are bfloat16, or IEEE half precision under FP16; I holds them in pairs, two
// in each 32 bits, the first in the lower ones. Each instruction set gives the words at the end of this file.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16L
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8L
#else
#define LANES 4L
#endif
#if defined(__aarch64__) && !defined(PORTABLE)
#include <arm_neon.h>
#define NEON
#endif

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define UP(n, m) (((n) + (m) - 1) / (m) * (m))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define UNROLL _Pragma("GCC unroll 16")

enum { PARTS = 16 / LANES, ROW = 32 / LANES };  // vectors that hold 16 and 32 numbers
typedef uint16_t half;
typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t I __attribute__((vector_size(4 * LANES)));

INLINE V load(const float *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, V v) { memcpy(p, &v, sizeof v); }
INLINE I load_pairs(const void *p) {
    I v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_pairs(void *p, I v) { memcpy(p, &v, sizeof v); }
INLINE V splat(float x) { return x - (V){0}; }

// The first n numbers of v, and `rest` beyond: all of it where n is negative.
INLINE V first_n(V v, long n, float rest) {
    I index;
    for (int i = 0; i < LANES; i++) index[i] = i;
    I keep = (I)(index < (uint32_t)(n > 0 ? n : 0));
    return (V)(((I)v & keep) | ((I)splat(rest) & ~keep));
}

// What an instruction set gives:
INLINE V muladd(V a, V b, V c);      // a b + c, rounded once where the processor can
INLINE void add_row(V sum[PARTS], const float *left, const V right[PARTS]);  // sum += left right
INLINE V larger(V a, V b);
INLINE V smaller(V a, V b);
INLINE float sum_of(V v);
INLINE float largest_of(V v);
INLINE V from_half(const half *p);   // LANES of them
INLINE void to_half(half *p, V v);   // to the nearest, ties to even
INLINE I pack(V low, V high);        // the same of 2 LANES numbers, in order
INLINE V first_of(I pairs);
INLINE V second_of(I pairs);
INLINE I zip_low(I a, I b);          // pairs (a0, b0), (a1, b1), (a2, b2), (a3, b3) of each 128 bits
INLINE I zip_high(I a, I b);         // the other four of each 128 bits
INLINE void zip(const I a[PARTS], const I b[PARTS], I out[2 * PARTS]);  // pairs of all 32 halves, in order
INLINE I load_halves(const half *p, long n);                            // the first n, zeros beyond; n a multiple of 16
INLINE void in_order(const float *low, const float *high, V out[ROW]);  // rows of two zipped tiles -> 32 columns in order
INLINE void square(I r[LANES]);                                         // transposes LANES x LANES elements of 32 bits

INLINE V add_pairs(V sum, I pairs) { return sum + first_of(pairs) + second_of(pairs); }

// A tile is 16 x 16 elements of 32 bits: row i in t[i PARTS] and what follows.
INLINE void transpose(I t[16 * PARTS]) {
    UNROLL
    for (int i = 0; i < PARTS; i++)
        UNROLL
        for (int j = i; j < PARTS; j++) {
            I a[LANES], b[LANES];
            UNROLL
            for (int k = 0; k < LANES; k++) a[k] = t[(i * LANES + k) * PARTS + j], b[k] = t[(j * LANES + k) * PARTS + i];
            square(a);
            if (i != j) square(b);
            UNROLL
            for (int k = 0; k < LANES; k++) {
                if (i != j) t[(i * LANES + k) * PARTS + j] = b[k];
                t[(j * LANES + k) * PARTS + i] = a[k];
            }
        }
}

// ------------------------------------------------------------------------------------------------------- AVX-512

#if LANES == 16
INLINE V muladd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE void add_row(V sum[1], const float *left, const V right[1]) { *sum = muladd(splat(*left), *right, *sum); }
INLINE V larger(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V smaller(V a, V b) { return _mm512_min_ps(a, b); }
INLINE float sum_of(V v) { return _mm512_reduce_add_ps(v); }
INLINE float largest_of(V v) { return _mm512_reduce_max_ps(v); }
INLINE I joined(__m256i low, __m256i high) { return (I)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
#ifdef FP16
INLINE __m256i halves_of(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE I pack(V low, V high) { return joined(halves_of(low), halves_of(high)); }
INLINE V from_half(const half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE V first_of(I pairs) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)pairs)); }
INLINE V second_of(I pairs) { return first_of(pairs >> 16); }
#else
#ifdef __AVX512BF16__
INLINE __m256i halves_of(V v) { return (__m256i)_mm512_cvtneps_pbh(v); }
INLINE I pack(V low, V high) { return (I)_mm512_cvtne2ps_pbh(high, low); }
#else
INLINE __m256i halves_of(V v) {
    I bits = (I)v;
    return _mm512_cvtepi32_epi16((__m512i)((bits + (bits >> 16 & 1) + 0x7fff) >> 16));
}
INLINE I pack(V low, V high) { return joined(halves_of(low), halves_of(high)); }
#endif
INLINE V from_half(const half *p) { return (V)((I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)) << 16); }
INLINE V first_of(I pairs) { return (V)(pairs << 16); }
INLINE V second_of(I pairs) { return (V)(pairs & 0xffff0000u); }
#endif
INLINE void to_half(half *p, V v) { _mm256_storeu_si256((void *)p, halves_of(v)); }
INLINE I zip_low(I a, I b) { return (I)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
INLINE I zip_high(I a, I b) { return (I)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
INLINE void zip(const I a[1], const I b[1], I out[2]) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    out[0] = (I)_mm512_permutex2var_epi16((__m512i)*a, first, (__m512i)*b);
    out[1] = (I)_mm512_permutex2var_epi16((__m512i)*a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), (__m512i)*b);
}
INLINE I load_halves(const half *p, long n) { return (I)_mm512_maskz_loadu_epi16(n < 32 ? 0xffffu : 0xffffffffu, p); }
INLINE void in_order(const float *low, const float *high, V out[2]) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    V l = load(low), h = load(high);
    out[0] = _mm512_permutex2var_ps(l, first, h);
    out[1] = _mm512_permutex2var_ps(l, _mm512_add_epi32(first, _mm512_set1_epi32(8)), h);
}
INLINE void square(I s[16]) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = (__m512i)s[i];
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
    for (int i = 0; i < 16; i++) s[i] = (I)t[i];
}

// ----------------------------------------------------------------------- bfloat16 by the bits of float32: all others

#else
INLINE I rounded(V v) { return ((I)v + ((I)v >> 16 & 1) + 0x7fff) >> 16; }
INLINE V first_of(I pairs) { return (V)(pairs << 16); }
INLINE V second_of(I pairs) { return (V)(pairs & 0xffff0000u); }
INLINE I load_halves(const half *p, long n) { return n > 0 ? load_pairs(p) : (I){0}; }
#endif

// ---------------------------------------------------------------------------------------------------------- AVX2

#if LANES == 8
INLINE V muladd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// By hand: with twelve sums in sixteen registers the compiler moves some to memory, at two thirds of the speed.
INLINE void add_row(V sum[2], const float *left, const V right[2]) {
    V all;
    __asm__ volatile("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
                     : "+x"(sum[0]), "+x"(sum[1]), "=&x"(all)
                     : "m"(*left), "x"(right[0]), "x"(right[1]));
}
INLINE V larger(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V smaller(V a, V b) { return _mm256_min_ps(a, b); }
INLINE float sum_of(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float largest_of(V v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
INLINE V from_half(const half *p) { return (V)((I)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)) << 16); }
INLINE I pack(V low, V high) {
    return (I)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)rounded(low), (__m256i)rounded(high)), 0xd8);
}
INLINE void to_half(half *p, V v) {
    __m256i r = (__m256i)rounded(v);
    _mm_storeu_si128((void *)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
INLINE I zip_low(I a, I b) { return (I)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
INLINE I zip_high(I a, I b) { return (I)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
INLINE void zip(const I a[2], const I b[2], I out[4]) {
    for (int j = 0; j < 2; j++) {
        __m256i low = (__m256i)zip_low(a[j], b[j]), high = (__m256i)zip_high(a[j], b[j]);
        out[2 * j] = (I)_mm256_permute2x128_si256(low, high, 0x20);
        out[2 * j + 1] = (I)_mm256_permute2x128_si256(low, high, 0x31);
    }
}
INLINE void in_order(const float *low, const float *high, V out[4]) {
    for (int j = 0; j < 4; j++) out[j] = _mm256_loadu2_m128(high + 4 * j, low + 4 * j);
}
INLINE void square(I s[8]) {
    __m256i r[8], t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)s[i], (__m256i)s[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)s[i], (__m256i)s[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        s[i] = (I)_mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        s[i + 4] = (I)_mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
}
#endif

// ------------------------------------------------------------------------------ 128 bits: NEON, or the compiler alone

#if LANES == 4
INLINE void add_row(V sum[4], const float *left, const V right[4]) {
    UNROLL
    for (int j = 0; j < 4; j++) sum[j] = muladd(splat(*left), right[j], sum[j]);
}
#ifdef NEON
INLINE V muladd(V a, V b, V c) { return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE V larger(V a, V b) { return (V)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE V smaller(V a, V b) { return (V)vminq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE float sum_of(V v) { return vaddvq_f32((float32x4_t)v); }
INLINE float largest_of(V v) { return vmaxvq_f32((float32x4_t)v); }
INLINE V from_half(const half *p) { return (V)vshll_n_u16(vld1_u16(p), 16); }
INLINE void to_half(half *p, V v) { vst1_u16(p, vmovn_u32((uint32x4_t)rounded(v))); }
INLINE I pack(V low, V high) {
    return (I)vcombine_u16(vmovn_u32((uint32x4_t)rounded(low)), vmovn_u32((uint32x4_t)rounded(high)));
}
INLINE I zip_low(I a, I b) { return (I)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
INLINE I zip_high(I a, I b) { return (I)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
INLINE void square(I s[4]) {
    uint32x4x2_t a = vtrnq_u32((uint32x4_t)s[0], (uint32x4_t)s[1]), b = vtrnq_u32((uint32x4_t)s[2], (uint32x4_t)s[3]);
    for (int i = 0; i < 2; i++) {
        s[i] = (I)vcombine_u32(vget_low_u32(a.val[i]), vget_low_u32(b.val[i]));
        s[i + 2] = (I)vcombine_u32(vget_high_u32(a.val[i]), vget_high_u32(b.val[i]));
    }
}
#else
INLINE V chosen(I where, V a, V b) { return (V)(((I)a & where) | ((I)b & ~where)); }
INLINE V muladd(V a, V b, V c) { return a * b + c; }
INLINE V larger(V a, V b) { return chosen((I)(a > b), a, b); }
INLINE V smaller(V a, V b) { return chosen((I)(a < b), a, b); }
INLINE float sum_of(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE float largest_of(V v) { return fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])); }
INLINE V from_half(const half *p) { return (V){0} + (V)((I){p[0], p[1], p[2], p[3]} << 16); }
INLINE void to_half(half *p, V v) {
    I r = rounded(v);
    for (int i = 0; i < 4; i++) p[i] = (half)r[i];
}
INLINE I pack(V low, V high) {
    half p[8];
    to_half(p, low);
    to_half(p + 4, high);
    return load_pairs(p);
}
INLINE I zip_low(I a, I b) {
    return (I){(a[0] & 0xffff) | b[0] << 16, a[0] >> 16 | (b[0] & 0xffff0000u), (a[1] & 0xffff) | b[1] << 16, a[1] >> 16 | (b[1] & 0xffff0000u)};
}
INLINE I zip_high(I a, I b) { return zip_low((I){a[2], a[3]}, (I){b[2], b[3]}); }
INLINE void square(I s[4]) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < i; j++) {
            uint32_t other = s[i][j];
            s[i][j] = s[j][i], s[j][i] = other;
        }
}
#endif
INLINE void zip(const I a[4], const I b[4], I out[8]) {
    for (int j = 0; j < 4; j++) out[2 * j] = zip_low(a[j], b[j]), out[2 * j + 1] = zip_high(a[j], b[j]);
}
INLINE void in_order(const float *low, const float *high, V out[8]) {
    for (int j = 0; j < 4; j++) out[2 * j] = load(low + 4 * j), out[2 * j + 1] = load(high + 4 * j);
}
#endif
