"""vLLM in a process of its own: a run continues when it is killed or hangs, and a running `vllm serve` is used as it is."""

import json
import os
import signal
import tempfile
import threading
import time
import uuid

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from pact_fast.config import load_config
from pact_fast.errors import EngineDied, EngineError, PactError
from pact_fast.rollout.engine import Request
from pact_fast.rollout.registry import make_engine
from pact_fast.rollout.vllm import process
from pact_fast.rollout.vllm.client import VllmServerTransport
from pact_fast.rollout.vllm.engine import VllmEngine
from pact_fast.rollout.vllm.process import VllmServerProcess
from pact_fast.rollout.vllm.transport import TurnOutput
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.learner import Learner
from pact_fast.train.prefetch import RolloutPrefetcher
from pact_fast.train.run import Trainer
from tests.support.vllm_engines import SETTINGS, largest_gap, make_policy, perturb, prompts, running_server, sample

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
STEPS = 20
DEADLINE = 10.0  # seconds after which the engine counts as hung
RUN = [
    *SETTINGS,
    "rollout.vllm_mode=server",
    f"rollout.engine_timeout={DEADLINE}",
    f"trainer.max_steps={STEPS}",
    "trainer.prompts_per_step=2",
    "trainer.eval_tasks=4",
    "rollout.num_generations=4",
    "rollout.max_turn_tokens=48",
    "rollout.max_completion_length=160",
]


class Faults:
    """Kills or stops the server once in each state, at given optimizer steps; records turns submitted and finished."""

    STATES = ((4, "idle"), (9, "generating"), (11, "verifying"), (14, "updating"), (17, "hanging"))

    def __init__(self, monkeypatch, trainer):
        self.trainer, self.due, self.injected = trainer, dict(self.STATES), []
        self.loaded = -1
        self.finished, self.submitted_again = set(), []
        update, step, rpc = Learner.update, VllmEngine.step, VllmServerTransport.rpc
        submit, poll = VllmServerProcess.submit, VllmServerProcess.poll

        def during_update(learner, batches, **kwargs):
            self.inject("idle")
            return update(learner, batches, **kwargs)

        def during_step(engine, timeout=None):
            done = step(engine, timeout)
            if done and engine.has_unfinished_turns():
                self.inject("generating")
                self.inject("hanging", signal.SIGSTOP)
            return done

        def record_submit(transport, turn):
            if turn.key in self.finished:
                self.submitted_again.append(turn.key)
            return submit(transport, turn)

        def record_poll(transport, timeout):
            done = poll(transport, timeout)
            self.finished |= {output.key for output in done}
            return done

        def during_rpc(transport, method, *args, **kwargs):
            if method == "reload_weights" and self.due.get(self.now()) == "updating":
                threading.Timer(0.01, self.inject, ["updating"]).start()  # the request is on its way by then
            if method == "pact_report_weights" and self.loaded == self.now():
                self.inject("verifying")  # new weights are loaded, but not verified yet
            if method == "pact_finish_loading":
                self.loaded = self.now()
            return rpc(transport, method, *args, **kwargs)

        monkeypatch.setattr(Learner, "update", during_update)
        monkeypatch.setattr(VllmEngine, "step", during_step)
        monkeypatch.setattr(VllmServerProcess, "submit", record_submit)
        monkeypatch.setattr(VllmServerProcess, "poll", record_poll)
        monkeypatch.setattr(VllmServerTransport, "rpc", during_rpc)

    def now(self) -> int:
        learner = getattr(self.trainer, "learner", None)
        return learner.updates if learner else -1

    def inject(self, state, sign=signal.SIGKILL):
        if self.due.get(self.now()) == state:
            del self.due[self.now()]
            self.injected.append(state)
            os.killpg(self.trainer.engine.transport.pid, sign)


