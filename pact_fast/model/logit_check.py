"""Trainer and embedded engine compared with the model's own `model(ids).logits` on 16 tokens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pact_fast.batch.packing import pack
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.config import Config
from pact_fast.errors import PactError, error_line
from pact_fast.kernels.head.tokens import LossTokens
from pact_fast.model.device import precision
from pact_fast.model.forward import causal_lm_of, decoder_of
from pact_fast.model.head import head_layer
from pact_fast.model.modes import update_mode
from pact_fast.model.policy import Policy

PREFIX, BRANCH = 4, 4  # tokens that both sequences begin with, and those of each alone
TARGETS = 8  # log-probs compared per position
FLOAT32_TOLERANCE = 1e-4  # nats, for logits of up to LARGE_LOGIT; in proportion to larger ones, as fp32 rounds
LARGE_LOGIT = 32.0
ROUNDINGS = 4  # a program may differ by so many times what one unit in the last place at every layer changes
BFLOAT16_TOLERANCE = 0.02  # nats, beside three times the rounding of the model's own code

# called as (ids [2, n], targets [2, n, K], autocast); returns log-probs [2, n, K] of the targets after each position
Logprobs = Callable[[torch.Tensor, torch.Tensor, AbstractContextManager], torch.Tensor]
Result = TypeVar("Result")


def check_logits(
    model: PreTrainedModel,
    *,
    autocast: AbstractContextManager | None = None,
    engine: Logprobs | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    longest: int = 0,
) -> str:
    """Compare log-probs of trainer and embedded engine with those of `model(ids).logits`.

    In the dtype of the weights, all differences are at most 1e-4 nats (in proportion to the largest logit, where that
    exceeds 32). Large activations of a trained model may amplify roundings beyond that: then the bound is four times what
    the model's own logits change by when the input of every layer changes in its last place, at most ten times as much.

    Under `autocast` the comparison is repeated. Any two programs round differently there, so the bound is on the root mean
    square of the distance to the first result: 0.02 nats plus three times the distance of the model's own code. A wrong
    formula is found by the first comparison; the second finds faults of a dtype.

    Args:
        model: The policy, whose parameters are not partitioned. Afterwards it is in the mode of updates.
        autocast: The run's precision context.
        engine: The embedded engine's log-probs; None: not compared.
        tokenizer: Its ids have to be rows of the embedding; None: not checked.
        longest: Length of the run's longest sequence, whose last position has to exist; 0: not checked.

    Returns:
        One line with the largest differences.

    Raises:
        PactError: They differ, or the model's code fails; the message has the reason and the measured difference.
    """
    family, attention = model.config.model_type, model.config._attn_implementation
    _check_embedding(model, tokenizer)
    update_mode(model)
    ids, targets = _probe_tokens(model)
    programs: dict[str, Logprobs] = {"the trainer": lambda *args: _trainer_logprobs(model, *args)}
    if engine is not None:
        programs["the embedded engine"] = engine
    found: dict[str, float] = {}
    try:
        truth, largest = _run(family, "model(ids)", lambda: _own_logprobs(model, ids, targets, nullcontext()))
        if longest:
            _run(family, f"position {longest - 1}", lambda: _position(model, longest - 1))
        bound = FLOAT32_TOLERANCE * max(1.0, largest / LARGE_LOGIT)
        own_error = 0.0
        autocast = autocast or nullcontext()
        if not isinstance(autocast, nullcontext):
            own, _ = _run(family, "model(ids) under autocast", lambda: _own_logprobs(model, ids, targets, autocast))
            own_error = _rms(own - truth)
        for name, program in programs.items():
            plain = _run(family, name, functools.partial(program, ids, targets, nullcontext()))
            found[name] = float((plain - truth).abs().max())
            if bound < found[name] < 10 * bound:
                changed = _run(family, "model(ids)", lambda: _rounded_logprobs(model, attention, ids, targets))
                bound = min(max(bound, ROUNDINGS * float((changed - truth).abs().max())), 10 * bound)
            _compare(family, name, found[name], bound)
            if own_error:
                dtype_name = f"{name} under autocast"
                rounded = _run(family, dtype_name, functools.partial(program, ids, targets, autocast))
                _compare(family, dtype_name, _rms(rounded - truth), BFLOAT16_TOLERANCE + 3 * own_error)
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
    return ", ".join(f"{name} within {diff:.1e} nats of model(ids).logits" for name, diff in found.items())


def check_run(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: Callable[[PreTrainedModel], Logprobs | None],
    device: torch.device,
) -> str:
    """`check_logits` with the precision and the lengths of a run; skipped for a model that ZeRO-3 has partitioned.

    A model of `model.random_init` is compared as a copy with noise on its weights, because parts that are 0 at first
    hide what they do. `engine`: gives the embedded engine's log-probs of a model, see `EngineBuilder.logprobs`.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return "not compared with model(ids).logits: ZeRO-3 has partitioned the parameters"
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    update_mode(model)
    compared = model if config.model.path else _with_noise(model)
    autocast = precision(config, device)
    return check_logits(compared, autocast=autocast, engine=engine(compared), tokenizer=tokenizer, longest=longest)


