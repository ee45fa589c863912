"""A class written for TRL's `environment_factory`, unchanged: find a number by guesses.

    pact-fast train quickstart env.name=trl "env.args={factory: examples/trl_environment.py:Guess, prompt: Find the number.}" algorithm.name=grpo pretrain=null

The same class in TRL: `GRPOTrainer(..., environment_factory=Guess)`.
"""  # noqa: E501

from __future__ import annotations

import random


class Guess:
    """The public methods are tools; `reset` gets the columns of the row, and its result is appended to the question."""

    def reset(self, seed: int = 0, **columns: object) -> str:
        self._number = random.Random(seed).randint(1, 9)
        self._left, self._found = 3, False
        return "It lies between 1 and 9, and you have 3 guesses."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: The guess.
        """
        if self._left == 0:
            raise ValueError("no guesses are left")
        self._left -= 1
        self._found = self._found or number == self._number
        return "right" if number == self._number else "higher" if number < self._number else "lower"

    def get_reward(self) -> float:
        return float(self._found)
