// Causal linear attention with a scalar decay on Hopper: M_s = a_s M_{s-1} + y_s^T z_s, out_s = scale x_s M_s.
//
// One program, compiled once for every combination of
//   DECAY    0 none, 1 a scalar per token and head; a constant per head is one whose strides over tokens are 0
//   REVERSE  1: time runs backwards, which is what gradients do
//   DUAL     1: two outputs from one pass over the tokens (dv and dk); 0: one (o, or dq)
//   K_BLOCKS, V_BLOCKS  the head's key and value size in blocks of 64, 1 or 2
//   INTRA    0: only what the entering state adds to the outputs (forward only), for a state that comes late
//   DOTS     1: also writes what `decay_gradient` makes the decay's gradient of
//   LOOK_BACK  1: `run` sums its segments up itself, and takes the states that enter them from the blocks before it
//   STAGES, SUM_STAGES  tiles in flight in `run` and in `summarize`
//
//            x    y    z    state            out
//   o        q    k    v    M                q M
//   dq       do   v    k    M^T              do M^T
//   dv       k    q    do   R (REVERSE)      k R
//   dk       v    do   q    R^T (REVERSE)    v R^T
//
// where R is the gradient of the state. The sequences are cut into segments, about one for every multiprocessor, by the
// plan that the host makes. `summarize` adds up a segment's y^T z; `combine` turns these sums into the state that
// enters every segment; `run` goes through each segment with that state. No other state is ever written to memory. Where
// nobody else wants the sums and chains are short, `run` does it all in one launch: a block adds up its segments, shows the
// sums to the blocks after it, adds up those of the blocks before it (decoupled look-back, Merrill and Garland 2016, without
// its prefixes) and goes through its segments, whose first tiles it then still has.
//
// Inside a block of threads: one warpgroup loads tiles (TMA) and decays, one keeps the state in registers and hands a
// bf16 copy of it to the two others for every 64 tokens, and these compute outputs.

#ifndef DECAY
#define DECAY 0
#define REVERSE 0
#define DUAL 0
#define INTRA 1
#define DOTS 0
#define LOOK_BACK 0
#define K_BLOCKS 2
#define V_BLOCKS 2
#define STAGES 3
#define SUM_STAGES 5
#endif
// For racecheck, which does not see that one lane's arrival stands for its warp.
#ifndef EVERY_THREAD_ARRIVES
#define EVERY_THREAD_ARRIVES 0
#endif

#include "hopper.cuh"
#include "wgmma.cuh"
#include "segments.cuh"
#include "chunks.cuh"

// Of a thread, by its warpgroup's role; together what the multiprocessor has.
constexpr int LOADER_REGISTERS = 40, STATE_REGISTERS = 200, OUTPUT_REGISTERS = 136;

constexpr __host__ __device__ int max_of(int a, int b) {
    return a > b ? a : b;
}

struct SummarizeParams {
    TensorMap y, z;
    const Segment* segments;
    const int* first;  // [blocks + 1]
    float* sums;       // [slots, K, V]
    float* decays;     // [slots], base 2
    Decays decay;
    float scale;
    int dk, dv;
    int which;   // the flags of the segments to sum up
};

struct RunParams {
    TensorMap x, y, z, x2;
    TensorMap out_map, out2_map;
    Output out, out2;
    // [B, H, T]. The part of q_i dq_i, or dual of k_i dk_i, that goes through the chunk's entering state; and (dual) what
    // token i gives as the later one of a pair inside its chunk, less what it gives as the earlier one.
    float* dots;
    float* pairs;
    const Segment* segments;
    const int* first;
    float* entries;  // [slots, K, V]; what LOOK_BACK is to write
    int entry_row, entry_column;
    // (LOOK_BACK) Of the segments that another follows in this direction the sums, each as the threads of a warpgroup have it,
    // and decays, base 2 [slots]; flags [slots] that tell of them; how many blocks have begun, of this launch and all earlier
    // ones with the same flags, which had as many blocks each. Both were zeros at first and are never reset.
    const Chain* chains;
    float* sums;
    float* decays;
    u32* flags;
    u64* begun;
    Decays decay;
    float scale;        // of the outputs
    float entry_scale;  // of the entry states
    float sum_scale;    // (LOOK_BACK) of the sums
    int tokens;         // T
    int rows, columns;  // of the state as this pass sees it
    int out_columns, out2_columns;
    int heads;
    int accumulate;  // bit 0: adds to out; bit 1: adds to out2
    int entered;     // the flags of the segments that a state enters
    int left;        // (LOOK_BACK) and of those that a state leaves
};

struct CombineParams {
    const Chain* chains;
    const float* sums;      // [slots, K, V], or null: zero
    const float* decays;    // [slots]
    const float* external;  // [rows, K, V] or null
    float* entries;         // [slots, K, V]
    float* finals;          // [rows, K, V] or null
    int elements;           // K V
    int reverse;
};

// ---- summarize -------------------------------------------------------------------------------------------------

