"""The baselines that mix expert traces and rollouts, against their published formulas in fp64, and as tiny whole runs.

The formulas below work on whole sequences; the advantages of rollouts are taken as given.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pact_fast.algorithms.chord import mu_at
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.loss_table import build_loss_table, teacher_pairs
from pact_fast.batch.packing import distribute_packs
from pact_fast.components import Component
from pact_fast.config import AlgorithmConfig, TrainerConfig, load_config
from pact_fast.config.schema import ChordConfig
from pact_fast.errors import PactError
from pact_fast.train.learner import Learner
from pact_fast.train.preflight import check_settings, ignored_settings
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

    def surrogate(self, group, k, advantage) -> torch.Tensor:
        """−r·A of the tokens of a rollout, at ratio 1; A is one number, or one for each token."""
        logs = self.rollout(group, k)
        return -torch.exp(logs - logs.detach()) * torch.as_tensor(advantage, dtype=torch.float64)

    def rollouts(self, group) -> list[torch.Tensor]:
        """−r·A of the tokens of each rollout, with the group's advantages."""
        pairs = zip(group.trajectories, group.advantages, strict=True)
        return [self.surrogate(group, k, a[t.sampled]) for k, (t, a) in enumerate(pairs)]

    def policy(self, group) -> torch.Tensor:
        """L_RL^x of a prompt at ratio 1: −mean over rollouts of the mean over tokens of r·A."""
        terms = []
        for k, (trajectory, advantage) in enumerate(zip(group.trajectories, group.advantages, strict=True)):
            logs, a = self.rollout(group, k), torch.as_tensor(advantage[trajectory.sampled], dtype=torch.float64)
            terms.append(-(torch.exp(logs - logs.detach()) * a).mean())
        return torch.stack(terms).mean()


def aggregate(loss_type, prompts) -> torch.Tensor:
    """Mean over prompts, each a list of sequences, each the losses of its tokens [n]; as `loss_type` says."""
    if loss_type == "dapo":
        return torch.cat([tokens for sequences in prompts for tokens in sequences]).mean()
    of_prompt = {
        "grpo": lambda sequences: torch.stack([tokens.mean() for tokens in sequences]).mean(),
        "dr_grpo": lambda sequences: sum(tokens.sum() for tokens in sequences) / (len(sequences) * 512),
        "prompt_mean": lambda sequences: torch.cat(sequences).mean(),
    }[loss_type]
    return torch.stack([of_prompt(sequences) for sequences in prompts]).mean()


def check_step(renderer, settings, formula, step=3, without_trace=()):
    """`formula(formulas, groups)` is the loss of an optimizer step; some prompts may have no expert trace."""
    config = AlgorithmConfig.model_validate(settings)
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, PROMPTS, ROLLOUTS, use_turns=algorithm.turn_advantages)
    for index, group in enumerate(groups):
        group.task.expert = None if index in without_trace else group.task.expert
        for k, trajectory in enumerate(group.trajectories):
            trajectory.env_rewards["success"] = float(k < index)  # prompt 0 is never solved, the last one always
    update = step_context_of(renderer, config, groups, step=step)
    formulas = Formulas(renderer)
    expected = formula(formulas, groups)
    assert_computes(algorithm, groups, update, expected, formulas.hiddens, formulas.weight)


LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "prompt_mean"]
SCHEDULE = {"mu_peak": 0.6, "mu_valley": 0.2, "mu_warmup_steps": 4, "mu_decay_steps": 4}
MU = {0: 0.0, 1: 0.15, 3: 0.45, 4: 0.6, 6: 0.4, 7: 0.2 + 0.2 * (1 - 0.5**0.5), 8: 0.2, 99: 0.2}


@pytest.mark.parametrize(
    "settings, step, without_trace",
    [({"loss_type": name, "chord": {"mu_peak": 0.3, "mu_valley": 0.3}}, 3, (1,)) for name in LOSS_TYPES]
    + [({"chord": SCHEDULE}, step, ()) for step in (0, 3, 6)]
    + [({"chord": {"mu_peak": 0.9, "enable_phi_function": False, "rl": "matchtir"}}, 0, (0, 2))],
    ids=[*LOSS_TYPES, "warm-up begins", "warm-up", "decay", "no phi, matchtir"],
)
def test_chord_mixes_two_means_by_mu_and_weights_expert_tokens_by_phi(renderer, settings, step, without_trace):
    loss_type = settings.get("loss_type", "grpo")
    mu = MU[step] if settings["chord"] is SCHEDULE else settings["chord"].get("mu_valley", 0.1)

    def formula(formulas, groups):
        traces = [formulas.expert(group) for group in groups if group.task.expert]
        p = [logs.detach().exp() for logs in traces]
        phi = [x * (1 - x) if settings["chord"].get("enable_phi_function", True) else 1.0 for x in p]
        sft = aggregate(loss_type, [[-weight * logs] for weight, logs in zip(phi, traces, strict=True)])
        return (1 - mu) * aggregate(loss_type, [formulas.rollouts(group) for group in groups]) + mu * sft

    check_step(renderer, {"name": "chord", **settings}, formula, step, without_trace)


