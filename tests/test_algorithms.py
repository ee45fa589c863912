"""Every algorithm's loss and gradients against an independent fp64 recomputation from the formulas of the method.

The oracle works on whole sequences, one at a time, in plain autograd; it knows nothing of trees, rows, packs or LossTokens.
"""

import functools

import numpy as np
import pytest
import torch

from pact_fast.algorithms.pact import prompt_only_weight
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.components import Component
from pact_fast.config import AlgorithmConfig
from pact_fast.data.types import StopReason
from tests.support.groups import GENERATED, lookup_chain_renderer, make_groups, step_context_of
from tests.support.loss_formulas import VOCAB, Hiddens, Truth, assert_computes, head_weight, log_pi


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer(VOCAB)


def policy_loss(hiddens, weight, group, config, context, trace: bool) -> torch.Tensor:
    """L_RL, from the formula: mean over rollouts of the mean over generated tokens of −w·min(rA, clip(r)A)."""
    total = torch.zeros((), dtype=torch.float64)
    for trajectory, advantage in zip(group.trajectories, group.advantages, strict=True):
        positions = [n for n in range(len(trajectory.ids)) if trajectory.components[n] in GENERATED]
        logs = [log_pi(hiddens, weight, context, trajectory.ids, n) for n in positions]
        gaps = [float(logp.detach()) - float(trajectory.logprobs[n]) for logp, n in zip(logs, positions, strict=True)]
        for logp, gap, n in zip(logs, gaps, positions, strict=True):
            ratio = torch.exp(logp - logp.detach())
            a = float(advantage[n])
            clipped = torch.clamp(ratio, 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon))
            term = -torch.minimum(ratio * a, clipped * a)
            if trace and config.trace.context_importance_weight == "token":
                term = term * min(config.trace.context_importance_weight_clip, np.exp(gap))
            if trace and config.trace.context_importance_weight == "sequence":
                term = term * min(config.trace.context_importance_weight_clip, np.exp(np.mean(gaps)))
            total = total + term / len(positions) / len(group.trajectories)
    return total


def sft_loss(hiddens, weight, group, config, context_ids, components, levels, mask) -> torch.Tensor:
    supervised = [(n, m) for n, m in enumerate(mask(components, levels)) if m]
    if not supervised:
        return torch.zeros((), dtype=torch.float64)
    z = sum(m for _, m in supervised) if config.sft.normalizer == "weighted" else len(supervised)
    return sum(-m * log_pi(hiddens, weight, group.prompt_ids, context_ids, n) for n, m in supervised) / z


def oracle(hiddens, weight, groups, config, update, renderer) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        x = group.prompt_ids
        if config.name in ("grpo", "matchtir"):
            total = total + policy_loss(hiddens, weight, group, config, x, False)
            continue
        trace = group.task.expert
        if config.name == "sft":
            context = renderer.trace_context(group.task, trace, "turns")
            mask = lambda c, _: [float(k in GENERATED) for k in c]  # noqa: E731
            total = total + sft_loss(
                hiddens, weight, group, config, context.ids, context.components, context.level, mask
            )
            continue
        z = prompt_only_weight(group, update)
        progress = update.step / update.horizon
        strength = config.sft.lambda_start - (config.sft.lambda_start - config.sft.lambda_end) * progress
        level = round(
            config.sft.reasoning_level_start
            + (config.sft.reasoning_level_end - config.sft.reasoning_level_start) * progress
        )
        cut = level if config.trace.reasoning == "level" else None
        hint = config.trace.rendering == "hint"
        context = renderer.trace_context(group.task, trace, "turns" if hint else config.trace.rendering, cut)
        conditioned = renderer.hint_prompt_ids(group.task, trace, cut) if hint else np.concatenate([x, context.ids])

        def mask(components, levels, level=level, strength=strength):
            for c, at in zip(components, levels, strict=True):
                yield 1.0 if c == Component.REASONING and at <= level else strength if c == Component.TOOL_CALL else 0.0

        if z < 1:
            rl = policy_loss(hiddens, weight, group, config, conditioned, True)
            sft = sft_loss(hiddens, weight, group, config, context.ids, context.components, context.level, mask)
            total = total + (1 - z) * (rl + config.sft.coef * sft)
        if z > 0:
            total = total + z * policy_loss(hiddens, weight, group, config, x, False)
    return total / len(groups)