constexpr int SUM_STAGE = (K_BLOCKS + V_BLOCKS) * BLOCK;

// The tiles from which segments are summed up, of each from the last one that `run` visits to its first, as that then finds the
// first ones at hand: where y and z lie in the first stage of the ring, and the bytes from stage to stage; their cumulative
// log-decays [stages, CHUNK]; barriers of each stage.
struct SumRing {
    u32 y, z, stride;
    float* logs;
    u32 full, empty;
};

// One thread. `W`: a walk over the ring's stages.
template <int Stages, typename W>
DEVICE void load_sum_tiles(const SumRing& ring, W& w, const TensorMap* y, const TensorMap* z, const Segment& seg, u64 policy) {
    const int n = chunks_of(seg);
    for (int i = n - 1; i >= 0; --i) {
        const int token = seg.start + chunk_at(i, n) * CHUNK;
        const u32 at = w.stage * ring.stride, bar = ring.full + 8 * w.stage;
        barrier_wait(ring.empty + 8 * w.stage, w.phase ^ 1);
        barrier_expect(bar, SUM_STAGE);
        load_tile(y, ring.y + at, K_BLOCKS, bar, token, seg, policy);
        load_tile(z, ring.z + at, V_BLOCKS, bar, token, seg, policy);
        w.template next<Stages>();
    }
}

// One warp.
template <int Stages, typename W>
DEVICE void load_sum_logs(const SumRing& ring, W& w, const Decays& decay, const Segment& seg, int lane) {
    const int n = chunks_of(seg);
    const auto place = [&](int i) { return chunk_at(n - 1 - i, n); };
    const auto room = [&] {
        barrier_wait(ring.empty + 8 * w.stage, w.phase ^ 1);
        return ring.logs + w.stage * CHUNK;
    };
    const auto done = [&] {
        warp_arrives(ring.full + 8 * w.stage, lane);
        w.template next<Stages>();
    };
    load_logs(decay, seg, 0, lane, place, room, done);
}

// A warpgroup: `state` becomes the sum. The sum of the segment's log-decays.
template <int Stages, typename W, typename S>
DEVICE float sum_up(const SumRing& ring, W& w, S& state, const Segment& seg, int warp, int lane) {
    state.clear();
    const int n = chunks_of(seg);
    float total = 0.f;
    for (int i = n - 1; i >= 0; --i) {
        const int token = seg.start + chunk_at(i, n) * CHUNK;
        const u32 at = w.stage * ring.stride;
        barrier_wait(ring.full + 8 * w.stage, w.phase);
        const ChunkDecay decay{ring.logs + w.stage * CHUNK, min(CHUNK, seg.end - token)};
        state.template update<true>(ring.y + at, ring.z + at, decay, total, warp, lane);
        total += decay.total();
        warp_arrives(ring.empty + 8 * w.stage, lane);
        w.template next<Stages>();
    }
    return total;
}

extern "C" __global__ void __launch_bounds__(256, 1) summarize(const __grid_constant__ SummarizeParams p) {
    extern __shared__ char raw[];
    const u32 tiles = (shared_address(raw) + 1023) & ~1023u;
    __shared__ float logs[SUM_STAGES * CHUNK];
    __shared__ u64 bars[2 * SUM_STAGES];
    const u32 full = shared_address(bars), empty = full + 8 * SUM_STAGES;
    const SumRing ring{tiles, tiles + K_BLOCKS * BLOCK, SUM_STAGE, logs, full, empty};
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SUM_STAGES; ++i) {
            barrier_init(full + 8 * i, DECAY ? 1 + WARP_ARRIVALS : 1);
            barrier_init(empty + 8 * i, 4 * WARP_ARRIVALS);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int from = p.first[blockIdx.x], to = p.first[blockIdx.x + 1];
    Walk w;
    if (threadIdx.x < 128) {
        const bool tiles_are_mine = warp == 0 && lane == 0, logs_are_mine = DECAY && warp == 1;
        const u64 policy = evict_last();  // `run` wants y and z again
        for (int s = from; s < to; ++s) {
            const Segment seg = p.segments[s];
            if (!(seg.flags & p.which)) continue;
            if (tiles_are_mine) load_sum_tiles<SUM_STAGES>(ring, w, &p.y, &p.z, seg, policy);
            if (logs_are_mine) load_sum_logs<SUM_STAGES>(ring, w, p.decay, seg, lane);
        }
    } else {
        for (int s = from; s < to; ++s) {
            const Segment seg = p.segments[s];
            if (!(seg.flags & p.which)) continue;
            State<K_BLOCKS, 64 * V_BLOCKS> state;
            const float total = sum_up<SUM_STAGES>(ring, w, state, seg, warp, lane);
            state.scale(p.scale);
            state.write(p.sums + (long long)seg.slot * p.dk * p.dv, p.dk, p.dv, warp, lane);
            if (threadIdx.x == 128) p.decays[seg.slot] = total;
        }
    }
}

