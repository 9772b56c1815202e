"""Driver calls over ctypes: load a cubin, make TMA descriptors, launch on torch's stream."""
import ctypes, os, torch
C = ctypes.CDLL("libcuda.so.1")
def ok(rc, what=""):
    if rc:
        s = ctypes.c_char_p(); C.cuGetErrorString(rc, ctypes.byref(s)); raise RuntimeError(f"{what}: {rc} {s.value}")
torch.zeros(1, device="cuda")                      # makes the primary context current
HERE = os.path.dirname(os.path.abspath(__file__))
class Kernel:
    def __init__(self, cubin, name, shared):
        self.mod, self.f, self.shared = ctypes.c_void_p(), ctypes.c_void_p(), shared
        ok(C.cuModuleLoadData(ctypes.byref(self.mod), open(cubin, "rb").read()), cubin)
        ok(C.cuModuleGetFunction(ctypes.byref(self.f), self.mod, name.encode()), name)
        ok(C.cuFuncSetAttribute(self.f, 8, shared), "shared")
    def resident(self, threads, shared):
        """CTAs that a multiprocessor has at once."""
        n = ctypes.c_int(); ok(C.cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(n), self.f, threads, ctypes.c_size_t(shared)), "resident"); return n.value
    def prepare(self, grid, block, *args):
        """Returns a closure that launches; arguments: bytes (by value), tensors (pointer), None (null), floats, ints."""
        vals = []
        for a in args:
            if isinstance(a, (bytes, bytearray)): b = (ctypes.c_char * (len(a) + 64))(); off = -ctypes.addressof(b) % 64; ctypes.memmove(ctypes.addressof(b) + off, bytes(a), len(a)); vals.append((b, ctypes.addressof(b) + off))
            elif isinstance(a, torch.Tensor): v = ctypes.c_uint64(a.data_ptr()); vals.append((v, ctypes.addressof(v)))
            else: v = ctypes.c_uint64(0) if a is None else ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int(a); vals.append((v, ctypes.addressof(v)))
        ptrs = (ctypes.c_void_p * len(vals))(*[p for _, p in vals])
        f, sh = self.f, self.shared
        def go(keep=(vals, args)):
            rc = C.cuLaunchKernel(f, grid, 1, 1, block, 1, 1, sh, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), ptrs, None)
            if rc: ok(rc, "launch")
        return go
U8, F32, BF16 = 0, 7, 9
def tensor_map(t, kind, dims, strides, box, swizzle, promotion=3):
    """dims and box innermost first; strides in bytes of the outer dimensions. swizzle: 0 none, 1 32B, 2 64B, 3 128B."""
    m = (ctypes.c_char * 192)(); at = ctypes.addressof(m); at += -at % 64
    n = len(dims); u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    ok(C.cuTensorMapEncodeTiled(ctypes.c_void_p(at), kind, n, ctypes.c_void_p(t.data_ptr()), (u64 * n)(*dims), (u64 * max(1, n - 1))(*strides),
       (u32 * n)(*box), (u32 * n)(*([1] * n)), 0, swizzle, promotion, 0), f"map {dims} {strides} {box}")
    return ctypes.string_at(at, 128)
