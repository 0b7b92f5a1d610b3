// device.cuh on the CPU: every CUDA thread of a cluster is a std::thread, barriers are std::barrier, shared memory is a heap buffer per
// block, and clusters run one after another. Slow, but it runs the kernel's own code, and ThreadSanitizer sees every missing barrier.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define FST_DEVICE inline
#define FST_KERNEL
#define FST_BOUNDS(threads, blocks)
#define FST_UNROLL
#define FST_ROLLED

namespace fst {

struct bf16 {
    uint16_t bits;
};

inline bf16 to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(float x) { return x; }
inline float fast_exp(float x) { return std::exp(x); }

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint64_t to_integer(float x) { return static_cast<uint64_t>(std::llrint(x)); }
inline uint64_t high_product(uint64_t a, uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
}

template <class T>
T add_shared(T* at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

namespace host {

constexpr int kWarp = 32;
constexpr int kExchangeBytes = 64;

struct Warp {
    explicit Warp() : barrier(kWarp) {}
    std::barrier<> barrier;
    char slots[kWarp][kExchangeBytes];
};

struct Block {
    Block(int threads, int64_t shared_bytes) : barrier(threads), shared(shared_bytes / sizeof(float4_like) + 1), warps(threads / kWarp) {}
    struct alignas(16) float4_like {
        float x[4];
    };
    std::barrier<> barrier;
    std::vector<float4_like> shared;
    std::vector<Warp> warps;
};

struct Cluster {
    Cluster(int blocks, int threads) : barrier(static_cast<std::ptrdiff_t>(blocks) * threads) {}
    std::barrier<> barrier;
    std::vector<std::unique_ptr<Block>> blocks;
};

struct Self {
    Cluster* cluster;
    Block* block;
    int thread, threads, rank, ranks;
    int64_t block_index;
};

inline thread_local Self self;

}  // namespace host

inline int thread_index() { return host::self.thread; }
inline int block_threads() { return host::self.threads; }
inline int block_index() { return static_cast<int>(host::self.block_index); }
inline void block_sync() { host::self.block->barrier.arrive_and_wait(); }
inline int cluster_rank() { return host::self.rank; }
inline int cluster_blocks() { return host::self.ranks; }
inline void cluster_sync() { host::self.cluster->barrier.arrive_and_wait(); }
inline char* shared_memory() { return reinterpret_cast<char*>(host::self.block->shared.data()); }

template <class T>
const T* in_block(const T* shared, int rank) {
    const auto offset = reinterpret_cast<const char*>(shared) - shared_memory();
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(host::self.cluster->blocks[rank]->shared.data()) + offset);
}

template <class T>
T from_lane(T value, int lane) {
    static_assert(sizeof(T) <= host::kExchangeBytes);
    auto& warp = host::self.block->warps[host::self.thread / host::kWarp];
    std::memcpy(warp.slots[host::self.thread % host::kWarp], &value, sizeof(T));
    warp.barrier.arrive_and_wait();
    std::memcpy(&value, warp.slots[lane & (host::kWarp - 1)], sizeof(T));
    warp.barrier.arrive_and_wait();
    return value;
}

template <class T>
T from_lane_above(T value, int distance) {
    const int lane = host::self.thread % host::kWarp;
    return from_lane(value, lane + distance < host::kWarp ? lane + distance : lane);
}

struct Machine {
    int64_t shared_bytes;
    int max_cluster;
    int threads;
};

inline int machine(Machine& out) {
    out = {int64_t{227} * 1024, 2, 64};
    return 0;
}

template <class Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int cluster, int threads, int64_t shared_bytes, void*, const Parameters& parameters) {
    host::Cluster team(cluster, threads);
    for (int rank = 0; rank < cluster; ++rank) team.blocks.push_back(std::make_unique<host::Block>(threads, shared_bytes));
    std::vector<std::thread> running;
    for (int rank = 0; rank < cluster; ++rank)
        for (int thread = 0; thread < threads; ++thread)
            running.emplace_back([=, &team, &parameters] {
                for (int64_t block = rank; block < blocks; block += cluster) {
                    host::self = {&team, team.blocks[rank].get(), thread, threads, rank, cluster, block};
                    kernel(parameters);
                    team.barrier.arrive_and_wait();  // the next cluster reuses the buffers
                }
            });
    for (auto& thread : running) thread.join();
    return 0;
}

inline const char* machine_error(int) { return "no error"; }

}  // namespace fst
