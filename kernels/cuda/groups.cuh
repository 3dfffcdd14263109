// Tokens in groups of 16, two a tile, for linear_mma.cu: how tiles come into shared memory, how q and k get their decays there,
// and the part of a state that one warp takes from group to group. What the macros mean, linear_mma.cu says.
#pragma once

constexpr int GROUP = 16, GROUPS = CHUNK / GROUP;
constexpr int DK = 64 * K_BLOCKS, DV = 64 * V_BLOCKS;
constexpr int WIDEST = DK > DV ? DK : DV;
constexpr float LOG2E = 1.4426950408889634f;

// Products of q' 2^-L with k' for j > i, which nobody wants, must not overflow.
constexpr float BOUND = -100.f;
// A group that decays by more lets through it less than the error of its kind, and less than what remains of a difference of
// large numbers: then nothing is taken to go through it.
constexpr float OPAQUE = KIND == 0 ? -13.f : KIND == 1 ? -16.f : -22.f;

constexpr int RAW_BYTES = KIND == 2 ? 4 : 2;
// Of q' and k': f16 has not their range.
constexpr int PRIMED_BYTES = DECAY && KIND == 1 ? 4 : RAW_BYTES;
constexpr bool IN_PLACE = PRIMED_BYTES == RAW_BYTES;
typedef Tile<RAW_BYTES> RawTile;
typedef Tile<PRIMED_BYTES> PrimedTile;
typedef Tile<LOG_BYTES> LogTile;
typedef Tile<4> NumberTile;

struct Input {
    const char* data;
    long long batch, token, head;  // strides in numbers
};

// [B, T, H], f32, or [B, T, H, K], natural logarithms.
struct Decays {
    const char* log;
    long long batch, token, head;
};

DEVICE int chunks_of(const Segment& s) {
    return (s.end - s.start + CHUNK - 1) / CHUNK;
}

// Where the tiles of one stage lie, and behind all stages q' and k' if they have no room in place. `PrimeQ`, `PrimeK`: whether
// q' and k' are wanted; `Dots`: whether what dq's pass left for dlog_decay is; `Factors`: whether those of the output have a
// place of their own, rather than that of the logarithms.
template <bool Q, bool K, bool V, bool Do, bool PrimeQ, bool PrimeK, bool Dots, bool Factors, int Stages>
struct Layout {
    static constexpr bool HAS_Q = Q, HAS_K = K, HAS_V = V, HAS_DO = Do, HAS_DOTS = Dots, HAS_FACTORS = Factors,
                          PRIME_Q = PrimeQ, PRIME_K = PrimeK;
    static constexpr int KEYS = CHUNK * DK * RAW_BYTES, VALUES = CHUNK * DV * RAW_BYTES, NUMBERS = CHUNK * DK * 4;
    static constexpr int Q_AT = 0, K_AT = Q_AT + (Q ? KEYS : 0), V_AT = K_AT + (K ? KEYS : 0),
                         DO_AT = V_AT + (V ? VALUES : 0), LOG_AT = DO_AT + (Do ? VALUES : 0),
                         DOTS_AT = LOG_AT + (DECAY == 2 ? CHUNK * DK * LOG_BYTES : 0);
    static constexpr int STAGE = DOTS_AT + (Dots ? NUMBERS : 0);
    static constexpr int FACTORS = Stages * STAGE;
    static constexpr int PRIMED_Q = FACTORS + (Factors ? NUMBERS : 0);
    static constexpr int PRIMED_K = PRIMED_Q + (PrimeQ ? NUMBERS : 0);

    char* memory;

    DEVICE char* stage(int s) const {
        return memory + s * STAGE;
    }
    DEVICE RawTile q(int s) const {
        return {stage(s) + Q_AT};
    }
    DEVICE RawTile k(int s) const {
        return {stage(s) + K_AT};
    }
    DEVICE RawTile v(int s) const {
        return {stage(s) + V_AT};
    }
    DEVICE RawTile d_o(int s) const {
        return {stage(s) + DO_AT};
    }
    DEVICE LogTile log(int s) const {
        return {stage(s) + LOG_AT};
    }
    DEVICE NumberTile factors(int s) const {
        return {HAS_FACTORS ? memory + FACTORS : stage(s) + LOG_AT};
    }
    DEVICE NumberTile dots(int s) const {
        return {stage(s) + DOTS_AT};
    }
    DEVICE PrimedTile primed_q(int s) const {
        return {IN_PLACE ? stage(s) + Q_AT : memory + PRIMED_Q};
    }
    DEVICE PrimedTile primed_k(int s) const {
        return {IN_PLACE ? stage(s) + K_AT : memory + PRIMED_K};
    }
};

