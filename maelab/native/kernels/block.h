// One pre-norm Transformer block, forward and backward.
//
// A thread takes a few samples at a time (a chunk) through the whole block, so that every activation between the
// block's input and its output stays in the core's own cache. Only the input and attention's results are kept for the
// backward pass, which computes the rest again: that costs less than writing it to memory and reading it back. Where
// KEEP_MORE, products are dear: q, k, v and what goes into the second norm and into GELU are kept too. Matrix products run on
// tiles (factors of 16 bits, float32 sums); norms, softmax, GELU, residuals and sums are float32.
//
// Every sum runs in an order that depends only on the sizes and on the number of threads: same input, same bits.

#define SLICE 192L  // of the MLP's hidden width, taken at a time on the way back: its weights and sums stay in cache

// --------------------------------------------------------------------------------------------------------- norms

INLINE void norm_row(const float *x, long D, float eps, const float *w, const float *b, half *out, float *stats) {
    // One pass over deviations from the first element, which is near enough to the mean for the difference below.
    V first = splat(x[0]), sum[2] = {{0}}, squares[2] = {{0}};
    for (long i = 0; i < D; i += 2 * LANES)  // D is a multiple of 32
        for (int j = 0; j < 2; j++) {
            V v = load(x + i + LANES * j) - first;
            sum[j] += v;
            squares[j] = muladd(v, v, squares[j]);
        }
    float shift = sum_of(sum[0] + sum[1]) / D;
    float var = sum_of(squares[0] + squares[1]) / D - shift * shift;
    float mean = x[0] + shift, inverse = 1.0f / sqrtf((var > 0 ? var : 0) + eps);
    for (long i = 0; i < D; i += LANES) {
        V v = (load(x + i) - splat(mean)) * splat(inverse);
        to_half(out + i, muladd(v, load(w + i), load(b + i)));
    }
    stats[0] = mean, stats[1] = inverse;
}

