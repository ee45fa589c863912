"""A file of rows to a folder of rows with verified traces. Killed at any moment and started again, it gives the same files.

    train.jsonl     rows with a trace; `pact-fast train` reads them
    rejected.jsonl  {id, reasons, detail} of every other row
    summary.json    settings and counts; written last
    journal.jsonl   finished rows, while the command works
    answers/        answers of the language model, if one was asked

What a row gives depends on the row, the settings and the model's answers alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pact_fast.config import Config
from pact_fast.data.readers import read_tasks, write_tasks
from pact_fast.data.types import ExpertTrace, Task, Trajectory
from pact_fast.envs.registry import EnvironmentFactory, environment, environment_name
from pact_fast.errors import DataError, PactError
from pact_fast.files import OTHER_FILE_CURE, io_errors, remove, write_text
from pact_fast.llm import LLMClient
from pact_fast.synthesis.journal import JOURNAL, Journal, Record
from pact_fast.synthesis.traces.reference import ReferenceActor, ReferenceTurns, reference_turns
from pact_fast.synthesis.traces.segments import with_model_segments
from pact_fast.synthesis.traces.teacher import TeacherActor
from pact_fast.synthesis.traces.transcript import CannotAct, Key, play
from pact_fast.synthesis.traces.verify import rejection_reasons, same_episode, trace_of
from pact_fast.users.endpoint import ANSWERS, EndpointUsers, user_llm

VERSION = 1  # of the output of a row
PART = 64  # rows that are played at once, and lost to a kill: the model's answers are kept


@dataclass(frozen=True)
class Settings:
    """Settings that the result depends on, besides the rows, their environment and the model.

    calls     `reference`: the row's own calls, executed; `teacher`: those of a model
    attempts  episodes of a teacher per row, until one is kept
    segments  who says where the segments of a reasoning end: `rules`, or a `model` with the rules as fallback
    limit     read only this many rows of each source; None: all
    """

    calls: Literal["reference", "teacher"] = "reference"
    attempts: int = 1
    segments: Literal["rules", "model"] = "rules"
    limit: int | None = None


def make_traces(
    config: Config,
    out: Path,
    settings: Settings,
    client: LLMClient | None = None,
    progress: Callable[[int, int, int], None] = lambda done, rows, kept: None,
) -> Record:
    """Make the files of `out` for the rows of `config.data.train`. Returns the summary.

    Args:
        config: The rows, their environment, and the limits of an episode (`rollout`).
        out: The output folder. An interrupted call is continued there.
        settings: What else decides the result.
        client: The language model; needed where `settings` names a teacher or a model.
        progress: Called with (rows done, rows, traces kept), also once before the first.

    Raises:
        DataError: The file cannot be read, or holds no rows.
        PactError: The folder holds the work of other settings, or cannot be written; the language model fails.
    """
    if config.rollout.user in ("policy", "model"):
        raise PactError(
            f"rollout.user={config.rollout.user}: there is no engine here that could play the user; set rollout.user=endpoint "
            "or environment"
        )
    unreadable: list[DataError] = []
    assert config.data.train
    tasks = read_tasks(
        config.data.train, config.data.format, settings.limit, environment.names(), on_bad_row=unreadable.append
    )
    identity = _identity(config, settings, client, tasks)
    journal = Journal(out, identity)
    if journal.summary is not None:
        return journal.summary
    maker = _Maker(config, settings, client, EndpointUsers.of(config.rollout, out / ANSWERS))
    with journal, closing(maker):
        finished = {record["id"] for record in journal.records}
        rows = [task for task in tasks if task.id not in finished]
        progress(len(journal.records), len(tasks), journal.kept)
        for start in range(0, len(rows), PART):
            tick = _ticker(progress, len(journal.records), len(tasks), journal.kept)
            for record in maker.make(rows[start : start + PART], tick):
                journal.add(record)
            progress(len(journal.records), len(tasks), journal.kept)
    records = {record["id"]: record for record in journal.records}
    summary = _write(out, identity, tasks, records, unreadable)
    with io_errors(out, OTHER_FILE_CURE):
        remove(out / JOURNAL)
    return summary


def _ticker(progress: Callable[[int, int, int], None], done: int, rows: int, kept: int) -> Callable[[], object]:
    """Return a function that counts finished episodes; which of them are kept is known later."""
    count = itertools.count(done + 1)
    return lambda: progress(next(count), rows, kept)


def _identity(config: Config, settings: Settings, client: LLMClient | None, tasks: Sequence[Task]) -> Record:
    """Return everything that the output files depend on, as JSON data."""
    user = user_llm(config.rollout)
    identity = {
        "version": VERSION,
        "settings": asdict(settings),
        "model": client.config.decisive() if client else None,
        "data": config.data.model_dump(include={"train", "format"}),
        "rows": hashlib.sha256(repr(tasks).encode("utf-8", "surrogatepass")).hexdigest(),
        "env": config.env.model_dump(),
        "rollout": config.rollout.model_dump(
            include={"max_turns", "max_user_turns", "max_observation_tokens", "tool_timeout", "trajectory_timeout"}
        ),
    }
    if user is not None:
        identity["user"] = {**user.decisive(), "stop": config.rollout.user_stop}
    return json.loads(json.dumps(identity, default=str))


class _Maker:
    """Makes the records of rows."""

    def __init__(self, config: Config, settings: Settings, client: LLMClient | None, users: EndpointUsers | None):
        self._config, self._settings, self._client, self._users = config, settings, client, users
        self._default = environment_name(config.env, config.data)
        self._make_env = EnvironmentFactory(config)

    def close(self) -> None:
        """Close the shared resources of the environments."""
        self._make_env.close()
        if self._users:
            self._users.close()

    def make(self, tasks: Sequence[Task], tick: Callable[[], object]) -> list[Record]:
        """One record for every row, in their order. `tick`: called as the first episode of a row ends."""
        records: dict[int, Record] = {}
        playable: dict[int, Task] = {}
        for index, task in enumerate(tasks):
            problem = self._problem(task)
            if problem is None:
                playable[index] = task
            else:
                records[index] = _rejected(task, ["bad_row"], problem)
        by = self._by_teacher if self._settings.calls == "teacher" else self._by_reference
        made = by(playable, tick)
        records |= self._verified(playable, made)
        return [records[index] for index in range(len(tasks))]

    def _problem(self, task: Task) -> str | None:
        """Return the reason why the environment rejects the row, or None."""
        check = getattr(environment.get(task.env or self._default), "check_task", None)
        try:
            if check is not None:
                check(task)
        except PactError as error:
            return str(error)
        return None

    def _by_reference(self, tasks: dict[int, Task], tick: Callable[[], object]) -> dict[int, Record | _PlayedTrace]:
        """Episodes of the rows' own calls."""
        references = {index: found for index, task in tasks.items() if (found := reference_turns(task))}
        results: dict[int, Record | _PlayedTrace] = {
            index: _rejected(task, ["no_reference"]) for index, task in tasks.items() if index not in references
        }
        played = [((index, 0), tasks[index]) for index in references]
        trajectories, failures = self._play(played, references, tick)
        for (key, task), trajectory in zip(played, trajectories, strict=True):
            failure = failures.get(key)
            reasons = [failure.reason] if failure else rejection_reasons(task, trajectory, copied=True)
            made = _PlayedTrace(trajectory, "template" if references[key[0]].templates else "row", "reference")
            results[key[0]] = _rejected(task, reasons, failure.detail if failure else "") if reasons else made
        return results

    def _play(
        self,
        played: Sequence[tuple[Key, Task]],
        references: dict[int, ReferenceTurns],
        tick: Callable[[], object] = lambda: None,
    ) -> tuple[list[Trajectory], dict[Key, CannotAct]]:
        """Play the reference turns to their ends: rollout.max_turns is a limit of those who look for a solution."""
        longest = max((len(found.turns) for found in references.values()), default=0)
        limits = self._config.rollout
        limits = limits.model_copy(update={"max_turns": max(limits.max_turns, longest + 1)})
        return play(played, ReferenceActor(references), self._make_env, limits, tick, self._users)

    def _by_teacher(self, tasks: dict[int, Task], tick: Callable[[], object]) -> dict[int, Record | _PlayedTrace]:
        """Episodes of the teacher, repeated for rows of which none was kept."""
        assert self._client is not None
        teacher = TeacherActor(self._client)
        results: dict[int, Record | _PlayedTrace] = {}
        for attempt in range(self._settings.attempts):
            played = [((i, attempt), task) for i, task in tasks.items() if not isinstance(results.get(i), _PlayedTrace)]
            first = tick if attempt == 0 else lambda: None
            limits = self._config.rollout
            trajectories, failures = play(played, teacher, self._make_env, limits, first, self._users)
            for (key, task), trajectory in zip(played, trajectories, strict=True):
                failure = failures.get(key)
                reasons = [failure.reason] if failure else rejection_reasons(task, trajectory, copied=False)
                made = _PlayedTrace(trajectory, "teacher", f"teacher:{self._client.config.model}")
                results[key[0]] = _rejected(task, reasons, failure.detail if failure else "") if reasons else made
        return results

    def _verified(self, tasks: dict[int, Task], made: dict[int, Record | _PlayedTrace]) -> dict[int, Record]:
        """Return the records of the traces: replayed from the trace alone, with segments by a model if requested."""
        kept: dict[int, tuple[_PlayedTrace, ExpertTrace]] = {}
        records: dict[int, Record] = {}
        for index, result in made.items():
            trace = trace_of(result.trajectory) if isinstance(result, _PlayedTrace) else None
            if isinstance(result, _PlayedTrace) and trace is not None:
                kept[index] = result, trace
            else:
                records[index] = result if isinstance(result, dict) else _rejected(tasks[index], ["unfinished"])
        rows = {index: replace(tasks[index], expert=trace) for index, (_, trace) in kept.items()}
        references: dict[int, ReferenceTurns] = {
            index: found for index, row in rows.items() if (found := reference_turns(row))
        }
        played = [((index, 0), rows[index]) for index in references]
        again, _ = self._play(played, references)
        for ((index, _), _), trajectory in zip(played, again, strict=True):
            if not same_episode(kept[index][0].trajectory, trajectory):
                records[index] = _rejected(tasks[index], ["not_repeatable"])
                del kept[index]
        traces, counts = self._segmented([trace for _, trace in kept.values()])
        for (index, (result, _)), trace in zip(kept.items(), traces, strict=True):
            records[index] = _kept(tasks[index], trace, result, counts)
            counts = {}  # of the whole part, so they stand in its first record
        return records

    def _segmented(self, traces: list[ExpertTrace]) -> tuple[list[ExpertTrace], dict[str, int]]:
        if self._settings.segments == "rules" or not traces:
            return traces, {}
        assert self._client is not None
        return with_model_segments(traces, self._client.with_role("segments"))


