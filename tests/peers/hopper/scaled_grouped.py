"""PyTorch's grouped product, timed on demand for `everstep bench grouped --torch`: reads lines of groups, rows, N and K, and answers
each with the median seconds of 20 products, as our side times its own: three to warm up, the cache emptied before each run."""
import sys
import time
from statistics import median

import torch

cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
operands = {}


def codes(*shape):
    """Random E4M3 of values within (-2, 2), as our side has them: the power that a product draws depends on them."""
    return (torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") & 0xBF).view(torch.float8_e4m3fn)


def make(groups, rows, n, k):
    """Rows of all groups with a scale each, and weights with a scale for each of their rows."""
    scales = lambda *shape: torch.rand(*shape, device="cuda") * 0.01 + 0.005
    ends = torch.arange(1, groups + 1, device="cuda", dtype=torch.int32) * rows
    return codes(groups * rows, k), codes(groups, n, k), scales(groups * rows), scales(groups, n), ends


def seconds(x, w, of_x, of_w, ends):
    def product():
        torch._scaled_grouped_mm(
            x, w.transpose(1, 2), of_x, of_w, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    for _ in range(3):
        product()
    torch.cuda.synchronize()
    events = []
    for _ in range(20):
        cache.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        product()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events) / 1e3


print(torch.__version__, flush=True)
for line in sys.stdin:
    shape = tuple(int(word) for word in line.split())
    if shape not in operands:
        # One shape's at a time: memory is shared with our side.
        operands.clear()
        torch.cuda.empty_cache()
        operands[shape] = make(*shape)
    print(seconds(*operands[shape]), flush=True)
