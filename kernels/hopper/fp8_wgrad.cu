// Weight gradient in block-scaled FP8 for Hopper: D[g][M,N] += A[M, tokens of g] * B[N, tokens of g]^T, D in FP32.
//   A, B:    E4M3, row-major along the tokens. A group's tokens fill whole blocks of 128 (the rest zeros).
//   scales:  FP32, one per row and block, stored [blocks][M] and [blocks][N], rows padded to a multiple of 4.
//   offsets: groups + 1 block numbers on the device; blocks offsets[g] .. offsets[g+1] are group g's, any number of them.
// M any, N a multiple of 4. An element of D gets exactly one addition, made by the copy engine, so bits do not depend on
// any order.
//
// Chosen by -D: MATH (math warpgroups, of 64 rows of the tile each), BN (its columns), STAGES, BAND.
// The roles of the warps are those of fp8_gemm.cu, but that one warp stores for all: here a warp for each is slower.

#include "hopper.cuh"

constexpr int BK = 128;
constexpr int WROWS = 64, BM = MATH * WROWS, FRAG = BN / 2;
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK, SA_BYTES = BM * 4, SB_BYTES = BN * 4;
constexpr int D_BYTES = BM * BN * 4;
constexpr int BOX = 32;                       // columns of a store: 128 swizzled bytes
constexpr int BOXES = MATH * (BN / BOX);
constexpr int PACE = BM * BN / 47;             // of a block of K; about 0.7 of its products' cycles
constexpr int SHORT = 20;                     // blocks

struct Walk : Tiles<BAND> {
    const int* offsets;
    int group, groups, m, n, first, last; // first .. last: the group's blocks of K
    __device__ __forceinline__ Walk(const int* offsets, int groups, int M, int N) : offsets(offsets), group(-1), groups(groups) {
        rows = (M + BM - 1) / BM;
        cols = (N + BN - 1) / BN;
        stride = gridDim.x;
        tile = blockIdx.x;
        enter();
        locate();
    }
    // The next group that has tokens; the others' gradient is nothing.
    __device__ __forceinline__ void enter() {
        band = 0;
        do {
            if (++group >= groups) return;
            first = __ldg(offsets + group);
            last = __ldg(offsets + group + 1);
        } while (first == last);
    }
    __device__ __forceinline__ void locate() {
        while (!done() && !find()) enter();
        m = row * BM;
        n = col * BN;
    }
    __device__ __forceinline__ bool done() const { return group >= groups; }
    __device__ __forceinline__ void next() { tile += stride; locate(); }
};

struct Place { u32 a, b, sa, sb, full, empty, out, laid, free; int lane; };

// 64 rows to shared memory, for the storing warp.
__device__ __forceinline__ void lay_out(const float (&acc)[FRAG], const Place& at, int phase) {
    barrier_wait(at.free, phase);
    const int swizzled = at.lane % 4 / 2 ^ at.lane / 4;
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
        for (int h = 0; h < 2; h++)
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};"
                         :: "r"(at.out + j / 4 * (64 * 128) + h * (8 * 128) + ((swizzled ^ j % 4 * 2) << 4)),
                            "f"(acc[4 * j + 2 * h]), "f"(acc[4 * j + 2 * h + 1]) : "memory");
    copy_fence();
    __syncwarp();
    if (at.lane == 0) barrier_arrive(at.laid);
}

// One block of K.
__device__ __forceinline__ void block(float (&acc)[FRAG], float (&part)[FRAG], Ring<STAGES>& ring, const Place& at) {
    barrier_wait(at.full + 8 * ring.stage, ring.phase);
    multiply(part, at.a + ring.stage * (A_BYTES / 16), at.b + ring.stage * (B_BYTES / 16));
    const float sa[2] = {load_shared(at.sa + ring.stage * SA_BYTES), load_shared(at.sa + ring.stage * SA_BYTES + 32)};
    multiply_wait();
    // Products of scales are not made earlier: beside this warpgroup's own products they slow those down.
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        const float2 sb = load_shared2(at.sb + ring.stage * SB_BYTES + j * 32);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            acc[4 * j + 2 * h] += part[4 * j + 2 * h] * (sa[h] * sb.x);
            acc[4 * j + 2 * h + 1] += part[4 * j + 2 * h + 1] * (sa[h] * sb.y);
        }
    }
    if (at.lane == 0) barrier_arrive(at.empty + 8 * ring.stage);
    ring.next();
}