// ---- combine ---------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(128) combine(const __grid_constant__ CombineParams p) {
    const int at = (blockIdx.y * 128 + threadIdx.x) * 4;
    if (at < p.elements)
        combine_chain(p.chains[blockIdx.x], p.reverse, at, p.elements, p.sums, p.external, p.entries, p.finals,
                      [&](int slot) { return exp2f(p.decays[slot]); });
}

// ---- run -------------------------------------------------------------------------------------------------------

constexpr int X_BLOCKS = max_of(K_BLOCKS, V_BLOCKS);  // room for x, and later for the output in its place
constexpr int Y_AT = X_BLOCKS * BLOCK;
constexpr int Z_AT = Y_AT + K_BLOCKS * BLOCK;
constexpr int X2_AT = Z_AT + V_BLOCKS * BLOCK;
constexpr int STAGE = INTRA ? X2_AT + (DUAL ? X_BLOCKS : DOTS ? V_BLOCKS : 0) * BLOCK : X_BLOCKS * BLOCK;
constexpr int LOADED = (INTRA ? 2 * K_BLOCKS + V_BLOCKS + (DUAL || DOTS ? V_BLOCKS : 0) : K_BLOCKS) * BLOCK;
constexpr int SNAPSHOT = K_BLOCKS * V_BLOCKS * BLOCK;
// Where (dual, DOTS) one warpgroup of the outputs shows the other its v do^T: thread by thread, as their scores are laid
// out alike.
constexpr int EXCHANGE_AT = STAGES * STAGE + 2 * SNAPSHOT;
constexpr int OUTPUT_ARRIVALS = DUAL ? 2 : 1;

// One chunk, for the warpgroups of the outputs.
struct Work {
    const Segment& seg;
    ChunkDecay decay;
    int token;
    u32 snapshot, exchange;
    float* pair_sums;                  // [5, CHUNK] in shared memory
    u32 ready, parity, taken, empty;  // barriers: the state is there, is no longer needed; the tile is free
};

// One warpgroup's outputs of one chunk: x times the state plus the masked (x y^T) z. `XBlocks`, `OutBlocks`: columns of
// x and of the output; `Transposed`: the state is needed as its transpose.
template <int XBlocks, int OutBlocks, bool Transposed>
DEVICE void outputs(const RunParams& p, const Work& work, u32 x, u32 y, u32 z, u32 weights, const TensorMap* map,
                    const Output& out, int out_columns, bool add, int warp, int lane, int named) {
    const ChunkDecay& decay = work.decay;
    const Segment& seg = work.seg;
    const int token = work.token;
    constexpr int N = 64 * OutBlocks;
    float o[N / 2];
    float s[32];
    if (INTRA) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4 * XBlocks; ++k) {
            const u32 at = (k / 4) * BLOCK + (k % 4) * 32;
            Wgmma<64>::ss<0>(s, descriptor(x + at, 0), descriptor(y + at, 0), k > 0);
        }
        wgmma_commit();
    }
    barrier_wait(work.ready, work.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4 * XBlocks; ++k) {
        const u64 a = descriptor(x + (k / 4) * BLOCK + (k % 4) * 32, 0);
        if (Transposed)
            Wgmma<N>::template ss<0>(
                o, a, descriptor(work.snapshot + (k / 4) * (K_BLOCKS * BLOCK) + (k % 4) * 32, 0), k > 0);
        else
            Wgmma<N>::template ss<1>(o, a, descriptor(work.snapshot + k * 2048, K_BLOCKS * BLOCK), k > 0);
    }
    wgmma_commit();
    const int row = 16 * warp + lane / 4, column = 2 * (lane & 3);
    u32 a[4][4];
    if (INTRA) {
        wgmma_wait<1>();
        pin(s);
        const int thread = 32 * warp + lane;
        if (DOTS && DUAL && Transposed) {
#pragma unroll
            for (int i = 0; i < 32; ++i) store_shared(work.exchange + 4 * (128 * i + thread), s[i]);
            named_arrive(5, 256);
        }
        constexpr bool PAIRS = DOTS && DUAL && !Transposed;
        if (PAIRS) named_sync(5, 256);
        float earlier[2] = {0.f, 0.f}, later[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) later[i] = 0.f;
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int i = 8 * k + 2 * r, at_row = row + 8 * (r & 1), at = 16 * k + 8 * (r / 2) + column;
                const float f0 = decay.between(at_row, at), f1 = decay.between(at_row, at + 1);
                if (PAIRS) {
                    // A token paired with itself has no decay between.
                    const u32 theirs = work.exchange + 4 * (128 * i + thread);
                    const float w0 = at == at_row ? 0.f : s[i] * f0 * load_shared(theirs);
                    const float w1 = at + 1 == at_row ? 0.f : s[i + 1] * f1 * load_shared(theirs + 512);
                    earlier[r & 1] += w0 + w1;
                    later[4 * k + 2 * (r / 2)] += w0;
                    later[4 * k + 2 * (r / 2) + 1] += w1;
                }
                a[k][r] = DECAY ? pack_bf16(s[i] * f0, s[i + 1] * f1)
                                : pack_bf16(f0 != 0.f ? s[i] : 0.f, f1 != 0.f ? s[i + 1] : 0.f);
            }
        if (PAIRS) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                earlier[e] += __shfl_xor_sync(~0u, earlier[e], 1);
                earlier[e] += __shfl_xor_sync(~0u, earlier[e], 2);
                if ((lane & 3) == 0) work.pair_sums[row + 8 * e] = earlier[e];
            }
