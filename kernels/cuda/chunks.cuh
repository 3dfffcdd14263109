// Tokens in chunks of 64, one a tile, for linear.cu: in which order a block of threads visits them, what their decays make of a state,
// and the part of a state that one thread of a warpgroup keeps from chunk to chunk. What the macros mean, linear.cu says; it
// includes hopper.cuh, wgmma.cuh and segments.cuh before this.
#pragma once

constexpr int CHUNK = 64;
constexpr int BLOCK = CHUNK * 128;  // bytes of one block of 64 columns of a tile
constexpr float LOG2E = 1.4426950408889634f;

constexpr int WARP_ARRIVALS = EVERY_THREAD_ARRIVES ? 32 : 1;

DEVICE void warp_arrives(u32 bar, int lane) {
    __syncwarp();
    if (EVERY_THREAD_ARRIVES || lane == 0) barrier_arrive(bar);
}

struct Decays {
    // Natural logarithms [B, T, H], by strides.
    const float* log;
    long long batch, token, head;
};

// The walk of all warpgroups over a block's tiles, the same in each.
struct Walk {
    int stage = 0;
    u32 phase = 0;

    template <int Stages>
    DEVICE void next() {
        if (++stage == Stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// The same ring the other way round, so that the tiles visited last lie where `Walk` begins.
struct WalkBack {
    int stage;
    int left = 0;
    u32 phase = 0;

    template <int Stages>
    DEVICE void next() {
        stage = stage == 0 ? Stages - 1 : stage - 1;
        if (++left == Stages) {
            left = 0;
            phase ^= 1;
        }
    }
};

DEVICE int chunks_of(const Segment& s) {
    return (s.end - s.start + CHUNK - 1) / CHUNK;
}

// Position in time of the `i`-th chunk that a pass visits.
DEVICE int chunk_at(int i, int n) {
    return REVERSE ? n - 1 - i : i;
}

// One chunk's cumulative log-decays (base 2, inclusive).
struct ChunkDecay {
    const float* logs;  // [CHUNK] in shared memory
    int valid;          // tokens of this chunk

    DEVICE float at(int i) const {
        return DECAY ? logs[i] : 0.f;
    }
    DEVICE float total() const {
        return at(CHUNK - 1);
    }
    // What a token's y^T z is multiplied by on its way into the state that leaves the chunk and is then worth e^later.
    DEVICE float to_state(int i, float later) const {
        if (i >= valid) return 0.f;
        return DECAY ? exp2_fast(later + (REVERSE ? at(i) : total() - at(i))) : 1.f;
    }
    // What the state that enters the chunk is multiplied by on its way to a token.
    DEVICE float from_state(int i) const {
        return DECAY ? exp2_fast(REVERSE ? total() - at(i) : at(i)) : 1.f;
    }
    // From column's y to row's x.
    DEVICE float between(int row, int column) const {
        if (REVERSE ? column < row || column >= valid : column > row) return 0.f;
        return DECAY ? exp2_fast(REVERSE ? at(column) - at(row) : at(row) - at(column)) : 1.f;
    }
};

// For the warp that makes cumulative sums of per-token decays: those of a segment's chunks from the `first`-th visited on, one
// tile ahead with its loads. `place(i)`: the position in time of the i-th; `room()`: where its sums go, once that is free;
// `done()`: they are there.
template <typename Place, typename Room, typename Done>
DEVICE void load_logs(const Decays& d, const Segment& seg, int first, int lane, Place place, Room room, Done done) {
    const int n = chunks_of(seg);
    const float* base = d.log + seg.batch * d.batch + seg.head * d.head;
    float next[2];
    auto fetch = [&](int i) {
        const int t = seg.start + place(i) * CHUNK + 2 * lane;
#pragma unroll
        for (int e = 0; e < 2; ++e) next[e] = i < n && t + e < seg.end ? base[(t + e) * d.token] * LOG2E : 0.f;
    };
    fetch(first);
    for (int i = first; i < n; ++i) {
        const float low = next[0], pair = next[0] + next[1];
        fetch(i + 1);
        float sum = pair;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        float* to = room();
        to[2 * lane] = sum - pair + low;
        to[2 * lane + 1] = sum;
        done();
    }
}

// The part of a state that one thread of the state's warpgroup keeps: rows 64 m + 16 warp + lane / 4 (+ 8), columns
// 8 n + 2 (lane % 4) (+ 1) for register 4 n + 2 (row + 8) + column.
template <int RowBlocks, int Columns>
struct State {
    static constexpr int N = Columns / 2;
    float m[RowBlocks][N];

    DEVICE void clear() {
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b)
#pragma unroll
            for (int i = 0; i < N; ++i) m[b][i] = 0.f;
    }

    DEVICE void scale(float by) {
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b)
#pragma unroll
            for (int i = 0; i < N; ++i) m[b][i] *= by;
    }

    // f(row, column, value of this and the next column)
    template <typename F>
    DEVICE void each_pair(int warp, int lane, F f) {
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b)
#pragma unroll
            for (int i = 0; i < N; i += 2)
                f(64 * b + 16 * warp + lane / 4 + 8 * ((i / 2) & 1), i / 4 * 8 + 2 * (lane & 3), m[b][i], m[b][i + 1]);
    }

