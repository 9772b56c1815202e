// The limit of kernels that read much and write next to nothing: `from` is read once and dropped.
//   from: pieces of 16 bytes, at least one
//   to:   one word, written only where a sum of words has one value among all: so that no load is left out
// A thread reads PIECES of them; more CTAs do nothing. What is read goes first from L2, as in norm.cu.

#include "memory.cuh"

constexpr int PIECES = 8;

extern "C" __global__ void __launch_bounds__(THREADS)
read_bytes(const uint4* __restrict__ from, u32* to, u32 pieces) {
    const u64 once = read_once();
    const u32 first = blockIdx.x * (THREADS * PIECES) + threadIdx.x;
    uint4 v[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const u32 at = min(first + i * THREADS, pieces - 1);
        v[i] = load16(from + at, once);
    }
    u32 sum = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) sum += v[i].x + v[i].y + v[i].z + v[i].w;
    if (sum == 0x5eed5eed) *to = sum;
}
