"""Dialogues whose template rewrites the past, on real vLLM, which finds the kept tokens in its cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import RolloutConfig, load_config
from pact_fast.data.types import Task
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.engine import Request
from pact_fast.rollout.registry import make_engine
from tests.support.asking_user import AskingUser
from tests.support.trl_templates import tokenizer_for
from tests.support.vllm_engines import SETTINGS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def renderer():
    """Its template opens the reasoning, and drops it: every message of the user makes a branch. A quarter of all tokens end
    a turn."""
    made = ChatRenderer(tokenizer_for("qwen3_5_think"))
    made.stop_ids = lambda at_tool_call: tuple(range(0, len(made.tokenizer), 4))
    return made


@pytest.fixture(scope="module")
def model(renderer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(renderer.tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=2048,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def engine(renderer, model):
    more = ["rollout.max_prompt_length=1000", "rollout.vllm_args={block_size: 32, enforce_eager: true}"]
    config = load_config("quickstart", [*SETTINGS, *more])
    made = make_engine(config, model, renderer)
    made.update_weights(model, 0)
    yield made
    made.shutdown()


@torch.no_grad()
def own_logprobs(model, ids: np.ndarray) -> np.ndarray:
    """log π of every token but the first, after all before it."""
    logits = model(torch.as_tensor(ids)[None]).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.as_tensor(ids[1:, None]))[:, 0].numpy()


def finished(engine):
    """The turn under way, when it has ended."""
    while not (done := engine.step()):
        pass
    return done[0]


def test_every_branch_is_sampled_in_its_own_context(engine, renderer, model):
    loop = AgentLoop(engine, renderer, lambda task: AskingUser(), RolloutConfig(max_turn_tokens=40, max_turns=9))
    task = Task("t", [{"role": "user", "content": "How warm is Oslo?"}])
    for trajectory in loop.run([Job(task, (7, key)) for key in range(4)]):
        assert len(trajectory.branches) == 3 and trajectory.rewound > 0
        for ids, own in trajectory.sequences():
            sampled = own[trajectory.sampled[own]]
            expected = own_logprobs(model, ids)[sampled + len(ids) - own[-1] - 2]
            np.testing.assert_allclose(trajectory.logprobs[sampled], expected, atol=1e-4)


def test_what_stays_of_a_context_is_found_in_the_prefix_cache(engine, model):
    """`keep` in the middle of a block, at its end, and beyond the prompt; dropped tokens have no influence."""
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size
    for session, keep in enumerate((160, 190, 200, 205)):
        context = rng.integers(0, vocab, 200)
        engine.submit(Request(session, context, 12, (5, session)))
        first = finished(engine)
        said = rng.integers(0, vocab, 20)
        whole = np.concatenate([context, first.ids])
        kept = whole[:keep]
        engine.submit(Request(session, said, 12, keep=keep))
        second = finished(engine)
        engine.close(session)
        ids = np.concatenate([kept, said, second.ids])
        expected = own_logprobs(model, ids)[len(kept) + len(said) - 1 :]
        np.testing.assert_allclose(second.logprobs, expected, atol=1e-4)
        assert second.cached == min(keep, len(whole) - 1) // 32 * 32
