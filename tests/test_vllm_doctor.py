"""`pact-fast doctor` with vLLM tests the engine itself, and reports its problems."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from pact_fast.cli.main import main
from pact_fast.data.types import ToolCall, TurnRecord
from pact_fast.envs.registry import EnvironmentFactory
from pact_fast.errors import PactError
from pact_fast.rollout.engine_check import MIN_CACHED_CONTEXT, EngineSmokeTest
from pact_fast.rollout.vllm import process
from pact_fast.rollout.vllm.colocated import ColocatedVllm
from tests.support.vllm_engines import SETTINGS, make_policy, perturb
from tests.support.vllm_servers import COLD_LAUNCH

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LIVE = ["engine", "rollouts", "turns", "log-probs", "prefix cache", "memory"]


@pytest.fixture(scope="module")
def policy():
    made = make_policy()
    made.model.set_attn_implementation("sdpa")  # the doctor's model has seen no trees
    return made


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    policy.model.save_pretrained(folder)
    policy.renderer.tokenizer.save_pretrained(folder)
    return [*SETTINGS, f"model.path={folder}", "model.random_init=null"]


@pytest.fixture(scope="module")
def checks(policy):
    make_env, tasks = EnvironmentFactory(policy.config), policy.tasks.train(0, 8)
    made = EngineSmokeTest(policy.config, policy.model, policy.renderer, make_env, tasks, contextlib.nullcontext())
    with contextlib.closing(made):
        made.engine()
        made.rollouts()
        yield made


def with_call(checks):
    """The first trajectory, as if the small policy had sampled the expert's first call."""
    task = checks.jobs[0].task
    ids, _ = checks.renderer.assistant_turn("", "", task.expert.turns[0].calls)
    parsed = checks.renderer.parse(ids, task.tools)
    return dataclasses.replace(
        checks.trajectories[0],
        ids=ids,
        turn_ids=np.zeros(len(ids), np.int16),
        sampled=np.ones(len(ids), bool),
        turns=[TurnRecord(parsed.text, parsed.reasoning, parsed.content, list(parsed.attempts))],
    )


def test_a_good_engine_passes_every_check(checks):
    assert [name for name, _ in checks.all()] == LIVE
    assert len(checks.trajectories) == 4 and "call" in checks.turns()
    assert "at most, over" in checks.logprobs()
    cached, _, length = checks.prefix_cache().split()[:3]
    assert 0 < int(cached) < int(length)
    assert "0.5 KiB of keys and values per token" in checks.memory()  # 2 layers · (k and v) · 1 head · 32 · 4 bytes


def test_a_model_that_is_not_the_engines_is_found(checks, monkeypatch):
    other = copy.deepcopy(checks.model)
    perturb(other, 0.001)
    monkeypatch.setattr(checks, "model", other)
    with pytest.raises(PactError, match="log-probs differ"):
        checks.logprobs()


def test_log_probs_are_compared_over_what_the_filters_keep(checks, monkeypatch):
    def set_filters(**filters):
        rollout = checks.config.rollout.model_copy(update={"temperature": 1.5, **filters})
        monkeypatch.setattr(checks, "config", checks.config.model_copy(update={"rollout": rollout}))

    monkeypatch.setattr(checks, "trajectories", [])
    set_filters(top_p=0.7, top_k=30, min_p=0.01)
    jobs = [dataclasses.replace(job, temperature=1.5, filters=checks.config.rollout.filters) for job in checks.jobs]
    monkeypatch.setattr(checks, "jobs", jobs)
    checks.rollouts()
    assert "at most, over" in checks.logprobs()
    for other in ({"top_p": 0.75}, {"top_p": 1.0, "top_k": 0, "min_p": None}):  # as if the engine had not been told
        set_filters(**{"top_p": 0.7, "top_k": 30, "min_p": 0.01, **other})
        with pytest.raises(PactError, match="log-probs differ"):
            checks.logprobs()


def test_a_format_that_reads_other_calls_than_it_writes_is_found(checks, monkeypatch):
    monkeypatch.setattr(checks, "trajectories", [with_call(checks), *checks.trajectories[1:]])
    assert checks.turns() == "1 sampled calls, rendered and parsed again, are the same; 1 turns token by token"
    right = checks.renderer.assistant_turn

    def wrong(reasoning, content, calls):
        return right(reasoning, content, [ToolCall(call.name, {"of": "nobody"}) for call in calls])

    monkeypatch.setattr(checks.renderer, "assistant_turn", wrong)
    with pytest.raises(PactError, match=r"is parsed as .* choose another model\.tool_format"):
        checks.turns()


def test_a_prefix_that_is_not_cached_is_found(checks, monkeypatch):
    poll = ColocatedVllm.poll
    forget = lambda self, timeout: [dataclasses.replace(s, cached=0) for s in poll(self, timeout)]  # noqa: E731
    monkeypatch.setattr(ColocatedVllm, "poll", forget)
    longest = max(checks.trajectories, key=lambda t: len(t.prompt_ids) + len(t.ids))
    assert len(longest.prompt_ids) + len(longest.ids) >= MIN_CACHED_CONTEXT
    with pytest.raises(PactError, match="computed again at its second request"):
        checks.prefix_cache()


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_the_doctor_tries_the_engine_with_the_saved_weights(saved, capsys, mode, monkeypatch):
    monkeypatch.setattr(process, "launch", COLD_LAUNCH)  # as users start it; other tests fork their servers
    assert main(["doctor", "quickstart", *saved, f"rollout.vllm_mode={mode}"]) == 0
    shown = capsys.readouterr().out.splitlines()
    live = [line for line in shown if line.startswith(("ok ", "FAIL "))][-len(LIVE) :]  # vLLM writes there, too
    assert [line[6:].split(":")[0] for line in live] == LIVE
    assert all(line.startswith("ok ") for line in live)
    assert "not computed again" in live[LIVE.index("prefix cache")]


def test_an_engine_with_other_weights_fails_the_doctor(saved, capsys, monkeypatch):
    load = ColocatedVllm.load_weights

    def spoiled(self, weights, version):
        load(self, ((name, tensor * 1.01 if "norm" in name else tensor) for name, tensor in weights), version)

    monkeypatch.setattr(ColocatedVllm, "load_weights", spoiled)
    assert main(["doctor", "quickstart", *saved]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAIL  engine: the engine does not hold the trainer's weights")
