"""AutoAgent: complete think-act-observe traces, scripted from a plan, or converted from a policy's trajectory.

A script reads only what the question says and what was observed; the plan tells it which facts to ask for, and the gold
answer nothing. Whether a trace is kept is decided afterwards, by `verify`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pact_fast.data.types import ExpertTrace, ExpertTurn, StopReason, Task, ToolCall, Trajectory
from pact_fast.envs.simulated.actor import Episode, error_kind
from pact_fast.envs.simulated.leaks import mentions
from pact_fast.envs.simulated.utilities import number, parse_date
from pact_fast.envs.simulated.world import same_text
from pact_fast.synthesis.mtr.plan import Hop, LookupPlan, is_yes_no
from pact_fast.synthesis.mtr.qa import QARow
from pact_fast.synthesis.mtr.tool_maker import Toolset

MAX_RETRIES = 3  # of calls that an injected fault failed
_SMALLER = re.compile(r"\b(?:first|earlier|earliest|older|oldest|before|less|fewer|smaller|shorter)\b", re.I)
_LARGER = re.compile(r"\b(?:later|latest|younger|youngest|recently|more|longer|larger|last|newer|after)\b", re.I)


class NoScript(Exception):
    """A plan that cannot be scripted. `reason`: a code of `verify.REASONS`."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


def script(row: QARow, plan: LookupPlan, tools: Toolset, episode: Episode) -> ExpertTrace:
    """The trace that follows a plan, one turn per depth.

    Args:
        row: The question and its passages.
        plan: The look-ups that answer it.
        tools: The tools on offer.
        episode: Gives the observations.

    Raises:
        NoScript: No such trace answers the question.
    """
    if not plan.hops:
        raise NoScript("no_plan")
    writer = _Writer(row, tools, episode)
    for hops in plan.by_depth():
        writer.look_up(hops)
    answer = _compare(row, plan, writer) if plan.task_class.endswith("comparison") else writer.found(plan.hops[-1])
    return ExpertTrace(tuple(writer.turns), answer, " ".join((*writer.news, f"So the answer is {answer}.")))


class _Writer:
    """Writes turns. `news`: content of the last turn's observations, for the next turn's reasoning."""

    def __init__(self, row: QARow, tools: Toolset, episode: Episode):
        self._row, self._tools, self._episode = row, tools.world.tools, episode
        self._found: dict[int, str] = {}
        self.turns: list[ExpertTurn] = []
        self.news: list[str] = []

    def look_up(self, hops: Sequence[Hop]) -> None:
        """A turn with a call for every hop. NoScript if an observation does not hold the value."""
        calls = [self._call_of(hop) for hop in hops]
        observations = self.call(_intent(hops), calls)
        for hop, call, text in zip(hops, calls, observations, strict=True):
            values = json.loads(text).get("values", [])
            found = values[0] if call.name == hop.relation and values else hop.values[0]
            if not any(mentions(text, v) or v in text for v in hop.values):
                raise NoScript("no_evidence")
            self._found[id(hop)] = found
            self.news.append(
                f"The answer to that is {found}." if hop.goal.endswith("?") else _sentence(f"{hop.goal} is {found}.")
            )

    def _call_of(self, hop: Hop) -> ToolCall:
        """A look-up if its tool was accepted and its entity is known, else a search."""
        if hop.arguments and hop.relation in self._tools:
            return ToolCall(hop.relation, dict(hop.arguments))
        if "search" not in self._tools:
            raise NoScript("no_tool")
        entity = next(iter(hop.arguments.values()), None)
        return ToolCall("search", {"query": entity or self._row.question})

    def call(self, reasoning: str, calls: Sequence[ToolCall]) -> list[str]:
        """A turn with these calls, repeated while injected faults fail some. NoScript for another error."""
        for attempt in range(1 + MAX_RETRIES):
            thought = reasoning if attempt == 0 else "Some tools failed. I try again."
            observations = [self._episode.call(call.name, call.arguments) for call in calls]
            self.turns.append(ExpertTurn(" ".join((*self.news, thought)), tuple(calls), tuple(observations)))
            self.news = []
            kinds = {error_kind(text) for text in observations} - {None}
            if not kinds:
                return observations
            if kinds - {"timeout", "rate_limited"}:
                break
        raise NoScript("tool_error")

    def found(self, hop: Hop) -> str:
        return self._found[id(hop)]


