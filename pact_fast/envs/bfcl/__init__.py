"""BFCL v4 as an environment: multi-turn tasks with stateful APIs, and single-turn function calls (docs/bfcl.md).

entries    the tasks of the installed package bfcl-eval, read as data
schemas    its function documents as OpenAI schemas
calls      calls in Python's notation, parsed as data
session    the API objects of one episode, and execution of calls
limits     limits of the cost of a call
prompts    prompts and later messages, as the official runner words them
verdict    the check after every turn of a multi-turn task
ast_match  the check of a single-turn task
tasks      Tasks with expert traces, and the split into training and held-out ones
env        the environment
"""

from pact_fast.envs.bfcl.env import Bfcl

__all__ = ["Bfcl"]
