// Dispatch and combine of a mixture layer at the speed of memory.
//   place:   [tokens][top_k], the row of a token's k-th choice among the experts' rows; negative: not here. A token's
//            choices ascend by expert.
//   x:       [tokens][columns], BF16
//   codes:   [rows][columns] E4M3, scales: [rows][columns/128]: a row's scales lie together, as they travel. In the order of
//            quantise.cu each would be written by itself, which takes longer than to write the rows. Rows that no place
//            names stay.
//   rows:    [rows][columns], BF16; weights: [tokens][top_k], FP32; in combine null for ones
//   experts: [tokens][top_k], numbers of experts; group_size: experts of a group
//   y:       [tokens][columns], BF16
//   dy, drows, dweights: gradients, as y, rows and weights; rows of drows that no place names stay
// Any number of tokens; top_k up to 32; columns a multiple of 128. A warp takes 8 tiles of a token in dispatch, 256 columns
// of one in combine, 8 choices of one in combine_backward; more warps do nothing. Shared memory of combine_backward: 2 * STAGE
// bytes of each warp.

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

// ---- the gradients of combine -----------------------------------------------------------------------------------

constexpr int CHAINS = 16;                    // partial sums of a dot product, of every sixteenth element, as in the reference
constexpr int CHOICES = 8, SHARE = 32 / CHOICES; // rows of a warp; lanes of a row, of which each has 4 neighbouring chains
constexpr int PIECE = 256;                    // columns at a time, 8 of a lane
constexpr int PITCH = PIECE * 2 + 32;         // bytes between rows, so that those that a half-warp reads lie in different banks
constexpr int STAGE = (CHOICES + 1) * PITCH;  // a piece of the rows, and of dy
constexpr int AHEAD = 8;                      // elements of a chain that are fetched before they are added

// Copies 16 bytes to shared memory while the thread goes on, or zeros.
__device__ __forceinline__ void copy16(u32 to, const u16* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_close() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of copies but the newest are there.
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
__device__ __forceinline__ uint2 load_four(u32 address) {
    uint2 v; asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address)); return v;
}

// drows = weight * dy, rounded; dweights = the sum of dy * row in the reference's order, 0 where the choice is not here. A
// chain needs elements that lie apart and a load brings neighbours, so pieces of the rows go through shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
combine_backward(const u16* __restrict__ dy, const u16* __restrict__ rows, const int* __restrict__ place, const float* __restrict__ weights,
                 u16* __restrict__ drows, float* __restrict__ dweights, int tokens, int top_k, int columns) {
    extern __shared__ __align__(16) char memory[];
    const u32 item = blockIdx.x * WARPS + threadIdx.x / 32, parts = (top_k + CHOICES - 1) / CHOICES, lane = threadIdx.x % 32;
    const u32 token = item / parts, choice = item % parts * CHOICES + lane / SHARE;
    if (token >= tokens) return;
    const size_t slot = (size_t)token * top_k + choice;
    const int row = choice < top_k ? __ldg(place + slot) : -1;
    const float weight = row >= 0 ? __ldg(weights + slot) : 0.f;
    int to[CHOICES];
    float by[CHOICES];
#pragma unroll
    for (int i = 0; i < CHOICES; i++) {
        to[i] = __shfl_sync(~0u, row, i * SHARE);
        by[i] = __shfl_sync(~0u, weight, i * SHARE);
    }
    const u32 in = shared_address(memory) + threadIdx.x / 32 * (2 * STAGE);
    const auto stage = [&](int from) { return in + from / PIECE % 2 * STAGE; };
    // A piece from this column on; what is beyond the columns, or not here, is zeros and changes no sum.
    const auto bring = [&](int from) {
        const int column = from + lane * 8;
        const u32 at = stage(from) + lane * 16;
        if (from < columns) {
#pragma unroll
            for (int i = 0; i < CHOICES; i++)
                copy16(at + i * PITCH, rows + (size_t)max(to[i], 0) * columns + column, to[i] >= 0 && column < columns);
            copy16(at + CHOICES * PITCH, dy + (size_t)token * columns + column, column < columns);
        }
        copies_close();
    };
    float sum[4] = {};
    bring(0);
#pragma unroll 1
    for (int from = 0; from < columns; from += PIECE) {
        bring(from + PIECE);
        copies_wait();
        __syncwarp();
        const u32 of_dy = stage(from) + CHOICES * PITCH, mine = stage(from) + lane / SHARE * PITCH + lane % SHARE * 8;
#pragma unroll 1
        for (int c = 0; c < PIECE / CHAINS; c += AHEAD) {
            uint2 a[AHEAD], d[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                a[i] = load_four(mine + (c + i) * (CHAINS * 2));
                d[i] = load_four(of_dy + lane % SHARE * 8 + (c + i) * (CHAINS * 2));
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                sum[0] = __fadd_rn(sum[0], __fmul_rn(first_of(d[i].x), first_of(a[i].x)));
                sum[1] = __fadd_rn(sum[1], __fmul_rn(second_of(d[i].x), second_of(a[i].x)));
                sum[2] = __fadd_rn(sum[2], __fmul_rn(first_of(d[i].y), first_of(a[i].y)));
                sum[3] = __fadd_rn(sum[3], __fmul_rn(second_of(d[i].y), second_of(a[i].y)));
            }
        }
        const int column = from + lane * 8;
        const Eight d = eight(load_shared4(of_dy + lane * 16));
#pragma unroll
        for (int i = 0; i < CHOICES; i++)
            if (to[i] >= 0 && column < columns)
                store8(drows + (size_t)to[i] * columns + column, make8([&](int j) { return __fmul_rn(by[i], d[j]); }));
        // The next round fills this stage.
        __syncwarp();
    }
    // The reference's tree: chains 8 apart, then 4, which are other lanes', then 2 and 1.
#pragma unroll
    for (int apart = SHARE / 2; apart; apart /= 2)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] = __fadd_rn(sum[j], __shfl_down_sync(~0u, sum[j], apart, SHARE));
    const float total = __fadd_rn(__fadd_rn(sum[0], sum[2]), __fadd_rn(sum[1], sum[3]));
    if (lane % SHARE == 0 && choice < top_k) dweights[slot] = row >= 0 ? total : 0.f;
}
