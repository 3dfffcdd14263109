// The instructions of hopper.cuh and wgmma.cuh: mbarriers, the bulk and tensor copies (TMA), products of a warpgroup.
#include "machine.h"
#include "wgmma.cuh"

#include <array>
#include <memory>

using namespace emulator;

// ---- mbarriers: a mark in shared memory, and the state here ---------------------------------------------------------------

namespace {

struct Mbarrier {
    u64 phases = 0;  // that are complete
    u32 arrivals = 0;
    int pending = 0;
    long long bytes = 0;  // that have been announced and have not come
};

constexpr u64 MARK = 0x6d62617272696572;
std::array<Mbarrier, WINDOW / 8> mbarriers;

Mbarrier& mbarrier(u32 at) {
    if (*(const u64*)shared(at, 8, 8) != MARK) fail("no mbarrier at shared address %#x, or overwritten", at);
    return mbarriers[at / 8];
}

void arrive(Mbarrier& bar, int arrivals, long long bytes) {
    bar.pending -= arrivals;
    bar.bytes += bytes;
    if (bar.pending < 0) fail("more arrivals at an mbarrier than its %u", bar.arrivals);
    if (bar.pending == 0 && bar.bytes == 0) {
        bar.pending = (int)bar.arrivals;
        ++bar.phases;
    }
}

}  // namespace

void barrier_init(u32 bar, u32 arrivals) {
    *(u64*)shared(bar, 8, 8) = MARK;
    mbarriers[bar / 8] = {0, arrivals, (int)arrivals, 0};
}

void barrier_arrive(u32 bar) {
    arrive(mbarrier(bar), 1, 0);
}

void barrier_expect(u32 bar, u32 bytes) {
    arrive(mbarrier(bar), 1, bytes);
}

void barrier_wait(u32 bar, u32 parity) {
    const Mbarrier& b = mbarrier(bar);
    if (parity > 1) fail("parity %u", parity);
    if ((b.phases & 1) != parity) return;
    const u64 before = b.phases;
    wait_while(&b.phases, before, "an mbarrier");
    if (b.phases > before + 1) fail("an mbarrier runs two phases ahead of a thread that waits for the first");
}

// ---- copies --------------------------------------------------------------------------------------------------------------

namespace {

// Bytes of a line of a tile.
constexpr u32 LINE = 128;

// The 128-byte swizzle: which 16 bytes of its line an address is in is permuted by the line.
u32 swizzled(u32 address) {
    return address ^ (address >> 3 & 0x70);
}

// f(8 numbers of a tile, their place in the tensor, how many of them are inside), for all of a tile.
template <typename F>
void pieces(const TensorMap& map, u32 tile, const std::array<int, 4>& at, F f) {
    if (at[0] < 0 || at[0] % 8) fail("a tile that begins at column %d", at[0]);
    for (u32 row = 0; row < map.box[1]; ++row) {
        const long long place[4] = {at[0], at[1] + (long long)row, at[2], at[3]};
        u64 address = map.address;
        bool inside = true;
        for (int i = 1; i < 4; ++i) {
            inside = inside && place[i] >= 0 && place[i] < map.sizes[i];
            address += place[i] * map.strides[i - 1];
        }
        for (u32 e = 0; e < map.box[0]; e += 8) {
            const long long left = inside ? map.sizes[0] - (place[0] + e) : 0;
            f((unsigned short*)shared(swizzled(tile + row * LINE + 2 * e), 16, 16),
              (unsigned short*)address + place[0] + e, (int)std::min(std::max(left, 0ll), 8ll));
        }
    }
}

const TensorMap& check(const TensorMap* map, u32 tile) {
    if ((uintptr_t)map % 64) fail("a tensor map at %p, not a multiple of 64", (const void*)map);
    if (map->mark != TENSOR_MAP) fail("not a tensor map");
    // The hardware asks for 128; descriptors of wgmma take the swizzle to begin with a tile.
    if (tile % 1024) fail("a tile at shared address %#x, not a multiple of 1024", tile);
    shared(tile, map->box[0] * map->box[1] * 2, 16);
    return *map;
}

}  // namespace

void tma_load(u32 to, const TensorMap* at, u32 bar, int c0, int c1, int c2, int c3) {
    const TensorMap map = check(at, to);
    mbarrier(bar);
    later([=] {
        pieces(map, to, {c0, c1, c2, c3}, [](unsigned short* tile, const unsigned short* tensor, int inside) {
            for (int i = 0; i < 8; ++i) tile[i] = i < inside ? tensor[i] : 0;
        });
        arrive(mbarrier(bar), 0, -(long long)(map.box[0] * map.box[1] * 2));
    });
}

