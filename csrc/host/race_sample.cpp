// Runs sample_tokens in every shape of launch for ThreadSanitizer, and checks the draws. Built and run by races.sh, which also shows that
// each barrier of the kernel is needed.
#include "../sample_tokens.h"

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

constexpr int kRows = 1;

// equal: all logits alike, so that the lowest top_k ids stay and candidates overflow the list where there are many.
int check(int vocabulary, int cluster, int resident, int top_k, double top_p, bool equal) {
    std::vector<float> x(static_cast<size_t>(kRows) * vocabulary, 1.0f);
    for (size_t i = 0; i < x.size() && !equal; ++i) x[i] = 4 * std::sin(0.37f * i);
    std::vector<int64_t> seeds{1}, positions{7}, ids(kRows, -1);
    std::vector<float> logprob(kRows), untruncated(kRows);
    FstSampleTokens p{};
    p.rows = kRows, p.vocabulary = p.stride = vocabulary, p.logits = x.data();
    p.temperature_of_all = 0.9f, p.seeds = seeds.data(), p.positions = positions.data();
    p.ids = ids.data(), p.logprob = logprob.data(), p.untruncated = untruncated.data();
    p.top_p = top_p, p.log_min_p = -INFINITY, p.top_k = top_k;
    p.threads = 64, p.cluster = cluster, p.resident = resident;
    if (const int error = fst_sample_tokens(&p, nullptr)) return std::printf("error %d\n", error), 1;
    for (int row = 0; row < kRows; ++row) {
        const bool possible = ids[row] >= 0 && ids[row] < (equal && top_k ? top_k : vocabulary);
        if (!possible || !(logprob[row] >= untruncated[row]) || !(logprob[row] <= 0))
            return std::printf("row %d: id %ld, %g, %g\n", row, static_cast<long>(ids[row]), logprob[row], untruncated[row]), 1;
        if (equal && top_k && std::fabs(logprob[row] + std::log(1.0f * top_k)) > 1e-5f) return std::printf("logprob %g\n", logprob[row]), 1;
    }
    return 0;
}

}  // namespace

int main() {
    int failed = 0;
    for (int cluster = 1; cluster <= 2; ++cluster) failed |= check(603, cluster, 1, 20, 0.8, false);
    failed |= check(1500, 1, 0, 700, 1, true);
    failed |= check(603, 2, 1, 0, 0.7, false);
    failed |= check(300, 1, 0, 0, 1, false);
    return failed;
}
