"""Tools given as Python sources, each call run in a process of its own with limits.

env     the environment: calls, FTRL and ToolHop scoring
pool    SandboxPool, the workers' client
worker  the sandbox itself, a script of its own; says what is covered and what is not
"""

from pact_fast.envs.python_tools.env import PythonTools

__all__ = ["PythonTools"]
