"""The ranks of a run: the number of this process among them, and the collectives by which they agree.

All ranks know a table of the costs of a step; tokens go to the ranks that batch or train them, and nowhere else. Sums of
statistics and whether to continue are exchanged, too. Gradients and weights are left to the training backend.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pact_fast.distributed.serialization import decode, encode
from pact_fast.errors import PactError, error_line

SLURM_PORT = 29500  # plus the job id, so that jobs on the same node use different ports
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class PeerLost(PactError):
    """Another rank has ended, or has not answered within the timeout."""


@dataclass(frozen=True)
class World:
    """The ranks of a run. The default is a single rank, for which nothing here communicates.

    rank               number of this process, from 0
    size               number of ranks
    local_rank         number of this process on its node
    sequence_parallel  number of neighbouring ranks that share every pack
    sequence_group     process group of the ranks that share packs with this one; None without sequence parallelism
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    sequence_parallel: int = 1
    sequence_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes the run's files and logs."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Number of data-parallel replicas: groups of `sequence_parallel` ranks with packs of their own."""
        return self.size // self.sequence_parallel

    @property
    def replica(self) -> int:
        """Number of the replica that this rank belongs to."""
        return self.rank // self.sequence_parallel

    def all_gather(self, value: Any, what: str = "data") -> list[Any]:
        """The values of all ranks, by rank. `value` is anything that `encode` supports, `what` its name in errors."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)
        with self.peer_errors(what):
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(message)]))
            longest = max(int(size) for size in sizes)
            messages = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(messages, torch.nn.functional.pad(message, (0, longest - len(message))))
        return [decode(m[: int(size)].numpy().tobytes()) for m, size in zip(messages, sizes, strict=True)]

    def all_to_all(self, values: Sequence[Any], what: str = "data") -> list[Any]:
        """The values of every rank for this one, by rank. `values[r]` is for rank r, None: nothing; as for `all_gather`.

        The value for this rank itself is passed on as it is.
        """
        if self.size == 1:
            return list(values)
        nothing = b""
        messages = [nothing if value is None or r == self.rank else encode(value) for r, value in enumerate(values)]
        sizes = torch.tensor([len(message) for message in messages])
        with self.peer_errors(what):
            received_sizes = torch.empty_like(sizes)
            dist.all_to_all_single(received_sizes, sizes)
            splits = received_sizes.tolist()
            received = torch.empty(sum(splits), dtype=torch.uint8)
            sent = (
                torch.frombuffer(bytearray(b"".join(messages)), dtype=torch.uint8)
                if any(messages)
                else torch.empty(0, dtype=torch.uint8)
            )
            dist.all_to_all_single(received, sent, splits, sizes.tolist())
        parts = [part.numpy().tobytes() for part in received.split(splits)]
        return [values[r] if r == self.rank else decode(part) if part else None for r, part in enumerate(parts)]

    def gather_on_main(self, value: Any, what: str = "data") -> list[Any]:
        """The values of all ranks, by rank, on rank 0; an empty list on the others."""
        found = self.all_to_all([value if r == 0 else None for r in range(self.size)], what)
        return found if self.is_main else []

    def owner_of(self, index: int, count: int) -> int:
        """The owner rank of prompt `index` of `count`: equal blocks of consecutive prompts, one for each rank."""
        return index * self.size // count

    def broadcast_from_main(self, make: Callable[[], Any], what: str = "data") -> Any:
        """Call `make` on rank 0 only, and return its result on every rank."""
        return self.all_gather(make() if self.is_main else None, what)[0]

    def run_on_main(self, make: Callable[[], object], what: str) -> None:
        """Let rank 0 make something on disk before other ranks read it. Its PactError is raised on all ranks.

        `what` is the name of the thing in errors of the ranks that wait.
        """

        def attempt() -> str | None:
            try:
                make()
            except PactError as error:
                return str(error)
            return None

        problem = self.broadcast_from_main(attempt, what)
        if problem is not None:
            raise PactError(problem)

    def all_reduce_sum(self, values: torch.Tensor, what: str = "statistics") -> torch.Tensor:
        """The sum of `values` over all ranks, a new fp64 tensor on the CPU."""
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self.size > 1:
            with self.peer_errors(what):
                dist.all_reduce(values)
        return values

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """The sum of each count over all ranks."""
        return tuple(map(int, self.all_reduce_sum(torch.tensor(counts)).tolist()))

    def any(self, flag: bool, what: str = "whether to continue") -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag)), what) > 0)

    @contextmanager
    def peer_errors(self, what: str) -> Iterator[None]:
        """Raise PeerLost in place of the RuntimeError of a collective that failed or timed out.

        `what` is the name of the data in the message.
        """
        try:
            yield
        except RuntimeError as error:  # from gloo, NCCL or the store
            reason = error_line(error)
            raise PeerLost(
                f"rank {self.rank} of {self.size} on {socket.gethostname()} waited for {what}, but another rank has "
                f"ended or hangs ({reason}); see that rank's output for the cause, and start again with resume=auto"
            ) from error

    def close(self) -> None:
        """Destroy the process groups."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def init_world(device: str, *, timeout: float, sequence_parallel: int = 1) -> World:
    """Join the ranks that a launcher (torchrun, deepspeed, srun) has started; a single rank without a launcher.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL for tensors on GPUs, gloo for others).
        timeout: Seconds after which a rank that does not answer counts as lost.
        sequence_parallel: Number of neighbouring ranks that share every pack.

    Returns:
        The world as this rank sees it.

    Raises:
        PactError: The launcher's environment is incomplete, or `sequence_parallel` does not fit the number of ranks.
        PeerLost: Other ranks have not started within the timeout.
    """
    launcher = launcher_environment(os.environ)
    os.environ.update(launcher)  # torch, DeepSpeed and vLLM read these
    if not launcher:
        if sequence_parallel > 1:
            raise PactError(
                f"trainer.sequence_parallel_size={sequence_parallel} needs at least {sequence_parallel} ranks; start "
                f"with torchrun --nproc-per-node {sequence_parallel} -m pact_fast train …"
            )
        return World()
    rank, size, local_rank = (int(launcher[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size % sequence_parallel:
        raise PactError(
            f"trainer.sequence_parallel_size={sequence_parallel} does not divide the number of ranks, {size}"
        )
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    world = World(rank, size, local_rank, sequence_parallel)
    if not dist.is_initialized():
        with world.peer_errors("the other ranks to start"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout)
            )
    group = _sequence_group(rank, size, sequence_parallel, timeout) if sequence_parallel > 1 else None
    return World(rank, size, local_rank, sequence_parallel, group)


def _sequence_group(rank: int, size: int, sequence_parallel: int, timeout: float) -> dist.ProcessGroup | None:
    """The group of this rank. Every rank creates all groups, as `torch.distributed.new_group` requires."""
    result = None
    for first in range(0, size, sequence_parallel):
        ranks = list(range(first, first + sequence_parallel))
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
        if rank in ranks:
            result = group
    return result


def launcher_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The LAUNCHER_VARIABLES of this process, as torchrun sets them or derived from SLURM's.

    Empty without a launcher and for a launcher of a single process.
    """
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in env:
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": env.get("MASTER_PORT") or str(SLURM_PORT + int(env.get("SLURM_JOB_ID", "0")) % 10_000),
        }
    if int(env.get("WORLD_SIZE", "1")) <= 1:
        return {}
    missing = [name for name in LAUNCHER_VARIABLES if name not in env]
    if missing:
        raise PactError(f"WORLD_SIZE={env['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with torchrun")
    return {name: env[name] for name in LAUNCHER_VARIABLES}


def _first_host(nodes: str) -> str:
    """The first host name of a SLURM node list such as gpu[3-5,9]."""
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout
        return names.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise PactError(f"cannot read the SLURM node list '{nodes}' with scontrol; set MASTER_ADDR yourself") from None
