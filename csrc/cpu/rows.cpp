// One pass over memory each, where torch makes two to seven.

#include "rows.h"

#include <cmath>
#include <cstring>

#include "vector.hpp"

namespace {

using namespace fst;

float mean_square(const float* x, int64_t width) {
    vec squares = {};
    const int64_t whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int64_t i = whole; i < width; ++i) total += x[i] * x[i];
    return total / static_cast<float>(width);
}

void turn_pairs(float* x, const float* by, int64_t dim) {
    const int64_t whole = dim / LANES * LANES;
    const vec sign = {-1, 1, -1, 1, -1, 1, -1, 1};
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec a = load(x + i), b = load(by + i);
        const vec re = FST_SHUFFLE(b, b, 0, 0, 2, 2, 4, 4, 6, 6);
        const vec im = FST_SHUFFLE(b, b, 1, 1, 3, 3, 5, 5, 7, 7);
        const vec swapped = FST_SHUFFLE(a, a, 1, 0, 3, 2, 5, 4, 7, 6);
        store(x + i, a * re + swapped * im * sign);
    }
    for (int64_t i = whole; i < dim; i += 2) {
        const float re = x[i] * by[i] - x[i + 1] * by[i + 1], im = x[i + 1] * by[i] + x[i] * by[i + 1];
        x[i] = re;
        x[i + 1] = im;
    }
}

// 1 / (1 + e^-x), without overflow.
vec sigmoid(vec x) {
    const vec e = exp(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

}  // namespace

void fst_norm(const float* x, const float* weight, float* out, float* scale, int64_t rows, int64_t width, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; ++row) {
        const float *from = x + row * width, by = 1.0f / std::sqrt(mean_square(from, width) + eps);
        float* to = out + row * width;
        scale[row] = by;
        for (int64_t i = 0; i < width; ++i) to[i] = from[i] * by * weight[i];
    }
}

void fst_norm_backward(
    const float* x, const float* weight, const float* scale, const float* grad, float* grad_x, float* grad_weight, float* sums, int64_t parts,
    int64_t rows, int64_t width, int64_t threads) {
    const int64_t each = (rows + parts - 1) / parts, whole = width / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_A_THREAD)
    for (int64_t part = 0; part < parts; ++part) {
        float* sum_of = sums + part * width;
        if (grad_weight) std::memset(sum_of, 0, width * sizeof(float));
        for (int64_t row = part * each; row < rows && row < (part + 1) * each; ++row) {
            const float *a = x + row * width, *g = grad + row * width, by = scale[row];
            float* to = grad_x + row * width;
            vec products = {};
            for (int64_t i = 0; i < whole; i += LANES) products += load(g + i) * load(weight + i) * load(a + i);
            float dot = sum(products);
            for (int64_t i = whole; i < width; ++i) dot += g[i] * weight[i] * a[i];
            const float back = by * by * by * dot / static_cast<float>(width);
            for (int64_t i = 0; i < width; ++i) to[i] = g[i] * weight[i] * by - a[i] * back;
            if (grad_weight) {
                for (int64_t i = 0; i < width; ++i) sum_of[i] += g[i] * a[i] * by;
            }
        }
    }
    if (grad_weight) {
        std::memcpy(grad_weight, sums, width * sizeof(float));
        for (int64_t part = 1; part < parts; ++part) {
            for (int64_t i = 0; i < width; ++i) grad_weight[i] += sums[part * width + i];
        }
    }
}

void fst_swiglu(const float* gate, const float* up, float* out, int64_t n, int64_t threads) {
    const int64_t blocks = n / LANES;
#pragma omp parallel for num_threads(threads) if (n > WORTH_A_THREAD)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * LANES;
        const vec g = load(gate + i);
        store(out + i, g * sigmoid(g) * load(up + i));
    }
    for (int64_t i = blocks * LANES; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void fst_swiglu_backward(
    const float* gate, const float* up, const float* grad, float* grad_gate, float* grad_up, int64_t n, int64_t threads) {
    const int64_t blocks = n / LANES;
#pragma omp parallel for num_threads(threads) if (n > WORTH_A_THREAD)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * LANES;
        const vec g = load(gate + i), d = load(grad + i), s = sigmoid(g);
        store(grad_gate + i, d * load(up + i) * s * (1.0f + g * (1.0f - s)));
        store(grad_up + i, d * g * s);
    }
    for (int64_t i = blocks * LANES; i < n; ++i) {
        const float s = 1.0f / (1.0f + std::exp(-gate[i]));
        grad_gate[i] = grad[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
        grad_up[i] = grad[i] * gate[i] * s;
    }
}

void fst_rotate(
    const float* x, int64_t x_row, int64_t x_head, const float* cos, const float* sin, float* out, int64_t out_row, int64_t out_head,
    int64_t rows, int64_t heads, int64_t dim, bool backward, int64_t threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (rows * heads * dim > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; ++row) {
        const float *c = cos + row * dim, *s = sin + row * dim;
        for (int64_t head = 0; head < heads; ++head) {
            const float *low = x + row * x_row + head * x_head, *high = low + half;
            float* to = out + row * out_row + head * out_head;
            if (backward) {
                for (int64_t i = 0; i < half; ++i) {
                    to[i] = low[i] * c[i] + high[i] * s[half + i];
                    to[half + i] = high[i] * c[half + i] - low[i] * s[i];
                }
            } else {
                for (int64_t i = 0; i < half; ++i) {
                    to[i] = low[i] * c[i] - high[i] * s[i];
                    to[half + i] = high[i] * c[half + i] + low[i] * s[half + i];
                }
            }
        }
    }
}

void fst_rms_norm(const float* x, float* out, int64_t rows, int64_t width, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; ++row) {
        const float *from = x + row * width, scale = 1.0f / std::sqrt(mean_square(from, width) + eps);
        float* to = out + row * width;
        for (int64_t i = 0; i < width; ++i) to[i] = from[i] * scale;
    }
}

void fst_norm_and_turn(
    float* x, int64_t stride, const float* norms, const float* turn, int64_t rows, int64_t heads, int64_t dim, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * heads * dim > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t head = 0; head < heads; ++head) {
            float* at = x + row * stride + head * dim;
            if (norms) {
                const float scale = 1.0f / std::sqrt(mean_square(at, dim) + eps);
                for (int64_t i = 0; i < dim; ++i) at[i] *= scale * norms[head * dim + i];
            }
            turn_pairs(at, turn + row * dim, dim);
        }
    }
}

void fst_gate(const float* x, float* out, int64_t rows, int64_t width, int64_t threads) {
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; ++row) {
        const float *gate = x + row * 2 * width, *up = gate + width;
        float* to = out + row * width;
        for (int64_t i = 0; i < whole; i += LANES) {
            const vec g = load(gate + i), size = g < 0.0f ? g : -g, e = exp(size);  // e^-|g|
            store(to + i, (g < 0.0f ? g * e : g) / (1.0f + e) * load(up + i));
        }
        for (int64_t i = whole; i < width; ++i) to[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}

void fst_scatter(
    const float* from, int64_t from_row, int64_t from_head, float* to, int64_t to_slot, int64_t to_head, const int64_t* at, int64_t rows,
    int64_t heads, int64_t dim, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * heads * dim > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t head = 0; head < heads; ++head) {
            std::memcpy(to + at[row] * to_slot + head * to_head, from + row * from_row + head * from_head, dim * sizeof(float));
        }
    }
}
