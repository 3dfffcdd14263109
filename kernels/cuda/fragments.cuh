// Tiles of tokens by channels in shared memory, and pieces of them as mma takes them, in whatever kind the inputs have:
//   KIND 0  bf16: one product of bf16
//        1  f16: products of tf32, which has the mantissa of f16 and the range of f32, as decays need
//        2  f32: three products of tf32, of upper and lower halves; what is left out is 2^-22
//
// A pair is two neighbours along the dimension that a product sums over. Lane 4 g + t of a warp has, of a matrix A of 16 rows
// and 16 columns, the pairs at (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8); of B, 16 by 8, those at (2 t, g) and
// (2 t + 8, g); of D, 16 by 8, the numbers at (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1). So pairs of D's rows are
// pairs of an A, or of a B that is its transpose, without leaving the lane.
#pragma once

constexpr int CHUNK = 32;       // tokens of a tile
constexpr int ROW_BLOCK = 128;  // bytes of a tile's row that lie together

#if KIND == 0
typedef u32 Pair;

DEVICE Pair pair_of(float low, float high) {
    return pack_bf16(low, high);
}
DEVICE float2 numbers_of(Pair p) {
    return make_float2(low_bf16(p), high_bf16(p));
}
DEVICE void multiply(float (&d)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    mma_bf16(d, a, b0, b1);
}
#else
typedef float2 Pair;

// Of every row of D one number from each of two products of tf32: with 2 t and 2 t + 8, then with 2 t + 1 and 2 t + 9.
DEVICE void multiply_tf32(float (&d)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    const u32 low[4] = {__float_as_uint(a[0].x), __float_as_uint(a[1].x), __float_as_uint(a[2].x), __float_as_uint(a[3].x)};
    const u32 high[4] = {__float_as_uint(a[0].y), __float_as_uint(a[1].y), __float_as_uint(a[2].y), __float_as_uint(a[3].y)};
    mma_tf32(d, low, __float_as_uint(b0.x), __float_as_uint(b1.x));
    mma_tf32(d, high, __float_as_uint(b0.y), __float_as_uint(b1.y));
}
DEVICE Pair rounded(Pair p) {
    return make_float2(round_tf32(p.x), round_tf32(p.y));
}
DEVICE Pair rest(Pair p, Pair upper) {
    return rounded(make_float2(p.x - upper.x, p.y - upper.y));
}
DEVICE float2 numbers_of(Pair p) {
    return p;
}
#if KIND == 1
DEVICE Pair pair_of(float low, float high) {
    return rounded(make_float2(low, high));
}
DEVICE void multiply(float (&d)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    multiply_tf32(d, a, b0, b1);
}
#else
DEVICE Pair pair_of(float low, float high) {
    return make_float2(low, high);
}
DEVICE void multiply(float (&d)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    const Pair upper[4] = {rounded(a[0]), rounded(a[1]), rounded(a[2]), rounded(a[3])};
    const Pair lower[4] = {rest(a[0], upper[0]), rest(a[1], upper[1]), rest(a[2], upper[2]), rest(a[3], upper[3])};
    const Pair u0 = rounded(b0), u1 = rounded(b1);
    multiply_tf32(d, lower, u0, u1);
    multiply_tf32(d, upper, rest(b0, u0), rest(b1, u1));
    multiply_tf32(d, upper, u0, u1);
}
#endif
#endif

// 16 x 16 of a matrix, as two Ds have them, becomes its transpose.
DEVICE void transpose(float (&d)[2][4]) {
    float t[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const u32 x = __float_as_uint(d[n][2 * r]), y = __float_as_uint(d[n][2 * r + 1]);
            const u32 low = transposed(__byte_perm(x, y, 0x5410)), high = transposed(__byte_perm(x, y, 0x7632));
            t[r][2 * n] = __uint_as_float(__byte_perm(low, high, 0x5410));
            t[r][2 * n + 1] = __uint_as_float(__byte_perm(low, high, 0x7632));
        }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) d[n][e] = t[n][e];
}

// Two neighbours as they lie in memory, in the inputs' kind.
#if KIND == 2
typedef float2 Raw;
DEVICE float2 numbers_of_raw(Raw x) {
    return x;
}
DEVICE Raw raw_of(float low, float high) {
    return make_float2(low, high);
}
#elif KIND == 1
typedef u32 Raw;
DEVICE float2 numbers_of_raw(Raw x) {
    return make_float2(low_f16(x), high_f16(x));
}
DEVICE Raw raw_of(float low, float high) {
    return pack_f16(low, high);
}
#else
typedef u32 Raw;
DEVICE float2 numbers_of_raw(Raw x) {
    return make_float2(low_bf16(x), high_bf16(x));
}
DEVICE Raw raw_of(float low, float high) {
    return pack_bf16(low, high);
}
#endif

