// Causal linear attention with any diagonal decay on sm_80 and later: M_s = a_s M_{s-1} + k_s^T v_s, o_s = scale q_s M_s. The
// work of linear.cu for what that does not take: a decay per channel, f16, f32, other GPUs than Hopper.
//
// One program, compiled once for every combination of
//   KIND     of q, k, v, do and the outputs: 0 bf16, 1 f16, 2 f32
//   DECAY    0 none, 1 a scalar per token and head, 2 a vector [K] per token and head
//   LOG_BYTES  of the logarithms of the latter: 4 f32, 2 in KIND
//   REVERSE  1: time runs backwards, which is what gradients do
//   OUTER    0: of the outputs that whose products sum over K, o, or (REVERSE) dv
//            1: that whose channels are K, dq, or (REVERSE) dk
//   INTRA    0: only what the entering state adds to o, for a state that comes late
//   DOTS     1 (OUTER): dlog_decay too, half of it by dq's pass
//   K_BLOCKS, V_BLOCKS  the head's key and value size in blocks of 64, 1 or 2
//   HOPPER   1 (bf16): four warps multiply by the state together (wgmma), which reads shared memory once for all
//   STAGES, SUM_STAGES  tiles in flight in `run` and in `summarize`, 1 or 2
//
// Segments, chains and the three passes `summarize`, `combine`, `run` are those of linear.cu. With R the gradient of the
// state, all kinds of passes are the same walk over groups of 16 tokens:
//
//   before a group of tokens the state is M, after it 2^L M + k'^T v     k'_j = k_j 2^{L - l_j}, q'_i = q_i 2^{l_i}
//   after a group its gradient is R, before it 2^L R + q'^T do
//   o  = q' M + A v          A_ij = <q_i 2^{l_i - l_j}, k_j> = <q'_i 2^-L, k'_j>, j <= i
//   dv = k' R + A^T do
//   dq = 2^l (do M^T + D (2^-L k'))      D_ij = <do_i, v_j>, j <= i
//   dk = 2^{L - l} (v R^T + D^T (2^-L q'))
//
// where l are the sums of log2 a inside the group, inclusive, and L is their last. All exponents are at most 0 but those of
// 2^-L, which stand for what q' and k' have too much of together. Where a channel decays by more than BOUND inside a group,
// A, D k and D^T q are summed up pair by pair instead.
//
// A warp keeps 16 rows of the state, or of its transpose, in registers, so that its columns of the output are its own affair:
// what it has of the state is the A of one product, which gives the output's transpose, and the D of the next. It has 16 channels
// of V, or (OUTER) of K. Warps share tiles of 32 tokens, q' and k' in them, and the A or D of each group. One pass for dv and dk
// would read less, but needs all registers for one block on a multiprocessor, which waits longer than the two that bf16 has room
// for.

#ifndef KIND
#define KIND 0
#define DECAY 2
#define LOG_BYTES 4
#define REVERSE 0
#define OUTER 0
#define INTRA 1
#define DOTS 0
#define K_BLOCKS 2
#define V_BLOCKS 2
#define HOPPER 0
#define STAGES 2
#define SUM_STAGES 2
#endif

#include "mma.cuh"
#if HOPPER
#include "hopper.cuh"
#include "wgmma.cuh"
#endif
#include "segments.cuh"
#include "fragments.cuh"
#include "groups.cuh"
#include "pairs.cuh"

constexpr bool INNER = !OUTER;

struct SummarizeParams {
    Input key, value;  // k and v, or (REVERSE) q and do
    Input decay;  // natural logarithms, [B, T, H], f32, or [B, T, H, K]
    const Segment* segments;
    const int* first;  // [blocks + 1]
    float* sums;       // [slots, K, V]
    float* decays;     // [slots, K], base 2
    float scale;
    int dk, dv;
    int which;  // the flags of the segments to sum up
};

struct CombineParams {
    const Chain* chains;
    const float* sums;      // [slots, K, V], or null: zero
    const float* decays;    // [slots, K], or null: no decay
    const float* external;  // [rows, K, V] or null
    float* entries;         // [slots, K, V]
    float* finals;          // [rows, K, V] or null
    int dk, dv;
    int reverse;
};

