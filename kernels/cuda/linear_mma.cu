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
constexpr int WARPS = (OUTER ? DK : DV) / 16, THREADS = 32 * WARPS;
constexpr int AT_ONCE = (KIND == 0 ? 512 : 256) / THREADS;  // blocks on a multiprocessor
typedef Layout<INNER || REVERSE || DOTS, INTRA && (INNER || !REVERSE || DOTS), INTRA && (OUTER || !REVERSE),
               OUTER || REVERSE, INNER || REVERSE, INTRA && (INNER || !REVERSE), DOTS && REVERSE && DECAY == 2,
               OUTER && DECAY == 2 && LOG_BYTES == 2, STAGES> RunLayout;

// A matrix of a group's tokens by the same, as each lane has it of an A.
struct alignas(16) Part {
    Pair a[4];
};
typedef Part Lanes[GROUPS][32];

// Whether token `column` of a group has a part in the output of token `row`.
DEVICE bool sees(int row, int column) {
    return REVERSE ? column >= row : column <= row;
}

// o, transposed, += A v, or A^T do, of a group, for the 16 channels from `column` on.
DEVICE void add_pairs(float (&o)[2][4], const RawTile& values, const Part& scores, int group, int column, u32 lane) {
    Pair x[4];
    values.columns(x, group * GROUP, column, lane);
    multiply(o[0], x, scores.a[0], scores.a[2]);
    multiply(o[1], x, scores.a[1], scores.a[3]);
}

// What a block reads and writes of a segment, and how many tokens that has; all tokens are counted from its first.
struct Tensors {
    Rows q, k, v, d_o, log, out, dots, d_log;
    int length;
};

// Two numbers of a row, from global memory: zero beyond the segment's end.
DEVICE float2 raw_pair(const Rows& x, int length, int token, int column, int width) {
    if (token >= length || column >= width) return make_float2(0.f, 0.f);
    return numbers_of_raw(*reinterpret_cast<const Raw*>(x.at(token, column * RAW_BYTES)));
}

DEVICE float2 raw_log_pair(const Tensors& x, int token, int column, int width) {
    if (DECAY == 0 || token >= x.length || column >= width) return make_float2(0.f, 0.f);
    const char* at = x.log.at(token, DECAY == 1 ? 0 : column * LOG_BYTES);
    float2 log;
    if (DECAY == 1)
        log.x = log.y = *reinterpret_cast<const float*>(at);
    else if (LOG_BYTES == 2)
        log = numbers_of_raw(*reinterpret_cast<const Raw*>(at));
    else
        log = *reinterpret_cast<const float2*>(at);
    return make_float2(log.x * LOG2E, log.y * LOG2E);
}

// A is made by four warps, 8 columns of a group each, or by eight, of which two have a half of the channels each.
constexpr int SHARES = WARPS / 4;
struct Halves {
    float4 of[SHARES > 1 ? 4 : 1][32];
};
// Of a warp: the group that it works on.
DEVICE int group_of(u32 warp) {
    return warp % 4 / 2;
}

// 8 columns of A, or of A^T, or of D: x y^T, N channels, with x's times `by`.
template <bool Scaled, int N, typename X, typename Y>
DEVICE void score(Lanes& to, Halves& halves, const X& x, const Y& y, const float* by, u32 warp, u32 lane) {
    const int part = warp % 4, group = group_of(warp), half = part % 2, share = warp / 4, from = share * (N / SHARES);
    float s[4] = {0.f, 0.f, 0.f, 0.f};
    Pair b[4];  // of two steps
#pragma unroll
    for (int k = 0; k < N / SHARES / 16; ++k) {
        Pair a[4];
        x.rows(a, group * GROUP, from + 16 * k, lane);
        if (k % 2 == 0) y.summed_channels(b, group * GROUP + 8 * half, from + 16 * k, lane);
        if (Scaled) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 f = *reinterpret_cast<const float2*>(by + from + 16 * k + 2 * (lane & 3) + 4 * (i & 2));
                const float2 v = numbers_of(a[i]);
                a[i] = pair_of(v.x * f.x, v.y * f.y);
            }
        }
        multiply(s, a, b[k % 2 * 2], b[k % 2 * 2 + 1]);
    }
    if (SHARES > 1) {
        float4& other = halves.of[part][lane];
        if (share > 0) {
            other = make_float4(s[0], s[1], s[2], s[3]);
            named_arrive(1 + part, 64);
            return;
        }
        named_sync(1 + part, 64);
        s[0] += other.x;
        s[1] += other.y;
        s[2] += other.z;
        s[3] += other.w;
    }
    const int row = lane / 4, column = 8 * half + 2 * (lane & 3);
