// The gate's products in FP32, with the bits of the CPU (src/gemm.rs): logits_TE = x_TI w_EI^T, and their gradients
// dx_TI = dlogits_TE w_EI and dw_EI = dlogits_TE^T x_TI.
//   x, dx:  [T][I], BF16 or FP32; dx in BF16 is rounded once; w, dw: [E][I]; logits, dlogits: [T][E], FP32
//   sums:   [1 + blocks - head][elements of the result], FP32: where parts of a product meet; not used where there is one part
//   m, n, k: the result's rows and columns, and the terms of its sums; dw is made as its transposed, so there m is I and n is E
//   head, each: blocks of the first part of a tile, one at least, and of its other parts; head >= blocks: one part
// T is any number; E and I are multiples of 8. One CTA for each tile of BM x BN of each part, first parts first. Shared memory:
// two stages, and the sums of whole blocks of a tile.
//
// The order of a sum is the CPU's: terms in blocks of 256, each a chain of fused multiply-adds from zero, k ascending; blocks
// are added in ascending order. So a tensor core has no place here, and no chain is cut; but blocks are apart until they are
// added. The first part of a tile adds its blocks itself. Where tiles alone would not fill the card, or not evenly, the blocks
// that follow are made by other CTAs, and sum_blocks adds them in their order: how they are shared shows in no bit, nor do the
// other rows.

#include "memory.cuh"

constexpr int BM = 128, BN = 64, BK = 16;     // a tile, and the terms that are in shared memory at once
constexpr int BLOCK = 256;                    // terms of a chain
constexpr int GATE = 128;                     // threads: 2 x 2 warps of 8 x 4 threads, which have 8 x 8 elements each
constexpr int STAGE = BK * (BM + BN);         // floats

template <class T> constexpr int PIECE = 16 / sizeof(T); // elements that are loaded at once
__device__ __forceinline__ float value(const uint4& v, int i, u16) { return eight(v)[i]; }
__device__ __forceinline__ float value(const uint4& v, int i, float) {
    return __uint_as_float(i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w);
}

// WIDE rows of an operand, K along them: threads that follow each other read the PARTS pieces of a row, then the next row, and
// turn them. The parts of a row lie in other places of their lines, so that a warp stores to all banks.
template <class T, int WIDE> struct Along {
    static constexpr int PARTS = BK / PIECE<T>, STEP = GATE / PARTS, COUNT = WIDE / STEP, ROWS = 32 / PARTS;
    // What the place of a row is exclusive-or'ed with at term k: ROWS is a multiple of 4, so four rows stay together.
    static __device__ __forceinline__ int swizzle(int k) { return ROWS * (k / PIECE<T>); }
    const T* data;
    int rows, terms;
    uint4 held[COUNT];
    __device__ __forceinline__ void load(int row, int from) {
        const int mine = row + threadIdx.x / PARTS, k = from + threadIdx.x % PARTS * PIECE<T>;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            held[i] = mine + i * STEP < rows && k < terms ? __ldg((const uint4*)(data + (size_t)(mine + i * STEP) * terms + k))
                                                          : uint4{0, 0, 0, 0};
    }
    __device__ __forceinline__ void put(float* to) const {
        const int k = threadIdx.x % PARTS * PIECE<T>;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float* const at = to + k * WIDE + ((threadIdx.x / PARTS + i * STEP) ^ swizzle(k));
#pragma unroll
            for (int j = 0; j < PIECE<T>; j++) at[j * WIDE] = value(held[i], j, T());
        }
    }
};
// The same of columns: rows of the matrix are terms. A thread has the same columns of each term that it takes.
template <class T, int WIDE> struct Across {
    static constexpr int COUNT = BK * WIDE / GATE / PIECE<T>, LINE = WIDE / PIECE<T>;
    static __device__ __forceinline__ int swizzle(int) { return 0; }
    const T* data;
    int rows, terms;
    uint4 held[COUNT];
    __device__ __forceinline__ void load(int row, int from) {
        const int mine = row + threadIdx.x % LINE * PIECE<T>, k = from + threadIdx.x / LINE, left = mine < rows ? terms - k : 0;
        const T* const at = data + (size_t)k * rows + mine;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            held[i] = i * (GATE / LINE) < left ? __ldg((const uint4*)(at + (size_t)i * (GATE / LINE) * rows)) : uint4{0, 0, 0, 0};
    }
    __device__ __forceinline__ void put(float* to) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float4* const at = (float4*)(to + (threadIdx.x + i * GATE) * PIECE<T>);
#pragma unroll
            for (int j = 0; j < PIECE<T>; j += 4)
                at[j / 4] = {value(held[i], j, T()), value(held[i], j + 1, T()), value(held[i], j + 2, T()), value(held[i], j + 3, T())};
        }
    }
};

