// What a block of the model does between its matrix products, the loss and the optimizer: each one pass over memory.
//
// Tensors are bf16 in memory and f32 in registers; 8 numbers (16 bytes) at a time. Sums are taken in a fixed order, so that
// the same inputs give the same bits. Compiled with
//   VECS   how many times 256 threads times 8 columns a row of `norm_*` takes
//   LANES  threads that share a row of `heads_*`: a power of two, 8 LANES at least the row

#include "numbers.cuh"

#ifndef VECS
#define VECS 1
#endif
#ifndef LANES
#define LANES 16
#endif

typedef unsigned short bf16;

constexpr int WARP = 32;
constexpr int THREADS = 256;

DEVICE float to_float(bf16 x) {
    return __uint_as_float((u32)x << 16);
}

DEVICE float to_float(float x) {
    return x;
}

DEVICE bf16 to_bf16(float x) {
    return (bf16)pack_bf16(x, 0.f);
}

struct Eight {
    float at[8];
};

DEVICE Eight widen(uint4 raw) {
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    Eight x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x.at[2 * i] = low_bf16(words[i]);
        x.at[2 * i + 1] = high_bf16(words[i]);
    }
    return x;
}

DEVICE Eight load(const bf16* p) {
    return widen(*(const uint4*)p);
}

DEVICE Eight load(const float* p) {
    float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

DEVICE void store(bf16* p, const Eight& x) {
    uint4 raw;
    raw.x = pack_bf16(x.at[0], x.at[1]);
    raw.y = pack_bf16(x.at[2], x.at[3]);
    raw.z = pack_bf16(x.at[4], x.at[5]);
    raw.w = pack_bf16(x.at[6], x.at[7]);
    *(uint4*)p = raw;
}

DEVICE void store(float* p, const Eight& x) {
    ((float4*)p)[0] = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
    ((float4*)p)[1] = make_float4(x.at[4], x.at[5], x.at[6], x.at[7]);
}

DEVICE float sigmoid(float x) {
    return 1.f / (1.f + __expf(-x));
}

// The sum over `Lanes` neighbouring threads, in each of them.
template <int Lanes>
DEVICE float lane_sum(float x) {
#pragma unroll
    for (int offset = Lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The sum over the block, in each of its threads. `scratch` holds a number for each warp.
DEVICE float block_sum(float x, float* scratch) {
    x = lane_sum<WARP>(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < blockDim.x / WARP; i++) sum += scratch[i];
    return sum;
}

// ---- RMSNorm over the last of [rows, d]: y = x rstd w ------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
norm_forward(const bf16* x, const bf16* w, bf16* y, float* rstd, int d, float eps) {
    __shared__ float scratch[THREADS / WARP];
    const long long row = blockIdx.x;
    Eight mine[VECS];
    float square = 0.f;
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        int column = (v * THREADS + threadIdx.x) * 8;
        if (column < d) {
            mine[v] = load(x + row * d + column);
#pragma unroll
            for (int i = 0; i < 8; i++) square += mine[v].at[i] * mine[v].at[i];
        }
    }
    float r = rsqrtf(block_sum(square, scratch) / d + eps);
    if (threadIdx.x == 0) rstd[row] = r;
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        int column = (v * THREADS + threadIdx.x) * 8;
        if (column < d) {
            Eight weight = load(w + column);
#pragma unroll
            for (int i = 0; i < 8; i++) mine[v].at[i] *= r * weight.at[i];
            store(y + row * d + column, mine[v]);
        }
    }
}

// dx = residual + rstd (g - xhat mean(g xhat)), g = dy w, xhat = x rstd; dw as sums over the rows of each block,
// [blocks, d]. `residual` may be null. `dx` may be `dy` or `residual`.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_backward(const bf16* x, const bf16* w, const float* rstd, const bf16* dy, const bf16* residual, bf16* dx, float* dw,
              int rows, int d) {
    __shared__ float scratch[THREADS / WARP];
    Eight weight[VECS], sums[VECS];
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        int column = (v * THREADS + threadIdx.x) * 8;
        if (column < d) weight[v] = load(w + column);
#pragma unroll
        for (int i = 0; i < 8; i++) sums[v].at[i] = 0.f;
    }
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        float r = rstd[row], inner = 0.f;
        Eight hat[VECS], grad[VECS];
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            int column = (v * THREADS + threadIdx.x) * 8;
            if (column < d) {
                hat[v] = load(x + row * d + column);
                grad[v] = load(dy + row * d + column);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    hat[v].at[i] *= r;
                    sums[v].at[i] += grad[v].at[i] * hat[v].at[i];
                    grad[v].at[i] *= weight[v].at[i];
                    inner += grad[v].at[i] * hat[v].at[i];
                }
            }
        }
        float mean = block_sum(inner, scratch) / d;
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            int column = (v * THREADS + threadIdx.x) * 8;
            if (column < d) {
                Eight out;
                if (residual != nullptr) out = load(residual + row * d + column);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float through = r * (grad[v].at[i] - hat[v].at[i] * mean);
                    out.at[i] = residual != nullptr ? out.at[i] + through : through;
                }
                store(dx + row * d + column, out);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        int column = (v * THREADS + threadIdx.x) * 8;
        if (column < d) store(dw + (long long)blockIdx.x * d + column, sums[v]);
    }
}

