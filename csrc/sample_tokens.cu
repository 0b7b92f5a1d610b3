// Sampling of next tokens: temperature, top-k, top-p, min-p, one random number per row, inverse distribution in vocabulary order.
// kernels/fst_kernels/sampling/reference.py defines what is computed; docs/kernels/sampling.md tells why it is built so.
//
// One cluster of blocks takes one row. It is read once and stays in shared memory as it came (fp32 or bf16); a row that fits nowhere is read
// again for every pass. Each warp owns a contiguous range of the vocabulary, each thread meets only elements that it read itself.
//
// A token's weight is exp((x - max) / T) as an integer multiple of 2^-40. Sums of integers have no order, so every number below is the
// same for every launch, and totals, thresholds and the final search agree to the last bit.
//
// Thresholds come from a radix search over the order-preserving bits of the logits, counted from the row's maximum down: 256 bins a round,
// by counts for top-k and by weights for top-p, over those elements that a cheap lower bound leaves (mostly some hundred, in a short list).
#include "sample_tokens.h"

#include "device.cuh"
#include "philox.h"

namespace fst {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kWarpSize = 32;
constexpr int kVector = 4;                     // neighbouring elements a thread takes at a time
constexpr int kTile = kWarpSize * kVector;     // what a warp takes at a time
constexpr int kDeep = 4;                       // tiles in flight while the row comes in
constexpr int kBins = 256;
constexpr int kListed = 1024;                  // candidates a block can list
constexpr float kOne = 1099511627776.0f;       // 2^40: the weight of the most probable token
constexpr uint32_t kLowestKey = 0x007fffffu;   // of -infinity
constexpr uint64_t kAll = ~uint64_t{0};

// ------------------------------------------------------------------------------------------------------------ sums over a row

struct Peak {
    float top = -INFINITY;
    int32_t bad = 0;  // NaN or +infinity was seen
};

FST_DEVICE Peak merge(Peak a, Peak b) { return {a.top < b.top ? b.top : a.top, a.bad | b.bad}; }

struct Mass {
    uint64_t above = 0;  // weight of the tokens above the threshold
    uint64_t ties = 0;   // number of those at it
};

FST_DEVICE Mass merge(Mass a, Mass b) { return {a.above + b.above, a.ties + b.ties}; }

template <class T>
struct Sum {
    T of_warp[kMaxThreads / kWarpSize], of_block;
};

struct Choice {
    uint64_t above, inside;  // of the bin's upper edge, of the bin
    uint32_t bin;
};

struct Rules {  // of this row
    double top_p;
    float log_min_p;
    int32_t top_k;

    FST_DEVICE bool truncate() const { return top_k > 0 || top_p < 1 || log_min_p > -INFINITY; }
};

FST_DEVICE Rules rules_of(const FstSampleTokens& p, int64_t row) {
    if ((p.temperature != nullptr ? p.temperature[row] : p.temperature_of_all) == 0) return {1, -INFINITY, 1};
    return {
        p.row_top_p != nullptr ? p.row_top_p[row] : p.top_p,
        p.row_log_min_p != nullptr ? p.row_log_min_p[row] : p.log_min_p,
        p.row_top_k != nullptr ? p.row_top_k[row] : p.top_k,
    };
}

struct Scratch {
    Rules rules;  // in a register for the whole kernel they would spill
    Sum<Peak> peak;
    Sum<Mass> total, nucleus, kept;
    uint64_t histogram[2][kBins];  // of this block; one is filled while the other may still be read by the neighbours
    uint64_t bins[kBins];          // of the cluster
    Choice choice;
    uint32_t listed;
    float list[kListed];
};

constexpr int64_t kScratchBytes = (sizeof(Scratch) + 15) / 16 * 16;

// The sum over all threads of the cluster, in every thread. Ends after a barrier of the cluster; each Sum serves once.
template <class T>
FST_DEVICE T cluster_total(T mine, Sum<T>& sum) {
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize, warps = block_threads() / kWarpSize;
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) mine = merge(mine, from_lane_above(mine, distance));
    if (lane == 0) sum.of_warp[warp] = mine;
    block_sync();
    if (warp == 0) {
        mine = lane < warps ? sum.of_warp[lane] : T();
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2) mine = merge(mine, from_lane_above(mine, distance));
        if (lane == 0) sum.of_block = mine;
    }
    cluster_sync();
    T total = *in_block(&sum.of_block, 0);
    for (int rank = 1; rank < cluster_blocks(); ++rank) total = merge(total, *in_block(&sum.of_block, rank));
    return total;
}

