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
// what it has of the state is the B of one product and the D of the next. It has 16 channels of V, or (OUTER) of K. Warps share
// tiles of 32 tokens, q' and k' in them, and the A or D of each group. One pass for dv and dk would read less, but needs all
// registers for one block on a multiprocessor, which waits longer than the two that bf16 has room for.

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
#define STAGES 2
#define SUM_STAGES 2
#endif

#include "mma.cuh"
#include "segments.cuh"
#include "fragments.cuh"
#include "groups.cuh"

constexpr bool INNER = !OUTER;

struct SummarizeParams {
    Input key, value;  // k and v, or (REVERSE) q and do
    Decays decay;
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
    Decays decay;
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
    const SumLayout tiles{(char*)raw};
    const u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const int last = p.first[blockIdx.x + 1];
    Slice state;  // transposed, DK columns
    for (int s = p.first[blockIdx.x]; s < last; ++s) {
        const Segment seg = p.segments[s];
        if (!(seg.flags & p.which)) continue;
        const int n = chunks_of(seg);
        auto token_of = [&](int i) { return seg.start + (REVERSE ? n - 1 - i : i) * CHUNK; };
        float next_log = 0.f;
        auto load = [&](int i) {
            if (i < n) {
                const int token = token_of(i), stage = i % SUM_STAGES;
                load_tile<RAW_BYTES, DK, SUM_THREADS>(REVERSE ? tiles.q(stage) : tiles.k(stage), p.key, p.dk, seg, token);
                load_tile<RAW_BYTES, DV, SUM_THREADS>(REVERSE ? tiles.d_o(stage) : tiles.v(stage), p.value, p.dv, seg, token);
                if (DECAY == 2) load_tile<LOG_BYTES, DK, SUM_THREADS>(tiles.log(stage), logs_of(p.decay), p.dk, seg, token);
                next_log = scalar_log(p.decay, seg, token);
            }
            copy_async_commit();
        };
        __syncthreads();
        load(0);
        state.each<DK>(row, lane, [](int, int, float& x) { x = 0.f; });
        float total = 0.f;
        for (int i = 0; i < n; ++i) {
            const int stage = i % SUM_STAGES;
            if (DECAY == 1 && threadIdx.x < CHUNK) d.scalars[threadIdx.x] = next_log;
            copy_async_wait<0>();
            __syncthreads();
            if (SUM_STAGES > 1) load(i + 1);
            if (DECAY) {
                prime<SumLayout, false, SUM_THREADS>(tiles, stage, d, 0);
                __syncthreads();
                if (threadIdx.x < DK)
#pragma unroll
                    for (int g = 0; g < GROUPS; ++g) total += d.log[g][threadIdx.x];
            }
#pragma unroll
            for (int step = 0; step < GROUPS; ++step) {
                const int g = REVERSE ? GROUPS - 1 - step : step;
                if (DECAY) state.scale_columns<DK>(d.through[g], lane);
                if (REVERSE)
                    state.update<DK>(tiles.d_o(stage), tiles.primed_q(stage), g, row, lane);
                else
                    state.update<DK>(tiles.v(stage), tiles.primed_k(stage), g, row, lane);
            }
            if (SUM_STAGES == 1) {
                __syncthreads();
                load(i + 1);
            }
        }
        float* out = p.sums + (long long)seg.slot * p.dk * p.dv;
        state.each<DK>(row, lane, [&](int v, int k, float& x) {
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

// Two numbers of a row, from global memory: zero beyond the segment's end.
DEVICE float2 raw_pair(const Input& x, const Segment& s, int token, int column, int width) {
    if (token >= s.end || column >= width) return make_float2(0.f, 0.f);
    return numbers_of_raw(*reinterpret_cast<const Raw*>(
        x.data + (s.batch * x.batch + s.head * x.head + token * x.token + column) * RAW_BYTES));
}

DEVICE float2 raw_log_pair(const Decays& d, const Segment& s, int token, int column, int width) {
    if (DECAY == 0 || token >= s.end || column >= width) return make_float2(0.f, 0.f);
    const long long at = s.batch * d.batch + s.head * d.head + token * d.token;
    float2 x;
    if (DECAY == 1)
        x.x = x.y = ((const float*)d.log)[at];
    else if (LOG_BYTES == 2)
        x = numbers_of_raw(*reinterpret_cast<const Raw*>(d.log + (at + column) * LOG_BYTES));
    else
        x = *reinterpret_cast<const float2*>(d.log + (at + column) * LOG_BYTES);
    return make_float2(x.x * LOG2E, x.y * LOG2E);
}

// 8 columns of A, or of A^T, from column 8 half on, or of D: x y^T, with x's channels times `by`.
template <bool Scaled, int N, typename X, typename Y>
DEVICE void score(Lanes& to, const X& x, const Y& y, const float* by, int group, int half, u32 lane) {
    float s[4] = {0.f, 0.f, 0.f, 0.f};
    Pair b[4];  // of two steps
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        Pair a[4];
        x.rows(a, group * GROUP, 16 * k, lane);
        if (k % 2 == 0) y.summed_channels(b, group * GROUP + 8 * half, 16 * k, lane);
        if (Scaled) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 f = *reinterpret_cast<const float2*>(by + 16 * k + 2 * (lane & 3) + 4 * (i & 2));
                const float2 v = numbers_of(a[i]);
                a[i] = pair_of(v.x * f.x, v.y * f.y);
            }
        }
        multiply(s, a, b[k % 2 * 2], b[k % 2 * 2 + 1]);
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
DEVICE void score_exactly(Lanes& to, const RunParams& p, const Segment& s, int token, int group, int row, u32 lane) {
    const Input &x = REVERSE ? p.k : p.q, &y = REVERSE ? p.q : p.k;
    float2 own[K_BLOCKS], sum[K_BLOCKS];
#pragma unroll
    for (int b = 0; b < K_BLOCKS; ++b) {
        own[b] = raw_pair(x, s, token + row, 64 * b + 2 * lane, p.dk);
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
            const int other = at >= 0 && at < GROUP ? token + at : s.end;
            dots[e] = 0.f;
#pragma unroll
            for (int b = 0; b < K_BLOCKS; ++b) {
                const int column = 64 * b + 2 * lane;
                if (far + e > 0) {
                    const float2 g = raw_log_pair(p.decay, s, REVERSE ? other : other + 1, column, p.dk);
                    sum[b] = make_float2(sum[b].x + g.x, sum[b].y + g.y);
                }
                const float2 theirs = raw_pair(y, s, other, column, p.dk);
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

// A group's 16 tokens by 16 channels from `column` on, 8 bytes a lane.
DEVICE void store_group(const Output& out, const Segment& s, int token, const float (&o)[2][4], float scale, int column,
                        int width, bool add, u32 lane) {
    char* base = out.data + (s.batch * out.batch + s.head * out.head) * RAW_BYTES;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int row = token + lane / 4 + 8 * e;
        char* at = base + row * out.token * RAW_BYTES;
#if KIND == 2
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const int to = column + 8 * b + 2 * (lane & 3);
            if (row < s.end && to < width)
                add_to(reinterpret_cast<float2*>(at + to * RAW_BYTES),
                       make_float2(o[b][2 * e] * scale, o[b][2 * e + 1] * scale), add);
        }
#else
        // Neighbours exchange, so that one has four channels of the first 8, the other of the last 8.
        const bool odd = lane & 1;
        const Raw low = raw_of(o[0][2 * e] * scale, o[0][2 * e + 1] * scale);
        const Raw high = raw_of(o[1][2 * e] * scale, o[1][2 * e + 1] * scale);
        const Raw other = __shfl_xor_sync(~0u, odd ? low : high, 1);
        const int to = column + (odd ? 8 : 0) + 2 * (lane & 2);
        if (row < s.end && to < width)
            add_to(reinterpret_cast<uint2*>(at + to * RAW_BYTES), odd ? make_uint2(other, high) : make_uint2(low, other), add);
#endif
    }
}

// dlog_decay of one channel (or of 16 summed up) for a group's tokens, of which a lane has two, 8 apart. `later`: q dq less
// what k dk has of pairs inside the group; `earlier`: the rest of k dk, which goes through the group's end. `rest`: at first
// sum_V M R at the group's end, then at its start.
DEVICE void decay_gradient(float (&later)[2], const float (&earlier)[2], bool opaque, float& rest, u32 lane) {
    float before[2] = {earlier[0], earlier[1]};
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float a = __shfl_down_sync(~0u, later[e], step), b = __shfl_up_sync(~0u, before[e], step);
            if (lane + step < 32) later[e] += a;
            if (lane >= step) before[e] += b;
        }
    const float first = __shfl_sync(~0u, before[0], 28 + (lane & 3)), second = __shfl_sync(~0u, before[1], 28 + (lane & 3));
    later[0] += __shfl_sync(~0u, later[1], lane & 3);
    const float through = opaque ? 0.f : rest - (first + second);
    later[0] += before[0] - earlier[0] + through;
    later[1] += before[1] - earlier[1] + first + through;
    rest = __shfl_sync(~0u, later[0], lane & 3);
}

DEVICE float2* channels_of(const Output& out, const Segment& s, int token, int column) {
    return reinterpret_cast<float2*>(reinterpret_cast<float*>(out.data) + s.batch * out.batch + s.head * out.head
                                     + token * out.token + column);
}

DEVICE float* scalar_of(const Output& out, const Segment& s, int token, int column) {
    return reinterpret_cast<float*>(out.data) + s.batch * out.batch + s.head * out.head + token * out.token + column / 16;
}

// What a warp has of dlog_decay besides the state.
struct Rest {
    float at[2][2];  // by its column of the output, as there; a scalar decay's in the first
};

// sum_V M R at a segment's end, `state` being R.
DEVICE void meet(Rest& rest, const RunParams& p, const Segment& s, Slice& state, int row, u32 lane) {
    rest.at[0][0] = rest.at[0][1] = rest.at[1][0] = rest.at[1][1] = 0.f;
    if (!(s.flags & p.entered)) return;
    const long long size = p.dk * p.dv;
    const float* m = s.after >= 0 ? p.states + s.after * size : p.finals + (-1 - s.after) * size;
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < DV / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int k = row + lane / 4 + 8 * e, v = 8 * n + 2 * (lane & 3);
            if (k < p.dk && v < p.dv) {
                const float2 x = *reinterpret_cast<const float2*>(m + k * p.dv + v);
                sum[e] += x.x * state.m[n][2 * e] + x.y * state.m[n][2 * e + 1];
            }
        }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        sum[e] += __shfl_xor_sync(~0u, sum[e], 1);
        sum[e] += __shfl_xor_sync(~0u, sum[e], 2);
    }
    if (DECAY == 1) {
        float all = sum[0] + sum[1];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) all += __shfl_xor_sync(~0u, all, step);
        rest.at[0][0] = all;
    } else {
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int c = 0; c < 2; ++c) rest.at[b][c] = __shfl_sync(~0u, sum[b], 4 * (2 * (lane & 3) + c));
    }
}

