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
