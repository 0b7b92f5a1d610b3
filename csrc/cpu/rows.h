// Row operations of a transformer layer for the CPU, float32; see tree_attention.h for the attention between them.
#pragma once

#include <cstdint>

extern "C" {

// out[row] = x[row] / rms(x[row]), [rows, width] each.
void fst_rms_norm(const float* x, float* out, int64_t rows, int64_t width, float eps, int64_t threads);

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
