"""The component of a token, and the context in which a loss scores it. No torch; shared by all packages."""

from __future__ import annotations

import enum


class Component(enum.IntEnum):
    """The part of a conversation to which a token belongs. The policy generates REASONING, TOOL_CALL and ANSWER only."""

    TEMPLATE = 0
    REASONING = 1
    TOOL_CALL = 2
    ANSWER = 3
    OBSERVATION = 4  # results of tools
    USER = 5  # messages of the user after the prompt; never trained on


class LossContext(enum.IntEnum):
    """The context under which a token is scored, which decides its loss (x: prompt, h*: expert trace)."""

    PROMPT = 0  # rollout token given x: prompt-only policy loss
    TRACE = 1  # rollout token given [x; h*]: trace-conditioned policy loss
    EXPERT = 2  # expert token given x: SFT
