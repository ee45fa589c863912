"""The baselines that mix expert traces and rollouts, against their published formulas in fp64, and as tiny whole runs.

The formulas below work on whole sequences; the advantages of rollouts are taken as given.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.components import Component
from pact_fast.config import AlgorithmConfig, TrainerConfig, load_config
from pact_fast.errors import PactError
from pact_fast.train.learner import Learner
from pact_fast.train.preflight import ignored_settings
from tests.support.groups import GENERATED, lookup_chain_renderer, make_groups, step_context_of
from tests.support.loss_formulas import VOCAB, Hiddens, assert_computes, head_weight, log_pi
from tests.support.models import make
from tests.support.runs import RunProcess, assert_same, cut_back, metrics

PROMPTS, ROLLOUTS = 4, 3


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer(VOCAB)


class Formulas:
    """Terms of the formulas, for one head and its hidden states."""

    def __init__(self, renderer):
        self.renderer, self.hiddens, self.weight = renderer, Hiddens(), head_weight()

    def logs(self, context, ids, components) -> torch.Tensor:
        """log π of the generated tokens."""
        positions = [n for n, component in enumerate(components) if component in GENERATED]
        return torch.stack([log_pi(self.hiddens, self.weight, context, ids, n) for n in positions])

    def expert(self, group) -> torch.Tensor:
        """log π(h*_n | x, h*_<n), the final answer included."""
        trace = group.task.expert
        body = self.renderer.trace_context(group.task, trace, "turns")
        ids, components = self.renderer.assistant_turn(trace.answer_reasoning, trace.answer, [])
        assert Component.ANSWER in components
        context = np.concatenate([body.ids, ids]), np.concatenate([body.components, components])
        return self.logs(group.prompt_ids, *context)

    def rollout(self, group, k) -> torch.Tensor:
        trajectory = group.trajectories[k]
        return self.logs(group.prompt_ids, trajectory.ids, trajectory.components)

    def policy(self, group) -> torch.Tensor:
        """L_RL^x of a prompt at ratio 1: −mean over rollouts of the mean over tokens of r·A."""
        terms = []
        for k, (trajectory, advantage) in enumerate(zip(group.trajectories, group.advantages, strict=True)):
            logs, a = self.rollout(group, k), torch.as_tensor(advantage[trajectory.sampled], dtype=torch.float64)
            terms.append(-(torch.exp(logs - logs.detach()) * a).mean())
        return torch.stack(terms).mean()


def check(renderer, settings, formula, step):
    """`formula(formulas, group)` is the loss of a prompt."""
    config = AlgorithmConfig.model_validate(settings)
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, PROMPTS, ROLLOUTS, use_turns=algorithm.turn_advantages)
    update = step_context_of(renderer, config, groups, step=step)
    formulas = Formulas(renderer)
    expected = sum(formula(formulas, group) for group in groups) / len(groups)
    assert_computes(algorithm, groups, update, expected, formulas.hiddens, formulas.weight)


@pytest.mark.parametrize("rl", ["grpo", "matchtir"])
@pytest.mark.parametrize("step", [0, 3, 4, 9])
def test_sft_then_rl_trains_complete_traces_and_then_rollouts(renderer, rl, step):
    settings = {"name": "sft_then_rl", "sft_then_rl": {"steps": 4, "rl": rl}}

    def formula(formulas, group):
        return -formulas.expert(group).mean() if step < 4 else formulas.policy(group)

    check(renderer, settings, formula, step)


def test_sft_then_rl_needs_to_know_how_long_sft_lasts():
    with pytest.raises(PactError, match=r"needs algorithm\.sft_then_rl\.steps"):
        make_algorithm(AlgorithmConfig(name="sft_then_rl"))


def test_sections_of_other_algorithms_are_named_as_unused():
    config = load_config("quickstart", ["algorithm.sft_then_rl.steps=3", "algorithm.name=pact"])
    assert ignored_settings(config, make_algorithm(config.algorithm)) == ["algorithm.sft_then_rl.steps"]
    config = load_config("quickstart", ["algorithm.sft_then_rl.steps=3", "algorithm.name=sft_then_rl"])
    assert "algorithm.sft_then_rl.steps" not in ignored_settings(config, make_algorithm(config.algorithm))


def test_steps_without_rollouts_may_share_a_batch(renderer):
    config = AlgorithmConfig(name="sft_then_rl", sft_then_rl={"steps": 4})
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, prompts=2, rollouts=2)
    update = step_context_of(renderer, config, groups)
    model = make("qwen3", vocab_size=len(renderer.tokenizer), max_position_embeddings=2048)
    learner = Learner(model, TrainerConfig(), algorithm, total_updates=2, updates_per_batch=2)
    batches = [algorithm.prompt_batch(group, update) for group in groups]
    learner.prepare(batches)
    assert learner.accumulate(batches).loss > 0


# two optimizer steps share a batch, with a KL term
RUN = ["algorithm.name=sft_then_rl", "algorithm.sft_then_rl.steps=2"]


@pytest.mark.slow
def test_sft_then_rl_switches_within_a_run_and_resumes_in_either_stage(tmp_path):
    run = tmp_path / "run"
    RunProcess(run, *RUN).succeed()
    steps = [record for record in metrics(run) if "schedule/sft_weight" in record]
    assert [record["schedule/sft_weight"] for record in steps] == [1, 1, 0, 0]
    assert ["reward/mean" in record for record in steps] == [False, False, True, True]
    for step in (1, 3):
        again = cut_back(run, tmp_path / f"resumed_{step}", step)
        RunProcess(again, *RUN).succeed()
        assert_same(again, run)
