// The row kernel of linear_policy_loss. One cluster of blocks takes one row of logits x and, if given, of the reference's logits y:
//     z = softcap(x) / T, r = softcap(y) / T  ->  lse, entropy, KL, log-probs of the row's labels
//     dLoss/dx = (1/T) softcap'(x) { p (b1 log p - b2 log q + b0) - k q + c [v = label] }.
// The row is read once, stays in shared memory (of one block or spread over a cluster), and its gradient is written once. A row that
// fits nowhere is read twice, by one block.
//
// c, the derivative by a label's log-prob, is not written here: the caller passes the objective as a little program over numbers
// per label (see FstInstruction), made from the Python function that defines it, and a thread runs it once per label.
//
// Logits enter as differences to the row's maximum, so that +-200 costs no digits. All sums have an order that depends on the
// vocabulary and the launch alone: same row, same bits, whatever is beside it.
#include "policy_rows.h"

#include "device.cuh"

namespace fst {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kWarpSize = 32;
constexpr int kVector = 4;  // elements a thread takes at a time
constexpr float kLowest = -3.0e38f;

// ------------------------------------------------------------------------------------------------------------ sums over a row

// With d = z - z_max and g = r - r_max: sum e^d, sum e^d d, sum e^g, and the KL's sum e^d (d - g) (reverse) or sum e^g (g - d) (forward).
struct RowSums {
    float z_max = kLowest, z_sum = 0, z_dot = 0, r_max = kLowest, r_sum = 0, cross = 0;
};

FST_DEVICE void rebase(RowSums& s, float z_max, float r_max, bool forward) {  // to larger maxima
    const float dz = s.z_max - z_max, dr = s.r_max - r_max;
    const float fz = fast_exp(dz), fr = fast_exp(dr);
    if (forward)
        s.cross = s.r_sum == 0 ? 0 : fr * (s.cross + (dr - dz) * s.r_sum);
    else
        s.cross = s.z_sum == 0 ? 0 : fz * (s.cross + (dz - dr) * s.z_sum);
    s.z_dot = s.z_sum == 0 ? 0 : fz * (s.z_dot + dz * s.z_sum);
    s.z_sum *= fz;
    s.r_sum *= fr;
    s.z_max = z_max;
    s.r_max = r_max;
}

FST_DEVICE RowSums merge(RowSums a, RowSums b, bool forward) {
    const float z_max = a.z_max < b.z_max ? b.z_max : a.z_max;
    const float r_max = a.r_max < b.r_max ? b.r_max : a.r_max;
    rebase(a, z_max, r_max, forward);
    rebase(b, z_max, r_max, forward);
    a.z_sum += b.z_sum;
    a.z_dot += b.z_dot;
    a.r_sum += b.r_sum;
    a.cross += b.cross;
    return a;
}

struct LabelSums {
    float coefficient = 0, weight = 0;
};

FST_DEVICE LabelSums merge(LabelSums a, LabelSums b, bool) {
    a.coefficient += b.coefficient;
    a.weight += b.weight;
    return a;
}

// Shared memory: what a block says to the others, what its warps say to each other, then the row.
struct Scratch {
    RowSums row_of_block;
    LabelSums labels_of_block;
    RowSums row_of_warp[kMaxThreads / kWarpSize];
    LabelSums labels_of_warp[kMaxThreads / kWarpSize];
};

constexpr int64_t kScratchBytes = (sizeof(Scratch) + 15) / 16 * 16;

template <class Sums>
FST_DEVICE Sums warp_total(Sums mine, bool forward) {  // in lane 0
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) mine = merge(mine, from_lane_above(mine, distance), forward);
    return mine;
}

