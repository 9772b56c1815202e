// RMSNorm at the speed of memory: y = (x * r) * w with r = 1 / sqrt(mean of x^2 + eps), rounded to BF16; from there to E4M3.
//   x:      [rows][columns], BF16; w: [columns], FP32
//   y:      as x, or null
//   codes, scales, stride, power: as in quantise.cu; null where no E4M3 is wanted
//   backward: dx = r * (dy * w - (x * r) * mean of (dy * w) * (x * r)), rounded to BF16
//   weight:   dw = the sum over rows of dy * (x * r), FP32; sums: [strips][columns], FP32, what lies between its two kernels
// Any number of rows; columns a multiple of 128, of weight up to 8,192. A CTA takes 4 rows (backward: 2); more CTAs do
// nothing. Weight: a CTA takes a strip of `each` rows, and there is one at least.
// Shared memory: for each row, and backward also each row of dy, 2 * columns + PAD bytes; weight: as much for each row of x
// and of dy of its 2^depth stages, which are 4 to 16.
//
// A row's sum has the order of the reference: 16 partial sums, of every sixteenth element ascending, then a binary tree.
// That is a chain of columns / 16 additions, so a row waits for it in shared memory while other CTAs' rows are read and
// written; the copy engine brings rows, so that no thread waits for them.

#include "memory.cuh"

constexpr int CHAINS = 16;                    // partial sums of a row
constexpr int PAD = 32;                       // bytes between rows, so that the chains of two rows lie in different banks
constexpr int ROWS = 4, BACK_ROWS = 2;
constexpr int FORWARD = 512;                  // threads, forward
constexpr int TERMS = THREADS * 8;            // of a row at a time, backward
constexpr int FORWARD_AHEAD = 8, BACK_AHEAD = 16; // elements of a chain that are fetched before they are added

__device__ __forceinline__ u32 load_half(u32 address) {
    u16 v; asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address)); return v;
}
__device__ __forceinline__ Eight load_eight(u32 address) { return eight(load_shared4(address)); }

// Adds `term` of n elements of a chain to its partial sum. `fetch` is given an element's number and comes early.
template <int AHEAD, class Fetch, class Term> __device__ __forceinline__ float add_chain(float sum, int n, Fetch fetch, Term term) {
    typedef decltype(fetch(0)) Item;
    Item even[AHEAD], odd[AHEAD];
    const int whole = n / AHEAD * AHEAD;
    const auto get = [&](Item (&to)[AHEAD], int c) {
        if (c < whole)
#pragma unroll
            for (int i = 0; i < AHEAD; i++) to[i] = fetch(c + i);
    };
    const auto add = [&](Item (&of)[AHEAD], int c) {
        if (c < whole)
#pragma unroll
            for (int i = 0; i < AHEAD; i++) sum = __fadd_rn(sum, term(of[i]));
    };
    get(even, 0);
#pragma unroll 1
    for (int c = 0; c < whole; c += 2 * AHEAD) {
        get(odd, c + AHEAD);
        add(even, c);
        get(even, c + 2 * AHEAD);
        add(odd, c + AHEAD);
    }
#pragma unroll 1
    for (int c = whole; c < n; c++) sum = __fadd_rn(sum, term(fetch(c)));
    return sum;
}
// The reference's tree over a row's partial sums, in the first of its 16 lanes.
__device__ __forceinline__ float tree(float sum) {
#pragma unroll
    for (int d = CHAINS / 2; d; d /= 2) sum = __fadd_rn(sum, __shfl_down_sync(~0u, sum, d, CHAINS));
    return sum;
}
// r of the row at this address, in the first of its 16 lanes.
template <int AHEAD> __device__ __forceinline__ float inverse_root(u32 row, int columns, float eps) {
    const u32 from = row + threadIdx.x % CHAINS * 2;
    const float squares = tree(add_chain<AHEAD>(0, columns / CHAINS, [&](int c) { return load_half(from + c * (CHAINS * 2)); },
                                         [](u32 v) { return __fmul_rn(first_of(v), first_of(v)); }));
    return __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)columns), eps)));
}
// Which of COUNT rows this thread helps to sum, if any. An SM's CTAs do not all use the same of its four schedulers.
template <int THREADS, int COUNT> __device__ __forceinline__ u32 row_to_sum() {
    constexpr int NEEDED = COUNT * CHAINS;
    return (threadIdx.x - blockIdx.x % (THREADS / NEEDED) * NEEDED) / CHAINS;
}