// Tokens `token`.. of a segment, zeros beyond its end and beyond `width` channels.
template <int BYTES, int PADDED, int THREADS>
DEVICE void load_tile(Tile<BYTES> to, const Input& from, int width, const Segment& s, int token) {
    constexpr int NUMBERS = 16 / BYTES, PIECES = PADDED / NUMBERS, ROWS = THREADS / PIECES;
    static_assert(THREADS % PIECES == 0, "a thread has one column");
    const u32 thread = anew(threadIdx.x), first = thread / PIECES, column = thread % PIECES * NUMBERS;
    // The same for all threads, and 32 bits of their own.
    const char* base = from.data + (s.batch * from.batch + s.head * from.head + token * from.token) * BYTES;
    const char* at = base + (first * (u32)from.token + column) * BYTES;
    const int valid = (int)column < width ? s.end - token : 0;
#pragma unroll
    for (int i = 0; i < (CHUNK + ROWS - 1) / ROWS; ++i) {
        const u32 row = first + i * ROWS;
        if (CHUNK % ROWS && row >= CHUNK) break;
        copy_async(to.address(row, column), at + i * ROWS * BYTES * from.token, (int)row < valid ? 16 : 0);
    }
}

// What a warp or a thread needs to know of decays, besides q' and k'.
struct alignas(16) Decayed {
    float through[GROUPS][DECAY ? DK : 1];  // 2^L
    float back[GROUPS][DECAY ? DK : 1];     // 2^-L
    float log[GROUPS][DECAY ? DK : 1];      // L
    float scalars[CHUNK];                   // (DECAY 1) log2 a
    float factors[CHUNK];                   // (DECAY 1, OUTER) as the tile of logarithms has them after `prime`
    // A byte for each 16 channels: whether one decays by more than BOUND inside a group. By parity of the tile.
    u64 steep[2][GROUPS];

    DEVICE unsigned char& steep_slice(int parity, int group, int channel) {
        return reinterpret_cast<unsigned char*>(&steep[parity][group])[channel / 16];
    }
};

DEVICE float2 log_pair(const Decayed& d, const LogTile& tile, u32 row, u32 column) {
    if (DECAY == 2) {
        const float2 x = LOG_BYTES == 2 ? numbers_of_raw(tile.at<Raw>(row, column)) : tile.at<float2>(row, column);
        return make_float2(x.x * LOG2E, x.y * LOG2E);
    }
    return make_float2(d.scalars[row], d.scalars[row]);
}

// What `prime` does for one group's two channels, one way through its tokens: q' and, if `Factors`, the factors of dq; or
// k' and those of dk. `log(t)`: the logarithms. The sum of them all.
template <bool Backwards, bool Factors, typename L, typename Log>
DEVICE float2 prime_group(const L& tiles, int s, Decayed& d, u32 row, u32 column, Log log) {
    constexpr bool WANTED = Backwards ? L::PRIME_K : L::PRIME_Q;
    const RawTile from = Backwards ? tiles.k(s) : tiles.q(s);
    const PrimedTile to = Backwards ? tiles.primed_k(s) : tiles.primed_q(s);
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        const int t = Backwards ? GROUP - 1 - i : i;
        const float2 g = log(t);
        if (!Backwards) sum = make_float2(sum.x + g.x, sum.y + g.y);
        const float2 f = make_float2(exp2_fast(sum.x), exp2_fast(sum.y));
        if (WANTED) {
            const float2 x = numbers_of_raw(from.at<Raw>(row + t, column));
            to.at<Pair>(row + t, column) = pair_of(x.x * f.x, x.y * f.y);
        }
        if (Factors && DECAY == 2) tiles.factors(s).template at<float2>(row + t, column) = f;
        if (Factors && DECAY == 1 && column == 0) d.factors[row + t] = f.x;
        if (Backwards) sum = make_float2(sum.x + g.x, sum.y + g.y);
    }
    return sum;
}

