// Sampling of next tokens on a CPU, a row after the other, rows shared among threads; kernels/fst_kernels/sampling/reference.py defines what
// is computed. The C interface is that of the CUDA kernel, for float32 logits.

#include "../sample_tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../philox.h"
#include "vector.hpp"

namespace {

using namespace fst;

constexpr float NONE = -std::numeric_limits<float>::infinity(), NAN_ = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t FIRST_LOOK = 256;  // of the most probable tokens, sorted at first for top_p; four times as many where they are too few

struct Rules {  // of one row
    int64_t top_k;
    double top_p;
    float log_min_p;

    Rules(const FstSampleTokens& p, int64_t at)
        : top_k(p.row_top_k ? p.row_top_k[at] : p.top_k),
          top_p(p.row_top_p ? p.row_top_p[at] : p.top_p),
          log_min_p(p.row_log_min_p ? p.row_log_min_p[at] : p.log_min_p) {}

    bool truncate() const { return top_k > 0 || top_p < 1 || log_min_p > NONE; }
};

struct Row {
    std::vector<float> logits, weights;  // padded to whole vectors: -infinity, 0
    std::vector<int32_t> order;
    int64_t vocabulary;
    float top;
    int64_t best;  // the first of the largest
    double mass;   // sum of the weights exp((x - top) / temperature)

    // False: no probabilities can be had from it.
    bool read(const FstSampleTokens& p, int64_t at) {
        vocabulary = p.vocabulary;
        const int64_t padded = (vocabulary + LANES - 1) / LANES * LANES;
        logits.assign(padded, NONE);
        weights.resize(padded);
        std::memcpy(logits.data(), static_cast<const float*>(p.logits) + at * p.stride, vocabulary * sizeof(float));
        vec most = all(NONE);
        ints bad = {};
        for (int64_t i = 0; i < padded; i += LANES) {
            const vec x = load(&logits[i]);
            most = larger(x, most);
            bad |= ~(x < std::numeric_limits<float>::infinity());
        }
        top = largest(most);
        for (int lane = 0; lane < LANES; ++lane) {
            if (bad[lane]) return false;
        }
        if (top == NONE) return false;
        best = std::find(logits.begin(), logits.end(), top) - logits.begin();
        return true;
    }

    void weigh(float temperature) {
        mass = 0;
        for (size_t i = 0; i < logits.size(); i += LANES) {
            const vec w = exp((load(&logits[i]) - top) / temperature);
            store(&weights[i], w);
            mass += sum(w);
        }
    }

    // The `count` most probable tokens, in order, in order[0 ... count).
    void sort(int64_t count) {
        if (order.empty()) {
            order.resize(vocabulary);
            for (int64_t i = 0; i < vocabulary; ++i) order[i] = static_cast<int32_t>(i);
        }
        const auto before = [this](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
        if (count < vocabulary) std::nth_element(order.begin(), order.begin() + count, order.end(), before);
        std::sort(order.begin(), order.begin() + count, before);
    }

    // Only the tokens that the rules leave keep their weights.
    void truncate(const Rules& p, float temperature) {
        order.clear();
        int64_t kept = p.top_k > 0 ? std::min(p.top_k, vocabulary) : vocabulary;
        if (p.top_p < 1) {
            double all = mass;
            int64_t sorted = 0;
            if (p.top_k > 0) {
                sort(sorted = kept);
                all = 0;
                for (int64_t i = 0; i < kept; ++i) all += weights[order[i]];
            }
            double before = 0;
            for (int64_t i = 0; i < kept; ++i) {
                if (i == sorted) sort(sorted = std::min(vocabulary, sorted ? 4 * sorted : FIRST_LOOK));
                if (before >= p.top_p * all) kept = i;
                else before += weights[order[i]];
            }
        } else if (kept < vocabulary) {
            sort(kept);
        }
        if (kept < vocabulary) {
            for (int64_t i = kept; i < vocabulary; ++i) weights[order[i]] = 0;
        }
        if (p.log_min_p > NONE) {
            const float lowest = temperature * p.log_min_p;
            for (int64_t i = 0; i < vocabulary; ++i) {
                if (!(logits[i] - top >= lowest)) weights[i] = 0;
            }
        }
    }

    // The first token whose cumulative weight exceeds the share u of all; sets mass to that of all.
    int64_t draw(double u) {
        double before = 0;
        for (int64_t i = 0; i < vocabulary; ++i) before += weights[i];
        mass = before;
        const double target = u * mass;
        before = 0;
        int64_t last = 0;
        for (int64_t i = 0; i < vocabulary; ++i) {
            before += weights[i];
            if (weights[i] > 0) last = i;
            if (before > target) return i;
        }
        return last;
    }
};

void sample(const FstSampleTokens& p, Row& row, int64_t at) {
    if (!row.read(p, at)) {
        p.ids[at] = 0;
        p.logprob[at] = p.untruncated[at] = NAN_;
        return;
    }
    const float given = p.temperature ? p.temperature[at] : p.temperature_of_all, temperature = given == 0 ? 1 : given;
    row.weigh(temperature);
    const double all = row.mass;
    const Rules rules(p, at);
    const bool truncated = rules.truncate();
    int64_t id = row.best;
    if (given != 0) {
        if (truncated) row.truncate(rules, temperature);
        id = row.draw(random_word(p.seeds[at], p.positions[at]) * 0x1p-32);
    }
    const double score = (row.logits[id] - row.top) / static_cast<double>(temperature);
    p.ids[at] = id;
    p.untruncated[at] = static_cast<float>(score - std::log(all));
    p.logprob[at] = given == 0 ? 0 : truncated ? static_cast<float>(score - std::log(row.mass)) : p.untruncated[at];
}

}  // namespace

int64_t fst_sample_tokens_size() { return sizeof(FstSampleTokens); }

const char* fst_error(int) { return "an argument is out of range"; }

int fst_sample_tokens(const FstSampleTokens* p, void*) {
    if (p->rows < 0 || p->vocabulary < 1 || p->vocabulary > FST_LARGEST_VOCABULARY || p->logits_are_bf16) return FST_BAD_ARGUMENT;
#pragma omp parallel if (p->rows > 1 && p->rows * p->vocabulary > WORTH_A_THREAD)
    {
        Row row;
#pragma omp for schedule(static)
        for (int64_t at = 0; at < p->rows; ++at) sample(*p, row, at);
    }
    return 0;
}