// D k or D^T q of a group for 16 channels, pair by pair: of different tokens, and of a token with itself.
DEVICE void weigh_exactly(float (&others)[2][4], float (&self)[2][4], Lanes& scores, const RunParams& p, const Segment& s,
                          int token, int group, int column, u32 lane) {
    const Input& z = REVERSE ? p.q : p.k;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = lane / 4 + 8 * e, at = column + 8 * b + 2 * (lane & 3);
            float2 sum = make_float2(0.f, 0.f), all = sum, own = sum;
            for (int other = row; other >= 0 && other < GROUP; other += REVERSE ? 1 : -1) {
                if (other != row) {
                    const float2 g = raw_log_pair(p.decay, s, token + (REVERSE ? other : other + 1), at, p.dk);
                    sum.x += g.x;
                    sum.y += g.y;
                }
                const float2 x = raw_pair(z, s, token + other, at, p.dk);
                const float weight = number_of(*entry(scores, group, row, other));
                const float2 share = make_float2(weight * x.x * exp2_fast(sum.x), weight * x.y * exp2_fast(sum.y));
                if (other == row)
                    own = share;
                else
                    all = make_float2(all.x + share.x, all.y + share.y);
            }
            others[b][2 * e] = all.x;
            others[b][2 * e + 1] = all.y;
            self[b][2 * e] = own.x;
            self[b][2 * e + 1] = own.y;
        }
    __syncwarp();  // lanes had more or fewer pairs; products come next
}

