"""Environments of the package gymnasium, for tests."""

from __future__ import annotations

import gymnasium
from gymnasium.spaces import Box, Discrete, Text

from tests.support.adapters import RAN


class Words(gymnasium.Env):
    """Repeats actions; "end" terminates with reward 1, the third action truncates."""

    action_space = observation_space = Text(max_length=40, min_length=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return f"{seed} {int(self.np_random.integers(1000))}", {}

    def step(self, action):
        RAN.append("act")
        self.steps += 1
        if action == "fail":
            raise ValueError("it failed")
        over = action == "end"
        return f"seen {action}", float(over), over, self.steps == 3, {}


class Doors(Words):
    """Numbers as actions, an outcome in info."""

    action_space = Discrete(3, start=1)

    def step(self, action):
        return "open", -2.0, True, False, {"success": int(action) == 2}


class Arrays(Words):
    action_space = Box(0.0, 1.0)


class Numbers(Words):
    """Observations that are no text."""

    def reset(self, *, seed=None, options=None):
        return 3, {}