struct RunParams {
    Input q, k, v, d_o;
    Input decay;  // natural logarithms, [B, T, H], f32, or [B, T, H, K]
    Output out;
    // f32, [B, T, H, K], or for a scalar decay [B, T, H, K / 16], to be summed: `dots` q dq without the pairs of a token with
    // itself, made by dq's pass for dk's; `d_log` dlog_decay.
    Output dots, d_log;
    const Segment* segments;
    const int* first;
    const float* entries;  // [slots, K, V]
    // For dlog_decay, the states at the segments' starts [slots, K, V] and at the chains' ends [rows, K, V].
    const float* states;
    const float* finals;
    float scale;        // of the outputs
    float entry_scale;  // of the entry states
    int dk, dv;
    int accumulate;  // bit 0: adds to out; 1: to d_log
    int entered;     // the flags of the segments that a state enters
};

// ---- summarize -------------------------------------------------------------------------------------------------

constexpr int SUM_THREADS = 2 * DV, SUM_AT_ONCE = (KIND == 0 ? 512 : 256) / SUM_THREADS;
typedef Layout<REVERSE, !REVERSE, !REVERSE, REVERSE, REVERSE, !REVERSE, false, false, SUM_STAGES> SumLayout;

extern "C" __global__ void __launch_bounds__(SUM_THREADS, SUM_AT_ONCE) summarize(const __grid_constant__ SummarizeParams p) {
    extern __shared__ uint4 raw[];
    __shared__ Decayed d;
    const SumLayout tiles{tiles_in(raw)};
    const u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const int last = p.first[blockIdx.x + 1];
    __shared__ Rows keys, values, logs;
    Slice<DK> state;  // transposed
    for (int s = p.first[blockIdx.x]; s < last; ++s) {
        const Segment seg = p.segments[s];
        if (!(seg.flags & p.which)) continue;
        const int n = chunks_of(seg), length = seg.end - seg.start;
        auto token_of = [&](int i) { return (REVERSE ? n - 1 - i : i) * CHUNK; };  // in the segment
        if (threadIdx.x == 0) {
            keys = rows_of(p.key, RAW_BYTES, seg);
            values = rows_of(p.value, RAW_BYTES, seg);
            if (DECAY) logs = rows_of(p.decay, LOG_BYTES, seg);
        }
        float next_log = 0.f;
        auto load = [&](int i) {
            if (i < n) {
                const int token = token_of(i), stage = i % SUM_STAGES;
                load_tile<RAW_BYTES, DK, SUM_THREADS>(REVERSE ? tiles.q(stage) : tiles.k(stage), keys, p.dk, token, length);
                load_tile<RAW_BYTES, DV, SUM_THREADS>(REVERSE ? tiles.d_o(stage) : tiles.v(stage), values, p.dv, token, length);
                if (DECAY == 2) load_tile<LOG_BYTES, DK, SUM_THREADS>(tiles.log(stage), logs, p.dk, token, length);
                next_log = scalar_log(logs, token, length);
            }
            copy_async_commit();
        };
        __syncthreads();
        load(0);
        state.each(row, lane, [](int, int, float& x) { x = 0.f; });
        float total = 0.f;
        for (int i = 0; i < n; ++i) {
            const int stage = i % SUM_STAGES;
            if (DECAY == 1 && threadIdx.x < CHUNK) d.scalars[threadIdx.x] = next_log;
            copy_async_wait<0>();
            if (!DECAY) written();
            __syncthreads();
            if (SUM_STAGES > 1) load(i + 1);
            if (DECAY) {
                prime<SumLayout, false, SUM_THREADS>(tiles, stage, d, 0);
                written();
                __syncthreads();
                if (threadIdx.x < DK)
#pragma unroll
                    for (int g = 0; g < GROUPS; ++g) total += d.log[g][threadIdx.x];
            }
#pragma unroll
            for (int step = 0; step < GROUPS; ++step) {
                const int g = REVERSE ? GROUPS - 1 - step : step;
                if (DECAY) state.scale_columns(d.through[g], lane);
                if (REVERSE)
                    state.update(tiles.d_o(stage), tiles.primed_q(stage), g, row, lane);
                else
                    state.update(tiles.v(stage), tiles.primed_k(stage), g, row, lane);
                state.wait();
            }
            if (SUM_STAGES == 1) {
                __syncthreads();
                load(i + 1);
            }
        }
        float* out = p.sums + (long long)seg.slot * p.dk * p.dv;
        state.each(row, lane, [&](int v, int k, float& x) {
            if (k < p.dk && v < p.dv) out[k * p.dv + v] = x * p.scale;
        });
        if (DECAY && threadIdx.x < p.dk) p.decays[(long long)seg.slot * p.dk + threadIdx.x] = total;
    }
}