// Of one group: what a warp's state gave, `through`, and what the group gives itself make dq or dk, and what goes
// with it of dlog_decay.
DEVICE void finish_outer(const RunParams& p, const Segment& s, int token, int group, const RunLayout& tiles, int stage,
                         const Decayed& d, bool steep, Lanes& scores, const float (&through)[2][4],
                         const float (&scalar_dots)[2], Rest& rest, int column, u32 lane) {
    const PrimedTile keys = REVERSE ? tiles.primed_q(stage) : tiles.primed_k(stage);
    float others[2][4], self[2][4];
    if (DECAY && steep) {
        weigh_exactly(others, self, scores, p, s, token, group, column, lane);
    } else {
        Pair b[4];
        keys.summed_tokens(b, group * GROUP, column, lane);
        Part part = scores[group][lane];
        Pair(&a)[4] = part.a;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) others[n][e] = self[n][e] = 0.f;
        if (DOTS) {
            // The diagonal is in a[0] and a[3].
            const float2 x = numbers_of(a[0]), y = numbers_of(a[3]);
            const int way = 2 * (lane & 3) - lane / 4;  // 0: the pair's first is on it; -1: its second
            const Pair diagonal[4] = {pair_of(way == 0 ? x.x : 0.f, way == -1 ? x.y : 0.f), pair_of(0.f, 0.f),
                                      pair_of(0.f, 0.f), pair_of(way == 0 ? y.x : 0.f, way == -1 ? y.y : 0.f)};
            multiply(self[0], diagonal, b[0], b[1]);
            multiply(self[1], diagonal, b[2], b[3]);
            a[0] = pair_of(way == 0 ? 0.f : x.x, way == -1 ? 0.f : x.y);
            a[3] = pair_of(way == 0 ? 0.f : y.x, way == -1 ? 0.f : y.y);
        }
        multiply(others[0], a, b[0], b[1]);
        multiply(others[1], a, b[2], b[3]);
    }
    float out[2][4], sums[2] = {0.f, 0.f}, early[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int at = column + 8 * n + 2 * (lane & 3);
        float2 back = make_float2(1.f, 1.f);
        if (DECAY && !steep) back = *reinterpret_cast<const float2*>(&d.back[group][at]);
        float later[2][2], earlier[2][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = group * GROUP + lane / 4 + 8 * e;
            float2 f = make_float2(1.f, 1.f);
            if (DECAY == 1) f.x = f.y = d.factors[row];
            if (DECAY == 2) f = tiles.factors(stage).at<float2>(row, at);
            const float t[2] = {through[n][2 * e], through[n][2 * e + 1]};
            const float inside[2] = {others[n][2 * e] * back.x, others[n][2 * e + 1] * back.y};
            const float own[2] = {self[n][2 * e] * back.x, self[n][2 * e + 1] * back.y};
            // Summed up exactly, the inside has its decay.
            const float2 g = DECAY && steep ? make_float2(1.f, 1.f) : f;
            out[n][2 * e] = f.x * t[0] + g.x * (inside[0] + own[0]);
            out[n][2 * e + 1] = f.y * t[1] + g.y * (inside[1] + own[1]);
            if (DOTS) {
                // q or k as it is, and with its decay.
                float2 w, v;
                if (REVERSE ? RunLayout::PRIME_K : RunLayout::PRIME_Q) {
                    w = numbers_of((REVERSE ? tiles.primed_k(stage) : tiles.primed_q(stage)).at<Pair>(row, at));
                    v = DECAY && steep ? raw_pair(REVERSE ? p.k : p.q, s, token + lane / 4 + 8 * e, at, p.dk) : w;
                } else {
                    v = numbers_of_raw((REVERSE ? tiles.k(stage) : tiles.q(stage)).at<Raw>(row, at));
                    w = make_float2(v.x * f.x, v.y * f.y);
                    if (!(DECAY && steep)) v = w;
                }
                const float2 a = make_float2(w.x * t[0], w.y * t[1]), b = make_float2(v.x * inside[0], v.y * inside[1]);
                if (REVERSE && DECAY == 1) {
                    sums[e] -= b.x + b.y;
                    early[e] += a.x + a.y;
                } else if (REVERSE) {
                    const float2 dots = tiles.dots(stage).at<float2>(row, at);
                    earlier[0][e] = a.x;
                    earlier[1][e] = a.y;
                    later[0][e] = dots.x - b.x;
                    later[1][e] = dots.y - b.y;
                } else if (DECAY == 1) {
                    sums[e] += a.x + b.x + a.y + b.y;
                } else if (token + lane / 4 + 8 * e < s.end && at < p.dk) {
                    *channels_of(p.dots, s, token + lane / 4 + 8 * e, at) = make_float2(a.x + b.x, a.y + b.y);
                }
            }
        }
        if (DOTS && REVERSE && DECAY == 2) {
            const float2 decay = *reinterpret_cast<const float2*>(&d.log[group][at]);
            decay_gradient(later[0], earlier[0], decay.x < OPAQUE, rest.at[n][0], lane);
            decay_gradient(later[1], earlier[1], decay.y < OPAQUE, rest.at[n][1], lane);
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (token + lane / 4 + 8 * e < s.end && at < p.dk)
                    add_to(channels_of(p.d_log, s, token + lane / 4 + 8 * e, at),
                           make_float2(later[0][e] * p.scale, later[1][e] * p.scale), p.accumulate & 2);
        }
    }
    if (DOTS && DECAY == 1) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                sums[e] += __shfl_xor_sync(~0u, sums[e], step);
                early[e] += __shfl_xor_sync(~0u, early[e], step);
            }
        if (REVERSE) {
            sums[0] += scalar_dots[0];
            sums[1] += scalar_dots[1];
            decay_gradient(sums, early, d.log[group][0] < OPAQUE, rest.at[0][0], lane);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if ((lane & 3) == 0 && token + lane / 4 + 8 * e < s.end && column < p.dk) {
                float* to = scalar_of(REVERSE ? p.d_log : p.dots, s, token + lane / 4 + 8 * e, column);
                *to = REVERSE ? sums[e] * p.scale + (p.accumulate & 2 ? *to : 0.f) : sums[e];
            }
    }
    store_group(p.out, s, token, out, p.scale, column, p.dk, p.accumulate & 1, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) run(const __grid_constant__ RunParams p) {
    extern __shared__ uint4 raw[];
    __shared__ Decayed d;
    __shared__ Lanes scores;
    const RunLayout tiles{(char*)raw};
    const u32 warp = threadIdx.x / 32;
    const int row = 16 * warp;  // of the state, and column of the output
    const int last = p.first[blockIdx.x + 1];
    Slice state;  // (INNER) of its transpose, DK columns; (OUTER) DV
    Rest rest;
    int parity = 0;
    if (threadIdx.x < 2 * GROUPS) d.steep[threadIdx.x / GROUPS][threadIdx.x % GROUPS] = 0;
    for (int s = p.first[blockIdx.x]; s < last; ++s) {
        const Segment seg = p.segments[s];
        const int n = chunks_of(seg);
        auto token_of = [&](int i) { return seg.start + (REVERSE ? n - 1 - i : i) * CHUNK; };
        float next_log = 0.f;
        auto load = [&](int i) {
            if (i < n) {
                const int token = token_of(i), stage = i % STAGES;
                if (RunLayout::HAS_Q) load_tile<RAW_BYTES, DK, THREADS>(tiles.q(stage), p.q, p.dk, seg, token);
                if (RunLayout::HAS_K) load_tile<RAW_BYTES, DK, THREADS>(tiles.k(stage), p.k, p.dk, seg, token);
                if (RunLayout::HAS_V) load_tile<RAW_BYTES, DV, THREADS>(tiles.v(stage), p.v, p.dv, seg, token);
                if (RunLayout::HAS_DO) load_tile<RAW_BYTES, DV, THREADS>(tiles.d_o(stage), p.d_o, p.dv, seg, token);
                if (DECAY == 2) load_tile<LOG_BYTES, DK, THREADS>(tiles.log(stage), logs_of(p.decay), p.dk, seg, token);
                if (RunLayout::HAS_DOTS) load_tile<4, DK, THREADS>(tiles.dots(stage), numbers_of(p.dots), p.dk, seg, token);
                next_log = scalar_log(p.decay, seg, token);
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
            state.each<DK>(row, lane, [&](int v, int k, float& x) { enter(k, v, x); });
        } else {
            state.each<DV>(row, lane, enter);
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
            __syncthreads();
            if (STAGES > 1) load(i + 1);
            if (DECAY) {
                if (threadIdx.x < GROUPS) d.steep[parity ^ 1][threadIdx.x] = 0;
                prime<RunLayout, OUTER, THREADS>(tiles, stage, d, parity);
                __syncthreads();
            }
            float scalar_dots[GROUPS][2];
            if (DOTS && REVERSE && DECAY == 1) {
#pragma unroll
                for (int g = 0; g < GROUPS; ++g)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int at = token + g * GROUP + lane / 4 + 8 * e;
                        scalar_dots[g][e] = at < seg.end && row < p.dk ? *scalar_of(p.dots, seg, at, row) : 0.f;
                    }
            }
            if (INTRA) {
                if (INNER) {
                    if (warp < 2 * GROUPS && !(DECAY && d.steep[parity][warp / 2]))
                        score<DECAY != 0, DK>(scores, inner_x, keys, d.back[warp / 2], warp / 2, warp % 2, lane);
                    if (DECAY)
#pragma unroll 1
                        for (int g = 0; g < GROUPS; ++g)
                            if (d.steep[parity][g])
                                // Rows differ in length: a warp has short and long ones.
                                for (int r = 0; r < GROUP; r += WARPS)
                                    score_exactly(scores, p, seg, token + g * GROUP, g,
                                                  r / WARPS % 2 ? r + WARPS - 1 - warp : r + warp, lane);
                } else if (warp < 2 * GROUPS) {
                    score<false, DV>(scores, outer_x, values, nullptr, warp / 2, warp % 2, lane);
                }
            }
            float o[GROUPS][2][4];
#pragma unroll
            for (int step = 0; step < GROUPS; ++step) {
                const int g = REVERSE ? GROUPS - 1 - step : step;
                if (INNER) {
                    state.apply<DK>(o[g], inner_x, g, lane);
                    if (DECAY) state.scale_columns<DK>(d.through[g], lane);
                    if (INTRA) state.update<DK>(values, keys, g, row, lane);
                } else {
                    state.apply<DV>(o[g], outer_x, g, lane);
                    if (DECAY) state.scale_rows<DV>(d.through[g], row, lane);
                    if (INTRA) state.update<DV>(keys, values, g, row, lane);
                }
            }
            if (INTRA) __syncthreads();
#pragma unroll
            for (int step = 0; step < GROUPS; ++step) {
                const int g = REVERSE ? GROUPS - 1 - step : step, at = token + g * GROUP;
                if (INNER) {
                    if (INTRA) {
                        Pair b[4];
                        values.summed_tokens(b, g * GROUP, row, lane);
                        const Part part = scores[g][lane];
                        multiply(o[g][0], part.a, b[0], b[1]);
                        multiply(o[g][1], part.a, b[2], b[3]);
                    }
                    store_group(p.out, seg, at, o[g], p.scale, row, p.dv, p.accumulate & 1, lane);
                } else {
                    finish_outer(p, seg, at, g, tiles, stage, d, DECAY && d.steep_slice(parity, g, row), scores, o[g],
                                 scalar_dots[g], rest, row, lane);
                }
            }
            if (STAGES == 1) {
                __syncthreads();
                load(i + 1);
            }
        }
    }
}
