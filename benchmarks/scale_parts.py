"""The parts that `benchmarks.scale` measures."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MB = 1 << 20


class Measured(NamedTuple):
    """Seconds of CPU time at a size, and further numbers by name."""

    size: int
    seconds: float
    more: dict[str, float]


class Part(NamedTuple):
    """Sizes in ascending order, and the function that measures one."""

    sizes: tuple[int, ...]
    measure: Callable[[int], Measured]


def timed(call: Callable[[], Any]) -> float:
    """Seconds of CPU time."""
    began = time.process_time()
    call()
    return time.process_time() - began


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


RANKS = {64: 64, 256: 64, 512: 512, 1024: 512}  # of a step with so many prompts


def step(prompts: int) -> Measured:
    """A step of one rank, without the model."""
    from benchmarks.scale_ranks import make_step

    before = resident_bytes()
    rank_step = make_step(prompts, RANKS.get(prompts, 64))
    rank_step(0)  # warm: imports, compiled patterns
    gc.collect()
    seconds = rank_step(1)
    return Measured(prompts, seconds, {"ranks": rank_step.world.size, "MB": (peak_bytes() - before) / MB})


def assign_packs(parts: int) -> Measured:
    """Parts of random sizes, assigned to 64 ranks."""
    from pact_fast.batch.parts import assign

    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(8, 0.7, parts), 16_000).astype(np.int64)
    table = np.stack([sizes, sizes * sizes // 2, sizes], 1)
    return Measured(parts, timed(lambda: assign(table, 16_384, 64, lambda tokens, pairs: tokens + 1e-5 * pairs)), {})


def read(rows: int) -> Measured:
    """A JSONL file whose rows are held: read, and 256 tasks drawn."""
    from pact_fast.config import DataConfig
    from pact_fast.data.sources import FileTasks

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        row = {"prompt": "What is it? " * 80, "answer": "it"}
        with path.open("w") as file:
            for index in range(rows):
                file.write(json.dumps({"id": f"t{index}", **row}) + "\n")
        before = resident_bytes()
        seconds = timed(lambda: FileTasks(DataConfig(train=str(path)), 0, ()).train(0, 256))
        return Measured(rows, seconds, {"MB": (resident_bytes() - before) / MB})


def index(rows: int) -> Measured:
    """A JSONL file whose rows are not held; see scale_rows.py."""
    from benchmarks.scale_rows import measure_rows

    return measure_rows(rows)


def start(rows: int) -> Measured:
    """A run of one step on such a file; see scale_rows.py."""
    from benchmarks.scale_rows import measure_start

    return measure_start(rows)


def rollouts(steps: int) -> Measured:
    """One step is looked up among many. The files hold 32 rollouts of 4,096 tokens each, and are links to one of them."""
    from pact_fast.report.rollout_files import write_rollout_file
    from pact_fast.report.run_data import read_run

    rng, n = np.random.default_rng(0), 4096
    words = ["".join(rng.choice(list("abcdefghij"), 4)) + " " for _ in range(3000)]
    record = {
        "step": 1, "kind": "train", "reward": 1.0, "components": [1] * n, "sampled": [1] * n, "turn_ids": [0] * n,
        "advantages": [0.5] * n, "weights": [1e-6] * n,
    }  # fmt: skip
    lines = []
    for _ in range(32):
        more = {
            "tokens": [words[i] for i in rng.zipf(1.3, n) % 3000],
            "logprobs": [float(f"{x:.4g}") for x in -rng.exponential(0.5, n)],
        }
        lines.append(json.dumps(record | more) + "\n")
    with tempfile.TemporaryDirectory() as run:
        folder = Path(run, "rollouts")
        folder.mkdir()
        compress = timed(lambda: write_rollout_file(folder, "step_000001", lines))
        first = folder / "step_000001.jsonl.gz"
        entry = json.loads((folder / "index.jsonl").read_text())
        with (folder / "index.jsonl").open("a") as index:
            for step in range(2, steps + 1):
                name = f"step_{step:06d}.jsonl.gz"
                (folder / name).hardlink_to(first)
                index.write(json.dumps(entry | {"file": name}) + "\n")
        seconds = timed(lambda: read_run(Path(run), rollouts=32, step=steps))
        report = timed(lambda: read_run(Path(run), rollouts=60))
        size = first.stat().st_size
        kept = min(steps, 200) + max(0, steps - 200) // 10
    more = {"MB/step": size / MB, "GB kept": kept * size / 2**30, "write s/step": compress, "report s": report}
    return Measured(steps, seconds, more)


def save(megabytes: int) -> Measured:
    """A checkpoint of fp32 weights and AdamW's states; seconds of CPU time per GB of weights.

    blocked  of the thread that trains, until it goes on
    copies   of the thread that writes; training waits for what is left of them when it comes to the next optimizer step
    all      of both, until the checkpoint is complete
    """
    import torch

    from pact_fast.model.shards import host_copy
    from pact_fast.train.checkpoint_writer import start_save

    count = max(1, megabytes // 16)
    tensors = {f"w{i}": torch.full((megabytes * MB // 4 // count,), float(i)) for i in range(count)}
    moments = ("exp_avg", "exp_avg_sq")
    optimizer = {f"{name}/{kind}": tensor.clone() for name, tensor in tensors.items() for kind in moments}
    live = [*tensors.values(), *optimizer.values()]
    copies = timed(lambda: [host_copy(tensor) for tensor in live])
    with tempfile.TemporaryDirectory() as folder:
        began, waited = time.process_time(), time.thread_time()
        pending = start_save(
            Path(folder), 1, tensors={"optimizer": optimizer}, weights=tensors, state={},
            write_model=lambda path: path.mkdir(), keep=1, budget=1 << 40, live=live,
        )  # fmt: skip
        blocked = time.thread_time() - waited
        pending.finish()
        total = time.process_time() - began
    gb = megabytes * MB / 1e9
    return Measured(
        megabytes, total, {"blocked s/GB": blocked / gb, "copies s/GB": copies / gb, "all s/GB": total / gb}
    )


def zero(megabytes: int) -> Measured:
    """Time for which training waits at a save under DeepSpeed ZeRO, in two processes."""
    from benchmarks.scale_zero import measure_saves

    return Measured(megabytes, *measure_saves(megabytes))


def turns(count: int) -> Measured:
    """Turns of a vLLM server, median of three clients, each with connections of its own."""
    from benchmarks.scale_turns import ROUNDS, serve_instantly, time_turns

    with serve_instantly() as url:
        rounds = [time_turns(url, count) for _ in range(ROUNDS)]
    seconds = statistics.median(taken for taken, _ in rounds)
    least, most = (1000 * found(rounds)[0] / count for found in (min, max))
    more = {"ms/turn": 1000 * seconds / count, "least": least, "most": most, "restarts": sum(n for _, n in rounds)}
    return Measured(count, seconds, more)


def tools(calls: int) -> Measured:
    """Tool calls that wait for a second, all at once, on as many workers as there may be."""
    from benchmarks.scale_turns import time_tools

    return Measured(calls, *time_tools(calls))


PARTS: dict[str, Part] = {
    "step": Part((64, 256, 512, 1024), step),
    "assign": Part((1_024, 4_096, 16_384), assign_packs),
    "read": Part((1_000, 3_000, 10_000), read),
    "index": Part((20_000, 200_000, 1_000_000), index),
    "start": Part((10_000, 100_000, 1_000_000), start),
    "rollouts": Part((50, 500, 5_000), rollouts),
    "turns": Part((64, 1_024, 8_192), turns),
    "tools": Part((64, 256), tools),
    "zero": Part((256,), zero),
    "save": Part((32, 128, 256), save),
}
