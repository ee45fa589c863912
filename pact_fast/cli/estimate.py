"""The estimates as tables in the terminal, and the commands behind them."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from pact_fast.config import Config
from pact_fast.errors import PactError
from pact_fast.estimate import hardware
from pact_fast.estimate.memory import Estimate, estimate, format_bytes
from pact_fast.estimate.sharding import sharding_of
from pact_fast.estimate.time import StepEstimate, default_lengths, estimate_step
from pact_fast.model.build import architecture
from pact_fast.model.device import pick_device

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def memory_command(config: Config, world_size: int | None, zero_stage: int | None) -> int:
    """`pact-fast doctor RECIPE --memory`; status 1 if the device is known and too small."""
    device = pick_device(config)
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    sharding = sharding_of(config, world_size, zero_stage)
    found = estimate(config, sharding=sharding, device=device.type, capacity=capacity)
    console = Console()
    console.print(
        f"peak on one of {sharding.devices} devices, ZeRO stage {sharding.stage}, packs of {found.tokens:,} tokens",
        highlight=False,
    )
    console.print(memory_table(found, "what"))
    _notes(console, found.notes)
    if capacity is not None and found.total > capacity:
        _notes(console, [f"it does not fit into the {format_bytes(capacity)} of this GPU"])
        return 1
    return 0


def plan_command(
    config: Config,
    *,
    gpus: int,
    gpu: str,
    zero_stage: int | None,
    prompt: int | None,
    trace: int | None,
    response: int | None,
) -> int:
    """`pact-fast plan RECIPE`."""
    for name, value in (("--gpus", gpus), ("--prompt", prompt), ("--response", response)):
        if value is not None and value < 1:
            raise PactError(f"{name} {value}: give a number of at least 1")
    if trace is not None and trace < 0:
        raise PactError(f"--trace {trace}: give the tokens of an expert trace, 0 for none")
    if gpu == "this":
        dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
        device = hardware.measured(architecture(config.model), dtype, config.trainer.pack_tokens)
    else:
        device = hardware.named(gpu)
    lengths = default_lengths(config, prompt, trace, response)
    found = estimate_step(config, device, lengths, sharding_of(config, gpus, zero_stage), gpus)
    _print_plan(Console(), found, gpus)
    return 0


def memory_table(found: Estimate, title: str) -> Table:
    table = Table()
    table.add_column(title)
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    for name, size in found.parts.items():
        if size > found.total / 1000:  # a line of 0 % says nothing
            table.add_row(name, format_bytes(size), f"{size / found.total:.0%}")
    table.add_section()
    table.add_row("together", format_bytes(found.total), "")
    return table


def time_table(found: StepEstimate) -> Table:
    table = Table()
    for name in ("one step", "part"):
        table.add_column(name)
    for name in ("amount", "rate", "seconds", "share"):
        table.add_column(name, justify="right")
    for part in found.parts:
        share = f"{part.seconds / found.seconds:.0%}"
        amount, rate = _short(part.amount, part.unit), _short(part.rate, part.unit + "/s")
        table.add_row(part.phase, part.name, amount, rate, f"{part.seconds:.3g}", share)
    table.add_section()
    table.add_row("", "together", "", "", f"{found.seconds:.3g}", "")
    return table


def _print_plan(console: Console, found: StepEstimate, gpus: int) -> None:
    lengths = found.lengths
    console.print(
        f"{gpus} × {found.hardware.name}; prompts of {lengths.prompt} tokens, traces of {lengths.trace}, {lengths.rollouts} "
        f"rollouts of {lengths.response}\n{found.tokens:,.0f} tokens of the trunk a step, {found.unshared:,.0f} without "
        "shared prefixes",
        highlight=False,
    )
    console.print(time_table(found))
    worst = found.bottleneck
    console.print(
        f"bottleneck: {worst.phase}, {worst.name}: {worst.seconds / found.seconds:.0%} of the step", highlight=False
    )
    console.print(memory_table(found.memory, f"peak on one device of {format_bytes(found.hardware.capacity)}"))
    _notes(console, [found.hardware.source, *found.memory.notes, *found.notes])


def _notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False)


def _short(value: float, unit: str) -> str:
    for size, prefix in UNITS:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