// ---- the norm of each head, and the gate: y = x rstd w silu(gate), rows of d <= 8 LANES ------------------------------

// Columns of this thread, and whether there are any.
DEVICE int lane_column(int d, bool& there) {
    int column = (threadIdx.x % LANES) * 8;
    there = column < d;
    return column;
}

// `gate` may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
heads_forward(const bf16* x, const bf16* w, const bf16* gate, bf16* y, long long rows, int d, float eps) {
    bool there;
    const int column = lane_column(d, there);
    const long long row = (long long)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    there = there && row < rows;
    Eight mine;
    float square = 0.f;
    if (there) {
        mine = load(x + row * d + column);
#pragma unroll
        for (int i = 0; i < 8; i++) square += mine.at[i] * mine.at[i];
    }
    float r = rsqrtf(lane_sum<LANES>(square) / d + eps);
    if (!there) return;
    Eight weight = load(w + column);
#pragma unroll
    for (int i = 0; i < 8; i++) mine.at[i] *= r * weight.at[i];
    if (gate != nullptr) {
        Eight g = load(gate + row * d + column);
#pragma unroll
        for (int i = 0; i < 8; i++) mine.at[i] *= g.at[i] * sigmoid(g.at[i]);
    }
    store(y + row * d + column, mine);
}

// In place: `x` becomes y (which the gradient of what follows needs), `gate` its gradient, `dy` that of x; dw as sums over
// the rows of each block, [blocks, d].
extern "C" __global__ void __launch_bounds__(THREADS)
heads_backward(bf16* x, const bf16* w, bf16* gate, bf16* dy, float* dw, long long rows, int d, float eps) {
    __shared__ float partial[THREADS / LANES][LANES * 8 + 4];
    bool any;
    const int column = lane_column(d, any);
    constexpr int PER_BLOCK = THREADS / LANES;
    Eight weight, sums;
    if (any) weight = load(w + column);
#pragma unroll
    for (int i = 0; i < 8; i++) sums.at[i] = 0.f;
    for (long long first = (long long)blockIdx.x * PER_BLOCK; first < rows; first += (long long)gridDim.x * PER_BLOCK) {
        const long long row = first + threadIdx.x / LANES;
        const bool there = any && row < rows;
        Eight hat, grad, g;
        float square = 0.f, inner = 0.f;
        if (there) {
            hat = load(x + row * d + column);
            grad = load(dy + row * d + column);
            if (gate != nullptr) g = load(gate + row * d + column);
#pragma unroll
            for (int i = 0; i < 8; i++) square += hat.at[i] * hat.at[i];
        }
        float r = rsqrtf(lane_sum<LANES>(square) / d + eps);
        Eight out, d_gate;
        if (there) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                hat.at[i] *= r;
                float normed = hat.at[i] * weight.at[i];
                out.at[i] = normed;
                if (gate != nullptr) {
                    float s = sigmoid(g.at[i]), silu = g.at[i] * s;
                    out.at[i] = normed * silu;
                    d_gate.at[i] = grad.at[i] * normed * (s + silu * (1.f - s));
                    grad.at[i] *= silu;
                }
                sums.at[i] += grad.at[i] * hat.at[i];
                grad.at[i] *= weight.at[i];
                inner += grad.at[i] * hat.at[i];
            }
        }
        float mean = lane_sum<LANES>(inner) / d;
        if (there) {
#pragma unroll
            for (int i = 0; i < 8; i++) grad.at[i] = r * (grad.at[i] - hat.at[i] * mean);
            store(x + row * d + column, out);
            if (gate != nullptr) store(gate + row * d + column, d_gate);
            store(dy + row * d + column, grad);
        }
    }
    float* mine = &partial[threadIdx.x / LANES][(threadIdx.x % LANES) * 8];
