"""Expert traces of dialogues under templates that drop earlier reasoning: they branch as rollouts do.

The oracle is the template itself: what it renders when a user has spoken, and behind that the turns and results until the next
message. It knows nothing of branches.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from pact_fast.algorithms.base import Group
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.chat.call_ids import with_call_ids
from pact_fast.chat.rendering import ChatRenderer, question_of
from pact_fast.chat.row_check import RowCheck, RowLimits
from pact_fast.chat.template_check import check_user_turns
from pact_fast.components import Component
from pact_fast.config import AlgorithmConfig, RolloutConfig
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall
from pact_fast.errors import DataError, PactError
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.train.pretrain import sft_batch
from pact_fast.train.records import rollout_record
from tests.support.asking_user import AskingUser
from tests.support.groups import step_context_of
from tests.support.loss_formulas import WIDTH, Hiddens, assert_computes
from tests.support.scripted_engine import Script
from tests.support.trl_templates import tokenizer_for

DROPS = ["qwen3", "qwen3_5_think", "nemotron_3_nano", "nemotron_3_ultra", "glm4moe", "gptoss", "gemma4_v5", "lfm2_2_5"]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
OSLO, ROME = ToolCall("weather", {"city": "Oslo"}), ToolCall("weather", {"city": "Rome"})
DIALOGUE = ExpertTrace(
    (
        ExpertTurn("It may be another Oslo.", (), (), "Which one?", "Norway's."),
        ExpertTurn("I look.\nTwice.", (OSLO,), ("7",)),
        ExpertTurn("So it is 7.", (), (), "Seven.", "And in Rome?"),
        ExpertTurn("", (ROME,), ("21",)),
        ExpertTurn("Again.", (OSLO,), ("8",)),
    ),
    "21, and 8 in Oslo.",
    "Both are known.",
)
INTERRUPTED_TWICE = ExpertTrace(
    (
        *DIALOGUE.turns[:1],
        ExpertTurn("I look.\nTwice.", (OSLO,), ("7",), "", "Hurry up."),
        ExpertTurn("Rome, too.", (ROME,), ("21",)),
        ExpertTurn("Both.", (), (), "7 and 21.", "And Oslo again?"),
        ExpertTurn("Again.", (OSLO,), ("8",), "", "Well?"),
    ),
    "8.",
    "So it is.",
)
INTERRUPTED = ExpertTrace((*DIALOGUE.turns[:1], ExpertTurn("I look.", (OSLO,), ("7",), "", "Hurry up.")), "7.", "Done.")


def task_of(expert: ExpertTrace) -> Task:
    return Task("t", [{"role": "user", "content": "How warm is Oslo?"}], [WEATHER], expert)


def dropping(name: str) -> ChatRenderer:
    return ChatRenderer(tokenizer_for(name), variables={"strftime_now": "2025-06-30"} if name == "gptoss" else None)


def reasoned(message: dict) -> dict:
    """With the reasoning under every key that some template reads."""
    return {
        **message,
        **{key: message["reasoning_content"] for key in ("reasoning", "thinking") if "reasoning_content" in message},
    }


def turn_ids(renderer: ChatRenderer, expert: ExpertTrace) -> list[np.ndarray]:
    """Return the ids of the expert's turns; the answer is last."""
    turns = [renderer.assistant_turn(turn.reasoning, turn.content, turn.calls)[0] for turn in expert.turns]
    return [*turns, renderer.assistant_turn(expert.answer_reasoning, expert.answer, [])[0]]


def shown_before(renderer: ChatRenderer, task: Task) -> list[np.ndarray]:
    """All that a policy is shown before each turn of the expert, and before the answer, by the template's own rendering."""
    messages, shown = list(task.prompt), [renderer.prompt_ids(task.prompt, task.tools)]
    for turn, written in zip(task.expert.turns, turn_ids(renderer, task.expert), strict=False):
        [said, *_] = ExpertTrace((turn,)).to_messages()
        messages += [reasoned(said), *turn.following()]
        if turn.user is None:
            shown.append(np.concatenate([shown[-1], written, renderer.bridge_ids(turn.following())]))
        else:
            shown.append(
                renderer.template_ids(renderer.template.render(with_call_ids(messages), task.tools, generate=True))
            )
    return shown


