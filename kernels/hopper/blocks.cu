// Weights to E4M3 with one scale for each block of 128 x 128, in both orders that products read: B of fp8_gemm.cu.
//   w:      [rows][columns], FP32
//   codes:  [rows in eights][columns in whole tiles], E4M3; scales: FP32, [tiles of rows][tiles of columns]
//   turned: [columns in eights][rows in whole tiles]; turned_scales: [tiles of columns][tiles of rows]
// Any shape: what is beyond the last row and column is zero. A CTA makes a block.

#include "memory.cuh"

constexpr int CREW = 2 * WARPS;               // of a CTA: with eight warps of more rows each, less is on its way at a time
constexpr int EACH = TILE / CREW;             // rows of a warp, four columns of a lane
constexpr int WORDS = TILE / 4;

// Four columns of a row, zeros where there are none.
__device__ __forceinline__ float4 four(const float* w, int row, int column, int rows, int columns) {
    const float* const at = w + (size_t)row * columns + column;
    if (columns % 4 == 0) return row < rows && column < columns ? __ldg((const float4*)at) : float4{0, 0, 0, 0};
    const auto one = [&](int i) { return row < rows && column + i < columns ? __ldg(at + i) : 0.f; };
    return {one(0), one(1), one(2), one(3)};
}

extern "C" __global__ void __launch_bounds__(32 * CREW, 2)
quantise_blocks(const float* __restrict__ w, u8* __restrict__ codes, float* __restrict__ scales, u8* __restrict__ turned,
                float* __restrict__ turned_scales, int rows, int columns) {
    // Row r lies at [r % 4][r / 4], so that neither order of access meets a bank twice.
    __shared__ u32 tile[4][WORDS][WORDS + 1];
    __shared__ float largest[CREW];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = (columns + TILE - 1) / TILE, down = (rows + TILE - 1) / TILE;
    const int row = blockIdx.x / across * TILE, column = blockIdx.x % across * TILE;
    float4 v[EACH];
    float m = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        v[i] = four(w, row + warp * EACH + i, column + lane * 4, rows, columns);
        // Of a NaN and a number it is the number, as in the reference.
        m = fmaxf(fmaxf(m, fmaxf(fabsf(v[i].x), fabsf(v[i].y))), fmaxf(fabsf(v[i].z), fabsf(v[i].w)));
    }
#pragma unroll
    for (int d = 16; d; d /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
    if (lane == 0) largest[warp] = m;
    __syncthreads();
    m = largest[0];
#pragma unroll
    for (int i = 1; i < CREW; i++) m = fmaxf(m, largest[i]);
    const float scale = Scale(m, false).value;
    if (threadIdx.x == 0) {
        scales[row / TILE * across + column / TILE] = scale;
        turned_scales[column / TILE * down + row / TILE] = scale;
    }
    const int height = (rows + 7) / 8 * 8, width = (columns + 7) / 8 * 8;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        // A quotient of FP32, unlike one of BF16 (memory.cuh), may lie anywhere: it is divided.
        const u32 word = encode(__fdiv_rn(v[i].x, scale), __fdiv_rn(v[i].y, scale), __fdiv_rn(v[i].z, scale), __fdiv_rn(v[i].w, scale));
        const int r = warp * EACH + i;
        tile[r % 4][r / 4][lane] = word;
        if (row + r < height) *(u32*)(codes + (size_t)(row + r) * (across * TILE) + column + lane * 4) = word;
    }
    __syncthreads();
    // Four columns of four rows at a time: words of rows become words of columns.
#pragma unroll
    for (int word = warp; word < WORDS; word += CREW) {
        const u32 a = tile[0][lane][word], b = tile[1][lane][word], c = tile[2][lane][word], d = tile[3][lane][word];
        const u32 ab = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362);
        const u32 cd = __byte_perm(c, d, 0x5140), cd_high = __byte_perm(c, d, 0x7362);
        const u32 out[4] = {__byte_perm(ab, cd, 0x5410), __byte_perm(ab, cd, 0x7632),
                            __byte_perm(ab_high, cd_high, 0x5410), __byte_perm(ab_high, cd_high, 0x7632)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int to = column + word * 4 + i;
            if (to < width) *(u32*)(turned + (size_t)to * (down * TILE) + row + lane * 4) = out[i];
        }
    }
}