#pragma unroll
            for (int i = 0; i < 16; ++i) {
#pragma unroll
                for (int step = 4; step < 32; step *= 2) later[i] += __shfl_xor_sync(~0u, later[i], step);
                if (lane < 4) work.pair_sums[CHUNK * (warp + 1) + 8 * (i / 2) + 2 * lane + (i & 1)] = later[i];
            }
            warpgroup_sync(named);
            if (thread < decay.valid) {
                float sum = -work.pair_sums[thread];
#pragma unroll
                for (int w = 1; w < 5; ++w) sum += work.pair_sums[CHUNK * w + thread];
                p.pairs[(long long)(seg.batch * p.heads + seg.head) * p.tokens + token + thread] = sum * p.scale;
            }
        }
    }
    wgmma_wait<0>();
    pin(o);
    warp_arrives(work.taken, lane);
    if (DECAY) {
        const float f0 = decay.from_state(row), f1 = decay.from_state(row + 8);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) o[i] *= (i & 2) ? f1 : f0;
        pin(o);
    }
    if (DOTS && (!DUAL || Transposed)) {
        float dot[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < N / 2; i += 2) {
            const int r = row + 8 * ((i / 2) & 1), n = i / 4;
            const u32 pair = __float_as_uint(
                load_shared(weights + (n / 8) * BLOCK + r * 128 + (((n & 7) ^ (r & 7)) << 4) + 2 * column));
            dot[(i / 2) & 1] += o[i] * low_bf16(pair) + o[i + 1] * high_bf16(pair);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            dot[e] += __shfl_xor_sync(~0u, dot[e], 1);
            dot[e] += __shfl_xor_sync(~0u, dot[e], 2);
            const int r = row + 8 * e;
            if ((lane & 3) == 0 && r < decay.valid)
                p.dots[(long long)(seg.batch * p.heads + seg.head) * p.tokens + token + r] = dot[e] * p.scale;
        }
    }
    if (INTRA) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<N>::template rs<1>(o, a[k], descriptor(z + k * 2048, BLOCK), 1);
        wgmma_commit();
        wgmma_wait<0>();
        pin(o);
    }
    const float scale = p.scale;
    if (DOTS && DUAL) named_sync(4, 256);  // k has been read for the dots
    warpgroup_sync(named);  // all four warps are done with x
    {
        const int r = (lane & 7) + (lane & 8), piece = (lane & 16) / 16;
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            const float* v = &o[8 * n];
            store_matrices(x + (n / 4) * BLOCK + (16 * warp + r) * 128 + (((2 * (n & 3) + piece) ^ (r & 7)) << 4),
                           pack_bf16(v[0] * scale, v[1] * scale), pack_bf16(v[2] * scale, v[3] * scale),
                           pack_bf16(v[4] * scale, v[5] * scale), pack_bf16(v[6] * scale, v[7] * scale));
        }
    }
    // TMA clips at the tensor's end, not at a document's.
    if (decay.valid == CHUNK || token + decay.valid == p.tokens) {
        fence_async();
        warpgroup_sync(named);
        if (warp == 0 && lane == 0) {
#pragma unroll
            for (int b = 0; b < OutBlocks; ++b)
                tma_store(map, x + b * BLOCK, 64 * b, token, seg.head, seg.batch, add);
            tma_store_commit();
            tma_store_wait_read<0>();
            barrier_arrive(work.empty);
        }
    } else {
        warpgroup_sync(named);
        unsigned short* base = (unsigned short*)out.data + seg.batch * out.batch + seg.head * out.head;
        for (int i = 32 * warp + lane; i < decay.valid * 8 * OutBlocks; i += 128) {
            const int r = i / (8 * OutBlocks), piece = i % (8 * OutBlocks);
            if (8 * piece >= out_columns) continue;
            const u32 from = x + (piece / 8) * BLOCK + r * 128 + (((piece & 7) ^ (r & 7)) << 4);
            uint4 v = load_shared_16(from);
            uint4* at = reinterpret_cast<uint4*>(base + (token + r) * out.token + 8 * piece);
            if (add) {
                const uint4 old = *at;
                v = make_uint4(add_bf16(v.x, old.x), add_bf16(v.y, old.y), add_bf16(v.z, old.z), add_bf16(v.w, old.w));
            }
            *at = v;
        }
        fence_async();
        warpgroup_sync(named);
        if (warp == 0 && lane == 0) barrier_arrive(work.empty);
    }
}