// The sum over all threads of the cluster, in every thread. Ends after a barrier of the cluster.
template <class Sums>
FST_DEVICE Sums cluster_total(Sums mine, Sums* of_warp, Sums* of_block, bool forward) {
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
    mine = warp_total(mine, forward);
    if (lane == 0) of_warp[warp] = mine;
    block_sync();
    if (warp == 0) {
        mine = warp_total(lane < block_threads() / kWarpSize ? of_warp[lane] : Sums(), forward);
        if (lane == 0) *of_block = mine;
    }
    cluster_sync();
    Sums total = *in_block(of_block, 0);
    for (int rank = 1; rank < cluster_blocks(); ++rank) total = merge(total, *in_block(of_block, rank), forward);
    return total;
}

// ------------------------------------------------------------------------------------------------------------ elements

struct Scale {
    float inverse_temperature, softcap, inverse_softcap, temperature;
};

FST_DEVICE float scaled(float x, const Scale& s) {
    if (s.softcap > 0) x = s.softcap * tanhf(x * s.inverse_softcap);
    return x * s.inverse_temperature;
}

FST_DEVICE float slope(float z, const Scale& s) {  // dz/dx
    if (s.softcap <= 0) return s.inverse_temperature;
    const float t = z * s.temperature * s.inverse_softcap;
    return s.inverse_temperature * (1 - t * t);
}

// Elements i ... i + kVector of a row, as far as they lie before end; whole is true where the row allows 16-byte access.
FST_DEVICE void read(float (&out)[kVector], const float* row, int i, int end, bool whole) {
    if (whole && i + kVector <= end) {
        struct alignas(16) Four {
            float x[kVector];
        };
        const Four four = *reinterpret_cast<const Four*>(row + i);
        FST_UNROLL
        for (int j = 0; j < kVector; ++j) out[j] = four.x[j];
    } else {
        FST_UNROLL
        for (int j = 0; j < kVector; ++j) out[j] = i + j < end ? row[i + j] : 0;
    }
}

template <class T>
FST_DEVICE void write(T* row, const T (&values)[kVector], int i, int end, bool whole) {
    if (whole && i + kVector <= end) {
        struct alignas(kVector * sizeof(T)) Four {
            T x[kVector];
        } four;
        FST_UNROLL
        for (int j = 0; j < kVector; ++j) four.x[j] = values[j];
        *reinterpret_cast<Four*>(row + i) = four;
    } else {
        FST_UNROLL
        for (int j = 0; j < kVector; ++j)
            if (i + j < end) row[i + j] = values[j];
    }
}

FST_DEVICE void store(float* row, const float (&values)[kVector], int i, int end, bool whole) { write(row, values, i, end, whole); }

FST_DEVICE void store(bf16* row, const float (&values)[kVector], int i, int end, bool whole) {
    bf16 rounded[kVector];
    FST_UNROLL
    for (int j = 0; j < kVector; ++j) rounded[j] = to_bf16(values[j]);
    write(row, rounded, i, end, whole);
}

FST_DEVICE bool aligned(const void* base, int64_t stride, int bytes) {
    return (reinterpret_cast<uintptr_t>(base) % (kVector * bytes)) == 0 && stride % kVector == 0;
}

// ------------------------------------------------------------------------------------------------------------ labels

// The objective's derivative by the log-prob of label m.
FST_DEVICE float run_program(const FstPolicyRows& p, int m, float logprob, float ref_logprob) {
    float value[FST_MAX_INSTRUCTIONS];
    for (int i = 0; i < p.instructions; ++i) {
        const FstInstruction at = p.program[i];
        float out = 0;
        switch (at.op) {
            case FST_INPUT:
                out = at.a == 0 ? logprob : at.a == 5 && p.inputs[5] == nullptr ? ref_logprob : p.inputs[at.a][m];
                break;
            case FST_CONSTANT: out = at.constant; break;
            case FST_ADD: out = value[at.a] + value[at.b]; break;
            case FST_SUB: out = value[at.a] - value[at.b]; break;
            case FST_MUL: out = value[at.a] * value[at.b]; break;
            case FST_NEG: out = -value[at.a]; break;
            case FST_EXP: out = expf(value[at.a]); break;
            case FST_EXPM1: out = expm1f(value[at.a]); break;
            case FST_MIN: out = value[at.a] > value[at.b] ? value[at.b] : value[at.a]; break;
            case FST_MAX: out = value[at.a] < value[at.b] ? value[at.b] : value[at.a]; break;
            case FST_GT: out = value[at.a] > value[at.b]; break;
            case FST_LE: out = value[at.a] <= value[at.b]; break;
            case FST_WHERE: out = value[at.a] != 0 ? value[at.b] : value[at.c]; break;
        }
        value[i] = out;
    }
    return value[p.instructions - 1];
}

