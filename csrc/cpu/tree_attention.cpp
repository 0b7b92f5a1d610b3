// Attention of queries, each over the nodes of its path through a tree and then over its own suffix, on a CPU in float32.
//
// Decoding: a query is a sequence's new token, its suffix what it has sampled. Prefill and scoring: a query is a prompt's token, its suffix
// its own node up to itself. Queries are ranked so that those below one node are neighbours; a task takes a block of ranks and one KV
// head and goes down the tree: every 64 keys are found once and met by all queries of the block that stand below them, whose softmax goes on
// from the keys before. Where keys are cut depends on the segment's own length alone, so a query's result is the same to the bit whoever its
// neighbours are and however many threads run.

#include "tree_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "vector.hpp"

namespace {

using namespace fst;

constexpr int KEYS = 64;    // met at a time
constexpr int RANKS = 16;   // of a task
constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Keys {
    const float* k[KEYS];  // behind the last one it is repeated, so that eight can always be read
    const float* v[KEYS];
    int count;
};

struct Row {
    const float* q;
    float* acc;    // [D] sum of exp(score - most) * value
    float* most;   // the largest score so far
    float* total;  // sum of exp(score - most)
    int first;     // the first key of the chunk that it sees
};

// Scores of R rows, R * K == 8, against K keys at a time: s[r][key].
template <int R>
void scores_of(const Row* rows, const Keys& keys, int dim, float scale, float (*s)[KEYS]) {
    constexpr int K = 8 / R;
    const int whole = dim / LANES * LANES;
    for (int key = 0; key < keys.count; key += K) {
        vec a[8] = {};
        for (int d = 0; d < whole; d += LANES) {
            for (int i = 0; i < K; ++i) {
                const vec k = held(load(keys.k[key + i] + d));
                for (int r = 0; r < R; ++r) a[r * K + i] += load(rows[r].q + d) * k;
            }
        }
        vec x = sums(a);
        for (int d = whole; d < dim; ++d) {
            for (int i = 0; i < 8; ++i) x[i] += rows[i / K].q[d] * keys.k[key + i % K][d];
        }
        x *= scale;
        for (int r = 0; r < R; ++r) std::memcpy(s[r] + key, reinterpret_cast<const float*>(&x) + r * K, K * sizeof(float));
    }
}

// acc += p V over keys [first, count), of V vectors from dimension d on.
template <int R, int V>
void add_vectors(const Row* rows, const Keys& keys, int first, int d, const float (*p)[KEYS]) {
    vec a[R][V];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < V; ++i) a[r][i] = load(rows[r].acc + d + i * LANES);
    }
    for (int key = first; key < keys.count; ++key) {
        for (int i = 0; i < V; ++i) {
            const vec v = held(load(keys.v[key] + d + i * LANES));
            for (int r = 0; r < R; ++r) a[r][i] += p[r][key] * v;
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < V; ++i) store(rows[r].acc + d + i * LANES, a[r][i]);
    }
}

template <int R>
void add_values(const Row* rows, const Keys& keys, int first, int dim, const float (*p)[KEYS]) {
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) add_vectors<R, 4>(rows, keys, first, d, p);
    for (; d + LANES <= dim; d += LANES) add_vectors<R, 1>(rows, keys, first, d, p);
    for (; d < dim; ++d) {
        for (int r = 0; r < R; ++r) {
            for (int key = first; key < keys.count; ++key) rows[r].acc[d] += p[r][key] * keys.v[key][d];
        }
    }
}

