"""Checks and times the grouped product against torch._scaled_grouped_mm (row-wise scales). usage: grouped.py [check] [time] NAME..."""
from common import *
names = [a for a in sys.argv[1:] if "_" in a]; what = [a for a in sys.argv[1:] if "_" not in a] or ["check", "time"]
vs = {n: Variant(n) for n in names}
def make(counts, n, k):
    G, m = len(counts), sum(counts)
    a, sa = q_rows(torch.randn(max(m, 1), k, device=dev)*torch.rand(max(m, 1), 1, device=dev).add(.1))
    qs = [q_blocks(torch.randn(n, k, device=dev)*torch.rand(n, 1, device=dev).add(.1)) for _ in range(G)]
    b, sb = torch.stack([q for q, _ in qs]), torch.stack([s for _, s in qs])
    sat = torch.zeros(k//128, (m+3)//4*4, device=dev); sat[:, :m] = sa.T
    offs = torch.tensor([0] + list(counts), device=dev, dtype=torch.int32).cumsum(0).int()
    return a, sa, sat, b, sb, offs, torch.full((m, n), float("nan"), device=dev, dtype=torch.bfloat16)
if "check" in what:
    import random; random.seed(int(time.time()))
    cases = [([5, 0, 0, 131, 256, 257, 1, 300], 256, 512), ([0, 1000, 33, 0], 1000, 384), ([256]*4, 2048, 512), ([0, 0, 7], 136, 128)]
    cases += [([random.choice([0, random.randrange(600), 256, 512]) for _ in range(64)], 1024, 1024), ([random.randrange(9000) for _ in range(8)], 2112, 1024)]
    if "CASE" in os.environ: c = [int(x) for x in os.environ["CASE"].split(",")]; cases = [(c[2:], c[0], c[1])]
    for counts, n, k in cases:
        a, sa, sat, b, sb, offs, d = make(counts, n, k); line = []
        ad = deq_rows(a, sa); o = offs.tolist(); ref = torch.cat([ad[o[g]:o[g+1]] @ deq_blocks(b[g], sb[g]).T for g in range(len(counts))])
        for x, v in vs.items():
            d.fill_(float("nan")); v(a, sat, b, sb, d, offs)(); torch.cuda.synchronize()
            line.append(f"{float((d.double()-ref).norm()/ref.norm()):.2e}")
        print("error", len(counts), "groups", sum(counts), "rows", n, k, *line, flush=True); del ad, ref
if "time" in what:
    tab = []
    for G, mg, n, k in [(8,4096,6144,7168),(8,4096,7168,3072),(8,4096,4096,4096),(8,4096,4096,2048),(64,1536,1024,2048),(64,1536,2048,512)]:
        a, sa, sat, b, sb, offs, d = make([mg]*G, n, k); fl = 2*G*mg*n*k
        s1, s2, ends = torch.ones(G*mg, device=dev), torch.ones(G, n, device=dev), offs[1:].contiguous()
        peer = lambda: torch._scaled_grouped_mm(a, b.transpose(1, 2), s1, s2, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)
        fs = {x: v(a, sat, b, sb, d, offs) for x, v in vs.items()}; r = {x: [] for x in ["peer", *fs]}
        for rep in range(2):
            for x, f in (list({"peer": peer, **fs}.items()))[::1-2*rep]: r[x].append((timed(f, True, 10, rest=.1), timed(f, False, 10)))
        t = {x: tuple(fl/min(q[i] for q in l)/1e9 for i in (0, 1)) for x, l in r.items()}; p = t["peer"]
        print((G, mg, n, k), f"peer {p[0]:.0f}/{p[1]:.0f}", *(f"| {x} {c:.0f}/{w:.0f} {c/p[0]:.3f}/{w/p[1]:.3f}" for x, (c, w) in t.items() if x != "peer"), flush=True)
        tab.append({x: (c/p[0], w/p[1]) for x, (c, w) in t.items() if x != "peer"}); del a, b, d, fs, sat
    for x in vs: print("geomean", x, *(f"{math.exp(sum(math.log(t[x][i]) for t in tab)/len(tab)):.3f}" for i in (0, 1)))
