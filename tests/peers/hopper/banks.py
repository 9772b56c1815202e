"""(nvdisasm: of the PyPI package nvidia-cuda-nvcc, on the PATH.) Share of FFMAs in a cubin whose part and accumulator lie in the same register bank (parity)."""
import re, subprocess, sys
for f in sys.argv[1:]:
    out = subprocess.run(["nvdisasm", "-c", f], capture_output=True, text=True).stdout
    m = re.findall(r"FFMA R(\d+), R(\d+)(?:\.reuse)?, R(\d+)(\.reuse)?, R(\d+)", out)
    same = sum((int(a) ^ int(d)) & 1 == 0 for _, a, _, _, d in m)
    n2 = sum(len({int(a) & 1, int(s) & 1, int(d) & 1}) == 1 for _, a, s, _, d in m)
    print(f"{f}: {len(m)} FFMA, part and acc in one bank {same/max(1,len(m)):.0%}, all three {n2/max(1,len(m)):.0%}")
