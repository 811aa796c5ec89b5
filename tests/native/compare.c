// compare LIBRARY VARIANT OTHER: two variants of the kernels on the same random blocks and matrices.
// Prints each shape's largest relative error, |a - b| / |b| over a whole result; status 1 where one is too large.

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arguments.h"

static void *library;
static void *function(const char *name, const char *variant) {
    char symbol[100];
    snprintf(symbol, sizeof symbol, "%s_%s", name, variant);
    void *found = dlsym(library, symbol);
    if (!found) fprintf(stderr, "%s is missing\n", symbol), exit(2);
    return found;
}

static void *room(size_t bytes) { return calloc(1, bytes + 128); }

static float *numbers(long count, float scale, unsigned seed) {  // of mean 0 and this deviation, much the same shape as normal
    float *made = room(count * sizeof(float));
    for (long i = 0; i < count; i++) {
        float sum = -2;
        for (int j = 0; j < 4; j++) seed = seed * 1664525u + 1013904223u, sum += (seed >> 8) / 16777216.0f;
        made[i] = sum * 1.7320508f * scale;
    }
    return made;
}

static double error(const float *a, const float *b, long count) {
    double different = 0, size = 0;
    for (long i = 0; i < count; i++) different += pow(a[i] - b[i], 2), size += (double)b[i] * b[i];
    return isfinite(different) ? sqrt(different / (size + 1e-30)) : INFINITY;
}

typedef struct { float *y, *dx, *grads; } Results;

static Results run_block(Block p, const char *variant) {
    int64_t (*space)(const Block *, int64_t) = function("block_workspace", variant);
    int64_t (*kept)(const Block *) = function("block_kept", variant);
    void (*forward)(const Block *) = function("block_forward", variant), (*backward)(const Block *) = function("block_backward", variant);
    Results r = {room(p.B * p.T * p.D * 4), room(p.B * p.L * p.D * 4), room((9 * p.D + p.F + 4 * p.D * p.D + 2 * p.D * p.F) * 4)};
    char *packed = room(2 * (4 * p.D * p.D + 2 * p.D * p.F) + 64);
    p.y = r.y, p.dx = r.dx, p.grads = r.grads, p.packed = (void *)(((uintptr_t)packed + 63) & ~63ull);
    p.kept = room(2 * kept(&p));
    p.work = room(space(&p, 0));
    forward(&p);
    free(p.work);
    p.work = room(space(&p, 1));
    backward(&p);
    free(p.work), free(p.kept), free(packed);
    return r;
}

static float *run_muon(Matrix m, const char *variant) {
    int64_t (*space)(int64_t, int64_t, int64_t) = function("muon_workspace", variant);
    void (*step)(const Matrix *, int64_t, float, const float *, char *, int64_t, int64_t) = function("muon", variant);
    long size = m.rows * m.cols, bytes = space(m.rows < m.cols ? m.rows : m.cols, m.rows < m.cols ? m.cols : m.rows, 1);
    const float abc[] = {3.4445f, -4.7750f, 2.0315f};
    m.weight = memcpy(room(size * 4), m.weight, size * 4), m.momentum = memcpy(room(size * 4), m.momentum, size * 4);
    char *work = room(bytes);
    step(&m, 1, 0.95f, abc, work, bytes - 4096, 1);
    free(work), free(m.momentum);
    return m.weight;
}

int main(int count, char **words) {
    if (count != 4 || !(library = dlopen(words[1], RTLD_NOW))) return fprintf(stderr, "%s\n", count == 4 ? dlerror() : "usage"), 2;
    int64_t (*serves)(const char *) = dlsym(library, "serves");
    for (int i = 2; i < 4; i++) {
        if (strcmp(words[i], "portable") && !serves(words[i])) return printf("this processor does not serve %s\n", words[i]), 77;
        if (((int64_t(*)(void))function("start", words[i]))()) return 2;
    }
    // Widths 32 to 1024, heads of 16 to 256, 1 to 1024 tokens, of which all or the last few are computed.
    static const int shapes[][6] = {  // B, L, T, D, H, F
        {2, 1, 1, 32, 1, 32}, {3, 7, 7, 64, 4, 256}, {5, 17, 17, 96, 3, 384}, {3, 50, 12, 96, 6, 384}, {2, 33, 1, 128, 2, 512},
        {2, 65, 48, 192, 3, 768}, {9, 17, 17, 192, 12, 192}, {1, 197, 197, 256, 1, 1024}, {1, 10, 10, 1024, 16, 4096}, {1, 1024, 3, 32, 2, 64}};
    int bad = 0;
    for (unsigned i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int *s = shapes[i];
        long B = s[0], L = s[1], T = s[2], D = s[3], F = s[5];
        Block p = {.B = B, .L = L, .T = T, .D = D, .H = s[4], .F = F, .threads = B > 1 ? 2 : 1, .rows = 260, .eps = 1e-6f, .need_weights = 1};
        p.x = numbers(B * L * D, 1.5f, 1), p.dy = numbers(B * T * D, 1, 2), p.scale2 = i % 2 ? numbers(B, 1, 3) : 0;
        p.n1w = numbers(D, 1, 4), p.n1b = numbers(D, 0.3f, 5), p.n2w = numbers(D, 1, 6), p.n2b = numbers(D, 0.3f, 7);
        p.qkvb = i % 3 ? numbers(3 * D, 0.3f, 8) : 0, p.projb = numbers(D, 0.3f, 9), p.fc1b = numbers(F, 0.3f, 10), p.fc2b = numbers(D, 0.3f, 11);
        float wide = 1 / sqrtf(D);
        p.qkvw = numbers(3 * D * D, wide, 12), p.projw = numbers(D * D, wide, 13), p.fc1w = numbers(F * D, wide, 14), p.fc2w = numbers(D * F, 1 / sqrtf(F), 15);
        Results a = run_block(p, words[2]), b = run_block(p, words[3]);
        double worst = fmax(error(a.y, b.y, B * T * D), error(a.dx, b.dx, B * L * D));
        long sizes[] = {D, D, 3 * D, D, D, D, F, D, 3 * D * D, D * D, D * F, D * F};
        for (long k = 0, at = 0; k < 12; at += sizes[k++])
            if (k != 2 || L > 1) worst = fmax(worst, error(a.grads + at, b.grads + at, sizes[k]));
        printf("block B %ld L %ld T %ld D %ld heads %d F %ld: %.5f\n", B, L, T, D, s[4], F, worst);
        bad |= !(worst < 0.01);
    }
    static const int sides[][2] = {{32, 32}, {64, 192}, {192, 64}, {288, 96}, {96, 384}};
    for (unsigned i = 0; i < sizeof sides / sizeof *sides; i++) {
        long size = sides[i][0] * sides[i][1];
        Matrix m = {.weight = room(size * 4), .momentum = numbers(size, 1, 2), .grad = numbers(size, 1, 3), .rows = sides[i][0], .cols = sides[i][1], .lr = 1, .decay = 0};
        double worst = error(run_muon(m, words[2]), run_muon(m, words[3]), size);
        printf("Muon %d x %d: %.5f\n", sides[i][0], sides[i][1], worst);
        bad |= !(worst < 0.03);
    }
    return bad;
}