// ------------------------------------------------------------------------------------------------------------ the kernel

struct Form {  // of a row: dLoss/dz without the labels' own terms
    float b0, b1, b2, k;
};

template <bool kRef>
FST_DEVICE float form_at(const Form& f, float log_p, float log_q) {
    const float inner = f.b1 * log_p + f.b0;
    if (!kRef) return fast_exp(log_p) * inner;
    return fast_exp(log_p) * (inner - f.b2 * log_q) - f.k * fast_exp(log_q);
}

template <bool kResident, bool kRef, class Out>
FST_KERNEL void FST_BOUNDS(kMaxThreads, 2) policy_rows(FstPolicyRows p) {
    const int rank = cluster_rank(), blocks = cluster_blocks(), thread = thread_index(), threads = block_threads();
    const int64_t row = block_index() / blocks;
    const int vocabulary = static_cast<int>(p.vocabulary);
    const int slice = ((vocabulary + blocks - 1) / blocks + kVector - 1) / kVector * kVector;
    const int begin = slice * rank < vocabulary ? slice * rank : vocabulary;
    const int end = begin + slice < vocabulary ? begin + slice : vocabulary;
    const bool forward = p.kl_kind == FST_KL_FORWARD;
    const float t = p.temperature[row];
    const Scale scale{1 / t, p.softcap, p.softcap > 0 ? 1 / p.softcap : 0, t};

    const float* x = p.logits + row * p.logits_stride;
    const float* y = kRef ? p.ref + row * p.ref_stride : nullptr;
    const bool whole_x = aligned(p.logits, p.logits_stride, 4), whole_y = kRef && aligned(p.ref, p.ref_stride, 4);
    auto& scratch = *reinterpret_cast<Scratch*>(shared_memory());
    float* kept_z = reinterpret_cast<float*>(shared_memory() + kScratchBytes) - begin;  // [begin, end)
    float* kept_r = kept_z + slice;

    // Statistics; where it fits, the scaled row stays in shared memory. A thread meets there only what it put there itself.
    RowSums sums;
    for (int i = begin + thread * kVector; i < end; i += threads * kVector) {
        float z[kVector], r[kVector] = {};
        read(z, x, i, end, whole_x);
        if (kRef) read(r, y, i, end, whole_y);
        float z_max = sums.z_max, r_max = sums.r_max;
        FST_UNROLL
        for (int j = 0; j < kVector; ++j) {
            z[j] = scaled(z[j], scale);
            if (i + j < end && !(z[j] <= z_max)) z_max = z[j];
            if (kRef) {
                r[j] = scaled(r[j], scale);
                if (i + j < end && !(r[j] <= r_max)) r_max = r[j];
            }
        }
        if (kResident) {
            write(kept_z, z, i, end, true);
            if (kRef) write(kept_r, r, i, end, true);
        }
        if (z_max != sums.z_max || r_max != sums.r_max) rebase(sums, z_max, r_max, forward);
        FST_UNROLL
        for (int j = 0; j < kVector; ++j) {
            if (i + j >= end) break;
            const float d = z[j] - sums.z_max, e = fast_exp(d);
            sums.z_sum += e;
            sums.z_dot += e * d;
            if (kRef) {
                const float g = r[j] - sums.r_max, f = fast_exp(g);
                sums.r_sum += f;
                sums.cross += forward ? f * (g - d) : e * (d - g);
            }
        }
    }
    sums = cluster_total(sums, scratch.row_of_warp, &scratch.row_of_block, forward);

    const float log_z = logf(sums.z_sum), log_r = kRef ? logf(sums.r_sum) : 0;
    const float entropy = log_z - sums.z_dot / sums.z_sum;
    float kl = 0;
    if (p.kl_kind == FST_KL_REVERSE) kl = sums.cross / sums.z_sum - log_z + log_r;
    if (p.kl_kind == FST_KL_FORWARD) kl = sums.cross / sums.r_sum - log_r + log_z;
    if (rank == 0 && thread == 0) {
        p.lse[row] = sums.z_max + log_z;
        p.entropy[row] = entropy;
        if (p.kl != nullptr) p.kl[row] = kl;
    }

    // Labels: each by the block whose slice it lies in, from logits that nothing has overwritten yet.
    const int first = p.label_start[row], last = p.label_start[row + 1];
    LabelSums labels;
    for (int m = first + thread; m < last; m += threads) {
        const int label = static_cast<int>(p.labels[m]);
        if (label < begin || label >= end) continue;
        const float z = scaled(x[label], scale);
        const float logprob = (z - sums.z_max) - log_z;
        float ref_logprob = 0;
        p.logprob[m] = logprob;
        if (kRef) {
            ref_logprob = (scaled(y[label], scale) - sums.r_max) - log_r;
            p.ref_logprob[m] = ref_logprob;
        }
        if (p.d_logits != nullptr) {
            const float coefficient = run_program(p, m, logprob, ref_logprob);
            p.coefficient[m] = coefficient;
            p.label_logit[m] = z;
            labels = merge(labels, LabelSums{coefficient, p.inputs[1][m]}, false);
        }
    }
    if (p.d_logits == nullptr) {
        cluster_sync();  // no block ends while another reads its shared memory
        return;
    }
    labels = cluster_total(labels, scratch.labels_of_warp, &scratch.labels_of_block, false);

    // The gradient.
    const float k = p.kl_kind == FST_KL_NONE ? 0 : p.kl_coef * labels.weight, g = -p.entropy_coef * labels.weight;
    Form form{-labels.coefficient - g * entropy, -g, 0, 0};
    if (p.kl_kind == FST_KL_REVERSE) {
        form.b0 -= k * kl;
        form.b1 += k;
        form.b2 = k;
    } else if (p.kl_kind == FST_KL_FORWARD) {
        form.b0 += k;
        form.k = k;
    }
    Out* d = static_cast<Out*>(p.d_logits) + row * p.d_stride;
    const bool whole_d = aligned(p.d_logits, p.d_stride, sizeof(Out));
    for (int start = begin; start < end; start += threads * kVector) {
        const int i = start + thread * kVector;
        float z[kVector] = {}, r[kVector] = {}, out[kVector] = {};
        if (i < end) {
            read(z, kResident ? kept_z : x, i, end, kResident || whole_x);
            if (kRef) read(r, kResident ? kept_r : y, i, end, kResident || whole_y);
            FST_UNROLL
            for (int j = 0; j < kVector; ++j) {
                const float zj = kResident ? z[j] : scaled(z[j], scale), rj = kResident || !kRef ? r[j] : scaled(r[j], scale);
                out[j] = form_at<kRef>(form, (zj - sums.z_max) - log_z, (rj - sums.r_max) - log_r) * slope(zj, scale);
            }
        }
        // bf16 over the fp32 it comes from: a tile's results lie where this tile or an earlier one was read.
        if (!kResident && sizeof(Out) < 4) block_sync();
        if (i < end) store(d, out, i, end, whole_d);
    }
    cluster_sync();

    // The labels' own terms, several of one column summed; each from unrounded numbers, by the first label of its column.
    for (int m = first + thread; m < last; m += threads) {
        const int label = static_cast<int>(p.labels[m]);
        if (label < begin || label >= end) continue;
        float c = 0;
        bool mine = true;
        for (int n = first; n < last && mine; ++n) {
            if (p.labels[n] != label) continue;
            if (n < m) mine = false;
            c += p.coefficient[n];
        }
        if (!mine) continue;
        const float without = form_at<kRef>(form, p.logprob[m], kRef ? p.ref_logprob[m] : 0);
        const float value[kVector] = {(without + c) * slope(p.label_logit[m], scale), 0, 0, 0};
        store(d, value, label, label + 1, false);
    }
}