// R rows, which see the same keys of the chunk, meet them.
template <int R>
void meet(const Row* rows, const Keys& keys, int dim, float scale) {
    float p[R][KEYS];
    scores_of<R>(rows, keys, dim, scale, p);
    const int first = rows[0].first, padded = (keys.count + LANES - 1) / LANES * LANES;
    vec top[R], added[R] = {};
    for (int r = 0; r < R; ++r) {
        for (int key = 0; key < first; ++key) p[r][key] = NONE;
        for (int key = keys.count; key < padded; ++key) p[r][key] = NONE;
        top[r] = load(p[r]);
    }
    for (int key = LANES; key < padded; key += LANES) {
        for (int r = 0; r < R; ++r) top[r] = larger(top[r], load(p[r] + key));
    }
    for (int r = 0; r < R; ++r) {
        const float before = *rows[r].most, most = std::max(before, largest(top[r]));
        top[r] = all(most);
        if (most == before) continue;
        const float shrink = std::exp(before - most);  // 0 before the first key
        *rows[r].total *= shrink;
        *rows[r].most = most;
        for (int d = 0; d < dim; ++d) rows[r].acc[d] *= shrink;
    }
    for (int key = 0; key < padded; key += LANES) {
        for (int r = 0; r < R; ++r) {
            const vec e = exp(load(p[r] + key) - top[r]);
            added[r] += e;
            store(p[r] + key, e);
        }
    }
    for (int r = 0; r < R; ++r) *rows[r].total += sum(added[r]);
    add_values<R>(rows, keys, first, dim, p);
}

int64_t suffix_slot(const FstTreeAttention& a, int64_t entry) {
    return a.suffix_slots_are_wide ? static_cast<const int64_t*>(a.suffix_slots)[entry]
                                   : static_cast<const int32_t*>(a.suffix_slots)[entry];
}

bool suffix_is_sound(const FstTreeAttention& a, int64_t query) {
    const int64_t length = a.suffix_lengths[query], page = a.suffix_page ? a.suffix_page : a.suffix_capacity;
    if (length < 0 || length > a.suffix_capacity) return false;
    for (int64_t at = 0; at * page < length; ++at) {
        const int64_t first = suffix_slot(a, query * a.suffix_pages + at);
        if (first < 0 || first + std::min(page, length - at * page) > a.slots) return false;
    }
    return true;
}

class Task {
public:
    Task(const FstTreeAttention& a, int64_t head) : a_(a), head_(head) {
        const size_t rows = RANKS * a.group;
        acc_.resize(rows * a.dim);
        most_.resize(rows);
        total_.resize(rows);
        rows_.reserve(rows);
    }

    void run(int64_t begin, int64_t end) {
        begin_ = begin;
        std::fill(acc_.begin(), acc_.end(), 0.0f);
        std::fill(most_.begin(), most_.end(), NONE);
        std::fill(total_.begin(), total_.end(), 0.0f);
        for (int64_t level = 0; level < a_.levels; ++level) {
            const int32_t* from = a_.run_first + a_.level_begin[level];
            const int32_t* to = a_.run_first + a_.level_begin[level + 1];
            const int32_t* after = std::upper_bound(from, to, static_cast<int32_t>(begin));
            int64_t run = (after == from ? from : after - 1) - a_.run_first;
            for (; run < a_.level_begin[level + 1] && a_.run_first[run] < end; ++run) node(run, end);
        }
        for (int64_t rank = begin; rank < end; ++rank) suffix(rank);
        for (int64_t rank = begin; rank < end; ++rank) write(rank);
    }

private:
    void node(int64_t run, int64_t end) {
        const int64_t from = std::max<int64_t>(a_.run_first[run], begin_);
        const int64_t to = std::min<int64_t>(a_.run_first[run] + a_.run_count[run], end);
        if (from >= to) return;
        const int32_t* pages = a_.node_slots + a_.run_entry[run];
        for (int64_t key = 0; key < a_.run_length[run]; key += KEYS) {
            find(key, a_.run_length[run], a_.node_page, [&](int64_t page) { return int64_t{pages[page]}; });
            meet_all(from, to, a_.run_above[run] + key);
        }
    }

    void suffix(int64_t rank) {
        const int64_t sequence = a_.order[rank], length = a_.suffix_lengths[sequence], past = a_.past[sequence];
        const int64_t entry = sequence * a_.suffix_pages;
        for (int64_t key = 0; key < length; key += KEYS) {
            find(key, length, a_.suffix_page, [&](int64_t page) { return suffix_slot(a_, entry + page); });
            meet_all(rank, rank + 1, past + key);
        }
    }

