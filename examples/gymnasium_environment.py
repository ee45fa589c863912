"""A text environment with the interface of Gymnasium: find a number, one guess a message.

    pact-fast train quickstart env.name=gymnasium "env.args={id: examples/gymnasium_environment.py:Guess, kwargs: {largest: 9}}" algorithm.name=grpo pretrain=null

An environment that is registered is named by its id: `id: my_package:Guess-v0`. With `action: tool`, the policy
calls `act(action)` instead.
"""  # noqa: E501

import gymnasium
from gymnasium.spaces import Text


class Guess(gymnasium.Env):
    """Observations and actions are texts."""

    action_space = observation_space = Text(max_length=100, min_length=0)

    def __init__(self, largest: int = 99, guesses: int = 4):
        self._largest, self._guesses = largest, guesses

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._number, self._left = int(self.np_random.integers(1, self._largest + 1)), self._guesses
        return f"A number from 1 to {self._largest}.", {}

    def step(self, action):
        self._left -= 1
        guess = int(action) if action.strip().isdecimal() else 0
        right = guess == self._number
        seen = "right" if right else "higher" if guess < self._number else "lower"
        return seen, float(right), right, self._left == 0 and not right, {}
