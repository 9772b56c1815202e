// Block-scaled FP8 matrix product for Hopper: D[M,N] = A[M,K] * B[N,K]^T, BF16 out.
//   A: E4M3, row-major, one FP32 scale per row and 128 of K, stored [K/128][M], its rows padded to a multiple of 4 so
//      that the copy engine can fetch them.
//   B: E4M3, row-major, one FP32 scale per 128 x 128, stored [ceil(N/128)][K/128].
// Grouped by expert: `offsets` holds groups + 1 row numbers on the device; rows offsets[g] .. offsets[g+1] of A (any
// number of them) meet B's matrix g of [groups][N][K], with scales [groups][ceil(N/128)][K/128].
// Any M; N a multiple of 8, K of 128.
//
// Chosen by -D:
//   MATH     math warpgroups (2)
//   BM, BN   rows (MATH times 64 or 128) and columns (a multiple of 16) of a tile
//   STAGES   depth of the ring
//   BAND     rows of tiles in a band, a power of two
//   GROUPED  0 or 1
//   AHEAD    1: a warpgroup waits for the next stage and fetches its scales while its last products of a block are made, and in
//            the last block of a tile it looks for the next tile and lays out what is done. 0: none of that, which suits
//            single waves of odd width (docs/measurements/hopper-fp8.md)
//
// One persistent CTA per SM. One warp fills a ring of stages; MATH warpgroups, each with its part of the tile's rows,
// multiply 128 of K at a time on the tensor cores and add the scaled partial products in FP32 registers; for each of them a warp
// stores.

#include "hopper.cuh"

constexpr int BK = 128;                       // one scale covers 128 of K, and 128 bytes are one swizzle row
constexpr int WROWS = BM / MATH;              // rows of one math warpgroup
constexpr int WAVES = WROWS / 64;             // wgmma is 64 rows high
constexpr int FRAG = BN / 2;                  // accumulators of one thread in a 64 x BN product
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK, D_BYTES = BM * BN * 2;
// A's scales. A group may begin at any row, but the copy engine only at a multiple of 4 scales; hence a little more.
constexpr int S_BOX = GROUPED ? 132 : BM, S_LOADS = GROUPED ? (BM + 127) / 128 : 1;
constexpr int S_LOADED = S_LOADS * S_BOX * 4, S_BYTES = GROUPED ? S_LOADS * 512 + 128 : BM * 4;
constexpr int BOX = BN % 64 ? BN : 64;        // columns of a store: 128 swizzled bytes, or a whole unswizzled row
constexpr int BOX_ROWS = 32;
constexpr int BOXES = (BN / BOX) * (WROWS / BOX_ROWS); // of a warpgroup
constexpr int PACE = BM * BN / 47;            // about 0.7 of a block's cycles

// A tile whose width does not divide 128 meets up to three blocks of B's scales. START is where it begins in a block,
// so that the borders are constants of the unrolled loop.
constexpr int ALIGN = BN % 128 == 0 ? 128 : BN & -BN;
constexpr int BLOCKS = BN % 128 == 0 ? BN / 128 : (BN - ALIGN + 127) / 128 + 1;

struct Walk : Tiles<BAND> {
    const int* offsets;
    int group, groups, m, n, end; // rows m .. end are this tile's and its group's
    __device__ __forceinline__ Walk(const int* offsets, int groups, int M, int N) : offsets(offsets), groups(groups) {
        cols = (N + BN - 1) / BN;
        stride = gridDim.x;
        tile = blockIdx.x;
        band = group = 0;
        enter(M);
        locate();
    }
    __device__ __forceinline__ void enter(int M) {
        m = GROUPED ? __ldg(offsets + group) : 0;
        end = GROUPED ? __ldg(offsets + group + 1) : M;
        first = m;
        rows = (end - m + BM - 1) / BM;
    }
    __device__ __forceinline__ void locate() {
        while (!find()) {
            if (++group >= groups) return;
            enter(0);
        }
        m = first + row * BM;
        n = col * BN;
    }
    __device__ __forceinline__ bool done() const { return group >= groups; }
    __device__ __forceinline__ void next() { tile += stride; locate(); }
private:
    int first;
};