// ------------------------------------------------------------------------------------------------------------ launch

struct Plan {
    int threads, cluster;
    bool resident;
    int64_t shared_bytes;
};

int64_t shared_bytes_of(const FstPolicyRows& p, int cluster) {
    const int64_t slice = ((p.vocabulary + cluster - 1) / cluster + kVector - 1) / kVector * kVector;
    return kScratchBytes + slice * static_cast<int64_t>(sizeof(float)) * (p.ref == nullptr ? 1 : 2);
}

// The smallest cluster that leaves room for two blocks per multiprocessor, else the smallest that fits, else one block that reads twice.
int make_plan(const FstPolicyRows& p, Plan& plan) {
    Machine at;
    if (const int error = machine(at)) return error;
    plan = {p.threads ? p.threads : at.threads, p.cluster, p.resident != 0, kScratchBytes};
    if (plan.threads % kWarpSize || plan.threads < kWarpSize || plan.threads > kMaxThreads) return FST_BAD_ARGUMENT;
    if (plan.cluster < 0 || plan.cluster > at.max_cluster || (plan.cluster & (plan.cluster - 1))) return FST_BAD_ARGUMENT;
    if (p.resident == 0) {
        plan.cluster = 1;
        return p.cluster > 1 ? FST_BAD_ARGUMENT : 0;
    }
    if (plan.cluster == 0)
        for (const int64_t room : {at.shared_bytes / 2 - 1024, at.shared_bytes})
            for (int cluster = 1; cluster <= at.max_cluster && plan.cluster == 0; cluster *= 2)
                if (shared_bytes_of(p, cluster) <= room) plan.cluster = cluster;
    plan.resident = plan.cluster > 0 && shared_bytes_of(p, plan.cluster) <= at.shared_bytes;
    if (plan.resident)
        plan.shared_bytes = shared_bytes_of(p, plan.cluster);
    else if (p.resident == 1 || p.cluster > 1)
        return FST_BAD_ARGUMENT;
    else
        plan.cluster = 1;
    return 0;
}

