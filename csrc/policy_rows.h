// The C interface of policy_rows: one struct by pointer, one stream, an error code. kernels/fst_kernels/linear_policy_loss/cuda.py
// declares the same struct; fst_policy_rows_size() lets it check that both agree.
#pragma once

#include <cstdint>

extern "C" {

enum FstKl { FST_KL_NONE = 0, FST_KL_REVERSE = 1, FST_KL_FORWARD = 2 };

enum FstOp { FST_INPUT, FST_CONSTANT, FST_ADD, FST_SUB, FST_MUL, FST_NEG, FST_EXP, FST_EXPM1, FST_MIN, FST_MAX, FST_GT, FST_LE, FST_WHERE };

// Instruction i of a program computes value i from earlier values a, b, c (FST_INPUT: from input number a); the last one is the result.
struct FstInstruction {
    int32_t op, a, b, c;
    float constant;
};

enum { FST_MAX_INSTRUCTIONS = 64, FST_INPUTS = 6 };

struct FstPolicyRows {
    int64_t rows, vocabulary;
    float* logits;          // [rows, vocabulary] by logits_stride: h W^T + bias
    const float* ref;       // the same of the reference by ref_stride, or null
    void* d_logits;         // dLoss/dlogits by d_stride, or null (statistics only); may be the memory of logits
    int64_t logits_stride, ref_stride, d_stride;  // in elements; d_stride counts fp32 or bf16
    const float* temperature;     // [rows]
    const int32_t* label_start;   // [rows + 1]
    const int64_t* labels;        // [labels], those of row i at label_start[i] ... label_start[i + 1]
    const float* inputs[FST_INPUTS];  // [labels] each or null. 0: the log-prob itself (always null here), 1: token weight n_t (needed
                                      // with d_logits), 2 ... : whatever the program reads; 5: the reference's log-prob, null = computed
    float* logprob;      // [labels]
    float* ref_logprob;  // [labels], null without ref
    float* coefficient;  // [labels] dLoss/dlogprob, null without d_logits
    float* label_logit;  // [labels] scratch, null without d_logits
    float *lse, *entropy;  // [rows]
    float* kl;             // [rows], null with FST_KL_NONE
    float softcap;         // 0: none
    float kl_coef, entropy_coef;
    int32_t kl_kind, d_is_bf16;
    int32_t threads, cluster, resident;  // 0, 0, -1: choose; resident 1 keeps the row in shared memory, 0 reads it twice
    int32_t instructions;
    FstInstruction program[FST_MAX_INSTRUCTIONS];
};

enum { FST_BAD_ARGUMENT = -1 };

int64_t fst_policy_rows_size();
int fst_policy_rows(const FstPolicyRows* rows, void* stream);  // 0, FST_BAD_ARGUMENT or the machine's error code
const char* fst_error(int code);
}
