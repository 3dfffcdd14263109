// What linear.cu and linear_mma.cu share: the tables by which the host cuts the tokens (kernels/src/cuda/segments/plan.rs), where
// they write to, and the recurrence from segment to segment.
#pragma once

// A tensor [B, T, H, ..] to write to.
struct Output {
    char* data;
    long long batch, token, head;  // strides in numbers
};

// A run of tokens of one head, inside one document.
struct Segment {
    int batch, head, start, end;
    int flags;
    int slot;  // row of its sum and of its entry state, if a flag tells of one
    // Where the state at its end is: the row of an entry state, or -1 - the row of a final state.
    int after;
    int chain;  // its number, or -1
};

// `flags`: 1 another segment of the chain is before it, 2 another is after it, 4 it is the first and a state enters the chain,
// 8 it is the last and a state leaves. A launch names the flags of the segments that it means.

// Consecutive segments of one head of one document, in order of time; only if one of them has a flag.
struct Chain {
    int first, count;  // slots
    // Rows of the states that enter from outside and of those that leave, or -1; of gradients the other way round.
    int entry, final;
};

// The states [slots, K, V] that enter the segments of chain `c`, and the one that leaves it [rows, K, V] if asked for: four
// elements, from `at` on, of `size` = K V. `reverse`: of gradients, from the last segment to the first. `through(slot)`: what a
// state is multiplied by on its way through a segment. `sums` may be null, as if zero; so may `external` and `finals`.
template <typename Through>
DEVICE void combine_chain(const Chain c, bool reverse, int at, long long size, const float* sums, const float* external,
                          float* entries, float* finals, Through through) {
    const int entry = reverse ? c.final : c.entry, final = reverse ? c.entry : c.final;
    float4 state = make_float4(0.f, 0.f, 0.f, 0.f);
    if (entry >= 0 && external) {
        // Part of a message, which need not begin at 16 bytes.
        const float* from = external + entry * size + at;
        state = make_float4(from[0], from[1], from[2], from[3]);
    }
#pragma unroll 4
    for (int i = 0; i < c.count; ++i) {
        const int slot = c.first + (reverse ? c.count - 1 - i : i);
        const bool last = i + 1 == c.count;
        *reinterpret_cast<float4*>(entries + slot * size + at) = state;
        if (last && (final < 0 || !finals)) break;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (sums) sum = *reinterpret_cast<const float4*>(sums + slot * size + at);
        const float a = through(slot);
        state.x = a * state.x + sum.x;
        state.y = a * state.y + sum.y;
        state.z = a * state.z + sum.z;
        state.w = a * state.w + sum.w;
    }
    if (final >= 0 && finals) *reinterpret_cast<float4*>(finals + final * size + at) = state;
}
