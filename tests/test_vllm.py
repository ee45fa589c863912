"""vLLM in this process: samples, weights, and detection of every fault in its weights."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from pact_fast.config.filters import SamplingFilters
from pact_fast.errors import EngineError
from pact_fast.model.filters import filtered
from pact_fast.model.weights import WeightMismatch
from pact_fast.rollout.agent import Job
from pact_fast.rollout.engine import Request
from pact_fast.rollout.registry import make_engine
from tests.support.vllm_engines import caught, largest_gap, make_policy, perturb, prompts, sample

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
FILTERS = [
    SamplingFilters(top_k=5),
    SamplingFilters(top_p=0.6),
    SamplingFilters(min_p=0.2),
    SamplingFilters(top_p=0.7, top_k=20, min_p=0.02),
]


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def engine(policy):
    before = torch.get_rng_state()
    made = make_engine(policy.config, policy.model, policy.renderer)
    assert torch.equal(torch.get_rng_state(), before)  # vLLM seeds the process; a run must not depend on it
    with pytest.raises(EngineError, match="no weights yet"):
        made.submit(Request(0, np.arange(5), 4))
    yield made
    made.shutdown()


def test_logprobs_equal_the_trainers_after_each_of_20_updates(policy, engine):
    model = copy.deepcopy(policy.model)
    contexts = prompts(len(policy.renderer.tokenizer))  # the same ones each time: a stale prefix cache would show
    for version in range(20):
        perturb(model)
        engine.update_weights(model, version)
        for temperature in (0.9, 0.0):
            done = sample(engine, contexts, 24, version, temperature)
            assert largest_gap(model, contexts, done, temperature) <= 1e-4
    assert engine.version == 19 and engine.restarts == 0


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_are_vllms_own_with_ties(filters):
    """vLLM's code for PyTorch, min-p and then top-k and top-p, on logits of which most tie with others.

    Equal as sets of logits: which tokens of a tie are kept depends on vLLM's sort, which is not stable.
    """
    rng = np.random.default_rng(0)
    rows = np.round(rng.normal(0, 2, (60, 97)) * rng.choice([1, 2, 8], (60, 1))) / rng.choice([1, 8], (60, 1))
    logits = torch.tensor(rows, dtype=torch.float32)
    k = torch.full((60,), filters.top_k or 97)
    p = torch.full((60,), filters.top_p)
    min_p = SimpleNamespace(min_p_count=int(filters.min_p > 0), min_p=torch.tensor([[filters.min_p]]))
    expected = MinPLogitsProcessor.apply(min_p, logits.clone())
    expected = apply_top_k_top_p(expected, k if filters.top_k else None, p if filters.top_p < 1 else None)
    found = filtered(logits, filters)
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values) and (expected == -torch.inf).any()
    assert filters.top_p < 1 or torch.equal(found, expected)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filtered_turns_have_the_log_probs_of_what_is_kept(policy, engine, filters):
    engine.update_weights(policy.model, 0)
    contexts = prompts(len(policy.renderer.tokenizer))
    done = sample(engine, contexts, 24, 5, 1.5, filters)
    assert largest_gap(policy.model, contexts, done, 1.5, filters) <= 1e-4
    assert largest_gap(policy.model, contexts, done, 1.5) > 1e-2  # so the filters did keep less than everything
    greedy = sample(engine, contexts, 8, 5, 0.0, filters)
    assert largest_gap(policy.model, contexts, greedy, 0.0) <= 1e-4


def test_sampling_repeats_itself(policy, engine):
    engine.update_weights(policy.model, 0)
    contexts = prompts(len(policy.renderer.tokenizer))
    first, again, other = (sample(engine, contexts, 24, key) for key in (1, 1, 2))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(first, other, strict=True))


def test_200_trajectories_carry_exactly_what_vllm_sampled(policy, engine, monkeypatch):
    engine.update_weights(policy.model, 7)
    outputs = {}
    step = engine.transport.llm_engine.step

    def spy():
        found = step()
        outputs.update({output.request_id.rsplit("/", 1)[0]: output for output in found if output.finished})
        return found

    monkeypatch.setattr(engine.transport.llm_engine, "step", spy)
    loop = policy.loop(engine)
    tasks = policy.tasks.train(0, 200)
    trajectories = loop.run([Job(task, (3, i), 1.0) for i, task in enumerate(tasks)])
    assert len(trajectories) == 200
    cached = turns = 0
    for index, t in enumerate(trajectories):
        whole = np.concatenate([t.prompt_ids, t.ids])
        for turn in range(len(t.turns)):
            output = outputs.pop(f"{index}/{turn + 1}/7")
            here = np.flatnonzero((t.turn_ids == turn) & t.sampled)
            start = len(t.prompt_ids) + here[0]
            assert output.prompt_token_ids == whole[:start].tolist()
            assert list(output.outputs[0].token_ids) == t.ids[here].tolist() and (np.diff(here) == 1).all()
            expected = [row[i].logprob for row, i in zip(output.outputs[0].logprobs, t.ids[here], strict=True)]
            assert t.logprobs[here].tolist() == np.array(expected, np.float32).tolist()
            cached += bool(output.num_cached_tokens)
            turns += 1
        assert (t.versions[t.sampled] == 7).all() and (t.versions[~t.sampled] == -1).all()
        assert np.isnan(t.logprobs[~t.sampled]).all()
    assert not outputs  # nothing was sampled and left out
    assert sum(len(t.turns) > 1 for t in trajectories) > 20, (
        "the policy must make tool calls for this test to mean anything"
    )
    assert cached > 0.5 * (turns - 200)  # later turns find their context in the prefix cache


class TestFaults:
    """Each one is caught before a token is sampled, and the next good update heals it."""

    @pytest.fixture
    def model(self, policy, engine):
        model = copy.deepcopy(policy.model)
        engine.update_weights(model, 100)
        perturb(model)
        yield model
        engine.update_weights(model, 101)
        assert largest_gap(model, [np.arange(9)], sample(engine, [np.arange(9)], 8, 0)) <= 1e-4

    def test_one_number_corrupted_on_the_way(self, engine, model, monkeypatch):
        load = engine.transport.load_weights

        def corrupt(weights, version):
            def changed():
                for name, tensor in weights:
                    if name.endswith("1.self_attn.k_proj.weight"):
                        tensor = tensor.clone()
                        tensor.view(torch.int32)[3, 5] ^= 1  # the last bit of one number
                    yield name, tensor

            load(changed(), version)

        monkeypatch.setattr(engine.transport, "load_weights", corrupt)
        caught(engine, model, r"1 of \d+ tensors differ \(model.layers.1.self_attn.k_proj.weight\)")
        monkeypatch.undo()

    def test_a_dropped_tensor(self, engine, model, monkeypatch):
        load = engine.transport.load_weights
        kept = lambda weights: (item for item in weights if "0.mlp.up_proj" not in item[0])  # noqa: E731
        monkeypatch.setattr(engine.transport, "load_weights", lambda weights, version: load(kept(weights), version))
        caught(engine, model, "mlp")
        monkeypatch.undo()

    def test_a_dropped_update(self, engine, model, monkeypatch):
        def claim(weights, version):
            list(weights)
            engine.transport.llm_engine.collective_rpc("pact_finish_loading", args=(version,))

        monkeypatch.setattr(engine.transport, "load_weights", claim)
        caught(engine, model, "tensors differ")
        monkeypatch.undo()

    def test_an_update_that_says_nothing(self, engine, model, monkeypatch):
        monkeypatch.setattr(engine.transport, "load_weights", lambda weights, version: list(weights))
        caught(engine, model, "version 100, the trainer has sent 102")
        monkeypatch.undo()

    def test_a_late_update(self, policy, engine, model, monkeypatch):
        """Old weights arrive after the new ones were verified: tokens sampled since then must not be trained on."""
        engine.update_weights(model, 103)
        load, late = engine.transport.load_weights, copy.deepcopy(model)
        perturb(late)
        load(iter(late.state_dict().items()), 103)
        monkeypatch.setattr(engine.transport, "load_weights", lambda *args: pytest.fail("the check must come first"))
        with pytest.raises(WeightMismatch, match="tensors differ"):
            engine.update_weights(model, 104)
        monkeypatch.undo()

    def test_a_tied_head_that_keeps_its_packed_copy(self, engine, model, monkeypatch):
        """vLLM's reload leaves a stale copy on CPU. Our worker updates it; without that, the check must fail."""
        rpc = engine.transport.llm_engine.collective_rpc

        def stale(method, *args, **kwargs):
            if method == "pact_finish_loading":
                method, kwargs["args"] = "pact_version_only", kwargs["args"]
            return rpc(method, *args, **kwargs)

        from pact_fast.rollout.vllm.worker import WeightReport

        worker = type(engine.transport.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker)
        assert issubclass(worker, WeightReport)
        monkeypatch.setattr(
            worker, "pact_version_only", lambda self, version: setattr(self, "_pact_version", version), raising=False
        )
        monkeypatch.setattr(engine.transport.llm_engine, "collective_rpc", stale)
        caught(engine, model, r"lm_head.weight \(copies differ\)")
        monkeypatch.undo()


def test_weights_do_not_change_under_a_turn(policy, engine):
    """A turn under way ends with the weights that it began with, and is stamped with them."""
    model = copy.deepcopy(policy.model)
    engine.update_weights(model, 0)
    old = copy.deepcopy(model)
    perturb(model)
    ids = np.arange(9)
    engine.submit(Request(0, ids, 16, (0,)))
    engine.update_weights(model, 1)
    (done,) = engine.step()
    assert done.version == 0 and engine.version == 1
    assert largest_gap(old, [ids], [done], 1.0) <= 1e-4
    engine.close(0)


def test_a_cancelled_turn_leaves_nothing_behind(policy, engine):
    engine.update_weights(policy.model, 0)
    for i in range(3):
        engine.submit(Request(i, np.arange(20), 200, (i,)))
    engine.step()
    for i in range(3):
        engine.close(i)
    assert engine.step() == [] and not engine.transport.llm_engine.has_unfinished_requests()
    engine.submit(Request(1, np.arange(7), 4, (9,)))  # the number can be used again
    done = []
    while not done:
        done = engine.step()
    assert [c.session for c in done] == [1]
    engine.close(1)
