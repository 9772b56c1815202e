// What kernels share that have the CPU's bits: its functions and sums (src/math.rs). Arithmetic is FP32, whatever is stored: an
// element is widened where it is read, and rounded once where it is written. These files are compiled without
// contraction, so that a product and a sum are rounded one by one, as they are written; what the CPU fuses is written as
// __fmaf_rn. Each row is a half-warp's, whose lanes are those of the CPU's sums; no result depends on the grid.

typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;

struct Bf16 { unsigned short bits; };
__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ float value(Bf16 x) { return __uint_as_float((u32)x.bits << 16); }
template <class E> __device__ __forceinline__ E nearest(float x);
template <> __device__ __forceinline__ float nearest<float>(float x) { return x; }
// Ties to even; NaN stays NaN.
template <> __device__ __forceinline__ Bf16 nearest<Bf16>(float x) {
    const u32 bits = __float_as_uint(x);
    return {(unsigned short)(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// What activations are stored as, where a file is compiled for both.
#ifdef LOW
#if LOW
typedef Bf16 Stored;
#else
typedef float Stored;
#endif
__device__ __forceinline__ Stored stored(float x) { return nearest<Stored>(x); }
#endif

constexpr int THREADS = 256;
constexpr int LANES = 16, ROWS = THREADS / LANES; // of a sum; rows of a CTA

// The element of a thread, where each has one.
__device__ __forceinline__ u64 element() { return (u64)blockIdx.x * THREADS + threadIdx.x; }
// The row of a half-warp, and the thread's lane in it.
__device__ __forceinline__ u64 row_of() { return (u64)blockIdx.x * ROWS + threadIdx.x / LANES; }
__device__ __forceinline__ int lane_of() { return threadIdx.x % LANES; }

// e^x, clamped to [-87, 88].
__device__ __forceinline__ float exponential(float x) {
    const bool nan = x != x;
    x = x < -87.f ? -87.f : x;
    x = x > 88.f ? 88.f : x;
    const float shifted = x * 0x1.715476p0f + 12582912.f, n = shifted - 12582912.f;
    const float r = (x - n * 0.6933594f) - n * -2.1219444e-4f;
    float p = 1.3888889e-3f;
    p = p * r + 8.333334e-3f;
    p = p * r + 4.1666668e-2f;
    p = p * r + 0.16666667f;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const float scale = __uint_as_float((__float_as_uint(shifted) + 127) << 23);
    return nan ? __uint_as_float(0x7fc00000) : p * scale;
}
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

// The sum of term(i) below n, by all lanes of a row: lane i % 16 ascending, then the lanes as a binary tree. Every lane of the
// warp comes here.
template <class F> __device__ __forceinline__ float sum_of(int n, F term) {
    float sum = 0;
    for (int i = lane_of(); i < n; i += LANES) sum += term(i);
#pragma unroll
    for (int width = LANES / 2; width; width /= 2) sum += __shfl_down_sync(~0u, sum, width, LANES);
    return __shfl_sync(~0u, sum, 0, LANES);
}
// The largest term; a NaN is none. It has no order that could show.
template <class F> __device__ __forceinline__ float largest(int n, F term) {
    float most = __uint_as_float(0xff800000);
    for (int i = lane_of(); i < n; i += LANES) most = fmaxf(most, term(i));
#pragma unroll
    for (int width = LANES / 2; width; width /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, width, LANES));
    return most;
}
// The natural logarithm in f64, of an f32: of a number above zero, x = 2^n (1 + f) with 1 + f between the roots of a half and of
// two, and log(1 + f) is a polynomial in s = f / (2 + f).
__device__ __forceinline__ double logarithm(float x) {
    if (!(x > 0.f)) return __longlong_as_double(x == 0.f ? 0xfff0000000000000 : 0x7ff8000000000000);
    if (__float_as_uint(x) == 0x7f800000) return x;
    const u64 bits = __double_as_longlong((double)x) + 0x00095f6200000000;
    const double n = (int)(bits >> 52) - 1023;
    const double f = __longlong_as_double((bits & 0xfffffffffffff) + 0x3fe6a09e00000000) - 1.0;
    const double half = 0.5 * f * f, s = f / (2.0 + f), z = s * s, w = z * z;
    const double even = w * (3.999999999940942e-1 + w * (2.2222198432149784e-1 + w * 1.5313837699209373e-1));
    const double odd = z * (6.666666666666735e-1 + w * (2.857142874366239e-1
        + w * (1.818357216161805e-1 + w * 1.4798198605116586e-1)));
    return s * (half + (odd + even)) + n * 1.9082149292705877e-10 - half + f + n * 6.931471803691238e-1;
}
