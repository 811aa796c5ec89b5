// Factors of matrix products as tiles, and sums of products from tiles back to matrices.
//
// A tile is 16 rows of 64 bytes. C (16 x 16 float32) += A (16 x 32 halves) B, where B holds 32 x 16 elements as
// pairs of rows: B[p][n] = (b[2 p][n], b[2 p + 1][n]).

// Packing matrices that are summed over their rows leaves each group of 32 columns in the order in which the zip
// instructions deal them out: position p of tile t is column 8 (p / 4) + 4 t + p % 4.
INLINE long position(long column) {
    long c = column & 31;
    return (column & ~31L) + ((c & 4) << 2) + ((c >> 3) << 2) + (c & 3);
}

// How many rows of tile t hold the first n columns, packed so and turned over: the first ones.
INLINE long dealt_rows(long t, long n) {
    long here = MIN(32, n - t / 2 * 32), rest = here % 8 - (t & 1) * 4;
    return here / 8 * 4 + MIN(4, rest > 0 ? rest : 0);
}

INLINE void store_tile(half *out, const I t[16 * PARTS]) {
    UNROLL
    for (int i = 0; i < 16 * PARTS; i++) store_pairs(out + i * 2 * LANES, t[i]);
}

// src (rows, cols), rows `ld` apart, as one factor of a product summed over the rows: the right one (B), or
// transposed the left one (A). Rows are filled with zeros to a multiple of 32. Tile (i, k) is the (i RB + k)-th for
// columns 16 i... and rows 32 k..., RB = rows / 32 rounded up. Also adds the sum of each column to `sums`, if given.
INLINE void pack_rows(const half *src, long ld, long rows, long cols, half *out, int left, float *sums) {
    long RB = UP(rows, 32) / 32;
    for (long c = 0; c < cols; c += 32) {
        V sum[2][PARTS];
        memset(sum, 0, sizeof sum);
        for (long k = 0; k < RB; k++) {
            I low[16 * PARTS], high[16 * PARTS];
            half *o = out + ((c / 16) * RB + k) * 512;
            UNROLL
            for (int i = 0; i < 16; i++)
                UNROLL
                for (int j = 0; j < PARTS; j++) {
                    long r = k * 32 + 2 * i, n = cols - c - j * 2 * LANES;
                    const half *from = src + r * ld + c + j * 2 * LANES;
                    I a = r < rows ? load_halves(from, n) : (I){0}, b = r + 1 < rows ? load_halves(from + ld, n) : (I){0};
                    low[i * PARTS + j] = zip_low(a, b);
                    high[i * PARTS + j] = zip_high(a, b);
                    if (sums) {
                        sum[0][j] = add_pairs(sum[0][j], low[i * PARTS + j]);
                        sum[1][j] = add_pairs(sum[1][j], high[i * PARTS + j]);
                    }
                }
            if (left) transpose(low);
            store_tile(o, low);
            if (left) transpose(high);
            store_tile(o + RB * 512, high);
        }
        if (sums) {
            V ordered[ROW];
            in_order((float *)sum[0], (float *)sum[1], ordered);
            for (long j = 0; j < MIN(ROW, (cols - c) / LANES); j++)
                store(sums + c + j * LANES, load(sums + c + j * LANES) + ordered[j]);
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
            I t[16 * PARTS];
            for (int i = 0; i < 16; i++)
                for (int j = 0; j < PARTS; j++) {
                    long n = r + i < rows ? cols - c - j * 2 * LANES : 0;
                    t[i * PARTS + j] = n > 0 ? load_halves(src + (r + i) * ld + c + j * 2 * LANES, n) : (I){0};
                }
            transpose(t);
            store_tile(out, t);
        }
}

// Weights w (N, K) float32 -> right factor of x w^T (forward) or of g w (backward): tiles [from, to) of 32 columns.
static void pack_weight(const float *w, long N, long K, half *out, int backward, long from, long to) {
    I t[32 * PARTS];
    for (long g = from; g < to; g++)
        for (long k = 0; k < (backward ? N : K); k += 32) {
            const float *s = backward ? w + k * K + g * 32 : w + g * 32 * K + k;  // 32 x 32 elements
            for (int i = 0; i < 32; i++)
                for (int j = 0; j < PARTS; j++) {
                    const float *two = s + i * K + j * 2 * LANES;
                    t[i * PARTS + j] = pack(load(two), load(two + LANES));
                }
            half *o = out + g * 32 * (backward ? N : K) + k * 16, *p = o + 16 * (backward ? N : K);
            if (backward) {
                for (int i = 0; i < 16; i++) {
                    I both[2 * PARTS];
                    zip(t + 2 * i * PARTS, t + (2 * i + 1) * PARTS, both);
                    for (int j = 0; j < PARTS; j++) {
                        store_pairs(o + i * 32 + j * 2 * LANES, both[j]);
                        store_pairs(p + i * 32 + j * 2 * LANES, both[PARTS + j]);
                    }
                }
            } else {
                transpose(t);
                store_tile(o, t);
                transpose(t + 16 * PARTS);
                store_tile(p, t + 16 * PARTS);
            }
        }
}

// Sums of products in pieces of 32 x 32, both sides in packing order. Add those of all parts in order, `stride` numbers
// apart, and write them, times `scale`, as a row-major matrix (M, N), or (N, M) when transposed: pieces [from, to).
static void unpack(const float *acc, long stride, long parts, long M, long N, int transposed, float scale, float *out, long from,
                   long to) {
    for (long piece = from; piece < to; piece++) {
        long m = piece / (N / 32) * 32, n = piece % (N / 32) * 32;
        I t[2][2][16 * PARTS];  // rows 0..15 and 16..31, columns 0..15 and 16..31
        for (int r = 0; r < 32; r++) {
            float row[32] ALIGNED;
            V ordered[ROW];
            for (int j = 0; j < ROW; j++) {
                const float *s = acc + piece * 1024 + position(r) * 32 + j * LANES;
                V v = load(s);
                for (long p = 1; p < parts; p++) v += load(s + p * stride);
                store(row + j * LANES, v * scale);
            }
            in_order(row, row + 16, ordered);
            for (int j = 0; j < ROW; j++)
                if (transposed) t[r / 16][j / PARTS][r % 16 * PARTS + j % PARTS] = (I)ordered[j];
                else store(out + (m + r) * N + n + j * LANES, ordered[j]);
        }
        for (int side = 0; side < 2 * transposed; side++)
            for (int columns = 0; columns < 2; columns++) {
                transpose(t[side][columns]);
                for (int i = 0; i < 16; i++)
                    for (int j = 0; j < PARTS; j++)
                        store((float *)out + (n + 16 * columns + i) * M + m + 16 * side + j * LANES, (V)t[side][columns][i * PARTS + j]);
            }
    }
}
