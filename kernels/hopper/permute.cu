// Dispatch and combine of a mixture layer at the speed of memory.
//   place:   [tokens][top_k], the row of a token's k-th choice among the experts' rows; negative: not here. A token's
//            choices ascend by expert.
//   x:       [tokens][columns], BF16
//   codes:   [rows][columns] E4M3, scales: [rows][columns/128]: a row's scales lie together, as they travel. In the order of
//            quantise.cu each would be written by itself, which takes longer than to write the rows. Rows that no place
//            names stay.
//   rows:    [rows][columns], BF16; weights: [tokens][top_k], FP32, or null for ones
//   experts: [tokens][top_k], numbers of experts; group_size: experts of a group
//   y:       [tokens][columns], BF16
// Any number of tokens; top_k up to 32; columns a multiple of 128. A warp takes 8 tiles of a token in dispatch, 256 columns
// of one in combine; more warps do nothing.

#include "memory.cuh"

constexpr int AT_ONCE = 4;                    // tiles of a half-warp in dispatch
constexpr int BY_TILE = 64;                   // rows of a CTA in scales_by_tile
constexpr int ROWS = 8;                       // rows of which combine adds 8 columns, in flight at once

// A token is read and rounded once and written to all its places: gathering by the experts' rows would read it top_k times.
extern "C" __global__ void __launch_bounds__(THREADS)
dispatch(const u16* __restrict__ x, const int* __restrict__ place, u8* __restrict__ codes, float* __restrict__ scales,
         int tokens, int top_k, int columns, int power) {
    const u32 item = blockIdx.x * WARPS + threadIdx.x / 32, tiles = columns / TILE, parts = (tiles + 2 * AT_ONCE - 1) / (2 * AT_ONCE);
    const u32 token = item / parts, lane = threadIdx.x % 32, column = lane % LANES * 8;
    const u32 all = item % parts * (2 * AT_ONCE), tile = all + lane / LANES * AT_ONCE; // the warp's tiles, and the half-warp's
    if (token >= tokens) return;
    const int to = lane < top_k ? __ldg(place + (size_t)token * top_k + lane) : -1;
    Eight v[AT_ONCE];
    uint2 code[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) v[i] = load8(x + (size_t)token * columns + (tile + i) * TILE + column, tile + i < tiles);
    float scale = quantise(code, v, power);
    // Lanes 0 to 7 get the eight tiles' scales, and so do each next eight lanes, for another place.
    scale = __shfl_sync(~0u, scale, lane % (2 * AT_ONCE) * (LANES / AT_ONCE));
#pragma unroll 1
    for (int k = 0; k < top_k; k += 16 / AT_ONCE) {
        const int row = __shfl_sync(~0u, to, k + lane / (2 * AT_ONCE));
        if (row >= 0 && all + lane % (2 * AT_ONCE) < tiles) scales[(size_t)row * tiles + all + lane % (2 * AT_ONCE)] = scale;
    }
#pragma unroll 1
    for (int k = 0; k < top_k; k++) {
        const int row = __shfl_sync(~0u, to, k);
        if (row < 0) continue;
        u8* const at = codes + (size_t)row * columns + tile * TILE + column;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (tile + i < tiles) *(uint2*)(at + i * TILE) = code[i];
    }
}

// Scales by row to scales by tile, as fp8_gemm.cu reads those of A. A CTA takes BY_TILE rows, and has a place in shared
// memory for each of their scales, with rows an odd number of words apart.
extern "C" __global__ void __launch_bounds__(THREADS)
scales_by_tile(const float* __restrict__ by_row, float* __restrict__ by_tile, int rows, int tiles, int stride) {
    extern __shared__ float block[];
    const int first = blockIdx.x * BY_TILE, count = min(BY_TILE, rows - first), pitch = tiles | 1;
    const float* const from = by_row + (size_t)first * tiles;
    // Where an element goes follows from where the one before it went: a division for each takes longer than the memory.
    const int next_row = THREADS / tiles, next_column = THREADS % tiles;
    int column = threadIdx.x % tiles, at = threadIdx.x / tiles * pitch + column;
#pragma unroll 14
    for (int i = threadIdx.x; i < count * tiles; i += THREADS) {
        block[at] = __ldg(from + i);
        const bool over = column + next_column >= tiles;
        column += over ? next_column - tiles : next_column;
        at += next_row * pitch + next_column + (over ? pitch - tiles : 0);
    }
    __syncthreads();
    const int row = threadIdx.x % BY_TILE;
    if (row < count)
#pragma unroll 4
        for (int tile = threadIdx.x / BY_TILE; tile < tiles; tile += THREADS / BY_TILE)
            by_tile[(size_t)tile * stride + first + row] = block[row * pitch + tile];
}

// y = the sum over a token's rows of weight * row, in the reference's order: within a group of experts the products, each
// rounded and then added, in ascending order of expert; then the groups' sums, each rounded to BF16, ascending.
extern "C" __global__ void __launch_bounds__(THREADS)
combine(const u16* __restrict__ rows, const int* __restrict__ place, const float* __restrict__ weights, const int* __restrict__ experts,
        u16* __restrict__ y, int tokens, int top_k, int columns, int group_size) {
    const u32 item = blockIdx.x * WARPS + threadIdx.x / 32, parts = (columns + 255) / 256, lane = threadIdx.x % 32;
    const u32 token = item / parts, column = item % parts * 256 + lane * 8;
    if (token >= tokens) return;
    const size_t slot = (size_t)token * top_k + lane;
    const int from = lane < top_k ? __ldg(place + slot) : -1;
    const float weight = lane < top_k && weights ? __ldg(weights + slot) : 1.f;
    const int group = lane < top_k ? __ldg(experts + slot) / group_size : 0;
    // Bit k: the k-th choice is the first of another group.
    const u32 starts = __ballot_sync(~0u, group != __shfl_up_sync(~0u, group, 1));
    float sum[8] = {}, total[8] = {};
#pragma unroll 1
    for (int k = 0; k < top_k; k += ROWS) {
        Eight v[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = __shfl_sync(~0u, from, (k + i) % 32);
            v[i] = load8(rows + (size_t)row * columns + column, row >= 0 && column < columns);
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (k + i >= top_k) break;
            const float w = __shfl_sync(~0u, weight, k + i);
            if (starts >> (k + i) & 1)
#pragma unroll
                for (int j = 0; j < 8; j++) { total[j] = __fadd_rn(total[j], rounded(sum[j])); sum[j] = 0; }
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] = __fadd_rn(sum[j], __fmul_rn(w, v[i][j]));
        }
    }
    if (column < columns) store8(y + (size_t)token * columns + column, make8([&](int j) { return __fadd_rn(total[j], rounded(sum[j])); }));
}
