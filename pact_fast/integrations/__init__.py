"""The kernels in other people's trainers: one file per host, installed on a trainer object, no fork (docs/integrations.md).

All of them use `self_check`: before the first step, results must agree with the host's own slow path.
"""
