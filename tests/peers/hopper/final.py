"""The chosen variants: right, repeatable, and timed in three ways. usage: final.py check|small|repeat|time
rested:    0.1 s of rest before each timing (cold / warm medians of 20, best of 3 rounds, peer and ours in turns)
in order:  a sweep over all products of a shape, no rests
sustained: peer and ours in turns at the power limit, 0.05 s of warming and 0.05 s of timing each, mean of four"""
from common import *
import types
def load(path, upto):
    m = types.ModuleType(path); s = open(f"{HERE}/{path}").read(); exec(s[:s.index(upto)], m.__dict__); return m
argv, sys.argv = sys.argv, sys.argv[:1]
G = load("grouped.py", 'if "check" in what'); W = load("wgrad.py", 'if "check" in what')
V = {n: Variant(n) for n in ("d_256x128", "d_256x128_short", "d_128x176", "g_256x128")}; wg = W.Wgrad("w_128x128")
def choose(m, n, k):
    """The cheapest in waves times tile, weighed by what a tile of that kind costs."""
    def cost(bm, bn, weight): return -(-(-(-m // bm) * -(-n // bn)) // SMS) * bm * bn * weight
    tall = "d_256x128_short" if k < 4096 else "d_256x128"
    return min((cost(256, 128, 1), tall), (cost(128, 176, 1.06), "d_128x176"))[1]
def blockwise(a, b, sat, sb):
    m = a.shape[0]; sac = sat[:, :m].T
    for sbc in (sb.contiguous().T, sb.T.contiguous()):
        f = lambda sbc=sbc: scaled_mm(a, b.T, sac, ScalingType.BlockWise1x128, sbc, ScalingType.BlockWise128x128, output_dtype=torch.bfloat16)
        try: f(); return f
        except Exception: pass
def geo(l): return math.exp(sum(map(math.log, l))/len(l))
def sustained(fs, fl, rounds=4):
    n = max(3, int(.05*1.1e15/fl)); r = {x: [] for x in fs}
    for i in range(rounds + 1):
        for x, f in list(fs.items())[::1-2*(i % 2)]:
            for _ in range(n): f()
            e = [torch.cuda.Event(True) for _ in range(2)]; e[0].record()
            for _ in range(n): f()
            e[1].record(); torch.cuda.synchronize()
            if i: r[x].append(fl*n/e[0].elapsed_time(e[1])/1e9)
    return {x: [sum(l)/len(l)]*2 for x, l in r.items()}
def ways(label, fl, fs, extra, mine="ours"):
    """fs: peer and ours; extra: what the sweep times before them."""
    r = {}; t = {x: [] for x in fs}
    for rep in range(3):
        for x, f in list(fs.items())[::1-2*(rep % 2)]: t[x].append((timed(f, True, rest=.1), timed(f, False)))
    r["rested"] = {x: [fl/min(q[i] for q in l)/1e9 for i in (0, 1)] for x, l in t.items()}
    o = {}
    for x, f in extra[0] + [(x, f) for x, f in fs.items() if x == "peer"] + extra[1] + [("ours", fs["ours"])]: o[x] = [fl/timed(f, c)/1e9 for c in (True, False)]
    r["anchor"] = o
    r["sustained"] = sustained(fs, fl)
    print(label, *(f"| {w}: " + " ".join(f"{x} {v[0]:.0f}/{v[1]:.0f}" for x, v in d.items()) + (f" -> {d['ours'][0]/d['peer'][0]:.3f}/{d['ours'][1]/d['peer'][1]:.3f}" if "peer" in d else "") for w, d in r.items()), flush=True)
    return r
def summary(what, rs):
    for w in ("rested", "anchor", "sustained"):
        q = [[r[w]["ours"][i]/r[w]["peer"][i] for r in rs] for i in (0, 1)]
        print(f"{what} {w}: geometric mean {geo(q[0]):.3f} cold {geo(q[1]):.3f} warm, least {min(q[0]):.3f} {min(q[1]):.3f}", flush=True)
what = argv[1:]
print(torch.cuda.get_device_name(), torch.__version__, flush=True)
rnd = __import__("random"); rnd.seed(int(time.time()))
if {"check", "small", "tiny"} & set(what):
    small = "small" in what or "tiny" in what; tiny = "tiny" in what
    for s in [(77,136,256),(300,520,512)] if tiny else ragged + ([] if small else shapes):
        a, sa, sat, b, sb, d = problem(*s); ref = deq_rows(a, sa) @ deq_blocks(b, sb).T; line = []
        for n, v in V.items():
            if n[0] == "d": d.fill_(float("nan")); v(a, sat, b, sb, d)(); torch.cuda.synchronize(); line.append(f"{float((d.double()-ref).norm()/ref.norm()):.2e}")
        print("dense error", s, *line, flush=True); del ref
    for counts, n, k in [([5, 0, 0, 131, 256, 257, 1, 300], 256, 512)] if tiny else [([5, 0, 0, 131, 256, 257, 1, 300], 256, 512), ([0, 1000, 33, 0], 1000, 384)] + ([] if small else [([rnd.choice([0, rnd.randrange(600), 256, 512]) for _ in range(64)], 1024, 1024), ([rnd.randrange(9000) for _ in range(8)], 2112, 1024)]):
        a, sa, sat, b, sb, offs, d = G.make(counts, n, k); ad = deq_rows(a, sa); o = offs.tolist()
        ref = torch.cat([ad[o[g]:o[g+1]] @ deq_blocks(b[g], sb[g]).T for g in range(len(counts))])
        d.fill_(float("nan")); V["g_256x128"](a, sat, b, sb, d, offs)(); torch.cuda.synchronize()
        print("grouped error", len(counts), "groups", sum(counts), "rows", n, k, f"{float((d.double()-ref).norm()/ref.norm()):.2e}", flush=True); del ref
    for blocks, m, n in [([3], 256, 128), ([1, 0, 2, 5], 300, 200)] + ([] if small else [([rnd.randrange(14) for _ in range(16)], 2048, 1024), ([33, 31], 2112, 512)]):
        a, sa, b, sb, sat, sbt, offs, d = W.make(blocks, m, n); ad, bd, o = deq_rows(a, sa), deq_rows(b, sb), [128*int(i) for i in offs]
        prod = torch.stack([ad[:, o[g]:o[g+1]] @ bd[:, o[g]:o[g+1]].T for g in range(len(blocks))]); e = d.clone(); wg(a, sat, b, sbt, e, offs)(); torch.cuda.synchronize()
        print("wgrad error", len(blocks), "groups", sum(blocks), "blocks", m, n, f"{float((e.double()-d.double()-prod).norm()/prod.norm()):.2e}", flush=True)
if "repeat" in what:
    a, sa, sat, b, sb, d = problem(4096, 2112, 7168)
    def same(f, d, fresh=lambda: None):
        fresh(); f(); first = d.clone(); bad = torch.zeros((), dtype=torch.int64, device=dev); i = torch.int16 if d.dtype == torch.bfloat16 else torch.int32
        for _ in range(1000): fresh(); f(); bad += (d.view(i) != first.view(i)).sum()
        return int(bad), first
    for n, v in V.items():
        if n[0] != "d": continue
        bad, first = same(v(a, sat, b, sb, d), d, lambda: d.fill_(float("nan"))); r = 1234; d1 = torch.empty(1, 2112, device=dev, dtype=torch.bfloat16)
        v(a[r:r+1].contiguous(), sat[:, r:r+1].expand(-1, 4).contiguous(), b, sb, d1)(); torch.cuda.synchronize()
        print("repeat 1000", n, "different elements", bad, "| a row alone is equal:", torch.equal(d1[0], first[r]), flush=True)
    a, sa, sat, b, sb, offs, d = G.make([rnd.randrange(700) for _ in range(24)], 1024, 1024)
    print("repeat 1000 grouped: different elements", same(V["g_256x128"](a, sat, b, sb, d, offs), d, lambda: d.fill_(float("nan")))[0], flush=True)
    a, sa, b, sb, sat, sbt, offs, d = W.make([3, 0, 7, 1, 12, 30], 2048, 1024); e = d.clone()
    print("repeat 1000 wgrad: different elements", same(wg(a, sat, b, sbt, e, offs), e, lambda: e.copy_(d))[0], flush=True)
if "time" in what:
    rs = []
    for s in shapes:
        m, n, k = s; a, sa, sat, b, sb, d = problem(*s); name = choose(*s); fl = 2*m*n*k; one = torch.ones((), device=dev)
        x, w = (torch.randn(i, k, device=dev, dtype=torch.bfloat16) for i in (m, n))
        rs.append(ways(f"dense {s} {name}", fl, {"peer": blockwise(a, b, sat, sb), "ours": V[name](a, sat, b, sb, d)},
            ([("bf16", lambda: x@w.T)], [("tensorwise", lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))])))
        del a, b, d, x, w
    summary("dense", rs); rs = []
    for g, mg, n, k in [(8,4096,6144,7168),(8,4096,7168,3072),(8,4096,4096,4096),(8,4096,4096,2048),(64,1536,1024,2048),(64,1536,2048,512)]:
        a, sa, sat, b, sb, offs, d = G.make([mg]*g, n, k); ends = offs[1:].contiguous(); s1, s2 = torch.ones(g*mg, device=dev), torch.ones(g, n, device=dev)
        x, w = torch.randn(g*mg, k, device=dev, dtype=torch.bfloat16), torch.randn(g, n, k, device=dev, dtype=torch.bfloat16)
        rs.append(ways(f"grouped {(g, mg, n, k)}", 2*g*mg*n*k, {"peer": lambda: torch._scaled_grouped_mm(a, b.transpose(1, 2), s1, s2, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True),
            "ours": V["g_256x128"](a, sat, b, sb, d, offs)}, ([("bf16", lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends))], [])))
        del a, b, d, x, w
    summary("grouped", rs)
    for g, m, n, kg in [(8,7168,2048,4096),(8,4096,7168,4096),(64,2048,1024,1536)]:
        a, sa, b, sb, sat, sbt, offs, d = W.make([kg//128]*g, m, n)
        ways(f"wgrad {(g, m, n, kg)}", 2*g*m*n*kg, {"ours": wg(a, sat, b, sbt, d, offs)}, ([], [])); del a, b, d
