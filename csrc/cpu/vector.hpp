// Eight floats at a time, in the compiler's own vector types: AVX2, AVX-512 and NEON all come out of the same lines.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

// The lanes of two vectors in another order.
#if defined(__clang__) || __GNUC__ >= 12
#define FST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, fst::ints{__VA_ARGS__})
#endif

namespace fst {

constexpr int LANES = 8;
constexpr int64_t WORTH_A_THREAD = 1 << 14;  // numbers in a pass over memory that more than one thread then shares
using vec = float __attribute__((vector_size(4 * LANES)));
using loose_vec = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // at any address
using ints = int32_t __attribute__((vector_size(4 * LANES)));

inline vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<loose_vec*>(p) = x; }
// Keeps x in a register: GCC would load it from memory once more for every use, and loads are what these loops wait for (1.5 times the speed).
inline vec held(vec x) {
#ifdef __AVX__
    asm("" : "+x"(x));
#endif
    return x;
}
inline vec all(float x) { return vec{} + x; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

inline float sum(vec x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

inline float largest(vec x) {
    x = larger(x, FST_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = larger(x, FST_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    return x[0] > x[1] ? x[0] : x[1];
}

// The sum of each of eight vectors, in their order.
inline vec sums(const vec (&a)[8]) {
    vec b[4], c[2];
    for (int i = 0; i < 4; ++i) {
        b[i] = FST_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               FST_SHUFFLE(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
        c[i] = FST_SHUFFLE(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               FST_SHUFFLE(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    return FST_SHUFFLE(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           FST_SHUFFLE(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// e^x to about 2 units in the last place; 0 below -87.3, where the result would be no normal number; NaN stays NaN. For x <= 88.
inline vec exp(vec x) {
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which stands in the low bits
    const vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
    vec p = all(1.9875691500e-4f);  // Cephes' polynomial for e^r, |r| <= ln 2 / 2
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    p = p * r * r + r + 1.0f;
    const ints power = ((ints)shifted + 127) << 23;
    const vec y = p * (vec)power;
    return x < -87.3f ? all(0.0f) : y;
}

}  // namespace fst
