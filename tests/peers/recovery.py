"""Goodput under one fault schedule: Everstep, torchrun (elastic restart from checkpoints) and torchft, one after another.

usage: recovery.py PROGRAM [SECONDS] [EVERY] [NODES]. A random worker is killed (SIGKILL) again and again for SECONDS, each
time after half to one and a half of EVERY seconds. Ours are on NODES nodes; the peers have two workers, their better case on two cores. It comes back
as its system does it: torchrun and Everstep's launcher start it again themselves, torchft's replicas are started again at once.
The model is that of configs/quickstart.toml, the batch too; a worker has one thread. Goodput is the share of an undisturbed
run's steps on as many workers (for the peers twice those of a run half as long); for torchft also of its samples, since it goes
on with smaller batches. First steps are waited for, so that starting is no part of it. Weights are compared by the hash of their
bits after each step that both the undisturbed and the disturbed run have made, by any worker, first time or again.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/quickstart.toml"
CHECKPOINT_EVERY = 5
# Multiply-adds a second of a node's thread, so that several nodes have the two cores' speed between them.
PACE = "5e9"
PATIENCE = 300


def sizes():
    import tomllib

    config = tomllib.loads(CONFIG.read_text())
    job = config["job"]
    return config["model"], job["lanes"] * job["micro_batches"] * job["sequences"]


def prepare():
    """The model, its optimizer, and a function that gives samples by number."""
    import torch

    from models import of_sizes

    model_sizes, global_batch = sizes()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = of_sizes(model_sizes, "grouped_mm").train()

    def batch(numbers):
        draw = lambda n: torch.randint(0, 256, (model_sizes["sequence"],), generator=torch.Generator().manual_seed(n))
        return torch.stack([draw(n) for n in numbers])

    return torch, model, torch.optim.AdamW(model.parameters(), lr=1e-3), batch, global_batch


def fingerprint(model):
    """A hash of all weights' bits."""
    bits = hashlib.sha256()
    for parameter in model.parameters():
        bits.update(parameter.detach().numpy())
    return bits.hexdigest()


class Log:
    """Lines of what happens, from several processes into one file."""

    def __init__(self, folder):
        self.file = os.open(folder / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(self, **line):
        os.write(self.file, (json.dumps(line | dict(time=time.time(), pid=os.getpid())) + "\n").encode())


def torchrun_worker(folder):
    """One worker of torchrun: DDP over gloo, a checkpoint on disk every few steps."""
    torch, model, optimizer, batch, global_batch = prepare()
    import torch.distributed as dist

    log = Log(folder)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    step, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    log.say(what="ready", rank=rank)
    mine = global_batch // world
    while True:
        first = step * global_batch + rank * mine
        x = batch(range(first, first + mine))
        optimizer.zero_grad(set_to_none=True)
        parallel(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        step += 1
        log.say(what="step", step=step, rank=rank, samples=global_batch, fingerprint=fingerprint(model))
        if step % CHECKPOINT_EVERY == 0 and rank == 0:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
            torch.save(state, folder / "checkpoint.new")
            os.replace(folder / "checkpoint.new", checkpoint)


def torchft_worker(folder):
    """One replica of torchft: its manager sums the gradients of those who are there."""
    torch, model, optimizer, batch, global_batch = prepare()
    from datetime import timedelta

    from torchft import Manager, Optimizer, ProcessGroupGloo

    rank, world = int(os.environ["REPLICA"]), int(os.environ["REPLICAS"])
    log = Log(folder)
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def load(state):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)), min_replica_size=1, init_sync=False, load_state_dict=load,
        state_dict=lambda: dict(model=model.state_dict(), optimizer=optimizer.state_dict()),
        timeout=timedelta(seconds=30), replica_id=f"replica-{rank}", rank=0, world_size=1, store_addr="localhost",
        store_port=store.port, hostname="localhost")
    managed = Optimizer(manager, optimizer)
    parameters = list(model.parameters())
    mine = global_batch // world
    log.say(what="ready", rank=rank)
    while True:
        managed.zero_grad()
        first = manager.current_step() * global_batch + rank * mine
        x = batch(range(first, first + mine))
        model(input_ids=x, labels=x).loss.backward()
        # The package's DDP wrapper ends survivors when a sum fails (0.2.0): one sum of all gradients instead.
        flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        manager.allreduce(flat).wait()
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p.grad))
        before = manager.batches_committed()
        managed.step()
        if manager.batches_committed() > before and manager.is_participating():
            log.say(what="step", step=manager.current_step(), rank=rank, samples=manager.num_participants() * mine,
                    fingerprint=fingerprint(model))


