// AdamW with the bits of the CPU (src/ops/adamw.rs): weights and averages in FP32, moments in FP32 or BF16.

#include "exact.cuh"

constexpr int EACH = 8;                       // elements of a thread, THREADS apart
constexpr int CHUNK = 64 * 1024, CHAINS = 8;  // of squared sums

struct Numbers { float lr, beta1, beta2, eps, decay, clip, correction1, correction2, keep; };

// An element's bits, mixed with its index into two words, as the CPU's `mix`.
__device__ __forceinline__ u64 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ u64 bits_of(Bf16 x) { return x.bits; }
// Sums of mixed elements. The lower word's halves are added apart: no carries.
struct Sums {
    u64 low = 0, middle = 0, high = 0;
    __device__ __forceinline__ void add(u64 index, float w, Stored m, Stored v, u64 more) {
        const u64 by = 0xBF58476D1CE4E5B9, second = sizeof(Stored) == 2 ? bits_of(v) << 48 : 0;
        u64 l = index * 0xD6E8FEB86659FD93 ^ (bits_of(w) | bits_of(m) << 32 | second);
        l = (l ^ l >> 32) * by;
        u64 h = l ^ ((sizeof(Stored) == 2 ? 0 : bits_of(v)) | more);
        h = (h ^ h >> 30) * by;
        h = (h ^ h >> 27) * 0x94D049BB133111EB;
        low += l & 0xffffffff;
        middle += l >> 32;
        high += h ^ h >> 31;
    }
    // Whole numbers have no order of sums.
    __device__ __forceinline__ static void store(u64* to, u64 sum) {
#pragma unroll
        for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (threadIdx.x % 32 == 0) atomicAdd(to, sum);
    }
    __device__ __forceinline__ void store(u64* to) const { store(to, low); store(to + 1, middle); store(to + 2, high); }
};

// average and next_average: null if there is none. sums: low, middle and high of what was read, then of what was written; they
// were zero.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw(const float* __restrict__ w, const Stored* __restrict__ m, const Stored* __restrict__ v, const float* __restrict__ average,
      const float* __restrict__ g, float* __restrict__ next_w, Stored* __restrict__ next_m, Stored* __restrict__ next_v,
      float* __restrict__ next_average, u64* sums, u64 count, const Numbers a) {
    Sums read, written;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const u64 i = ((u64)blockIdx.x * EACH + n) * THREADS + threadIdx.x;
        if (i >= count) continue;
        const float gradient = g[i] * a.clip, old = w[i], kept = average ? average[i] : 0;
        const Stored first = stored(a.beta1 * value(m[i]) + (1.f - a.beta1) * gradient);
        const Stored second = stored(a.beta2 * value(v[i]) + (1.f - a.beta2) * (gradient * gradient));
        const float update = (value(first) * a.correction1) / (sqrtf(value(second) * a.correction2) + a.eps);
        const float weight = old - a.lr * (update + a.decay * old), mean = a.keep * kept + (1.f - a.keep) * weight;
        read.add(i, old, m[i], v[i], average ? bits_of(kept) << 32 : 0);
        written.add(i, weight, first, second, average ? bits_of(mean) << 32 : 0);
        next_w[i] = weight;
        next_m[i] = first;
        next_v[i] = second;
        if (average) next_average[i] = mean;
    }
    read.store(sums);
    written.store(sums + 3);
}

// Squares of a gradient in f64: a sum of each chunk by eight chains. A thread for each chain.
extern "C" __global__ void __launch_bounds__(THREADS)
square_sums(const float* __restrict__ g, double* __restrict__ sums, u64 count) {
    const u64 chain = element(), from = chain / CHAINS * CHUNK, end = min(from + CHUNK, count);
    double sum = 0;
#pragma unroll 16
    for (u64 i = from + chain % CHAINS; i < end; i += CHAINS) { const double x = g[i]; sum += x * x; }
#pragma unroll
    for (int width = CHAINS / 2; width; width /= 2) sum += __shfl_down_sync(~0u, sum, width, CHAINS);
    if (chain % CHAINS == 0 && from < count) sums[chain / CHAINS] = sum;
}
