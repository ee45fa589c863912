"""`pact-fast doctor --memory` and `pact-fast plan`: estimates as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from pact_fast.config import Config
from pact_fast.errors import PactError
from pact_fast.estimate import hardware
from pact_fast.estimate.memory import MemoryEstimate, estimate, format_bytes
from pact_fast.estimate.sharding import sharding_of
from pact_fast.estimate.time import StepEstimate, default_lengths, estimate_step
from pact_fast.model.build import architecture
from pact_fast.model.device import pick_device

EXPERIMENTAL = (
    "experimental: the time estimate was compared with measured updates on CPUs only; use it to compare settings, not as a "
    "promise (docs/planning.md)"
)
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def memory_command(config: Config, world_size: int | None, zero_stage: int | None) -> int:
    """`pact-fast doctor RECIPE --memory`: print the estimated peak memory of one device.

    Args:
        config: The run's configuration.
        world_size: Devices that train together; default: 1.
        zero_stage: ZeRO stage instead of the configured one.

    Returns:
        1 if the machine has a GPU and its memory is too small, else 0.
    """
    device = pick_device(config)
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    sharding = sharding_of(config, world_size, zero_stage)
    memory = estimate(config, sharding=sharding, device=device.type, capacity=capacity)
    console = Console()
    console.print(
        f"peak on one of {sharding.devices} devices, ZeRO stage {sharding.stage}, packs of {memory.tokens:,} tokens",
        highlight=False,
    )
    console.print(memory_table(memory, "part"))
    _notes(console, memory.notes)
    if capacity is not None and memory.total > capacity:
        _notes(console, [f"it does not fit into the {format_bytes(capacity)} of this GPU"])
        return 1
    return 0


def plan_command(
    config: Config,
    *,
    gpus: Sequence[int],
    gpu: str,
    zero_stage: int | None,
    prompt: int | None,
    trace: int | None,
    response: int | None,
) -> int:
    """`pact-fast plan RECIPE`: print estimated time, memory and communication of a training step.

    Args:
        config: The run's configuration.
        gpus: Devices that train and sample; several numbers are compared.
        gpu: A name in `hardware.NAMES`; "this": measure this machine.
        zero_stage: ZeRO stage instead of the configured one.
        prompt: Tokens of a prompt; default: the limit of the settings. The same for the next two.
        trace: Tokens of an expert trace.
        response: Tokens of a rollout.
    """
    for name, value in (*(("--gpus", number) for number in gpus), ("--prompt", prompt), ("--response", response)):
        if value is not None and value < 1:
            raise PactError(f"{name} {value}: give an integer of at least 1")
    if trace is not None and trace < 0:
        raise PactError(f"--trace {trace}: give the number of tokens of an expert trace, 0 for none")
    if gpu == "this":
        dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
        device = hardware.measured(architecture(config.model), dtype, config.trainer.pack_tokens)
    else:
        device = hardware.named(gpu)
    lengths = default_lengths(config, prompt, trace, response)
    steps = {n: estimate_step(config, device, lengths, sharding_of(config, n, zero_stage), n) for n in gpus}
    if len(steps) > 1:
        _print_comparison(Console(), steps)
        return 0
    for number, step in steps.items():
        _print_plan(Console(), step, number)
    return 0


def memory_table(memory: MemoryEstimate, title: str) -> Table:
    """Bytes and fraction of each part of the peak; parts below 0.1 % are left out."""
    table = Table()
    table.add_column(title)
    table.add_column("size", justify="right")
    table.add_column("fraction", justify="right")
    for name, size in memory.parts.items():
        if size > memory.total / 1000:
            table.add_row(name, format_bytes(size), f"{size / memory.total:.0%}")
    table.add_section()
    table.add_row("total", format_bytes(memory.total), "")
    return table


def time_table(step: StepEstimate) -> Table:
    """Amount, rate, seconds and fraction of each part of a step."""
    table = Table(title="one training step (experimental)")
    for name in ("phase", "part"):
        table.add_column(name)
    for name in ("amount", "rate", "seconds", "fraction"):
        table.add_column(name, justify="right")
    for part in step.parts:
        fraction = f"{part.seconds / step.seconds:.0%}"
        measured = part.unit == "s"  # elsewhere, as seconds
        amount, rate = ("", "") if measured else (_short(part.amount, part.unit), _short(part.rate, part.unit + "/s"))
        table.add_row(part.phase, part.name, amount, rate, f"{part.seconds:.3g}", fraction)
    table.add_section()
    table.add_row("", "total", "", "", f"{step.seconds:.3g}", "")
    return table


def _print_plan(console: Console, step: StepEstimate, gpus: int) -> None:
    lengths, bottleneck = step.lengths, step.bottleneck
    console.print(
        f"{gpus} × {step.hardware.name}; prompts of {lengths.prompt} tokens, traces of {lengths.trace}, {lengths.rollouts} "
        f"rollouts of {lengths.response}\n{step.tokens:,.0f} decoder tokens per step, {step.unshared:,.0f} without shared "
        "prefixes",
        highlight=False,
    )
    console.print(time_table(step))
    console.print(
        f"bottleneck: {bottleneck.phase}, {bottleneck.name}: {bottleneck.seconds / step.seconds:.0%} of the step",
        highlight=False,
    )
    console.print(memory_table(step.memory, f"peak on one device of {format_bytes(step.hardware.capacity)}"))
    _notes(console, [EXPERIMENTAL, step.hardware.source, *step.memory.notes, *step.notes])


def comparison_table(steps: Mapping[int, StepEstimate]) -> Table:
    """Seconds of each part of a step, and their fractions of it, for several numbers of devices."""
    table = Table(title="seconds of one training step (experimental)")
    table.add_column("phase")
    table.add_column("part")
    for number in steps:
        table.add_column(f"{number} devices", justify="right")
    found = [{(part.phase, part.name): part.seconds for part in step.parts} for step in steps.values()]
    names = dict.fromkeys(name for parts in found for name in parts)  # the parts depend on the number of devices
    for name in names:
        cells = [
            f"{parts[name]:.3g} ({parts[name] / step.seconds:.0%})" if name in parts else ""
            for parts, step in zip(found, steps.values(), strict=True)
        ]
        table.add_row(*name, *cells)
    table.add_section()
    table.add_row("", "total", *(f"{step.seconds:.3g}" for step in steps.values()))
    return table


def _print_comparison(console: Console, steps: Mapping[int, StepEstimate]) -> None:
    first = next(iter(steps.values()))
    lengths = first.lengths
    console.print(
        f"{first.hardware.name}; prompts of {lengths.prompt} tokens, traces of {lengths.trace}, {lengths.rollouts} "
        f"rollouts of {lengths.response}; the same {first.tokens:,.0f} decoder tokens per step on all devices together",
        highlight=False,
    )
    console.print(comparison_table(steps))
    for number, step in steps.items():
        part = step.bottleneck
        console.print(
            f"{number} devices: bottleneck {part.phase}, {part.name}; {format_bytes(step.memory.total)} of "
            f"{format_bytes(step.hardware.capacity)} on one device",
            highlight=False,
        )
    notes = [EXPERIMENTAL, first.hardware.source, *(note for step in steps.values() for note in step.notes)]
    _notes(console, list(dict.fromkeys(notes)))


def _notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False)


def _short(value: float, unit: str) -> str:
    """`1.25 TFLOP`: three digits with an SI prefix."""
    for size, prefix in UNITS:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
