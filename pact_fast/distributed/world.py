"""The processes of a run: which one this is, and what all of them have to agree on.

Every process computes the same plan from the same rollouts, so little is said between them: rollouts once a step,
sums of statistics, and whether all go on. Gradients and weights are the back-end's business.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pact_fast.distributed.serialization import decode, encode
from pact_fast.errors import PactError

SLURM_PORT = 29500
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class PeerLost(PactError):
    """Another process of the run has ended, or has not answered within the deadline."""


@dataclass(frozen=True)
class World:
    """`size` processes, of which `sequence_parallel` neighbours share every pack; this one is `rank`.

    The default is a run of one process, for which nothing here communicates.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    sequence_parallel: int = 1
    sequence_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """The one process that writes the run's files and speaks to the user."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Groups of processes that work on packs of their own."""
        return self.size // self.sequence_parallel

    @property
    def replica(self) -> int:
        return self.rank // self.sequence_parallel

    def all_gather(self, value: Any, what: str = "data") -> list[Any]:
        """Everybody's value (see `wire.encode`), by rank, for everybody."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)
        with self.deadline(what):
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(mine)]))
            longest = max(int(size) for size in sizes)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        return [decode(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def broadcast_from_main(self, make: Callable[[], Any], what: str = "data") -> Any:
        """What `make` returns in the lead process, for everybody; it runs nowhere else."""
        return self.all_gather(make() if self.is_main else None, what)[0]

    def all_reduce_sum(self, values: torch.Tensor, what: str = "statistics") -> torch.Tensor:
        """Sum over the processes (fp64, on the CPU)."""
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self.size > 1:
            with self.deadline(what):
                dist.all_reduce(values)
        return values

    def any(self, flag: bool, what: str = "whether to go on") -> bool:
        return bool(self.all_reduce_sum(torch.tensor(float(flag)), what) > 0)

    def wait(self, what: str) -> None:
        """Until everybody is here."""
        self.any(False, what)

    @contextmanager
    def deadline(self, what: str) -> Iterator[None]:
        """Names the peer's fault where a collective call fails or takes too long."""
        try:
            yield
        except RuntimeError as error:  # gloo's, NCCL's and the store's
            reason = " ".join(str(error).split())[:200]
            raise PeerLost(
                f"process {self.rank} of {self.size} on {socket.gethostname()} waited for {what}, but another process has "
                f"ended or hangs ({reason}); its own output says why. Start again with resume=auto"
            ) from error

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def init_world(device: str, *, timeout: float, sequence_parallel: int = 1) -> World:
    """The world that the launcher (torchrun, deepspeed, srun) has made; one process without a launcher.

    `timeout`: seconds after which a peer that does not answer counts as lost.
    """
    found = _launched(os.environ)
    os.environ.update(found)  # torch, DeepSpeed and vLLM look there
    if not found:
        if sequence_parallel > 1:
            raise PactError(
                f"trainer.sequence_parallel_size={sequence_parallel} needs so many processes; start with torchrun "
                f"--nproc-per-node {sequence_parallel} -m pact_fast train …"
            )
        return World()
    rank, size, local_rank = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size % sequence_parallel:
        raise PactError(
            f"trainer.sequence_parallel_size={sequence_parallel} does not divide the number of processes, {size}"
        )
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    world = World(rank, size, local_rank, sequence_parallel)
    if not dist.is_initialized():
        with world.deadline("the other processes to start"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout)
            )
    group = None
    for first in range(0, size, sequence_parallel) if sequence_parallel > 1 else ():
        ranks = list(range(first, first + sequence_parallel))
        made = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
        group = made if rank in ranks else group
    return World(rank, size, local_rank, sequence_parallel, group)


def _launched(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process, as torchrun sets them and SLURM implies them.
    Empty without a launcher; a launcher's one process counts as none.
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
    missing = [name for name in LAUNCHED if name not in env]
    if missing:
        raise PactError(f"WORLD_SIZE={env['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with torchrun")
    return {name: env[name] for name in LAUNCHED}


def _first_host(nodes: str) -> str:
    """The first name of a SLURM node list such as gpu[3-5,9]."""
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout
        return names.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise PactError(f"cannot read the SLURM node list '{nodes}' with scontrol; set MASTER_ADDR yourself") from None
