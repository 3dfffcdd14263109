// Thin names for the instructions of sm_90a that CUDA C++ has no words for: mbarriers, the bulk tensor copy (TMA),
// wgmma's bookkeeping and descriptors, matrix stores. PTX ISA 8.x.
//
// One layout serves every tile: rows of 64 bf16 (128 bytes), 16-byte pieces permuted by the row (the 128-byte swizzle), a
// matrix wider than 64 columns as several such blocks one after the other. Tiles start at multiples of 1024 bytes.
#pragma once

#include "mma.cuh"

struct alignas(64) TensorMap {
    char opaque[128];
};

DEVICE void barrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

DEVICE void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

DEVICE void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{ .reg .pred done; \n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; \n"
        "@done bra over; \n"
        "bra again; \n"
        "over: }" ::"r"(bar), "r"(parity) : "memory");
}

// Makes initialised barriers visible to TMA.
DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The 128 threads of one warpgroup.
DEVICE void warpgroup_sync(int id) {
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// Makes ordinary stores to shared memory visible to TMA and wgmma.
DEVICE void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for ordinary accesses to global memory, on both sides of a flag.
DEVICE void fence_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// ---- between blocks ----

// How many have called it before, on the whole device.
DEVICE u64 next_number(u64* counter) {
    u64 before;
    asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
    return before;
}

// Who finds `value` there by `wait_for` also finds what this thread, and those that it has synced with, have written.
DEVICE void tell(u32* flag, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

DEVICE void wait_for(const u32* flag, u32 value) {
    u32 found;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
    } while (found != value);
}

// Not from a cache that other multiprocessors do not write to.
DEVICE float load_fresh(const float* from) {
    float x;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
}

DEVICE void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// With a hint for the L2 cache.
DEVICE void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
        ::"r"(to), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy) : "memory");
}

DEVICE u64 evict_last() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// `bytes`: a multiple of 16, as both addresses are.
DEVICE void bulk_load(u32 to, const void* from, u32 bar, u32 bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(to),
                 "l"(from), "r"(bar), "r"(bytes) : "memory");
}

DEVICE void tma_store(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3, bool add) {
    if (add)
        asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                     ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
    else
        asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                     "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

DEVICE void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most N stores still read shared memory.
template <int N>
DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

template <int N>
DEVICE void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

template <int N>
DEVICE void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
DEVICE void registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of accumulators over a wait.
template <int N>
DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// `next_block`: bytes from one block of 64 columns to the next; read only where the columns are the M or N dimension.
DEVICE u64 descriptor(u32 address, u32 next_block) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(next_block >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

DEVICE void store_matrices(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3) : "memory");
}
