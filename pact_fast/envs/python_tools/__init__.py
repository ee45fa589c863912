"""Tools given as Python sources, run in separate limited processes."""

from pact_fast.envs.python_tools.env import PythonTools

__all__ = ["PythonTools"]
