// What the kernels at the speed of memory share: wide accesses, and BF16 and E4M3 with the bits of the CPU reference.
//
// A tile is 128 elements of a row and has one scale. A half-warp holds a tile, 8 BF16 elements a lane: loads are 16 bytes
// wide, and a row's tiles are read and written in whole lines.
//
// Promised, and checked by tests/peers/hopper/memory.py (the gradients of a norm's weights and of combine: by
// kernels/examples/gpu_check): every rounding is the reference's. What the reference rounds
// singly is written with intrinsics, which the compiler does not fuse; where an instruction is saved, it is said why the
// bits stay. Results depend on a row alone (a tile along the tokens: on its tokens alone; the gradient of a norm's weights: on
// all rows), never on the grid.

#include "hopper.cuh"

typedef unsigned char u8;
typedef unsigned short u16;

constexpr int TILE = 128;
constexpr int LANES = TILE / 8;               // of a tile
constexpr int THREADS = 256, WARPS = THREADS / 32;

// ---- BF16 -------------------------------------------------------------------------------------------------------

// Two elements in a word, the first in its lower half.
__device__ __forceinline__ float first_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_of(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

struct Eight {
    u32 pair[4];
    __device__ __forceinline__ float operator[](int i) const { return i % 2 ? second_of(pair[i / 2]) : first_of(pair[i / 2]); }
};
// What is read once need not stay in L1.
__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// The same with how L2 keeps it.
__device__ __forceinline__ uint4 load16(const void* p, u64 policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(policy));
    return v;
}
__device__ __forceinline__ Eight eight(uint4 v) { return {{v.x, v.y, v.z, v.w}}; }
// Rows that are not there count as zeros: their lanes take part in shuffles.
__device__ __forceinline__ Eight load8(const u16* p, bool there) { return eight(there ? load16(p) : uint4{0, 0, 0, 0}); }
__device__ __forceinline__ Eight load8(const u16* p, bool there, u64 policy) { return eight(there ? load16(p, policy) : uint4{0, 0, 0, 0}); }
__device__ __forceinline__ void store8(u16* p, const Eight& v) { *(uint4*)p = {v.pair[0], v.pair[1], v.pair[2], v.pair[3]}; }
template <class F> __device__ __forceinline__ Eight make8(F f) {
    Eight v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.pair[i] = pack(f(2 * i), f(2 * i + 1));
    return v;
}
// To the nearest BF16.
__device__ __forceinline__ float rounded(float x) { return first_of(pack(x, 0)); }

// ---- a tile's scale ---------------------------------------------------------------------------------------------

// The larger magnitudes of two pairs, with signs that mean nothing. Of a NaN and a number it is the number, as in the
// reference.
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 r; asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r;
}

// What a division by a scale needs of it.
struct Divisor {
    float inverse, finite;                    // finite: the scale, at most the largest float
    // x / scale up to what rounding to E4M3 can see: a product and one correction. For BF16 x and the scale of a BF16 tile,
    // all pairs were tried; else a wrong code needs a quotient within 2^-21 units of the middle of two floats of which one is
    // the middle of two codes, and of all such pairs none is wrong, as long as the residual is not subnormal (a scale of at
    // least 2^-95). In this form the sign of a zero stays.
    __device__ __forceinline__ float under(float x) const {
        const float q = __fmul_rn(x, inverse);
        return __fmaf_rn(-__fmaf_rn(q, finite, -x), inverse, q);
    }
};
struct Scale : Divisor {
    float value;
    // `power`: rounded up to a power of two.
    __device__ __forceinline__ Scale(float largest, bool power) {
        // largest / 448, rounded once: the two constants' sum is 1/448 to 48 bits, and a quotient by 7 is never closer than
        // 1/14 of a unit to the middle of two floats.
        value = largest > 1e-30f ? __fmaf_rn(largest, 0x1.249248p-9f, __fmul_rn(largest, 0x1.24924ap-33f)) : 1.f;
        if (power) value = __uint_as_float((__float_as_uint(value) + 0x7fffff) & 0x7f800000);
        float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(value));
        inverse = fmaxf(__fmaf_rn(y, __fmaf_rn(-value, y, 1.f), y), 0.f); // infinity gives NaN; its inverse is 0
        finite = fminf(value, 0x1.fffffep127f);
    }
};

