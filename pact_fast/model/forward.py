"""Forward passes of Hugging Face decoders on packed trees.

Attention is replaced through transformers' registry, recurrences in the namespace of the model's code
(`recurrence/dispatch.py`), so no model code is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from pact_fast.batch.packing import PackedBatch
from pact_fast.errors import PactError
from pact_fast.kernels.head.logit_transform import causal_lm_of, decoder_of
from pact_fast.model.attention.prefix_cache import PrefixCache
from pact_fast.model.attention.registered import tree_attention_in
from pact_fast.model.attention.tree import TreeLayout
from pact_fast.model.attention.ulysses import RowShards
from pact_fast.model.patch import fused_kernels
from pact_fast.model.recurrence.dispatch import follows_tree, inside_tree, install, recurrent_layers
from pact_fast.model.rematerialize import Rematerialize, is_compiled

__all__ = [
    "branches_forward",
    "causal_lm_of",
    "decoder_of",
    "inside_forward",
    "paths_forward",
    "tree_forward",
    "unsupported",
]


T = TypeVar("T")

# kinds of decoder layers as transformers names them
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid"}  # hybrid: attention and a recurrence side by side
POINTWISE_LAYERS = {"mlp", "moe"}


def layer_kinds(config: Any) -> list[str]:
    """The kind of every decoder layer, as transformers names them; [] if all are equal."""
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])


def unsupported(model: PreTrainedModel) -> str | None:
    """The reason why `tree_forward` cannot compute the model; None if it can."""
    config = model.config.get_text_config()
    kinds = layer_kinds(config)
    unknown = set(kinds) - ATTENTION_LAYERS - RECURRENT_LAYERS - POINTWISE_LAYERS
    if unknown:
        return f"{config.model_type}: has layers of kinds that cannot share prefixes: {', '.join(sorted(unknown))}"
    recurrent = [i for i, kind in enumerate(kinds) if kind in RECURRENT_LAYERS]
    if not recurrent and model._is_stateful:
        return f"{config.model_type}: its recurrent layers are of a kind that cannot share prefixes"
    if recurrent:
        layers = list(getattr(decoder_of(model), "layers", []))
        if len(layers) != len(kinds) or not all(follows_tree(layers[i], kinds[i]) for i in recurrent):
            return f"{config.model_type}: its {kinds[recurrent[0]]} layers are of a kind that cannot share prefixes"
        return None if type(causal_lm_of(model))._can_set_attn_implementation() else _no_attention_function(config)
    return None if model._supports_attention_backend else _no_attention_function(config)


def _no_attention_function(config: Any) -> str:
    return f"{config.model_type}: its transformers code does not take an attention function"


def tree_forward(
    model: PreTrainedModel, batch: PackedBatch, keep: PrefixCache | None = None, row_shards: RowShards | None = None
) -> torch.Tensor:
    """Hidden states after the final norm, equal to those of every root-to-leaf path run by itself. Differentiable.

    The model remains its owner's: it can be called, generated from, checkpointed and compiled before, between and after.
    Under DDP, FSDP2 or ZeRO-3, call this inside the forward of the wrapped model, see `inside_forward`.

    Args:
        model: A causal LM of transformers, also one wrapped by peft, DDP or DeepSpeed.
        batch: A pack of T tokens.
        keep: Where to store the detached keys and values of one path, for `branches_forward`.
        row_shards: Sequence parallelism. Only rows [row_shards.start, row_shards.end) are computed and returned; all
            ranks of the group have to call.

    Returns:
        [T, D] in the model's dtype.

    Raises:
        PactError: Trees cannot be computed for this model, `paths_forward` can; or `keep` or `row_shards` for a model
            with recurrent layers.
    """
    model = causal_lm_of(model)
    reason = unsupported(model)
    if reason is not None:
        raise PactError(f"token trees: {reason}; pack with share=False and use paths_forward")
    install(model)
    if (keep is not None or row_shards is not None) and recurrent_layers(model):
        what = (
            "a cached path holds no recurrent states" if keep else "sequence parallelism divides attention heads only"
        )
        raise PactError(f"{model.config.model_type} has recurrent layers, and {what}")
    layout = TreeLayout(batch, next(model.parameters()).device)
    layout.keep, layout.row_shards = keep, row_shards
    hidden = _decoder_forward(model, batch, layout)
    if keep is not None:
        keep.last_hidden = hidden[keep.rows[-1]].detach()
    return hidden


@torch.no_grad()
def branches_forward(model: PreTrainedModel, cache: PrefixCache, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [T + 1, D], without gradient, of a tree that continues a cached path.

    `batch` packs one tree made as TokenTree(start=len(cache)). Row −1 is the last hidden state of the cached path, so
    that hidden[batch.rows(node)] also predicts the first tokens. Only the branches' own tokens are computed: a teacher
    without gradient is scored on top of the prefix that the student's forward pass has already computed.
    """
    layout = TreeLayout(batch, next(model.parameters()).device, prefix_length=len(cache))
    layout.cache = cache
    return torch.cat([_decoder_forward(model, batch, layout), cache.last_hidden[None]])


