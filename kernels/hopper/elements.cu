// Elements and rows with the bits of the CPU (src/ops/), stored in FP32 or BF16: sums, columns, embedding, norms, rotation, SwiGLU,
// cross-entropy. Weights and their gradients are FP32. Plain: what low precision needs at the speed of memory is in the files beside it.

#include "exact.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
add(const Stored* __restrict__ a, const Stored* __restrict__ b, Stored* __restrict__ y, u64 count) {
    const u64 i = element();
    if (i < count) y[i] = stored(value(a[i]) + value(b[i]));
}

// `columns` of x from `x_from` on to those of y from `y_from` on, whose rows are as long as said.
extern "C" __global__ void __launch_bounds__(THREADS)
copy_columns(const Stored* __restrict__ x, Stored* __restrict__ y, u64 rows, int columns, int x_row, int x_from, int y_row, int y_from) {
    const u64 i = element(), row = i / columns, column = i % columns;
    if (row < rows) y[row * y_row + y_from + column] = x[row * x_row + x_from + column];
}

// Rows of a table in FP32, or of a matrix. An index outside of it gives NaN: the host checks tokens where it reads them, and cannot here.
template <class T> __device__ __forceinline__
void gather_rows(const u32* __restrict__ index, const T* __restrict__ table, Stored* __restrict__ y, u64 rows, int columns, u32 height) {
    const u64 i = element(), row = i / columns, column = i % columns;
    if (row >= rows) return;
    const u32 from = index[row];
    y[i] = stored(from < height ? value(table[(u64)from * columns + column]) : __uint_as_float(0x7fc00000));
}
extern "C" __global__ void __launch_bounds__(THREADS)
embedding(const u32* __restrict__ index, const float* __restrict__ table, Stored* __restrict__ y, u64 rows, int columns, u32 height) {
    gather_rows(index, table, y, rows, columns, height);
}
extern "C" __global__ void __launch_bounds__(THREADS)
gather(const u32* __restrict__ index, const Stored* __restrict__ x, Stored* __restrict__ y, u64 rows, int columns, u32 height) {
    gather_rows(index, x, y, rows, columns, height);
}

// The gradient of a table, which was zero: rows of one token are added ascending, by the CTA of the first for each WIDTH columns.
constexpr int WIDTH = 8 * THREADS;
extern "C" __global__ void __launch_bounds__(THREADS)
embedding_weight(const u32* __restrict__ tokens, const Stored* __restrict__ dy, float* __restrict__ dtable, int rows, int columns, u32 height) {
    const int parts = (columns + WIDTH - 1) / WIDTH, first = blockIdx.x / parts;
    const u32 token = tokens[first];
    bool before = token >= height;
    for (int t = threadIdx.x; t < first; t += THREADS) before |= tokens[t] == token;
    if (__syncthreads_or(before)) return;
    float sum[WIDTH / THREADS] = {};
    const int column = blockIdx.x % parts * WIDTH + threadIdx.x;
    for (int t = first; t < rows; t++) {
        if (tokens[t] != token) continue;
#pragma unroll
        for (int i = 0; i < WIDTH / THREADS; i++)
            if (column + i * THREADS < columns) sum[i] += value(dy[(u64)t * columns + column + i * THREADS]);
    }
#pragma unroll
    for (int i = 0; i < WIDTH / THREADS; i++)
        if (column + i * THREADS < columns) dtable[(u64)token * columns + column + i * THREADS] = sum[i];
}

