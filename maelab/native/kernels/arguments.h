// What the caller hands over: maelab/native/block.py and muon.py fill the same structures.

#include <stdint.h>

typedef struct {
    int64_t B, L, T, D, H, F;  // samples, tokens in, tokens out (the last T), width, heads, hidden width of the MLP
    int64_t threads, rows;     // rows: about how many tokens to take at a time
    float eps;
    const float *x, *scale1, *scale2;  // (B, L, D); stochastic depth per sample (B,) of each branch, or NULL
    const float *n1w, *n1b, *qkvb, *projb, *n2w, *n2b, *fc1b, *fc2b, *qkvw, *projw, *fc1w, *fc2w;  // qkvb may be NULL
    float *y;           // (B, T, D)
    uint16_t *packed;   // (12 D^2 for F = 4 D) weights in tile order, for the forward products
    uint16_t *kept;     // for the backward pass, or NULL: see block_kept
    const float *dy;    // backward: (B, T, D)
    float *dx, *grads;  // (B, L, D); gradients one after the other, in the order of the parameters above
    char *work;
    int64_t need_weights;
} Block;

typedef struct {
    float *weight, *momentum;
    const float *grad;
    int64_t rows, cols;  // multiples of 32
    float lr, decay;     // of this matrix, adjusted for its shape; decay is already multiplied by the rate
} Matrix;
