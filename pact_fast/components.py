"""The parts of a conversation that the losses tell apart; for data and kernels alike."""

from __future__ import annotations

import enum


class Component(enum.IntEnum):
    """What a token is. The policy generates REASONING, TOOL_CALL and ANSWER; the rest is context only."""

    TEMPLATE = 0
    REASONING = 1
    TOOL_CALL = 2
    ANSWER = 3
    OBSERVATION = 4
