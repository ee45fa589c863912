"""The ranks of a run: how they find each other (`world.py`), exchange data (`serialization.py`) and end (`exit.py`).

Gradients and weights are not exchanged here but by the training backends (`train/backends/`).
"""