// Makes q' and k' of q and k, and all that `Decayed` has; if `Outer`, of the logarithms the factors of the output. All threads.
template <typename L, bool Outer, int THREADS>
DEVICE void prime(const L& tiles, int s, Decayed& d, int parity) {
    constexpr bool FORWARDS = L::PRIME_Q || (Outer && !REVERSE), BACKWARDS = L::PRIME_K || (Outer && REVERSE);
    constexpr int PAIRS = DK / 2, WAYS = (FORWARDS ? 1 : 0) + (BACKWARDS ? 1 : 0), UNITS = WAYS * GROUPS * PAIRS;
    // A thread's factors take the place of logarithms that another has still to read.
    constexpr bool KEEP = Outer && DECAY == 2 && WAYS == 2 && !L::HAS_FACTORS;
    static_assert(!KEEP || UNITS <= THREADS, "all threads have read when the first one writes");
    const LogTile logs = tiles.log(s);
#pragma unroll 1
    for (int i = 0; i < (UNITS + THREADS - 1) / THREADS; ++i) {
        const u32 unit = anew(threadIdx.x) + i * THREADS;
        const u32 column = unit % PAIRS * 2, group = unit / PAIRS % GROUPS, row = group * GROUP;
        const bool backwards = BACKWARDS && (!FORWARDS || unit >= GROUPS * PAIRS), mine = UNITS % THREADS == 0 || unit < UNITS;
        float2 kept[KEEP ? GROUP : 1];
        if (KEEP) {
            if (mine)
#pragma unroll
                for (int t = 0; t < GROUP; ++t) kept[t] = log_pair(d, logs, row + t, column);
            __syncthreads();
        }
        if (!mine) continue;
        auto log = [&](int t) { return KEEP ? kept[t] : log_pair(d, logs, row + t, column); };
        const float2 sum = backwards ? prime_group<true, Outer && REVERSE>(tiles, s, d, row, column, log)
                                     : prime_group<false, Outer && !REVERSE>(tiles, s, d, row, column, log);
        if (backwards != FORWARDS) {
            *reinterpret_cast<float2*>(&d.log[group][column]) = sum;
            *reinterpret_cast<float2*>(&d.through[group][column]) = make_float2(exp2_fast(sum.x), exp2_fast(sum.y));
            *reinterpret_cast<float2*>(&d.back[group][column]) = make_float2(exp2_fast(-sum.x), exp2_fast(-sum.y));
            if (min(sum.x, sum.y) < BOUND) d.steep_slice(parity, group, column) = 1;
        }
    }
}

// For a scalar decay: one token's logarithm, of which thread t has that of token t of the next tile.
DEVICE float scalar_log(const Decays& decay, const Segment& s, int token) {
    if (DECAY != 1 || threadIdx.x >= CHUNK || token + (int)threadIdx.x >= s.end) return 0.f;
    return ((const float*)decay.log)[s.batch * decay.batch + s.head * decay.head + (token + threadIdx.x) * decay.token] * LOG2E;
}

DEVICE Input logs_of(const Decays& decay) {
    return {decay.log, decay.batch, decay.token, decay.head};
}

DEVICE Input numbers_of(const Output& out) {
    return {out.data, out.batch, out.token, out.head};
}

// 16 rows of a state, or of its transpose, from `row` on: the first N columns, as D has them.
struct Slice {
    float m[WIDEST / 8][4];

    // f(row, column, number)
    template <int N, typename F>
    DEVICE void each(int row, u32 lane, F f) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) f(row + lane / 4 + 4 * (e & 2), 8 * n + 2 * (lane & 3) + (e & 1), m[n][e]);
    }

    template <int N>
    DEVICE void scale_columns(const float* by, u32 lane) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            const float2 f = *reinterpret_cast<const float2*>(by + 8 * n + 2 * (lane & 3));
            m[n][0] *= f.x;
            m[n][1] *= f.y;
            m[n][2] *= f.x;
            m[n][3] *= f.y;
        }
    }

    template <int N>
    DEVICE void scale_rows(const float* by, int row, u32 lane) {
        const float f0 = by[row + lane / 4], f1 = by[row + lane / 4 + 8];
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            m[n][0] *= f0;
            m[n][1] *= f0;
            m[n][2] *= f1;
            m[n][3] *= f1;
        }
    }

    // += x^T y over a group: this slice's 16 of x's columns by all of y's.
    template <int N, typename X, typename Y>
    DEVICE void update(const X& x, const Y& y, int group, int row, u32 lane) {
        Pair a[4];
        x.columns(a, group * GROUP, row, lane);
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            Pair b[4];
            y.summed_tokens(b, group * GROUP, 16 * n, lane);
            multiply(m[2 * n], a, b[0], b[1]);
            multiply(m[2 * n + 1], a, b[2], b[3]);
        }
    }

    // o = x m^T for a group's tokens.
    template <int N, typename X>
    DEVICE void apply(float (&o)[2][4], const X& x, int group, u32 lane) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[0][e] = o[1][e] = 0.f;
#pragma unroll
        for (int k = 0; k < N / 16; ++k) {
            Pair a[4];
            x.rows(a, group * GROUP, 16 * k, lane);
            const float(&low)[4] = m[2 * k];
            const float(&high)[4] = m[2 * k + 1];
            multiply(o[0], a, pair_of(low[0], low[1]), pair_of(high[0], high[1]));
            multiply(o[1], a, pair_of(low[2], low[3]), pair_of(high[2], high[3]));
        }
    }
};
