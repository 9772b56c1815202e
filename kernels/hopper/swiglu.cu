// SwiGLU at the speed of memory: h = (gate * sigmoid(gate)) * up, and its gradients, rounded to BF16; from there to E4M3.
//   gate, up, dh:                      [rows][columns], BF16
//   h; dgate and dup:                  the same, or null
//   codes, scales, stride, power:      as in quantise.cu; null where no E4M3 is wanted
// Any number of rows; columns a multiple of 128. A warp takes 4 rows of a tile; more warps do nothing.

#include "memory.cuh"

constexpr int ROWS = 2;                       // of a half-warp

// The reference's 1 / (1 + e^-g), of a BF16 number. A fused operation stands where it rounds like the reference's two for
// every BF16 number (all were tried); elsewhere it would not. NaN is left to the product with g.
__device__ __forceinline__ float sigmoid(float g) {
    const float x = fminf(fmaxf(-g, -87.f), 88.f);
    const float shifted = __fmaf_rn(x, 0x1.715476p0f, 12582912.f), n = __fsub_rn(shifted, 12582912.f); // the nearest integer
    const float r = __fsub_rn(__fmaf_rn(-n, 0.693359375f, x), __fmul_rn(n, -2.1219444e-4f));
    float p = __fmaf_rn(1.3888889e-3f, r, 8.333334e-3f);
    p = __fmaf_rn(p, r, 4.1666668e-2f);
    p = __fmaf_rn(p, r, 0.16666667f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1.f);
    p = __fadd_rn(__fmul_rn(p, r), 1.f);
    const float e = __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000));
    // A quarter of 1 + e: its inverse is a normal number also for the least g.
    const float d = __fmaf_rn(e, 0.25f, 0.25f);
    float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(d));
    return __fmul_rn(__fmaf_rn(y, __fmaf_rn(-d, y, 1.f), y), 0.25f);
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu(const u16* __restrict__ gate, const u16* __restrict__ up, u16* h, u8* codes, float* scales, int rows, int columns, int stride, int power) {
    const Part<ROWS> part(rows, columns);
    if (part.none()) return;
    Eight g[ROWS], u[ROWS], v[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        g[i] = load8(gate + part.at(i), part.there(i));
        u[i] = load8(up + part.at(i), part.there(i));
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        v[i] = make8([&](int j) { return __fmul_rn(__fmul_rn(g[i][j], sigmoid(g[i][j])), u[i][j]); });
        if (h && part.there(i)) store8(h + part.at(i), v[i]);
    }
    if (codes) part.quantise(v, codes, scales, stride, power);
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_backward(const u16* __restrict__ gate, const u16* __restrict__ up, const u16* __restrict__ dh, u16* dgate, u16* dup,
                u8* dgate_codes, float* dgate_scales, u8* dup_codes, float* dup_scales, int rows, int columns, int stride, int power) {
    const Part<ROWS> part(rows, columns);
    if (part.none()) return;
    Eight g[ROWS], u[ROWS], d[ROWS], of_gate[ROWS], of_up[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        g[i] = load8(gate + part.at(i), part.there(i));
        u[i] = load8(up + part.at(i), part.there(i));
        d[i] = load8(dh + part.at(i), part.there(i));
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        float s[8];
#pragma unroll
        for (int j = 0; j < 8; j++) s[j] = sigmoid(g[i][j]);
        of_up[i] = make8([&](int j) { return __fmul_rn(d[i][j], __fmul_rn(g[i][j], s[j])); });
        of_gate[i] = make8([&](int j) {
            const float slope = __fmul_rn(s[j], __fadd_rn(1.f, __fmul_rn(g[i][j], __fsub_rn(1.f, s[j]))));
            return __fmul_rn(__fmul_rn(d[i][j], u[i][j]), slope);
        });
        if (dgate && part.there(i)) { store8(dgate + part.at(i), of_gate[i]); store8(dup + part.at(i), of_up[i]); }
    }
    if (dgate_codes) {
        part.quantise(of_gate, dgate_codes, dgate_scales, stride, power);
        part.quantise(of_up, dup_codes, dup_scales, stride, power);
    }
}
