// What a kernel may ask of its machine, in one list: place, barriers, exchange inside a warp, shared memory of its cluster, launch.
// Kernels use these names only, so the same .cu file compiles with nvcc for a GPU and with g++ for host threads (host/threads.hpp).
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "host/threads.hpp"
#else

#include <cmath>

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define FST_DEVICE __device__ __forceinline__
#define FST_KERNEL __global__
#define FST_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FST_UNROLL _Pragma("unroll")
#define FST_ROLLED _Pragma("unroll 1")

namespace fst {

using bf16 = __nv_bfloat16;

FST_DEVICE int thread_index() { return threadIdx.x; }
FST_DEVICE int block_threads() { return blockDim.x; }
FST_DEVICE int block_index() { return blockIdx.x; }
FST_DEVICE void block_sync() { __syncthreads(); }

// Blocks of a cluster are neighbours in the grid. Before sm_90 every cluster is one block.
FST_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().block_rank();
#else
    return 0;
#endif
}

FST_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().num_blocks();
#else
    return 1;
#endif
}

FST_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
}

template <class T>
FST_DEVICE const T* in_block(const T* shared, int rank) {  // the same place in the shared memory of another block of the cluster
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
    return shared;
#endif
}

FST_DEVICE char* shared_memory() {
    extern __shared__ float4 fst_shared[];
    return reinterpret_cast<char*>(fst_shared);
}

template <class T>
FST_DEVICE T from_lane_above(T value, int distance) {  // T: a struct of 32-bit words
    static_assert(sizeof(T) % 4 == 0);
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    FST_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) words[i] = __shfl_down_sync(0xffffffffu, words[i], distance);
    memcpy(&value, words, sizeof(T));
    return value;
}

template <class T>
FST_DEVICE T from_lane(T value, int lane) {  // modulo the size of a warp
    static_assert(sizeof(T) % 4 == 0);
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    FST_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) words[i] = __shfl_sync(0xffffffffu, words[i], lane);
    memcpy(&value, words, sizeof(T));
    return value;
}

// Atomic, in the block's shared memory; returns what was there. Integers only: their sum does not depend on the order.
FST_DEVICE uint32_t add_shared(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
FST_DEVICE uint64_t add_shared(uint64_t* at, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

FST_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FST_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
FST_DEVICE uint64_t to_integer(float x) { return __float2ull_rn(x); }  // to nearest, ties to even
FST_DEVICE uint64_t high_product(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

FST_DEVICE float fast_exp(float x) { return __expf(x); }
FST_DEVICE float to_float(float x) { return x; }
FST_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
FST_DEVICE bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }

// ------------------------------------------------------------------------------------------------------------------ on the host

struct Machine {
    int64_t shared_bytes;  // a block may have
    int max_cluster;
    int threads;  // of a block, by default
};

inline int machine(Machine& out) {
    int device = 0, bytes = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    out = {bytes, major >= 9 ? 8 : 1, 512};
    return error;
}

template <class Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int cluster, int threads, int64_t shared_bytes, void* stream, const Parameters& parameters) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, parameters);
}

inline const char* machine_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace fst

#endif