void bulk_load(u32 to, const void* from, u32 bar, u32 bytes) {
    if (bytes % 16 || (uintptr_t)from % 16) fail("bulk_load of %u bytes from %p: not multiples of 16", bytes, from);
    char* tile = shared(to, bytes, 16);
    mbarrier(bar);
    later([=] {
        memcpy(tile, from, bytes);
        arrive(mbarrier(bar), 0, -(long long)bytes);
    });
}

void tma_store(const TensorMap* at, u32 from, int c0, int c1, int c2, int c3, bool add) {
    const TensorMap map = check(at, from);
    const auto store = [=] {
        pieces(map, from, {c0, c1, c2, c3}, [=](const unsigned short* tile, unsigned short* tensor, int inside) {
            for (int i = 0; i < inside; ++i)
                tensor[i] = (unsigned short)(add ? bits_bf16(low_bf16(tile[i]) + low_bf16(tensor[i])) : tile[i]);
        });
    };
    Groups& stores = me().stores;
    if (late()) {
        stores.open.push_back(store);
    } else {
        store();
        stores.open.push_back([] {});
    }
}

void tma_store_commit() {
    me().stores.commit();
}

void tma_store_wait_all_but(int groups) {
    me().stores.wait(groups);
}

void store_matrices(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
    struct Rows {
        u32 r[4], address;
    } mine{{r0, r1, r2, r3}, address};
    of_warp("stmatrix", ~0u, &mine, [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m) {
                const u32 row = ((const Rows*)lanes[8 * m + lane / 4])->address;
                memcpy(shared(row, 16, 16) + 4 * (lane % 4), &((const Rows*)lanes[lane])->r[m], 4);
            }
    });
}

// ---- wgmma -----------------------------------------------------------------------------------------------------------------

namespace {

// A warp has 16 of the 64 rows. Its part takes place when it does, whatever the three other warps have come to.
constexpr int ROWS = 16, DEPTH = 16, MOST_COLUMNS = 256;

// 16 x N of a matrix in registers, and where each lane keeps its part.
struct Accumulators {
    float* registers[32];
    int columns;
    float at[ROWS][MOST_COLUMNS];

    // f(a register, its number in the matrix): register i of a lane holds row lane / 4 (+ 8), column 8 (i / 4) + 2 (lane % 4)
    // (+ 1).
    template <typename F>
    void each(F f) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < columns / 2; ++i)
                f(registers[lane][i], at[lane / 4 + 8 * (i / 2 % 2)][i / 4 * 8 + 2 * (lane % 4) + i % 2]);
    }
};

// 8 numbers of an operand in shared memory: PTX ISA, matrix descriptors and canonical layouts with the 128-byte swizzle.
// Those of row i from column k on or, transposed, of column k from row i on: then k runs down the lines.
const unsigned short* eight(u64 descriptor, bool transposed, u32 i, u32 k) {
    const auto field = [=](int from) { return (u32)(descriptor >> from & 0x3fff) << 4; };
    const u32 start = field(0), leading = field(16), stride = field(32);
    const u32 at = transposed ? start + i / 64 * leading + k / 8 * stride + k % 8 * LINE + i % 64 * 2
                              : start + i / 8 * stride + i % 8 * LINE + k * 2;
    return (const unsigned short*)shared(swizzled(at), 16, 16);
}

#ifdef __x86_64__
__attribute__((target_clones("avx512f", "avx2,fma", "default")))
#endif
void
multiply(float (*d)[MOST_COLUMNS], const float (*a)[DEPTH], const float (*b)[MOST_COLUMNS], int columns) {
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < columns; j += 64) {
            float sums[64];
            memcpy(sums, &d[i][j], sizeof sums);
            for (int k = 0; k < DEPTH; ++k)
                for (int c = 0; c < 64; ++c) sums[c] += a[i][k] * b[k][j + c];
            memcpy(&d[i][j], sums, sizeof sums);
        }
}

using Known = std::vector<std::unique_ptr<Accumulators>>;

bool same(const Product& a, const Product& b) {
    return a.columns == b.columns && a.a_in_registers == b.a_in_registers && a.a_descriptor == b.a_descriptor
           && a.b_descriptor == b.b_descriptor && a.b_transposed == b.b_transposed && a.accumulate == b.accumulate;
}

