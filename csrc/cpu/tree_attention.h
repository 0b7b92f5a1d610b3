// The C interface of csrc/cpu: float32 on the CPU. Strides count floats; the last dimension lies side by side.
#pragma once

#include <cstdint>

extern "C" {

struct FstTreeAttention {
    int64_t queries, kv_heads, group, dim, threads;  // group: query heads per KV head
    float scale;
    const float* q;  // [queries, kv_heads * group, dim]
    int64_t q_row, q_head;
    const float *k, *v;  // [slots, kv_heads, dim]
    int64_t slots, k_slot, k_head, v_slot, v_head;
    float* out;  // [queries, kv_heads * group, dim]
    int64_t out_row, out_head;
    float* lse;  // [queries, kv_heads * group]
    int64_t lse_row, lse_head;

    // The tree: runs of neighbours in rank below one node, by level and, in a level, by rank.
    const int64_t* order;        // [queries] the query of each rank
    int64_t levels;
    const int64_t* level_begin;  // [levels + 1] the first run of each level
    const int32_t* run_first;    // [runs] first rank
    const int32_t* run_count;    // [runs] ranks
    const int32_t* run_length;   // [runs] keys of the node
    const int32_t* run_above;    // [runs] keys above it
    const int32_t* run_entry;    // [runs] where its pages begin in node_slots
    const int32_t* node_slots;   // first slot of each page
    int64_t node_page;           // slots of a page; 0: a node is one range

    const void* suffix_slots;  // [queries, suffix_pages], int64 where suffix_slots_are_wide, else int32
    int64_t suffix_slots_are_wide, suffix_pages, suffix_page;
    const int32_t* suffix_lengths;  // [queries], each at most suffix_capacity
    int64_t suffix_capacity;
    const int32_t* past;            // [queries] keys of all nodes above
    int64_t window;                 // keys that a query sees at most, the last of its past; 0: all
};

int64_t fst_tree_attention_size();
// -1, or, before anything is read, the first query whose suffix is longer than the capacity or lies outside the slots.
int64_t fst_tree_attention(const FstTreeAttention* arguments);
}
