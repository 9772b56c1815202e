// Products in FP32 of matrices that lie anywhere, with the bits of the CPU (src/gemm.rs): terms in blocks of 256, each a chain of
// fused multiply-adds from zero, ascending; blocks are added in ascending order, to what is there if `add`. One CTA makes a tile
// of 64 x 64. Plain: where operands lie close and in eights, gate.cu is faster, with the same bits.

#include "exact.cuh"

constexpr int TILE = 64, BK = 16, BLOCK = 256, EACH = 4;

// Element (i, j) is data[i * row + j * column].
struct View { const float* data; i64 row, column; };

// What is not there is `none`.
__device__ __forceinline__ void load(float (*to)[TILE + 4], const View& v, int line, int lines, int from, int terms, bool along, float none) {
    // Neighbours read neighbours, whichever way they lie.
#pragma unroll
    for (int e = threadIdx.x; e < BK * TILE; e += THREADS) {
        const int k = along ? e % BK : e / TILE, i = along ? e / BK : e % TILE;
        to[k][i] = line + i < lines && from + k < terms ? v.data[(line + i) * v.row + (from + k) * v.column] : none;
    }
}

// y[i][j] = the sum over p of a(i, p) b(j, p), for a tile of i < m from `row` on and j < n from `column` on.
__device__ __forceinline__ void tile(const View& a, const View& b, float* y, i64 y_row, int m, int n, int k, int row, int column, bool add) {
    __shared__ float of_a[BK][TILE + 4], of_b[BK][TILE + 4];
    const int i0 = threadIdx.x / 16 * EACH, j0 = threadIdx.x % 16 * EACH;
    float sum[EACH][EACH] = {}, total[EACH][EACH];
    // -0 changes no block that is added to it, be that -0 too.
#pragma unroll
    for (int i = 0; i < EACH * EACH; i++) total[i / EACH][i % EACH] = k > 0 ? -0.f : 0.f;
    if (add)
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (row + i0 + i < m && column + j0 + j < n) total[i][j] = y[(row + i0 + i) * y_row + column + j0 + j];
    for (int from = 0; from < k; from += BK) {
        // What is beyond the last term is -0 times +0, which changes no sum. +0 times +0 would: a chain whose terms are too small to
        // be held may be -0.
        load(of_a, a, row, m, from, k, a.column == 1, -0.f);
        load(of_b, b, column, n, from, k, b.column == 1, 0.f);
        __syncthreads();
#pragma unroll
        for (int p = 0; p < BK; p++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[i][j] = __fmaf_rn(of_a[p][i0 + i], of_b[p][j0 + j], sum[i][j]);
        __syncthreads();
        if ((from + BK) % BLOCK == 0 || from + BK >= k)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) { total[i][j] += sum[i][j]; sum[i][j] = 0; }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (row + i0 + i < m && column + j0 + j < n) y[(row + i0 + i) * y_row + column + j0 + j] = total[i][j];
}

// As many products as blockIdx.z says, whose matrices lie `step` elements apart. Tiles of rows along x, of columns along y.
struct Product {
    View a, b;
    float* y;
    i64 y_row, a_step, b_step, y_step;
    int m, n, k, add;
};
extern "C" __global__ void __launch_bounds__(THREADS) product(const Product p) {
    const i64 z = blockIdx.z;
    const View a = {p.a.data + z * p.a_step, p.a.row, p.a.column}, b = {p.b.data + z * p.b_step, p.b.row, p.b.column};
    tile(a, b, p.y + z * p.y_step, p.y_row, p.m, p.n, p.k, blockIdx.x * TILE, blockIdx.y * TILE, p.add);
}

// Consecutive groups of rows, counts[g] of each, against weights[g]: y = x b^T, where b has n rows and k columns. The x-th tile
// of rows of all groups; there are no more than rows / 64 and one for each group.
struct Grouped {
    const float* x;
    const u64* weights;
    const u32* counts;
    float* y;
    i64 b_row, b_column;
    int groups, rows, n, k;
};
extern "C" __global__ void __launch_bounds__(THREADS) grouped(const Grouped p) {
    int first = 0, at = blockIdx.x;
    for (int g = 0; g < p.groups; g++) {
        const int count = min((int)p.counts[g], p.rows - first), tiles = (count + TILE - 1) / TILE;
        if (at < tiles) {
            const View x = {p.x + (i64)first * p.k, p.k, 1}, w = {(const float*)p.weights[g], p.b_row, p.b_column};
            tile(x, w, p.y + (i64)first * p.n, p.n, count, p.n, p.k, at * TILE, blockIdx.y * TILE, false);
            return;
        }
        at -= tiles;
        first += count;
    }
}

// BF16 to FP32, and back to the nearest: products of widened operands are those of BF16 operands with FP32 sums.
extern "C" __global__ void __launch_bounds__(THREADS) widen(const Bf16* __restrict__ x, float* __restrict__ y, u64 count) {
    const u64 i = element();
    if (i < count) y[i] = value(x[i]);
}
extern "C" __global__ void __launch_bounds__(THREADS) narrow(const float* __restrict__ x, Bf16* __restrict__ y, u64 count) {
    const u64 i = element();
    if (i < count) y[i] = nearest<Bf16>(x[i]);
}

// ---- rows of scores, [heads][rows][columns], of which row t sees the first past + t + 1 columns ----------------------------

// Scores to shares; lse[t][head], the logarithms of their denominators with the maximum, if it is there.
extern "C" __global__ void __launch_bounds__(THREADS)
softmax(float* __restrict__ scores, float* __restrict__ lse, int heads, int rows, int columns, int past, float scale) {
    const u64 at = row_of();
    const bool there = at < (u64)heads * rows;
    const int t = at % rows, head = at / rows, seen = there ? past + t + 1 : 0;
    float* const p = scores + at * columns;
    const float most = largest(seen, [&](int i) { return p[i] * scale; });
    const float sum = sum_of(seen, [&](int i) { return p[i] = exponential(p[i] * scale - most); });
    if (!there) return;
    for (int i = lane_of(); i < columns; i += LANES) p[i] = i < seen ? p[i] / sum : 0.f;
    if (lse && lane_of() == 0) lse[(u64)t * heads + head] = most + (float)logarithm(sum);
}

// Scores to shares by the logarithms.
extern "C" __global__ void __launch_bounds__(THREADS)
shares(float* __restrict__ scores, const float* __restrict__ lse, int heads, int rows, float scale) {
    const u64 at = row_of();
    if (at >= (u64)heads * rows) return;
    const int t = at % rows;
    const float of_row = lse[(u64)t * heads + at / rows];
    float* const p = scores + at * rows;
    for (int i = lane_of(); i < rows; i += LANES) p[i] = i <= t ? exponential(p[i] * scale - of_row) : 0.f;
}

// Gradients of shares to those of scores; d_o and o are [rows][heads][values].
extern "C" __global__ void __launch_bounds__(THREADS)
score_gradient(const float* __restrict__ shares, float* __restrict__ ds, const float* __restrict__ d_o, const float* __restrict__ o,
               int heads, int rows, int values, float scale) {
    const u64 at = row_of();
    const bool there = at < (u64)heads * rows;
    const u64 from = (at % rows * heads + at / rows) * values;
    const float inner = sum_of(there ? values : 0, [&](int i) { return d_o[from + i] * o[from + i]; });
    if (!there) return;
    for (int i = lane_of(); i < rows; i += LANES) ds[at * rows + i] = (shares[at * rows + i] * (ds[at * rows + i] - inner)) * scale;
}
