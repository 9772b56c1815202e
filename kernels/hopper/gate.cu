// The gate's products in FP32, with the bits of the CPU (src/gemm.rs): logits_TE = x_TI w_EI^T, and their gradients
// dx_TI = dlogits_TE w_EI and dw_EI = dlogits_TE^T x_TI.
//   x, dx:  [T][I], BF16 or FP32; dx in BF16 is rounded once; w, dw: [E][I]; logits, dlogits: [T][E], FP32
//   sums:   [blocks of K][elements of the result], FP32: where parts of a product meet; not used where there is one part
//   m, n, k: the result's rows and columns, and the terms of its sums; dw is made as its transposed, so there m is I and n is E
//   each:   blocks of a part
// T is any number; E and I are multiples of 8. One CTA for each tile of BM x BN of each part. Shared memory: two stages, and the
// sums of whole blocks of a tile.
//
// The order of a sum is the CPU's: terms in blocks of 256, each a chain of fused multiply-adds from zero, k ascending; blocks
// are added in ascending order. So a tensor core has no place here, and no chain is cut; but blocks are apart until they are
// added. Where there are fewer tiles than the card has room for, blocks are made by several CTAs, and sum_blocks adds them in
// their order: how many CTAs there are shows in no bit, nor do the other rows.

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