def _intent(hops: Sequence[Hop]) -> str:
    """Word the goal of a turn: `I need the director of Free Guy.`, or `I need to know: Who published it?`."""
    goals = list(dict.fromkeys(hop.goal for hop in hops))
    if any(goal.endswith("?") for goal in goals):
        return f"I need to know: {' '.join(goals)}"
    return f"I need {' and '.join(goals)}."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _compare(row: QARow, plan: LookupPlan, writer: _Writer) -> str:
    """The answer of a comparison, computed from the observations. NoScript if that gives no answer."""
    chains = plan.roots()
    if len(chains) != 2:
        raise NoScript("no_comparison")
    ends = [[hop for hop in hops if hop.depth == max(h.depth for h in hops)] for _, hops in chains]
    if is_yes_no(row):
        sides = [{value for hop in hops for value in hop.values} for hops in ends]
        return "yes" if any(same_place(a, b) for a in sides[0] for b in sides[1]) else "no"
    if all(len(hops) == 2 for hops in ends):
        texts = [_lifespan(hops, writer) for hops in ends]
        spans = writer.call("I need to know how long each lived.", [ToolCall("date_difference", t) for t in texts])
        values = [str(json.loads(text)["days"]) for text in spans]
    else:
        values = [writer.found(hops[0]) for hops in ends]
    if not all(parse_date(value) or number(value) is not None for value in values):
        raise NoScript("no_comparison")
    (observation,) = writer.call("I compare them.", [ToolCall("compare", {"a": values[0], "b": values[1]})])
    order, smaller = json.loads(observation)["a_is"], _wants_smaller(row.question)
    if order not in ("smaller", "larger") or smaller is None:
        raise NoScript("no_comparison")
    writer.news.append(f"The first is {order}.")
    return chains[0 if (order == "smaller") == smaller else 1][0]


def _lifespan(hops: Sequence[Hop], writer: _Writer) -> dict[str, str]:
    dates = sorted((writer.found(hop) for hop in hops), key=lambda text: parse_date(text) or (0, 0, 0))
    return {"start": dates[0], "end": dates[1]}


def _wants_smaller(question: str) -> bool | None:
    """Whether the smaller value (the earlier date) wins; None if the question does not say."""
    small, large = _SMALLER.search(question), _LARGER.search(question)
    if small and large:  # "born first … more": the word that stands first, in the question proper
        return small.start() < large.start()
    return True if small else False if large else None


_PLACES = {
    "american": "united states", "usa": "united states", "us": "united states", "british": "united kingdom",
    "english": "england", "french": "france", "german": "germany", "dutch": "netherlands", "spanish": "spain",
    "swiss": "switzerland", "danish": "denmark", "swedish": "sweden", "finnish": "finland", "polish": "poland",
    "irish": "ireland", "scottish": "scotland", "welsh": "wales", "greek": "greece", "turkish": "turkey",
    "czech": "czech republic", "filipino": "philippines", "thai": "thailand", "chinese": "china",
}  # fmt: skip


def same_place(one: str, other: str) -> bool:
    """Whether two names of countries or nationalities mean the same: Australia and Australian, American and United States."""
    a, b = (_PLACES.get(text.strip().lower(), text.strip().lower()) for text in (one, other))
    short, long = sorted((a, b), key=len)
    return same_text(a, b) or (len(short) > 4 and long.startswith(short[:-1]))


def from_trajectory(trajectory: Trajectory) -> ExpertTrace | None:
    """Return the trace of a trajectory; None if a limit cut it, or a call was malformed."""
    if trajectory.stop_reason is not StopReason.ANSWER or any(turn.errors for turn in trajectory.turns):
        return None
    *turns, last = trajectory.turns
    made = tuple(ExpertTurn(t.reasoning, tuple(t.calls), tuple(t.observations), t.content) for t in turns)
    return ExpertTrace(made, last.content, last.reasoning)


def sampled(loop: Any, tasks: Sequence[Task], job: Callable[[Task, int], Any]) -> list[tuple[Task, ExpertTrace | None]]:
    """Sample one trace per task through an agent loop; None where `from_trajectory` returns none.

    Args:
        loop: An AgentLoop; its environment must be `simulated`.
        tasks: The tasks.
        job: Makes the job of a task and its position (`rollout.agent.Job`).
    """
    trajectories = loop.run([job(task, index) for index, task in enumerate(tasks)])
    return [(task, from_trajectory(trajectory)) for task, trajectory in zip(tasks, trajectories, strict=True)]
