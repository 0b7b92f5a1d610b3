// Row operations of a transformer layer for the CPU, float32; see tree_attention.h for the attention between them.
#pragma once

#include <cstdint>

extern "C" {

// out[row] = x[row] / rms(x[row]), [rows, width] each.
void fst_rms_norm(const float* x, float* out, int64_t rows, int64_t width, float eps, int64_t threads);

// out[row] = x[row] / rms(x[row]) * weight, scale[row] = 1 / rms(x[row]); x, out [rows, width].
void fst_norm(const float* x, const float* weight, float* out, float* scale, int64_t rows, int64_t width, float eps, int64_t threads);

// The gradients of fst_norm by x, and by weight unless grad_weight is null. sums [parts, width] is what grad_weight [width] is added up from: the
// rows are cut into `parts`, so the sum does not depend on the number of threads.
void fst_norm_backward(
    const float* x, const float* weight, const float* scale, const float* grad, float* grad_x, float* grad_weight, float* sums, int64_t parts,
    int64_t rows, int64_t width, int64_t threads);

// out = silu(gate) * up, n numbers each.
void fst_swiglu(const float* gate, const float* up, float* out, int64_t n, int64_t threads);
void fst_swiglu_backward(
    const float* gate, const float* up, const float* grad, float* grad_gate, float* grad_up, int64_t n, int64_t threads);

// The rotary embedding, x * cos + rotate_half(x) * sin, of x and out [rows, heads, dim] with strides of rows and heads in floats, cos and sin
// [rows, dim]; the gradient by x of out where `backward`.
void fst_rotate(
    const float* x, int64_t x_row, int64_t x_head, const float* cos, const float* sin, float* out, int64_t out_row, int64_t out_head,
    int64_t rows, int64_t heads, int64_t dim, bool backward, int64_t threads);

// In place, for each of `heads` heads of each row of x (row stride in floats): divided by its rms and multiplied by norms [heads, dim] unless
// that is null, then its pairs turned as complex numbers by turn [rows, dim].
void fst_norm_and_turn(
    float* x, int64_t stride, const float* norms, const float* turn, int64_t rows, int64_t heads, int64_t dim, float eps, int64_t threads);

// out = silu(x[:, :width]) * x[:, width:], x [rows, 2 width].
void fst_gate(const float* x, float* out, int64_t rows, int64_t width, int64_t threads);

// to[at[row]] = from[row], [rows, heads, dim] with strides in floats.
void fst_scatter(
    const float* from, int64_t from_row, int64_t from_head, float* to, int64_t to_slot, int64_t to_head, const int64_t* at, int64_t rows,
    int64_t heads, int64_t dim, int64_t threads);
}
