// Stands for kernels/cuda/wgmma.cuh on a CPU.
#pragma once
#include "hopper.cuh"

// `a`: four registers, or null and then by its descriptor.
void wgmma(int columns, float* d, const u32* a, u64 a_descriptor, u64 b_descriptor, bool b_transposed, bool accumulate);

template <int N>
struct Wgmma {
    template <int TransB>
    static DEVICE void ss(float (&d)[N / 2], u64 a, u64 b, int accumulate) {
        wgmma(N, d, nullptr, a, b, TransB, accumulate);
    }
    template <int TransB>
    static DEVICE void rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, int accumulate) {
        wgmma(N, d, a, 0, b, TransB, accumulate);
    }
};
