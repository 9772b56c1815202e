// The gate's choice and its gradients, in FP32 in every precision, with the bits of the CPU (src/ops/gate.rs).

#include "exact.cuh"

constexpr int WARPS = THREADS / 32;

// The order of all floats, as the CPU sorts them: NaN above infinity.
__device__ __forceinline__ int key_of(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (int)((u32)(bits >> 31) >> 1);
}
__device__ __forceinline__ float float_of(int key) { return __int_as_float(key ^ (int)((u32)(key >> 31) >> 1)); }
// How many of the first `count` keys go before the i-th: larger ones, and equal ones below it.
template <class F> __device__ __forceinline__ int rank_of(int i, int count, F key) {
    const int mine = key(i);
    int rank = 0;
    for (int j = 0; j < count; j++) rank += key(j) > mine || (key(j) == mine && j < i);
    return rank;
}

// A warp for each token. Shared memory of a warp: scores and keys of the experts, keys of the groups and whether they are kept,
// the chosen scores.
extern "C" __global__ void __launch_bounds__(THREADS)
gate(const float* __restrict__ logits, const float* __restrict__ bias, u32* __restrict__ experts, float* __restrict__ weights,
     int tokens, int count, int top_k, int groups, int groups_kept, float routed_scale) {
    extern __shared__ float memory[];
    const int token = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, size = count / groups;
    float *const scores = memory + threadIdx.x / 32 * (2 * (count + groups) + top_k), *const chosen = scores + 2 * (count + groups);
    int *const keys = (int*)scores + count, *const group_keys = keys + count, *const kept = group_keys + groups;
    if (token >= tokens) return;
    for (int e = lane; e < count; e += 32) {
        scores[e] = sigmoid(logits[(u64)token * count + e]);
        keys[e] = key_of(scores[e] + bias[e]);
    }
    __syncwarp();
    for (int g = lane; g < groups; g += 32) {
        const int* const of = keys + g * size;
        float sum = 0;
        for (int i = 0; i < size; i++)
            if (rank_of(i, size, [&](int j) { return of[j]; }) < 2) sum += float_of(of[i]);
        group_keys[g] = key_of(sum);
    }
    __syncwarp();
    for (int g = lane; g < groups; g += 32) kept[g] = rank_of(g, groups, [&](int other) { return group_keys[other]; }) < groups_kept;
    __syncwarp();
    int before = 0;
    for (int from = 0; from < count; from += 32) {
        const int e = from + lane;
        bool mine = e < count && kept[e / size];
        if (mine) {
            int rank = 0;
            for (int g = 0; g < groups; g++)
                for (int j = g * size; kept[g] && j < (g + 1) * size; j++) rank += keys[j] > keys[e] || (keys[j] == keys[e] && j < e);
            mine = rank < top_k;
        }
        const u32 all = __ballot_sync(~0u, mine);
        const int place = before + __popc(all & ((1u << lane) - 1));
        if (mine) {
            experts[(u64)token * top_k + place] = e;
            chosen[place] = scores[e];
        }
        before += __popc(all);
    }
    __syncwarp();
    float total = 0;
    for (int k = 0; k < top_k; k++) total += chosen[k];
    total += 1e-20f;
    for (int k = lane; k < top_k; k += 32) weights[(u64)token * top_k + k] = chosen[k] / total * routed_scale;
}

// A thread for each token; dlogits were zero.
extern "C" __global__ void __launch_bounds__(THREADS)
gate_backward(const float* __restrict__ logits, const u32* __restrict__ experts, const float* __restrict__ dweights, float* __restrict__ dlogits,
              int tokens, int count, int top_k, float routed_scale) {
    const u64 token = element();
    if (token >= tokens) return;
    const float* const row = logits + token * count;
    const u32* const of = experts + token * top_k;
    const float* const dw = dweights + token * top_k;
    float total = 0, mean = 0;
    for (int k = 0; k < top_k; k++) total += sigmoid(row[of[k]]);
    total += 1e-20f;
    for (int k = 0; k < top_k; k++) mean += sigmoid(row[of[k]]) * dw[k];
    mean /= total;
    for (int k = 0; k < top_k; k++) {
        const float s = sigmoid(row[of[k]]), ds = (dw[k] - mean) / total * routed_scale;
        dlogits[token * count + of[k]] = ds * (s * (1.f - s));
    }
}

// How many tokens of a sequence have an expert among their highest; counts, [sequences][count], were zero. Whole numbers have no
// order of sums.
extern "C" __global__ void __launch_bounds__(THREADS)
balance_counts(const float* __restrict__ logits, u32* __restrict__ counts, u64 elements, int count, int top_k, int sequence) {
    const u64 i = element();
    if (i >= elements) return;
    const u64 token = i / count;
    const float* const row = logits + token * count;
    if (rank_of(i % count, count, [&](int e) { return key_of(row[e]); }) < top_k) atomicAdd(counts + token / sequence * count + i % count, 1u);
}
extern "C" __global__ void __launch_bounds__(THREADS)
balance_backward(const float* __restrict__ logits, const u32* __restrict__ counts, float* __restrict__ dlogits, int tokens, int count,
                 int top_k, int sequence, float factor) {
    const u64 token = row_of();
    const bool there = token < tokens;
    const u64 at = token * count;
    const int first = token / sequence * sequence, rows = min(sequence, tokens - first), n = there ? count : 0;
    const u32* const of = counts + token / sequence * count;
    const float per_count = (float)count / (float)(top_k * rows);
    const float total = sum_of(n, [&](int e) { return sigmoid(logits[at + e]); });
    const float mean = sum_of(n, [&](int e) { return ((float)of[e] * per_count) * sigmoid(logits[at + e]); }) / total;
    for (int e = lane_of(); e < n; e += LANES) {
        const float s = sigmoid(logits[at + e]), ds = factor * ((float)of[e] * per_count - mean) / total;
        dlogits[at + e] = ds * (s * (1.f - s));
    }
}