def seen_before(context, prompt_ids: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
    """(all tokens before it, index in the trace, token) of every token that the trace is trained on."""
    whole = context if len(context.branches) else None
    sequences = (
        whole.sequences() if whole else [(np.concatenate([prompt_ids, context.ids]), np.arange(len(context.ids)))]
    )
    return [
        (ids[: len(ids) - (own[-1] + 1 - index)], int(index), int(context.ids[index]))
        for ids, own in sequences
        for index in own[context.generated[own]]
    ]


# gpt-oss keeps the reasoning before a call until an answer has followed
@pytest.mark.parametrize(
    ("name", "expert", "branches"),
    [(name, DIALOGUE, 2) for name in DROPS]
    + [(name, INTERRUPTED_TWICE, 2 if name == "gptoss" else 4) for name in DROPS],
)
def test_every_turn_is_trained_in_what_the_template_shows_before_it(name, expert, branches):
    renderer, task = dropping(name), task_of(expert)
    check_user_turns(renderer, after_results=True)
    context = renderer.trace_context(task, task.expert, "turns", answer=True)
    expected = [
        (np.concatenate([shown, written[:n]]), written[n])
        for shown, written in zip(shown_before(renderer, task), turn_ids(renderer, task.expert), strict=True)
        for n in range(len(written))
    ]
    found = seen_before(context, renderer.prompt_ids(task.prompt, task.tools))
    assert len(context.branches) == branches and len(found) == len(expected)
    for (before, _, token), (shown, written) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(before, shown)
        assert token == written


@pytest.mark.parametrize("name", DROPS)
def test_what_follows_the_trace_sees_its_last_branch(name):
    renderer, task = dropping(name), task_of(DIALOGUE)
    context = renderer.trace_context(task, task.expert, "turns").last_branch()
    [*_, (ids, own)] = context.sequences()
    np.testing.assert_array_equal(ids, shown_before(renderer, task)[-1])
    assert len(own) == len(context.ids) and context.longest == len(ids) - len(context.prompt_ids)


@pytest.mark.parametrize("name", DROPS)
def test_what_follows_an_interruption_sees_what_the_template_renders(name):
    renderer, task = dropping(name), task_of(INTERRUPTED)
    context = renderer.trace_context(task, task.expert, "turns")
    [*_, (ids, _)] = context.last_branch().sequences()
    np.testing.assert_array_equal(ids, shown_before(renderer, task)[-1])


def test_a_template_that_changes_an_interruption_later_on_is_refused():
    tokenizer = copy.deepcopy(tokenizer_for("gptoss"))
    user = '"<|start|>user<|message|>" + '
    changed = user + '("(so) " if loop.nextitem is defined and (loop.previtem or {}).role == "tool" else "") + '
    tokenizer.chat_template = tokenizer.chat_template.replace(user, changed)
    renderer = ChatRenderer(tokenizer, variables={"strftime_now": "2025-06-30"})
    check_user_turns(renderer)
    with pytest.raises(PactError, match=r"changes more than that .*\(so\).* model\.chat_template"):
        check_user_turns(renderer, after_results=True)


def test_without_a_user_or_where_reasoning_is_kept_nothing_branches():
    renderer, kept = dropping("qwen3"), ChatRenderer(tokenizer_for("qwen3_training"))
    alone = ExpertTrace(DIALOGUE.turns[1:2], "7.")
    for r, expert in ((renderer, alone), (kept, DIALOGUE)):
        context = r.trace_context(task_of(expert), expert, "turns", answer=True)
        assert not len(context.branches) and context.longest == len(context.ids)
        assert context.last_branch() is context


# -- losses ----------------------------------------------------------------------------------------------------------


class Desk(AskingUser):
    tools = (WEATHER,)
    questions = 1


def group_of(renderer: ChatRenderer, expert: ExpertTrace = DIALOGUE) -> Group:
    """A prompt with two rollouts, of which the second branches twice."""
    task = task_of(expert)
    said = [
        [("", "Seven.", []), ("", "Eight.", [])],
        [("Hm.", "Seven.", []), ("So.", "", [ROME]), ("Oh.", "Warm.", [])],
    ]
    engine = Script(renderer, [[renderer.assistant_turn(*one)[0] for one in turns] for turns in said])
    trajectories = AgentLoop(engine, renderer, lambda _: Desk(), RolloutConfig()).run(
        [Job(task, (0, k)) for k in range(2)]
    )
    for trajectory, reward in zip(trajectories, (0.2, 1.0), strict=True):
        trajectory.reward, trajectory.turn_rewards = reward, [0.3] * len(trajectory.turns)
        trajectory.logprobs[trajectory.sampled] = np.linspace(-12.0, -9.0, trajectory.sampled.sum())
    assert len(trajectories[1].branches) > 0
    return Group(task, 0, trajectories[0].prompt_ids, trajectories, token_advantages(trajectories, gamma=0.9))


class Formulas:
    """Losses of a group from plain lists of tokens, in fp64."""

    def __init__(self, renderer: ChatRenderer, group: Group, config: AlgorithmConfig):
        self.renderer, self.group, self.config, self.hiddens = renderer, group, config, Hiddens()
        torch.manual_seed(0)
        self.weight = torch.randn(len(renderer.tokenizer), WIDTH, dtype=torch.float64, requires_grad=True)

    def distribution(self, prefix) -> torch.Tensor:
        return torch.log_softmax(self.hiddens(prefix) @ self.weight.T, -1)

    def behind(self, rendering: str) -> np.ndarray:
        """The context of rollouts that follow the trace."""
        task = self.group.task
        if rendering == "hint":
            return self.renderer.hint_prompt_ids(task, task.expert)
        shown = shown_before(self.renderer, task)
        if rendering == "turns":
            return shown[-1]
        following = [*task.expert.turns[-1].following(), {"role": "user", "content": question_of(task)}]
        return np.concatenate(
            [shown[-2], turn_ids(self.renderer, task.expert)[-2], self.renderer.bridge_ids(following)]
        )

    def rollouts(self, context: np.ndarray):
        """For every rollout: [(context of a sampled token, its index)], with `context` in place of the prompt."""
        prompt = self.group.prompt_ids
        for trajectory in self.group.trajectories:
            tokens = []
            for ids, own in trajectory.sequences():
                differs = np.flatnonzero(ids[: len(prompt)] != prompt)
                kept = int(differs[0]) if len(differs) else len(prompt)
                head = context[: len(context) - (len(prompt) - kept)]
                for index in own[trajectory.sampled[own]]:
                    tokens.append((np.concatenate([head, ids[kept : len(ids) - (own[-1] + 1 - index)]]), int(index)))
            yield trajectory, tokens

    def policy(self, context: np.ndarray, trace: bool) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k, (trajectory, tokens) in enumerate(self.rollouts(context)):
            for before, index in tokens:
                logp = self.distribution(before)[trajectory.ids[index]]
                gap = float(logp.detach()) - float(trajectory.logprobs[index])
                importance = min(np.exp(gap), self.config.trace.context_importance_weight_clip) if trace else 1.0
                a = float(self.group.advantages[k][index])
                total = total - importance * a * torch.exp(logp - logp.detach()) / len(tokens)
        return total / len(self.group.trajectories)

    def expert(self, weights_of, final_answer: bool) -> torch.Tensor:
        """Σ m·(−log π) / Σ m over the expert's tokens, each in the context that the template renders."""
        task = self.group.task
        context = self.renderer.trace_context(task, task.expert, "turns", answer=final_answer)
        weights = weights_of(context)[context.generated]
        turns = turn_ids(self.renderer, task.expert)[: None if final_answer else -1]
        losses = [
            -self.distribution(np.concatenate([shown, written[:n]]))[written[n]]
            for shown, written in zip(shown_before(self.renderer, task), turns, strict=False)
            for n in range(len(written))
        ]
        assert len(losses) == len(weights) and weights.any()
        return (torch.tensor(weights, dtype=torch.float64) * torch.stack(losses)).sum() / weights.sum()

    def distilled(self, rendering: str) -> torch.Tensor:
        """Reverse KL of the policy from itself behind the trace."""
        pairs = zip(self.rollouts(self.group.prompt_ids), self.rollouts(self.behind(rendering)), strict=True)
        total = torch.zeros((), dtype=torch.float64)
        for (_, students), (_, teachers) in pairs:
            for (x, _), (c, _) in zip(students, teachers, strict=True):
                p, q = self.distribution(x), self.distribution(c).detach()
                total = total + (p.exp() * (p - q)).sum() / len(students)
        return total / len(self.group.trajectories)


def ones(context) -> np.ndarray:
    return np.ones(len(context.ids))


def pact_weights(context) -> np.ndarray:
    """1 in reasoning up to the level of the step, λ in calls; λ and level as the settings below fix them."""
    reasoning = (context.components == Component.REASONING) & (context.level <= 4)
    return np.where(context.components == Component.TOOL_CALL, 0.4, reasoning.astype(float))


PACT = {
    "name": "pact",
    "anchor": {"mode": "blend", "q": 0.3},
    "sft": {
        "coef": 0.7, "lambda_start": 0.4, "lambda_end": 0.4, "reasoning_level_start": 4, "reasoning_level_end": 4,
    },
}  # fmt: skip
CHORD = {"mu_warmup_steps": 0, "mu_decay_steps": 1, "mu_peak": 0.4, "mu_valley": 0.4, "enable_phi_function": False}
CASES = {
    "sft": ({"name": "sft", "sft": {"final_answer": True}}, lambda f: f.expert(ones, True)),
    "chord": ({"name": "chord", "chord": CHORD},
              lambda f: 0.6 * f.policy(f.group.prompt_ids, False) + 0.4 * f.expert(ones, True)),
    "sdft": ({"name": "sdft", "trace": {"rendering": "turns"}}, lambda f: f.distilled("turns")),
    **{
        f"pact {rendering}": (
            {**PACT, "trace": {"rendering": rendering}},
            lambda f, rendering=rendering: 0.3 * f.policy(f.group.prompt_ids, False)
            + 0.7 * (f.policy(f.behind(rendering), True) + 0.7 * f.expert(pact_weights, False)),
        )
        for rendering in ("demonstration", "hint")
    },
}  # fmt: skip


RUNS = [  # qwen3 appends to the prompt; qwen3_5_think leaves out its end, where the generation prompt opens the reasoning
    *(("qwen3_5_think", case, True, False) for case in CASES),
    ("qwen3", "sft", True, False), ("qwen3", "pact demonstration", True, False),
    ("qwen3_5_think", "pact demonstration", True, True), ("qwen3_5_think", "pact demonstration", False, False),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, case, share, merge", RUNS)
def test_losses_are_sums_over_branches_with_each_token_once_in_its_context(name, case, share, merge):
    renderer = dropping(name)
    settings, formula = CASES[case]
    config, group = AlgorithmConfig.model_validate(settings), group_of(renderer)
    if settings["name"] == "sft":
        group.trajectories, group.advantages = [], []
    formulas = Formulas(renderer, group, config)
    step = step_context_of(renderer, config, [group])
    expected = formula(formulas)
    assert_computes(make_algorithm(config), [group], step, expected, formulas.hiddens, formulas.weight, share, merge)


def test_without_sft_the_tree_has_the_last_branch_alone():
    renderer = dropping("qwen3_5_think")
    group, sizes = group_of(renderer), {}
    for coef in (0.0, 1.0):
        config = AlgorithmConfig.model_validate({**PACT, "sft": {"coef": coef}})
        batch = make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, [group]))
        sizes[coef] = len(batch.trees[0])
        paths = [np.concatenate([node.ids for node in leaf.path()]).tolist() for leaf in batch.trees[0].leaves()]
        assert (any("It may be another" in renderer.token_bytes.join(path).decode() for path in paths)) == bool(coef)
    assert sizes[0.0] < sizes[1.0]


