"""Tools given as Python sources, each call run in a process of its own with limits.

env          the environment: calls, FTRL and ToolHop scoring
pool         SandboxPool: the workers of a run
client       one worker, as the trainer sees it
protections  names and descriptions of the sandbox's protections
worker       the sandbox itself, a script of its own
"""

from pact_fast.envs.python_tools.env import PythonTools

__all__ = ["PythonTools"]
