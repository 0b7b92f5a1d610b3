// The C interface of sample_tokens: one struct by pointer, one stream, an error code. kernels/fst_kernels/sampling/cuda.py declares the same
// struct; fst_sample_tokens_size() lets it check that both agree.
#pragma once

#include <cstdint>

extern "C" {

enum { FST_LARGEST_VOCABULARY = 1 << 22, FST_BAD_ARGUMENT = -1 };

struct FstSampleTokens {
    int64_t rows, vocabulary;
    const void* logits;  // [rows, vocabulary] fp32 or bf16
    int64_t stride;      // of a row, in elements
    const float* temperature;  // [rows], or null: temperature_of_all. 0 is greedy
    const int64_t *seeds, *positions;  // [rows]
    const int32_t* row_top_k;          // [rows] each, or null: the one number of all rows below; the values mean the same
    const double* row_top_p;
    const float* row_log_min_p;
    int64_t* ids;                      // [rows]
    float *logprob, *untruncated;      // [rows]; NaN in both: the row holds NaN or +inf, or only -inf
    double top_p;      // 1: no such rule
    float log_min_p;   // -infinity: no such rule
    float temperature_of_all;
    int32_t top_k;     // 0: no such rule
    int32_t logits_are_bf16;
    int32_t threads, cluster, resident;  // 0, 0, -1: choose; resident 1 keeps the row in shared memory, 0 reads it again for every pass
};

int64_t fst_sample_tokens_size();
int fst_sample_tokens(const FstSampleTokens* tokens, void* stream);  // 0, FST_BAD_ARGUMENT or the machine's error code
const char* fst_error(int code);
}