#pragma unroll
    for (int i = 0; i < 8; i++) mine[i] = sums.at[i];
    __syncthreads();
    for (int c = threadIdx.x; c < d; c += THREADS) {
        float sum = 0.f;
        for (int i = 0; i < PER_BLOCK; i++) sum += partial[i][c];
        dw[(long long)blockIdx.x * d + c] = sum;
    }
}

// ---- SiLU and SwiGLU, n numbers, a multiple of 8 ---------------------------------------------------------------------

DEVICE long long my_eight() {
    return ((long long)blockIdx.x * THREADS + threadIdx.x) * 8;
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_forward(const bf16* x, bf16* y, long long n) {
    long long at = my_eight();
    if (at >= n) return;
    Eight v = load(x + at);
#pragma unroll
    for (int i = 0; i < 8; i++) v.at[i] *= sigmoid(v.at[i]);
    store(y + at, v);
}

// `dy` becomes dx.
extern "C" __global__ void __launch_bounds__(THREADS) silu_backward(const bf16* x, bf16* dy, long long n) {
    long long at = my_eight();
    if (at >= n) return;
    Eight v = load(x + at), d = load(dy + at);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float s = sigmoid(v.at[i]);
        d.at[i] *= s + v.at[i] * s * (1.f - s);
    }
    store(dy + at, d);
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_forward(const bf16* gate, const bf16* up, bf16* hidden, long long n) {
    long long at = my_eight();
    if (at >= n) return;
    Eight g = load(gate + at), u = load(up + at);
#pragma unroll
    for (int i = 0; i < 8; i++) g.at[i] *= sigmoid(g.at[i]) * u.at[i];
    store(hidden + at, g);
}

// In place: `gate` and `up` become their gradients, `d_hidden` becomes hidden.
extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_backward(bf16* gate, bf16* up, bf16* d_hidden, long long n) {
    long long at = my_eight();
    if (at >= n) return;
    Eight g = load(gate + at), u = load(up + at), d = load(d_hidden + at);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float s = sigmoid(g.at[i]), silu = g.at[i] * s, grad = d.at[i];
        d.at[i] = silu * u.at[i];
        g.at[i] = grad * u.at[i] * (s + silu * (1.f - s));
        u.at[i] = grad * silu;
    }
    store(gate + at, g);
    store(up + at, u);
    store(d_hidden + at, d);
}

// ---- rotary angles: halves of x [rows, d] turned against each other ----------------------------------------------------

