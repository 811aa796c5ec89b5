// Powers of two, and GELU with its slope, of LANES numbers at a time.

// 2^x for x <= 0, relative error 3e-6.
INLINE V power_of_two(V x) {
#if LANES == 16
    V n = _mm512_roundscale_ps(x, 8);
#else
    V low = splat(-126.0f), round = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to whole numbers, in the lowest bits
    I below = (I)(x < low);
    x = larger(x, low);
    V shifted = x + round, n = shifted - round;
#endif
    V f = x - n, p = splat(9.57002e-3f);
    p = muladd(p, f, splat(5.591780e-2f));
    p = muladd(p, f, splat(2.4024746e-1f));
    p = muladd(p, f, splat(6.9312182e-1f));
    p = muladd(p, f, splat(9.9999926e-1f));
#if LANES == 16
    return _mm512_scalef_ps(p, n);
#else
    return (V)((I)(p * (V)(((I)shifted - 0x4b400000u + 127u) << 23)) & ~below);
#endif
}

// gelu(x) = x Phi(x). Phi and gelu's slope are off by at most 1.3e-4 and 5e-4, where bfloat16 rounds numbers near one to 2e-3.
#if LANES == 16
// Quadratics on 32 pieces of [-4, 3.87], constant beyond. One permutation looks up 16 numbers of a table.
static float cdf[3][32] ALIGNED, derivative[3][32] ALIGNED;

static void make_tables(void) {  // each quadratic meets its function in the three Chebyshev points of the piece
    for (int i = 0; i < 32; i++) {
        double x[3], c[2][3];
        for (int j = 0; j < 3; j++) {
            x[j] = (i - 16 + cos(M_PI * (2 * j + 1) / 6) / 2) / 4;
            c[0][j] = 0.5 + 0.5 * erf(x[j] * M_SQRT1_2);
            c[1][j] = c[0][j] + x[j] * expf(-x[j] * x[j] / 2) / sqrt(2 * M_PI);
        }
        for (int f = 0; f < 2; f++) {  // Newton's form, then by powers
            double a = (c[f][1] - c[f][0]) / (x[1] - x[0]);
            double b = ((c[f][2] - c[f][1]) / (x[2] - x[1]) - a) / (x[2] - x[0]);
            float(*table)[32] = f ? derivative : cdf;
            table[2][i] = b, table[1][i] = a - b * (x[0] + x[1]), table[0][i] = c[f][0] - x[0] * (a - b * x[1]);
        }
    }
}
INLINE V quadratic(const float table[3][32], __m512i piece, V x) {
    V c[3];
    for (int i = 0; i < 3; i++) c[i] = _mm512_permutex2var_ps(load(table[i]), piece, load(table[i] + 16));
    return muladd(muladd(c[2], x, c[1]), x, c[0]);
}
INLINE V gelu(V v, V *slope) {
    v = larger(v, splat(-4.0f));
    V x = smaller(v, splat(3.87f));
    // Adding 1.5 * 2^23 rounds to whole numbers, in the lowest bits.
    __m512i piece = (__m512i)muladd(x, splat(4.0f), splat(12582912.0f + 16.0f));
    if (slope) *slope = quadratic(derivative, piece, x);
    return v * quadratic(cdf, piece, x);
}
#else
// Odd polynomials on [-4, 4], the best in the largest error, constant beyond.
static void make_tables(void) {}
INLINE V polynomial(const float *c, int terms, V x) {
    V z = x * x, p = splat(c[terms - 1]);
    UNROLL
    for (int i = terms - 2; i >= 0; i--) p = muladd(p, z, splat(c[i]));
    return muladd(p, x, splat(0.5f));
}
INLINE V gelu(V v, V *slope) {
    const float cdf[] = {3.98526895e-1f, -6.53883184e-2f, 9.11292953e-3f, -8.78975453e-4f,
                         5.41897453e-5f, -1.89185272e-6f, 2.81602116e-8f};
    const float derivative[] = {7.96721595e-1f, -2.62029715e-1f, 5.59147237e-2f, -7.68740690e-3f,
                                6.87639443e-4f, -3.84590255e-5f, 1.21378112e-6f, -1.64193314e-8f};
    v = larger(v, splat(-4.0f));
    V x = smaller(v, splat(4.0f));
    if (slope) *slope = polynomial(derivative, 8, x);
    return v * polynomial(cdf, 7, x);
}
#endif
