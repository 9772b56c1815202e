"""Training rate beside Hugging Face transformers, on the same cores in one run.

usage: rate.py PROGRAM small|large [STEPS]. Without a program: one variant of transformers (used by itself).
The sizes are those of configs/peers/small.toml and large.toml; 8 sequences of 256 tokens a step, AdamW.
Peers: eager or grouped experts, the better of them also compiled and in bf16 autocast. A peer that fails ends the
comparison. Beside the rates stand those that PyTorch's best matrix product would allow: the arithmetic limit.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

# Our best against the best of all peers: below this, the comparison fails.
BARS = {"small": 2.0, "large": 1.5}
ROOT = Path(__file__).parents[2]
BATCH = 8
VARIANTS = [("eager", "fp32", 0), ("grouped_mm", "fp32", 0), ("grouped_mm", "fp32", 1), ("grouped_mm", "bf16", 0),
            ("grouped_mm", "bf16", 1)]


def peer(size, experts, precision, compiled, steps):
    """One variant of transformers in this process; prints its median tokens a second."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from models import of_sizes

    m = tomllib.loads((ROOT / f"configs/peers/{size}.toml").read_text())["model"]
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = of_sizes(m, experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = torch.compile(model) if compiled else model
    rng = torch.Generator().manual_seed(1)
    times = []
    for _ in range(3 + steps):
        x = torch.randint(0, m["vocabulary"], (BATCH, m["sequence"]), generator=rng)
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = run(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - began)
    print(json.dumps(BATCH * m["sequence"] / statistics.median(times[3:])))


def peak(precision):
    """GFLOPS of PyTorch's matrix product on all cores, the better of two shapes; prints it."""
    import torch

    torch.set_num_threads(os.cpu_count())
    best = 0
    for m, k, n in [(2048, 512, 768), (2048, 2048, 2048)]:
        a, b = (torch.randn(s, dtype=getattr(torch, precision)) for s in ((m, k), (k, n)))
        times = []
        for _ in range(30):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        best = max(best, 2 * m * k * n / statistics.median(times) / 1e9)
    print(json.dumps(best))


def measured(*arguments):
    """A number from this script in a process of its own."""
    out = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"{arguments} failed:\n{out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


def ours(program, size, precision, steps):
    with tempfile.TemporaryDirectory() as folder:
        run = [program, "train", f"configs/peers/{size}.toml", "--set", f"run.folder={folder}/run", "--set",
               f"train.steps={steps + 3}", "--set", f"train.precision={precision}", "--set", 'data.paths=["actors/src"]']
        subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    return statistics.median(line["tokens_per_s"] for line in lines[3:])


def main():
    program, size = os.path.abspath(sys.argv[1]), sys.argv[2]
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 20
    rates, mine = {}, {}
    # In turns: a machine's speed drifts.
    for experts, precision, compiled in VARIANTS:
        name = f"transformers {experts} {precision}{' compiled' if compiled else ''}"
        rates[name] = measured("--peer", size, experts, precision, str(compiled), str(steps))
        print(f"{name:40} {rates[name]:10.0f} tokens/s", flush=True)
        for ours_in in ("fp32", "bf16", "fp8"):
            mine.setdefault(ours_in, []).append(ours(program, size, ours_in, steps))
    best = max(rates.values())
    plan = subprocess.run([program, "plan", f"configs/peers/{size}.toml", "--json"], cwd=ROOT, check=True, capture_output=True)
    flops = {line["key"]: line["value"] for line in map(json.loads, plan.stdout.splitlines())}["flops_per_token"]
    limits = {name: measured("--peak", dtype) * 1e9 / flops for name, dtype in [("fp32", "float32"), ("bf16", "bfloat16")]}
    for precision, limit in limits.items():
        print(f"{'limit of ' + precision:40} {limit:10.0f} tokens/s, {limit * flops / 1e9:.0f} GFLOPS of PyTorch's product")
    for precision, all_of in mine.items():
        rate = statistics.median(all_of)
        spread = f"({min(all_of):.0f} to {max(all_of):.0f})"
        share = f", {rate / limits[precision]:.0%} of the limit" if precision in limits else ""
        print(f"{'everstep ' + precision:40} {rate:10.0f} tokens/s {spread}, {rate / best:.2f} of the best peer{share}")
    lead = max(map(statistics.median, mine.values())) / best
    if lead < BARS[size]:
        sys.exit(f"{lead:.2f} of the best peer: expected {BARS[size]}")


if sys.argv[1] == "--peak":
    peak(sys.argv[2])
elif sys.argv[1] == "--peer":
    peer(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5] == "1", int(sys.argv[6]))
else:
    main()
