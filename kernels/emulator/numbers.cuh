// Stands for kernels/cuda/numbers.cuh on a CPU.
#pragma once

#define DEVICE inline

DEVICE u32 shared_address(const void* p) {
    return emulator::shared_address(p);
}

DEVICE void store_shared(u32 address, float x) {
    *(float*)emulator::shared(address, 4, 4) = x;
}

DEVICE float load_shared(u32 address) {
    return *(const float*)emulator::shared(address, 4, 4);
}

DEVICE uint4 load_shared_16(u32 address) {
    return *(const uint4*)emulator::shared(address, 16, 16);
}

DEVICE void named_sync(int id, int threads) {
    emulator::barrier(id, threads, true);
}

DEVICE void named_arrive(int id, int threads) {
    emulator::barrier(id, threads, false);
}

DEVICE char* global_memory(char* p) {
    return p;
}

// Round to nearest, ties to even.
DEVICE u32 bits_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

DEVICE u32 pack_bf16(float low, float high) {
    return bits_bf16(low) | bits_bf16(high) << 16;
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

DEVICE u32 bits_f16(float x) {
    return same_bits<unsigned short>((_Float16)x);
}

DEVICE u32 pack_f16(float low, float high) {
    return bits_f16(low) | bits_f16(high) << 16;
}

DEVICE float low_f16(u32 pair) {
    return (float)same_bits<_Float16>((unsigned short)pair);
}

DEVICE float high_f16(u32 pair) {
    return low_f16(pair >> 16);
}

// Denormals count as zero.
DEVICE float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.f : y;
}
