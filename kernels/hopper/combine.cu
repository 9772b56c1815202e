// Combine and its gradients with the bits of the CPU (src/ops/combine.rs), for rows of FP32 or BF16: the sum of a group of experts is
// rounded to what rows travel in, then groups are added. Any width; permute.cu has those of low precision at the speed of memory.

#include "exact.cuh"

// place: the row of each choice; group: the group of its expert, ascending. No weights: ones.
extern "C" __global__ void __launch_bounds__(THREADS)
combine(const Stored* __restrict__ rows, const u32* __restrict__ place, const u32* __restrict__ group, const float* __restrict__ weights,
        Stored* __restrict__ y, u64 count, int columns, int top_k) {
    const u64 i = element();
    if (i >= count) return;
    const u64 from = i / columns * top_k, column = i % columns;
    float total = 0, sum = 0;
    for (int k = 0; k < top_k; k++) {
        if (k && group[from + k] != group[from + k - 1]) { total += value(stored(sum)); sum = 0; }
        sum += (weights ? weights[from + k] : 1.f) * value(rows[(u64)place[from + k] * columns + column]);
    }
    y[i] = stored(total + value(stored(sum)));
}
extern "C" __global__ void __launch_bounds__(THREADS)
combine_backward(const Stored* __restrict__ dy, const Stored* __restrict__ rows, const u32* __restrict__ place, const float* __restrict__ weights,
                 Stored* __restrict__ drows, float* __restrict__ dweights, u64 choices, int columns, int top_k) {
    const u64 at = row_of();
    const bool there = at < choices;
    const u64 to = there ? (u64)place[at] * columns : 0, from = at / top_k * columns;
    const float inner = sum_of(there ? columns : 0, [&](int i) { return value(dy[from + i]) * value(rows[to + i]); });
    if (!there) return;
    const float weight = weights[at];
    for (int i = lane_of(); i < columns; i += LANES) drows[to + i] = stored(weight * value(dy[from + i]));
    if (lane_of() == 0) dweights[at] = inner;
}
