// The parts of the emulator among themselves.
#pragma once

#include "emulator.h"

#include <functional>
#include <random>
#include <setjmp.h>
#include <string>
#include <ucontext.h>
#include <vector>

namespace emulator {

constexpr u32 WINDOW = 512 << 10;  // bytes of the addresses of shared memory

// Where some of a block's threads wait for each other.
struct Meeting {
    u64 generation = 0;
    u32 expected = 0, there = 0;
    const char* what = nullptr;
    std::vector<void*> brought;
};

// One product of wgmma, as one thread has issued it.
struct Product {
    float* d;
    u32 a[4];
    u64 a_descriptor, b_descriptor;
    int columns;
    bool a_in_registers, b_transposed, accumulate;
};

// Asynchronous instructions of one thread, in groups.
struct Groups {
    std::vector<std::function<void()>> open;
    std::vector<std::vector<std::function<void()>>> closed;

    void commit();
    // Runs the groups but the last `left`.
    void wait(int left);
};

struct Thread : Place {
    jmp_buf context;
    bool done;
    // Waits while `*watch` is `was`.
    const u64* watch;
    u64 was;
    const char* what;
    std::vector<Product> open;
    std::vector<std::vector<Product>> products;
    int waits_for;
    bool fenced;
    Groups stores, copies;
};

// Whether an asynchronous instruction takes place as late as it may, rather than at once.
bool late();
// The same for all wgmma of a block.
bool late_products();
// Runs `action` at once, or when nothing else can go on.
void later(std::function<void()> action);

Thread& me();
// Returns when `*watch` is no longer `was`.
void wait_while(const u64* watch, u64 was, const char* what);
// What the warpgroup of the warp that runs has issued at the place in its order that this one of the warp's has.
const Product& issued_by_warpgroup(const Product& by_warp);

// Of threads and of blocks; and asynchronous instructions take place as late as they may (Forward), at once (Backward), or
// now so, now so. What a kernel computes must not depend on it.
enum class Order : u32 { Forward = 0, Backward = 1, Random = 2 };
// From 2 on the seed of a random one.
void set_order(u32 order);

struct Launch {
    std::string name;
    void (*kernel)(void**);
    uint3 blocks, threads;
    u32 dynamic_shared;  // bytes
    u32 most_shared;     // static and dynamic
    void** arguments;
};

// Runs all blocks; an error's message, or nothing.
std::string run(const Launch& launch);

}  // namespace emulator
