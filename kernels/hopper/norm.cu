// RMSNorm at the speed of memory: y = (x * r) * w with r = 1 / sqrt(mean of x^2 + eps), rounded to BF16; from there to E4M3.
//   x:      [rows][columns], BF16; w: [columns], FP32
//   y:      as x, or null
//   codes, scales, stride, power: as in quantise.cu; null where no E4M3 is wanted
//   backward: dx = r * (dy * w - (x * r) * mean of (dy * w) * (x * r)), rounded to BF16
//   roots:  [rows], FP32: r; forward writes it, or it is null
//   resident: CTAs that the card has at once
//   weight:   dw = the sum over rows of dy * (x * r), FP32; sums: [strips][columns], FP32, what lies between its two kernels
// Any number of rows; columns a multiple of 128. A CTA takes 4 rows (backward: 2); more CTAs do nothing. Weight: a CTA takes a
// strip of 128 rows and 256 columns, and there is one strip at least.
// Shared memory, but for weight: for each row, and backward also each row of dy, 2 * columns + PAD bytes; backward 32 bytes of each
// thread and 64 for each row as well. Backward has 64 to 256 threads, some 16 columns each: with more, too few rows are on their way.
//
// A row's sum has the order of the reference: 16 partial sums, of every sixteenth element ascending, then a binary tree.
// That is a chain of columns / 16 additions, so a row waits for it in shared memory while other CTAs' rows are read and
// written; the copy engine brings rows, so that no thread waits for them.

#include "memory.cuh"

