"""Users of τ²-bench dialogues: their protocol, a scripted user, and users that a chat model plays.

A user sees the dialogue from its own side, in the roles that a chat model expects: the agent's messages are those of a
`user`, its own are those of the `assistant`, what its phone answers comes from a `tool`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pact_fast.data.types import Message, ToolCall, ToolSchema
from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import STOP
from pact_fast.envs.tau2.reference import reference_actions
from pact_fast.errors import PactError
from pact_fast.plugins import load_object

TRANSFER = "###TRANSFER###"
ENDINGS = (STOP, TRANSFER, "###OUT-OF-SCOPE###")  # in a user's message, they end the dialogue
PATIENCE = 6  # messages of the agent after which a scripted user whose request is not met gives up


@dataclass(frozen=True)
class UserTurn:
    """Next turn of a user: calls of its own tools, or else a message."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Role:
    """Task of a user, given before the dialogue.

    domain     name of the domain
    task       the task as the package ships it
    satisfied  whether the task is solved by now, as far as its reward basis says; only for rule-based users
    """

    domain: str
    task: dict[str, Any]
    satisfied: Callable[[], bool]

    @property
    def tools(self) -> list[ToolSchema]:
        """The user's own tools; empty but in telecom."""
        return domain(self.domain).schemas["user"]

    def prompt(self) -> str:
        """System prompt of the package's user simulator: its guidelines, and the task's scenario."""
        file = "simulation_guidelines_tools.md" if self.tools else "simulation_guidelines.md"
        guidelines = (upstream.folder() / "data/tau2/user_simulator" / file).read_text(encoding="utf-8")
        scenario = upstream.load("data_model.tasks").UserScenario.model_validate(self.task["user_scenario"])
        template = upstream.constant("user/user_simulator.py", "SYSTEM_PROMPT")
        return template.format(global_user_sim_guidelines=guidelines, instructions=scenario)


class User(Protocol):
    """The user of one dialogue."""

    def reply(self, messages: Sequence[Message]) -> UserTurn:
        """The next turn of the user, given all messages so far as it sees them.

        The first two are the agent's greeting and the user's `opening`; the last is the agent's or a tool's.
        """


def user_factory(name: str) -> Callable[[Role], User]:
    """`scripted`, or a function of your own as `file.py:name` that takes a Role. PactError if it is neither."""
    if name == "scripted":
        return Tau2ScriptedUser
    if ":" not in name:
        raise PactError(f"env.args.user: {name!r} is unknown; write scripted, or file.py:name of a function of a Role")
    return load_object(name, "user")


class Tau2ModelUser:
    """A user that a chat model plays, with the package's system prompt.

    Args:
        role: What the user is told.
        complete: (messages, tools) → the model's message, as an OpenAI chat message. Equal inputs must give equal
            messages, or runs cannot be repeated.
    """

    def __init__(self, role: Role, complete: Callable[[list[Message], list[ToolSchema]], Message]):
        self._complete, self._tools = complete, role.tools
        self._system: Message = {"role": "system", "content": role.prompt()}

    def reply(self, messages: Sequence[Message]) -> UserTurn:
        message = self._complete([self._system, *messages], self._tools)
        calls = tuple(ToolCall.from_message(call) for call in message.get("tool_calls") or [])
        return UserTurn("" if calls else str(message.get("content") or ""), calls)


