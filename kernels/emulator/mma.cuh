// Stands for kernels/cuda/mma.cuh on a CPU: instructions of sm_80.
#pragma once
#include "numbers.cuh"

// D += A B of 16 x 8 x 16 (tf32: 16 x 8 x 8), by the lanes of a warp.
void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);

// To the nearest number of 10 bits of mantissa, ties away from zero.
DEVICE float round_tf32(float x) {
    return x - x == 0.f ? __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000u) : x;
}

void load_matrices(u32 (&r)[4], u32 address);
void load_matrices_transposed(u32 (&r)[4], u32 address);
u32 transposed(u32 x);

// 16 bytes, of which those beyond `bytes_valid` are zero.
void copy_async(u32 to, const void* from, u32 bytes_valid);
void copy_async_commit();
void copy_async_wait_all_but(int groups);

template <int N>
void copy_async_wait() {
    copy_async_wait_all_but(N);
}

DEVICE u32 anew(u32 x) {
    return x;
}
