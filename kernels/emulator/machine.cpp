// A multiprocessor as one thread of the host: the threads of a block are fibers, each of which runs until it waits for
// another. Blocks run one after another.
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <sys/mman.h>

namespace emulator {

Place* here = nullptr;

namespace {

constexpr size_t STACK = 256 << 10;
// Not a multiple of more than what dynamic shared memory is aligned to.
constexpr u32 DYNAMIC_AT = 1024 + 16;
constexpr u32 GAP = 1024;  // after the dynamic part and after each static variable
constexpr unsigned char POISON = 0xff;

// A static variable, or the dynamic part, which has no key.
struct Variable {
    const void* key;
    u32 address, end;
};

struct Machine {
    std::vector<std::unique_ptr<Thread>> threads;
    char* stacks = nullptr;
    jmp_buf scheduler;
    const Launch* launch = nullptr;
    std::string failure;

    Order order = Order::Forward;
    std::mt19937 random;

    // Of the block that runs.
    u32 count = 0, live = 0;
    bool late_products = false;
    std::vector<Meeting> warps;
    std::vector<std::vector<Product>> issued;  // by warpgroup
    std::vector<u32> issued_by_warp;
    Meeting named[16];
    std::vector<Variable> variables;
    u32 used = WINDOW;  // how much of the window may be other than poisoned
    std::deque<std::function<void()>> postponed;
};

alignas(1024) char window[WINDOW];
Machine machine;

void to_scheduler() {
    _longjmp(machine.scheduler, 1);
}

void body() {
    for (;;) {
        machine.launch->kernel(machine.launch->arguments);
        Thread& thread = me();
        if (!thread.open.empty() || !thread.products.empty()) fail("a thread ends without having waited for wgmma");
        if (!thread.stores.open.empty() || !thread.stores.closed.empty())
            fail("a thread ends without having waited for its TMA stores");
        thread.copies.wait(0);
        thread.copies.open.clear();
        thread.done = true;
        // Who waits for all of the block waits for one less.
        Meeting& all = machine.named[0];
        --machine.live;
        if (all.there && all.there == machine.live) {
            all.there = 0;
            ++all.generation;
        }
        if (_setjmp(thread.context) == 0) to_scheduler();
    }
}

// Lets one thread run until it waits; false if the launch has failed.
bool go_on(Thread& thread) {
    here = &thread;
    switch (_setjmp(machine.scheduler)) {
        case 0: _longjmp(thread.context, 1);
        case 1: return true;
        default: return false;
    }
}

void make_threads(u32 count) {
    constexpr u32 MOST = 1024;
    if (!machine.stacks) {
        void* at = mmap(nullptr, MOST * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
        machine.stacks = (char*)at;
        for (u32 i = 0; i < MOST; ++i) mprotect(machine.stacks + i * STACK, 4096, PROT_NONE);
    }
    while (machine.threads.size() < count) {
        char* stack = machine.stacks + machine.threads.size() * STACK;
        machine.threads.push_back(std::make_unique<Thread>());
        Thread& thread = *machine.threads.back();
        ucontext_t context, back;
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        // The fiber's first act is to come back here; from then on it is entered by longjmp, which is quicker.
        here = &thread;
        makecontext(&context, [] {
            if (_setjmp(me().context) == 0) to_scheduler();
            body();
        }, 0);
        if (_setjmp(machine.scheduler) == 0) swapcontext(&back, &context);
    }
}

// A line for each place where threads wait.
std::string waiting() {
    struct Place {
        u32 threads = 0, first = 0;
    };
    std::map<std::string, Place> places;
    for (u32 i = 0; i < machine.count; ++i) {
        if (machine.threads[i]->done) continue;
        Place& place = places[machine.threads[i]->what];
        if (place.threads++ == 0) place.first = i;
    }
    std::string text;
    for (auto& [what, place] : places)
        text += "\n  " + std::to_string(place.threads) + " threads at " + what + ", the first is " + std::to_string(place.first);
    return text;
}

std::vector<u32> in_order(u32 count) {
    std::vector<u32> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (machine.order == Order::Backward) std::reverse(order.begin(), order.end());
    if (machine.order == Order::Random) std::shuffle(order.begin(), order.end(), machine.random);
    return order;
}

bool run_block(uint3 at) {
    const Launch& launch = *machine.launch;
    memset(window, POISON, machine.used);
    machine.variables = {{nullptr, DYNAMIC_AT, DYNAMIC_AT + launch.dynamic_shared}};
    machine.used = machine.variables[0].end + GAP;
    machine.warps.assign((machine.count + 31) / 32, {});
    machine.issued.assign((machine.count + 127) / 128, {});
    machine.issued_by_warp.assign(machine.warps.size(), 0);
    for (Meeting& m : machine.named) m = {};
    machine.postponed.clear();
    machine.live = machine.count;
    machine.late_products = late();
    std::vector<u32> order = in_order((machine.count + 31) / 32);
    for (u32 i = 0; i < machine.count; ++i) {
        Thread& t = *machine.threads[i];
        t.thread = {i, 0, 0};
        t.block = at;
        t.threads = launch.threads;
        t.blocks = launch.blocks;
        t.lane = i % 32;
        t.warp = i / 32;
        t.done = t.fenced = false;
        t.watch = nullptr;
    }
    // The first warp that can go on does, until it cannot: so that some get as far ahead of others as they may. In a random
    // order for a while, longer in some blocks than in others.
    const u32 patience = 64u << 4 * (machine.random() % 3);
    const auto warp_goes_on = [&](u32 warp) {
        bool moved = false;
        for (u32 i = 0; i < 32; ++i) {
            const u32 at = 32 * warp + (machine.order == Order::Forward ? i : 31 - i);
            if (at >= machine.count) continue;
            Thread& t = *machine.threads[at];
            if (t.done || (t.watch && *t.watch == t.was)) continue;
            t.watch = nullptr;
            if (!go_on(t)) return -1;
            moved = true;
            if (machine.order == Order::Random && machine.random() % patience == 0) {
                std::shuffle(order.begin(), order.end(), machine.random);
                break;
            }
        }
        return (int)moved;
    };
    while (machine.live) {
        int moved = 0;
        for (u32 i = 0; moved == 0 && i < order.size(); ++i) moved = warp_goes_on(order[i]);
        if (moved < 0) return false;
        if (moved) continue;
        if (machine.postponed.empty()) {
            machine.failure = "deadlock:" + waiting();
            return false;
        }
        auto next = machine.postponed.begin();
        if (machine.order == Order::Random) next += machine.random() % machine.postponed.size();
        auto action = std::move(*next);
        machine.postponed.erase(next);
        here = machine.threads[0].get();
        if (_setjmp(machine.scheduler) != 0) return false;
        action();
    }
    if (!machine.postponed.empty()) {
        machine.failure = "the block ends before its TMA loads have come";
        return false;
    }
    for (const Variable& v : machine.variables)
        for (u32 i = v.end; i < v.end + GAP; ++i)
            if ((unsigned char)window[i] != POISON) {
                machine.failure = "a write beyond the end of " + std::string(v.key ? "a variable in" : "dynamic")
                                  + " shared memory, at byte " + std::to_string(i - v.address);
                return false;
            }
    return true;
}

}  // namespace

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    machine.failure = text;
    _longjmp(machine.scheduler, 2);
}

Thread& me() {
    return *static_cast<Thread*>(here);
}

void wait_while(const u64* watch, u64 was, const char* what) {
    Thread& thread = me();
    if (*watch != was) return;
    thread.watch = watch;
    thread.was = was;
    thread.what = what;
    if (_setjmp(thread.context) == 0) to_scheduler();
}

namespace {

// Whether the caller is the last one; who is not returns when the last one has released the meeting.
bool meet(Meeting& meeting, const char* what, u32 expected, bool wait) {
    if (meeting.there == 0) {
        meeting.what = what;
        meeting.expected = expected;
    } else if (meeting.what != what || meeting.expected != expected) {
        fail("thread %u is at %s with %u, others are at %s with %u", here->thread.x, what, expected, meeting.what,
             meeting.expected);
    }
    if (++meeting.there == expected) return true;
    if (wait) wait_while(&meeting.generation, meeting.generation, what);
    return false;
}

void release(Meeting& meeting) {
    meeting.there = 0;
    ++meeting.generation;
}

}  // namespace

void of_warp(const char* what, u32 mask, void* mine, void (*all)(void* const* lanes)) {
    if (!(mask >> here->lane & 1)) fail("%s: lane %d is not in its own mask %#x", what, here->lane, mask);
    Meeting& meeting = machine.warps[here->warp];
    if (meeting.there == 0) meeting.brought.assign(32, nullptr);
    meeting.brought[here->lane] = mine;
    if (meet(meeting, what, __builtin_popcount(mask), true)) {
        all(meeting.brought.data());
        release(meeting);
    }
}

const Product& issued_by_warpgroup(const Product& by_warp) {
    std::vector<Product>& all = machine.issued[here->warp / 4];
    const u32 number = machine.issued_by_warp[here->warp]++;
    if (number == all.size()) all.push_back(by_warp);
    return all[number];
}

void barrier(int id, int threads, bool wait) {
    static const char* names[16] = {"barrier 0",  "barrier 1",  "barrier 2",  "barrier 3", "barrier 4",  "barrier 5",
                                    "barrier 6",  "barrier 7",  "barrier 8",  "barrier 9", "barrier 10", "barrier 11",
                                    "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
    if (id < 0 || id > 15 || threads % 32) fail("barrier %d of %d threads", id, threads);
    Meeting& meeting = machine.named[id];
    if (threads) {
        if (meet(meeting, names[id], threads, wait)) release(meeting);
        return;
    }
    // All that have not ended, whose number may change while some wait.
    if (meet(meeting, "__syncthreads", 0, false) || meeting.there == machine.live)
        release(meeting);
    else
        wait_while(&meeting.generation, meeting.generation, "__syncthreads");
}

u32 shared_address(const void* p) {
    const ptrdiff_t at = (const char*)p - window;
    if (at < 0 || at >= (ptrdiff_t)WINDOW) fail("an address that is not in shared memory");
    return (u32)at;
}

char* shared(u32 address, u32 bytes, u32 alignment) {
    if (address % alignment) fail("shared address %#x is not a multiple of %u", address, alignment);
    for (const Variable& v : machine.variables)
        if (address >= v.address && address + bytes <= v.end) return window + address;
    const Variable& dynamic = machine.variables[0];
    fail("%u bytes at shared address %#x: dynamic shared memory is %#x to %#x", bytes, address, dynamic.address, dynamic.end);
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
    u32 size = (u32)bytes;
    for (const Variable& v : machine.variables) {
        if (v.key == key) return window + v.address;
        size += v.end - v.address;
    }
    if (size > machine.launch->most_shared) fail("%u bytes of shared memory in all, of %u", size, machine.launch->most_shared);
    const u32 at = (machine.used + (u32)alignment - 1) & ~((u32)alignment - 1), end = at + (u32)bytes;
    machine.variables.push_back({key, at, end});
    machine.used = end + GAP;
    return window + at;
}

void* dynamic_shared() {
    return window + DYNAMIC_AT;
}

void Groups::commit() {
    closed.push_back(std::move(open));
    open.clear();
}

void Groups::wait(int left) {
    while ((int)closed.size() > left) {
        for (auto& action : closed.front()) action();
        closed.erase(closed.begin());
    }
}

bool late() {
    return machine.order == Order::Forward || (machine.order == Order::Random && machine.random() % 2);
}

bool late_products() {
    return machine.late_products;
}

void later(std::function<void()> action) {
    if (late())
        machine.postponed.push_back(std::move(action));
    else
        action();
}

void set_order(u32 order) {
    machine.order = order < 2 ? (Order)order : Order::Random;
    machine.random.seed(order);
}

std::string run(const Launch& launch) {
    machine.launch = &launch;
    machine.failure.clear();
    machine.count = launch.threads.x;
    make_threads(machine.count);
    const u32 total = launch.blocks.x * launch.blocks.y * launch.blocks.z;
    for (u32 i : in_order(total)) {
        const uint3 at = {i % launch.blocks.x, i / launch.blocks.x % launch.blocks.y, i / (launch.blocks.x * launch.blocks.y)};
        if (run_block(at)) continue;
        // The fibers are somewhere inside the kernel: new ones next time.
        machine.threads.clear();
        char block[64];
        snprintf(block, sizeof block, " in block (%u, %u, %u): ", at.x, at.y, at.z);
        return launch.name + block + machine.failure;
    }
    return {};
}

}  // namespace emulator