// ---- RMSNorm ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float root(const Stored* x, int columns, bool there, float eps) {
    const float squares = sum_of(there ? columns : 0, [&](int i) { return value(x[i]) * value(x[i]); });
    return 1.f / sqrtf(squares / (float)columns + eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const Stored* __restrict__ x, const float* __restrict__ w, Stored* __restrict__ y, u64 rows, int columns, float eps) {
    const u64 row = row_of(), at = row * columns;
    const float r = root(x + at, columns, row < rows, eps);
    if (row >= rows) return;
    for (int i = lane_of(); i < columns; i += LANES) y[at + i] = stored((value(x[at + i]) * r) * w[i]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_backward(const Stored* __restrict__ x, const float* __restrict__ w, const Stored* __restrict__ dy, Stored* __restrict__ dx,
                  u64 rows, int columns, float eps) {
    const u64 row = row_of(), at = row * columns;
    const bool there = row < rows;
    const float r = root(x + at, columns, there, eps);
    const float mean = sum_of(there ? columns : 0, [&](int i) { return (value(dy[at + i]) * w[i]) * (value(x[at + i]) * r); }) / (float)columns;
    if (!there) return;
    for (int i = lane_of(); i < columns; i += LANES) dx[at + i] = stored(r * (value(dy[at + i]) * w[i] - (value(x[at + i]) * r) * mean));
}

// The factor of each row, for the gradient of the weights: rows ascending, a thread for each column.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_roots(const Stored* __restrict__ x, float* __restrict__ roots, u64 rows, int columns, float eps) {
    const u64 row = row_of();
    const float r = root(x + row * columns, columns, row < rows, eps);
    if (row < rows && lane_of() == 0) roots[row] = r;
}
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_weight(const Stored* __restrict__ x, const Stored* __restrict__ dy, const float* __restrict__ roots, float* __restrict__ dw,
                u64 rows, int columns) {
    const u64 column = element();
    if (column >= columns) return;
    float sum = 0;
#pragma unroll 8
    for (u64 row = 0; row < rows; row++) sum += value(dy[row * columns + column]) * (value(x[row * columns + column]) * roots[row]);
    dw[column] = sum;
}

// ---- rotation, SwiGLU, cross-entropy ------------------------------------------------------------------------------------

// angles: cosine and sine by position of a sequence and pair. What is not rotated is copied.
extern "C" __global__ void __launch_bounds__(THREADS)
rope(const Stored* __restrict__ x, const float2* __restrict__ angles, Stored* __restrict__ y, u64 count, int columns, int head_width,
     int offset, int width, int sequence, int inverse) {
    const u64 i = element();
    if (i >= count) return;
    const int at = i % columns % head_width - offset;
    if (at < 0 || at >= width) { y[i] = x[i]; return; }
    const float2 angle = angles[i / columns % sequence * (width / 2) + at / 2];
    const float cosine = angle.x, sine = inverse ? -angle.y : angle.y, a = value(x[i - at % 2]), b = value(x[i - at % 2 + 1]);
    y[i] = stored(at % 2 ? a * sine + b * cosine : a * cosine - b * sine);
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu(const Stored* __restrict__ gate, const Stored* __restrict__ up, Stored* __restrict__ h, u64 count) {
    const u64 i = element();
    if (i >= count) return;
    const float g = value(gate[i]);
    h[i] = stored((g * sigmoid(g)) * value(up[i]));
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_backward(const Stored* __restrict__ gate, const Stored* __restrict__ up, const Stored* __restrict__ dh, Stored* __restrict__ h,
                Stored* __restrict__ dgate, Stored* __restrict__ dup, u64 count) {
    const u64 i = element();
    if (i >= count) return;
    const float g = value(gate[i]), u = value(up[i]), d = value(dh[i]), s = sigmoid(g);
    h[i] = stored((g * s) * u);
    dup[i] = stored(d * (g * s));
    dgate[i] = stored((d * u) * (s * (1.f + g * (1.f - s))));
}

// Losses, and the gradients of logits times `scale`; a target of ~0 has none of both, and one outside the vocabulary the loss NaN.
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy(const Stored* __restrict__ logits, const u32* __restrict__ targets, float* __restrict__ losses, Stored* __restrict__ dlogits,
              u64 rows, int columns, float scale) {
    const u64 row = row_of();
    const bool there = row < rows;
    const u32 target = there ? targets[row] : ~0u;
    const bool counted = target != ~0u;
    const Stored* const x = logits + row * columns;
    Stored* const d = dlogits + row * columns;
    const float most = largest(counted ? columns : 0, [&](int i) { return value(x[i]); });
    const float sum = sum_of(counted ? columns : 0, [&](int i) { return exponential(value(x[i]) - most); });
    if (!there) return;
    for (int i = lane_of(); i < columns; i += LANES) {
        const float share = counted ? (exponential(value(x[i]) - most) / sum) * scale : 0.f;
        d[i] = stored(i == target ? share - scale : share);
    }
    if (lane_of() == 0) {
        const float below = target < columns ? value(x[target]) - most : __uint_as_float(0x7fc00000);
        losses[row] = counted ? (float)(logarithm(sum) - (double)below) : 0.f;
    }
}
