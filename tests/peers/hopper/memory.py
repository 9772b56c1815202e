"""Kernels at the speed of memory: right to the last bit, repeatable, and timed against the card's copy.
usage: memory.py [check] [tiny] [all] [repeat] [time] [FOLDER]
check:  every kernel against references written here in unfused IEEE operations, on fresh random rows with zero, tiny, huge,
        infinite and NaN tiles, ragged and empty; tiny: the same on a few small shapes, for compute-sanitizer
all:    quantise over every BF16 largest magnitude and everything it divides; SwiGLU over every BF16 gate and mantissa beside it
repeat: 1,000 runs on one input, with the results poisoned before each
FOLDER: every kernel against what the CPU backend made: kernels/examples/hopper_reference writes such a folder
time:   GB/s, of bytes that must be read or written, and the share of the better of cudaMemcpy and a plain copy kernel"""
import random, sys, time, torch
from statistics import median
from cuda import *
dev, bf16 = "cuda", torch.bfloat16
seed = int(time.time()); torch.manual_seed(seed); random.seed(seed)
what = sys.argv[1:] or ["check", "all", "repeat", "time"]
SMS = torch.cuda.get_device_properties(0).multi_processor_count
up = lambda a, b: -(-a // b)

class Ops:
    """The kernels as a caller launches them: one CTA for each piece of work, at least one."""
    SOURCES = {"quantise": ["quantise_rows"], "swiglu": ["swiglu", "swiglu_backward"], "norm": ["rms_norm", "rms_norm_backward"],
               "permute": ["dispatch", "scales_by_tile", "combine"], "turn": ["turn_bf16", "turn_e4m3"]}
    def __init__(self): self.k = {k: Kernel(f"{HERE}/cubin/m_{f}.cubin", k, 196608) for f, ks in self.SOURCES.items() for k in ks}
    def go(self, name, ctas, *args, threads=256, shared=0):
        k = self.k[name]; k.shared = shared
        return k.prepare(max(1, ctas), threads, *args)
    def quantise(self, x, codes, scales, power):
        r, c = x.shape
        return self.go("quantise_rows", up(up(r, 8)*(c//128), 8), x, codes, scales, r, c, scales.stride(0), power)
    def swiglu(self, g, u, h, codes, scales, power):
        r, c = g.shape
        return self.go("swiglu", up(up(r, 4)*(c//128), 8), g, u, h, codes, scales, r, c, scales.stride(0) if codes is not None else 0, power)
    def swiglu_backward(self, g, u, d, dg, du, gc, gs, uc, us, power):
        r, c = g.shape
        return self.go("swiglu_backward", up(up(r, 4)*(c//128), 8), g, u, d, dg, du, gc, gs, uc, us, r, c, gs.stride(0) if gc is not None else 0, power)
    def norm(self, x, w, y, codes, scales, power, eps):
        r, c = x.shape
        return self.go("rms_norm", up(r, 4), x, w, y, codes, scales, None, r, c, scales.stride(0) if codes is not None else 0, power, eps, threads=512, shared=4*(2*c + 32))
    def norm_backward(self, x, w, dy, dx, eps):
        r, c = x.shape; threads = min(256, max(64, 1 << (c//16 - 1).bit_length()))
        shared = 4*(2*c + 32) + 2*(32*threads + 64); resident = SMS*self.k["rms_norm_backward"].resident(threads, shared)
        return self.go("rms_norm_backward", up(r, 2), x, w, dy, dx, r, c, eps, resident, threads=threads, shared=shared)
    def dispatch(self, x, place, codes, scales, power):
        r, c = x.shape
        return self.go("dispatch", up(r*up(c//128, 8), 8), x, place, codes, scales, r, place.shape[1], c, power)
    def by_tile(self, by_row, by_tile, r):
        c = by_row.shape[1]; return self.go("scales_by_tile", up(r, 64), by_row, by_tile, r, c, by_tile.stride(0), shared=64*4*(c | 1))
    def combine(self, rows, place, weights, experts, y, group_size):
        r, c = y.shape
        return self.go("combine", up(r*up(c, 256), 8), rows, place, weights, experts, y, r, place.shape[1], c, group_size)
    def turn(self, x, offsets, blocks, codes, scales, power, given=None):
        c = x.shape[1]; ctas, groups = codes.shape[1]//128*(c//(64 if given is None else 128)), offsets.numel() - 1
        if given is None: return self.go("turn_bf16", ctas, x, offsets, blocks, groups, codes, scales, c, codes.shape[1], power)
        return self.go("turn_e4m3", ctas, x, given, offsets, blocks, groups, codes, scales, c, given.stride(0), codes.shape[1], power)

# ---- references: one rounding an operation, in the order of kernels/src ----
f32 = lambda x: torch.tensor(x, dtype=torch.float32, device=dev)
bits = lambda x: x.view(torch.int32)
def power_of_two(s): return ((bits(s) + 0x7fffff) & 0x7f800000).view(torch.float32)
def scale_of(largest, power):
    s = torch.where(largest > 1e-30, largest/f32(448).expand_as(largest), f32(1)); return power_of_two(s) if power else s
def encode(x):
    size = torch.where(x.abs() < 448, x.abs(), f32(448)); e = ((bits(size) >> 23) - 127).clamp(min=-6)
    units = (size*((3 - e + 127) << 23).view(torch.float32) + 8388608) - 8388608
    value = units*((e - 3 + 127) << 23).view(torch.float32); e = ((bits(value) >> 23) - 127).clamp(min=-6)
    code = (e + 6)*8 + (value*((3 - e + 127) << 23).view(torch.float32)).int()
    return torch.where(x.isnan(), 0x7f, code | torch.where(bits(x) < 0, 128, 0)).to(torch.uint8)
def decode(c):
    c = c.int(); e, m = c >> 3 & 15, (c & 7).float()
    v = torch.where(e == 0, m/f32(512).expand_as(m), (1 + m/f32(8).expand_as(m))*((e + 120) << 23).view(torch.float32))
    return torch.where((c & 127) == 127, f32(float("nan")), torch.where(c >= 128, -v, v))
def tiles(v, power):
    """Codes, and scales as [columns/128][rows]."""
    r, c = v.shape; t = v.float().view(r, c//128, 128)
    s = scale_of(t.abs().nan_to_num(nan=0., posinf=float("inf")).amax(2) if t.numel() else t.new_zeros(r, c//128), power)
    return encode((t/s[..., None].expand_as(t)).view(r, c)), s.T
def exp(x):
    x = torch.where(x < -87, f32(-87), x); x = torch.where(x > 88, f32(88), x)
    sh = x*f32(1.44269504) + 12582912; n = sh - 12582912; r = (x - n*f32(.6933594)) - n*f32(-2.1219444e-4); p = f32(1.3888889e-3)
    for k in (8.333334e-3, 4.1666668e-2, .16666667, .5, 1., 1.): p = p*r + f32(k)
    return p*((bits(sh) + 127) << 23).view(torch.float32)
def sigmoid(x): d = 1 + exp(-x); return f32(1).expand_as(d)/d
def swiglu(g, u): g, u = g.float(), u.float(); return ((g*sigmoid(g))*u).to(bf16)
def swiglu_backward(g, u, d):
    g, u, d = g.float(), u.float(), d.float(); s = sigmoid(g)
    return ((d*u)*(s*(1 + g*(1 - s)))).to(bf16), (d*(g*s)).to(bf16)
def sum_of(t):
    r, c = t.shape; s = torch.zeros(r, 16, device=dev); t = t.view(r, c//16, 16)
    for i in range(c//16): s = s + t[:, i]
    for w in (8, 4, 2, 1): s = s[:, :w] + s[:, w:2*w]
    return s
def inverse_root(x, eps): s = sum_of(x*x); return f32(1).expand_as(s)/torch.sqrt(s/f32(x.shape[1]).expand_as(s) + f32(eps))
def norm(x, w, eps): x = x.float(); return ((x*inverse_root(x, eps))*w).to(bf16)
def norm_backward(x, w, dy, eps):
    x, dy = x.float(), dy.float(); r = inverse_root(x, eps); s = sum_of((dy*w)*(x*r)); m = s/f32(x.shape[1]).expand_as(s)
    return (r*(dy*w - (x*r)*m)).to(bf16)
def combine(rows, place, weights, experts, size):
    t, k = place.shape; y, s = (torch.zeros(t, rows.shape[1], device=dev) for _ in range(2)); group = experts//size
    for i in range(k):
        if i: new = (group[:, i] != group[:, i-1])[:, None]; y, s = torch.where(new, y + s.to(bf16).float(), y), torch.where(new, f32(0), s)
        p = rows[place[:, i].clamp(min=0).long()].float(); p = p*weights[:, i:i+1] if weights is not None else p
        s = torch.where((place[:, i] >= 0)[:, None], s + p, s)
    return (y + s.to(bf16).float()).to(bf16)
def turn(v, counts, power):
    """Codes [columns][128 blocks] and scales [blocks][columns] of float rows."""
    c = v.shape[1]; parts = []; at = 0
    for n in counts: p = torch.zeros(up(n, 128)*128, c, device=dev); p[:n] = v[at:at+n]; parts.append(p); at += n
    return tiles(torch.cat(parts).T.contiguous(), power)

# ---- inputs ----
def wild(r, c, nan=True):
    """BF16 rows whose tiles differ by many powers of ten, some of them special."""
    x = torch.randn(r, c, device=dev)*10**(torch.rand(r, 1, device=dev)*4 - 2); t = x.view(r, c//128, 128)
    def some(p): return torch.rand(r, c//128, device=dev) < p
    t[some(.05)] = 0; t[some(.03)] *= 1e-33; t[some(.03)] *= 1e-29; t[some(.03)] *= 1e-38; t[some(.03)] *= 3e36; t[some(.03)] *= 2e20
    x[torch.rand(r, c, device=dev) < .01] = 0; x[torch.rand(r, c, device=dev) < .01] *= -0.
    if nan and r: x[random.randrange(r), random.randrange(c)] = float("inf"); x[random.randrange(r), random.randrange(c)] = float("nan"); t[random.randrange(r), random.randrange(c//128)] = float("nan")
    return x.to(bf16)
def routed(t, experts, top_k, holes=False):
    """place and expert numbers of a random choice, and the rows by expert."""
    e = torch.rand(t, experts, device=dev).topk(top_k, 1).indices.sort(1).values if t else torch.zeros(0, top_k, device=dev, dtype=torch.long)
    order = torch.argsort(e.flatten()*(t + 1) + torch.arange(t, device=dev).repeat_interleave(top_k), stable=True)
    place = torch.empty(t*top_k, device=dev, dtype=torch.int32); place[order] = torch.arange(t*top_k, device=dev, dtype=torch.int32)
    if holes: place[torch.rand(t*top_k, device=dev) < .2] = -1
    return place.view(t, top_k), e.int()
def groups(counts):
    cum = lambda l: torch.tensor([0] + list(l), device=dev).cumsum(0).int()
    return cum(counts), cum([up(n, 128) for n in counts])

# ---- results: poisoned, with a guard behind them ----
def codes_for(r, c): return torch.full((r + 3, c), 0xAA, device=dev, dtype=torch.uint8)
def scales_for(r, c): return torch.full((c//128, up(r, 4)*4 + 4), float("nan"), device=dev)
def rows_for(r, c): return torch.full((r + 3, c), -77., device=dev, dtype=bf16)
def wrong(got, want):
    """Elements whose bits differ; all NaNs are one."""
    if got.dtype == torch.uint8: return int(((got != want) & ~(((got & 127) == 127) & ((want & 127) == 127))).sum())
    i = torch.int16 if got.dtype == bf16 else torch.int32
    return int(((got.contiguous().view(i) != want.contiguous().view(i)) & ~(got.isnan() & want.isnan())).sum())
bad_total = 0
def report(name, shape, *pairs):
    """pairs: got and want; a guard has a want of None and a poison."""
    global bad_total; torch.cuda.synchronize(); n = [wrong(g, w) for g, w in pairs]; bad_total += sum(n)
    if sum(n): print("WRONG", name, shape, "elements that differ:", n, flush=True)
def guard(t, r): return t[r:], torch.full_like(t[r:], 0xAA if t.dtype == torch.uint8 else -77.)
def e4m3_pairs(v, power, codes, scales):
    r = v.shape[0]; c, s = tiles(v, power)
    return (codes[:r], c), guard(codes, r), (scales[:, :r], s), (scales[:, up(r, 4)*4:], torch.full_like(scales[:, up(r, 4)*4:], float("nan")))

def check(ops, tiny):
    shapes = [(0, 128), (3, 384), (77, 640)] if tiny else [(0, 128), (1, 128), (3, 384), (5, 1024), (8, 256), (77, 640), (130, 2048), (1001, 1152), (258, 7168)]
    for r, c in shapes:
        for power in (0, 1):
            x, codes, scales = wild(r, c), codes_for(r, c), scales_for(r, c)
            ops.quantise(x, codes, scales, power)(); report("quantise", (r, c, power), *e4m3_pairs(x, power, codes, scales))
            g, u, d = (torch.randn(r, c, device=dev).mul(4).to(bf16) if i else wild(r, c) for i in range(3)); h = rows_for(r, c); codes, scales = codes_for(r, c), scales_for(r, c)
            want = swiglu(g, u); ops.swiglu(g, u, h, codes, scales, power)(); report("swiglu", (r, c, power), (h[:r], want), guard(h, r), *e4m3_pairs(want, power, codes, scales))
            h = rows_for(r, c); ops.swiglu(g, u, h, None, None, power)(); report("swiglu plain", (r, c), (h[:r], want), guard(h, r))
            codes, scales = codes_for(r, c), scales_for(r, c); ops.swiglu(g, u, None, codes, scales, power)(); report("swiglu e4m3", (r, c), *e4m3_pairs(want, power, codes, scales))
            for d in (d, wild(r, c)):
                dg, du, gc, gs, uc, us = rows_for(r, c), rows_for(r, c), codes_for(r, c), scales_for(r, c), codes_for(r, c), scales_for(r, c); wg, wu = swiglu_backward(g, u, d)
                ops.swiglu_backward(g, u, d, dg, du, gc, gs, uc, us, power)()
                report("swiglu backward", (r, c, power), (dg[:r], wg), (du[:r], wu), guard(dg, r), guard(du, r), *e4m3_pairs(wg, power, gc, gs), *e4m3_pairs(wu, power, uc, us))
            dg, du = rows_for(r, c), rows_for(r, c); ops.swiglu_backward(g, u, d, dg, du, None, None, None, None, power)(); report("swiglu backward plain", (r, c), (dg[:r], wg), (du[:r], wu))
            gc, gs, uc, us = codes_for(r, c), scales_for(r, c), codes_for(r, c), scales_for(r, c)
            ops.swiglu_backward(g, u, d, None, None, gc, gs, uc, us, power)(); report("swiglu backward e4m3", (r, c), *e4m3_pairs(wg, power, gc, gs), *e4m3_pairs(wu, power, uc, us))
            x = wild(r, c, nan=r > 3); x[r//2:] = torch.randn_like(x[r//2:]); w = torch.randn(c, device=dev); y, codes, scales = rows_for(r, c), codes_for(r, c), scales_for(r, c)
            want = norm(x, w, 1e-6); ops.norm(x, w, y, codes, scales, power, 1e-6)(); report("norm", (r, c, power), (y[:r], want), guard(y, r), *e4m3_pairs(want, power, codes, scales))
            y = rows_for(r, c); ops.norm(x, w, y, None, None, power, 1e-6)(); report("norm plain", (r, c), (y[:r], want), guard(y, r))
            codes, scales = codes_for(r, c), scales_for(r, c); ops.norm(x, w, None, codes, scales, power, 1e-6)(); report("norm e4m3", (r, c), *e4m3_pairs(want, power, codes, scales))
            dy, dx = torch.randn(r, c, device=dev).to(bf16), rows_for(r, c)
            ops.norm_backward(x, w, dy, dx, 1e-6)(); report("norm backward", (r, c), (dx[:r], norm_backward(x, w, dy, 1e-6)), guard(dx, r))
            for k, holes in ((1, False), (8, False), (6, True), (32, False)):
                place, experts = routed(r, 32, k, holes); x, n = wild(r, c), r*k; codes, scales = codes_for(n, c), torch.full((n + 3, c//128), float("nan"), device=dev)
                wc, ws = codes.clone(), scales.clone(); q, s = tiles(x, power)
                token, to = torch.arange(r, device=dev).repeat_interleave(k), place.flatten().long(); wc[to[to >= 0]], ws[to[to >= 0]] = q[token[to >= 0]], s.T[token[to >= 0]]
                ops.dispatch(x, place, codes, scales, power)(); report("dispatch", (r, c, k, power), (codes, wc), (scales, ws))
                by_tile = scales_for(n, c); ops.by_tile(scales, by_tile, n)(); report("scales by tile", (n, c), (by_tile[:, :n], scales[:n].T), (by_tile[:, n:], torch.full_like(by_tile[:, n:], float("nan"))))
                rows, weights, y = (wild(n, c, False) if n % 2 else torch.randn(n, c, device=dev).to(bf16)), torch.rand(r, k, device=dev), rows_for(r, c)
                for weights in (weights, None):
                    ops.combine(rows, place, weights, experts, y[:r], 4)(); report("combine", (r, c, k), (y[:r], combine(rows, place, weights, experts, 4)), guard(y, r))
    lists = [([0], 128), ([1], 128), ([5, 0, 0, 131, 1], 384), ([5, 0, 256, 257, 1, 300], 384), ([0, 1000, 33, 0], 1024), ([random.choice([0, random.randrange(300), 128]) for _ in range(600)], 256), ([random.randrange(700) for _ in range(9)], 2048)]
    for counts, c in lists[:3] if tiny else lists:
        for power in (0, 1):
            n = sum(counts); x = wild(n, c); x[:, :128] = torch.randn(n, 128, device=dev); offsets, blocks = groups(counts); b = int(blocks[-1])
            for given in (None, 0, 1):
                v = x.float()
                if given is not None: q, s = tiles(torch.where(x.float().abs() > 1e25, torch.zeros_like(x), x), given); s = torch.nn.functional.pad(s, (0, 5)).contiguous(); v = decode(q)*s[:, :n].T.repeat_interleave(128, 1)
                codes, scales = torch.full((c, (b + 2)*128), 0xAA, device=dev, dtype=torch.uint8), torch.full((b + 1, c), float("nan"), device=dev)
                wc, ws = turn(v, counts, power)
                ops.turn(x if given is None else q, offsets, blocks, codes, scales, power, None if given is None else s)()
                report("turn", (len(counts), n, c, power, given), (codes[:, :b*128], wc), (codes[:, b*128:], torch.full_like(codes[:, b*128:], 0xAA)), (scales[:b], ws.contiguous()), (scales[b:], torch.full_like(scales[b:], float("nan"))))
    print("check: elements whose bits differ:", bad_total, flush=True)

def everything(ops):
    """All pairs of a BF16 largest magnitude above 1e-30 and a number from it down to where codes are 0, both signs; all gates."""
    largest = torch.arange(0x0080, 0x7f80, device=dev, dtype=torch.int32); largest = largest[(largest << 16).view(torch.float32) > 1e-30]; bad = pairs = 0
    steps = torch.arange(1, 22*128, device=dev, dtype=torch.int32); steps = torch.cat([steps, steps.new_zeros(-len(steps) % 127)]).view(-1, 127)
    for part in largest.split(2048):
        x = part[:, None, None].expand(-1, len(steps), 128).contiguous(); x[..., 1:] = (x[..., 1:] - steps).clamp(min=0)
        x[..., 1::2] |= 0x8000; x = x.short().view(bf16).view(-1, 128); r = x.shape[0]
        for power in (0, 1):
            codes, scales = codes_for(r, 128), scales_for(r, 128); ops.quantise(x, codes, scales, power)(); c, s = tiles(x, power)
            bad += wrong(codes[:r], c) + wrong(scales[:, :r], s); pairs += x.numel()
    print(f"all: {pairs} quotients of BF16 numbers, {bad} wrong", flush=True)
    gates = torch.arange(65536, device=dev, dtype=torch.int32).short().view(bf16).view(512, 128); bad = pairs = 0
    # Every mantissa of what the gate's part is multiplied by, and then random numbers of three sizes.
    each = torch.arange(0x3f80, 0x4000, device=dev, dtype=torch.int32).short().view(bf16)[:, None, None].expand(-1, 512, 128).reshape(-1, 128)
    for scale in (None, 1, 1e-30, 1e30):
        g = gates.repeat(128 if scale is None else 64, 1); n = len(g)
        u, d = (torch.randn_like(g.float()).mul(scale or 1).to(bf16) for _ in range(2)); h, dg, du = rows_for(*g.shape), rows_for(*g.shape), rows_for(*g.shape)
        d = each if scale is None else d
        ops.swiglu(g, each if scale is None else u, h, None, None, 0)(); ops.swiglu_backward(g, u, d, dg, du, None, None, None, None, 0)(); wg, wu = swiglu_backward(g, u, d)
        bad += wrong(h[:n], swiglu(g, each if scale is None else u)) + wrong(dg[:n], wg) + wrong(du[:n], wu); pairs += g.numel()
    print(f"all: every BF16 gate with every mantissa and 192 random numbers ({pairs} pairs), {bad} wrong", flush=True)

# ---- the same problems for repeat and time: inputs, a launch, what it writes, and its bytes ----
def e4m3_bytes(r, c): return r*c + r*(c//128)*4
def problems(ops, tokens, d, inner, top_k, experts, n_groups):
    rnd = lambda r, c: torch.randn(r, c, device=dev, dtype=bf16)
    def q(r, c): return torch.empty(r, c, device=dev, dtype=torch.uint8), torch.empty(c//128, up(r, 4)*4, device=dev)
    r = tokens*top_k; weight = lambda c: torch.rand(c, device=dev) + .5
    def quantise(power):
        def make(): x, (c, s) = rnd(tokens, d), q(tokens, d); return ops.quantise(x, c, s, power), [c, s], tokens*d*2 + e4m3_bytes(tokens, d)
        return make
    def norm(y, e):
        def make():
            x, (c, s), w, o = rnd(tokens, d), q(tokens, d), weight(d), torch.empty(tokens, d, device=dev, dtype=bf16)
            return ops.norm(x, w, o if y else None, c if e else None, s if e else None, 0, 1e-6), [o]*y + [c, s]*e, tokens*d*2*(1 + y) + e*e4m3_bytes(tokens, d) + 4*d
        return make
    def norm_back(): x, dy, w = rnd(tokens, d), rnd(tokens, d), weight(d); o = torch.empty_like(x); return ops.norm_backward(x, w, dy, o, 1e-6), [o], tokens*d*6 + 4*d
    def swiglu(y, e):
        def make():
            g, u, (c, s) = rnd(r, inner), rnd(r, inner), q(r, inner); o = torch.empty_like(g)
            return ops.swiglu(g, u, o if y else None, c if e else None, s if e else None, 0), [o]*y + [c, s]*e, r*inner*2*(2 + y) + e*e4m3_bytes(r, inner)
        return make
    def swiglu_back(y, e):
        def make():
            g, u, dh, (gc, gs), (uc, us) = rnd(r, inner), rnd(r, inner), rnd(r, inner), q(r, inner), q(r, inner); a, b = torch.empty_like(g), torch.empty_like(g)
            return ops.swiglu_backward(g, u, dh, *((a, b) if y else (None, None)), *((gc, gs, uc, us) if e else [None]*4), 0), [a, b]*y + [gc, gs, uc, us]*e, r*inner*2*(3 + 2*y) + 2*e*e4m3_bytes(r, inner)
        return make
    def dispatch(lay_out):
        def make():
            x, (c, t), (place, _) = rnd(tokens, d), q(r, d), routed(tokens, experts, top_k); s = torch.empty(r, d//128, device=dev); f, g = ops.dispatch(x, place, c, s, 1), ops.by_tile(s, t, r)
            return (lambda: (f(), g())) if lay_out else f, [c, s] + [t]*lay_out, tokens*d*2 + e4m3_bytes(r, d) + 4*r
        return make
    def by_tile(): s, (_, t) = torch.rand(r, d//128, device=dev), q(r, d); return ops.by_tile(s, t, r), [t], 8*r*(d//128)
    def combine():
        rows, (place, e), w = rnd(r, d), routed(tokens, experts, top_k), torch.rand(tokens, top_k, device=dev); y = torch.empty(tokens, d, device=dev, dtype=bf16)
        return ops.combine(rows, place, w, e, y, experts//n_groups), [y], r*d*2 + tokens*d*2 + 12*r
    def turned(width, given, power):
        def make():
            n, cuts = r*inner//width, sorted(random.randrange(r*inner//width) for _ in range(63)); counts = [b - a for a, b in zip([0] + cuts, cuts + [n])]
            offsets, blocks = groups(counts); b = int(blocks[-1]); codes, scales = torch.empty(width, b*128, device=dev, dtype=torch.uint8), torch.empty(b, width, device=dev)
            x = rnd(n, width); out = b*128*width + b*width*4
            if not given: return ops.turn(x, offsets, blocks, codes, scales, power), [codes, scales], n*width*2 + out
            c, s = q(n, width); ops.quantise(x, c, s, power)(); return ops.turn(c, offsets, blocks, codes, scales, power, s), [codes, scales], e4m3_bytes(n, width) + out
        return make
    return {"quantise rows": quantise(0), "quantise rows, power of two": quantise(1), "RMSNorm to E4M3": norm(0, 1), "RMSNorm to BF16 and E4M3": norm(1, 1), "RMSNorm to BF16": norm(1, 0),
            "RMSNorm backward": norm_back, "SwiGLU to E4M3": swiglu(0, 1), "SwiGLU to BF16 and E4M3": swiglu(1, 1), "SwiGLU to BF16": swiglu(1, 0),
            "SwiGLU backward to E4M3": swiglu_back(0, 1), "SwiGLU backward to BF16 and E4M3": swiglu_back(1, 1), "SwiGLU backward to BF16": swiglu_back(1, 0),
            "dispatch": dispatch(0), "scales by tile": by_tile, "dispatch, then scales by tile": dispatch(1), "combine": combine, "turn BF16": turned(inner, 0, 0), "turn E4M3": turned(inner, 1, 0), "turn E4M3, power of two": turned(inner, 1, 1),
            "turn BF16, wide": turned(d, 0, 0), "turn E4M3, wide": turned(d, 1, 0)}

def repeat(ops):
    for name, make in problems(ops, 301, 1024, 512, 8, 64, 8).items():
        f, out, _ = make(); [o.fill_(85) for o in out]; f(); first = [o.clone() for o in out]; n = torch.zeros((), dtype=torch.int64, device=dev)
        for _ in range(1000):
            for o in out: o.fill_(85)
            f()
            for o, a in zip(out, first): n += (o.view(torch.uint8) != a.view(torch.uint8)).sum()
        print("repeat 1000", name, "different bytes:", int(n), flush=True)

def rate(fs, size, n=24):
    """GB/s over launches in turns on several sets of buffers: median of five rounds."""
    for f in fs: f()
    ts = []
    for _ in range(5):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True); a.record()
        for i in range(n): fs[i % len(fs)]()
        b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b)/n)
    return size/median(ts)/1e6
def copy_rate():
    size = 1 << 29; bufs = [(torch.randint(255, (size,), device=dev, dtype=torch.uint8), torch.empty(size, device=dev, dtype=torch.uint8)) for _ in range(3)]
    def memcpy(a, b): return lambda: ok(C.cuMemcpyDtoDAsync_v2(ctypes.c_uint64(b.data_ptr()), ctypes.c_uint64(a.data_ptr()), ctypes.c_size_t(size), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)))
    k = Kernel(f"{HERE}/cubin/m_copy.cubin", "copy", 0)
    return rate([memcpy(*p) for p in bufs], 2*size), rate([k.prepare(size//(256*64), 256, *p) for p in bufs], 2*size)
def timing(ops):
    copies = copy_rate(); best = max(copies); print(f"copy: cudaMemcpy {copies[0]:.0f}, kernel {copies[1]:.0f} GB/s", flush=True)
    for name, make in problems(ops, 16384, 7168, 2048, 8, 256, 8).items():
        sets = [make() for _ in range(3)]; size = sets[0][2] if "turn" not in name else sum(s[2] for s in sets)/3
        r = rate([s[0] for s in sets], size); print(f"{name:34} {size/1e6:7.0f} MB {size/r/1e3:7.1f} us {r:6.0f} GB/s {r/best:6.1%}", flush=True); del sets
    copies = copy_rate(); print(f"copy again: cudaMemcpy {copies[0]:.0f}, kernel {copies[1]:.0f} GB/s", flush=True)

def against_cpu(ops, folder):
    """The shapes are those of kernels/examples/hopper_reference.rs."""
    r, c, k, size = 1001, 1152, 8, 4
    def read(name, dtype, *shape): return torch.frombuffer(bytearray(open(f"{folder}/{name}", "rb").read()), dtype=dtype).to(dev).view(*shape)
    x, up_, dy, w = (read(n, bf16, r, c) if n != "w" else read(n, torch.float32, c) for n in ("x", "up", "dy", "w"))
    codes, scales = codes_for(r, c), scales_for(r, c); ops.quantise(x, codes, scales, 0)()
    report("quantise against the CPU", (r, c), (codes[:r], read("codes", torch.uint8, r, c)), (scales[:, :r].T.contiguous(), read("scales", torch.float32, r, c//128)))
    y = rows_for(r, c); ops.norm(x, w, y, None, None, 0, 1e-6)(); report("norm against the CPU", (r, c), (y[:r], read("norm", bf16, r, c)))
    y = rows_for(r, c); ops.norm_backward(x, w, dy, y, 1e-6)(); report("norm backward against the CPU", (r, c), (y[:r], read("norm_backward", bf16, r, c)))
    y = rows_for(r, c); ops.swiglu(x, up_, y, None, None, 0)(); report("swiglu against the CPU", (r, c), (y[:r], read("swiglu", bf16, r, c)))
    a, b = rows_for(r, c), rows_for(r, c); ops.swiglu_backward(x, up_, dy, a, b, None, None, None, None, 0)()
    report("swiglu backward against the CPU", (r, c), (a[:r], read("dgate", bf16, r, c)), (b[:r], read("dup", bf16, r, c)))
    y, place, experts = rows_for(r, c), read("place", torch.int32, r, k), read("experts", torch.int32, r, k)
    ops.combine(read("rows", bf16, r*k, c), place, read("weights", torch.float32, r, k), experts, y[:r], size)(); report("combine against the CPU", (r, c), (y[:r], read("combine", bf16, r, c)))
    print("against the CPU backend: elements whose bits differ so far:", bad_total, flush=True)

if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, "seed", seed, flush=True)
    ops = Ops()
    if "check" in what or "tiny" in what: check(ops, "tiny" in what)
    if "all" in what: everything(ops)
    for folder in (w for w in what if "/" in w): against_cpu(ops, folder)
    if "repeat" in what: repeat(ops)
    if "time" in what: timing(ops)
    sys.exit(bad_total != 0)
