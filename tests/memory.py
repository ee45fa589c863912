"""What torch really allocates, also inside operators of our own."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that `run` holds at once beyond those that exist already."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )  # fmt: skip
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
