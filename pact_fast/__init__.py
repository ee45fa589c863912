"""pact_fast: privileged trace co-training (PACT) for multi-turn tool-use agents, and its kernels.

Importing the package imports nothing heavy: torch and transformers load with the module that needs them.
"""

__version__ = "0.1.0"
