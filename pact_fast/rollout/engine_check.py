"""Smoke test of a live engine, for `pact-fast doctor`.

Starts the engine, sends the model's weights, samples a few of the recipe's tasks, and checks the results: whether
tool calls survive rendering and parsing, how far log-probs differ from the model's, and whether the prefix cache works.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.data.types import Task, ToolCall, Trajectory
from pact_fast.envs.base import Environment
from pact_fast.errors import PactError
from pact_fast.kernels import linear_logprob
from pact_fast.model.head import LogitTransform, head_layer, logit_transform
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.engine import Engine, Request
from pact_fast.rollout.filter_bounds import log_kept_mass_bounds
from pact_fast.rollout.registry import make_engine
from pact_fast.rollout.vllm.builder import caches_prefixes
from pact_fast.users.endpoint import EndpointUsers

TASKS = 4
MAX_LOGPROB_DIFF = 1e-4  # float32: largest difference of any token
MEAN_LOGPROB_DIFF = 0.05  # lower precision: kernels round differently, but the mean over tokens must stay small
CHECKED_TOKENS = 64  # whose logits are compared at a time, where filters need them
MIN_CACHED_CONTEXT = 160  # tokens; engines cache whole blocks, which are up to 128 tokens long on a CPU


class EngineSmokeTest:
    """The checks, in order. Each returns one line, or raises a PactError that says how to fix it. Always call `close`.

    Args:
        config: The recipe.
        model: The trainer's model, with the weights that the engine gets.
        renderer: Renders prompts and parses turns.
        make_env: Environment of a task.
        tasks: The first four are sampled.
        autocast: Precision context of the model's forward pass.
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        make_env: Callable[[Task], Environment],
        tasks: list[Task],
        autocast: AbstractContextManager,
    ):
        self.config, self.model, self.renderer = config, model, renderer
        self._make_env, self._autocast = make_env, autocast
        rollout = config.rollout
        self.jobs = [
            Job(task, (config.seed, i), rollout.temperature, filters=rollout.filters)
            for i, task in enumerate(tasks[:TASKS])
        ]
        self._engine: Engine | None = None
        self.trajectories: list[Trajectory] = []

    def all(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("engine", self.engine),
            ("rollouts", self.rollouts),
            ("turns", self.turns),
            ("log-probs", self.logprobs),
            ("prefix cache", self.prefix_cache),
            ("memory", self.memory),
        ]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    def engine(self) -> str:
        """Start the engine and send the weights."""
        self._engine = make_engine(self.config, self.model, self.renderer)
        self._engine.update_weights(self.model, 0)
        sync = self._engine.sync_report
        if sync is None:
            return f"{self._engine.name} has accepted the model's weights"
        sent = f"{sync.bytes / 2**30:.3f} GiB: loaded in {sync.load_seconds:.1f} s"
        if sync.verify_seconds is None:
            return (
                f"{self._engine.name} was sent the model's weights, {sent}, not verified (rollout.verify_weights=never)"
            )
        return (
            f"{self._engine.name} holds the model's weights, {sent}, every tensor verified in "
            f"{sync.verify_seconds:.1f} s"
        )

    def rollouts(self) -> str:
        """Sample the first tasks."""
        assert self._engine is not None
        users = EndpointUsers.of(self.config.rollout)
        loop = AgentLoop(self._engine, self.renderer, self._make_env, self.config.rollout, users)
        try:
            self.trajectories = loop.run(self.jobs)
        finally:
            loop.close()
            if users:
                users.close()
        turns = sum(len(t.turns) for t in self.trajectories)
        tokens = sum(int(t.sampled.sum()) for t in self.trajectories)
        stops = ", ".join(sorted({str(t.stop_reason) for t in self.trajectories}))
        count = len(self.trajectories)
        return f"{count} trajectories of the first tasks: {turns} turns, {tokens} tokens; ended by {stops}"

    def turns(self) -> str:
        """Tool calls of a sampled turn, rendered and parsed again, are the same calls."""
        calls = same = 0
        for job, trajectory in zip(self.jobs, self.trajectories, strict=True):
            for index, turn in enumerate(trajectory.turns):
                made = [attempt for attempt in turn.attempts if isinstance(attempt, ToolCall)]
                if not made or len(made) < len(turn.attempts):
                    continue
                ids, _ = self.renderer.assistant_turn(turn.reasoning, turn.content, made)
                again = self.renderer.parse(ids, job.task.tools).attempts
                if again != made:
                    raise PactError(
                        f"task {trajectory.task_id}: the sampled turn {turn.text!r} is parsed as {made}, but "
                        f"rendering these calls gives a turn parsed as {again}; choose another model.tool_format"
                    )
                calls += len(made)
                same += np.array_equal(ids, _sampled_ids(trajectory, index))
        if not calls:
            return "no well-formed call was sampled, so there is none to render again"
        return f"{calls} sampled calls, rendered and parsed again, are the same; {same} turns token by token"

    def logprobs(self) -> str:
        """The engine's log-probs of the sampled tokens are the model's, over the tokens that the filters keep."""
        diffs = np.concatenate(
            [self._logprob_diffs(t, ids, own) for t in self.trajectories for ids, own in t.sequences()]
        )
        mean, largest = float(diffs.mean()), float(diffs.max())
        exact = self.config.model.dtype == "float32"
        if (exact and largest > MAX_LOGPROB_DIFF) or mean > MEAN_LOGPROB_DIFF:
            bound = f"largest {MAX_LOGPROB_DIFF:g}" if exact else f"mean {MEAN_LOGPROB_DIFF:g}"
            raise PactError(
                f"the engine's log-probs differ from the model's by {mean:.2g} on average, {largest:.2g} at most "
                f"(allowed: {bound}); remove settings from rollout.vllm_args that change what is computed "
                "(quantization, another dtype), and start a server with --logprobs-mode processed_logprobs"
            )
        return f"engine and model differ by {mean:.1e} on average, {largest:.1e} at most, over {len(diffs)} tokens"

    def prefix_cache(self) -> str:
        """The longest trajectory's context, requested twice, is found in the prefix cache."""
        longest = max((ids for t in self.trajectories for ids, _ in t.sequences()), key=len)
        rollout = self.config.rollout
        window = rollout.max_prompt_length + rollout.max_completion_length - 1
        context = longest[:window]
        found = [self._cached_tokens(session, context) for session in (0, 1)][-1]
        if found is None:
            return "the engine does not report it (start a server with --enable-prompt-tokens-details)"
        if not caches_prefixes(self.model):
            return "none: for a model with recurrent layers, vLLM's CPU build computes every context from its beginning"
        if not found and len(context) >= MIN_CACHED_CONTEXT:
            raise PactError(
                f"prefix caching is off: a context of {len(context)} tokens was computed again at its second request; "
                "remove enable_prefix_caching from rollout.vllm_args, or start the server with it"
            )
        return f"{found} of {len(context)} tokens were not computed again at the second request of a context"

    def memory(self) -> str:
        """Memory for weights and key-value cache; an upper bound, as layers with sliding windows keep less."""
        config, rollout = self.model.config.get_text_config(), self.config.rollout
        size = torch.finfo(getattr(torch, self.config.model.dtype)).bits // 8
        weights = sum(p.numel() for p in self.model.parameters()) * size
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * size
        context = rollout.max_prompt_length + rollout.max_completion_length
        full = token * rollout.max_batch_size * context
        return (
            f"the engine takes {weights / 2**30:.2f} GiB for weights and {token / 2**10:.1f} KiB of keys and values "
            f"per token: {full / 2**30:.2f} GiB for {rollout.max_batch_size} contexts of {context} tokens"
        )

    @torch.no_grad()
    def _logprob_diffs(self, trajectory: Trajectory, sequence: np.ndarray, own: np.ndarray) -> np.ndarray:
        """float32 [n]: |engine's log-prob − the model's| of the sampled tokens of one sequence (see Trajectory.sequences).

        With filters, the model's is normalised over what they keep. Tokens so close to a limit that the engine may have
        put them on its other side give it a range, and the difference is the distance from that range.
        """
        head = head_layer(self.model)
        transform = logit_transform(self.model)
        ids = torch.from_numpy(sequence).to(head.weight.device)
        with self._autocast:
            hidden = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        sampled = own[trajectory.sampled[own]]
        positions = torch.from_numpy(sampled + len(sequence) - (own[-1] + 1)).to(ids.device)
        expected = linear_logprob(
            transform.hidden(hidden[positions - 1]),
            head.weight.to(hidden.dtype),
            ids[positions],
            bias=getattr(head, "bias", None),
            temperature=self.config.rollout.temperature,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
        ).logprob
        diff = expected.cpu().double() - torch.from_numpy(trajectory.logprobs[sampled]).double()
        if not self.config.rollout.filters:
            return diff.abs().float().numpy()
        low, high = self._log_kept_mass_bounds(transform, hidden[positions - 1], ids[positions])
        return torch.maximum(torch.clamp(low - diff, min=0), diff - high).clamp(min=0).float().numpy()

    def _log_kept_mass_bounds(
        self, transform: LogitTransform, hidden: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of the filters' kept mass before each token, fp64 [n] on the CPU, from its hidden state [n, D]."""
        rollout, head = self.config.rollout, head_layer(self.model)
        slack = 10 * MAX_LOGPROB_DIFF if self.config.model.dtype == "float32" else MEAN_LOGPROB_DIFF
        parts = []
        for states, targets in zip(hidden.split(CHECKED_TOKENS), tokens.split(CHECKED_TOKENS), strict=True):
            with self._autocast:
                logits = transform.logits(head(transform.hidden(states)).float()) / rollout.temperature
            parts.append(torch.stack(log_kept_mass_bounds(logits, targets, rollout.filters, slack)).cpu())
        low, high = torch.cat(parts, 1)
        return low, high

    def _cached_tokens(self, session: int, context: np.ndarray) -> int | None:
        assert self._engine is not None
        self._engine.submit(Request(session, context, 1, (self.config.seed, session)))
        while not (done := self._engine.step()):
            pass
        self._engine.close(session)
        return done[0].cached


def _sampled_ids(trajectory: Trajectory, turn: int) -> np.ndarray:
    return trajectory.ids[(trajectory.turn_ids == turn) & trajectory.sampled]