    // m = e^B m + sum_i f_i y_i^T z_i over a tile or, when tiles come last first (`Backwards`),
    // m = m + e^later sum_i f_i y_i^T z_i.
    template <bool Backwards>
    DEVICE void update(u32 y, u32 z, const ChunkDecay& decay, float later, int warp, int lane) {
        u32 a[RowBlocks][CHUNK / 16][4];
        const int row = (lane & 7) + (lane & 16) / 2;  // token within 16
        const int piece = (lane & 8) / 8;              // which 8 channels of 16
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b)
#pragma unroll
            for (int k = 0; k < CHUNK / 16; ++k)
                load_matrices_transposed(
                    a[b][k], y + b * BLOCK + (16 * k + row) * 128 + (((2 * warp + piece) ^ (row & 7)) << 4));
        if (DECAY || decay.valid < CHUNK) {
#pragma unroll
            for (int k = 0; k < CHUNK / 16; ++k) {
                float f[4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    f[e] = decay.to_state(16 * k + 8 * (e / 2) + 2 * (lane & 3) + (e & 1), later);
#pragma unroll
                for (int b = 0; b < RowBlocks; ++b)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const u32 pair = a[b][k][r];
                        a[b][k][r] = pack_bf16(low_bf16(pair) * f[r & 2], high_bf16(pair) * f[(r & 2) + 1]);
                    }
            }
        }
        if (DECAY && !Backwards) scale(exp2_fast(decay.total()));
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b) pin(m[b]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; ++k)
#pragma unroll
            for (int b = 0; b < RowBlocks; ++b)
                Wgmma<Columns>::template rs<1>(m[b], a[b][k], descriptor(z + k * 2048, BLOCK), 1);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b) pin(m[b]);
    }

    // The first `rows` and `columns`, row by row.
    DEVICE void write(float* to, int rows, int columns, int warp, int lane) {
        each_pair(warp, lane, [&](int row, int column, float& a, float& b) {
            if (row < rows && column < columns)
                *reinterpret_cast<float2*>(to + row * columns + column) = make_float2(a, b);
        });
    }

    // Of 64 rows by 128 threads, as they have them: each four numbers at a time.
    static constexpr int PIECE = 128 * N * 4;  // bytes

    DEVICE void write_pieces(float* to, int thread) {
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b)
#pragma unroll
            for (int i = 0; i < N; i += 4)
                reinterpret_cast<float4*>(to)[(b * N + i) * 32 + thread] =
                    make_float4(m[b][i], m[b][i + 1], m[b][i + 2], m[b][i + 3]);
    }

    // m = a m + the piece of 64 rows at `from`, in shared memory.
    DEVICE void add_piece(int b, float a, u32 from, int thread) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 x = load_shared_16(from + (i * 32 + thread) * 16);
            m[b][i] = a * m[b][i] + __uint_as_float(x.x);
            m[b][i + 1] = a * m[b][i + 1] + __uint_as_float(x.y);
            m[b][i + 2] = a * m[b][i + 2] + __uint_as_float(x.z);
            m[b][i + 3] = a * m[b][i + 3] + __uint_as_float(x.w);
        }
    }

    // A bf16 copy in the layout of a tile of 64 RowBlocks rows.
    DEVICE void publish(u32 to, int warp, int lane) {
        const int row = (lane & 7) + (lane & 8), piece = (lane & 16) / 16;
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b)
#pragma unroll
            for (int n = 0; n < Columns / 16; ++n) {
                const float* v = &m[b][8 * n];
                store_matrices(to + (n / 4) * (RowBlocks * BLOCK) + (64 * b + 16 * warp + row) * 128
                                   + (((2 * (n & 3) + piece) ^ (row & 7)) << 4),
                               pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                               pack_bf16(v[6], v[7]));
            }
    }
};

DEVICE void load_tile(const TensorMap* map, u32 to, int blocks, u32 bar, int token, const Segment& s) {
    for (int b = 0; b < blocks; ++b) tma_load(to + b * BLOCK, map, bar, 64 * b, token, s.head, s.batch);
}

DEVICE void load_tile(const TensorMap* map, u32 to, int blocks, u32 bar, int token, const Segment& s, u64 policy) {
    for (int b = 0; b < blocks; ++b) tma_load(to + b * BLOCK, map, bar, 64 * b, token, s.head, s.batch, policy);
}