// ---- combine ---------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(128) combine(const __grid_constant__ CombineParams p) {
    const int at = (blockIdx.y * 128 + threadIdx.x) * 4, size = p.dk * p.dv, row = at / p.dv;
    if (at < size)
        combine_chain(p.chains[blockIdx.x], p.reverse, at, size, p.sums, p.external, p.entries, p.finals, [&](int slot) {
            return p.decays ? exp2f(p.decays[(long long)slot * p.dk + row]) : 1.f;
        });
}

// ---- run -------------------------------------------------------------------------------------------------------

typedef Slice<OUTER ? DV : DK> State;  // (INNER) of its transpose
constexpr int THREADS = 32 * WARPS;
constexpr int AT_ONCE = (KIND == 0 ? 512 : 256) / THREADS;  // blocks on a multiprocessor
typedef Layout<INNER || REVERSE || DOTS, INTRA && (INNER || !REVERSE || DOTS), INTRA && (OUTER || !REVERSE),
               OUTER || REVERSE, INNER || REVERSE, INTRA && (INNER || !REVERSE), DOTS && REVERSE && DECAY == 2,
               OUTER && DECAY == 2 && LOG_BYTES == 2, STAGES> RunLayout;

// x, or with `add` the sum of it and what is there.
template <typename T>
DEVICE void add_to(T* at, T x, bool add);

template <>
DEVICE void add_to(float* at, float x, bool add) {
    *at = add ? x + *at : x;
}

template <>
DEVICE void add_to(float2* at, float2 x, bool add) {
    if (add) {
        const float2 old = *at;
        x = make_float2(x.x + old.x, x.y + old.y);
    }
    *at = x;
}

#if KIND != 2
template <>
DEVICE void add_to(uint2* at, uint2 x, bool add) {
    if (add) {
        const uint2 old = *at;
        const float2 a = numbers_of_raw(x.x), b = numbers_of_raw(x.y), c = numbers_of_raw(old.x), d = numbers_of_raw(old.y);
        x = make_uint2(raw_of(a.x + c.x, a.y + c.y), raw_of(b.x + d.x, b.y + d.y));
    }
    *at = x;
}
#endif

// o, transposed: 16 channels from `column` on of a group's 16 tokens, 8 bytes a lane.
DEVICE void store_group(const Rows& out, int length, int token, float (&o)[2][4], float scale, int column, int width, bool add,
                        u32 lane) {
    if (KIND == 2) transpose(o);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int row = token + lane / 4 + 8 * e;
#if KIND == 2
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const int to = column + 8 * b + 2 * (lane & 3);
            if (row < length && to < width)
                add_to(reinterpret_cast<float2*>(out.at(row, to * RAW_BYTES)),
                       make_float2(o[b][2 * e] * scale, o[b][2 * e + 1] * scale), add);
        }
#else
        // Neighbours exchange, so that one has four channels of the first 8, the other of the last 8.
        const bool odd = lane & 1;
        const Raw low = transposed(raw_of(o[e][0] * scale, o[e][1] * scale));
        const Raw high = transposed(raw_of(o[e][2] * scale, o[e][3] * scale));
        const Raw other = __shfl_xor_sync(~0u, odd ? low : high, 1);
        const int to = column + (odd ? 8 : 0) + 2 * (lane & 2);
        if (row < length && to < width)
            add_to(reinterpret_cast<uint2*>(out.at(row, to * RAW_BYTES)),
                   odd ? make_uint2(other, high) : make_uint2(low, other), add);
#endif
    }
}