// B's scales for a tile. A lane keeps those of one block of K in 32; a shuffle hands them out.
struct ScaleB {
    const float* at[BLOCKS];
    float lane[BLOCKS];
    __device__ __forceinline__ void start(const float* scale, const Walk& tile, int N, int kblocks) {
        const int nblocks = (N + 127) / 128;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
            at[i] = scale + (long long)(tile.group * nblocks + min(tile.n / 128 + i, nblocks - 1)) * kblocks;
        load(0, kblocks);
    }
    __device__ __forceinline__ void load(int kb, int kblocks) {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) lane[i] = __ldg(at[i] + min(kb + (int)(threadIdx.x % 32), kblocks - 1));
    }
};

struct Place { u32 a, b, scale, full, empty, out, laid, free; int lane, warp; };

// The scales of a block of K: of the rows that a thread has in each wave, and of the tile's columns. Those of the rows lie in the
// stage, which must be full.
struct Scales { float a[WAVES][2], b[BLOCKS]; };
__device__ __forceinline__ void fetch_a(Scales& to, u32 scale_a, int stage) {
#pragma unroll
    for (int w = 0; w < WAVES; w++)
        for (int h = 0; h < 2; h++) to.a[w][h] = load_shared(scale_a + stage * S_BYTES + w * 256 + h * 32);
}
__device__ __forceinline__ void fetch_b(Scales& to, const ScaleB& scale_b, int kb) {
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) to.b[i] = __shfl_sync(~0u, scale_b.lane[i], kb % 32);
}

// A wave, rounded, to shared memory for the storing warp.
__device__ __forceinline__ void lay_out(const float (&acc)[FRAG], int w, const Place& at) {
    const int r = 64 * w + 16 * at.warp + at.lane % 16, half = at.lane / 16;
#pragma unroll
    for (int j = 0; j < BN / 8; j += 2) {
        const float* v = &acc[4 * j];
        const u32 to = BN % 64 ? r * (BN * 2) + (j + half) * 16
                               : j / 8 * (WROWS * 128) + r * 128 + (((half ^ (r % 8)) ^ (j % 8)) << 4);
        store_matrices(at.out + to, pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
    }
}
constexpr int EARLY = AHEAD ? WAVES - 1 : 0;  // waves that are laid out while the last one is made

// What the last block of a tile needs of the next, and the phase of the place where this one is laid out.
struct Next {
    Walk& tile;
    const float* scale;
    int N, phase;
    __device__ __forceinline__ void find(ScaleB& scale_b, int kblocks) const {
        tile.next();
        if (!tile.done()) scale_b.start(scale, tile, N, kblocks);
    }
};

// One block of K. The loop over it has no jumps: even untaken paths cost more than they save.
template <int START, bool FIRST, bool LAST> __device__ __forceinline__
void block(float (&acc)[WAVES][FRAG], float (&part)[FRAG], Scales& scales, Ring<STAGES>& ring, const Place& at, u32 scale_a, ScaleB& scale_b, int kb, int kblocks, const Next& next) {
    Scales after;
    if (AHEAD ? !LAST && kb % 32 == 31 : !FIRST && kb % 32 == 0) scale_b.load(kb + AHEAD, kblocks);
    if (FIRST && AHEAD) fetch_b(scales, scale_b, kb);
    if (FIRST || !AHEAD) barrier_wait(at.full + 8 * ring.stage, ring.phase);
    if (FIRST && AHEAD) fetch_a(scales, scale_a, ring.stage);
#pragma unroll
    for (int w = 0; w < WAVES; w++) {
        multiply(part, at.a + ring.stage * (A_BYTES / 16) + w * (64 * BK / 16), at.b + ring.stage * (B_BYTES / 16));
        if (!AHEAD && w == 0) {
            fetch_a(scales, scale_a, ring.stage);
            fetch_b(scales, scale_b, kb);
        }
        if (AHEAD && !LAST && w == WAVES - 1) {
            Ring<STAGES> then = ring;
            then.next();
            fetch_b(after, scale_b, kb + 1);
            barrier_wait(at.full + 8 * then.stage, then.phase);
            fetch_a(after, scale_a, then.stage);
        }
        if (AHEAD && LAST && w == 0) next.find(scale_b, kblocks);
        if (LAST && EARLY && w == WAVES - 1) {
            barrier_wait(at.free, next.phase);
#pragma unroll
            for (int i = 0; i < EARLY; i++) lay_out(acc[i], i, at);
        }
        multiply_wait();
        // Each warp has waited for its own products only, so each gives the stage back.
        if (w == WAVES - 1 && at.lane == 0) barrier_arrive(at.empty + 8 * ring.stage);
        float s[BLOCKS][2];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) { s[i][0] = scales.a[w][0] * scales.b[i]; s[i][1] = scales.a[w][1] * scales.b[i]; }
#pragma unroll
        for (int i = 0; i < FRAG; i++) {
            const int b = (START + i / 4 * 8) / 128;
            const float scale = s[b < BLOCKS ? b : 0][i / 2 % 2];
            acc[w][i] = FIRST ? part[i] * scale : acc[w][i] + part[i] * scale;
        }
    }
    if (AHEAD && !LAST) scales = after;
    ring.next();
}
// The blocks of a tile.
template <int START> __device__ __forceinline__
void accumulate(float (&acc)[WAVES][FRAG], Ring<STAGES>& ring, const Place& at, u32 scale_a, ScaleB& scale_b, int kblocks, const Next& next) {
    float part[FRAG];
    Scales scales;
    if (AHEAD && kblocks == 1) {
        block<START, true, true>(acc, part, scales, ring, at, scale_a, scale_b, 0, kblocks, next);
        return;
    }
    block<START, true, false>(acc, part, scales, ring, at, scale_a, scale_b, 0, kblocks, next);
#pragma unroll 1
    for (int kb = 1; kb < kblocks - AHEAD; kb++) block<START, false, false>(acc, part, scales, ring, at, scale_a, scale_b, kb, kblocks, next);
    if (AHEAD) block<START, false, true>(acc, part, scales, ring, at, scale_a, scale_b, kblocks - 1, kblocks, next);
}

