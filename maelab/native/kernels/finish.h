// What becomes of the sums of a product by weights, while they are in the first-level cache.

enum { STORE, ADD_TO, GELU, GELU_BOTH, TIMES, STORE_F32, ADD_F32 };

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
    I result[2][PARTS];
    UNROLL
    for (int r = 0; r < 2; r++) {
        long at = (row + r) * N + n;
        int here = row + r < rows;
        if (!here && kind != GELU_BOTH && kind != TIMES && kind != STORE_F32 && kind != ADD_F32) break;
        UNROLL
        for (int j = 0; j < PARTS; j++) {
            V v[2], slope[2];
            UNROLL
            for (int i = 0; i < 2; i++) {
                long k = (2 * j + i) * LANES;
                v[i] = load(c + 32 * r + k);
                if (f->bias) v[i] += load(f->bias + n + k);
                if (kind == ADD_F32) store(f->sum + at + k, v[i] + load(f->sum + at + k));
                if (kind == STORE_F32) store(f->sum + at + k, v[i]);
                if (kind == ADD_TO) store(f->sum + at + k, muladd(v[i], splat(f->scale[row + r]), load(f->from + at + k)));
                if (kind == TIMES) v[i] *= from_half(f->grad + at + k);
            }
            half *grad = f->grad + at + 2 * j * LANES;
            if (kind == GELU && f->grad) store_pairs(grad, pack(v[0], v[1]));
            if (kind == GELU) v[0] = gelu(v[0], 0), v[1] = gelu(v[1], 0);
            if (kind == GELU_BOTH) v[0] = gelu(v[0], slope), v[1] = gelu(v[1], slope + 1);
            if (kind == GELU_BOTH) store_pairs(grad, pack(slope[0], slope[1]));
            if (kind == STORE || kind == GELU) store_pairs(f->out + at + 2 * j * LANES, pack(v[0], v[1]));
            if (kind == GELU_BOTH || kind == TIMES) result[r][j] = here ? pack(v[0], v[1]) : (I){0};
            if (kind == TIMES) store_pairs(grad, pack(v[0], v[1]));
        }
    }
    if (kind != GELU_BOTH && kind != TIMES) return;
    long RB = UP(rows, 32) / 32;
    half *o = f->packed + (n / 16 * RB + row / 32) * 512 + row % 32 * 16;
    UNROLL
    for (int j = 0; j < PARTS; j++) {
        I low = zip_low(result[0][j], result[1][j]), high = zip_high(result[0][j], result[1][j]);
        store_pairs(o + 2 * j * LANES, low);
        store_pairs(o + RB * 512 + 2 * j * LANES, high);
        if (kind == TIMES) {  // in packing order
            float *sum = f->sum + n + j * LANES;
            store(sum, add_pairs(load(sum), low));
            store(sum + 16, add_pairs(load(sum + 16), high));
        }
    }
}