// ---- the roles of a block's warpgroups

// A block's work, and where what its roles share lies in shared memory.
struct Block {
    int from, to;  // segments
    // (LOOK_BACK) Which launch with the same flags this is; whether the first tiles of the block's only segment are still there
    // when it has been summed up; the stage of the ring where the sum begins, so that they lie where they belong.
    u32 turn;
    bool kept;
    int sum_stage;
    u32 tiles, snapshots;
    float* logs;       // cumulative log-decays of the tiles, [STAGES, CHUNK]
    float* pair_sums;  // see Work
    // Barriers, of each stage: tiles have come, may be overwritten; (LOOK_BACK) the same while segments are summed up.
    u32 full, empty, sum_full, sum_empty;
    // Of each snapshot: it is there, no longer needed. Of each piece of a state that enters: it has come.
    u32 ready, taken, entered;
    int warp, lane, thread;  // of the warpgroup

    DEVICE SumRing sum_ring() const {
        return {tiles + Y_AT, tiles + Z_AT, STAGE, logs, sum_full, sum_empty};
    }
};

// (LOOK_BACK) Until no stage of the ring is any longer needed for sums; `w`: the walk that has loaded them.
DEVICE void until_free(const Block& block, WalkBack& w) {
    for (int i = 0; i < STAGES; ++i) {
        barrier_wait(block.sum_empty + 8 * w.stage, w.phase ^ 1);
        w.next<STAGES>();
    }
}

// One thread. y and z for the sums, from the last tile to the first; then all that the outputs want.
DEVICE void load_tiles(const RunParams& p, const Block& block) {
    if (LOOK_BACK) {
        WalkBack w{block.sum_stage};
        const u64 policy = evict_last();
        for (int s = block.from; s < block.to; ++s) {
            const Segment seg = p.segments[s];
            if (seg.flags & p.left) load_sum_tiles<STAGES>(block.sum_ring(), w, &p.y, &p.z, seg, policy);
        }
        if (!block.kept) until_free(block, w);
    }
    Walk w;
    for (int s = block.from; s < block.to; ++s) {
        const Segment seg = p.segments[s];
        const int n = chunks_of(seg);
        for (int i = 0; i < n; ++i) {
            const int token = seg.start + chunk_at(i, n) * CHUNK;
            const u32 tile = block.tiles + w.stage * STAGE, bar = block.full + 8 * w.stage;
            const bool there = block.kept && i < STAGES;
            barrier_wait(block.empty + 8 * w.stage, w.phase ^ 1);
            barrier_expect(bar, there ? LOADED - SUM_STAGE : LOADED);
            if (INTRA && !there) {
                load_tile(&p.y, tile + Y_AT, K_BLOCKS, bar, token, seg);
                load_tile(&p.z, tile + Z_AT, V_BLOCKS, bar, token, seg);
            }
            load_tile(&p.x, tile, K_BLOCKS, bar, token, seg);
            if (DUAL || DOTS) load_tile(&p.x2, tile + X2_AT, V_BLOCKS, bar, token, seg);
            w.next<STAGES>();
        }
    }
}

// One warp: the log-decays of what `load_tiles` loads.
DEVICE void load_decays(const RunParams& p, const Block& block) {
    if (LOOK_BACK) {
        WalkBack w{block.sum_stage};
        for (int s = block.from; s < block.to; ++s) {
            const Segment seg = p.segments[s];
            if (seg.flags & p.left) load_sum_logs<STAGES>(block.sum_ring(), w, p.decay, seg, block.lane);
        }
        if (!block.kept) until_free(block, w);
    }
    Walk w;
    const auto room = [&] {
        barrier_wait(block.empty + 8 * w.stage, w.phase ^ 1);
        return block.logs + w.stage * CHUNK;
    };
    const auto done = [&] {
        warp_arrives(block.full + 8 * w.stage, block.lane);
        w.next<STAGES>();
    };
    for (int s = block.from; s < block.to; ++s) {
        const Segment seg = p.segments[s];
        const int n = chunks_of(seg), there = block.kept ? min(STAGES, n) : 0;
        for (int i = 0; i < there; ++i) done();
        load_logs(p.decay, seg, there, block.lane, [&](int i) { return chunk_at(i, n); }, room, done);
    }
}

typedef State<K_BLOCKS, 64 * V_BLOCKS> RunState;
static_assert(INTRA || !LOOK_BACK, "what comes late has been summed up");
static_assert(K_BLOCKS * RunState::PIECE == 2 * SNAPSHOT, "a state in f32 has room in the two snapshots");

// (LOOK_BACK) The sums of this block's segments, for the blocks after it.
DEVICE void show_sums(const RunParams& p, const Block& block) {
    WalkBack w{block.sum_stage};
    for (int s = block.from; s < block.to; ++s) {
        const Segment seg = p.segments[s];
        if (!(seg.flags & p.left)) continue;
        RunState sum;
        const float total = sum_up<STAGES>(block.sum_ring(), w, sum, seg, block.warp, block.lane);
        sum.scale(p.sum_scale);
        sum.write_pieces(p.sums + (long long)seg.slot * K_BLOCKS * (RunState::PIECE / 4), block.thread);
        if (DECAY && block.thread == 0) p.decays[seg.slot] = total;
        fence_async_global();
        warpgroup_sync(1);
        if (block.thread == 0) tell(p.flags + seg.slot, block.turn);
    }
}