// One product, from what each lane has issued.
void multiply(const std::array<const Product*, 32>& lanes, Known& known) {
    static float a[ROWS][DEPTH], b[DEPTH][MOST_COLUMNS];
    const Product& p = *lanes[0];
    for (const Product* other : lanes)
        if (!same(p, *other)) fail("the lanes of a warp issue different wgmma");
    // The other warps issue the same, earlier or later.
    if (!same(p, issued_by_warpgroup(p))) fail("the warps of a warpgroup issue different wgmma");
    for (int lane = 0; p.a_in_registers && lane < 32; ++lane)
        for (int r = 0; r < 4; ++r) {
            float* to = &a[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + 8 * (r / 2)];
            to[0] = low_bf16(lanes[lane]->a[r]);
            to[1] = high_bf16(lanes[lane]->a[r]);
        }
    for (u32 i = 0; !p.a_in_registers && i < ROWS; ++i)
        for (u32 k = 0; k < DEPTH; ++k)
            a[i][k] = low_bf16(eight(p.a_descriptor, false, 16 * (here->warp % 4) + i, k & ~7u)[k % 8]);
    for (u32 j = 0; j < (u32)p.columns; j += p.b_transposed ? 8 : 1)
        for (u32 k = 0; k < DEPTH; k += p.b_transposed ? 1 : 8) {
            const unsigned short* from = eight(p.b_descriptor, p.b_transposed, j, k);
            for (int e = 0; e < 8; ++e) (p.b_transposed ? b[k][j + e] : b[k + e][j]) = low_bf16(from[e]);
        }
    Accumulators* d = nullptr;
    for (auto& accumulators : known)
        if (accumulators->registers[0] == p.d) d = accumulators.get();
    if (!d) {
        known.push_back(std::make_unique<Accumulators>());
        d = known.back().get();
        d->columns = p.columns;
        for (int lane = 0; lane < 32; ++lane) d->registers[lane] = lanes[lane]->d;
        if (p.accumulate) d->each([](float& there, float& here) { here = there; });
    }
    if (!p.accumulate) memset(d->at, 0, sizeof d->at);
    multiply(d->at, a, b, p.columns);
}

void give_back(Known& known) {
    for (auto& accumulators : known) accumulators->each([](float& there, float& here) { there = here; });
}

}  // namespace

void wgmma_fence() {
    me().fenced = true;
}

void wgmma(int columns, float* d, const u32* a, u64 a_descriptor, u64 b_descriptor, bool b_transposed, bool accumulate) {
    Thread& thread = me();
    if (!thread.fenced) fail("wgmma without a fence since its registers were last free to change");
    Product mine{d, {}, a_descriptor, b_descriptor, columns, a != nullptr, b_transposed, accumulate};
    if (a) memcpy(mine.a, a, sizeof mine.a);
    if (late_products()) {
        thread.open.push_back(mine);
        return;
    }
    of_warp("wgmma", ~0u, &mine, [](void* const* lanes) {
        std::array<const Product*, 32> products;
        for (int lane = 0; lane < 32; ++lane) products[lane] = (const Product*)lanes[lane];
        Known known;
        multiply(products, known);
        give_back(known);
    });
}

void wgmma_commit() {
    Thread& thread = me();
    thread.products.push_back(std::move(thread.open));
    thread.open.clear();
}

void wgmma_wait_all_but(int groups) {
    me().waits_for = groups;
    of_warp("wgmma_wait", ~0u, &me(), [](void* const* lanes) {
        const auto of = [&](int lane) -> Thread& { return *(Thread*)lanes[lane]; };
        Known known;
        while ((int)of(0).products.size() > of(0).waits_for) {
            for (size_t i = 0; i < of(0).products[0].size(); ++i) {
                std::array<const Product*, 32> products;
                for (int lane = 0; lane < 32; ++lane) {
                    Thread& t = of(lane);
                    if (t.products.size() != of(0).products.size() || t.products[0].size() != of(0).products[0].size()
                        || t.waits_for != of(0).waits_for)
                        fail("the lanes of a warp have issued or wait for different numbers of wgmma");
                    products[lane] = &t.products[0][i];
                }
                multiply(products, known);
            }
            for (int lane = 0; lane < 32; ++lane) of(lane).products.erase(of(lane).products.begin());
        }
        give_back(known);
    });
    me().fenced = false;
}
