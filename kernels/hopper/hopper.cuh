// What the kernels share: barriers, the copy engine and the tensor cores of Hopper (sm_90a), in inline PTX.
// The compiling program defines WGMMA(d, a, b, add) for the tile's width (PTX wants every accumulator spelt out).

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap { char opaque[128]; };

// ---- shared memory and barriers ---------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float load_shared(u32 address) {
    float v; asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address)); return v;
}
__device__ __forceinline__ float2 load_shared2(u32 address) {
    float2 v; asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address)); return v;
}
__device__ __forceinline__ uint4 load_shared4(u32 address) {
    uint4 v; asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address)); return v;
}
__device__ __forceinline__ void barrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(arrivals) : "memory");
}
// Barriers that this thread has made are visible to the copy engine.
__device__ __forceinline__ void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile("{ .reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done; bra again; done: }" :: "r"(bar), "r"(parity) : "memory");
}
// What this thread wrote is visible to the copy engine.
__device__ __forceinline__ void copy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ u32 clock32() { u32 c; asm volatile("mov.u32 %0, %%clock;" : "=r"(c)); return c; }
__device__ __forceinline__ void wait_until(u32 start, u32 cycles) {
    while (clock32() - start < cycles) asm volatile("nanosleep.u32 40;");
}

// A launch that may begin before the one before it is done waits for that here.
__device__ __forceinline__ void wait_for_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- copy engine ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_box(u32 dst, const TensorMap& map, int x, int y, u32 bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(dst), "l"(&map), "r"(x), "r"(y), "r"(bar) : "memory");
}
// Consecutive bytes, a multiple of 16.
__device__ __forceinline__ void load_bytes(u32 dst, const void* src, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void prefetch_bytes(const void* src, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(src), "r"(bytes) : "memory");
}
// How the L2 cache keeps what is read once: it goes first, so that it drives out nothing that others wrote or will read.
__device__ __forceinline__ u64 read_once() {
    u64 policy; asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)); return policy;
}
__device__ __forceinline__ void store_box(const TensorMap& map, int x, int y, u32 src) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 :: "l"(&map), "r"(x), "r"(y), "r"(src) : "memory");
}
__device__ __forceinline__ void prefetch_box(const TensorMap& map, int x, int y, int z) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" :: "l"(&map), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory"); }
// One FP32 addition to each element in memory.
__device__ __forceinline__ void add_box(const TensorMap& map, int x, int y, int z, u32 src) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%1, %2, %3}], [%4];"
                 :: "l"(&map), "r"(x), "r"(y), "r"(z), "r"(src) : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- tensor cores -----------------------------------------------------------------------------------------------

// An operand lies in rows of 128 swizzled bytes, of which eight are 1,024 bytes. Only the lower half of its descriptor
// holds the address (in 16 bytes), so the upper half stays a constant.
__device__ __forceinline__ u32 operand(u32 address) { return address >> 4 | 1 << 16; }
__device__ __forceinline__ u64 descriptor(u32 operand) { return (u64)(1 << 30 | 64) << 32 | operand; }

// d = 64 rows of A times the rows of B over 128 of K.
template <int FRAG> __device__ __forceinline__ void multiply(float (&d)[FRAG], u32 a, u32 b) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; k++) WGMMA(d, descriptor(a + 2 * k), descriptor(b + 2 * k), k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

template <int DEPTH> struct Ring {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void next() { if (++stage == DEPTH) { stage = 0; phase ^= 1; } }
};

// The barriers of a product. A stage is full when the copy engine has filled it, and empty when the four warps of all
// math warpgroups are done with it; a warpgroup's tile is laid out by its four warps and freed by the one that stores it.
template <int DEPTH, int GROUPS> __device__ __forceinline__ void init_barriers(u32 full, u32 empty, u32 laid, u32 free) {
    for (int i = 0; i < DEPTH; i++) {
        barrier_init(full + 8 * i, 1);
        barrier_init(empty + 8 * i, 4 * GROUPS);
    }
    for (int g = 0; g < GROUPS; g++) {
        barrier_init(laid + 8 * g, 4);
        barrier_init(free + 8 * g, 1);
    }
    barriers_visible();
}

// ---- tiles ------------------------------------------------------------------------------------------------------

// Walks over the tiles of a CTA, group by group. Tiles that run together share rows of A and columns of B in L2: a band
// of HIGH rows of tiles is walked column by column.
template <int HIGH> struct Tiles {
    int rows, cols, stride, tile, band, row, col; // tile counts from the start of the band
    // The next tile, or false at the end of this group.
    __device__ __forceinline__ bool find() {
        for (; band < rows; band += HIGH) {
            const int height = min(HIGH, rows - band);
            if (tile < height * cols) {
                if (height == HIGH) { row = tile % HIGH; col = tile / HIGH; } // HIGH is a power of two: no division
                else { col = tile / height; row = tile - col * height; }
                row += band;
                return true;
            }
            tile -= height * cols;
        }
        band = 0;
        return false;
    }
};
