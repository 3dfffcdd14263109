// The instructions of mma.cuh.
#include "machine.h"
#include "mma.cuh"

#include <array>

using namespace emulator;

namespace {

float of_bf16(u32 bits) {
    return low_bf16(bits);
}

u32 half_of(u32 pair, int which) {
    return which ? pair >> 16 : pair & 0xffff;
}

struct Mma {
    float* d;
    const u32* a;
    u32 b[2];
};

// PTX ISA, "Matrix Fragments for mma.m16n8k16" and m16n8k8 for tf32: lane 4 g + t has rows g and g + 8 of A and D, column g
// of B.
template <int K, typename Number>
void mma(void* const* lanes, Number number) {
    float a[16][K], b[K][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Mma& m = *(const Mma*)lanes[lane];
        const int g = lane / 4, t = lane % 4;
        if constexpr (K == 16) {
            for (int r = 0; r < 4; ++r)
                for (int e = 0; e < 2; ++e) a[g + 8 * (r & 1)][2 * t + 8 * (r / 2) + e] = number(half_of(m.a[r], e));
            for (int r = 0; r < 2; ++r)
                for (int e = 0; e < 2; ++e) b[2 * t + 8 * r + e][g] = number(half_of(m.b[r], e));
        } else {
            for (int r = 0; r < 4; ++r) a[g + 8 * (r & 1)][t + 4 * (r / 2)] = number(m.a[r]);
            for (int r = 0; r < 2; ++r) b[t + 4 * r][g] = number(m.b[r]);
        }
    }
    float sums[16][8] = {};
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 4; ++r)
            ((Mma*)lanes[lane])->d[r] += sums[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
}

struct Rows {
    u32* r;
    u32 address;
};

// Matrix m of four, by rows of 16 bytes at the addresses of lanes 8 m to 8 m + 7.
unsigned short (*row_of(void* const* lanes, int m, int row))[8] {
    return (unsigned short (*)[8])shared(((const Rows*)lanes[8 * m + row])->address, 16, 16);
}

template <bool Transposed>
void load(void* const* lanes) {
    std::array<u32[4], 32> results;
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m) {
            u32 pair[2];
            for (int e = 0; e < 2; ++e) {
                const int in_row = lane / 4, in_pair = 2 * (lane % 4) + e;
                pair[e] = Transposed ? (*row_of(lanes, m, in_pair))[in_row] : (*row_of(lanes, m, in_row))[in_pair];
            }
            results[lane][m] = pair[0] | pair[1] << 16;
        }
    for (int lane = 0; lane < 32; ++lane) memcpy(((Rows*)lanes[lane])->r, results[lane], 16);
}

}  // namespace

void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Mma mine{d, a, {b0, b1}};
    of_warp("mma_bf16", ~0u, &mine, [](void* const* lanes) { mma<16>(lanes, of_bf16); });
}

void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Mma mine{d, a, {b0, b1}};
    of_warp("mma_f16", ~0u, &mine, [](void* const* lanes) { mma<16>(lanes, low_f16); });
}

void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Mma mine{d, a, {b0, b1}};
    // 10 bits of mantissa; the others are not looked at.
    of_warp("mma_tf32", ~0u, &mine,
            [](void* const* lanes) { mma<8>(lanes, [](u32 bits) { return __uint_as_float(bits & 0xffffe000u); }); });
}

void load_matrices(u32 (&r)[4], u32 address) {
    Rows mine{r, address};
    of_warp("ldmatrix", ~0u, &mine, load<false>);
}

void load_matrices_transposed(u32 (&r)[4], u32 address) {
    Rows mine{r, address};
    of_warp("ldmatrix.trans", ~0u, &mine, load<true>);
}

u32 transposed(u32 x) {
    struct Halves {
        u32 pair, result;
    } mine{x, 0};
    of_warp("movmatrix", ~0u, &mine, [](void* const* lanes) {
        const auto at = [&](int row, int column) { return half_of(((const Halves*)lanes[4 * row + column / 2])->pair, column % 2); };
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = 2 * (lane % 4);
            ((Halves*)lanes[lane])->result = at(column, row) | at(column + 1, row) << 16;
        }
    });
    return mine.result;
}

void copy_async(u32 to, const void* from, u32 bytes_valid) {
    if (bytes_valid > 16 || (uintptr_t)from % 16) fail("copy_async of %u bytes from %p", bytes_valid, from);
    char* at = shared(to, 16, 16);
    const auto copy = [=] {
        memcpy(at, from, bytes_valid);
        memset(at + bytes_valid, 0, 16 - bytes_valid);
    };
    if (late())
        me().copies.open.push_back(copy);
    else
        copy();
}

void copy_async_commit() {
    me().copies.commit();
}

void copy_async_wait_all_but(int groups) {
    me().copies.wait(groups);
}
