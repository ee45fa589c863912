"""Rollouts that branch: losses, records and exchange against a plain list of the context of each sampled token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.algorithms.branches import add_branches, add_context, rewound
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.tree import TokenTree
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component, LossContext
from pact_fast.config import AlgorithmConfig, RolloutConfig
from pact_fast.data.types import Task, Trajectory, TurnRecord
from pact_fast.distributed.serialization import decode, encode
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.embedded.engine import TransformersEngine
from pact_fast.train.importance import set_importance_weights
from pact_fast.train.records import rollout_record
from tests.support.asking_user import AskingUser
from tests.support.groups import lookup_chain_renderer, make_groups, step_context_of
from tests.support.loss_formulas import VOCAB, Hiddens, assert_computes, head_weight
from tests.support.trl_templates import tokenizer_for

LOST = 3  # most tokens of the generation prompt that a branch leaves out


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer(VOCAB)


class Dialogue:
    """A rollout made of random tokens, and for every sampled token its context.

    seen  [(tokens of the prompt left out, tokens after the prompt, sampled token, its log-prob, its index in `ids`)]
    """

    def __init__(self, prompt_ids: np.ndarray, rng: random.Random, branches: int):
        self.prompt_ids, self.rng, self.seen = prompt_ids, rng, []
        self.ids, self.sampled, self.logprobs, self.turns = [], [], [], []
        self.table, self.lost, self.after, self.turn = [], 0, [], 0  # `after`: tokens of the sequence after the prompt
        self.speak()
        for _ in range(branches):
            self.rewrite()
            self.speak()

    def speak(self):
        for _ in range(self.rng.randint(2, 5)):
            token, logprob = self.rng.randrange(VOCAB), -10 - 3 * self.rng.random()  # about those of the head below
            self.seen.append((self.lost, list(self.after), token, logprob, len(self.ids)))
            self.store(token, True, logprob)
        self.turn += 1

    def rewrite(self):
        keep = self.rng.randint(-LOST, len(self.after) + self.lost - 1)  # in tokens after the whole prompt
        start = len(self.prompt_ids) - self.lost  # where `after` begins
        sequence = [*self.prompt_ids[:start].tolist(), *self.after][: max(len(self.prompt_ids) + keep, 0)]
        self.lost = max(self.lost, -keep) if keep < 0 else self.lost
        self.after = sequence[len(self.prompt_ids) - self.lost :]
        self.table.append((len(self.ids), keep))
        for _ in range(self.rng.randint(1, 4)):
            self.store(self.rng.randrange(VOCAB), False, np.nan)

    def store(self, token, sampled, logprob):
        self.after.append(token)
        self.ids.append(token)
        self.sampled.append(sampled)
        self.logprobs.append(logprob)
        self.turns.append(self.turn if sampled else self.turn - 1)

    def trajectory(self, reward: float) -> Trajectory:
        sampled = np.array(self.sampled)
        return Trajectory(
            "t", self.prompt_ids, np.array(self.ids), np.where(sampled, Component.ANSWER, Component.TEMPLATE).astype("u1"),
            np.array(self.turns, np.int16), sampled, np.array(self.logprobs, np.float32),
            np.where(sampled, 0, -1).astype(np.int32), [TurnRecord("", "", "")] * self.turn, "answer",
            turn_rewards=[self.rng.random() for _ in range(self.turn)], reward=reward,
            branches=np.array(self.table, np.int64).reshape(-1, 2),
        )  # fmt: skip


def branched_groups(renderer, config, seed):
    """(groups, the dialogues behind their rollouts): without, with one and with several branches."""
    rng = random.Random(seed)
    groups = make_groups(renderer, config, prompts=1, rollouts=1)
    dialogues = [[Dialogue(g.prompt_ids, rng, n) for n in (0, 1, rng.randint(2, 5))] for g in groups]
    for group, made in zip(groups, dialogues, strict=True):
        group.trajectories = [dialogue.trajectory(rng.random()) for dialogue in made]
        group.advantages = token_advantages(group.trajectories, gamma=0.9)
    return groups, dialogues


def policy_loss(hiddens, weight, config, context, dialogue, advantage, trace):
    """−Σ w·A·π/π over the sampled tokens of a rollout / their number; every token in its own context."""
    logs = []
    for lost, after, token, logprob, index in dialogue.seen:
        prefix = [*context[: len(context) - lost].tolist(), *after]
        logp = torch.log_softmax(hiddens(prefix) @ weight.T, -1)[token]
        logs.append((logp, float(logp.detach()) - float(np.float32(logprob)), float(advantage[index])))
    total = torch.zeros((), dtype=torch.float64)
    for logp, gap, a in logs:
        importance = min(np.exp(gap), config.trace.context_importance_weight_clip) if trace else 1.0
        total = total - importance * a * torch.exp(logp - logp.detach())
    return total / len(dialogue.seen)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "matchtir"},
        {"name": "pact", "anchor": {"mode": "blend", "q": 0.3}, "sft": {"coef": 0.0}},
        {"name": "pact", "anchor": {"q": 0.0}, "sft": {"coef": 0.0},
         "trace": {"rendering": "turns"}},
        {"name": "pact", "anchor": {"mode": "blend", "q": 0.5}, "sft": {"coef": 0.0}, "trace": {"rendering": "hint"}},
    ],
    ids=["matchtir", "pact blend", "pact turns", "pact hint"],
)  # fmt: skip
@pytest.mark.parametrize(
    "share, merge",
    [
        pytest.param(True, False, id="tree"),
        pytest.param(True, True, id="merged", marks=pytest.mark.slow),
        pytest.param(False, False, id="alone", marks=pytest.mark.slow),
    ],
)
def test_every_branch_is_trained_as_if_it_were_a_sequence_of_its_own(renderer, settings, share, merge):
    config = AlgorithmConfig.model_validate(settings)
    groups, dialogues = branched_groups(renderer, config, seed=len(str(settings)))
    update = step_context_of(renderer, config, groups)
    hiddens, weight = Hiddens(), head_weight()
    expected = torch.zeros((), dtype=torch.float64)
    q = config.anchor.q if config.name == "pact" else 1.0
    for group, made in zip(groups, dialogues, strict=True):
        for dialogue, advantage in zip(made, group.advantages, strict=True):
            contexts = [(q, group.prompt_ids, False)]
            if q < 1:
                conditioned = (
                    renderer.hint_prompt_ids(group.task, group.task.expert)
                    if config.trace.rendering == "hint"
                    else np.concatenate(
                        [
                            group.prompt_ids,
                            renderer.trace_context(group.task, group.task.expert, config.trace.rendering).ids,
                        ]
                    )
                )
                contexts.append((1 - q, conditioned, True))
            for z, context, trace in contexts:
                loss = policy_loss(hiddens, weight, config, context, dialogue, advantage, trace) if z else 0.0
                expected = expected + z * loss / len(made) / len(groups)
    assert_computes(make_algorithm(config), groups, update, expected, hiddens, weight, share, merge)


def test_a_weight_per_rollout_is_one_over_all_of_its_branches(renderer):
    config = AlgorithmConfig(name="pact", anchor={"q": 0.0}, trace={"context_importance_weight": "sequence"})
    groups, dialogues = branched_groups(renderer, config, seed=2)
    algorithm = make_algorithm(config)
    scored = algorithm.prompt_batch(groups[0], step_context_of(renderer, config, groups)).scored
    rollouts = [s for s in scored if s.context == LossContext.TRACE]
    gaps = {}
    for s in rollouts:
        s.old_logprob = s.sampler_logprob - np.linspace(0.1, 0.9, len(s.index))
        gaps.setdefault(s.rollout, []).extend(s.old_logprob - s.sampler_logprob)
    set_importance_weights(scored, LossContext.TRACE, algorithm.requirements(False).importance[LossContext.TRACE])
    assert len(rollouts) > len(gaps) == len(dialogues[0])
    for s in rollouts:
        np.testing.assert_allclose(s.importance, np.exp(np.mean(gaps[s.rollout])), rtol=1e-6)
        assert len(s.importance) == len(s.index)


@pytest.mark.parametrize("seed", range(30))
def test_the_tree_of_a_rollout_holds_its_sequences_and_shares_what_they_share(seed):
    rng = random.Random(seed)
    prompt = np.arange(VOCAB - 9, VOCAB)
    dialogue = Dialogue(prompt, rng, rng.randint(0, 5))
    trajectory = dialogue.trajectory(0.0)
    sequences = trajectory.sequences()
    by_index = {i: (ids, n) for ids, own in sequences for n, i in enumerate(own, start=len(ids) - len(own))}
    for lost, after, token, _, index in dialogue.seen:
        ids, n = by_index[index]
        assert ids[: n + 1].tolist() == [*prompt[: len(prompt) - lost], *after, token]
    tail = rewound([trajectory])
    tree = TokenTree()
    pieces = add_branches(tree, add_context(tree, prompt, None, tail), trajectory)
    paths = [np.concatenate([node.ids for node in leaf.path()]).tolist() for leaf in tree.leaves()]
    assert all(any(path[: len(ids)] == ids.tolist() for path in paths) for ids, _ in sequences)
    assert len(tree) <= len(prompt) + len(trajectory.ids) + LOST * len(trajectory.branches)  # shared tokens occur once
    assert [p.start for p in pieces[1:]] == [p.end for p in pieces[:-1]] and pieces[-1].end == len(trajectory.ids)


def test_a_rollout_without_branches_is_one_node_and_leaves_the_prompt_whole(renderer):
    config = AlgorithmConfig(name="pact", anchor={"mode": "blend", "q": 0.5})
    group = make_groups(renderer, config, prompts=1, rollouts=2)[0]
    batch = make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, [group]))
    assert [len(node.ids) for node in batch.trees[0].nodes if node.parent is None] == [len(group.prompt_ids)]
    rollouts = [s for s in batch.scored if s.context != LossContext.EXPERT]
    assert len(rollouts) == 4 and all(s.offset == 0 for s in rollouts)
    assert all((s.node.ids == group.trajectories[s.rollout].ids).all() for s in rollouts)


def test_records_and_messages_between_ranks_hold_the_branches(renderer):
    config = AlgorithmConfig(name="pact", anchor={"mode": "blend", "q": 0.5})
    groups, _ = branched_groups(renderer, config, seed=1)
    group = groups[0]
    batch = make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, groups))
    for k, trajectory in enumerate(group.trajectories):
        record = rollout_record(renderer, group.task, trajectory, step=1, kind="train", batch=batch, k=k)
        assert record.get("branches", []) == trajectory.branches.tolist()
        weights = np.array([np.nan if w is None else w for w in record["weights"]])
        # 1 in total (q and 1 − q), divided by the rollouts of the step and the sampled tokens of this one
        np.testing.assert_allclose(weights[trajectory.sampled], 1 / 3 / trajectory.sampled.sum(), rtol=1e-3)
        assert np.isnan(weights[~trajectory.sampled]).all()
        again = decode(encode(trajectory))
        assert np.array_equal(again.branches, trajectory.branches) and again.branches.shape == (
            k if k < 2 else len(again.branches),
            2,
        )


def test_rollouts_with_branches_after_an_undivided_context_are_an_error():
    dialogue = Dialogue(np.arange(9), random.Random(0), 0)
    dialogue.table.append((len(dialogue.ids), -2))
    dialogue.store(5, False, np.nan)
    tree = TokenTree()
    with pytest.raises(ValueError, match="add_context"):
        add_branches(tree, tree.add(np.arange(9)), dialogue.trajectory(0.0))


def sampled_dialogues(renderer, keys, slots):
    """Dialogues of a tiny model with random weights, of which a quarter of all tokens end a turn."""
    engine = TransformersEngine(tiny_model(), range(0, VOCAB_OF_TRL, 4), slots=slots)
    loop = AgentLoop(engine, renderer, lambda task: AskingUser(), RolloutConfig(max_turn_tokens=40, max_turns=9))
    task = Task("t", [{"role": "user", "content": "How warm is Oslo?"}])
    return loop.run([Job(task, (7, key)) for key in keys])


VOCAB_OF_TRL = 640  # at least as many as the tokenizers of tests/support/trl_templates.py have


def tiny_model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_OF_TRL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def test_the_embedded_engine_samples_every_branch_from_its_own_context_bit_for_bit_again():
    """The template opens the reasoning, so that every turn is reasoning, and the next user message makes a branch."""
    renderer = ChatRenderer(tokenizer_for("qwen3_5_think"))
    trajectories = sampled_dialogues(renderer, range(3), slots=3)
    again, (alone,) = sampled_dialogues(renderer, range(3), slots=3), sampled_dialogues(renderer, [0], slots=1)
    np.testing.assert_array_equal(trajectories[0].ids, alone.ids)
    model = tiny_model()
    for trajectory, other in zip(trajectories, again, strict=True):
        assert len(trajectory.branches) == 3 and trajectory.rewound > 0
        for column in ("ids", "logprobs", "branches", "sampled", "turn_ids"):
            np.testing.assert_array_equal(getattr(trajectory, column), getattr(other, column))
        for ids, own in trajectory.sequences():
            with torch.no_grad():
                expected = torch.log_softmax(model(torch.as_tensor(ids)[None]).logits[0], -1)
            sampled = own[trajectory.sampled[own]]
            at = torch.as_tensor(sampled + len(ids) - own[-1] - 1)
            found = expected[at - 1, torch.as_tensor(trajectory.ids[sampled])].numpy()
            np.testing.assert_allclose(trajectory.logprobs[sampled], found, atol=1e-5)
