"""The kernels in other people's trainers: one file per host, installed on a trainer object, no fork (docs/integrations.md).

`self_check` is what all of them share: before the first step, the host's own slow path has to agree.
"""