// x of tokens [tokens, heads, d], contiguous; cos, sin [period, d / 2] repeat over the batch. sign -1 turns back.
extern "C" __global__ void __launch_bounds__(THREADS)
rotary(const bf16* x, const bf16* cos, const bf16* sin, bf16* y, long long n, long long period, int heads, int d, float sign) {
    const int eights = d / 16;
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n / 16) return;
    long long row = i / eights, token = row / heads % period;
    int column = (int)(i % eights) * 8;
    const bf16* from = x + row * d + column;
    Eight a = load(from), b = load(from + d / 2);
    Eight c = load(cos + token * (d / 2) + column), s = load(sin + token * (d / 2) + column);
    Eight first, second;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        first.at[j] = a.at[j] * c.at[j] - sign * b.at[j] * s.at[j];
        second.at[j] = b.at[j] * c.at[j] + sign * a.at[j] * s.at[j];
    }
    store(y + row * d + column, first);
    store(y + row * d + column + d / 2, second);
}

// ---- cross-entropy of a row of logits, and its gradient over the logits ------------------------------------------------

constexpr int LOSS_THREADS = 512;

// One block a row. loss[row] = log sum exp - logit[label]; 0 where the label is `ignore`. With `gradient` the row becomes
// softmax - one_hot(label), or 0. The vocabulary is a multiple of 8.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS)
cross_entropy(bf16* logits, const long long* labels, float* loss, int vocab, long long ignore, int gradient) {
    __shared__ float maxima[LOSS_THREADS / WARP], totals[LOSS_THREADS / WARP];
    const long long row = blockIdx.x, label = labels[row];
    bf16* mine = logits + row * vocab;
    if (label == ignore) {
        if (threadIdx.x == 0) loss[row] = 0.f;
        if (gradient)
            for (int c = threadIdx.x * 8; c < vocab; c += LOSS_THREADS * 8) *(uint4*)(mine + c) = make_uint4(0, 0, 0, 0);
        return;
    }
    const float logit = to_float(mine[label]);
    float top = __int_as_float(0xff800000), total = 0.f;
    for (int c = threadIdx.x * 8; c < vocab; c += LOSS_THREADS * 8) {
        Eight x = load(mine + c);
        float here = x.at[0];
#pragma unroll
        for (int i = 1; i < 8; i++) here = fmaxf(here, x.at[i]);
        if (here > top) {
            total *= __expf(top - here);
            top = here;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) total += __expf(x.at[i] - top);
    }
    float warp_top = top;
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        warp_top = fmaxf(warp_top, __shfl_xor_sync(0xffffffffu, warp_top, offset));
    // Threads without columns have a maximum of minus infinity and count for nothing.
    total = lane_sum<WARP>(total == 0.f ? 0.f : total * __expf(top - warp_top));
    if (threadIdx.x % WARP == 0) {
        maxima[threadIdx.x / WARP] = warp_top;
        totals[threadIdx.x / WARP] = total;
    }
    __syncthreads();
    top = maxima[0];
    for (int i = 1; i < LOSS_THREADS / WARP; i++) top = fmaxf(top, maxima[i]);
    total = 0.f;
    for (int i = 0; i < LOSS_THREADS / WARP; i++)
        if (totals[i] != 0.f) total += totals[i] * __expf(maxima[i] - top);
    const float lse = top + logf(total);
    if (threadIdx.x == 0) loss[row] = lse - logit;
    if (!gradient) return;
    for (int c = threadIdx.x * 8; c < vocab; c += LOSS_THREADS * 8) {
        Eight x = load(mine + c);
#pragma unroll
        for (int i = 0; i < 8; i++) x.at[i] = __expf(x.at[i] - lse) - (c + i == label ? 1.f : 0.f);
        store(mine + c, x);
    }
}

// ---- the gradient's norm and AdamW ---------------------------------------------------------------------------------------

