// Rows of tokens to tiles along the tokens: the operands of fp8_wgrad.cu.
//   x:       [tokens][columns], BF16; or E4M3 with scales from [columns/128][from_stride], as fp8_gemm.cu reads its A
//   offsets: groups + 1 row numbers on the device: rows offsets[g] .. offsets[g+1] are group g's, any number of them
//   blocks:  groups + 1 block numbers on the device: those of the groups' tokens in blocks of 128, the last block of each
//            filled up with zeros, so blocks[g+1] = blocks[g] + ceil(rows of g / 128)
//   codes:   [columns][stride], E4M3 along the tokens: block b is bytes 128 b .. 128 b + 127 of a row; the stride a multiple
//            of 128. Blocks that no group has stay.
//   scales:  FP32, [blocks][columns], of 128 tokens of a column each
//   power:   scales are powers of two
// Columns a multiple of 128. One CTA for each 128 bytes of a row in each block; more CTAs do nothing.
//
// E4M3 values are multiplied by their rows' scales, and those FP32 products are rounded again.

#include "memory.cuh"

constexpr int TOKENS = 4;                     // of a thread: the codes of one column fill a word
constexpr int SLOTS = TILE / TOKENS, CHUNKS = THREADS / SLOTS; // a thread takes 16 bytes of each of its tokens

// Where four neighbouring columns' largest magnitudes lie, and two columns' divisors, so that no access meets a bank twice.
__device__ __forceinline__ u32 place_of(u32 quad) { return quad ^ quad / 8; }

// 16 bytes of a row, two elements at a time.
struct OfBf16 {
    typedef u16 Element;
    static constexpr int COLUMNS = 8;
    __device__ __forceinline__ static float2 pair(const u32 (&word)[4], int i, float) { return {first_of(word[i]), second_of(word[i])}; }
};
struct OfE4m3 {
    typedef u8 Element;
    static constexpr int COLUMNS = 16;
    __device__ __forceinline__ static float2 pair(const u32 (&word)[4], int i, float scale) {
        float2 v;
        asm("{ .reg .b32 h; .reg .b16 x, y; cvt.rn.f16x2.e4m3x2 h, %2; mov.b32 {x, y}, h; cvt.f32.f16 %0, x; cvt.f32.f16 %1, y; }"
            : "=f"(v.x), "=f"(v.y) : "h"((u16)(word[i / 2] >> i % 2 * 16)));
        return {__fmul_rn(v.x, scale), __fmul_rn(v.y, scale)};
    }
};

template <class Of> __device__ __forceinline__
void turn(const typename Of::Element* __restrict__ x, const float* __restrict__ from, const int* __restrict__ offsets,
          const int* __restrict__ blocks, int groups, u8* __restrict__ codes, float* __restrict__ scales,
          int columns, int from_stride, int stride, bool power) {
    constexpr int COLUMNS = Of::COLUMNS, WIDTH = CHUNKS * COLUMNS;
    __shared__ float4 part[SLOTS][WIDTH / 4]; // largest magnitudes by 4 tokens, then the turned codes
    __shared__ float4 divisors[WIDTH / 2];    // of two columns each
    __shared__ int found[2];
    const u32 chunk = threadIdx.x % CHUNKS, slot = threadIdx.x / CHUNKS, tiles = columns / WIDTH;
    const int tile = blockIdx.x % tiles, block = blockIdx.x / tiles;
    // The group whose block this is knows where its rows begin and end.
    bool mine = false;
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
        const int first = __ldg(blocks + g), last = __ldg(blocks + g + 1), row = __ldg(offsets + g), end = __ldg(offsets + g + 1);
        if (first <= block && block < last) { found[0] = row + (block - first) * TILE; found[1] = end; mine = true; }
    }
    if (!__syncthreads_or(mine)) return;
    const int token = found[0] + slot * TOKENS, end = found[1];

    u32 v[TOKENS][4];
    float s[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const bool there = token + t < end;
        const uint4 word = there ? load16(x + (size_t)(token + t) * columns + tile * WIDTH + chunk * COLUMNS) : uint4{0, 0, 0, 0};
        v[t][0] = word.x; v[t][1] = word.y; v[t][2] = word.z; v[t][3] = word.w;
        s[t] = COLUMNS == 16 && there ? __ldg(from + (size_t)tile * from_stride + token + t) : 1;
    }
#pragma unroll
    for (int q = 0; q < COLUMNS / 4; q++) {
        float4 m = {0, 0, 0, 0};
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float2 a = Of::pair(v[t], 2 * q, s[t]), b = Of::pair(v[t], 2 * q + 1, s[t]);
            m = {fmaxf(m.x, fabsf(a.x)), fmaxf(m.y, fabsf(a.y)), fmaxf(m.z, fabsf(b.x)), fmaxf(m.w, fabsf(b.y))};
        }
        part[slot][place_of(chunk * (COLUMNS / 4) + q)] = m;
    }
    __syncthreads();
    if (threadIdx.x < WIDTH) {
        const u32 column = threadIdx.x;
        float m = 0;
#pragma unroll
        for (int i = 0; i < SLOTS; i++) m = fmaxf(m, ((const float*)&part[i][place_of(column / 4)])[column % 4]);
        const Scale scale(m, power);
        ((float2*)divisors)[place_of(column / 2) * 2 + column % 2] = {scale.inverse, scale.finite};
        scales[(size_t)block * columns + tile * WIDTH + column] = scale.value;
    }
    __syncthreads();
    // Decoded again from here: products kept would take twice the registers, and more CTAs of an SM hide more.
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(v[t][i]));
    // A column's codes of 16 tokens are 16 bytes, which lie in its 128 bytes so that writing words and reading lines
    // meet no bank twice.
    u32* const out = (u32*)part;
#pragma unroll
    for (int p = 0; p < COLUMNS / 2; p++) {
        const u32 column = chunk * COLUMNS + 2 * p;
        const float4 both = divisors[place_of(column / 2)];
        const Divisor a = {both.x, both.y}, b = {both.z, both.w};
        float2 e[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) e[t] = Of::pair(v[t], p, s[t]);
        const u32 at = column * 32 + ((slot / 4 ^ chunk) * 4 | slot % 4);
        out[at] = encode(a.under(e[0].x), a.under(e[1].x), a.under(e[2].x), a.under(e[3].x));
        out[at + 32] = encode(b.under(e[0].y), b.under(e[1].y), b.under(e[2].y), b.under(e[3].y));
    }
    __syncthreads();
#pragma unroll
    for (u32 i = threadIdx.x; i < WIDTH * 8; i += THREADS) {
        const u32 column = i / 8, line = i % 8;
        u8* const to = codes + (size_t)(tile * WIDTH + column) * stride + (size_t)block * TILE + line * 16;
        *(uint4*)to = ((const uint4*)out)[column * 8 + (line ^ column / COLUMNS)];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 5)
turn_bf16(const u16* __restrict__ x, const int* __restrict__ offsets, const int* __restrict__ blocks, int groups,
          u8* __restrict__ codes, float* __restrict__ scales, int columns, int stride, int power) {
    turn<OfBf16>(x, 0, offsets, blocks, groups, codes, scales, columns, 0, stride, power);
}
extern "C" __global__ void __launch_bounds__(THREADS, 5)
turn_e4m3(const u8* __restrict__ x, const float* __restrict__ from, const int* __restrict__ offsets, const int* __restrict__ blocks, int groups,
          u8* __restrict__ codes, float* __restrict__ scales, int columns, int from_stride, int stride, int power) {
    turn<OfE4m3>(x, from, offsets, blocks, groups, codes, scales, columns, from_stride, stride, power);
}