extern "C" __global__ void __launch_bounds__(128 * (MATH + 1), 1)
fp8_wgrad(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
          const __grid_constant__ TensorMap map_d, const __grid_constant__ TensorMap map_sa, const __grid_constant__ TensorMap map_sb,
          const int* __restrict__ offsets, int groups, int M, int N) {
    extern __shared__ __align__(1024) char memory[];
    const u32 a_ring = shared_address(memory), b_ring = a_ring + STAGES * A_BYTES;
    const u32 d_tile = b_ring + STAGES * B_BYTES, sa_ring = d_tile + D_BYTES, sb_ring = sa_ring + STAGES * SA_BYTES;
    const u32 full = sb_ring + STAGES * SB_BYTES, empty = full + 8 * STAGES;
    const u32 laid = empty + 8 * STAGES, free = laid + 8 * MATH;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);

    if (threadIdx.x == 0) {
        prefetch_map(map_a); prefetch_map(map_b); prefetch_map(map_sa); prefetch_map(map_sb); prefetch_map(map_d);
        init_barriers<STAGES, MATH>(full, empty, laid, free);
    }
    __syncthreads();

    Ring<STAGES> ring;
    Walk tile(offsets, groups, M, N);
    if (group == MATH) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(MATH == 2 ? 40 : 32));
        if (threadIdx.x == 128 * MATH) {
#pragma unroll 1
            for (; !tile.done(); tile.next()) {
#pragma unroll 1
                for (int kb = tile.first; kb < tile.last; kb++, ring.next()) {
                    const u32 bar = full + 8 * ring.stage;
                    barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
                    barrier_expect(bar, A_BYTES + B_BYTES + SA_BYTES + SB_BYTES);
                    load_box(a_ring + ring.stage * A_BYTES, map_a, kb * BK, tile.m, bar);
                    load_box(b_ring + ring.stage * B_BYTES, map_b, kb * BK, tile.n, bar);
                    load_box(sa_ring + ring.stage * SA_BYTES, map_sa, tile.m, kb, bar);
                    load_box(sb_ring + ring.stage * SB_BYTES, map_sb, tile.n, kb, bar);
                }
            }
        } else if (threadIdx.x == 128 * MATH + 32) {
            // The store of a tile is spread over the next tile's time.
            u32 start = clock32();
#pragma unroll 1
            for (int phase = 0; !tile.done(); phase ^= 1) {
                const int m = tile.m, n = tile.n, z = tile.group;
                // The additions wait for what is in memory. Where little time is left for them, fetch it into L2 beforehand.
                if (tile.last - tile.first <= SHORT)
#pragma unroll 1
                    for (int i = 0; i < BOXES; i++)
                        prefetch_box(map_d, n + i % (BN / BOX) * BOX, m + i / (BN / BOX) * WROWS, z);
                tile.next();
                const u32 gap = tile.done() ? 0 : (tile.last - tile.first) * PACE / BOXES;
#pragma unroll 1
                for (int g = 0; g < MATH; g++) {
                    barrier_wait(laid + 8 * g, phase);
#pragma unroll 1
                    for (int c = 0; c < BN; c += BOX) {
                        add_box(map_d, n + c, m + g * WROWS, z, d_tile + g * (D_BYTES / MATH) + c * WROWS * 4);
                        wait_until(start, gap);
                        start = clock32();
                    }
                    store_commit();
                    store_wait_read();
                    barrier_arrive(free + 8 * g);
                }
            }
            store_wait();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(MATH == 2 ? 232 : 160));
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, r = warp * 16 + lane / 4;
        const Place at = {operand(a_ring + group * WROWS * BK), operand(b_ring), sa_ring + (group * WROWS + r) * 4,
                          sb_ring + lane % 4 * 8, full, empty, d_tile + group * (D_BYTES / MATH) + r * 128 + lane % 2 * 8, laid + 8 * group, free + 8 * group, lane};
        float acc[FRAG], part[FRAG];
#pragma unroll 1
        for (int phase = 1; !tile.done(); phase ^= 1) {
#pragma unroll
            for (int i = 0; i < FRAG; i++) acc[i] = 0;
#pragma unroll 1
            for (int kb = tile.first; kb < tile.last - 1; kb++) block(acc, part, ring, at);
            block(acc, part, ring, at); // by itself: else ptxas puts accumulators and products into the same banks
            tile.next();
            lay_out(acc, at, phase);
        }
    }
}