@torch.no_grad()
def _with_noise(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose matrices [n, D] have noise of deviation D^-0.5, and whose vectors have noise of deviation 0.1."""
    noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(deviation * noise.to(parameter.device))
    return noisy


def _check_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    rows = _embedding_rows(model)
    if tokenizer is not None and len(tokenizer) > rows:
        raise PactError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding {rows} rows; use the model's own "
            "tokenizer, or resize the model (model.resize_token_embeddings) and save it"
        )


def _embedding_rows(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or len(embedding.weight)


def _probe_tokens(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences with a common prefix, int64 [2, n], and the tokens whose log-probs are compared, [2, n, K].

    They are spread over the vocabulary, and not random: drawing them would change what the run draws next.
    """
    head, n = head_layer(model).weight, PREFIX + BRANCH
    vocab = min(len(head), _embedding_rows(model))
    ids = (torch.arange(2 * n, device=head.device).view(2, n) * 7919 + 11) % vocab
    ids[1, :PREFIX] = ids[0, :PREFIX]
    targets = (torch.arange(2 * n * TARGETS, device=head.device).view(2, n, TARGETS) * 104729 + 3) % vocab
    targets[:, :-1, 0] = ids[:, 1:]
    return ids, targets


@torch.no_grad()
def _own_logprobs(
    model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor, autocast: AbstractContextManager
) -> tuple[torch.Tensor, float]:
    """Log-probs by the model's own code, and the largest logit."""
    with autocast:
        logits = causal_lm_of(model)(input_ids=ids, use_cache=False).logits.float()
    return logits.log_softmax(-1).gather(-1, targets), float(logits.abs().max())


def _rounded_logprobs(model: PreTrainedModel, attention: str, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`_own_logprobs`, where the input of every layer is one unit in the last place larger or smaller."""
    model.set_attn_implementation(attention)  # a program may have set its own

    def change(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        x = args[0] if args else kwargs["hidden_states"]
        signs = 1 - 2 * (torch.arange(x.numel(), device=x.device) % 2).view_as(x).to(x.dtype)
        x = x * (1 + torch.finfo(x.dtype).eps * signs)
        return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": x})

    layers = max((m for m in decoder_of(model).modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    hooks = [layer.register_forward_pre_hook(change, with_kwargs=True) for layer in layers]
    try:
        return _own_logprobs(model, ids, targets, nullcontext())[0]
    finally:
        for hook in hooks:
            hook.remove()


def _trainer_logprobs(
    model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor, autocast: AbstractContextManager
) -> torch.Tensor:
    """Log-probs as updates compute them: with gradient, the sequences as one tree where prefixes are shared."""
    policy = Policy(model, autocast=autocast)
    nodes: list[Node] = []
    trees: list[TokenTree] = []
    for row in ids.cpu().numpy():
        if not trees or policy.unshared:
            trees.append(TokenTree())
            root = trees[-1].add(row[:PREFIX])
        nodes.append(trees[-1].add(row[PREFIX:], root))
    (batch,) = pack(trees, max_tokens=ids.numel(), share=not policy.unshared)
    rows = torch.stack([torch.as_tensor(batch.path_rows(node)) for node in nodes]).to(ids.device)
    row, target = rows[..., None].expand_as(targets).flatten(), targets.flatten()
    zeros, ints = torch.zeros(len(row), device=ids.device), torch.zeros_like(row)
    tokens = LossTokens(row, target, ints, ints, ints, zeros, zeros, zeros, zeros)
    with torch.enable_grad():
        (logprob,) = policy(batch, tokens, 1.0)
    return logprob.detach().view_as(targets)


@torch.no_grad()
def _position(model: PreTrainedModel, position: int) -> None:
    """Run one token at a position. Not on CUDA, where an index beyond a table ends the process."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=head_layer(model).weight.device)
    if not ids.is_cuda:
        decoder_of(model)(input_ids=ids, position_ids=ids + position, use_cache=False)


def _run(family: str, what: str, program: Callable[[], Result]) -> Result:
    """The program's result. Raises PactError where the model's code fails."""
    try:
        return program()
    except (PactError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = error_line(error)
        raise PactError(f"{family}: {what} fails with {type(error).__name__}: {line}; use another model") from error


def _compare(family: str, name: str, difference: float, bound: float) -> None:
    if not difference <= bound:  # NaN, too
        cure = "rollout.engine=vllm or another model" if "engine" in name else "another model"
        raise PactError(
            f"{family}: log-probs of {name} differ from model(ids).logits by {difference:.2g} nats (at most {bound:.1g}); "
            f"its code computes something that pact_fast does not; use {cure}"
        )


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())
