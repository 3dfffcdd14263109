// Stands for kernels/cuda/hopper.cuh on a CPU: what the instructions do is in hopper.cpp. Fences, prefetches and hints do
// nothing.
#pragma once
#include "mma.cuh"

// A tensor of bf16 in four dimensions, and tiles of it, as cuTensorMapEncodeTiled leaves it.
struct alignas(64) TensorMap {
    u64 address;
    u32 sizes[4];
    u64 strides[3];  // in bytes
    u32 box[2];
    u64 mark;
    char unused[56];
};
static_assert(sizeof(TensorMap) == 128);
constexpr u64 TENSOR_MAP = 0x6d617070656474ull;

void barrier_init(u32 bar, u32 arrivals);
void barrier_arrive(u32 bar);
void barrier_expect(u32 bar, u32 bytes);
void barrier_wait(u32 bar, u32 parity);

DEVICE void warpgroup_sync(int id) {
    named_sync(id, 128);
}

DEVICE void fence_barrier_init() {}
DEVICE void fence_async() {}
DEVICE void fence_async_global() {}

DEVICE u64 next_number(u64* counter) {
    return (*counter)++;
}

DEVICE void tell(u32* flag, u32 value) {
    *flag = value;
}

// Blocks run one after another.
DEVICE void wait_for(const u32* flag, u32 value) {
    if (*flag != value) emulator::fail("a block waits for sums that none before it has shown");
}

DEVICE float load_fresh(const float* from) {
    return *from;
}

void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3);
void tma_store(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3, bool add);
void tma_store_commit();
void tma_store_wait_all_but(int groups);
void bulk_load(u32 to, const void* from, u32 bar, u32 bytes);

DEVICE void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3, u64) {
    tma_load(to, map, bar, c0, c1, c2, c3);
}

DEVICE u64 evict_last() {
    return 0;
}

template <int N>
DEVICE void tma_store_wait_read() {
    tma_store_wait_all_but(N);
}

template <int N>
DEVICE void tma_store_wait() {
    tma_store_wait_all_but(N);
}

DEVICE void prefetch_map(const TensorMap*) {}

template <int N>
DEVICE void registers_more() {}

template <int N>
DEVICE void registers_fewer() {}

void wgmma_fence();
void wgmma_commit();
void wgmma_wait_all_but(int groups);

template <int N>
DEVICE void wgmma_wait() {
    wgmma_wait_all_but(N);
}

template <int N>
DEVICE void pin(float (&)[N]) {}

DEVICE u64 descriptor(u32 address, u32 next_block) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(next_block >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

void store_matrices(u32 address, u32 r0, u32 r1, u32 r2, u32 r3);