constexpr int CHAINS = 16;                    // partial sums of a row
constexpr int PAD = 32;                       // bytes between rows, so that the chains of two rows lie in different banks
constexpr int ROWS = 4, BACK_ROWS = 2;
constexpr int FORWARD = 512;                  // threads, forward
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
template <int COUNT> __device__ __forceinline__ u32 row_to_sum(int threads) {
    constexpr int NEEDED = COUNT * CHAINS;
    return (threadIdx.x - blockIdx.x % (threads / NEEDED) * NEEDED) / CHAINS;
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
rms_norm(const u16* __restrict__ x, const float* __restrict__ w, u16* y, u8* codes, float* scales, float* roots,
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
    const u32 summed = row_to_sum<ROWS>(FORWARD);
    if (summed < ROWS) {
        // The sum of a row that is not there is made of what lies there, and not used.
        const float root = inverse_root<FORWARD_AHEAD>(in + summed * pitch, columns, eps);
        if (threadIdx.x % CHAINS == 0) {
            r[summed] = root;
            if (roots && (int)summed < count) roots[row + summed] = root;
        }
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

extern "C" __global__ void __launch_bounds__(THREADS, 4)
rms_norm_backward(const u16* __restrict__ x, const float* __restrict__ w, const u16* __restrict__ dy, u16* dx,
                  int rows, int columns, float eps, int resident) {
    extern __shared__ __align__(16) char memory[];
    __shared__ u64 arrived[2];
    __shared__ float r[BACK_ROWS], mean[BACK_ROWS];
    const u32 bar = shared_address(arrived), in = shared_address(memory), pitch = columns * 2 + PAD, in_dy = in + BACK_ROWS * pitch;
    const int step = blockDim.x * 8;          // terms of a row at a time
    float* const terms = (float*)(memory + 2 * BACK_ROWS * pitch);
    const auto terms_of = [&](int row) { return terms + row * (step + CHAINS); };
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
    const u32 summed = row_to_sum<BACK_ROWS>(blockDim.x), chain = threadIdx.x % CHAINS;
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
    for (int from = 0; from < columns; from += step) {
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
                float4* const to = (float4*)(terms_of(i) + threadIdx.x * 8);
                to[0] = {t[0], t[1], t[2], t[3]};
                to[1] = {t[4], t[5], t[6], t[7]};
            }
        weight = weights_at(from + step < columns ? column + step : threadIdx.x * 8);
        __syncthreads();
        if (summed < BACK_ROWS)
            sum = add_chain<BACK_AHEAD>(sum, min(step, columns - from) / CHAINS, [&](int c) { return terms_of(summed)[c * CHAINS + chain]; },
                            [](float v) { return v; });
    }
    if (summed < BACK_ROWS) {
        sum = tree(sum);
        if (chain == 0) mean[summed] = __fdiv_rn(sum, (float)columns);
    }
    __syncthreads();
    // The CTA that will have this one's place finds its x in L2. At 7,168 columns fetching sooner, or dy too, is slower.
    const int later = (blockIdx.x + resident) * BACK_ROWS, coming = min(BACK_ROWS, rows - later);
    if (threadIdx.x == 0 && coming > 0) prefetch_bytes(x + (size_t)later * columns, coming * columns * 2);
#pragma unroll 1
    for (int column = threadIdx.x * 8; column < columns; column += step) {
        const Weights next = weights_at(column + step);
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

// Every term is the reference's, of the r that the forward function kept; the sum has another order, which depends on the number of
// rows alone: chains of CHAIN rows ascend, then come the chains of a strip, the strips of each of RUNS runs, and the runs. A warp
// adds a chain of 256 columns, so that there are many of them and each reads its rows at once; what is read goes first from L2.
constexpr int CHAIN = 16, STRIP = WARPS * CHAIN, WIDTH = THREADS;
constexpr int AT_ONCE = 8;                    // rows that a thread has on their way
constexpr int RUNS = WARPS, FETCHED = 16;     // strips of a run that are on their way

extern "C" __global__ void __launch_bounds__(THREADS, 2)
rms_norm_weight(const u16* __restrict__ x, const u16* __restrict__ dy, const float* __restrict__ roots, float* __restrict__ sums,
                int rows, int columns) {
    __shared__ float4 chains[WARPS][WIDTH / 4];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, parts = (columns + WIDTH - 1) / WIDTH;
    const int strip = blockIdx.x / parts, left = blockIdx.x % parts * WIDTH, first = strip * STRIP + warp * CHAIN;
    const int column = min(left + lane * 8, columns - 8); // beyond the last it is added for nothing
    const u64 once = read_once();
    const float own = first + lane % CHAIN < rows ? __ldg(roots + first + lane % CHAIN) : 0;
    float sum[8] = {};
#pragma unroll 1
    for (int from = 0; from < CHAIN; from += AT_ONCE) {
        Eight a[AT_ONCE], d[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const size_t at = (size_t)(first + from + i) * columns + column;
            const bool there = first + from + i < rows;
            a[i] = load8(x + at, there, once);
            d[i] = load8(dy + at, there, once);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float root = __shfl_sync(~0u, own, from + i);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] = __fadd_rn(sum[j], __fmul_rn(d[i][j], __fmul_rn(a[i][j], root)));
        }
    }
    chains[warp][lane * 2] = {sum[0], sum[1], sum[2], sum[3]};
    chains[warp][lane * 2 + 1] = {sum[4], sum[5], sum[6], sum[7]};
    __syncthreads();
    if (left + (int)threadIdx.x >= columns) return;
    float total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total = __fadd_rn(total, ((const float*)chains[i])[threadIdx.x]);
    sums[(size_t)strip * columns + left + threadIdx.x] = total;
}

// A CTA takes 32 columns, a warp a run of strips. It is launched early, and its CTAs wait for the strips.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_weight_sum(const float* __restrict__ sums, float* __restrict__ dw, int strips, int columns) {
    __shared__ float runs[RUNS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const int run = (strips + RUNS - 1) / RUNS, end = min(strips, (warp + 1) * run);
    float sum = 0;
    wait_for_last();
    for (int from = warp * run; from < end; from += FETCHED) {
        float v[FETCHED];
#pragma unroll
        for (int i = 0; i < FETCHED; i++) v[i] = from + i < end ? __ldcg(sums + (size_t)(from + i) * columns + column) : 0;
#pragma unroll
        for (int i = 0; i < FETCHED; i++) sum = __fadd_rn(sum, v[i]); // which is never -0, so that 0 changes nothing
    }
    runs[warp][lane] = sum;
    __syncthreads();
    if (warp) return;
    sum = 0;
#pragma unroll
    for (int i = 0; i < RUNS; i++) sum = __fadd_rn(sum, runs[i][lane]);
    dw[column] = sum;
}