// Where a thread's elements lie in a tile: four rows and four columns that follow each other, and the same 32 rows and 16
// columns on.
struct Place {
    int row, column;
    __device__ __forceinline__ Place()
        : row(threadIdx.x / 64 * 64 + threadIdx.x % 32 / 4 * 4), column(threadIdx.x / 32 % 2 * 32 + threadIdx.x % 4 * 4) {}
};
typedef float Sums[8][8];

// What a thread needs of one term.
struct Fragment { float x[8], y[8]; };
__device__ __forceinline__ void put_four(float* to, const float* from) {
    const float4 v = *(const float4*)from;
    to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}
template <class A, class B> __device__ __forceinline__ void fetch(Fragment& f, const float* stage, const Place& place, int k) {
    const float *const a = stage + k * BM, *const b = stage + BK * BM + k * BN;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        put_four(f.x + half * 4, a + ((place.row + half * 32) ^ A::swizzle(k)));
        put_four(f.y + half * 4, b + ((place.column + half * 16) ^ B::swizzle(k)));
    }
}
// Along one row there, along the next back, so that two additions that follow each other share an operand.
__device__ __forceinline__ void add_term(Sums& sum, const Fragment& f) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int c = i % 2 ? 7 - j : j;
            sum[i][c] = __fmaf_rn(f.x[i], f.y[c], sum[i][c]);
        }
}

// Four elements that follow each other.
__device__ __forceinline__ void store(float* to, float4 v) { *(float4*)to = v; }
__device__ __forceinline__ void store(u16* to, float4 v) { *(uint2*)to = {pack(v.x, v.y), pack(v.z, v.w)}; }

// A tile to its place in the result, or in its transposed.
template <bool TURNED, class T> __device__ __forceinline__ void store_tile(T* y, const Sums& sum, int m, int n, int row, int column) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int h = half * 4;
            if (TURNED) {
                const int c = column + i / 4 * 16 + i % 4, r = row + half * 32;
                if (c < n && r < m) store(y + (size_t)c * m + r, {sum[h][i], sum[h + 1][i], sum[h + 2][i], sum[h + 3][i]});
            } else {
                const int r = row + i / 4 * 32 + i % 4, c = column + half * 16;
                if (r < m && c < n) store(y + (size_t)r * n + c, {sum[i][h], sum[i][h + 1], sum[i][h + 2], sum[i][h + 3]});
            }
        }
}

