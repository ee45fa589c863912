"""Rollouts by vLLM, in the trainer's process or as a server, with weights that are verified after every update.

builder          VllmBuilder: the engine that the configuration asks for
engine           VllmEngine: turns, weight updates and their verification, recovery; the same for every placement
transport        VllmTransport: the interface of VllmEngine to a running vLLM
colocated        ColocatedVllm: vLLM in the trainer's process
client           VllmServerClient: a server behind a URL; VllmServerTransport, which both kinds of servers share
process          VllmServerProcess: a server that the trainer starts and supervises
http_client      HTTP requests from a background thread
http_pool        its connections: as many as there are requests, up to a limit
http_connection  one connection
weight_files     weights and adapters through files
weight_transfer  weights from GPU to GPU
worker           WeightReport: runs inside vLLM's workers, and reads back the weights they compute with
"""

from pact_fast.rollout.vllm.builder import VllmBuilder

__all__ = ["VllmBuilder"]
