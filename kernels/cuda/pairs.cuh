// What the tokens of a group of 16 give each other, for linear_mma.cu: the matrices A and D of pairs, whose decays lie inside the
// group, and dlog_decay, which is sums over pairs. What the macros mean, linear_mma.cu says.
#pragma once

// Of a block of `run`: each has 16 channels of the output.
constexpr int WARPS = (OUTER ? DK : DV) / 16;

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

// 8 columns of A, or of A^T, or of D: x y^T, N channels, with x's times `by`. A warp comes here also if they are not wanted, as
// racecheck loses count of barriers that some warps leave out.
template <bool Scaled, int N, typename X, typename Y>
DEVICE void score(Lanes& to, Halves& halves, const X& x, const Y& y, const float* by, bool wanted, u32 warp, u32 lane) {
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
        if (share > 0) other = make_float4(s[0], s[1], s[2], s[3]);
        named_sync(1 + part, 64);
        s[0] += other.x;
        s[1] += other.y;
        s[2] += other.z;
        s[3] += other.w;
    }
    if (share > 0 || !wanted) return;
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
