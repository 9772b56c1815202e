"""Compiles variants of the .cu files with NVRTC for sm_90a into cubin/ and prints registers and spills.
usage: build.py FILE NAME:-DX=..,-DY=.. ..."""
import ctypes, glob, json, os, re, sys
here = os.path.dirname(os.path.abspath(__file__))
kernels = os.path.join(here, "../../../kernels/hopper")
def nvrtc():
    """From the PyPI package nvidia-cuda-nvrtc (13.x)."""
    for s in sys.path:
        for p in glob.glob(f"{s}/nvidia/cu13/lib/libnvrtc.so.13"): return ctypes.CDLL(p)
    raise SystemExit("no libnvrtc.so.13: pip install nvidia-cuda-nvrtc")
def compile(source, options, lib=None):
    lib = lib or nvrtc()
    prog = ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(prog), source.encode(), b"k.cu", 0, None, None) == 0
    opts = [o.encode() for o in ["--gpu-architecture=sm_90a", "-std=c++17", "--ptxas-options=-v", "--include-path=" + kernels, *options]]
    rc = lib.nvrtcCompileProgram(prog, len(opts), (ctypes.c_char_p * len(opts))(*opts))
    n = ctypes.c_size_t(); lib.nvrtcGetProgramLogSize(prog, ctypes.byref(n))
    log = ctypes.create_string_buffer(n.value); lib.nvrtcGetProgramLog(prog, log); log = log.value.decode()
    if rc: raise SystemExit(log)
    lib.nvrtcGetCUBINSize(prog, ctypes.byref(n)); cubin = ctypes.create_string_buffer(n.value)
    lib.nvrtcGetCUBIN(prog, cubin)
    return cubin.raw, log
def prelude(n):
    """The tensor core instruction for n columns: PTX wants every accumulator spelt out."""
    f = n // 2; regs = ", ".join(f"%{i}" for i in range(f)); outs = ", ".join(f'"+f"(d[{i}])' for i in range(f))
    return (f'#define WGMMA(d, a, b, add) asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{f+2}, 0;\\n'
            f'wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{regs}}}, %{f}, %{f+1}, p, 1, 1; }}"'
            f' : {outs} : "l"(a), "l"(b), "r"((int)(add)))\n')
if __name__ == "__main__":
    src = open(os.path.join(kernels, sys.argv[1])).read()
    os.makedirs(os.path.join(here, "cubin"), exist_ok=True)
    for v in sys.argv[2:]:
        name, _, opts = v.partition(":")
        wn = re.search(r"-DWN=(\d+)", opts) or re.search(r"-DBN=(\d+)", opts)
        cubin, log = compile((prelude(int(wn[1])) if wn else "") + src, [o for o in opts.split(",") if o])
        open(os.path.join(here, "cubin", name + ".cubin"), "wb").write(cubin)
        json.dump({k: int(x) for k, x in re.findall(r"-D(\w+)=(\d+)", opts)}, open(os.path.join(here, "cubin", name + ".json"), "w"))
        regs = [f"{n} {r}" for n, r in re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", log, re.S)]; sp = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        warn = [l for l in log.splitlines() if "arning" in l or "error" in l or "C75" in l]
        print(name, "regs", regs, "stack/spill", sp, *warn[:5], sep=" | ")
