"""What the losses tell apart: the component of a token, and the context it is scored in. No torch; shared by all packages."""

from __future__ import annotations

import enum


class Component(enum.IntEnum):
    """What a token is. The policy generates REASONING, TOOL_CALL and ANSWER; the rest is context only."""

    TEMPLATE = 0
    REASONING = 1
    TOOL_CALL = 2
    ANSWER = 3
    OBSERVATION = 4


class LossContext(enum.IntEnum):
    """Under which context a token is scored, and by which loss (x: prompt, h*: expert trace)."""

    PROMPT = 0  # rollout token given x: prompt-only policy loss
    TRACE = 1  # rollout token given [x; h*]: trace-conditioned policy loss
    EXPERT = 2  # expert token given x: SFT