template <bool TURNED, class A, class B, class Y> __device__ __forceinline__
void product(A a, B b, Y* y, float* sums, int m, int n, int k, int head, int each) {
    extern __shared__ __align__(16) float memory[];
    float4* const whole = (float4*)(memory + 2 * STAGE) + threadIdx.x;
    const int columns = (n + BN - 1) / BN, tiles = (m + BM - 1) / BM * columns, blocks = (k + BLOCK - 1) / BLOCK;
    // Tiles of the same rows follow each other, so that L2 has their rows.
    const int tile = blockIdx.x % tiles, part = blockIdx.x / tiles, row = tile / columns * BM, column = tile % columns * BN;
    const int first = part ? head + (part - 1) * each : 0, begin = first * BLOCK, end = min(k, (part ? first + each : head) * BLOCK);
    const Place place;
    Sums sum = {};
    Fragment f[2];
    float* stage = memory;
    if (begin < end) {
        a.load(row, begin);
        b.load(column, begin);
        a.put(stage);
        b.put(stage + BK * BM);
        __syncthreads();
        fetch<A, B>(f[0], stage, place, 0);
    }
#pragma unroll 1
    for (int from = begin; from < end; from += BK) {
        const bool more = from + BK < end;
        if (more) {
            a.load(row, from + BK);
            b.load(column, from + BK);
        }
        float* const next = memory + (stage == memory ? STAGE : 0);
        if (from + BK <= k) {
            // A term is fetched while the one before it is added, the first of the next stage too.
#pragma unroll
            for (int i = 0; i < BK; i++) {
                if (i == BK - 1) {
                    if (more) {
                        a.put(next);
                        b.put(next + BK * BM);
                    }
                    __syncthreads();
                    if (more) fetch<A, B>(f[0], next, place, 0);
                } else {
                    fetch<A, B>(f[(i + 1) % 2], stage, place, i + 1);
                }
                add_term(sum, f[i % 2]);
            }
        } else {
            // The last terms of all, which are fewer.
#pragma unroll 1
            for (int i = 0; i < k - from; i++) {
                fetch<A, B>(f[0], stage, place, i);
                add_term(sum, f[0]);
            }
        }
        stage = next;
        if ((from + BK) % BLOCK == 0 || !more) {
            // A block is whole.
            if (part == 0) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    float* const those = &sum[i / 2][i % 2 * 4];
                    if (from >= BLOCK) {
                        const float4 before = whole[i * GATE];
                        those[0] = __fadd_rn(before.x, those[0]); those[1] = __fadd_rn(before.y, those[1]);
                        those[2] = __fadd_rn(before.z, those[2]); those[3] = __fadd_rn(before.w, those[3]);
                    }
                    if (more) whole[i * GATE] = {those[0], those[1], those[2], those[3]};
                }
            } else {
                float* const to = sums + (size_t)(1 + from / BLOCK - head) * m * n;
                store_tile<TURNED>(to, sum, m, n, row + place.row, column + place.column);
            }
            if (more)
#pragma unroll
                for (int i = 0; i < 64; i++) sum[i / 8][i % 8] = 0;
        }
    }
    if (part) return;
    if (head >= blocks) store_tile<TURNED>(y, sum, m, n, row + place.row, column + place.column);
    else store_tile<TURNED>(sums, sum, m, n, row + place.row, column + place.column);
}

// CTAs on a multiprocessor: with three, which have fewer registers, gradients of the input were 7% to 11% faster than with two,
// and those of the weight of 256 experts 10% and 14% slower; logits were as fast (docs/measurements/hopper-fp8.md).
#define KERNEL(name, ctas, turned, A, X, B, Y) extern "C" __global__ void __launch_bounds__(GATE, ctas) \
name(const X* __restrict__ a, const float* __restrict__ b, Y* __restrict__ y, float* __restrict__ sums, \
     int m, int n, int k, int head, int each) { \
    product<turned>(A<X, BM>{a, m, k}, B<float, BN>{b, n, k}, y, sums, m, n, k, head, each); \
}
KERNEL(logits_bf16, 2, false, Along, u16, Along, float)
KERNEL(logits_f32, 2, false, Along, float, Along, float)
KERNEL(input_bf16, 3, false, Along, float, Across, u16)
KERNEL(input_f32, 3, false, Along, float, Across, float)
KERNEL(weight_bf16, 2, true, Across, u16, Across, float)
KERNEL(weight_f32, 2, true, Across, float, Across, float)

// Adds the sums of each element in ascending order. `count` elements, a multiple of 4; a thread has four.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_blocks(const float4* __restrict__ sums, float4* __restrict__ y, u32 count, int blocks) {
    const u32 at = blockIdx.x * THREADS + threadIdx.x, stride = count / 4;
    if (at >= stride) return;
    float4 sum = __ldg(sums + at);
#pragma unroll 8
    for (int i = 1; i < blocks; i++) {
        const float4 v = __ldg(sums + (size_t)i * stride + at);
        sum = {__fadd_rn(sum.x, v.x), __fadd_rn(sum.y, v.y), __fadd_rn(sum.z, v.z), __fadd_rn(sum.w, v.w)};
    }
    y[at] = sum;
}
