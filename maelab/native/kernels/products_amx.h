// Products on AMX: a tile instruction multiplies 16 x 32 by 32 x 16 halves.

#define UNITS "AMX"
enum { KEEP_MORE = 0 };

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

// C (rows x 16 nt) = A B over K terms; `dealt`: A's rows, and so C's, are in packing order. All are computed by whole tiles.
static void mul(long rows, int dealt, long nt, long K, const void *a_, long am, long ak, long lda, const void *b_, void *c_,
                long ldc) {
    long mt = (dealt ? UP(rows, 32) : UP(rows, 16)) / 16, kt = UP(K, 32) / 32;
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
