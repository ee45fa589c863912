"""A run on τ²-bench whose episodes are written down, and half of whose rollouts play the reference dialogue.

The files of a run stand in environment variables, since it is a process of its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from pact_fast.data.readers import read_tasks
from pact_fast.envs.tau2.env import Tau2
from pact_fast.rollout.embedded.engine import TransformersEngine
from pact_fast.rollout.engine import Completion, Engine

ROWS, EPISODES = "PACT_TEST_TAU2_ROWS", "PACT_TEST_TAU2_EPISODES"


def name_files(rows: Path, episodes: Path) -> None:
    """Tell this process where the rows are, and where episodes are written."""
    os.environ.update({ROWS: str(rows), EPISODES: str(episodes)})


class Watched(Tau2):
    """Writes the events of an episode and its reward, one JSON object per line."""

    @classmethod
    def factory(cls, args, tool_timeout):
        return cls

    def _start(self, name, task_id):
        episode = super()._start(name, task_id)
        self.answers, call = [], episode.call

        def watched(side, tool, arguments):
            before = len(episode.calls)
            text = call(side, tool, arguments)
            if len(episode.calls) > before:
                self.answers.append(text)
            return text

        episode.call = watched
        return episode

    def reward(self, task, trajectory):
        rewards = super().reward(task, trajectory)
        calls = [
            {"side": call.side, "name": call.name, "arguments": call.arguments, "answer": answer}
            for call, answer in zip(self.episode.calls, self.answers, strict=True)
        ]
        record = {
            "task": self.episode.task["id"],
            "calls": calls,
            "said": [turn.content for turn in trajectory.turns if turn.content.strip()],
            "ending": self.episode.ending,
            "success": rewards["success"],
        }
        with Path(os.environ[EPISODES]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return rewards


class HalfExpert(Engine):
    """The embedded engine for every second rollout of a prompt; the others replay the expert trace.

    A policy that is good at some things: its groups have a signal.
    """

    name, synchronous, version = "half expert", True, 0

    def __init__(self, config, model, renderer):
        self._engine = TransformersEngine(model, renderer.stop_ids(False), slots=config.rollout.max_batch_size)
        self._renderer, self._said, self._scripts = renderer, {}, {}
        for task in read_tasks(os.environ[ROWS]):
            said = [(turn.content, turn.calls) for turn in task.expert.turns]
            said += [(task.expert.answer, ())] if task.expert.answer else []
            turns = [renderer.assistant_turn("", text, calls)[0] for text, calls in said]
            self._scripts[renderer.prompt_ids(task.prompt, task.tools).tobytes()] = turns
        self._turns, self._ready = {}, []

    def submit(self, request):
        if request.rng_key:  # the first turn of a session
            seen = self._said.get(request.ids.tobytes(), 0)
            self._said[request.ids.tobytes()] = seen + 1
            if seen % 2 == 0:
                self._turns[request.session] = list(self._scripts[request.ids.tobytes()])
        if request.session in self._turns:
            self._ready.append(request)
        else:
            self._engine.submit(request)

    def step(self, timeout=None):
        ready, self._ready = self._ready, []
        done = [self._say(request) for request in ready]
        return [*done, *self._engine.step(timeout)]

    def _say(self, request):
        turns = self._turns[request.session]
        ids = np.asarray(turns.pop(0) if turns else [self._renderer.eot_id], np.int64)
        ended = len(ids) <= request.max_new_tokens
        ids = ids[: request.max_new_tokens]
        return Completion(request.session, ids, np.full(len(ids), -5.0, np.float32), ended, self.version)

    def close(self, session):
        if self._turns.pop(session, None) is None:
            self._engine.close(session)

    def update_weights(self, model, version):
        self.version = version
        self._engine.update_weights(model, version)
