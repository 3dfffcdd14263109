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

// Where tiles begin in a block's shared memory: on Hopper, which permutes by address, at a multiple of 1024 bytes.
DEVICE char* tiles_in(uint4* shared) {
    return (char*)shared + (HOPPER ? 0u - shared_address(shared) & 1023u : 0u);
}

// Makes what this thread has written to tiles visible to products of a warpgroup.
DEVICE void written() {
#if HOPPER
    fence_async();
#endif
}

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

// A tensor's rows of one head, from a segment's first token on. In shared memory, as products of strides are many instructions.
struct alignas(16) Rows {
    char* begin;
    u32 stride;  // bytes from token to token

    DEVICE char* at(int token, u32 byte) const {
        return global_memory(begin + (u64)(u32)token * stride + byte);
    }
    template <typename T>
    DEVICE T& number(int token, int column) const {
        return *reinterpret_cast<T*>(at(token, column * (u32)sizeof(T)));
    }
};

// Of an Input or an Output, of numbers of so many bytes.
template <typename T>
DEVICE Rows rows_of(const T& x, int bytes, const Segment& s) {
    return {(char*)x.data + (s.batch * x.batch + s.head * x.head + s.start * x.token) * bytes, (u32)x.token * bytes};
}

// What a block reads and writes of a segment, and how many tokens that has; all tokens are counted from its first.
struct Tensors {
    Rows q, k, v, d_o, log, out, dots, d_log;
    int length;
};

// Tokens `token`.. of a segment of `length`, zeros beyond its end and beyond `width` channels.
template <int BYTES, int PADDED, int THREADS>
DEVICE void load_tile(Tile<BYTES> to, const Rows& from, int width, int token, int length) {
    constexpr int NUMBERS = 16 / BYTES, PIECES = PADDED / NUMBERS, ROWS = THREADS / PIECES;
    static_assert(THREADS % PIECES == 0, "a thread has one column");
    const u32 thread = anew(threadIdx.x), first = thread / PIECES, column = thread % PIECES * NUMBERS;
    const char* at = from.at(token + first, column * BYTES);
    const u32 step = ROWS * from.stride;
    const int valid = (int)column < width ? length - token : 0;
#pragma unroll
    for (int i = 0; i < (CHUNK + ROWS - 1) / ROWS; ++i, at += step) {
        const u32 row = first + i * ROWS;
        if (CHUNK % ROWS && row >= CHUNK) break;
        copy_async(to.address(row, column), at, (int)row < valid ? 16 : 0);
    }
}

// Where a channel's number is for a lane to read those of its columns, 2 (lane & 3) and the next of each 8, four at a time.
constexpr int THROUGH_LANE = DK / 4 + 4, THROUGH = 4 * THROUGH_LANE;
DEVICE int through_column(int channel) {
    return channel % 8 / 2 * THROUGH_LANE + channel / 8 * 2 + channel % 2;
}