// out = scale (scale_other other + the gradient through the norm of row x), given g, that of its result; adds to dw, db.
INLINE void norm_row_grad(const float *g, const float *x, long D, const float *stats, const float *w, float *dw,
                          float *db, float scale_other, const float *other, float scale, float *out) {
    V mean = splat(stats[0]), r = splat(stats[1]), sum = {0}, dot = {0};
    for (long i = 0; i < D; i += LANES) {
        V v = (load(x + i) - mean) * r, d = load(g + i);
        store(db + i, load(db + i) + d);
        store(dw + i, muladd(d, v, load(dw + i)));
        d *= load(w + i);
        sum += d;
        dot = muladd(d, v, dot);
    }
    V a = splat(sum_of(sum) / D), b = splat(sum_of(dot) / D);
    for (long i = 0; i < D; i += LANES) {
        V v = (load(x + i) - mean) * r, d = load(g + i) * load(w + i) - muladd(v, b, a);
        V o = other ? splat(scale_other) * load(other + i) : (V){0};
        store(out + i, splat(scale) * muladd(d, r, o));
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

PUBLIC int64_t NAME(block_workspace)(const Block *p, int64_t backward) {
    Work w;
    size_t weights = UP(2 * (4 * p->D * p->D + 2 * p->D * p->F), 4096);
    return p->threads * layout(p, &w, 0, backward) + (backward ? weights : 0) + 4096;
}

// What is kept, one after the other: attention's probabilities (B, H, T, L to 32) and results (B, T, D); q, k, v
// (B, L, 3 D), the product that goes into GELU (B, T, F) and float32 sums that go into the second norm (B, T, D). The first
// three with room behind them, for whole tiles are read.
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
INLINE float *kept_x1(const Block *p, const Work *w, long s) { return (float *)kept_z(p, w, p->B) + s * p->T * p->D; }
PUBLIC int64_t NAME(block_kept)(const Block *p) {  // how many numbers
    Work w = {.Lk = UP(p->L, 32)};
    Block none = *p;
    none.kept = 0;
    return (KEEP_MORE ? (half *)kept_x1(&none, &w, p->B) : kept_qkv(&none, &w, 0)) - (half *)0;
}

// Write rows of w->o (n, d), whose columns (and rows, if `both`) are in packing order, as halves.
static void write_head(const Work *w, long n, long d, int both, half *out, long ld) {
    for (long c = 0; c < d; c += 32)
        for (long t = 0; t < n; t++) {
            const float *row = w->o + (both ? position(t) : t) * w->dk + c;
            V ordered[ROW];
            in_order(row, row + 16, ordered);
            for (long j = 0; j < MIN(ROW, (d - c) / LANES); j++) to_half(out + t * ld + c + j * LANES, ordered[j]);
        }
}

// softmax(q k^T / sqrt(d)) into `prob` (T, Lk), then o = prob v. q: the last T tokens of one sample's head.
static void attend(const Block *p, Work *w, const half *q, const half *k, const half *v, half *prob, half *out) {
    long L = p->L, T = p->T, D = p->D, d = D / p->H, ld = 3 * D, Lk = w->Lk, dk = w->dk, lt = UP(L, 16) / 16;
    pack_columns(k, ld, L, d, w->heads[0]);
    pack_right(v, ld, L, d, w->heads[1], 0);
    mul(T, 0, lt, d, q, 32 * ld, 64, 2 * ld, w->heads[0], w->s, 4 * Lk);
    V scale = splat(1.44269504f / sqrtf(d));
    for (long t = 0; t < T; t++) {
        float *s = w->s + t * Lk;
        half *o = prob + t * Lk;
        V top = splat(-INFINITY), sum = {0};
        for (long i = L / LANES * LANES; i < lt * 16; i += LANES) store(s + i, first_n(load(s + i), L - i, -INFINITY));
        for (long i = 0; i < lt * 16; i += LANES) top = larger(top, load(s + i));
        top = splat(largest_of(top)) * scale;
        for (long i = 0; i < lt * 16; i += LANES) {
            V e = power_of_two(load(s + i) * scale - top);
            sum += e;
            store(s + i, e);
        }
        V r = splat(1.0f / sum_of(sum));
        for (long i = 0; i < lt * 16; i += LANES) to_half(o + i, load(s + i) * r);
        if (lt * 16 < Lk) memset(o + lt * 16, 0, 16 * sizeof(half));
    }
    mul(T, 0, dk / 16, L, prob, 32 * Lk, 64, 2 * Lk, w->heads[1], w->o, 4 * dk);
    write_head(w, T, d, 0, out, D);
}

static void attend_grad(const Block *p, Work *w, const half *q, const half *k, const half *v, const half *prob,
                        const half *g, half *dq, half *dk_, half *dv) {
    long L = p->L, T = p->T, D = p->D, d = D / p->H, ld = 3 * D, Lk = w->Lk, dk = w->dk, lt = UP(L, 16) / 16;
    long tb = UP(T, 32) / 32;
    half *turned = w->heads[2], *right = w->heads[3], *ds = w->p;
    // dv = prob^T g
    pack_left(prob, Lk, T, Lk, turned, 0);
    pack_right(g, D, T, d, right, 0);
    mul(L, 1, dk / 16, T, turned, tb * 1024, 1024, 64, right, w->o, 4 * dk);
    write_head(w, L, d, 1, dv, ld);
    // ds = prob (g v^T - sum) / sqrt(d)
    pack_columns(v, ld, L, d, w->heads[0]);
    mul(T, 0, lt, d, g, 32 * D, 64, 2 * D, w->heads[0], w->s, 4 * Lk);
    V scale = splat(1.0f / sqrtf(d));
    for (long t = 0; t < T; t++) {
        const float *s = w->s + t * Lk;
        const half *from = prob + t * Lk;
        half *o = ds + t * Lk;
        V sum = {0};
        for (long i = 0; i < lt * 16; i += LANES) sum = muladd(load(s + i), from_half(from + i), sum);
        sum = splat(sum_of(sum));
        for (long i = 0; i < lt * 16; i += LANES) to_half(o + i, (load(s + i) - sum) * from_half(from + i) * scale);
        if (lt * 16 < Lk) memset(o + lt * 16, 0, 16 * sizeof(half));
    }
    // dq = ds k
    pack_right(k, ld, L, d, w->heads[1], 0);
    mul(T, 0, dk / 16, L, ds, 32 * Lk, 64, 2 * Lk, w->heads[1], w->o, 4 * dk);
    write_head(w, T, d, 0, dq, ld);
    // dk = ds^T q
    pack_left(ds, Lk, T, Lk, turned, 0);
    pack_right(q, ld, T, d, right, 0);
    mul(L, 1, dk / 16, T, turned, tb * 1024, 1024, 64, right, w->o, 4 * dk);
    write_head(w, L, d, 1, dk_, ld);
}

// GELU_BOTH for a product that was kept: z (rows, N), rows `ld` apart.
static void gelu_again(long rows, long N, const half *z, long ld, Finish f) {
    float c[64] ALIGNED;
    for (long m = 0; m < UP(rows, 32); m += 2)
        for (long n = 0; n < N; n += 32) {
            for (int r = 0; r < 2; r++)
                for (int j = 0; j < 32; j += LANES) store(c + 32 * r + j, from_half(z + MIN(m + r, rows - 1) * ld + n + j));
            finish_rows(GELU_BOTH, &f, c, m, rows, n, N);
        }
}

// Samples [s0, s0 + n) through the block. With `backward`, take what is kept and compute the rest up to fc1 again.
static void forward_chunk(const Block *p, Work *w, long s0, long n, int backward) {
    long L = p->L, T = p->T, D = p->D, F = p->F, H = p->H, d = D / H, R = n * L, Q = n * T;
    const half *qkvw = p->packed, *projw = qkvw + 3 * D * D, *fc1w = projw + D * D, *fc2w = fc1w + D * F;
    int more = KEEP_MORE && p->kept, anew = !backward || !more;
    if (more) w->qkv = kept_qkv(p, w, s0), w->x1 = kept_x1(p, w, s0);
    const float *residual = T < L ? w->x1 : p->x + s0 * L * D;
    for (long s = 0; s < n; s++)
        for (long t = 0; t < L; t++) {
            const float *x = p->x + ((s0 + s) * L + t) * D;
            norm_row(x, D, p->eps, p->n1w, p->n1b, w->xn1 + (s * L + t) * D, w->stats1 + 2 * (s * L + t));
            long q = s * T + t - (L - T);
            if (t < L - T) continue;
            if (T < L && anew) memcpy(w->x1 + q * D, x, D * sizeof(float));
            w->scale1[q] = p->scale1 ? p->scale1[s0 + s] : 1.0f;
            w->scale2[q] = p->scale2 ? p->scale2[s0 + s] : 1.0f;
        }
    if (anew) linear(STORE, R, 3 * D, D, w->xn1, qkvw, w->c, (Finish){.out = w->qkv, .bias = p->qkvb});
    half *prob = p->kept ? kept_prob(p, w, s0) : w->p, *ao = p->kept ? kept_ao(p, w, s0) : w->ao;
    for (long s = 0; s < n && !backward; s++)
        for (long h = 0; h < H; h++) {
            const half *k = w->qkv + s * L * 3 * D + D + h * d;
            attend(p, w, k - D + (L - T) * 3 * D, k, k + D, p->kept ? prob + (s * H + h) * T * w->Lk : prob,
                   ao + s * T * D + h * d);
        }
    Finish sum = {.sum = w->x1, .from = residual, .bias = p->projb, .scale = w->scale1};
    if (anew) linear(ADD_TO, Q, D, D, ao, projw, w->c, sum);
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
        for (long i = 0; i < D; i += LANES) to_half(g + r * D + i, splat(times * scale[r]) * load(d + r * D + i));
}

// On the way back every gradient of a block is carried as a multiple of itself by a power of two, which keeps it in the
// range of half precision (6e-5 to 65504): the largest of dy lands in [8, 16). bfloat16 has float32's range.
static float range_scale(const float *dy, long count) {
#ifdef FP16
    V top = {0};
    for (long i = 0; i < count; i += LANES) top = larger(top, larger(load(dy + i), -load(dy + i)));
    float largest = largest_of(top);
    int power = largest > 0 && isfinite(largest) ? 3 - ilogbf(largest) : 0;
    return ldexpf(1.0f, MIN(power, 120));
#else
    return 1.0f;
#endif
}

#ifdef FP16
static int all_finite(const float *x, long count) {
    for (long i = 0; i < count; i++)
        if (!isfinite(x[i])) return 0;
    return 1;
}
#endif

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
        if (KEEP_MORE) gelu_again(Q, N, kept_z(p, w, s0) + f, F, both);
        else linear(GELU_BOTH, Q, N, D, w->xn2, p->packed + (4 * D + f) * D, w->c, both);
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

PUBLIC void NAME(block_forward)(const Block *p) {
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

// All gradients, each carried `up` times as large on the way.
static void backward(const Block *p, float up) {
    long D = p->D, F = p->F, parts = p->threads;
    half *packed = (half *)UP((uintptr_t)p->work, 64);
    char *base = (char *)packed + UP(2 * (4 * D * D + 2 * D * F), 4096);
    Work first;
    size_t size = layout(p, &first, 0, 1);
    layout(p, &first, base, 1);
    float down = 1.0f / up;
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

PUBLIC void NAME(block_backward)(const Block *p) {
    float up = range_scale(p->dy, p->B * p->T * p->D);
    backward(p, up);
#ifdef FP16
    // What large weights or sums over many tokens carry out of the range, ends in the gradient of some parameter as
    // infinity or none. Then all is computed again, smaller.
    long matrices = p->need_weights ? 4 * p->D * p->D + 2 * p->D * p->F : 0;
    for (int times = 0; times < 3 && !all_finite(p->grads, vector_count(p) + matrices); times++) backward(p, up /= 32);
#endif
}

