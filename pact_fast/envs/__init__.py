"""Environments: they run the tools of a task and score the finished trajectory.

base          the Environment protocol
registry      environments by name, and the tasks that a configuration asks for
lookup_chain  built-in multi-hop look-ups, generated from a seed
python_tools  tools given as Python sources, run in a sandbox
bfcl          BFCL v4: stateful APIs, and function calls that are judged by what they say
"""