// (LOOK_BACK) `state`, zero before, becomes the one that enters `seg`. The sums come by way of the snapshots, which nobody uses.
// `parity`: of the barriers `entered`.
DEVICE void add_sums_before(const RunParams& p, const Block& block, RunState& state, const Segment& seg, u32& parity) {
    const Chain chain = p.chains[seg.chain];
    const int place = seg.slot - chain.first, before = REVERSE ? chain.count - 1 - place : place;
    const auto slot = [&](int i) { return chain.first + (REVERSE ? chain.count - 1 - i : i); };
    const auto load = [&](int i, int b) {
        if (b == 0) {
            wait_for(p.flags + slot(i), block.turn);
            fence_async_global();
        }
        barrier_expect(block.entered + 8 * b, RunState::PIECE);
        const float* piece = p.sums + ((long long)slot(i) * K_BLOCKS + b) * (RunState::PIECE / 4);
        bulk_load(block.snapshots + b * RunState::PIECE, piece, block.entered + 8 * b, RunState::PIECE);
    };
    if (block.thread == 0)
        for (int b = 0; b < K_BLOCKS; ++b) load(0, b);
    for (int i = 0; i < before; ++i) {
        float a = 1.f;
#pragma unroll
        for (int b = 0; b < K_BLOCKS; ++b) {
            barrier_wait(block.entered + 8 * b, parity);
            if (DECAY && b == 0) a = exp2f(load_fresh(p.decays + slot(i)));
            state.add_piece(b, a, block.snapshots + b * RunState::PIECE, block.thread);
            warpgroup_sync(1);
            if (block.thread == 0 && i + 1 < before) load(i + 1, b);
        }
        parity ^= 1;
    }
}

// The state that enters `seg`, which `combine` has left, also by way of the snapshots.
DEVICE void read_entry(const RunParams& p, const Block& block, RunState& state, const Segment& seg, u32& parity,
                       const float* snapshots) {
    if (block.thread == 0) {
        const u32 bytes = 4 * p.rows * p.columns;
        barrier_expect(block.entered, bytes);
        bulk_load(block.snapshots, p.entries + (long long)seg.slot * p.rows * p.columns, block.entered, bytes);
    }
    barrier_wait(block.entered, parity);
    parity ^= 1;
    state.each_pair(block.warp, block.lane, [&](int row, int column, float& a, float& b) {
        if (row < p.rows && column < p.columns) {
            const float* at = snapshots + row * p.entry_row + column * p.entry_column;
            a = at[0];
            b = at[p.entry_column];
        }
    });
    warpgroup_sync(1);
}

// A warpgroup: takes the state through the segments, and shows a copy of it before every chunk.
DEVICE void keep_state(const RunParams& p, const Block& block, const float* snapshots) {
    if (LOOK_BACK) show_sums(p, block);
    Walk w;
    int count = 0;
    u32 entered = 0;
    for (int s = block.from; s < block.to; ++s) {
        const Segment seg = p.segments[s];
        RunState state;
        state.clear();
        if (seg.flags & p.entered) {
            // The outputs' warpgroups are done with the snapshots.
            barrier_wait(block.taken + 8 * (count & 1), (count / 2 & 1) ^ 1);
            barrier_wait(block.taken + 8 * (~count & 1), ((count + 1) / 2 & 1) ^ 1);
            if (LOOK_BACK)
                add_sums_before(p, block, state, seg, entered);
            else
                read_entry(p, block, state, seg, entered, snapshots);
        }
        if (LOOK_BACK && seg.slot >= 0)
            state.write(p.entries + (long long)seg.slot * p.rows * p.columns, p.rows, p.columns, block.warp, block.lane);
        state.scale(p.entry_scale);
        const int n = chunks_of(seg);
        for (int i = 0; i < n; ++i, ++count) {
            const int token = seg.start + chunk_at(i, n) * CHUNK, slot = count & 1;
            barrier_wait(block.taken + 8 * slot, (count / 2 & 1) ^ 1);
            state.publish(block.snapshots + slot * SNAPSHOT, block.warp, block.lane);
            fence_async();
            barrier_arrive(block.ready + 8 * slot);
            const u32 tile = block.tiles + w.stage * STAGE;
            barrier_wait(block.full + 8 * w.stage, w.phase);
            const ChunkDecay decay{block.logs + w.stage * CHUNK, min(CHUNK, seg.end - token)};
            if (!INTRA)
                state.scale(exp2_fast(decay.total()));
            else if (i + 1 < n)
                state.update<false>(tile + Y_AT, tile + Z_AT, decay, 0.f, block.warp, block.lane);
            warp_arrives(block.empty + 8 * w.stage, block.lane);
            w.next<STAGES>();
        }
    }
}