#pragma unroll
    for (int e = 0; e < 2; ++e)
        to[group][lane].a[2 * half + e] = pair_of(sees(row + 8 * e, column) ? s[2 * e] : 0.f,
                                                sees(row + 8 * e, column + 1) ? s[2 * e + 1] : 0.f);
}

// One number of such a matrix.
#if KIND == 0
typedef unsigned short Number;
DEVICE float number_of(Number x) {
    return low_bf16(x);
}
DEVICE Number number(float x) {
    return (Number)pack_bf16(x, 0.f);
}
#else
typedef float Number;
DEVICE float number_of(Number x) {
    return x;
}
DEVICE Number number(float x) {
    return KIND == 1 ? round_tf32(x) : x;
}
#endif

DEVICE Number* entry(Lanes& of, int group, int row, int column) {
    Pair* pair = &of[group][(row & 7) * 4 + (column & 7) / 2].a[row / 8 + column / 8 * 2];
    return reinterpret_cast<Number*>(pair) + (column & 1);
}

// One row of A, or of A^T, pair by pair, by a warp. `token`: the group's first.
DEVICE void score_exactly(Lanes& to, const Tensors& of, int width, int token, int group, int row, u32 lane) {
    const Rows &x = REVERSE ? of.k : of.q, &y = REVERSE ? of.q : of.k;
    float2 own[K_BLOCKS], sum[K_BLOCKS];
#pragma unroll
    for (int b = 0; b < K_BLOCKS; ++b) {
        own[b] = raw_pair(x, of.length, token + row, 64 * b + 2 * lane, width);
        sum[b] = make_float2(0.f, 0.f);
    }
    float mine = 0.f;
    // Four other tokens at a time, so that their loads and sums wait for each other no more than they must.
    constexpr int AT_A_TIME = 4, WAY = REVERSE ? 1 : -1;
#pragma unroll 1
    for (int far = 0; far <= (REVERSE ? GROUP - 1 - row : row); far += AT_A_TIME) {
        float dots[AT_A_TIME];
#pragma unroll
        for (int e = 0; e < AT_A_TIME; ++e) {
            const int at = row + WAY * (far + e);
            // Beyond the group there is nothing.
            const int other = at >= 0 && at < GROUP ? token + at : of.length;
            dots[e] = 0.f;
#pragma unroll
            for (int b = 0; b < K_BLOCKS; ++b) {
                const int column = 64 * b + 2 * lane;
                if (far + e > 0) {
                    const float2 g = raw_log_pair(of, REVERSE ? other : other + 1, column, width);
                    sum[b] = make_float2(sum[b].x + g.x, sum[b].y + g.y);
                }
                const float2 theirs = raw_pair(y, of.length, other, column, width);
                dots[e] += own[b].x * theirs.x * exp2_fast(sum[b].x) + own[b].y * theirs.y * exp2_fast(sum[b].y);
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
#pragma unroll
            for (int e = 0; e < AT_A_TIME; ++e) dots[e] += __shfl_xor_sync(~0u, dots[e], step);
#pragma unroll
        for (int e = 0; e < AT_A_TIME; ++e)
            if ((int)lane == row + WAY * (far + e)) mine = dots[e];
    }
    if (lane < GROUP) *entry(to, group, row, lane) = number(mine);
}

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

// Of four neighbouring lanes what those before and after this one have, and all.
struct Around {
    float before, after, all;
};

DEVICE Around around(float x, u32 lane) {
    const float beside = __shfl_xor_sync(~0u, x, 1), both = x + beside, others = __shfl_xor_sync(~0u, both, 2);
    const bool odd = lane & 1, upper = lane & 2;
    return {(odd ? beside : 0.f) + (upper ? others : 0.f), (odd ? 0.f : beside) + (upper ? 0.f : others), both + others};
}

// dlog_decay of one channel (or of 16 summed up) for a group's tokens, of which a lane has 8 n + 2 (lane & 3) + e at [n][e].
// `later`: q dq less what k dk has of pairs inside the group; `earlier`: the rest of k dk, which goes through the group's end.
// `rest`: at first sum_V M R at the group's end, then at its start.
DEVICE void decay_gradient(float (&later)[2][2], const float (&earlier)[2][2], bool opaque, float& rest, u32 lane) {
    const Around l0 = around(later[0][0] + later[0][1], lane), l1 = around(later[1][0] + later[1][1], lane);
    const Around e0 = around(earlier[0][0] + earlier[0][1], lane), e1 = around(earlier[1][0] + earlier[1][1], lane);
    const float through = opaque ? 0.f : rest - (e0.all + e1.all);
    const float beyond[2] = {l0.after + l1.all + e0.before + through, l1.after + e0.all + e1.before + through};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const float second = later[n][1];
        later[n][0] += second + beyond[n];
        later[n][1] = second + earlier[n][0] + beyond[n];
    }
    rest = l0.all + l1.all + through;
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

// D k or D^T q of a group for 16 channels, pair by pair: of different tokens, and of a token with itself.
DEVICE void weigh_exactly(float (&others)[2][4], float (&self)[2][4], Lanes& scores, const Tensors& of, int width, int token,
                          int group, int column, u32 lane) {
    const Rows& z = REVERSE ? of.q : of.k;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = lane / 4 + 8 * e, at = column + 8 * b + 2 * (lane & 3);
            float2 sum = make_float2(0.f, 0.f), all = sum, own = sum;
            // As many for every lane; beyond the group there is nothing.
#pragma unroll 1
            for (int far = 0; far < GROUP; ++far) {
                const int other = REVERSE ? row + far : row - far;
                const bool there = REVERSE ? other < GROUP : other >= 0;
                const int from = there ? token + other : of.length;
                if (far > 0) {
                    const float2 g = raw_log_pair(of, REVERSE ? from : from + 1, at, width);
                    sum.x += g.x;
                    sum.y += g.y;
                }
                const float2 x = raw_pair(z, of.length, from, at, width);
                const float weight = there ? number_of(*entry(scores, group, row, other)) : 0.f;
                const float2 share = make_float2(weight * x.x * exp2_fast(sum.x), weight * x.y * exp2_fast(sum.y));
                if (far == 0)
                    own = share;
                else
                    all = make_float2(all.x + share.x, all.y + share.y);
            }
            others[b][2 * e] = all.x;
            others[b][2 * e + 1] = all.y;
            self[b][2 * e] = own.x;
            self[b][2 * e + 1] = own.y;
        }
    transpose(others);
    transpose(self);
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
                    if (const int g = group_of(warp); !(DECAY && d.steep[parity][g]))
                        score<DECAY != 0, DK>(scores, halves, inner_x, keys, d.back[g], warp, lane);
                    if (DECAY)
#pragma unroll 1
                        for (int g = 0; g < GROUPS; ++g)
                            if (d.steep[parity][g])
                                // Rows differ in length: a warp has short and long ones.
                                for (int r = 0; r < GROUP; r += WARPS)
                                    score_exactly(scores, of, p.dk, token + g * GROUP, g,
                                                  r / WARPS % 2 ? r + WARPS - 1 - warp : r + warp, lane);
                } else {
                    score<false, DV>(scores, halves, outer_x, values, nullptr, warp, lane);
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