// ------------------------------------------------------------------------------------------------------------ the order of logits

FST_DEVICE uint32_t key_of(float x) {  // ascending with x; both zeros are one
    const uint32_t bits = bits_of(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FST_DEVICE float logit_of(uint32_t key) {
    if (key < kLowestKey) key = kLowestKey;
    return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Row {
    float top, temperature, inverse_temperature;
    uint32_t top_key;
};

FST_DEVICE uint32_t rank_of(float x, const Row& row) { return row.top_key - key_of(x); }  // 0 for the maximum
FST_DEVICE float at_rank(uint32_t rank, const Row& row) { return logit_of(rank > row.top_key ? 0 : row.top_key - rank); }
FST_DEVICE uint64_t weight_of(float x, const Row& row) { return to_integer(fast_exp((x - row.top) * row.inverse_temperature) * kOne); }

// ------------------------------------------------------------------------------------------------------------ elements

// Elements i ... i + kVector of a row as far as they lie before end, -infinity behind; whole: the row allows wide access.
template <class In>
FST_DEVICE void read(float (&out)[kVector], const In* row, int i, int end, bool whole) {
    if (whole && i + kVector <= end) {
        struct alignas(kVector * sizeof(In)) Four {
            In x[kVector];
        };
        const Four four = *reinterpret_cast<const Four*>(row + i);
        FST_UNROLL
        for (int j = 0; j < kVector; ++j) out[j] = to_float(four.x[j]);
    } else {
        FST_UNROLL
        for (int j = 0; j < kVector; ++j) out[j] = i + j < end ? to_float(row[i + j]) : -INFINITY;
    }
}

FST_DEVICE void keep(float* row, const float (&values)[kVector], int i) {
    struct alignas(16) Four {
        float x[kVector];
    };
    *reinterpret_cast<Four*>(row + i) = {values[0], values[1], values[2], values[3]};
}

FST_DEVICE void keep(bf16* row, const float (&values)[kVector], int i) {  // they came from bf16: nothing is rounded
    struct alignas(8) Four {
        bf16 x[kVector];
    };
    *reinterpret_cast<Four*>(row + i) = {to_bf16(values[0]), to_bf16(values[1]), to_bf16(values[2]), to_bf16(values[3])};
}

// The elements of this thread: where they come from after the first pass.
template <class In>
struct Slice {
    const In* row;
    int first, last;  // of the warp's range
    bool whole;

    template <class F>
    FST_DEVICE void each(F f) const {
        FST_ROLLED  // unrolled it spills
        for (int i = first + thread_index() % kWarpSize * kVector; i < last; i += kTile) {
            float x[kVector];
            read(x, row, i, last, whole);
            FST_UNROLL
            for (int j = 0; j < kVector; ++j)
                if (i + j < last) f(x[j]);
        }
    }
};

// ------------------------------------------------------------------------------------------------------------ the search

struct Found {
    uint32_t rank;        // the smallest at which the sum reaches the goal, or the end of a bin that reaches it exactly or is fine enough
    uint64_t short_of;    // goal - sum over all smaller ranks; kAll: everything at `rank` belongs
};

// For each(f) that calls f with the logits of this thread's items, `value` of one: sums by ascending rank < 2^bits until they reach goal, which
// their total does. rounds: how many at most; one makes the interval 256 times finer. Every block of the cluster finds the same.
template <class Each, class Value>
FST_DEVICE Found search(Scratch& scratch, int& buffer, const Row& row, Each each, Value value, uint64_t goal, int bits, int rounds) {
    const int thread = thread_index(), lane = thread % kWarpSize;
    uint32_t low = 0;
    int shift = bits > 8 ? bits - 8 : 0;
    for (uint64_t above = 0;; shift = shift > 8 ? shift - 8 : 0) {
        uint64_t* mine = scratch.histogram[buffer];
        each([&](float x) {
            const uint32_t rank = rank_of(x, row), bin = (rank - low) >> shift;
            if (rank >= low && bin < kBins) add_shared(&mine[bin], value(x));
        });
        cluster_sync();
        buffer ^= 1;
        for (int bin = thread; bin < kBins; bin += block_threads()) {
            uint64_t sum = 0;
            for (int rank = 0; rank < cluster_blocks(); ++rank) sum += *in_block(&mine[bin], rank);
            scratch.bins[bin] = sum;
            scratch.histogram[buffer][bin] = 0;
        }
        block_sync();
        if (thread < kWarpSize) {
            uint64_t sum = 0;
            for (int b = 0; b < kBins / kWarpSize; ++b) sum += scratch.bins[lane * (kBins / kWarpSize) + b];
            uint64_t through = sum;
            for (int distance = 1; distance < kWarpSize; distance *= 2) {
                const uint64_t below = from_lane(through, lane - distance);
                if (lane >= distance) through += below;
            }
            uint64_t before = above + through - sum;
            if (before < goal && goal <= above + through)
                for (int bin = lane * (kBins / kWarpSize);; ++bin) {
                    const uint64_t inside = scratch.bins[bin];
                    if (goal <= before + inside) {
                        scratch.choice = {before, inside, static_cast<uint32_t>(bin)};
                        break;
                    }
                    before += inside;
                }
        }
        block_sync();
        const Choice choice = scratch.choice;
        above = choice.above;
        low += choice.bin << shift;
        if (shift == 0 && above + choice.inside != goal) return {low, goal - above};
        if (above + choice.inside == goal || --rounds == 0) return {low + (uint32_t{1} << shift) - 1, kAll};
    }
}

FST_DEVICE int bits_needed(uint32_t largest) {
    int bits = 0;
    while (bits < 32 && largest >> bits) ++bits;
    return bits;
}

// ------------------------------------------------------------------------------------------------------------ the kernel

struct Kept {  // x > threshold, the first `ties` of those at it, and no further below the maximum than `lowest`
    float threshold = -INFINITY, lowest = -INFINITY;
    uint64_t ties = 0, weight_of_tie = 0;

    FST_DEVICE Mass of(float x, const Row& row) const {
        if (x < threshold || !(x - row.top >= lowest)) return {};
        return x == threshold ? Mass{0, 1} : Mass{weight_of(x, row), 0};
    }
    FST_DEVICE uint64_t through(const Mass& m) const { return m.above + (m.ties < ties ? m.ties : ties) * weight_of_tie; }
};

template <bool kResident, class In>
FST_KERNEL void FST_BOUNDS(kMaxThreads, 2) sample_tokens(FstSampleTokens p) {
    const int rank = cluster_rank(), blocks = cluster_blocks(), thread = thread_index(), lane = thread % kWarpSize;
    const int warp = thread / kWarpSize, warps = block_threads() / kWarpSize, vocabulary = static_cast<int>(p.vocabulary);
    const int64_t at = block_index() / blocks;
    const int range = ((vocabulary + warps * blocks - 1) / (warps * blocks) + kTile - 1) / kTile * kTile;
    const int begin = rank * warps * range;  // of the block
    const int first = begin + warp * range, last = first + range < vocabulary ? first + range : vocabulary;

    const In* logits = static_cast<const In*>(p.logits) + at * p.stride;
    const bool whole = reinterpret_cast<uintptr_t>(p.logits) % (kVector * sizeof(In)) == 0 && p.stride % kVector == 0;
    auto& scratch = *reinterpret_cast<Scratch*>(shared_memory());
    In* kept_row = reinterpret_cast<In*>(shared_memory() + kScratchBytes) - begin;
    for (int bin = thread; bin < kBins; bin += block_threads()) scratch.histogram[0][bin] = 0;
    if (thread == 0) {
        scratch.listed = 0;
        scratch.rules = rules_of(p, at);
    }
    int buffer = 0;

    // The row comes in: its maximum, and this thread's own.
    Peak peak;
    for (int start = first + lane * kVector; start < last; start += kTile * kDeep) {
        float x[kDeep][kVector];
        FST_UNROLL
        for (int d = 0; d < kDeep; ++d) read(x[d], logits, start + d * kTile, last, whole);
        FST_UNROLL
        for (int d = 0; d < kDeep; ++d) {
            if (kResident && start + d * kTile < last) keep(kept_row, x[d], start + d * kTile);
            FST_UNROLL
            for (int j = 0; j < kVector; ++j) {
                if (peak.top < x[d][j]) peak.top = x[d][j];
                if (!(x[d][j] < INFINITY)) peak.bad = 1;
            }
        }
    }
    const float own_top = peak.top;
    peak = cluster_total(peak, scratch.peak);
    if (peak.bad || peak.top == -INFINITY) {
        if (rank == 0 && thread == 0) p.ids[at] = 0, p.logprob[at] = p.untruncated[at] = NAN;
        cluster_sync();  // no block ends while another reads its shared memory
        return;
    }
    const float given = p.temperature != nullptr ? p.temperature[at] : p.temperature_of_all;
    Row row{peak.top, given == 0 ? 1 : given, 1, key_of(peak.top)};
    const Rules& rules = scratch.rules;
    row.inverse_temperature = 1 / row.temperature < 3.0e38f ? 1 / row.temperature : 3.0e38f;
    const Slice<In> slice{kResident ? kept_row : logits, first, last, kResident || whole};

    uint64_t sum = 0;
    slice.each([&](float x) { sum += weight_of(x, row); });
    const Mass total = cluster_total(Mass{sum, 0}, scratch.total);

    // What is kept.
    Kept kept;
    if (rules.top_k == 1) {
        kept.threshold = row.top;
        kept.ties = 1;
    } else if (rules.top_k > 0 || rules.top_p < 1) {
        // Candidates: at least the k-th largest of the threads' maxima, or too probable for all that is less to matter for top-p.
        float least = -INFINITY, lowest = -INFINITY;
        const auto one = [](float) { return uint64_t{1}; };
        if (rules.top_k == 0) {
            // V tokens that weigh less than this are less than 1 - top_p of the whole; one unit is for their rounding.
            const float share = static_cast<float>((1 - rules.top_p) * static_cast<double>(total.above)) / vocabulary - 1;
            if (share > 0) {
                lowest = row.temperature * (logf(share / kOne) - 0.01f);
                least = row.top + 1.0001f * lowest - 1e-5f * (fabsf(row.top) + 1);
            }
        } else if (rules.top_k <= block_threads() * blocks) {
            const auto maxima = [&](auto f) { f(own_top); };
            least = at_rank(search(scratch, buffer, row, maxima, one, rules.top_k, 32, 2).rank, row);
        }
        const auto candidate = [&](float x) { return x >= least && x - row.top >= lowest; };
        slice.each([&](float x) {
            if (!candidate(x)) return;
            const uint32_t place = add_shared(&scratch.listed, 1u);
            if (place < kListed) scratch.list[place] = x;
        });
        block_sync();
        const uint32_t listed = scratch.listed;
        const auto each = [&](auto f) {
            if (listed <= kListed) {
                for (uint32_t i = thread; i < listed; i += block_threads()) f(scratch.list[i]);
            } else {
                slice.each([&](float x) {
                    if (candidate(x)) f(x);
                });
            }
        };
        const int bits = bits_needed(rank_of(least, row));
        uint64_t nucleus = total.above;
        if (rules.top_k > 0) {
            const Found found = search(scratch, buffer, row, each, one, rules.top_k, bits, 4);
            kept.threshold = at_rank(found.rank, row);
            kept.ties = found.short_of;
            kept.weight_of_tie = weight_of(kept.threshold, row);
            if (rules.top_p < 1) {
                Mass mine;
                each([&](float x) { mine = merge(mine, kept.of(x, row)); });
                nucleus = kept.through(cluster_total(mine, scratch.nucleus));
            }
        }
        if (rules.top_p < 1) {
            uint64_t goal = static_cast<uint64_t>(ceil(rules.top_p * static_cast<double>(nucleus)));
            goal = goal < 1 ? 1 : goal < nucleus ? goal : nucleus;
            const Found found = search(scratch, buffer, row, each, [&](float x) { return weight_of(x, row); }, goal, bits, 4);
            kept.threshold = at_rank(found.rank, row);
            const uint64_t one_tie = weight_of(kept.threshold, row);
            kept.ties = found.short_of == kAll ? kAll : (found.short_of + one_tie - 1) / one_tie;
        }
    }
    kept.weight_of_tie = weight_of(kept.threshold, row);
    kept.lowest = row.temperature * rules.log_min_p;
    Mass all = total;
    if (rules.truncate()) {
        Mass mine;
        slice.each([&](float x) { mine = merge(mine, kept.of(x, row)); });
        all = cluster_total(mine, scratch.kept);
    }
    const Sum<Mass>& sums = rules.truncate() ? scratch.kept : scratch.total;

    // The first token whose cumulative weight exceeds the target: first its warp, then its tile and thread.
    const uint64_t mass = kept.through(all);
    const uint64_t target = high_product(uint64_t{random_word(p.seeds[at], p.positions[at])} << 32, mass);
    Mass so_far;
    for (int r = 0; r < rank; ++r) so_far = merge(so_far, *in_block(&sums.of_block, r));
    for (int w = 0; w < warp; ++w) so_far = merge(so_far, sums.of_warp[w]);
    if (kept.through(so_far) <= target && target < kept.through(merge(so_far, sums.of_warp[warp]))) {
        for (int tile = first; tile < last && kept.through(so_far) <= target; tile += kTile) {
            float x[kVector];
            const int i = tile + lane * kVector;
            read(x, slice.row, i, last, slice.whole);
            Mass mine;
            for (int j = 0; j < kVector; ++j)
                if (i + j < last) mine = merge(mine, kept.of(x[j], row));
            Mass through = mine;
            for (int distance = 1; distance < kWarpSize; distance *= 2) {
                const Mass below = from_lane(through, lane - distance);
                if (lane >= distance) through = merge(through, below);
            }
            Mass before{so_far.above + through.above - mine.above, so_far.ties + through.ties - mine.ties};
            for (int j = 0; j < kVector && i + j < last; ++j) {
                const Mass next = merge(before, kept.of(x[j], row));
                if (kept.through(before) <= target && target < kept.through(next)) {
                    const float distance = (x[j] - row.top) / row.temperature;
                    p.ids[at] = i + j;
                    p.untruncated[at] = distance - logf(static_cast<float>(total.above) / kOne);
                    p.logprob[at] = distance - logf(static_cast<float>(mass) / kOne);
                }
                before = next;
            }
            so_far = merge(so_far, from_lane(through, kWarpSize - 1));
        }
    }
    cluster_sync();  // no block ends while another reads its shared memory
}

// ------------------------------------------------------------------------------------------------------------ launch

int64_t shared_bytes_of(const FstSampleTokens& p, int threads, int cluster) {
    const int64_t warps = static_cast<int64_t>(threads / kWarpSize) * cluster;
    const int64_t range = ((p.vocabulary + warps - 1) / warps + kTile - 1) / kTile * kTile;
    return kScratchBytes + range * (threads / kWarpSize) * (p.logits_are_bf16 ? 2 : 4);
}

// The smallest cluster that leaves room for two blocks per multiprocessor, else the smallest that fits, else one block that reads again.
template <class In>
int launch_as(const FstSampleTokens& p, void* stream) {
    Machine at;
    if (const int error = machine(at)) return error;
    const int threads = p.threads ? p.threads : at.threads;
    int cluster = p.cluster;
    if (threads % kWarpSize || threads < kWarpSize || threads > kMaxThreads) return FST_BAD_ARGUMENT;
    if (cluster < 0 || cluster > at.max_cluster || (cluster & (cluster - 1)) || (p.resident == 0 && cluster > 1)) return FST_BAD_ARGUMENT;
    if (p.resident != 0) {
        if (cluster == 0)
            for (const int64_t room : {at.shared_bytes / 2 - 1024, at.shared_bytes})
                for (int c = 1; c <= at.max_cluster && cluster == 0; c *= 2)
                    if (shared_bytes_of(p, threads, c) <= room) cluster = c;
        const int64_t bytes = cluster > 0 ? shared_bytes_of(p, threads, cluster) : 0;
        if (cluster > 0 && bytes <= at.shared_bytes)
            return launch(sample_tokens<true, In>, p.rows * cluster, cluster, threads, bytes, stream, p);
        if (p.resident == 1 || p.cluster > 1) return FST_BAD_ARGUMENT;
    }
    return launch(sample_tokens<false, In>, p.rows, 1, threads, kScratchBytes, stream, p);
}

}  // namespace
}  // namespace fst

extern "C" {

int64_t fst_sample_tokens_size() { return sizeof(FstSampleTokens); }

int fst_sample_tokens(const FstSampleTokens* tokens, void* stream) {
    const FstSampleTokens& p = *tokens;
    if (p.rows == 0) return 0;
    if (p.rows < 0 || p.rows > (int64_t{1} << 27) || p.vocabulary < 1 || p.vocabulary > FST_LARGEST_VOCABULARY) return FST_BAD_ARGUMENT;
    if (p.top_k < 0 || !(p.top_p > 0)) return FST_BAD_ARGUMENT;
    return p.logits_are_bf16 ? fst::launch_as<fst::bf16>(p, stream) : fst::launch_as<float>(p, stream);
}

const char* fst_error(int code) { return code == FST_BAD_ARGUMENT ? "an argument is out of range" : fst::machine_error(code); }
}