// A warpgroup, the `mine`-th of two: every second chunk's outputs, or (dual) one of the two outputs.
DEVICE void make_outputs(const RunParams& p, const Block& block, int mine) {
    const int warp = block.warp, lane = block.lane;
    Walk w;
    int count = 0;
    for (int s = block.from; s < block.to; ++s) {
        const Segment seg = p.segments[s];
        const int n = chunks_of(seg);
        for (int i = 0; i < n; ++i, ++count) {
            const int slot = count & 1, stage = w.stage;
            const u32 phase = w.phase;
            w.next<STAGES>();
            if (!DUAL && slot != mine) continue;
            const int token = seg.start + chunk_at(i, n) * CHUNK;
            const u32 tile = block.tiles + stage * STAGE;
            barrier_wait(block.full + 8 * stage, phase);
            if (block.kept && i < STAGES) barrier_wait(block.sum_full + 8 * stage, (n - 1 - i) / STAGES & 1);
            const Work work{
                seg,
                {block.logs + stage * CHUNK, min(CHUNK, seg.end - token)},
                token,
                block.snapshots + slot * SNAPSHOT,
                block.tiles + EXCHANGE_AT,
                block.pair_sums,
                block.ready + 8 * slot,
                (u32)count / 2 & 1,
                block.taken + 8 * slot,
                block.empty + 8 * stage,
            };
            if (!DUAL || mine == 0)
                outputs<K_BLOCKS, V_BLOCKS, false>(p, work, tile, tile + Y_AT, tile + Z_AT, tile + X2_AT, &p.out_map, p.out,
                                                   p.out_columns, p.accumulate & 1, warp, lane, 2 + mine);
            else
                outputs<V_BLOCKS, K_BLOCKS, true>(p, work, tile + X2_AT, tile + Z_AT, tile + Y_AT, tile, &p.out2_map, p.out2,
                                                  p.out2_columns, p.accumulate & 2, warp, lane, 2 + mine);
        }
    }
    if (warp == 0 && lane == 0) tma_store_wait<0>();
}

extern "C" __global__ void __launch_bounds__(512, 1) run(const __grid_constant__ RunParams p) {
    extern __shared__ char raw[];
    __shared__ float logs[STAGES * CHUNK];
    __shared__ float pair_sums[DOTS && DUAL ? 5 * CHUNK : 1];
    __shared__ u64 bars[4 * STAGES + 6];
    __shared__ u32 place[2];  // (LOOK_BACK) which block of its launch has begun, and which launch, from 1
    Block block;
    block.tiles = (shared_address(raw) + 1023) & ~1023u;
    block.snapshots = block.tiles + STAGES * STAGE;
    block.logs = logs;
    block.pair_sums = pair_sums;
    block.full = shared_address(bars);
    block.empty = block.full + 8 * STAGES;
    block.ready = block.empty + 8 * STAGES;
    block.taken = block.ready + 16;
    block.entered = block.taken + 16;
    block.sum_full = block.entered + 16;
    block.sum_empty = block.sum_full + 8 * STAGES;
    block.warp = threadIdx.x / 32 % 4;
    block.lane = threadIdx.x % 32;
    block.thread = threadIdx.x % 128;
    const int role = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        // Blocks wait for those that began before them, in whatever order the GPU starts them.
        const u64 begun = LOOK_BACK ? next_number(p.begun) : 0;
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(block.full + 8 * i, DECAY ? 1 + WARP_ARRIVALS : 1);
            barrier_init(block.empty + 8 * i, 4 * WARP_ARRIVALS + OUTPUT_ARRIVALS);
            barrier_init(block.sum_full + 8 * i, DECAY ? 1 + WARP_ARRIVALS : 1);
            barrier_init(block.sum_empty + 8 * i, 4 * WARP_ARRIVALS);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(block.ready + 8 * i, 128);
            barrier_init(block.taken + 8 * i, 4 * WARP_ARRIVALS * OUTPUT_ARRIVALS);
            barrier_init(block.entered + 8 * i, 1);
        }
        fence_barrier_init();
        place[0] = (u32)(begun % gridDim.x);
        place[1] = (u32)(begun / gridDim.x) + 1;
    }
    __syncthreads();
    const int at = !LOOK_BACK ? blockIdx.x : REVERSE ? gridDim.x - 1 - place[0] : place[0];
    block.from = p.first[at];
    block.to = p.first[at + 1];
    block.turn = LOOK_BACK ? place[1] : 0;
    block.kept = LOOK_BACK && block.to - block.from == 1 && p.segments[block.from].flags & p.left;
    block.sum_stage = block.kept ? (chunks_of(p.segments[block.from]) - 1) % STAGES : 0;
    if (role == 0) {
        registers_fewer<LOADER_REGISTERS>();
        if (block.warp == 0 && block.lane == 0)
            load_tiles(p, block);
        else if (DECAY && block.warp == 1)
            load_decays(p, block);
    } else if (role == 1) {
        registers_more<STATE_REGISTERS>();
        keep_state(p, block, reinterpret_cast<const float*>(raw + (block.snapshots - shared_address(raw))));
    } else {
        registers_more<OUTPUT_REGISTERS>();
        make_outputs(p, block, role - 2);
    }
}

