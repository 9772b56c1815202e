// What latent attention has, in BF16, to what cuDNN's attention takes, and back.
//   kv, dkv:        [tokens][heads][nope + values], keys without rotation and values
//   k_rope, dk_rope: [tokens][rope], shared by the heads
//   k, dk:          [tokens][heads][nope + rope]
//   v, dv:          [tokens][heads][values]

#include "exact.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
join_heads(const Bf16* __restrict__ kv, const Bf16* __restrict__ k_rope, Bf16* __restrict__ k, Bf16* __restrict__ v,
           u64 count, int heads, int nope, int rope, int values) {
    const u64 i = element();
    if (i >= count) return;
    const int keys = nope + rope, column = i % (keys + values);
    const u64 head = i / (keys + values);
    if (column < nope) k[head * keys + column] = kv[head * (nope + values) + column];
    else if (column < keys) k[head * keys + column] = k_rope[head / heads * rope + column - nope];
    else v[head * values + column - keys] = kv[head * (nope + values) + column - rope];
}

extern "C" __global__ void __launch_bounds__(THREADS)
split_heads(const Bf16* __restrict__ dk, const Bf16* __restrict__ dv, Bf16* __restrict__ dkv, u64 count, int nope, int rope, int values) {
    const u64 i = element();
    if (i >= count) return;
    const int column = i % (nope + values);
    const u64 head = i / (nope + values);
    dkv[i] = column < nope ? dk[head * (nope + rope) + column] : dv[head * values + column - nope];
}

// The gradient of the shared keys adds heads in ascending order and rounds once.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_heads(const Bf16* __restrict__ dk, Bf16* __restrict__ dk_rope, u64 count, int heads, int nope, int rope) {
    const u64 i = element();
    if (i >= count) return;
    const u64 from = i / rope * heads * (nope + rope) + nope + i % rope;
    float sum = 0;
    for (int head = 0; head < heads; head++) sum += value(dk[from + (u64)head * (nope + rope)]);
    dk_rope[i] = nearest<Bf16>(sum);
}

// [rows][columns] to [columns][rows].
extern "C" __global__ void __launch_bounds__(THREADS)
turn_numbers(const float* __restrict__ x, float* __restrict__ y, u64 count, int rows, int columns) {
    const u64 i = element();
    if (i < count) y[i] = x[i % rows * columns + i / rows];
}