template <bool kResident, bool kRef>
int launch_as(const FstPolicyRows& p, const Plan& plan, void* stream) {
    const auto kernel = p.d_is_bf16 ? policy_rows<kResident, kRef, bf16> : policy_rows<kResident, kRef, float>;
    return launch(kernel, p.rows * plan.cluster, plan.cluster, plan.threads, plan.shared_bytes, stream, p);
}

}  // namespace
}  // namespace fst

extern "C" {

int64_t fst_policy_rows_size() { return sizeof(FstPolicyRows); }

int fst_policy_rows(const FstPolicyRows* rows, void* stream) {
    const FstPolicyRows& p = *rows;
    if (p.rows == 0) return 0;
    if (p.rows < 0 || p.vocabulary < 1 || p.vocabulary > (int64_t{1} << 30) || p.rows > (int64_t{1} << 27)) return FST_BAD_ARGUMENT;
    if (p.d_logits && (p.instructions < 1 || p.instructions > FST_MAX_INSTRUCTIONS || !p.inputs[1])) return FST_BAD_ARGUMENT;
    if (!p.ref && p.kl_kind != FST_KL_NONE) return FST_BAD_ARGUMENT;
    fst::Plan plan;
    if (const int error = fst::make_plan(p, plan)) return error;
    if (plan.resident) return p.ref ? fst::launch_as<true, true>(p, plan, stream) : fst::launch_as<true, false>(p, plan, stream);
    return p.ref ? fst::launch_as<false, true>(p, plan, stream) : fst::launch_as<false, false>(p, plan, stream);
}

const char* fst_error(int code) { return code == FST_BAD_ARGUMENT ? "an argument is out of range" : fst::machine_error(code); }
}