CASES = {
    "grpo": {"name": "grpo"},
    "matchtir": {"name": "matchtir", "epsilon_high": 0.3},
    "sft": {"name": "sft"},
    "pact": {"name": "pact"},
    "pact blend": {"name": "pact", "anchor": {"mode": "blend", "q": 0.3}, "sft": {"normalizer": "count"}},
    "pact turns as printed": {"name": "pact", "trace": {"rendering": "turns", "context_importance_weight": "none"}},
    "pact hint sequence": {
        "name": "pact",
        "anchor": {"q": 0.0},
        "trace": {"rendering": "hint", "context_importance_weight": "sequence"},
    },
    "pact level": {
        "name": "pact",
        "anchor": {"q": 0.2},
        "trace": {"reasoning": "level", "context_importance_weight_clip": 2.0},
        "sft": {"coef": 0.7},
    },
}


@pytest.mark.parametrize(
    "share, merge",
    [
        pytest.param(True, True, id="merged"),
        pytest.param(True, False, id="tree", marks=pytest.mark.slow),
        pytest.param(False, False, id="alone", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_formulas(renderer, case, share, merge):
    algorithm, groups, update, truth, hiddens, weight = problem(renderer, case)
    config = update.config
    needs = algorithm.requirements(sampler_differs=False)
    assert needs.old_logprob == (config.name == "pact" and config.trace.context_importance_weight == "sequence")
    assert_computes(algorithm, groups, update, truth, hiddens, weight, share, merge)


@functools.lru_cache(maxsize=1)  # the formulas know nothing of packing
def problem(renderer, case):
    config = AlgorithmConfig.model_validate(CASES[case])
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, prompts=4, rollouts=3, use_turns=algorithm.turn_advantages)
    update = step_context_of(renderer, config, groups)
    weight, hiddens = head_weight(), Hiddens()
    truth = Truth.of(oracle(hiddens, weight, groups, config, update, renderer), hiddens, weight)
    return algorithm, groups, update, truth, hiddens, weight


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "prompt_mean"])
def test_weights_hold_the_normaliser_of_the_loss_type(renderer, loss_type):
    config = AlgorithmConfig(name="matchtir", loss_type=loss_type)
    groups = make_groups(renderer, config, prompts=3, rollouts=4)
    update = step_context_of(renderer, config, groups)
    scored = [s for group in groups for s in make_algorithm(config).prompt_batch(group, update).scored]
    tokens = sum(len(s.index) for s in scored)
    of_prompt = [sum(len(s.index) for s in scored if s.prompt == prompt) for prompt in range(3)]
    for s in scored:
        expected = {
            "grpo": 1 / (12 * len(s.index)), "dapo": 1 / tokens, "dr_grpo": 1 / (12 * 512),
            "prompt_mean": 1 / (3 * of_prompt[s.prompt]),
        }[loss_type]  # fmt: skip
        np.testing.assert_allclose(s.rl_weight, expected, rtol=1e-12)


def test_the_gate_is_a_fair_coin_of_the_prompt_and_step_alone(renderer):
    config = AlgorithmConfig(name="pact")
    group = make_groups(renderer, config, prompts=1, rollouts=1)[0]
    draws = []
    for step in range(2000):
        update = step_context_of(renderer, config, [group], step=step, horizon=2000)
        draws.append(prompt_only_weight(group, update))
        assert draws[-1] == prompt_only_weight(group, update)
    assert set(draws) == {0.0, 1.0}
    assert 0.35 < np.mean(draws) < 0.45


def test_a_prompt_without_a_trace_is_always_anchored(renderer):
    config = AlgorithmConfig(name="pact", anchor={"q": 0.0})
    group = make_groups(renderer, config, prompts=1, rollouts=2)[0]
    group.task.expert = None
    batch = make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, [group]))
    assert batch.route == "prompt"
    assert sum(s.rl_weight.sum() for s in batch.scored) == pytest.approx(1.0)


def test_the_final_answer_is_nowhere_in_the_trace_context(renderer):
    config = AlgorithmConfig(name="pact", anchor={"q": 0.0})
    for group in make_groups(renderer, config, prompts=20, rollouts=1):
        context = renderer.trace_context(group.task, group.task.expert, "demonstration")
        assert not (context.components == Component.ANSWER).any()


def test_truncated_rollouts_can_be_left_out(renderer):
    config = AlgorithmConfig(name="matchtir", mask_truncated_completions=True)
    group = make_groups(renderer, config, prompts=1, rollouts=2)[0]
    group.trajectories[0].stop_reason = StopReason.TIMEOUT
    scored = make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, [group])).scored
    assert not scored[0].rl_weight.any() and scored[1].rl_weight.all()
