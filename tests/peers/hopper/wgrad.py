"""Checks and times the weight gradient. usage: wgrad.py [check] [time] [repeat] NAME..."""
from common import *
names = [a for a in sys.argv[1:] if "_" in a]; what = [a for a in sys.argv[1:] if "_" not in a] or ["check", "time"]
class Wgrad:
    def __init__(self, name):
        self.d = d = json.load(open(f"{HERE}/cubin/{name}.json")); st, bm, bn = d["STAGES"], d["BM"] if "BM" in d else 64*d["MATH"], d["BN"]
        self.bm = bm; self.k = Kernel(f"{HERE}/cubin/{name}.cubin", "fp8_wgrad", st*((bm+bn)*132 + 16) + min(bm*bn*4, 65536 if "BM" in d else 1 << 20) + 48)
    def __call__(self, a, sa, b, sb, d, offs):
        (m, t), n, bm, bn, g = a.shape, b.shape[0], self.bm, self.d["BN"], d.shape[0]
        ma = tensor_map(a, U8, [t, m], [t], [128, bm], 3); mb = tensor_map(b, U8, [t, n], [t], [128, bn], 3)
        md = tensor_map(d, F32, [n, m, g], [4*n, 4*n*m], [32, 64, 1], 3)
        ms, mt = tensor_map(sa, F32, [m, t//128], [4*sa.stride(0)], [bm, 1], 0), tensor_map(sb, F32, [n, t//128], [4*sb.stride(0)], [bn, 1], 0)
        return self.k.prepare(SMS, 128*(self.d.get('MATH', 2)+1), ma, mb, md, ms, mt, offs, g, m, n)
vs = {n: Wgrad(n) for n in names}
def pad(s): p = torch.zeros(s.shape[1], (s.shape[0]+3)//4*4, device=dev); p[:, :s.shape[0]] = s.T; return p
def make(blocks, m, n):
    t = max(sum(blocks), 1)*128
    (a, sa), (b, sb) = (q_rows(torch.randn(i, t, device=dev)*torch.rand(i, 1, device=dev).add(.1)) for i in (m, n))
    return a, sa, b, sb, pad(sa), pad(sb), torch.tensor([0]+list(blocks), device=dev, dtype=torch.int32).cumsum(0).int(), torch.randn(len(blocks), m, n, device=dev)
if "check" in what:
    import random; random.seed(int(time.time()))
    for blocks, m, n in [([3], 256, 128), ([1, 0, 2, 5], 300, 200), ([4, 0, 0, 1, 9], 1000, 1004), ([random.randrange(14) for _ in range(16)], 2048, 1024), ([0, 0], 64, 64), ([33, 31], 2112, 512)]:
        a, sa, b, sb, sat, sbt, offs, d = make(blocks, m, n); ad, bd, o = deq_rows(a, sa), deq_rows(b, sb), [128*int(i) for i in offs]
        prod = torch.stack([ad[:, o[g]:o[g+1]] @ bd[:, o[g]:o[g+1]].T for g in range(len(blocks))]); ref = d.double() + prod; line = []
        for x, v in vs.items():
            e = d.clone(); v(a, sat, b, sbt, e, offs)(); torch.cuda.synchronize()
            line.append(f"{float((e.double()-ref).norm()/(prod.norm()+1e-30)):.2e}" if sum(blocks) else str(bool(torch.equal(e, d))))
        print("error", len(blocks), "groups", sum(blocks), "blocks", m, n, *line, flush=True)
if "time" in what:
    for G, m, n, kg in [(8,7168,2048,4096),(8,4096,7168,4096),(64,2048,1024,1536),(1,4096,7168,4096)]:
        a, sa, b, sb, sat, sbt, offs, d = make([kg//128]*G, m, n); fl = 2*G*m*n*kg; line = []
        one = torch.ones((), device=dev); fp = torch.randn(4096, 4096, device=dev).to(torch.float8_e4m3fn)
        tw = lambda: torch._scaled_mm(fp, fp.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        line.append(f"[tensorwise 4096^3 {2*4096**3/timed(tw, True, 10, rest=.1)/1e9:.0f}]")
        for x, v in vs.items():
            f = v(a, sat, b, sbt, d, offs); l = [(timed(f, True, 10, rest=.1), timed(f, False, 10)) for _ in range(2)]
            line.append(f"| {x} " + "/".join(f"{fl/min(q[i] for q in l)/1e9:.0f}" for i in (0, 1)))
            if "TIMING" in v.d: cyc, ns = timing(v); line[-1] += f" {cyc/ns*1e3:.0f} MHz {fl/132/8192/cyc:.0%}"
        print((G, m, n, kg), *line, flush=True); del a, b, d
if "repeat" in what:
    a, sa, b, sb, sat, sbt, offs, d = make([3, 0, 7, 1, 12], 2048, 1024)
    for x, v in vs.items():
        e = d.clone(); f = v(a, sat, b, sbt, e, offs); f(); first = e.clone(); bad = torch.zeros((), dtype=torch.int64, device=dev)
        for _ in range(1000): e.copy_(d); f(); bad += (e.view(torch.int32) != first.view(torch.int32)).sum()
        print("repeat 1000", x, "different elements:", int(bad), flush=True)