// ---- decay_gradient --------------------------------------------------------------------------------------------

struct DecayGradientParams {
    const Segment* segments;
    const float* query_dots;  // [B, H, T], see RunParams
    const float* key_dots;
    const float* pairs;
    const float* entries;     // [slots, K, V]: the states at the segments' starts
    const float* finals;      // [rows, K, V]
    const float* exits;       // [slots, K, V]: the gradients of the states at the segments' ends
    float* out;               // [B, T, H]
    Decays decay;
    int elements, tokens, heads;
    int entered;     // the flags of the segments whose end has a gradient
    int accumulate;
};

constexpr int CHUNKS_AT_ONCE = 256;
// A chunk that decays by more lets through it less than the error of bf16, and less than what remains of a difference of
// large numbers: then nothing is taken to go through it.
constexpr float OPAQUE = -13.f;

DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// d log a_t: what crosses token t. Inside its chunk, from pairs; from before the chunk into it, from query dots of tokens
// t and later; from tokens before t out of the chunk, from key dots; and through the whole chunk. With E the sum over the
// elements of the state at a place times that state's gradient, the last is E at the chunk's end less the chunk's key dots,
// and E at its start is that plus its query dots.
extern "C" __global__ void __launch_bounds__(256) decay_gradient(const __grid_constant__ DecayGradientParams p) {
    __shared__ float partial[8];
    __shared__ float keys[CHUNKS_AT_ONCE], queries[CHUNKS_AT_ONCE], through[CHUNKS_AT_ONCE];
    __shared__ float carry;
    const Segment seg = p.segments[blockIdx.x];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float x = 0.f;
    if (seg.flags & p.entered) {
        const long long size = p.elements;
        const float* state = seg.after >= 0 ? p.entries + seg.after * size : p.finals + (-1 - seg.after) * size;
        const float* grad = p.exits + seg.slot * size;
        for (int i = 4 * threadIdx.x; i < p.elements; i += 1024) {
            const float4 a = *reinterpret_cast<const float4*>(state + i);
            const float4 b = *reinterpret_cast<const float4*>(grad + i);
            x += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
        }
    }
    x = sum_of_warp(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        x = 0.f;
        for (int i = 0; i < 8; ++i) x += partial[i];
        carry = x;
    }
    const long long row = (long long)(seg.batch * p.heads + seg.head) * p.tokens;
    const float* logs = p.decay.log + seg.batch * p.decay.batch + seg.head * p.decay.head;
    for (int last = chunks_of(seg); last > 0; last -= CHUNKS_AT_ONCE) {
        const int first = max(0, last - CHUNKS_AT_ONCE);
        for (int c = first + warp; c < last; c += 8) {
            float key = 0.f, query = 0.f, log = 0.f;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int t = seg.start + CHUNK * c + 2 * lane + e;
                if (t >= seg.end) continue;
                key += p.key_dots[row + t];
                query += p.query_dots[row + t];
                log += logs[t * p.decay.token] * LOG2E;
            }
            key = sum_of_warp(key);
            query = sum_of_warp(query);
            log = sum_of_warp(log);
            if (lane == 0) {
                keys[c - first] = key;
                queries[c - first] = query;
                through[c - first] = log;
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            float e = carry;
            for (int c = last - 1 - first; c >= 0; --c) {
                const float rest = through[c] < OPAQUE ? 0.f : e - keys[c];
                through[c] = rest;
                e = rest + queries[c];
            }
            carry = e;
        }
        __syncthreads();
        for (int c = first + warp; c < last; c += 8) {
            float key[2], value[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int t = seg.start + CHUNK * c + 2 * lane + e;
                key[e] = t < seg.end ? p.key_dots[row + t] : 0.f;
                value[e] = t < seg.end ? p.query_dots[row + t] + p.pairs[row + t] : 0.f;
            }
            // Sums over tokens ..t and over tokens t...
            float before = key[0] + key[1], after = value[0] + value[1];
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const float b = __shfl_up_sync(~0u, before, step), a = __shfl_down_sync(~0u, after, step);
                if (lane >= step) before += b;
                if (lane + step < 32) after += a;
            }
            const float rest = through[c - first];
            const float sums[2] = {before - key[1] - key[0] + after + rest, before - key[1] + after - value[0] + rest};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int t = seg.start + CHUNK * c + 2 * lane + e;
                if (t >= seg.end) continue;
                float* out = p.out + ((long long)seg.batch * p.tokens + t) * p.heads + seg.head;
                *out = sums[e] + (p.accumulate ? *out : 0.f);
            }
        }
        __syncthreads();
    }
}