// CHUNK rows of numbers of BYTES (4: f32), in blocks of 128 bytes of every row, whose pieces of 16 bytes are permuted by the row
// so that what a warp reads at once lies in different banks.
template <int BYTES>
struct Tile {
    char* data;

    // By what the pieces of a row are permuted.
    static DEVICE u32 key(u32 row) {
        return BYTES == 2 ? row & 7 : ((row << 1) & 6) ^ ((row >> 2 & 1) * 3);
    }

    static DEVICE u32 place(u32 row, u32 column) {
        const u32 byte = column * BYTES, piece = byte % ROW_BLOCK / 16;
        return byte / ROW_BLOCK * (CHUNK * ROW_BLOCK) + row * ROW_BLOCK + ((piece ^ key(row)) << 4) + byte % 16;
    }

    template <typename T>
    DEVICE T& at(int row, int column) const {
        return *reinterpret_cast<T*>(data + place(row, column));
    }

    // One column of the rows from `row` on, a multiple of 8: what permutes them is then known to the compiler.
    struct Column {
        char* begin;
        u32 in_block;  // bytes

        template <typename T>
        DEVICE T& at(int row) const {
            return *reinterpret_cast<T*>(begin + row * ROW_BLOCK + (in_block ^ key(row) << 4));
        }
    };

    DEVICE Column column(u32 row, u32 column) const {
        const u32 byte = column * BYTES;
        return {data + byte / ROW_BLOCK * (CHUNK * ROW_BLOCK) + row * ROW_BLOCK + byte % 16, byte % ROW_BLOCK / 16 << 4};
    }

    DEVICE u32 address(int row, int column) const {
        return shared_address(data) + place(row, column);
    }

    // Of 16-bit numbers.
    static DEVICE Pair pair(u32 bits) {
#if KIND == 0
        return bits;
#else
        return make_float2(low_f16(bits), high_f16(bits));
#endif
    }

    DEVICE Pair number_pair(int row0, int column0, int row1, int column1) const {
        return pair_of(at<float>(row0, column0), at<float>(row1, column1));
    }

    // A, 16 x 16, from row and column on.
    DEVICE void rows(Pair (&a)[4], int row, int column, u32 lane) const {
        if (BYTES == 2) {
            u32 r[4];
            load_matrices(r, address(row + (lane & 15), column + (lane & 16) / 2));
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = pair(r[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = at<float2>(row + lane / 4 + 8 * (i & 1), column + 2 * (lane & 3) + 4 * (i & 2));
                a[i] = pair_of(x.x, x.y);
            }
        }
    }

    // A whose rows are columns of the tile and whose columns are tokens.
    DEVICE void columns(Pair (&a)[4], int row, int column, u32 lane) const {
        if (BYTES == 2) {
            u32 r[4];
            load_matrices_transposed(r, address(row + (lane & 7) + (lane & 16) / 2, column + (lane & 8)));
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = pair(r[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = row + 2 * (lane & 3) + 4 * (i & 2), channel = column + lane / 4 + 8 * (i & 1);
                a[i] = number_pair(token, channel, token + 1, channel);
            }
        }
    }

    // Two Bs, 16 x 8 each: tokens row.. by 16 columns.
    DEVICE void summed_tokens(Pair (&b)[4], int row, int column, u32 lane) const {
        if (BYTES == 2) {
            u32 r[4];
            load_matrices_transposed(r, address(row + (lane & 15), column + (lane & 16) / 2));
#pragma unroll
            for (int i = 0; i < 4; ++i) b[i] = pair(r[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = row + 2 * (lane & 3) + 8 * (i & 1), channel = column + lane / 4 + 4 * (i & 2);
                b[i] = number_pair(token, channel, token + 1, channel);
            }
        }
    }

    // Two Bs, 16 x 8 each: the transposes of 8 tokens by 16 columns, and by the next 16.
    DEVICE void summed_channels(Pair (&b)[4], int row, int column, u32 lane) const {
        if (BYTES == 2) {
            u32 r[4];
            load_matrices(r, address(row + (lane & 7), column + (lane & 24)));
#pragma unroll
            for (int i = 0; i < 4; ++i) b[i] = pair(r[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = at<float2>(row + lane / 4, column + 2 * (lane & 3) + 8 * i);
                b[i] = pair_of(x.x, x.y);
            }
        }
    }
};