// ---- E4M3 -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 encode(float a, float b, float c, float d) {
    u32 r;
    asm("{ .reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, %2, %1; cvt.rn.satfinite.e4m3x2.f32 y, %4, %3; mov.b32 %0, {x, y}; }"
        : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
}
__device__ __forceinline__ uint2 encode(const Eight& v, const Divisor& s) {
    return {encode(s.under(v[0]), s.under(v[1]), s.under(v[2]), s.under(v[3])),
            encode(s.under(v[4]), s.under(v[5]), s.under(v[6]), s.under(v[7]))};
}
// N tiles of a half-warp: each lane's codes, and the scale of tile lane / (LANES / N). Each step of the maximum halves the
// tiles of a lane, so a scale is made once, not by all lanes. A maximum has no order that could show.
template <int N> __device__ __forceinline__ float quantise(uint2 (&codes)[N], const Eight (&v)[N], bool power) {
    u32 m[N];
#pragma unroll
    for (int i = 0; i < N; i++) m[i] = larger(larger(v[i].pair[0], v[i].pair[1]), larger(v[i].pair[2], v[i].pair[3]));
#pragma unroll
    for (int d = LANES / 2, n = N / 2; d; d /= 2, n /= 2) {
        const bool upper = threadIdx.x & d;
#pragma unroll
        for (int i = 0; i < n; i++) m[i] = larger(upper ? m[i + n] : m[i], __shfl_xor_sync(~0u, upper ? m[i] : m[i + n], d));
        if (n == 0) m[0] = larger(m[0], __shfl_xor_sync(~0u, m[0], d));
    }
    const Scale scale(fmaxf(fabsf(first_of(m[0])), fabsf(second_of(m[0]))), power);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const Divisor of = {__shfl_sync(~0u, scale.inverse, i * (LANES / N), LANES), __shfl_sync(~0u, scale.finite, i * (LANES / N), LANES)};
        codes[i] = encode(v[i], of);
    }
    return scale.value;
}

// ---- work -------------------------------------------------------------------------------------------------------

// A half-warp takes ROWS rows of a tile, the halves of a warp consecutive rows, the warps of a CTA consecutive tiles. A lane
// has 8 columns. Each thread works once: as many CTAs as there is work come faster than a few that stay.
template <int ROWS> struct Part {
    int rows, columns, lane, tile, row;       // rows: those from `row` on that are there
    __device__ __forceinline__ Part(int all, int columns) : columns(columns), lane(threadIdx.x % LANES) {
        const u32 item = blockIdx.x * WARPS + threadIdx.x / 32, tiles = columns / TILE;
        tile = item % tiles;
        row = (item / tiles * 2 + threadIdx.x / LANES % 2) * ROWS;
        rows = all - row;
    }
    // The warp has nothing to do.
    __device__ __forceinline__ bool none() const { return rows + int(threadIdx.x / LANES % 2) * ROWS <= 0; }
    __device__ __forceinline__ size_t at(int i) const { return (size_t)(row + i) * columns + tile * TILE + lane * 8; }
    __device__ __forceinline__ bool there(int i) const { return i < rows; }
    // Codes and scales; those of rows that are not there up to the next multiple of ROWS are written too.
    __device__ __forceinline__ void quantise(const Eight (&v)[ROWS], u8* codes, float* scales, int stride, bool power) const {
        uint2 code[ROWS];
        const float scale = ::quantise(code, v, power);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            if (there(i)) *(uint2*)(codes + at(i)) = code[i];
        if (rows > 0 && lane % (LANES / ROWS) == 0) scales[(size_t)tile * stride + row + lane / (LANES / ROWS)] = scale;
    }
};
