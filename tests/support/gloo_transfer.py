"""vLLM's NCCL weight transfer without a GPU: everything is vLLM's own, but the broadcast underneath, which is gloo's.

The trainer's side is used inside `native`; a server is started with `--worker-extension-cls` and EXTENSION. Streams, of
which a CPU has one, do nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer import nccl_common, packed_tensor
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from pact_fast.rollout.vllm import builder, process, weight_transfer
from tests.support.processes import environment

# A broadcast under way cannot be aborted, as NCCL's can. It lasts longer than the tests' rollout.engine_timeout of 10 s, which
# has to find out by itself that a server hangs.
SECONDS = timedelta(seconds=15)
EXTENSION = "tests.support.gloo_server.WeightReport"


class Group:
    """In place of vLLM's PyNcclCommunicator. The id names a port."""

    before_broadcast = staticmethod(lambda tensor: None)  # where tests inject faults
    given_up = threading.Event()

    def __init__(self, nccl_id: bytes, rank: int, size: int, device: object):
        self.seconds = SECONDS
        store = TCPStore("127.0.0.1", int(nccl_id.rstrip(b"\0")), size, rank == 0, self.seconds)
        self.store, self.gloo = store, ProcessGroupGloo(store, rank, size, self.seconds)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        self.before_broadcast(tensor)
        if self.gloo is None:  # destroyed
            return
        options = BroadcastOptions()
        options.rootRank = src
        self.gloo.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self.gloo = None
        self.given_up.set()


def free_port() -> bytes:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1]).encode().ljust(128, b"\0")


@contextlib.contextmanager
def gloo_instead_of_nccl():
    stream = SimpleNamespace(synchronize=lambda: None)
    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (weight_transfer, "new_nccl_id", free_port),
            (weight_transfer, "init_nccl_group", lambda nccl_id, size, device: Group(nccl_id, 0, size, device)),
            (nccl_common, "uid_init_process_group", Group),
            (packed_tensor, "_get_streams", lambda device, count: [stream] * count),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.accelerator, "current_device_index", lambda: 0),
            (torch.accelerator, "synchronize", lambda: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def native():
    """Inside a trainer, whose servers get their weights this way, in many broadcasts although the model is small."""
    with (
        gloo_instead_of_nccl(),
        mock.patch.dict(os.environ, environment()),
        mock.patch.object(process, "WORKER_EXTENSION", EXTENSION),
        mock.patch.object(weight_transfer, "BUCKET", 1 << 16),
        mock.patch.object(builder, "choose_transfer", lambda *args, **more: "nccl"),
    ):
        yield


def _on_gloo(method):
    def run(self, *args):
        with gloo_instead_of_nccl():
            return method(self, *args)

    return run


def install() -> None:
    """In a server's workers."""
    for name in ("init_transfer_engine", "update_weights"):
        setattr(NCCLWeightTransferEngine, name, _on_gloo(getattr(NCCLWeightTransferEngine, name)))