def _decoder_forward(model: PreTrainedModel, batch: PackedBatch, layout: TreeLayout) -> torch.Tensor:
    device = next(model.parameters()).device
    decoder = decoder_of(model)
    local_rows = slice(layout.row_shards.start, layout.row_shards.end) if layout.row_shards else slice(None)
    with _pointwise_optimizations(decoder), inside_tree(), tree_attention_in(causal_lm_of(model)):
        output = decoder(
            input_ids=torch.as_tensor(batch.input_ids[local_rows], device=device)[None],
            position_ids=torch.as_tensor(batch.position_ids[local_rows], device=device)[None],
            tree_layout=layout,
            use_cache=False,
        )
    return output.last_hidden_state[0]


def inside_forward(model: torch.nn.Module, function: Callable[[], T]) -> T:
    """The result of `function()`, called inside the forward of `model`.

    Wrappers such as DDP, FSDP2 and DeepSpeed prepare parameters and gradients before the forward of the model that they
    wrap, and expect every use of them inside it. The model is called without arguments, and the causal LM's own forward is
    replaced by the function meanwhile. Tensors that need a gradient must be in what the function returns.

    Args:
        model: A causal LM of transformers, perhaps wrapped.
        function: Uses the causal LM's parameters, for example by `tree_forward` and `head_of`.
    """
    causal_lm = causal_lm_of(model)
    before = vars(causal_lm).get("forward")

    def forward(*args: Any, **options: Any) -> T:
        return function()

    forward.own = causal_lm.forward  # type: ignore[attr-defined]  # for head_of
    causal_lm.forward = forward
    try:
        return model()
    finally:
        if before is None:
            del causal_lm.forward
        else:
            causal_lm.forward = before


@contextmanager
def _pointwise_optimizations(decoder: torch.nn.Module) -> Iterator[None]:
    """Fused pointwise kernels and rematerialization; neither for a compiled decoder, where the compiler does both."""
    if is_compiled(decoder):
        yield
        return
    with Rematerialize(), fused_kernels(decoder):
        yield


def paths_forward(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [T, D] of a pack made with share=False, by the model's own attention on a padded batch of paths.

    For models that `tree_forward` refuses. Paths are padded on the right, where causal attention does not see the
    padding. Raises ValueError for a pack with shared prefixes.
    """
    if any(call.spans for call in batch.calls[1:]):
        raise ValueError("paths_forward needs a pack without shared prefixes: pack(…, share=False)")
    device = next(model.parameters()).device
    ids = torch.as_tensor(batch.input_ids, device=device)
    lengths = [span.q1 - span.q0 for span in batch.calls[0].spans]
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = torch.zeros(mask.shape, dtype=ids.dtype, device=device).masked_scatter(mask, ids)
    output = decoder_of(model)(input_ids=padded, attention_mask=mask.long(), use_cache=False)
    return output.last_hidden_state[mask]