def test_mu_rises_linearly_and_falls_along_a_cosine():
    for step, mu in MU.items():
        assert mu_at(step, ChordConfig(**SCHEDULE)) == pytest.approx(mu, abs=1e-15)
    assert {mu_at(step, ChordConfig()) for step in range(9)} == {0.1}  # CHORD-φ as published


@pytest.mark.parametrize("loss_type, reward", [*zip(LOSS_TYPES, (1.0, 0.4, 1.0, 0.4), strict=True)])
def test_luffy_adds_the_trace_to_the_group_with_a_shaped_ratio(renderer, loss_type, reward):
    """The baseline counts the trace; no advantage is divided by a standard deviation; a prompt may have no trace."""

    def formula(formulas, groups):
        prompts = []
        for group in groups:
            rewards = [t.reward for t in group.trajectories] + ([reward] if group.task.expert else [])
            baseline = sum(rewards) / len(rewards)
            sequences = [
                formulas.surrogate(group, k, np.float32(t.reward - baseline)) for k, t in enumerate(group.trajectories)
            ]
            if group.task.expert:
                p = formulas.expert(group).exp()
                sequences.append(-p / (p + 0.25) * (reward - baseline))
            prompts.append(sequences)
        return aggregate(loss_type, prompts)

    settings = {"name": "luffy", "loss_type": loss_type, "luffy": {"gamma": 0.25, "expert_reward": reward}}
    check_step(renderer, settings, formula, without_trace=(2,))


def test_luffy_learns_from_the_trace_alone_where_no_rollout_is_solved(renderer):
    config = AlgorithmConfig(name="luffy")
    [group] = make_groups(renderer, config, prompts=1, rollouts=3)
    update = step_context_of(renderer, config, [group])
    for trajectory in group.trajectories:
        trajectory.reward = 0.0
    *rollouts, expert = make_algorithm(config).prompt_batch(group, update).scored
    assert {float(a) for s in rollouts for a in s.advantage} == {-0.25}
    assert expert.sft_weight.sum() == pytest.approx(0.75 / 4)
    for trajectory in group.trajectories:
        trajectory.reward = 1.0
    assert not any(
        s.advantage.any() or s.sft_weight.any() for s in make_algorithm(config).prompt_batch(group, update).scored
    )


@pytest.mark.parametrize(
    "gate, rl, loss_type", [(0, "grpo", "grpo"), (1, "matchtir", "grpo"), (3, "grpo", "grpo"), (1, "grpo", "dapo")]
)
def test_hpt_trains_traces_of_prompts_that_few_rollouts_solve(renderer, gate, rl, loss_type):
    def formula(formulas, groups):
        switched = [solved <= gate and group.task.expert is not None for solved, group in enumerate(groups)]
        pairs = [*zip(groups, switched, strict=True)]
        sft = sum(0.3 * -formulas.expert(group).mean() for group, by_trace in pairs if by_trace)
        if loss_type == "dapo":  # tokens that are left out count, too
            tokens = sum(int(t.sampled.sum()) for group in groups for t in group.trajectories)
            surrogates = [sum(r.sum() for r in formulas.rollouts(group)) for group, by_trace in pairs if not by_trace]
            return sft / len(groups) + sum(surrogates) / tokens
        return (sft + sum(formulas.policy(group) for group, by_trace in pairs if not by_trace)) / len(groups)

    settings = {"name": "hpt", "loss_type": loss_type, "hpt": {"gate": gate, "sft_coef": 0.3, "rl": rl}}
    check_step(renderer, settings, formula, without_trace=(1,) if gate == 3 else ())


def test_hpt_needs_an_outcome_to_count(renderer):
    config = AlgorithmConfig(name="hpt")
    [group] = make_groups(renderer, config, prompts=1, rollouts=2)
    group.trajectories[1].env_rewards = {}
    with pytest.raises(PactError, match="counts solved rollouts, and the environment gives no 'success'"):
        make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, [group]))


DIVERGENCES = {
    "reverse_kl": lambda p, q: (p.exp() * (p - q)).sum(-1),
    "forward_kl": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "jsd": lambda p, q: sum((x.exp() * (x - ((p.exp() + q.exp()) / 2).log())).sum(-1) for x in (p, q)) / 2,
}