// WIDE rows of an operand, K along them: a thread takes a part of a row and turns it.
template <class T, int WIDE> struct Along {
    static constexpr int EACH = BK * WIDE / GATE, COUNT = EACH / PIECE<T>;
    const T* data;
    int rows, terms;
    uint4 held[COUNT];
    __device__ __forceinline__ void load(int row, int from) {
        const int mine = row + threadIdx.x % WIDE, k = from + threadIdx.x / WIDE * EACH;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            held[i] = mine < rows && k + i * PIECE<T> < terms ? __ldg((const uint4*)(data + (size_t)mine * terms + k + i * PIECE<T>))
                                                              : uint4{0, 0, 0, 0};
    }
    __device__ __forceinline__ void put(float* to) const {
        to += threadIdx.x / WIDE * EACH * WIDE + threadIdx.x % WIDE;
#pragma unroll
        for (int i = 0; i < EACH; i++) to[i * WIDE] = value(held[i / PIECE<T>], i % PIECE<T>, T());
    }
};
// The same of columns: rows of the matrix are terms. A thread has the same columns of each term that it takes.
template <class T, int WIDE> struct Across {
    static constexpr int COUNT = BK * WIDE / GATE / PIECE<T>, LINE = WIDE / PIECE<T>;
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

__device__ __forceinline__ void add_term(Sums& sum, const float* a, const float* b, int k) {
    const float4 a0 = *(const float4*)(a + k * BM), a1 = *(const float4*)(a + k * BM + 32);
    const float4 b0 = *(const float4*)(b + k * BN), b1 = *(const float4*)(b + k * BN + 16);
    const float x[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w}, y[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum[i][j] = __fmaf_rn(x[i], y[j], sum[i][j]);
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
void product(A a, B b, Y* y, float* sums, int m, int n, int k, int each) {
    extern __shared__ __align__(16) float memory[];
    float4* const whole = (float4*)(memory + 2 * STAGE) + threadIdx.x;
    const int columns = (n + BN - 1) / BN, tiles = (m + BM - 1) / BM * columns, blocks = (k + BLOCK - 1) / BLOCK;
    // Tiles of the same rows follow each other, so that L2 has their rows.
    const int tile = blockIdx.x % tiles, row = tile / columns * BM, column = tile % columns * BN;
    const int first = blockIdx.x / tiles * each, begin = first * BLOCK, end = min(k, (first + each) * BLOCK);
    const Place place;
    const bool alone = each >= blocks;
    Sums sum = {};
    if (begin < end) {
        a.load(row, begin);
        b.load(column, begin);
        a.put(memory);
        b.put(memory + BK * BM);
    }
    __syncthreads();
    float* stage = memory;
#pragma unroll 1
    for (int from = begin; from < end; from += BK) {
        const bool more = from + BK < end;
        if (more) {
            a.load(row, from + BK);
            b.load(column, from + BK);
        }
        const float *const of_a = stage + place.row, *const of_b = stage + BK * BM + place.column;
        if (from + BK <= k) {
            // More at once, and ptxas runs out of registers: other CTAs hide what this one waits for.
#pragma unroll 2
            for (int i = 0; i < BK; i++) add_term(sum, of_a, of_b, i);
        } else {
#pragma unroll 1
            for (int i = 0; i < k - from; i++) add_term(sum, of_a, of_b, i);
        }
        stage = memory + (stage == memory ? STAGE : 0);
        if (more) {
            a.put(stage);
            b.put(stage + BK * BM);
        }
        if ((from + BK) % BLOCK == 0 || !more) {
            // A block is whole.
            if (alone) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    float* const part = &sum[i / 2][i % 2 * 4];
                    if (from >= BLOCK) {
                        const float4 before = whole[i * GATE];
                        part[0] = __fadd_rn(before.x, part[0]); part[1] = __fadd_rn(before.y, part[1]);
                        part[2] = __fadd_rn(before.z, part[2]); part[3] = __fadd_rn(before.w, part[3]);
                    }
                    if (more) whole[i * GATE] = {part[0], part[1], part[2], part[3]};
                }
            } else {
                store_tile<TURNED>(sums + (size_t)(from / BLOCK) * m * n, sum, m, n, row + place.row, column + place.column);
            }
            if (more)
#pragma unroll
                for (int i = 0; i < 64; i++) sum[i / 8][i % 8] = 0;
        }
        __syncthreads();
    }
    if (alone) store_tile<TURNED>(y, sum, m, n, row + place.row, column + place.column);
}

extern "C" __global__ void __launch_bounds__(GATE, 3)
logits_bf16(const u16* __restrict__ x, const float* __restrict__ w, float* __restrict__ y, float* __restrict__ sums, int m, int n, int k, int each) {
    product<false>(Along<u16, BM>{x, m, k}, Along<float, BN>{w, n, k}, y, sums, m, n, k, each);
}
extern "C" __global__ void __launch_bounds__(GATE, 3)
logits_f32(const float* __restrict__ x, const float* __restrict__ w, float* __restrict__ y, float* __restrict__ sums, int m, int n, int k, int each) {
    product<false>(Along<float, BM>{x, m, k}, Along<float, BN>{w, n, k}, y, sums, m, n, k, each);
}
extern "C" __global__ void __launch_bounds__(GATE, 3)
input_bf16(const float* __restrict__ dy, const float* __restrict__ w, u16* __restrict__ dx, float* __restrict__ sums, int m, int n, int k, int each) {
    product<false>(Along<float, BM>{dy, m, k}, Across<float, BN>{w, n, k}, dx, sums, m, n, k, each);
}
extern "C" __global__ void __launch_bounds__(GATE, 3)
input_f32(const float* __restrict__ dy, const float* __restrict__ w, float* __restrict__ dx, float* __restrict__ sums, int m, int n, int k, int each) {
    product<false>(Along<float, BM>{dy, m, k}, Across<float, BN>{w, n, k}, dx, sums, m, n, k, each);
}
extern "C" __global__ void __launch_bounds__(GATE, 3)
weight_bf16(const u16* __restrict__ x, const float* __restrict__ dy, float* __restrict__ dw, float* __restrict__ sums, int m, int n, int k, int each) {
    product<true>(Across<u16, BM>{x, m, k}, Across<float, BN>{dy, n, k}, dw, sums, m, n, k, each);
}
extern "C" __global__ void __launch_bounds__(GATE, 3)
weight_f32(const float* __restrict__ x, const float* __restrict__ dy, float* __restrict__ dw, float* __restrict__ sums, int m, int n, int k, int each) {
    product<true>(Across<float, BM>{x, m, k}, Across<float, BN>{dy, n, k}, dw, sums, m, n, k, each);
}

// Adds the blocks of each element in ascending order. `count` elements, a multiple of 4; a thread has four.
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