// The block's share of the sum of squares.
template <typename T>
DEVICE void squares(const T* x, double* partial, long long n) {
    __shared__ double sums[THREADS / WARP];
    double sum = 0.0;
    const long long stride = (long long)gridDim.x * THREADS * 8;
    for (long long at = my_eight(); at < n; at += stride) {
        float here = 0.f;
        if (at + 8 <= n) {
            Eight v = load(x + at);
#pragma unroll
            for (int i = 0; i < 8; i++) here += v.at[i] * v.at[i];
        } else {
            for (long long i = at; i < n; i++) {
                float v = to_float(x[i]);
                here += v * v;
            }
        }
        sum += (double)here;
    }
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    sum = 0.0;
    for (int i = 0; i < THREADS / WARP; i++) sum += sums[i];
    partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) squares_bf16(const bf16* x, double* partial, long long n) {
    squares(x, partial, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) squares_f32(const float* x, double* partial, long long n) {
    squares(x, partial, n);
}

// sum += *scale x.
template <typename Number>
DEVICE void add_scaled(Number* sum, const float* x, const float* scale, long long n) {
    long long at = my_eight();
    if (at >= n) return;
    Eight s = load(sum + at), v = load(x + at);
    float by = *scale;
#pragma unroll
    for (int i = 0; i < 8; i++) s.at[i] += by * v.at[i];
    store(sum + at, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_scaled_bf16(bf16* sum, const float* x, const float* scale, long long n) {
    add_scaled(sum, x, scale, n);
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_scaled_f32(float* sum, const float* x, const float* scale, long long n) {
    add_scaled(sum, x, scale, n);
}

constexpr int ROW_WARPS = 32;

DEVICE void store(bf16* p, float x) {
    *p = to_bf16(x);
}

DEVICE void store(float* p, float x) {
    *p = x;
}

// sum[j] += the sum over i of x[i][j], x [rows, d]: a block has 32 columns, and its warps the rows in turn.
template <typename Number>
DEVICE void add_rows(Number* sum, const float* x, int rows, int d) {
    __shared__ float parts[ROW_WARPS][WARP + 1];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float total = 0.f;
    if (column < d)
        for (int row = warp; row < rows; row += ROW_WARPS) total += x[(long long)row * d + column];
    parts[warp][lane] = total;
    __syncthreads();
    // Each warp takes one of the columns.
    total = lane_sum<WARP>(parts[lane][warp]);
    const int mine = blockIdx.x * WARP + warp;
    if (lane == 0 && mine < d) store(sum + mine, to_float(sum[mine]) + total);
}

extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP) add_rows_bf16(bf16* sum, const float* x, int rows, int d) {
    add_rows(sum, x, rows, d);
}

extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP) add_rows_f32(float* sum, const float* x, int rows, int d) {
    add_rows(sum, x, rows, d);
}

// out[0] = scale |g|, out[1] = what the gradient is to be multiplied by: scale, and less where the norm exceeds `clip` > 0.
extern "C" __global__ void clipping(const double* partial, int blocks, double scale, double clip, double* out) {
    if (threadIdx.x != 0 || blockIdx.x != 0) return;
    double sum = 0.0;
    for (int i = 0; i < blocks; i++) sum += partial[i];
    double norm = sqrt(sum) * scale;
    out[0] = norm;
    out[1] = clip > 0.0 && norm > clip ? scale * (clip / norm) : scale;
}

// The f32 master weight is the bf16 weight and the 16 bits by which it differs: high is the master rounded to nearest, ties
// away from zero, low the signed difference.
DEVICE float join(u32 high, u32 low) {
    return __uint_as_float((high << 16) + (u32)(int)(short)low);
}

DEVICE u32 high_of(float master) {
    return (__float_as_uint(master) + 0x8000u) >> 16;
}

struct Settings {
    float keep;      // 1 - lr weight_decay, for the first `decayed` numbers
    float step;      // lr / (1 - beta1^t)
    float square;    // 1 / (1 - beta2^t)
    float beta1, beta2, eps;
};

template <typename G>
DEVICE void adamw(bf16* high, bf16* low, float* mean, float* square, const G* grad, const double* clipping, long long n,
                  long long decayed, const Settings& s) {
    const float scale = (float)clipping[1];
    const long long stride = (long long)gridDim.x * THREADS * 8;
    for (long long at = my_eight(); at < n; at += stride) {
        Eight g, m, v;
        u32 h[8], l[8];
        const bool whole = at + 8 <= n;
        const int count = whole ? 8 : (int)(n - at);
        if (whole) {
            g = load(grad + at);
            m = load(mean + at);
            v = load(square + at);
            uint4 hs = *(const uint4*)(high + at), ls = *(const uint4*)(low + at);
            u32 hw[4] = {hs.x, hs.y, hs.z, hs.w}, lw[4] = {ls.x, ls.y, ls.z, ls.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                h[2 * i] = hw[i] & 0xffff, h[2 * i + 1] = hw[i] >> 16;
                l[2 * i] = lw[i] & 0xffff, l[2 * i + 1] = lw[i] >> 16;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < count) {
                    g.at[i] = to_float(grad[at + i]);
                    m.at[i] = mean[at + i], v.at[i] = square[at + i], h[i] = high[at + i], l[i] = low[at + i];
                }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float x = g.at[i] * scale;
            m.at[i] += (1.f - s.beta1) * (x - m.at[i]);
            v.at[i] += (1.f - s.beta2) * (x * x - v.at[i]);
            float master = join(h[i], l[i]);
            if (at + i < decayed) master *= s.keep;
            master -= s.step * m.at[i] / (sqrtf(v.at[i] * s.square) + s.eps);
            h[i] = high_of(master);
            l[i] = __float_as_uint(master) - (h[i] << 16);
        }
        if (whole) {
            store(mean + at, m);
            store(square + at, v);
            u32 hw[4], lw[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                hw[i] = (h[2 * i] & 0xffff) | (h[2 * i + 1] << 16);
                lw[i] = (l[2 * i] & 0xffff) | (l[2 * i + 1] << 16);
            }
            *(uint4*)(high + at) = make_uint4(hw[0], hw[1], hw[2], hw[3]);
            *(uint4*)(low + at) = make_uint4(lw[0], lw[1], lw[2], lw[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < count)
                    mean[at + i] = m.at[i], square[at + i] = v.at[i], high[at + i] = (bf16)h[i], low[at + i] = (bf16)l[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
adamw_bf16(bf16* high, bf16* low, float* mean, float* square, const bf16* grad, const double* clipping, long long n,
           long long decayed, Settings s) {
    adamw(high, low, mean, square, grad, clipping, n, decayed, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
adamw_f32(bf16* high, bf16* low, float* mean, float* square, const float* grad, const double* clipping, long long n,
          long long decayed, Settings s) {
    adamw(high, low, mean, square, grad, clipping, n, decayed, s);
}

// Takes f32 master weights apart, and puts them together again.
extern "C" __global__ void __launch_bounds__(THREADS) split_master(const float* master, bf16* high, bf16* low, long long n) {
    const long long stride = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n; i += stride) {
        u32 h = high_of(master[i]);
        high[i] = (bf16)h;
        low[i] = (bf16)(__float_as_uint(master[i]) - (h << 16));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
join_master(const bf16* high, const bf16* low, float* master, long long n) {
    const long long stride = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n; i += stride) master[i] = join(high[i], low[i]);
}

// ---- initial values --------------------------------------------------------------------------------------------------------

// SplitMix64's output function.
DEVICE u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

DEVICE double uniform(u64 key, u64 i) {
    return ((double)(mix(key + i * 0x9e3779b97f4a7c15ull) >> 11) + 0.5) / 9007199254740992.0;
}

// Normal numbers by Box and Muller, a pair from two uniform ones, which depend on the key and the place alone.
extern "C" __global__ void __launch_bounds__(THREADS) normal_f32(float* out, u64 key, double std, long long n) {
    const long long stride = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; 2 * i < n; i += stride) {
        double radius = std * sqrt(-2.0 * log(uniform(key, 2 * i)));
        double sine, cosine;
        sincos(6.283185307179586476925286766559 * uniform(key, 2 * i + 1), &sine, &cosine);
        out[2 * i] = (float)(radius * cosine);
        if (2 * i + 1 < n) out[2 * i + 1] = (float)(radius * sine);
    }
}