class Peer:
    """Workers of one system, and what they say."""

    def __init__(self, kind, world, folder):
        self.kind, self.world, self.folder = kind, world, folder
        self.out = open(folder / "out.txt", "wb")
        self.started, self.read, self.rest, self.lines = {}, None, b"", []
        self.environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1",
                                TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", REPLICAS=str(world))
        tools = Path(sys.executable).parent
        if kind == "torchrun":
            self.start("main", [tools / "torchrun", "--nnodes=1", f"--nproc_per_node={world}", "--max-restarts=1000",
                                "--standalone", __file__, "--torchrun-worker", folder])
        else:
            self.environment["TORCHFT_LIGHTHOUSE"] = "http://localhost:29510"
            self.start("lighthouse", [tools / "torchft_lighthouse", "--bind", "127.0.0.1:29510", "--min_replicas", "1",
                                      "--quorum_tick_ms", "100", "--join_timeout_ms", "10000"])
            for rank in range(world):
                self.replica(rank)

    def start(self, name, command, **more):
        environment = self.environment | more
        self.started[name] = subprocess.Popen([str(c) for c in command], env=environment, stdout=self.out,
                                              stderr=self.out)

    def replica(self, rank):
        self.start(rank, [sys.executable, __file__, "--torchft-worker", self.folder], REPLICA=str(rank))

    def look(self):
        path = self.folder / "log.jsonl"
        if self.read is None and path.exists():
            self.read = open(path, "rb")
        if self.read:
            *lines, self.rest = (self.rest + self.read.read()).split(b"\n")
            self.lines += [json.loads(line) for line in lines]
        for name, process in list(self.started.items()):
            if isinstance(name, int) and process.poll() is not None:
                self.replica(name)

    def steps(self):
        return [line for line in self.lines if line["what"] == "step"]

    def kill(self, rank):
        if self.kind == "torchft":
            pid = self.started[rank].pid
        else:
            ready = [line["pid"] for line in self.lines if line["what"] == "ready" and line["rank"] == rank]
            pid = ready[-1] if ready else None
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, TypeError):
            return False
        return True

    def end(self):
        for process in self.started.values():
            process.terminate()
        for process in self.started.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # A worker whose launcher had no time to end it.
        for pid in {line["pid"] for line in self.lines}:
            try:
                if str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass


def run_peer(kind, world, seconds, every):
    """Samples and fingerprints of each step made in that time, and for each kill the seconds to the next new step."""
    folder = Path(tempfile.mkdtemp())
    peer, rng, kills = Peer(kind, world, folder), random.Random(7), []
    gap = lambda: every * rng.uniform(0.5, 1.5)
    try:
        began = deadline = None
        next_kill = None
        start = time.time()
        while deadline is None or time.time() < deadline:
            peer.look()
            if began is None and peer.steps():
                began = peer.steps()[0]["time"]
                deadline, next_kill = began + seconds, began + gap() if every else None
            if began is None and time.time() > start + PATIENCE:
                raise SystemExit(f"{kind} makes no step: {(folder / 'out.txt').read_text()[-2000:]}")
            if next_kill and next_kill <= time.time() < deadline - 1:
                at = time.time()
                if peer.kill(rng.randrange(world)):
                    kills.append(at)
                next_kill += gap()
            time.sleep(0.01)
        peer.look()
        samples, fingerprints = {}, {}
        for line in peer.steps():
            if line["time"] <= deadline:
                samples[line["step"]] = line["samples"]
                fingerprints.setdefault(line["step"], set()).add(line["fingerprint"])
        waits = []
        for n, at in enumerate(kills):
            until = kills[n + 1] if n + 1 < len(kills) else deadline
            reached = max((line["step"] for line in peer.steps() if line["time"] <= at), default=0)
            new = [line["time"] - at for line in peer.steps() if at < line["time"] < until and line["step"] > reached]
            waits.append(min(new, default=None))
        return samples, fingerprints, waits
    finally:
        peer.end()
        shutil.rmtree(folder, ignore_errors=True)


def run_ours(program, nodes, seconds, every):
    """Our own bench under the same schedule."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.toml"
        plan.write_text(f'seed = 7\nkills = {int(seconds / every)}\nevery_ms = {int(every * 1000)}\ntargets = ["node"]\n')
        # Steps take some half a second: so many that the last kill is among them.
        settings = [f"run.folder={folder}/run", f"job.nodes={nodes}", f"job.pace={PACE}",
                    f"train.steps={int(seconds * 2.2)}", f'data.paths=["{ROOT}/actors/src"]']
        command = [program, "bench", "recovery", "--json", "--plan", plan, "--config", CONFIG]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:] + done.stdout)
        return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    if sys.argv[1] == "--torchrun-worker":
        return torchrun_worker(Path(sys.argv[2]))
    if sys.argv[1] == "--torchft-worker":
        return torchft_worker(Path(sys.argv[2]))
    program = Path(sys.argv[1]).resolve()
    given = [float(a) for a in sys.argv[2:5]]
    seconds, every, nodes = given + [120.0, 20.0, 4.0][len(given):]
    for line in run_ours(program, int(nodes), seconds, every):
        print(json.dumps(dict(system="everstep", nodes=int(nodes), **line)), flush=True)
    for kind in ("torchrun", "torchft"):
        # Two workers are the peers' better case on two cores.
        quiet, expected, _ = run_peer(kind, 2, seconds / 2, 0)
        samples, fingerprints, waits = run_peer(kind, 2, seconds, every)
        both = expected.keys() & fingerprints.keys()
        equal = sum(expected[step] == fingerprints[step] for step in both)
        new = sorted(w for w in waits if w is not None)
        print(json.dumps(dict(
            system=kind, workers=2, seconds=seconds, kill_every_s=every, kills=len(waits), steps=len(samples),
            goodput=len(samples) / (2 * len(quiet)), goodput_of_samples=sum(samples.values()) / (2 * sum(quiet.values())),
            fingerprints=dict(equal=equal, different=len(both) - equal),
            new_step_after_s=dict(median=statistics.median(new), longest=new[-1]) if new else None,
            no_step_before_the_next_kill=waits.count(None))), flush=True)


if __name__ == "__main__":
    main()
