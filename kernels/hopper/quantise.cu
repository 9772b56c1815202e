// Rows of BF16 to E4M3 at the speed of memory.
//   x:      [rows][columns]
//   codes:  [rows][columns]
//   scales: FP32, [columns/128][stride], as fp8_gemm.cu reads those of A; the stride a multiple of 4 that is not below
//           rows. Scales of rows beyond the last, up to that multiple, may be written too (as 1).
//   power:  scales are powers of two
// Any number of rows; columns a multiple of 128. A warp takes 8 rows of a tile; more warps do nothing.

#include "memory.cuh"

constexpr int ROWS = 4;                       // of a half-warp

extern "C" __global__ void __launch_bounds__(THREADS)
quantise_rows(const u16* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scales, int rows, int columns, int stride, int power) {
    const Part<ROWS> part(rows, columns);
    if (part.none()) return;
    Eight v[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) v[i] = load8(x + part.at(i), part.there(i));
    part.quantise(v, codes, scales, stride, power);
}

// The same of FP32 rows of any width, whose last tile is filled up with zeros, and back. A warp takes a tile.
//   x: [rows][columns]; codes: [rows][columns in whole tiles]
extern "C" __global__ void __launch_bounds__(THREADS)
quantise_floats(const float* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scales, int rows, int columns, int stride) {
    const int tiles = (columns + TILE - 1) / TILE, lane = threadIdx.x % 32;
    const size_t item = (size_t)blockIdx.x * WARPS + threadIdx.x / 32, row = item / tiles, tile = item % tiles;
    if (row >= rows) return;
    const int column = tile * TILE + lane * 4;
    const auto one = [&](int i) { return column + i < columns ? __ldg(x + row * columns + column + i) : 0.f; };
    const float v[4] = {one(0), one(1), one(2), one(3)};
    float m = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int d = 16; d; d /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
    m = fmaxf(m, 0.f);                        // a tile of NaN has none
    const float scale = Scale(m, false).value;
    const u32 word = encode(__fdiv_rn(v[0], scale), __fdiv_rn(v[1], scale), __fdiv_rn(v[2], scale), __fdiv_rn(v[3], scale));
    *(u32*)(codes + row * (tiles * TILE) + column) = word;
    if (lane == 0) scales[tile * stride + row] = scale;
}
extern "C" __global__ void __launch_bounds__(THREADS)
dequantise_rows(const u8* __restrict__ codes, const float* __restrict__ scales, float* __restrict__ y, u64 count, int columns, int stride) {
    const u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const u64 row = i / columns, column = i % columns, width = (columns + TILE - 1) / TILE * TILE;
    float value;
    asm("{ .reg .b32 h; .reg .b16 x, y; cvt.rn.f16x2.e4m3x2 h, %1; mov.b32 {x, y}, h; cvt.f32.f16 %0, x; }"
        : "=f"(value) : "h"((u16)codes[row * width + column]));
    y[i] = __fmul_rn(value, scales[column / TILE * stride + row]);
}
