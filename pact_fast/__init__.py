"""pact_fast: privileged trace co-training (PACT) for multi-turn tool-use agents, and its kernels.

Importing the package imports nothing heavy: torch and transformers load with the module that needs them. It limits how
long OpenMP's threads spin, which works only before torch is imported (`pact_fast/openmp.py`).
"""

from pact_fast.openmp import limit_spinning

__version__ = "0.2.0.dev0"

limit_spinning()
del limit_spinning