// What a warp or a thread needs to know of decays, besides q' and k'.
struct alignas(16) Decayed {
    // 2^L, at `through_column` where columns of a state are scaled by it.
    float through[GROUPS][DECAY ? THROUGH : 1];
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

DEVICE float2 log_pair(const Decayed& d, const LogTile::Column& logs, u32 row, int t) {
    if (DECAY == 2) {
        const float2 x = LOG_BYTES == 2 ? numbers_of_raw(logs.at<Raw>(t)) : logs.at<float2>(t);
        return make_float2(x.x * LOG2E, x.y * LOG2E);
    }
    return make_float2(d.scalars[row + t], d.scalars[row + t]);
}

// What `prime` does for two channels of a group, or of a part of it, one way through its TOKENS tokens from `row` on: q' and, if
// `Factors`, the factors of dq; or k' and those of dk. `log(t)`: the logarithms; `sum`: of those before, which become all.
template <int TOKENS, bool Backwards, bool Factors, typename L, typename Log>
DEVICE void prime_group(const L& tiles, int s, Decayed& d, u32 row, u32 column, float2& sum, Log log) {
    constexpr bool WANTED = Backwards ? L::PRIME_K : L::PRIME_Q;
    const RawTile::Column from = (Backwards ? tiles.k(s) : tiles.q(s)).column(row, column);
    const PrimedTile::Column to = (Backwards ? tiles.primed_k(s) : tiles.primed_q(s)).column(row, column);
    const NumberTile::Column factors = tiles.factors(s).column(row, column);
    // Some at a time are read before the first is written: the compiler takes each to be where the next may be read.
    constexpr int AT_A_TIME = 8;
#pragma unroll
    for (int first = 0; first < TOKENS; first += AT_A_TIME) {
        Raw raw[AT_A_TIME];
        float2 logs[AT_A_TIME];
#pragma unroll
        for (int i = 0; i < AT_A_TIME; ++i) {
            const int t = Backwards ? TOKENS - 1 - first - i : first + i;
            if (WANTED) raw[i] = from.template at<Raw>(t);
            logs[i] = log(t);
        }
#pragma unroll
        for (int i = 0; i < AT_A_TIME; ++i) {
            const int t = Backwards ? TOKENS - 1 - first - i : first + i;
            const float2 g = logs[i];
            if (!Backwards) sum = make_float2(sum.x + g.x, sum.y + g.y);
            const float2 f = make_float2(exp2_fast(sum.x), exp2_fast(sum.y));
            if (WANTED) {
                const float2 x = numbers_of_raw(raw[i]);
                to.template at<Pair>(t) = pair_of(x.x * f.x, x.y * f.y);
            }
            if (Factors && DECAY == 2) factors.template at<float2>(t) = f;
            if (Factors && DECAY == 1 && column == 0) d.factors[row + t] = f.x;
            if (Backwards) sum = make_float2(sum.x + g.x, sum.y + g.y);
        }
    }
}

// Makes q' and k' of q and k, and all that `Decayed` has; if `Outer`, of the logarithms the factors of the output. All threads.
template <typename L, bool Outer, int THREADS>
DEVICE void prime(const L& tiles, int s, Decayed& d, int parity) {
    constexpr bool FORWARDS = L::PRIME_Q || (Outer && !REVERSE), BACKWARDS = L::PRIME_K || (Outer && REVERSE);
    constexpr int PAIRS = DK / 2, WAYS = (FORWARDS ? 1 : 0) + (BACKWARDS ? 1 : 0), WHOLE = WAYS * GROUPS * PAIRS;
    // Where there are threads for two halves of each group, the second adds up the first's logarithms once more.
    constexpr int PARTS = !Outer && 2 * WHOLE <= THREADS ? 2 : 1, TOKENS = GROUP / PARTS, UNITS = PARTS * WHOLE;
    // A thread's factors take the place of logarithms that another has still to read.
    constexpr bool KEEP = Outer && DECAY == 2 && WAYS == 2 && !L::HAS_FACTORS;
    static_assert(!KEEP || UNITS <= THREADS, "all threads have read when the first one writes");
#pragma unroll 1
    for (int i = 0; i < (UNITS + THREADS - 1) / THREADS; ++i) {
        const u32 unit = anew(threadIdx.x) + i * THREADS, whole = unit % WHOLE, part = unit / WHOLE;
        const u32 column = whole % PAIRS * 2, group = whole / PAIRS % GROUPS;
        const bool backwards = BACKWARDS && (!FORWARDS || whole >= GROUPS * PAIRS), mine = UNITS % THREADS == 0 || unit < UNITS;
        const u32 row = group * GROUP + (backwards ? PARTS - 1 - part : part) * TOKENS;
        const LogTile::Column logs = tiles.log(s).column(row, column);
        float2 kept[KEEP ? GROUP : 1];
        if (KEEP) {
            if (mine)
#pragma unroll
                for (int t = 0; t < GROUP; ++t) kept[t] = log_pair(d, logs, row, t);
            __syncthreads();
        }
        if (!mine) continue;
        float2 sum = make_float2(0.f, 0.f);
        if (PARTS > 1 && part > 0) {
            const u32 other = group * GROUP + (backwards ? TOKENS : 0);
            const LogTile::Column others = tiles.log(s).column(other, column);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const float2 g = log_pair(d, others, other, backwards ? TOKENS - 1 - t : t);
                sum = make_float2(sum.x + g.x, sum.y + g.y);
            }
        }
        auto log = [&](int t) { return KEEP ? kept[t] : log_pair(d, logs, row, t); };
        if (backwards)
            prime_group<TOKENS, true, Outer && REVERSE>(tiles, s, d, row, column, sum, log);
        else
            prime_group<TOKENS, false, Outer && !REVERSE>(tiles, s, d, row, column, sum, log);
        if (backwards != FORWARDS && part == PARTS - 1) {
            *reinterpret_cast<float2*>(&d.log[group][column]) = sum;
            *reinterpret_cast<float2*>(&d.through[group][Outer ? column : through_column(column)]) =
                make_float2(exp2_fast(sum.x), exp2_fast(sum.y));
            *reinterpret_cast<float2*>(&d.back[group][column]) = make_float2(exp2_fast(-sum.x), exp2_fast(-sum.y));
            if (min(sum.x, sum.y) < BOUND) d.steep_slice(parity, group, column) = 1;
        }
    }
}

