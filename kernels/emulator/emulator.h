// CUDA C++'s words for a plain C++ compiler, included before every kernel. A thread of a kernel is a fiber: machine.cpp runs
// them, the functions of the .cuh files here stand for the instructions that kernels/cuda writes in PTX, driver.cpp loads and
// launches. Two spellings C++ cannot be taught are rewritten in the source by driver.cpp: `__shared__` declarations, and
// `__global__` functions, which also get an entry for the driver.
//
// Checked: that threads meet where they must, that barriers are used as they may be, that shared memory is written before it
// is read (it starts as NaN) and not beyond its end, alignments, and that results do not depend on the order of threads and
// blocks or on when asynchronous instructions take place. Not: the memory model's fences, and time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

typedef unsigned int u32;
typedef unsigned long long u64;

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

namespace emulator {

// What kernels see of the thread that runs.
struct Place {
    uint3 thread, block, threads, blocks;
    int lane, warp;
};
extern Place* here;

// Ends the launch: cuLaunchKernel returns an error with this message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Shared memory: 32-bit addresses of a window into which all of a block's shared variables are put.
u32 shared_address(const void* p);
char* shared(u32 address, u32 bytes, u32 alignment);
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();

// The lanes of `mask` meet; when all are there, `all` gets what each brought, by lane (null: not in the mask), and then they
// go on. `what` names the instruction, which must be the same in all.
void of_warp(const char* what, u32 mask, void* mine, void (*all)(void* const* lanes));

// Named barrier `id`: goes on, or waits, until `threads` of the block have come; 0: all of it.
void barrier(int id, int threads, bool wait);

// What a kernel declares as one `__shared__`.
template <typename T>
T& static_shared() {
    static const char key = 0;
    return *(T*)static_shared(&key, sizeof(T), alignof(T));
}

enum class Shuffle { Up, Down, Xor, Index };

template <typename T>
T shuffle(Shuffle way, u32 mask, T x, int by) {
    struct Lane {
        T x, result;
        int from;
    };
    const int lane = here->lane;
    int from = way == Shuffle::Up ? lane - by : way == Shuffle::Down ? lane + by : way == Shuffle::Xor ? lane ^ by : by & 31;
    if (from < 0 || from > 31) from = lane;
    Lane mine{x, x, from};
    of_warp("a shuffle", mask, &mine, [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
            Lane* to = (Lane*)lanes[i];
            if (!to) continue;
            const Lane* source = (const Lane*)lanes[to->from];
            if (!source) fail("a shuffle in lane %d reads lane %d, which is not in the mask", i, to->from);
            to->result = source->x;
        }
    });
    return mine.result;
}

// Calls a kernel with its parameters, each at one of `arguments`.
template <typename... P>
struct Caller {
    template <size_t... I>
    static void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
        kernel(copy<std::remove_cv_t<P>>(arguments[I])...);
    }
    template <typename T>
    static T copy(const void* from) {
        T x;
        memcpy(&x, from, sizeof x);
        return x;
    }
};

template <typename... P>
void call(void (*kernel)(P...), void** arguments) {
    Caller<P...>::call(kernel, arguments, std::index_sequence_for<P...>());
}

}  // namespace emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::here->thread)
#define blockIdx (emulator::here->block)
#define blockDim (emulator::here->threads)
#define gridDim (emulator::here->blocks)

inline void __syncthreads() {
    emulator::barrier(0, 0, true);
}
inline void __syncwarp(u32 mask = ~0u) {
    emulator::of_warp("__syncwarp", mask, nullptr, [](void* const*) {});
}
template <typename T>
T __shfl_sync(u32 mask, T x, int from) {
    return emulator::shuffle(emulator::Shuffle::Index, mask, x, from);
}
template <typename T>
T __shfl_up_sync(u32 mask, T x, int by) {
    return emulator::shuffle(emulator::Shuffle::Up, mask, x, by);
}
template <typename T>
T __shfl_down_sync(u32 mask, T x, int by) {
    return emulator::shuffle(emulator::Shuffle::Down, mask, x, by);
}
template <typename T>
T __shfl_xor_sync(u32 mask, T x, int by) {
    return emulator::shuffle(emulator::Shuffle::Xor, mask, x, by);
}
inline int __any_sync(u32 mask, int x) {
    for (int step = 16; step > 0; step /= 2) x |= __shfl_xor_sync(mask, x, step);
    return x != 0;
}
inline size_t __cvta_generic_to_shared(const void* p) {
    return emulator::shared_address(p);
}
inline size_t __cvta_generic_to_global(const void* p) {
    return (size_t)p;
}

template <typename To, typename From>
To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(u32 x) {
    return same_bits<float>(x);
}
inline float __int_as_float(int x) {
    return same_bits<float>(x);
}
inline u32 __float_as_uint(float x) {
    return same_bits<u32>(x);
}

// Four bytes of y x, the i-th by the i-th four bits of `which`.
inline u32 __byte_perm(u32 x, u32 y, u32 which) {
    const u64 both = (u64)y << 32 | x;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= (u32)(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return r;
}

#define OF_BOTH(T)                  \
    inline T min(T a, T b) {        \
        return b < a ? b : a;       \
    }                               \
    inline T max(T a, T b) {        \
        return a < b ? b : a;       \
    }
OF_BOTH(int)
OF_BOTH(u32)
OF_BOTH(long long)
OF_BOTH(float)
OF_BOTH(double)
#undef OF_BOTH

inline float rsqrtf(float x) {
    return 1.f / sqrtf(x);
}
inline float __expf(float x) {
    return expf(x);
}
