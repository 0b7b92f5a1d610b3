// Runs policy_rows in every shape of launch for ThreadSanitizer, and checks that rows of the gradient sum to zero. Built and run by
// races.sh, which also shows that each barrier of the kernel is needed.
#include "../policy_rows.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kRows = 2, kLabelsOfRow = 70;

int check(int vocabulary, int cluster, int resident, bool with_ref, bool in_bf16) {
    std::vector<float> x(kRows * vocabulary), y(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.37f * i), y[i] = std::cos(0.11f * i);
    std::vector<int32_t> start;
    std::vector<int64_t> labels;
    for (int row = 0; row <= kRows; ++row) start.push_back(row * kLabelsOfRow);
    for (int m = 0; m < kRows * kLabelsOfRow; ++m) labels.push_back((m * 13) % vocabulary);
    const size_t count = labels.size();
    std::vector<float> temperature(kRows, 0.7f), weight(count, 0.5f), logprob(count), ref_logprob(count), coefficient(count), logit(count);
    std::vector<float> lse(kRows), entropy(kRows), kl(kRows);
    FstPolicyRows p{};
    p.rows = kRows, p.vocabulary = vocabulary;
    p.logits = x.data(), p.ref = with_ref ? y.data() : nullptr, p.d_logits = x.data();
    p.logits_stride = p.ref_stride = vocabulary, p.d_stride = in_bf16 ? 2 * vocabulary : vocabulary;
    p.temperature = temperature.data(), p.label_start = start.data(), p.labels = labels.data();
    p.inputs[1] = weight.data();
    p.logprob = logprob.data(), p.ref_logprob = with_ref ? ref_logprob.data() : nullptr;
    p.coefficient = coefficient.data(), p.label_logit = logit.data();
    p.lse = lse.data(), p.entropy = entropy.data(), p.kl = with_ref ? kl.data() : nullptr;
    p.kl_coef = 0.3f, p.entropy_coef = 0.1f, p.kl_kind = with_ref ? FST_KL_REVERSE : FST_KL_NONE;
    p.d_is_bf16 = in_bf16, p.threads = 64, p.cluster = cluster, p.resident = resident;
    p.instructions = 1, p.program[0] = {FST_INPUT, 1, 0, 0, 0};
    if (const int error = fst_policy_rows(&p, nullptr)) return std::printf("%s\n", fst_error(error)), 1;
    for (int row = 0; row < kRows; ++row) {
        double sum = 0;
        for (int v = 0; v < vocabulary; ++v) {
            float d = x[row * vocabulary + v];
            if (in_bf16) {
                uint32_t bits = reinterpret_cast<uint16_t*>(x.data())[row * 2 * vocabulary + v] << 16;
                std::memcpy(&d, &bits, 4);
            }
            sum += d;
        }
        if (!(std::fabs(sum) < (in_bf16 ? 0.5 : 1e-3))) return std::printf("row %d sums to %g\n", row, sum), 1;
    }
    return 0;
}

}  // namespace

int main() {
    int failed = 0;
    for (int cluster = 1; cluster <= 2; ++cluster) failed |= check(603, cluster, 1, true, true);
    failed |= check(600, 2, 1, false, false);
    failed |= check(603, 1, 0, true, true);
    return failed;
}
