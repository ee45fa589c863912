"""BFCL: verdicts of the environment `bfcl` against the official checkers, on the ground truth and on mutations of it.

python -m benchmarks.bfcl_verdicts                            800 replays, 4 mutations of each, 4 of each single-turn task
python -m benchmarks.bfcl_verdicts --every 8 --mutations 3    every eighth task

A multi-turn task's ground truth is played through an episode, call by call; then mutations of it, with calls dropped,
reordered, repeated, altered, renamed, moved to another turn, or taken from other tasks. The official multi_turn_checker judges
the same calls. A single-turn task's accepted answer is mutated likewise and judged by the official ast_checker.

Exit status 1: a replay scores less than 1, or two verdicts differ.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import copy
import random
import sys
import time
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import exit_status, make_parser, markdown, new_report, write_report
from pact_fast.data.types import Task
from pact_fast.envs.bfcl import Bfcl
from pact_fast.envs.bfcl.ast_match import mismatch
from pact_fast.envs.bfcl.calls import PythonCall, read_call
from pact_fast.envs.bfcl.entries import LIVE, MULTI_TURN, NON_LIVE, UNANSWERED, Entry, entries
from pact_fast.envs.bfcl.session import ApiSession
from pact_fast.envs.bfcl.tasks import expert_trace

Turns = list[list[PythonCall]]
SINGLE_TURN = tuple(name for name in (*NON_LIVE, *LIVE) if name not in UNANSWERED)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "bfcl_verdicts")
    parser.add_argument("--every", type=int, default=1, help="only every N-th task (default: 1)")
    parser.add_argument("--mutations", type=int, default=4, help="mutations per task (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: 0)")
    return parser.parse_args(argv)


def named(call: PythonCall, session: ApiSession) -> PythonCall:
    """The call with all arguments by name, as a policy writes it."""
    return PythonCall(call.name, (), dict(zip(session.parameters(call.name), call.args, strict=False)) | call.kwargs)


def ground_truth(entry: Entry) -> Turns:
    """The calls of an entry's ground truth, turn by turn, with arguments by name."""
    session = ApiSession(entry)
    return [[named(read_call(text), session) for text in turn] for turn in entry.truth]


def our_verdict(entry: Entry, turns: Turns) -> bool:
    """Play the calls through an episode."""
    env = Bfcl()
    env.reset(Task(entry.id, [], env_args={"id": entry.id}))
    for turn in turns:
        for call in turn:
            env.call(call.name, call.kwargs)
        env.respond("Done.")
    verdict = env.verdict
    assert verdict is not None and verdict.finished
    return verdict.valid


def official_verdict(entry: Entry, turns: Turns) -> bool:
    """The official checker's. It keeps its objects in the globals of a module, from where they are removed."""
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    row = {"id": entry.id, "initial_config": entry.config, "involved_classes": list(entry.classes)}
    decoded = [[[str(call)] for call in turn] for turn in turns]
    try:
        result = multi_turn_checker(decoded, entry.truth, copy.deepcopy(row), entry.category, "m")
        return bool(result["valid"])
    except RecursionError:
        return False  # a folder was copied into itself; the official command stops there
    finally:
        for name in [name for name in vars(multi_turn_utils) if name.endswith("_instance")]:
            del vars(multi_turn_utils)[name]


def mutate(turns: Turns, others: list[PythonCall], rng: random.Random) -> tuple[str, Turns]:
    """(kind of the last mutation, mutated copy): one to three mutations."""
    turns, kind = copy.deepcopy(turns), ""
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(("drop", "reorder", "repeat", "alter", "alter", "rename", "move", "extra", "empty", "omit"))
        _apply(kind, turns, others, rng)
    return kind, turns


def _apply(kind: str, turns: Turns, others: list[PythonCall], rng: random.Random) -> None:
    places = [(t, i) for t, turn in enumerate(turns) for i in range(len(turn))]
    if not places:
        turns[rng.randrange(len(turns))].append(rng.choice(others))
        return
    t, i = rng.choice(places)
    call = turns[t][i]
    if kind == "drop":
        del turns[t][i]
    elif kind == "reorder":
        rng.shuffle(turns[t])
    elif kind == "repeat":
        turns[t].insert(rng.randint(i, len(turns[t])), call)
    elif kind == "alter" and call.kwargs:
        key = rng.choice(sorted(call.kwargs))
        turns[t][i] = PythonCall(call.name, (), {**call.kwargs, key: altered(call.kwargs[key], rng)})
    elif kind == "omit" and call.kwargs:
        key = rng.choice(sorted(call.kwargs))
        turns[t][i] = PythonCall(call.name, (), {k: v for k, v in call.kwargs.items() if k != key})
    elif kind == "rename":
        turns[t][i] = PythonCall(rng.choice([*(c.name for c in others[:20]), "no_such_tool"]), (), call.kwargs)
    elif kind == "move":
        turns[rng.randrange(len(turns))].insert(0, turns[t].pop(i))
    elif kind == "empty":
        turns[t].clear()
    else:
        turns[rng.randrange(len(turns))].append(rng.choice(others))


