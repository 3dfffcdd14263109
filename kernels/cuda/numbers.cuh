// What every file here needs: integers by their size, pairs of 16-bit floats, shared memory by its 32-bit addresses, places in
// global memory, named barriers. kernels/emulator has a file of the same name for each header with PTX in it; .cu files have none.
#pragma once

#define DEVICE __device__ __forceinline__

typedef unsigned int u32;
typedef unsigned long long u64;

DEVICE u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

DEVICE void store_shared(u32 address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

DEVICE float load_shared(u32 address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}

DEVICE uint4 load_shared_16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

// The `threads` that sync or arrive at barrier `id` have come; whole warps.
DEVICE void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// p, of which the compiler then knows that it is no place in shared memory.
DEVICE char* global_memory(char* p) {
    __builtin_assume(__isGlobal(p));
    return p;
}

// Round to nearest, ties to even.
DEVICE u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

DEVICE float low_bf16(u32 pair) {
    return __uint_as_float(pair << 16);
}

DEVICE float high_bf16(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

DEVICE u32 add_bf16(u32 a, u32 b) {
    return pack_bf16(low_bf16(a) + low_bf16(b), high_bf16(a) + high_bf16(b));
}

DEVICE u32 pack_f16(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

DEVICE float low_f16(u32 pair) {
    float x;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(x) : "r"(pair));
    return x;
}

DEVICE float high_f16(u32 pair) {
    return low_f16(pair >> 16);
}

// Denormals count as zero.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