extern "C" __global__ void __launch_bounds__(128 * (MATH + 1), 1)
fp8_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
         const __grid_constant__ TensorMap map_d, const __grid_constant__ TensorMap map_sa,
         unsigned short* __restrict__ d, const float* __restrict__ scale_b,
         const int* __restrict__ offsets, int groups, int M, int N, int K) {
    extern __shared__ __align__(1024) char memory[];
    const u32 a_ring = shared_address(memory), b_ring = a_ring + STAGES * A_BYTES;
    const u32 d_tile = b_ring + STAGES * B_BYTES, s_ring = d_tile + D_BYTES;
    const u32 full = s_ring + STAGES * S_BYTES, empty = full + 8 * STAGES;
    const u32 laid = empty + 8 * STAGES, free = laid + 8 * MATH; // the output in shared memory, by warpgroup
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), kblocks = K / BK;

    if (threadIdx.x == 0) {
        prefetch_map(map_a); prefetch_map(map_b); prefetch_map(map_sa); prefetch_map(map_d);
        init_barriers<STAGES, MATH>(full, empty, laid, free);
    }
    __syncthreads();

    Ring<STAGES> ring;
    Walk tile(offsets, groups, M, N);
    if (group == MATH) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(56));
        if (threadIdx.x == 128 * MATH) {
#pragma unroll 1
            for (; !tile.done(); tile.next()) {
#pragma unroll 1
                for (int kb = 0; kb < kblocks; kb++, ring.next()) {
                    const u32 a = a_ring + ring.stage * A_BYTES, b = b_ring + ring.stage * B_BYTES;
                    const u32 bar = full + 8 * ring.stage;
                    const int x = kb * BK, bn = GROUPED ? tile.group * N + tile.n : tile.n;
                    barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
                    barrier_expect(bar, A_BYTES + B_BYTES + S_LOADED);
                    load_box(a, map_a, x, tile.m, bar);
                    load_box(b, map_b, x, bn, bar);
#pragma unroll
                    for (int i = 0; i < S_LOADS; i++)
                        load_box(s_ring + ring.stage * S_BYTES + i * 512, map_sa, (GROUPED ? tile.m & ~3 : tile.m) + i * 128, kb, bar);
                }
            }
        } else if (threadIdx.x >= 128 * MATH + 32 && threadIdx.x < 128 * MATH + 32 * (MATH + 1)) {
            // A warp for each warpgroup: with one for all, a warpgroup's place is freed late. A store is spread over the next tile's
            // time: all at once, from all SMs, it holds up their loads.
            const int lane = threadIdx.x % 32, g = threadIdx.x / 32 - 4 * MATH - 1;
            u32 start = clock32(), gap = kblocks * PACE / BOXES;
#pragma unroll 1
            for (int phase = 0; !tile.done(); phase ^= 1) {
                const int m = tile.m + g * WROWS, n = tile.n, end = tile.end;
                tile.next();
                if (tile.done()) gap = 0; // no loads follow the last
                barrier_wait(laid + 8 * g, phase);
#pragma unroll 1
                for (int r = 0; r < WROWS; r += BOX_ROWS)
#pragma unroll 1
                    for (int c = 0; c < BN; c += BOX) {
                        const u32 src = d_tile + g * (D_BYTES / MATH) + c * WROWS * 2 + r * BOX * 2;
                        const int y = m + r;
                        if (!GROUPED || y + BOX_ROWS <= end) {
                            if (lane == 0) store_box(map_d, n + c, y, src);
                        } else {
                            // The next rows are another group's.
#pragma unroll 1
                            for (int i = lane; i < (end - y) * (BOX / 8); i += 32) {
                                const int row = i / (BOX / 8), part = i % (BOX / 8), x = n + c + part * 8;
                                const uint4 v = load_shared4(src + row * (BOX * 2) + (BN % 64 ? part : part ^ row % 8) * 16);
                                if (x < N) *(uint4*)(d + (long long)(y + row) * N + x) = v;
                            }
                        }
                        wait_until(start, gap);
                        start = clock32();
                    }
                if (lane == 0) { store_commit(); store_wait_read(); }
                __syncwarp();
                if (lane == 0) barrier_arrive(free + 8 * g);
            }
            if (lane == 0) store_wait();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(224));
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const Place at = {operand(a_ring + group * WROWS * BK), operand(b_ring),
                          s_ring + (group * WROWS + warp * 16 + lane / 4) * 4, full, empty,
                          d_tile + group * (D_BYTES / MATH), laid + 8 * group, free + 8 * group, lane, warp};
        float acc[WAVES][FRAG];
        ScaleB sb;
        if (!tile.done()) sb.start(scale_b, tile, N, kblocks);
#pragma unroll 1
        for (int phase = 1; !tile.done(); phase ^= 1) {
            const u32 scale_a = at.scale + (GROUPED ? tile.m % 4 * 4 : 0); // see S_BOX
            const Next next = {tile, scale_b, N, phase};
#define START(s) case s: accumulate<s % ALIGN ? 0 : s>(acc, ring, at, scale_a, sb, kblocks, next); break;
            switch (ALIGN == 128 ? 0 : tile.n % 128) {
                START(0)
#if BN % 128
                START(64)
#endif
#if BN % 64
                START(32) START(96)
#endif
#if BN % 32
                START(16) START(48) START(80) START(112)
#endif
            }
            if (!AHEAD) next.find(sb, kblocks); // its scales come while this tile is laid out

            // Round and lay out in shared memory for the storing warp.
            if (!EARLY) barrier_wait(at.free, phase);
#pragma unroll
            for (int w = EARLY; w < WAVES; w++) lay_out(acc[w], w, at);
            copy_fence();
            __syncwarp();
            if (lane == 0) barrier_arrive(at.laid);
        }
    }
}