// sum_V M R at a segment's end, `state` being R: of a lane's two channels of K; for a scalar decay, at [0], of all 16.
DEVICE void meet(float (&rest)[2], const RunParams& p, const Segment& s, State& state, int row, u32 lane) {
    rest[0] = rest[1] = 0.f;
    if (!(s.flags & p.entered)) return;
    const long long size = p.dk * p.dv;
    const float* m = s.after >= 0 ? p.states + s.after * size : p.finals + (-1 - s.after) * size;
#pragma unroll
    for (int n = 0; n < DV / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int k = row + lane / 4 + 8 * e, v = 8 * n + 2 * (lane & 3);
            if (k < p.dk && v < p.dv) {
                const float2 x = *reinterpret_cast<const float2*>(m + k * p.dv + v);
                rest[e] += x.x * state.m[n][2 * e] + x.y * state.m[n][2 * e + 1];
            }
        }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        rest[e] += __shfl_xor_sync(~0u, rest[e], 1);
        rest[e] += __shfl_xor_sync(~0u, rest[e], 2);
    }
    if (DECAY == 1) {
        rest[0] += rest[1];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) rest[0] += __shfl_xor_sync(~0u, rest[0], step);
    }
}

// Of one group: what a warp's state gave, `through`, and what the group gives itself make dq or dk, and what goes with it of
// dlog_decay. Of the lane at [n][2 r + e] are token 8 n + 2 (lane & 3) + e and channel lane / 4 + 8 r.
DEVICE void finish_outer(const RunParams& p, const Tensors& of, int token, int group, const RunLayout& tiles, int stage,
                         const Decayed& d, bool steep, Lanes& scores, const float (&through)[2][4],
                         const float (&scalar_dots)[2][2], float (&rest)[2], int column, u32 lane) {
    float others[2][4], self[2][4];
    if (DECAY && steep) {
        weigh_exactly(others, self, scores, of, p.dk, token, group, column, lane);
    } else {
        Pair keys[4];
        (REVERSE ? tiles.primed_q(stage) : tiles.primed_k(stage)).columns(keys, group * GROUP, column, lane);
        const Part part = scores[group][lane];
        Pair low = part.a[0], high = part.a[3];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) others[n][e] = self[n][e] = 0.f;
        if (DOTS) {
            // The diagonal is in these two.
            const float2 x = numbers_of(low), y = numbers_of(high);
            const int way = 2 * (lane & 3) - lane / 4;  // 0: the pair's first is on it; -1: its second
            const Pair nothing = pair_of(0.f, 0.f);
            multiply(self[0], keys, pair_of(way == 0 ? x.x : 0.f, way == -1 ? x.y : 0.f), nothing);
            multiply(self[1], keys, nothing, pair_of(way == 0 ? y.x : 0.f, way == -1 ? y.y : 0.f));
            low = pair_of(way == 0 ? 0.f : x.x, way == -1 ? 0.f : x.y);
            high = pair_of(way == 0 ? 0.f : y.x, way == -1 ? 0.f : y.y);
        }
        multiply(others[0], keys, low, part.a[2]);
        multiply(others[1], keys, part.a[1], high);
    }
    Pair own[4];  // of q or k
    if (DOTS) (REVERSE ? tiles.k(stage) : tiles.q(stage)).columns(own, group * GROUP, column, lane);
    float out[2][4], sums[2][2] = {}, early[2][2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int channel = column + lane / 4 + 8 * r;
        const float back = DECAY && !steep ? d.back[group][channel] : 1.f;
        float later[2][2], earlier[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int in_group = 8 * n + 2 * (lane & 3) + e, row = group * GROUP + in_group, i = 2 * r + e;
                const float f = DECAY == 0 ? 1.f : DECAY == 1 ? d.factors[row] : tiles.factors(stage).at<float>(row, channel);
                const float t = through[n][i], inside = others[n][i] * back;
                // Summed up exactly, the inside has its decay.
                out[n][i] = f * t + (DECAY && steep ? 1.f : f) * (inside + self[n][i] * back);
                if (!DOTS) continue;
                const float2 pair = numbers_of(own[2 * n + r]);
                const float x = e ? pair.y : pair.x, a = x * f * t, b = (DECAY && steep ? x : x * f) * inside;
                if (REVERSE && DECAY == 1) {
                    sums[n][e] -= b;
                    early[n][e] += a;
                } else if (REVERSE) {
                    earlier[n][e] = a;
                    later[n][e] = tiles.dots(stage).at<float>(row, channel) - b;
                } else if (DECAY == 1) {
                    sums[n][e] += a + b;
                } else if (token + in_group < of.length && channel < p.dk) {
                    of.dots.number<float>(token + in_group, channel) = a + b;
                }
            }
        if (DOTS && REVERSE && DECAY == 2) {
            decay_gradient(later, earlier, d.log[group][channel] < OPAQUE, rest[r], lane);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int at = token + 8 * n + 2 * (lane & 3) + e;
                    if (at < of.length && channel < p.dk)
                        add_to(&of.d_log.number<float>(at, channel), later[n][e] * p.scale, p.accumulate & 2);
                }
        }
    }
    if (DOTS && DECAY == 1) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int step = 4; step < 32; step *= 2) {
                    sums[n][e] += __shfl_xor_sync(~0u, sums[n][e], step);
                    if (REVERSE) early[n][e] += __shfl_xor_sync(~0u, early[n][e], step);
                }
                if (REVERSE) sums[n][e] += scalar_dots[n][e];
            }
        if (REVERSE) decay_gradient(sums, early, d.log[group][0] < OPAQUE, rest[0], lane);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int at = token + 8 * n + 2 * (lane & 3) + e;
                if (lane < 4 && at < of.length && column < p.dk)
                    add_to(&(REVERSE ? of.d_log : of.dots).number<float>(at, column / 16), sums[n][e] * (REVERSE ? p.scale : 1.f),
                           REVERSE && p.accumulate & 2);
            }
    }
    store_group(of.out, of.length, token, out, p.scale, column, p.dk, p.accumulate & 1, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) run(const __grid_constant__ RunParams p) {
    extern __shared__ uint4 raw[];
    __shared__ Decayed d;
    __shared__ Lanes scores;
    __shared__ Halves halves;
    __shared__ Tensors tensors[2];  // of this segment, and of the one before, which others may not be through with
    const RunLayout tiles{tiles_in(raw)};
    const u32 warp = threadIdx.x / 32;
    const int row = 16 * warp;  // of the state, and column of the output
    const int last = p.first[blockIdx.x + 1];
    State state;
    float rest[2];  // of dlog_decay, besides the state
    int parity = 0;
    if (threadIdx.x < 2 * GROUPS) d.steep[threadIdx.x / GROUPS][threadIdx.x % GROUPS] = 0;
    for (int s = p.first[blockIdx.x]; s < last; ++s) {
        const Segment seg = p.segments[s];
        const int n = chunks_of(seg), length = seg.end - seg.start;
        Tensors& of = tensors[s % 2];
        auto token_of = [&](int i) { return (REVERSE ? n - 1 - i : i) * CHUNK; };
        if (threadIdx.x == 0) {
            of.q = rows_of(p.q, RAW_BYTES, seg);
            of.k = rows_of(p.k, RAW_BYTES, seg);
            of.v = rows_of(p.v, RAW_BYTES, seg);
            of.d_o = rows_of(p.d_o, RAW_BYTES, seg);
            of.log = rows_of(p.decay, LOG_BYTES, seg);
            of.out = rows_of(p.out, RAW_BYTES, seg);
            of.dots = rows_of(p.dots, 4, seg);
            of.d_log = rows_of(p.d_log, 4, seg);
            of.length = length;
        }
        float next_log = 0.f;
        auto load = [&](int i) {
            if (i < n) {
                const int token = token_of(i), stage = i % STAGES;
                if (RunLayout::HAS_Q) load_tile<RAW_BYTES, DK, THREADS>(tiles.q(stage), of.q, p.dk, token, length);
                if (RunLayout::HAS_K) load_tile<RAW_BYTES, DK, THREADS>(tiles.k(stage), of.k, p.dk, token, length);
                if (RunLayout::HAS_V) load_tile<RAW_BYTES, DV, THREADS>(tiles.v(stage), of.v, p.dv, token, length);
                if (RunLayout::HAS_DO) load_tile<RAW_BYTES, DV, THREADS>(tiles.d_o(stage), of.d_o, p.dv, token, length);
                if (DECAY == 2) load_tile<LOG_BYTES, DK, THREADS>(tiles.log(stage), of.log, p.dk, token, length);
                if (RunLayout::HAS_DOTS) load_tile<4, DK, THREADS>(tiles.dots(stage), of.dots, p.dk, token, length);
                next_log = scalar_log(of.log, token, length);
            }
            copy_async_commit();
        };
        u32 lane = anew(threadIdx.x % 32);
        __syncthreads();
        load(0);
        const float* entry = p.entries + (long long)seg.slot * p.dk * p.dv;
        auto enter = [&](int k, int v, float& x) {
            x = (seg.flags & p.entered) && k < p.dk && v < p.dv ? entry[k * p.dv + v] * p.entry_scale : 0.f;
        };
        if (INNER) {
            state.each(row, lane, [&](int v, int k, float& x) { enter(k, v, x); });
        } else {
            state.each(row, lane, enter);
            if (DOTS && REVERSE) meet(rest, p, seg, state, row, lane);
        }
        for (int i = 0; i < n; ++i, parity ^= 1) {
            lane = anew(threadIdx.x % 32);
            const int stage = i % STAGES, token = token_of(i);
            const RawTile v = tiles.v(stage), d_o = tiles.d_o(stage);
            const PrimedTile q = tiles.primed_q(stage), k = tiles.primed_k(stage);
            const PrimedTile &keys = REVERSE ? q : k, &inner_x = REVERSE ? k : q;
            const RawTile &values = REVERSE ? d_o : v, &outer_x = REVERSE ? v : d_o;
            if (DECAY == 1 && threadIdx.x < CHUNK) d.scalars[threadIdx.x] = next_log;
            copy_async_wait<0>();
            if (!DECAY) written();
            __syncthreads();
            if (STAGES > 1) load(i + 1);
            if (DECAY) {
                if (threadIdx.x < GROUPS) d.steep[parity ^ 1][threadIdx.x] = 0;
                prime<RunLayout, OUTER, THREADS>(tiles, stage, d, parity);
                written();
                __syncthreads();
            }
            float scalar_dots[GROUPS][2][2];
            if (DOTS && REVERSE && DECAY == 1) {
#pragma unroll
                for (int g = 0; g < GROUPS; ++g)
#pragma unroll
                    for (int n = 0; n < 2; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int at = token + g * GROUP + 8 * n + 2 * (lane & 3) + e;
                            scalar_dots[g][n][e] = at < length && row < p.dk ? of.dots.number<float>(at, row / 16) : 0.f;
                        }
            }
            if (INTRA) {
                if (INNER) {
                    const int own = group_of(warp);
                    const bool wanted = !(DECAY && d.steep[parity][own]);
                    score<DECAY != 0, DK>(scores, halves, inner_x, keys, d.back[own], wanted, warp, lane);
                    if (DECAY)
#pragma unroll 1
                        for (int g = 0; g < GROUPS; ++g)
                            if (d.steep[parity][g])
                                // Rows differ in length: a warp has short and long ones.
                                for (int r = 0; r < GROUP; r += WARPS)
                                    score_exactly(scores, of, p.dk, token + g * GROUP, g,
                                                  r / WARPS % 2 ? r + WARPS - 1 - warp : r + warp, lane);
                } else {
                    score<false, DV>(scores, halves, outer_x, values, nullptr, true, warp, lane);
                }
            }
            // Before `finish_outer`: behind what its lanes may part in, products of a warpgroup would wait for each other.
            float o[GROUPS][2][4];
#pragma unroll
            for (int step = 0; step < GROUPS; ++step) {
                const int g = REVERSE ? GROUPS - 1 - step : step;
                if (INNER) {
                    state.apply(o[g], inner_x, g, lane);
                    if (DECAY) state.scale_columns(d.through[g], lane);
                    if (INTRA) state.update(values, keys, g, row, lane);
                } else {
                    state.apply(o[g], outer_x, g, lane);
                    if (DECAY) state.scale_rows(d.through[g], row, lane);
                    if (INTRA) state.update(keys, values, g, row, lane);
                }
                state.wait(o[g]);
            }
            if (INTRA) __syncthreads();
#pragma unroll
            for (int step = 0; step < GROUPS; ++step) {
                const int g = REVERSE ? GROUPS - 1 - step : step, at = token + g * GROUP;
                if (INNER) {
                    if (INTRA) add_pairs(o[g], values, scores[g][lane], g, row, lane);
                    store_group(of.out, length, at, o[g], p.scale, row, p.dv, p.accumulate & 1, lane);
                } else {
                    // The same for all lanes, and by a vote, which tells the compiler so: it would make wgmma wait otherwise.
                    const bool steep = DECAY && __any_sync(~0u, d.steep_slice(parity, g, row));
                    finish_outer(p, of, at, g, tiles, stage, d, steep, scores, o[g], scalar_dots[g], rest, row, lane);
                }
            }
            if (STAGES == 1) {
                __syncthreads();
                load(i + 1);
            }
        }
    }
}
