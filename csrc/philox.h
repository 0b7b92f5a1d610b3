// The random numbers of the sampler, on a GPU, on host threads and on a CPU. FST_DEVICE: what device.cuh puts before a device function.
#pragma once

#include <cstdint>

#ifndef FST_DEVICE
#define FST_DEVICE inline
#endif

namespace fst {

// The first word of Philox4x32-10 (Salmon et al. 2011), key = seed, counter = position.
FST_DEVICE uint32_t random_word(int64_t seed, int64_t position) {
    uint32_t a = static_cast<uint32_t>(position), b = static_cast<uint32_t>(position >> 32), c = 0, d = 0;
    uint32_t key = static_cast<uint32_t>(seed), other_key = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t{0xD2511F53u} * a, second = uint64_t{0xCD9E8D57u} * c;
        a = static_cast<uint32_t>(second >> 32) ^ b ^ key;
        b = static_cast<uint32_t>(second);
        c = static_cast<uint32_t>(first >> 32) ^ d ^ other_key;
        d = static_cast<uint32_t>(first);
        key += 0x9E3779B9u;
        other_key += 0xBB67AE85u;
    }
    return a;
}

}  // namespace fst