def altered(value: Any, rng: random.Random) -> Any:
    """Another value, often of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, -value, 0, float(value), str(value), value * 1000))
    if isinstance(value, str):
        return rng.choice((value + "x", value.upper(), "", value[1:], value.replace(" ", "_"), None, [value], 7))
    if isinstance(value, list):
        return rng.choice((value[1:], value + value[:1], value[::-1], "text"))
    if isinstance(value, dict):
        return dict(list(value.items())[1:]) or None
    return rng.choice(("", 0, None))


def multi_turn_tasks(every: int) -> Iterator[Entry]:
    """Every `every`-th entry of the multi-turn categories."""
    for name in MULTI_TURN:
        yield from list(entries(name).values())[::every]


def compare_multi_turn(every: int, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(counts, failures) of replays and mutations."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    pool = [call for entry in list(multi_turn_tasks(25)) for turn in ground_truth(entry) for call in turn]
    for entry in multi_turn_tasks(every):
        turns = ground_truth(entry)
        counts["replays"] += 1
        if not our_verdict(entry, turns) or not official_verdict(entry, turns):
            failures.append(f"{entry.id}: the ground truth does not pass")
        for _ in range(count):
            same = [call for turn in turns for call in turn]
            others = rng.sample(same, min(len(same), 10)) + rng.sample(pool, 10)
            kind, changed = mutate(turns, others, rng)
            ours, theirs = our_verdict(entry, changed), official_verdict(entry, changed)
            counts["mutations"] += 1
            counts["accepted"] += theirs
            if ours != theirs:
                failures.append(f"{entry.id}, {kind}: ours {ours}, official {theirs}: {changed}")
    return counts, failures


def official_ast_checker() -> Any:
    """The official ast_checker, without the table of models that it asks only for how they write dots in names."""
    name = "bfcl_eval.constants.model_config"
    if name not in sys.modules:
        table = types.ModuleType(name)
        table.MODEL_CONFIG_MAPPING = defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))  # type: ignore[attr-defined]
        sys.modules[name] = table
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(entry: Entry, calls: list[dict[str, Any]]) -> bool:
        try:
            found = ast_checker(entry.functions, calls, entry.truth, Language.PYTHON, entry.category, "m")
        except Exception:  # the official command stops there
            return False
        return bool(found["valid"])

    return check


def compare_single_turn(every: int, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(counts, failures) of accepted answers and mutations."""
    check = official_ast_checker()
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for name in SINGLE_TURN:
        for entry in list(entries(name).values())[::every]:
            trace = expert_trace(entry)
            counts["answers"] += 1
            counts["answers without a trace"] += trace is None
            calls = [PythonCall(c.name, (), c.arguments) for c in trace.calls] if trace else _first_values(entry)
            for number in range(count + 1):
                turns = [calls] if number == 0 else mutate([calls], calls, rng)[1]
                decoded = [{call.name: call.kwargs} for call in turns[0]]
                ours = mismatch(name, entry.functions, decoded, entry.truth) is None
                theirs = check(entry, copy.deepcopy(decoded))
                counts["single-turn verdicts"] += 1
                counts["single-turn accepted"] += theirs
                if ours != theirs:
                    failures.append(f"{entry.id}: ours {ours}, official {theirs}: {decoded}")
    return counts, failures


def _first_values(entry: Entry) -> list[PythonCall]:
    return [
        PythonCall(n, (), {k: v[0] for k, v in args.items() if v}) for call in entry.truth for n, args in call.items()
    ]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report("bfcl_verdicts", args, every=args.every, mutations=args.mutations, seed=args.seed)
    rows, failures = [], []
    for title, compare in (("multi-turn", compare_multi_turn), ("single-turn", compare_single_turn)):
        started = time.perf_counter()
        counts, failed = compare(args.every, args.mutations, args.seed)
        rows += [[title, name, str(counts[name])] for name in counts]
        rows.append([title, "verdicts that differ", str(len(failed))])
        report[title] = {**counts, "differ": len(failed), "seconds": round(time.perf_counter() - started, 1)}
        failures += failed
    print(markdown(["tasks", "what", "count"], rows))
    report["failures"] = failures
    write_report(report, args.out)
    return exit_status(failures[:20])


if __name__ == "__main__":
    sys.exit(main())