class Tau2ScriptedUser:
    """A user by rules, for tests, smoke runs and expert traces; not a stand-in for the package's simulator.

    It first tells its instructions. It does on its phone what the agent
    names, by the tool's name or, for actions of the reference solution, by a word for them; reports what the phone says;
    says yes otherwise. It ends the dialogue when its task is solved, when it is transferred, or when its patience ends.
    """

    def __init__(self, role: Role):
        self._role = role
        self._pending = [call for side, call in reference_actions(role.task) if side == "user"]
        self._tools = {schema["function"]["name"]: schema["function"]["parameters"] for schema in role.tools}

    def reply(self, messages: Sequence[Message]) -> UserTurn:
        spoken = [str(message["content"]) for message in messages if message["role"] == "user"]
        if messages[-1]["role"] == "tool":
            return UserTurn(self._report(messages))
        calls = self._asked(spoken[-1])
        if calls:
            return UserTurn(calls=tuple(calls))
        if self._role.satisfied():
            return UserTurn(f"Thank you, that is all. {STOP}")
        if "transfer" in spoken[-1].lower():
            return UserTurn(TRANSFER)
        if len(spoken) > PATIENCE:
            return UserTurn(f"I will try again another time. {STOP}")
        return UserTurn(details(self._role.task) if len(spoken) == 2 else "Yes, please go ahead.")

    def _asked(self, text: str) -> list[ToolCall]:
        """The tools that a text names: open reference actions first, then others that need no arguments."""
        words = text.lower().replace("_", " ")
        calls: list[ToolCall] = []
        for call in list(self._pending):
            if _names(words, call) and call not in calls:
                calls.append(call)
                self._pending.remove(call)
        asked = {call.name for call in calls}
        for name in sorted(self._tools, key=len, reverse=True):  # `toggle_data_saver_mode` before `toggle_data`
            phrase = rf"\b{name.replace('_', ' ')}\b"
            if re.search(phrase, words):
                words = re.sub(phrase, " ", words)
                if name not in asked and not self._tools[name].get("required"):
                    calls.append(ToolCall(name, {}))
        return calls

    def _report(self, messages: Sequence[Message]) -> str:
        results: list[str] = []
        for message in reversed(messages):
            if message["role"] != "tool":
                break
            results.append(str(message["content"]))
        text = "\n".join(["I did that. My phone says:", *reversed(results)])
        return f"{text}\nEverything works now, thank you. {STOP}" if self._role.satisfied() else text


_WORDS = {  # how an agent may name a reference action of the user, beside the tool's own name
    "toggle_airplane_mode": r"airplane",
    "toggle_data": r"mobile data|cellular data",
    "toggle_roaming": r"roaming",
    "toggle_data_saver_mode": r"data saver",
    "toggle_wifi_calling": r"wi-?fi calling",
    "set_network_mode_preference": r"network mode|network preference|\b[45]g\b",
    "reset_apn_settings": r"\bapn\b",
    "reboot_device": r"reboot|restart",
    "reseat_sim_card": r"\bsim\b",
    "disconnect_vpn": r"\bvpn\b",
    "make_payment": r"\bpay",
}


def _names(words: str, call: ToolCall) -> bool:
    """Whether a text in lower case, with spaces for underscores, names a reference action."""
    if call.name == "grant_app_permission":
        return "permission" in words and str(call.arguments["permission"]) in words
    return call.name.replace("_", " ") in words or re.search(_WORDS.get(call.name, r"(?!)"), words) is not None


def opening(task: dict[str, Any]) -> str:
    """A user's first message: its reason to call, and the facts about itself that it knows."""
    scenario = _instructions(task)
    return "\n".join(first_person(scenario[key]) for key in ("reason_for_call", "known_info") if scenario.get(key))


def details(task: dict[str, Any]) -> str:
    """A user's second message: the rest of its instructions."""
    return first_person(_instructions(task).get("task_instructions") or "Please help me.")


def _instructions(task: dict[str, Any]) -> dict[str, Any]:
    found = task["user_scenario"]["instructions"]
    return found if isinstance(found, dict) else {"reason_for_call": str(found)}


_FIRST_PERSON = (
    (r"\bYou are\b", "I am"), (r"\byou are\b", "I am"), (r"\b[Yy]ou're\b", "I'm"), (r"\b[Yy]ou've\b", "I have"),
    (r"\b[Yy]ou'd\b", "I would"), (r"\bYour\b", "My"), (r"\byour\b", "my"), (r"\b[Yy]ourself\b", "myself"),
    (r"\b[Yy]ou\b", "I"),
)  # fmt: skip


def first_person(text: str) -> str:
    """A scenario, which is written to the user, as the user would say it; word by word."""
    for pattern, replacement in _FIRST_PERSON:
        text = re.sub(pattern, replacement, text)
    return text.strip()
