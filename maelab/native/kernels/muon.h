// One step of Muon (Jordan et al. 2024) for a list of matrices.

typedef struct { half *x, *gram, *left, *right; float *c; } MuonWork;

static size_t muon_layout(long m, long n, char *base, MuonWork *w) {
    w->x = (void *)base;
    w->left = w->x + m * n;
    w->right = w->left + m * n;
    w->gram = w->right + m * n;
    w->c = (float *)(w->gram + m * m);
    return UP(10 * m * n + 2 * m * m, 4096) + 192;
}

PUBLIC int64_t NAME(muon_workspace)(int64_t shortest, int64_t longest, int64_t threads) {
    MuonWork w;
    return threads * muon_layout(shortest, longest, 0, &w) + 4096;
}

// 32 numbers of a row, dealt out as by packing or as they are.
INLINE void read_row(const float *c, int dealt, V out[ROW]) {
    if (dealt) in_order(c, c + 16, out);
    else
        for (int k = 0; k < ROW; k++) out[k] = load(c + k * LANES);
}

// C (m, m) = A B over K terms, known to be symmetric: pieces of 32 x 32 on the diagonal and to its right alone.
static void right_half(long m, long K, const half *a, long am, long ak, long lda, const half *b, float *c) {
    for (long i = 0; i < m; i += 32)
        mul(32, 0, (m - i) / 16, K, a + i / 32 * am, am, ak, lda, b + i * K, c + i * m + i, 4 * m);
}
static void mirror(long m, half *x) {
    for (long i = 0; i < m; i++)
        for (long j = 0; j < (i & ~31L); j++) x[i * m + j] = x[j * m + i];
}

// Five Newton-Schulz steps of Muon (Jordan et al. 2024) on x (rows, cols): x = a x + (b G + c G G) x with G = x x^T, or
// from the other side where x is tall.
static void orthogonalize(long rows, long cols, const MuonWork *w, const float *abc) {
    V a = splat(abc[0]), b = splat(abc[1]), c_ = splat(abc[2]);
    half *x = w->x, *gram = w->gram;
    float *c = w->c;
    int tall = rows > cols;
    long m = tall ? cols : rows;
    for (int step = 0; step < 5; step++) {
        if (tall) {
            pack_left(x, cols, rows, cols, w->left, 0);
            pack_right(x, cols, rows, cols, w->right, 0);
            right_half(m, rows, w->left, rows * 32, 1024, 64, w->right, c);
        } else {
            pack_columns(x, cols, rows, cols, w->right);
            right_half(m, cols, x, 32 * cols, 64, 2 * cols, w->right, c);
        }
        for (long i = 0; i < m; i++)
            for (long j = i & ~31L; j < m; j += 32) {
                const float *s = c + (tall ? position(i) : i) * m + j;
                V v[ROW];
                read_row(s, tall, v);
                for (int k = 0; k < ROW; k++) to_half(gram + i * m + j + k * LANES, v[k]);
            }
        mirror(m, gram);
        pack_columns(gram, m, m, m, w->right);  // symmetric: as good as its rows
        right_half(m, m, gram, 32 * m, 64, 2 * m, w->right, c);
        for (long i = 0; i < m; i++)
            for (long j = i * m + (i & ~31L); j < (i + 1) * m; j += LANES)
                to_half(gram + j, muladd(c_, load(c + j), b * from_half(gram + j)));
        mirror(m, gram);
        if (tall) {
            pack_columns(gram, m, m, m, w->right);
            mul(rows, 0, m / 16, m, x, 32 * m, 64, 2 * m, w->right, c, 4 * m);
        } else {
            pack_right(x, cols, rows, cols, w->right, 0);
            mul(m, 0, cols / 16, m, gram, 32 * m, 64, 2 * m, w->right, c, 4 * cols);
        }
        for (long i = 0; i < rows * cols; i += 32) {
            V v[ROW];
            read_row(c + i, !tall, v);
            for (int k = 0; k < ROW; k++) to_half(x + i + k * LANES, muladd(a, from_half(x + i + k * LANES), v[k]));
        }
    }
}

// One step of Muon with Nesterov momentum for every matrix; a thread takes one matrix at a time.
PUBLIC void NAME(muon)(const Matrix *all, int64_t count, float momentum, const float *abc, char *work, int64_t stride, int64_t threads) {
    work = (char *)UP((uintptr_t)work, 64);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long j = 0; j < count; j++) {
        const Matrix *p = all + j;
        long size = p->rows * p->cols, m = MIN(p->rows, p->cols);
        MuonWork w;
        muon_layout(m, size / m, work + omp_get_thread_num() * stride, &w);
        V keep = splat(momentum), squares = {0};
        for (long i = 0; i < size; i += LANES) {
            V g = load(p->grad + i), b = load(p->momentum + i);
            b = muladd(b - g, keep, g);
            store(p->momentum + i, b);
            g = muladd(b - g, keep, g);
            squares = muladd(g, g, squares);
        }
        float norm = sqrtf(sum_of(squares));
        V scale = splat(1.0f / (norm > 1e-7f ? norm : 1e-7f));
        for (long i = 0; i < size; i += LANES) {
            V g = load(p->grad + i), b = load(p->momentum + i);
            to_half(w.x + i, muladd(b - g, keep, g) * scale);
        }
        tiles_on();
        orthogonalize(p->rows, p->cols, &w, abc);
        tiles_off();
        for (long i = 0; i < size; i += LANES)
            store(p->weight + i, muladd(from_half(w.x + i), splat(-p->lr), load(p->weight + i) * splat(1.0f - p->decay)));
    }
}