// For a scalar decay: one token's logarithm, of which thread t has that of token t of the next tile.
DEVICE float scalar_log(const Rows& logs, int token, int length) {
    if (DECAY != 1 || threadIdx.x >= CHUNK || token + (int)threadIdx.x >= length) return 0.f;
    return logs.number<float>(token + threadIdx.x, 0) * LOG2E;
}

// 16 rows of a state, or of its transpose, from `row` on, by N columns, as D has them. On Hopper those of four warps are one A or
// D of a warpgroup's products, which are under way until `wait`.
template <int N>
struct Slice {
    float m[N / 8][4];

    // f(row, column, number)
    template <typename F>
    DEVICE void each(int row, u32 lane, F f) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) f(row + lane / 4 + 4 * (e & 2), 8 * n + 2 * (lane & 3) + (e & 1), m[n][e]);
    }

    DEVICE void scale_columns(const float* by, u32 lane) {
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            const float4 f = *reinterpret_cast<const float4*>(by + (lane & 3) * THROUGH_LANE + 2 * n);
            m[n][0] *= f.x;
            m[n][1] *= f.y;
            m[n][2] *= f.x;
            m[n][3] *= f.y;
            m[n + 1][0] *= f.z;
            m[n + 1][1] *= f.w;
            m[n + 1][2] *= f.z;
            m[n + 1][3] *= f.w;
        }
    }

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
    template <typename X, typename Y>
    DEVICE void update(const X& x, const Y& y, int group, int row, u32 lane) {
        Pair a[4];
        x.columns(a, group * GROUP, row, lane);
#if HOPPER
        pin(flat());
        wgmma_fence();
        Wgmma<N>::template rs<1>(flat(), a, descriptor(y.address(group * GROUP, 0), CHUNK * ROW_BLOCK), 1);
        wgmma_commit();
#else
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            Pair b[4];
            y.summed_tokens(b, group * GROUP, 16 * n, lane);
            multiply(m[2 * n], a, b[0], b[1]);
            multiply(m[2 * n + 1], a, b[2], b[3]);
        }
#endif
    }

    // Its columns 16 k.. as an A has them.
    DEVICE void pairs(Pair (&a)[4], int k) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&from)[4] = m[2 * k + i / 2];
            a[i] = pair_of(from[2 * (i & 1)], from[2 * (i & 1) + 1]);
        }
    }

    // o = m x^T for a group's tokens: 16 rows by 16 tokens, as two Ds have them.
    template <typename X>
    DEVICE void apply(float (&o)[2][4], const X& x, int group, u32 lane) const {
#if HOPPER
        // In two parts, as the registers for all of a bf16 copy are too many.
        constexpr int PART = N / 32;
        float(&d)[8] = reinterpret_cast<float(&)[8]>(o);
        const u32 tokens = x.address(group * GROUP, 0);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            Pair a[PART][4];
#pragma unroll
            for (int k = 0; k < PART; ++k) pairs(a[k], PART * part + k);
            if (part > 0) {
                wgmma_wait<0>();
                pin(d);
            }
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < PART; ++k) {
                const int at = PART * part + k;
                const u32 beyond = at / 4 * (CHUNK * ROW_BLOCK) + at % 4 * 32;
                Wgmma<16>::template rs<0>(d, a[k], descriptor(tokens + beyond, 0), at > 0);
            }
            wgmma_commit();
        }
#else
#pragma unroll
        for (int e = 0; e < 4; ++e) o[0][e] = o[1][e] = 0.f;
        Pair b[2][4];
#pragma unroll
        for (int k = 0; k < N / 16; ++k) {
            Pair a[4];
            pairs(a, k);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                if (k % 2 == 0) x.summed_channels(b[n], group * GROUP + 8 * n, 16 * k, lane);
                multiply(o[n], a, b[n][k % 2 * 2], b[n][k % 2 * 2 + 1]);
            }
        }
#endif
    }

#if HOPPER
    DEVICE float (&flat())[N / 2] {
        return reinterpret_cast<float(&)[N / 2]>(m);
    }
#endif

    DEVICE void wait() {
#if HOPPER
        wgmma_wait<0>();
        pin(flat());
#endif
    }

    DEVICE void wait(float (&o)[2][4]) {
        wait();
#if HOPPER
        pin(reinterpret_cast<float(&)[8]>(o));
#endif
    }
};