@dataclass(frozen=True)
class _PlayedTrace:
    """An episode that has no reason against it so far.

    reasoning  how its reasoning was made: `template`, `row` or `teacher`
    source     whose calls they are: `reference`, or `teacher:MODEL`
    """

    trajectory: Trajectory
    reasoning: str
    source: str


def _rejected(task: Task, reasons: Sequence[str], detail: str = "") -> Record:
    return {"id": task.id, "reasons": list(reasons)} | ({"detail": detail} if detail else {})


def _kept(task: Task, trace: ExpertTrace, made: _PlayedTrace, segments: dict[str, int]) -> Record:
    record: Record = {
        "id": task.id, "reasons": [], "trace": trace.to_messages(), "reasoning": made.reasoning, "source": made.source,
        "rewards": made.trajectory.env_rewards,
    }  # fmt: skip
    return record | ({"segments": segments} if segments else {})


def _write(
    out: Path, identity: Record, tasks: Sequence[Task], records: dict[str, Record], unreadable: Sequence[DataError]
) -> Record:
    kept = [_with_trace(task, records[task.id]) for task in tasks if not records[task.id]["reasons"]]
    temporary = out / ".train.jsonl.tmp"
    with io_errors(out, OTHER_FILE_CURE):
        write_tasks(temporary, kept)
        temporary.replace(out / "train.jsonl")
    rejected = [records[task.id] for task in tasks if records[task.id]["reasons"]]
    rejected += [{"id": None, "reasons": ["unreadable"], "detail": str(error)} for error in unreadable]
    write_text(
        out / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected), OTHER_FILE_CURE
    )
    summary = {
        "made_from": identity,
        "rows": len(tasks) + len(unreadable),
        "kept": len(kept),
        "reasons": _counts(reason for record in rejected for reason in record["reasons"]),
        "reasoning": _counts(str(task.columns["reasoning"]) for task in kept),
        "turns": sum(len(task.expert.turns) for task in kept if task.expert),
        "calls": sum(len(task.expert.calls) for task in kept if task.expert),
        "segments": _counts(
            name for record in records.values() for name, n in record.get("segments", {}).items() for _ in range(n)
        ),
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n", OTHER_FILE_CURE)
    return summary


def _with_trace(task: Task, record: Record) -> Task:
    """The row with its trace, and columns that say how it was made."""
    expert = ExpertTrace.from_messages(record["trace"])
    reasoning = record["reasoning"]
    if reasoning == "row":  # which may say itself how its reasoning was made
        reasoning = task.columns.get("reasoning", reasoning)
    columns = task.columns | {"reasoning": reasoning, "trace_source": record["source"]}
    reference = task.reference_calls if task.reference_calls is not None else expert.calls
    return replace(task, expert=expert, reference_calls=reference, columns=columns)


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