@pytest.mark.timing
def test_a_run_goes_on_after_every_fault(tmp_path, monkeypatch):
    trainer = Trainer(load_config("quickstart", [*RUN, f"output_dir={tmp_path / 'run'}"]))
    faults = Faults(monkeypatch, trainer)
    finished = []
    collect = RolloutCollector.collect

    def keep(self, *args, **kwargs):
        groups, stale = collect(self, *args, **kwargs)
        finished.append([t for group in groups for t in group.trajectories])
        return groups, stale

    monkeypatch.setattr(RolloutCollector, "collect", keep)
    trainer.train()
    assert faults.injected == [state for _, state in Faults.STATES]
    assert trainer.engine.restarts >= len(faults.injected)  # on a busy machine a slow answer may count as a hang
    assert not faults.submitted_again
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(STEPS + 1))
    assert [len(step) for step in finished] == [8] * STEPS
    for number, step in enumerate(finished):
        assert all((t.versions[t.sampled] == number).all() for t in step)
    gaps = [
        json.loads(line).get("mismatch/max", 0.0)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(gaps) <= 1e-4 and sum(gap > 0 for gap in gaps) > 3
    with pytest.raises(ProcessLookupError):  # and no server is left behind
        os.killpg(trainer.engine.transport.pid or 2**22 + 1, 0)


def test_sampling_during_updates_is_bounded_and_stamped(tmp_path, monkeypatch):
    steps, seen = 6, []
    settings = [
        *RUN,
        "algorithm.anchor.mode=blend",
        "trainer.learning_rate=1e-3",
        f"trainer.max_steps={steps}",
        "trainer.max_off_policy_steps=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    get, collect = RolloutPrefetcher.get, RolloutCollector.collect

    def age(self, step):
        groups, trajectories = get(self, step)
        if step == 4:  # one rollout of the second prompt is older than allowed
            trajectories[6].versions[trajectories[6].sampled] = 1
        return groups, trajectories

    def keep(self, step, oldest_version):
        groups, stale = collect(self, step, oldest_version)
        seen.append([t.versions[t.sampled] for group in groups for t in group.trajectories])
        assert [group.prompt_index for group in groups] == [0, 1] and stale == (step == 4)
        return groups, stale

    monkeypatch.setattr(RolloutPrefetcher, "get", age)
    monkeypatch.setattr(RolloutCollector, "collect", keep)
    trainer = Trainer(load_config("quickstart", settings))
    trainer.train()
    assert len(seen) == steps
    for step, versions in enumerate(seen):
        assert all(((v >= step - 1) & (v <= step)).all() for v in versions)
        for v in versions:
            assert (np.diff(v) >= 0).all()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps_only = [record for record in records if "async/staleness" in record]
    assert steps_only[0]["async/staleness"] == 0 and steps_only[-1]["async/staleness"] > 0
    assert [record["async/stale_groups"] for record in steps_only] == [0, 0, 0, 0, 1, 0]
    # log-probs of older weights are corrected for, and the difference shows
    assert max(record.get("mismatch/max", 0.0) for record in steps_only) > 1e-4


@pytest.fixture(scope="module")
def policy():
    return make_policy("rollout.vllm_mode=server", trained=False)


def test_a_server_that_cannot_start_says_why(policy, tmp_path):
    policy.config.rollout.vllm_args = {"block_size": 7}
    engine = make_engine(policy.config, policy.model, policy.renderer, folder=tmp_path)
    policy.config.rollout.vllm_args = {}
    with pytest.raises(EngineDied, match=r"(?s)ended with status.*its log .*vllm.log ends"):
        engine.update_weights(policy.model, 0)
    assert engine.restarts == 0  # it would fail again
    engine.shutdown()


def test_a_long_tmpdir_leaves_room_for_sockets(tmp_path, monkeypatch):
    """A socket's path has 107 bytes at most."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()
    folder = process.socket_folder()
    try:
        assert len(str(folder / str(uuid.uuid4()))) <= 107 and not any((tmp_path / ("x" * 100)).iterdir())
    finally:
        folder.rmdir()


def test_a_running_server(policy, tmp_path):
    """A stock server with our worker extension, over TCP."""
    config = policy.config.model_copy(deep=True)
    with running_server(policy, tmp_path) as config.rollout.vllm_server_base_url:
        engine = make_engine(config, policy.model, policy.renderer, folder=tmp_path)
        contexts = prompts(len(policy.renderer.tokenizer))
        for version in range(2):
            perturb(policy.model)
            engine.update_weights(policy.model, version)
            assert largest_gap(policy.model, contexts, sample(engine, contexts, 16, version)) <= 1e-4
        # another trainer's change of the server is detected before the next update
        engine.transport.rpc("pact_finish_loading", args=["77"])
        with pytest.raises(PactError, match="version 77, the trainer has sent 1"):
            engine.update_weights(policy.model, 2)
        engine.shutdown()


@pytest.mark.timing
def test_a_server_that_does_not_answer_is_an_error_within_the_deadline(policy, tmp_path):
    config = policy.config.model_copy(deep=True)
    config.rollout.vllm_server_base_url, config.rollout.vllm_server_timeout = "http://127.0.0.1:9", 1.0
    started = time.monotonic()
    with pytest.raises(EngineDied, match=r"vLLM at http://127.0.0.1:9: it does not serve within 1 s"):
        make_engine(config, policy.model, policy.renderer, folder=tmp_path)
    assert time.monotonic() - started < 15


def test_a_thread_that_samples_ends_when_the_engine_is_shut_down(policy, tmp_path):
    """And does not start the server again."""
    engine = make_engine(policy.config, policy.model, policy.renderer, folder=tmp_path)
    engine.update_weights(policy.model, 0)
    engine.submit(Request(0, np.arange(9), 500, (0,)))
    errors = []

    def work():
        try:
            while True:
                engine.step()
        except EngineError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    engine.shutdown()
    thread.join(timeout=10)
    assert errors == ["the vLLM server: it was shut down"] and engine.transport.pid is None


def test_ids_of_contexts_are_what_they_were(policy):
    """A request holds a copy of the session's context, which grows."""
    sent = []

    class FakeTransport:
        name, synchronous = "a fake", False

        def submit(self, turn):
            sent.append(turn)

        def poll(self, timeout):
            return [TurnOutput(sent[0].key, [7, 1], [-0.1, -0.2])]

    engine = VllmEngine(FakeTransport(), [1], deadline=5)
    engine.version = 0
    engine.submit(Request(0, np.array([5, 6]), 3))
    (done,) = engine.step()
    assert done.ids.tolist() == [7, 1]
    engine.submit(Request(0, np.array([8]), 3))
    assert [turn.ids for turn in sent] == [[5, 6], [5, 6, 7, 1, 8]]