    // The keys from `key` on of a segment of `length`; first(page): the slot where a page begins.
    template <class First>
    void find(int64_t key, int64_t length, int64_t page, First first) {
        const int count = static_cast<int>(std::min<int64_t>(KEYS, length - key));
        const int padded = (count + LANES - 1) / LANES * LANES;
        keys_.count = count;
        const float *k = a_.k + head_ * a_.k_head, *v = a_.v + head_ * a_.v_head;
        if (!page || page % KEYS == 0) {  // one piece
            const int64_t slot = page ? first(key / page) + key % page : first(0) + key;
            k += slot * a_.k_slot;
            v += slot * a_.v_slot;
            for (int i = 0; i < count; ++i) keys_.k[i] = k + i * a_.k_slot;
            for (int i = 0; i < count; ++i) keys_.v[i] = v + i * a_.v_slot;
        } else {
            for (int i = 0; i < count; ++i) {
                const int64_t slot = first((key + i) / page) + (key + i) % page;
                keys_.k[i] = k + slot * a_.k_slot;
                keys_.v[i] = v + slot * a_.v_slot;
            }
        }
        for (int i = count; i < padded; ++i) keys_.k[i] = keys_.k[count - 1];
    }

    // The queries of these ranks meet the keys found, of which `above` lie above on their path.
    void meet_all(int64_t from, int64_t to, int64_t above) {
        rows_.clear();
        for (int64_t rank = from; rank < to; ++rank) {
            const int64_t sequence = a_.order[rank];
            int64_t first = 0;
            if (a_.window) first = a_.past[sequence] + a_.suffix_lengths[sequence] - a_.window - above;
            if (first >= keys_.count) continue;
            for (int64_t g = 0; g < a_.group; ++g) {
                const size_t row = (rank - begin_) * a_.group + g;
                const float* q = a_.q + sequence * a_.q_row + (head_ * a_.group + g) * a_.q_head;
                rows_.push_back({q, &acc_[row * a_.dim], &most_[row], &total_[row], static_cast<int>(std::max<int64_t>(first, 0))});
            }
        }
        const int dim = static_cast<int>(a_.dim);
        size_t row = 0;
        for (; row + 1 < rows_.size(); ++row) {
            if (rows_[row].first != rows_[row + 1].first) {
                meet<1>(&rows_[row], keys_, dim, a_.scale);
            } else {
                meet<2>(&rows_[row++], keys_, dim, a_.scale);
            }
        }
        if (row < rows_.size()) meet<1>(&rows_[row], keys_, dim, a_.scale);
    }

    void write(int64_t rank) {
        for (int64_t g = 0; g < a_.group; ++g) {
            const size_t row = (rank - begin_) * a_.group + g;
            const int64_t head = head_ * a_.group + g, sequence = a_.order[rank];
            const bool blind = total_[row] == 0.0f;  // it has met no key; NaN is not 0
            const float share = blind ? 0.0f : 1.0f / total_[row];
            float* out = a_.out + sequence * a_.out_row + head * a_.out_head;
            for (int64_t d = 0; d < a_.dim; ++d) out[d] = acc_[row * a_.dim + d] * share;
            a_.lse[sequence * a_.lse_row + head * a_.lse_head] = blind ? NONE : most_[row] + std::log(total_[row]);
        }
    }

    const FstTreeAttention& a_;
    const int64_t head_;
    int64_t begin_ = 0;
    std::vector<float> acc_, most_, total_;
    std::vector<Row> rows_;
    Keys keys_;
};

}  // namespace

int64_t fst_tree_attention_size() { return sizeof(FstTreeAttention); }

int64_t fst_tree_attention(const FstTreeAttention* a) {
    for (int64_t query = 0; query < a->queries; ++query) {
        if (!suffix_is_sound(*a, query)) return query;
    }
    const int64_t blocks = (a->queries + RANKS - 1) / RANKS;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads)
    for (int64_t task = 0; task < blocks * a->kv_heads; ++task) {
        const int64_t begin = task % blocks * RANKS;
        Task(*a, task / blocks).run(begin, std::min(begin + RANKS, a->queries));
    }
    return -1;
}
