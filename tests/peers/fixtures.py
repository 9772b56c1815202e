"""Makes what `tests/tests/conformance.rs` compares with: usage: fixtures.py OUT PROGRAM [SEED].

OUT/MODEL: a Hugging Face folder, run.toml, tokens.json and expected.safetensors (logits in fp32), and
losses.json: the losses of AdamW steps on the samples that PROGRAM (the everstep program) takes in the same
steps; OUT/gates.json: choices of DeepseekV3TopkRouter; OUT/prediction: a model with multi-token prediction,
and the loss of that in the first step.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from models import MODELS, SEQUENCE, fill, make, toml
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter


RATE, WARMUP = 1e-3, 10
# Steps of AdamW. Where two experts of a token are equal but for the last bits, two programs may choose
# differently, and from there on train two models, 1e-3 to 5e-3 apart. With many layers and choices ("groups") that
# happens within a hundred steps for every second seed; with "direct" for none of eight; "dense" has no choice.
STEPS = {"direct": 100, "dense": 100}
FEW = 12


def text(folder):
    """A text with some structure, of numbers alone."""
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("0123456789+-*="), rng.integers(2, 7))) for _ in range(40)]
    (folder / "text.txt").write_text("".join(words[i] + " " for i in rng.integers(0, 40, 4000)))


def save(model, folder, dtype):
    """As `transformers` writes it. A copy: a model that was in bf16 once has lost its rotary frequencies."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def reference(name, folder, program, seed):
    """A model, its logits of random tokens, and what training makes of its losses."""
    model = make(name, seed)
    save(model, folder, torch.float32 if name == "plain" else torch.bfloat16)
    tokens = torch.randint(0, MODELS[name]["vocab_size"], (2, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    safetensors.torch.save_file({"logits": expected.contiguous()}, folder / "expected.safetensors")
    text(folder)
    steps = STEPS.get(name, FEW)
    (folder / "run.toml").write_text(toml(name, "run", "text.txt", steps=steps, lr=RATE, warmup=WARMUP, sequences=4))
    losses = training(model, taken(folder, program, f"1..{steps + 1}"))
    (folder / "losses.json").write_text(json.dumps(losses))


def gates(path, seed):
    """Scores of several kinds: random, all biased below zero, tied, few groups."""
    rng = torch.Generator().manual_seed(seed)
    cases = []
    for kind, experts, top_k, groups, kept in [
        ("random", 32, 8, 8, 4), ("random", 16, 4, 4, 2), ("random", 12, 3, 1, 1), ("few groups", 8, 2, 2, 1),
        ("negative bias", 32, 8, 8, 4), ("negative bias", 16, 6, 4, 2), ("ties", 16, 4, 4, 2), ("ties", 32, 8, 8, 4),
        ("one far ahead", 16, 4, 4, 2),
    ]:
        config = transformers.DeepseekV3Config(
            hidden_size=experts, n_routed_experts=experts, num_experts_per_tok=top_k, n_group=groups, topk_group=kept,
            routed_scaling_factor=2.5, norm_topk_prob=True)
        router = DeepseekV3TopkRouter(config)
        x = 2 * torch.randn(64, experts, generator=rng)
        bias = 0.3 * torch.randn(experts, generator=rng)
        if kind == "ties":
            x, bias = x.round(), bias * 0
        if kind == "negative bias":
            bias -= 3
        if kind == "one far ahead":
            x[:, 5], bias[7] = 40, -30
        with torch.no_grad():
            router.weight.copy_(torch.eye(experts))
            router.e_score_correction_bias.copy_(bias)
            _, weights, chosen = router(x)
        cases.append(dict(kind=kind, experts=experts, top_k=top_k, groups=groups, kept=kept, logits=x.tolist(),
                          bias=bias.tolist(), chosen=chosen.tolist(), weights=weights.tolist()))
    path.write_text(json.dumps(cases))


def training(model, samples):
    """Losses of steps of AdamW in PyTorch."""
    matrices = [p for n, p in model.named_parameters() if "norm" not in n]
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    model.train()
    losses = []
    for step in sorted(samples):
        tokens = torch.tensor([t for t, _ in samples[step]]).view(-1, SEQUENCE)
        targets = torch.tensor([t for _, t in samples[step]]).view(-1)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / WARMUP)
        optimizer.zero_grad()
        out = model(input_ids=tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(out, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def published(state, layer):
    """Tensors of an MtpModel under the names of the published checkpoint."""
    out = {}
    for name, value in state.items():
        name = name.removeprefix("layers.0.").removeprefix("mtp_block.")
        name = {"post_norm.weight": "shared_head.norm.weight"}.get(name, name)
        at = f"model.layers.{layer}."
        if name.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            for e in range(value.shape[0]):
                out[f"{at}mlp.experts.{e}.gate_proj.weight"] = value[e, :half].contiguous()
                out[f"{at}mlp.experts.{e}.up_proj.weight"] = value[e, half:].contiguous()
        elif name.endswith("experts.down_proj"):
            for e in range(value.shape[0]):
                out[f"{at}mlp.experts.{e}.down_proj.weight"] = value[e].contiguous()
        else:
            out[at + name] = value.contiguous()
    return out


def prediction(folder, program, seed):
    """The loss of the module of multi-token prediction in the first step."""
    from transformers.modeling_layers import MtpModel

    model = make("plain", seed)
    layers = MODELS["plain"]["num_hidden_layers"]
    mtp = MtpModel(model, 1).eval()
    fill(mtp.layers)
    save(model, folder, torch.float32)
    own = {k: v for k, v in mtp.state_dict().items() if k.startswith("layers.")}
    safetensors.torch.save_file(published(own, layers), folder / "mtp.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(num_nextn_predict_layers=1), indent=1))
    text(folder)
    over = dict(steps=1, sequences=4)
    (folder / "run.toml").write_text(toml("plain", "run", "text.txt", **over).replace("[model]", "[model]\nmtp = 1"))
    losses = []
    for tokens, targets in taken(folder, program, "1..2")[1]:
        tokens, targets = (torch.tensor(t).view(-1, SEQUENCE) for t in (tokens, targets))
        with torch.no_grad():
            hidden = model.model(input_ids=tokens).last_hidden_state
            positions = torch.arange(SEQUENCE).expand_as(tokens)
            out = mtp.shared_head(mtp.forward_layer(0, hidden, positions, None, input_ids=targets))
        losses.append(torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), targets[:, 1:].flatten()))
    (folder / "loss.json").write_text(json.dumps(torch.stack(losses).mean().item()))


def taken(folder, program, steps):
    """Samples of our program by step: (tokens, targets) of each micro-batch."""
    subprocess.run([program, "import", ".", "run.toml"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    out = subprocess.run([program, "samples", "run", "--steps", steps], cwd=folder, check=True, capture_output=True)
    subprocess.run(["rm", "-r", "run", "cache"], cwd=folder, check=True)
    found = {}
    for line in out.stdout.splitlines():
        item = json.loads(line)
        found.setdefault(item["step"], []).append((item["tokens"], item["targets"]))
    return found


def main():
    out, program = Path(sys.argv[1]), os.path.abspath(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    out.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(MODELS):
        (out / name).mkdir(exist_ok=True)
        reference(name, out / name, program, seed + n)
    gates(out / "gates.json", seed + 20)
    (out / "prediction").mkdir(exist_ok=True)
    prediction(out / "prediction", program, seed + 40)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, safetensors, np)} | {"seed": seed}
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


main()
