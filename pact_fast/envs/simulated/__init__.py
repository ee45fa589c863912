"""Simulated tools over the facts of a question-answering row: the ToolActor of MTR (docs/mtr.md).

env        the environment `simulated`: calls and rewards
actor      ToolActor: input schema, cache, backend, output check, repairs, typed errors
world      the contents of a row: tools with output schemas, facts, passages
backend    ToolBackend, the protocol of backends that answer calls
facts      the backend that looks up the row's own facts and searches its passages; no model
model      the backend that asks a language model
utilities  calculator, date difference, compare: always computed in code
recorded   the store of observations, and the backend that only replays it
faults     timeouts, rate limits, empty and noisy results, drawn from a seed
leaks      whether an observation says more than the facts behind its call
schemas    JSON Schema checks (package jsonschema)
bm25       ranking of a row's passages
"""

from pact_fast.envs.simulated.env import Simulated

__all__ = ["Simulated"]
