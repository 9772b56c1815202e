"""The whole comparison with the installed transformers: usage: live.py PROGRAM [SEED].

Makes fresh fixtures, runs tests/tests/conformance.rs on them, then exports each model in every precision and
loads it with transformers: no key missing or unexpected, logits close to ours (for FP8, to ours of what was
exported). The modules of multi-token prediction come out as they went in, beside a model that loads.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from models import MODELS
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, FineGrainedFP8Config

# The bar. In bf16 nothing is lost either: the weights of the models are exact in it.
LIMIT = 1e-4


def everstep(*arguments, folder="."):
    subprocess.run([*map(str, arguments)], cwd=folder, check=True)


def load(folder, **more):
    """The model, if no key is missing or unexpected."""
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **more)
    wrong = {k: v for k, v in info.items() if v}
    assert not wrong, f"{folder}: {wrong}"
    return model


def exports(program, fixture, work):
    """Every precision of one model."""
    name, tokens = fixture.name, fixture / "tokens.json"

    def imported(source, run):
        places = "--set", f"run.folder={run}", "--set", f"data.cache={work / 'cache'}"
        everstep(program, "import", source, "run.toml", *places, folder=fixture)
        everstep(program, "logits", run, "--tokens", tokens, "--out", f"{run}.safetensors")
        return safetensors.torch.load_file(f"{run}.safetensors")["logits"]

    one = work / name
    ours = imported(".", one)
    for precision in ["f32", "bf16", "fp8"]:
        exported = work / f"{name}-{precision}"
        everstep(program, "export", one, exported, "--precision", precision)
        if precision == "fp8":
            ours = imported(exported, work / f"{name}-again")
        # Without a GPU for its kernels, transformers widens what is in FP8.
        widen = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if precision == "fp8" else {}
        model = load(exported, **widen)
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor(json.loads(tokens.read_text()))).logits
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"{name} {precision}: all keys, largest relative difference of logits {error:.1e}")
        assert error < LIMIT, f"{name} {precision}: {error}"
    ids = AutoTokenizer.from_pretrained(work / f"{name}-f32")("a text, ünd more")["input_ids"]
    assert ids == list("a text, ünd more".encode()), ids


def prediction(program, fixture, work):
    """A model with multi-token prediction."""
    run, exported = work / "prediction", work / "prediction-f32"
    everstep(program, "import", ".", "run.toml", "--set", f"run.folder={run}", folder=fixture)
    everstep(program, "export", run, exported, "--precision", "f32")
    load(exported)
    wanted = safetensors.torch.load_file(fixture / "mtp.safetensors")
    got = safetensors.torch.load_file(exported / "mtp-00001-of-00001.safetensors")
    # The published layout has the embedding and the head, which are the model's, once more.
    main = safetensors.torch.load_file(exported / "model-00001-of-00001.safetensors")
    at = f"model.layers.{MODELS['plain']['num_hidden_layers']}."
    wanted[f"{at}embed_tokens.weight"] = main["model.embed_tokens.weight"]
    wanted[f"{at}shared_head.head.weight"] = main["lm_head.weight"]
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in wanted)
    print(f"prediction: all keys, {len(wanted)} tensors of the module as they were")


def main():
    program = os.path.abspath(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time()) % 100_000
    here = Path(__file__).parent
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        fixtures, work = Path(folder) / "fixtures", Path(folder) / "work"
        subprocess.run([sys.executable, here / "fixtures.py", fixtures, program, str(seed)], check=True)
        run = ["cargo", "nextest", "run", "-p", "everstep-tests", "--test", "conformance", "--no-capture"]
        subprocess.run(run, env=os.environ | {"EVERSTEP_FIXTURES": str(fixtures)}, check=True, cwd=here)
        work.mkdir()
        for name in MODELS:
            exports(program, fixtures / name, work)
        prediction(program, fixtures / "prediction", work)


main()