@pytest.mark.parametrize(
    "divergence, rendering, loss_type",
    [("reverse_kl", "demonstration", "grpo"), ("reverse_kl", "hint", "dapo"), ("forward_kl", "turns", "dr_grpo"),
     ("jsd", "demonstration", "prompt_mean")],
)  # fmt: skip
def test_sdft_distils_the_policy_that_sees_the_trace_into_itself(renderer, divergence, rendering, loss_type):
    def formula(formulas, groups):
        prompts = []
        for group in groups:
            trace = group.task.expert
            if rendering == "hint":
                context = renderer.hint_prompt_ids(group.task, trace)
            else:
                context = np.concatenate([group.prompt_ids, renderer.trace_context(group.task, trace, rendering).ids])
            rollouts = []
            for trajectory in group.trajectories:
                positions = [n for n, c in enumerate(trajectory.components) if c in GENERATED]
                student, teacher = (
                    torch.stack([distribution(formulas, start, trajectory.ids[:n]) for n in positions])
                    for start in (group.prompt_ids, context)
                )
                rollouts.append(DIVERGENCES[divergence](student, teacher.detach()))
            prompts.append(rollouts)
        return aggregate(loss_type, prompts)

    settings = {"divergence": divergence}
    check_step(
        renderer, {"name": "sdft", "sdft": settings, "trace": {"rendering": rendering}, "loss_type": loss_type}, formula
    )


def distribution(formulas, context, prefix) -> torch.Tensor:
    """log π(· | context, prefix) [V]."""
    return torch.log_softmax(formulas.hiddens(np.concatenate([context, prefix])) @ formulas.weight.T, -1)


def test_sdft_keeps_a_rollout_and_its_teacher_in_one_pack_whatever_the_packing(renderer):
    config = AlgorithmConfig(name="sdft")
    groups = make_groups(renderer, config, prompts=2, rollouts=3)
    algorithm = make_algorithm(config)
    prompt_batches = algorithm.prompt_batches(groups, step_context_of(renderer, config, groups))
    trees = [tree for batch in prompt_batches for tree in batch.trees]
    scored = [s for batch in prompt_batches for s in batch.scored]
    sizes = []
    for share in (True, False):
        for budget in (1, 400, 900, 100_000):
            for ranks in (1, 2, 5):
                table = distribute_packs(
                    trees,
                    max_tokens=budget,
                    ranks=ranks,
                    cost=lambda tokens, pairs: tokens + pairs,
                    share=share,
                    merge=True,
                )
                packs = [pack for row in table for pack in row]
                pairs = [len(teacher_pairs(build_loss_table(pack, scored)[1])[0]) for pack in packs]
                assert sum(pairs) == sum(len(s.index) for s in scored) // 2
                sizes.append(len([pack for pack in packs if len(pack)]))
    assert min(sizes) == 1 and max(sizes) == 6


def test_sdft_needs_traces_and_neither_rewards_nor_groups(renderer):
    config = load_config("quickstart", ["algorithm.name=sdft", "rollout.num_generations=1"])
    algorithm = make_algorithm(config.algorithm)
    check_settings(config, algorithm)
    filtered = load_config("quickstart", ["algorithm.name=sdft", "algorithm.filter_groups.enable=true"])
    with pytest.raises(PactError, match=r"has no effect with algorithm\.name=sdft, which uses no rewards"):
        check_settings(filtered, algorithm)
    [group] = make_groups(renderer, config.algorithm, prompts=1, rollouts=1)
    group.task.expert = None
    with pytest.raises(PactError, match=r"algorithm\.name=sdft needs an expert trace in every row"):
        algorithm.prompt_batch(group, step_context_of(renderer, config.algorithm, [group]))


def test_contexts_cannot_be_compared_across_ranks_of_a_pack(renderer):
    model = make("qwen3", vocab_size=len(renderer.tokenizer), max_position_embeddings=2048)
    with pytest.raises(PactError, match=r"trainer\.sequence_parallel_size: this algorithm compares"):
        Learner(
            model, TrainerConfig(), make_algorithm(AlgorithmConfig(name="sdft")), total_updates=1,
            world=SimpleNamespace(sequence_parallel=2, sequence_group=None),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["luffy", "hpt"])
def test_prompts_that_nobody_solves_are_not_filtered_out_where_their_traces_are_trained(name):
    with pytest.raises(PactError, match=r"algorithm\.filter_groups drops prompts that no rollout solves"):
        make_algorithm(AlgorithmConfig(name=name, filter_groups={"enable": True}))


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chord", "luffy", "hpt", "sdft"])
def test_two_steps_of_a_run_and_a_resumed_one(name, tmp_path):
    settings = [f"algorithm.name={name}", "trainer.max_steps=2"]
    run = tmp_path / "run"
    RunProcess(run, *settings).succeed()
    losses = [record["loss"] for record in metrics(run) if "loss" in record]
    assert len(losses) == 2 and all(losses)
    again = cut_back(run, tmp_path / "resumed", 1)
    RunProcess(again, *settings).succeed()
    assert_same(again, run)