def test_the_record_of_a_rollout_shows_the_branches_of_the_trace_and_what_is_trained_in_them():
    renderer, config = dropping("qwen3"), AlgorithmConfig.model_validate(PACT)
    group = group_of(renderer)
    batch = make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, [group]))
    expert = rollout_record(renderer, group.task, group.trajectories[0], step=1, kind="train", batch=batch)["expert"]
    assert len(expert["branches"]) == 2 and json.dumps(expert)
    trained = "".join(token for token, weight in zip(expert["tokens"], expert["weights"], strict=True) if weight)
    assert trained.count("It may be another Oslo.") == trained.count("So it is 7.") == 1 and "Seven." not in trained


def test_pretraining_trains_each_token_once_in_its_branch():
    renderer, tasks = dropping("qwen3_5_think"), [task_of(DIALOGUE), task_of(INTERRUPTED), task_of(DIALOGUE)]
    batch = sft_batch(tasks, [task.expert for task in tasks], renderer)
    found = [
        (
            np.concatenate([*(node.ids for node in s.node.path()[:-1]), s.node.ids[:index]]).tolist(),
            int(s.node.ids[index]),
        )
        for s in batch.scored
        for index in s.index
    ]
    expected = [
        ([*shown.tolist(), *written[:n].tolist()], int(written[n]))
        for task in tasks
        for shown, written in zip(shown_before(renderer, task), turn_ids(renderer, task.expert), strict=True)
        for n in range(len(written))
    ]
    assert sorted(found) == sorted(expected)


def test_the_window_has_to_hold_the_longest_branch_not_their_sum():
    renderer, task = dropping("qwen3"), task_of(DIALOGUE)
    context = renderer.trace_context(task, task.expert, "turns")
    prompt = len(renderer.prompt_ids(task.prompt, task.tools))
    longest = max(len(ids) for ids, _ in context.sequences())
    assert longest < prompt + len(context.ids)
    limits = {"prompt": 1000, "trace": "turns"}
    RowCheck(renderer, RowLimits(window=longest, **limits)).check(task)
    with pytest.raises(DataError, match="window"):
        RowCheck(renderer, RowLimits(window=longest - 1, **limits)).check(task)