struct Weights {
    float at[8];
    __device__ __forceinline__ Weights(const float* w) {
        const float4 a = __ldg((const float4*)w), b = __ldg((const float4*)w + 1);
        at[0] = a.x; at[1] = a.y; at[2] = a.z; at[3] = a.w; at[4] = b.x; at[5] = b.y; at[6] = b.z; at[7] = b.w;
    }
};

// Barriers for what the copy engine brings to this CTA.
__device__ __forceinline__ void ready(u32 bar, int count) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < count; i++) barrier_init(bar + 8 * i, 1);
        barriers_visible();
    }
    __syncthreads();
}

// Rows to shared memory, `columns * 2 + PAD` bytes apart.
__device__ __forceinline__ void bring(u32 to, const u16* from, int row, int count, int columns, u32 bar) {
    barrier_expect(bar, count * columns * 2);
#pragma unroll 1
    for (int i = 0; i < count; i++) load_bytes(to + i * (columns * 2 + PAD), from + (size_t)(row + i) * columns, columns * 2, bar);
}

extern "C" __global__ void __launch_bounds__(FORWARD)
rms_norm(const u16* __restrict__ x, const float* __restrict__ w, u16* y, u8* codes, float* scales,
         int rows, int columns, int stride, int power, float eps) {
    extern __shared__ __align__(16) char memory[];
    __shared__ u64 arrived;
    __shared__ float r[ROWS];
    const u32 bar = shared_address(&arrived), in = shared_address(memory), pitch = columns * 2 + PAD;
    const int row = blockIdx.x * ROWS, count = min(ROWS, rows - row), tiles = columns / TILE, lane = threadIdx.x % LANES;
    if (count <= 0) return;
    ready(bar, 1);
    if (threadIdx.x == 0) bring(in, x, row, count, columns, bar);
    barrier_wait(bar, 0);
    const u32 summed = row_to_sum<FORWARD, ROWS>();
    if (summed < ROWS) {
        // The sum of a row that is not there is made of what lies there, and not used.
        const float root = inverse_root<FORWARD_AHEAD>(in + summed * pitch, columns, eps);
        if (threadIdx.x % CHAINS == 0) r[summed] = root;
    }
    __syncthreads();
    float root[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) root[i] = r[i];
    // The last tile of an odd number is made by two half-warps, with the same bits.
#pragma unroll 1
    for (int pair = threadIdx.x / 32 * 2; pair < tiles; pair += FORWARD / 32 * 2) {
        const int tile = min(pair + (int)threadIdx.x / LANES % 2, tiles - 1), column = tile * TILE + lane * 8;
        const size_t at = (size_t)row * columns + column;
        const Weights weight(w + column);
        Eight v[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) v[i] = i < count ? load_eight(in + i * pitch + column * 2) : Eight{};
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            v[i] = make8([&](int j) { return __fmul_rn(__fmul_rn(v[i][j], root[i]), weight.at[j]); });
            if (y && i < count) store8(y + at + (size_t)i * columns, v[i]);
        }
        if (codes) {
            uint2 code[ROWS];
            const float scale = quantise(code, v, power);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                if (i < count) *(uint2*)(codes + at + (size_t)i * columns) = code[i];
            if (lane % (LANES / ROWS) == 0) scales[(size_t)tile * stride + row + lane / (LANES / ROWS)] = scale;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_backward(const u16* __restrict__ x, const float* __restrict__ w, const u16* __restrict__ dy, u16* dx,
                  int rows, int columns, float eps) {
    extern __shared__ __align__(16) char memory[];
    __shared__ u64 arrived[2];
    __shared__ float r[BACK_ROWS], mean[BACK_ROWS];
    __shared__ __align__(16) float terms[BACK_ROWS][TERMS + CHAINS];
    const u32 bar = shared_address(arrived), in = shared_address(memory), pitch = columns * 2 + PAD, in_dy = in + BACK_ROWS * pitch;
    const int row = blockIdx.x * BACK_ROWS, count = min(BACK_ROWS, rows - row);
    if (count <= 0) return;
    ready(bar, 2);
    if (threadIdx.x == 0) {
        // The first sum waits for x only.
        bring(in, x, row, count, columns, bar);
        bring(in_dy, dy, row, count, columns, bar + 8);
    }
    // Weights come a step before they are needed.
    const auto weights_at = [&](int column) { return Weights(w + min(column, columns - 8)); };
    Weights weight = weights_at(threadIdx.x * 8);
    const u32 summed = row_to_sum<THREADS, BACK_ROWS>(), chain = threadIdx.x % CHAINS;
    barrier_wait(bar, 0);
    if (summed < BACK_ROWS) {
        const float root = inverse_root<BACK_AHEAD>(in + summed * pitch, columns, eps);
        if (chain == 0) r[summed] = root;
    }
    barrier_wait(bar + 8, 0);
    __syncthreads();
    // All threads make the second sum's terms, a part of the columns at a time, so that its chain is additions only.
    float sum = 0;
#pragma unroll 1
    for (int from = 0; from < columns; from += TERMS) {
        const int column = from + threadIdx.x * 8;
        if (from) __syncthreads();
        if (column < columns)
#pragma unroll
            for (int i = 0; i < BACK_ROWS; i++) {
                const Eight a = load_eight(in + i * pitch + column * 2), d = load_eight(in_dy + i * pitch + column * 2);
                const float root = r[i];
                float t[8];
#pragma unroll
                for (int j = 0; j < 8; j++) t[j] = __fmul_rn(__fmul_rn(d[j], weight.at[j]), __fmul_rn(a[j], root));
                float4* const to = (float4*)&terms[i][threadIdx.x * 8];
                to[0] = {t[0], t[1], t[2], t[3]};
                to[1] = {t[4], t[5], t[6], t[7]};
            }
        weight = weights_at(from + TERMS < columns ? column + TERMS : threadIdx.x * 8);
        __syncthreads();
        if (summed < BACK_ROWS)
            sum = add_chain<BACK_AHEAD>(sum, min(TERMS, columns - from) / CHAINS, [&](int c) { return terms[summed][c * CHAINS + chain]; },
                            [](float v) { return v; });
    }
    if (summed < BACK_ROWS) {
        sum = tree(sum);
        if (chain == 0) mean[summed] = __fdiv_rn(sum, (float)columns);
    }
    __syncthreads();
#pragma unroll 1
    for (int column = threadIdx.x * 8; column < columns; column += THREADS * 8) {
        const Weights next = weights_at(column + THREADS * 8);
#pragma unroll
        for (int i = 0; i < BACK_ROWS; i++) {
            const Eight a = load_eight(in + i * pitch + column * 2), d = load_eight(in_dy + i * pitch + column * 2);
            const float root = r[i], m = mean[i];
            const Eight v = make8([&](int j) {
                return __fmul_rn(root, __fsub_rn(__fmul_rn(d[j], weight.at[j]), __fmul_rn(__fmul_rn(a[j], root), m)));
            });
            if (i < count) store8(dx + (size_t)(row + i) * columns + column, v);
        }
        weight = next;
    }
}

// ---- the gradient of the weights --------------------------------------------------------------------------------

// Every term and every r is the reference's; the sum has another order, which depends on the number of rows alone: within a
// strip the rows ascend, then come the strips of each of RUNS runs, then the runs. Each warp does one thing, so that rows come
// and the chains of the next rows are added while the terms of this one are made.
constexpr int RUNS = WARPS;
constexpr int ROOT_WARPS = 2, ROOTS = 2;      // warps that sum squares, and rows of each at a time
constexpr int WEIGHT = THREADS + (ROOT_WARPS + 1) * 32; // threads: those that add, those that sum squares, and a warp that loads
constexpr int CHUNKS = 4;                     // of 8 columns, of a thread that adds
constexpr int MOST_STAGES = 16;

extern "C" __global__ void __launch_bounds__(WEIGHT, 2)
rms_norm_weight(const u16* __restrict__ x, const u16* __restrict__ dy, float* __restrict__ sums,
                int rows, int columns, int each, int depth, float eps) {
    extern __shared__ __align__(16) char memory[];
    __shared__ u64 barriers[3][MOST_STAGES];
    __shared__ float r[MOST_STAGES];
    const u32 full = shared_address(barriers[0]), rooted = shared_address(barriers[1]), empty = shared_address(barriers[2]);
    const int stages = 1 << depth, pitch = columns * 2 + PAD, warp = threadIdx.x / 32;
    const int first = blockIdx.x * each, count = min(each, rows - first);
    // A row's stage, whether that was used an odd number of times before, and where it lies.
    const auto stage = [&](int i) { return (u32)(i & (stages - 1)); };
    const auto phase = [&](int i) { return (u32)(i >> depth & 1); };
    const auto at = [&](int i) { return shared_address(memory) + stage(i) * 2 * pitch; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(rooted + 8 * i, 1);
            barrier_init(empty + 8 * i, THREADS);
        }
        barriers_visible();
    }
    __syncthreads();
    if (warp == WARPS + ROOT_WARPS) {
        if (threadIdx.x % 32) return;
        const u64 once = read_once();
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            const size_t from = (size_t)(first + i) * columns;
            const u32 bar = full + 8 * stage(i);
            barrier_wait(empty + 8 * stage(i), phase(i) ^ 1);
            barrier_expect(bar, columns * 4);
            load_bytes(at(i), x + from, columns * 2, bar, once);
            load_bytes(at(i) + pitch, dy + from, columns * 2, bar, once);
        }
        return;
    }
    if (warp >= WARPS) {
#pragma unroll 1
        for (int i = (warp - WARPS) * ROOTS; i < count; i += ROOT_WARPS * ROOTS) {
            // Both halves wait for both rows, so that they stay together. The last row of an odd number is summed by both.
            const int last = min(i + 1, count - 1), mine = threadIdx.x / CHAINS % ROOTS ? last : i;
            barrier_wait(full + 8 * stage(i), phase(i));
            barrier_wait(full + 8 * stage(last), phase(last));
            const float root = inverse_root<BACK_AHEAD>(at(mine), columns, eps);
            if (threadIdx.x % CHAINS == 0 && mine == i + (int)(threadIdx.x / CHAINS % ROOTS)) {
                r[stage(mine)] = root;
                barrier_arrive(rooted + 8 * stage(mine));
            }
        }
        return;
    }
    float sum[CHUNKS][8] = {};
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        const u32 of_x = at(i) + threadIdx.x * 16;
        barrier_wait(full + 8 * stage(i), phase(i));
        barrier_wait(rooted + 8 * stage(i), phase(i));
        const float root = r[stage(i)];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if ((c * THREADS + threadIdx.x) * 8 < columns) {
                const Eight a = load_eight(of_x + c * (THREADS * 16)), d = load_eight(of_x + pitch + c * (THREADS * 16));
#pragma unroll
                for (int j = 0; j < 8; j++) sum[c][j] = __fadd_rn(sum[c][j], __fmul_rn(d[j], __fmul_rn(a[j], root)));
            }
        // Each lane gives the stage back for its own reads. One for all, after __syncwarp, is a race to racecheck.
        barrier_arrive(empty + 8 * stage(i));
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        if ((c * THREADS + threadIdx.x) * 8 < columns) {
            float4* const to = (float4*)(sums + (size_t)blockIdx.x * columns + (c * THREADS + threadIdx.x) * 8);
            to[0] = {sum[c][0], sum[c][1], sum[c][2], sum[c][3]};
            to[1] = {sum[c][4], sum[c][5], sum[c][6], sum[c][7]};
        }
}

// A launch of its own: strips that the last CTAs of the first launch added took two to four times as long
// (docs/measurements/hopper-memory.md).
// A CTA takes 32 columns, a warp a run of strips: one chain over all strips would wait for memory longer than the rows do.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_weight_sum(const float* __restrict__ sums, float* __restrict__ dw, int strips, int columns) {
    __shared__ float runs[RUNS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const int run = (strips + RUNS - 1) / RUNS, end = min(strips, (warp + 1) * run);
    float sum = 0;
#pragma unroll 32
    for (int i = warp * run; i < end; i++) sum = __fadd_rn(sum, __ldg(sums + (size_t)i * columns + column));
    runs[warp][lane] = sum;
    __syncthreads();
    if (warp) return;
    sum = 0;
#pragma unroll
    for (int i = 0; i < RUNS; i++) sum = __fadd_rn(sum, runs[i][lane]);
    dw[column] = sum;
}
