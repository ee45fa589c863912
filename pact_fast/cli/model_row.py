"""`pact-fast doctor MODEL`: the row of docs/models.md of one model, from its configuration, tokenizer and chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pact_fast.cli.doctor import run_checks
from pact_fast.errors import PactError

if TYPE_CHECKING:
    from pact_fast.config import ModelConfig

BRANCHES = "the reasoning of earlier turns is dropped once the user speaks again: a rollout branches there"
APPENDED = "turns are appended, also after the user has spoken"


def is_model(source: str) -> bool:
    """Whether `source` is a model folder, or can only be a name of the hub."""
    path = Path(source)
    if path.is_dir():
        return (path / "config.json").is_file()
    return source.count("/") == 1 and not path.exists() and path.suffix not in (".yaml", ".yml")


def model_command(source: str, settings: list[str]) -> int:
    """Print a line for each supported feature of a model: ok or FAIL. Returns the number of failures as status 0 or 1.

    Args:
        source: A model folder or hub name.
        settings: `model.KEY=VALUE`, for instance model.chat_template_kwargs.
    """
    row = _Row(_model_config(source, settings))
    return 1 if run_checks(row.all(), []) else 0


def _model_config(source: str, settings: list[str]) -> ModelConfig:
    from pydantic import ValidationError

    from pact_fast.config import ModelConfig

    values: dict[str, Any] = {"path": source}
    for setting in settings:
        key, _, value = setting.partition("=")
        if not key.startswith("model."):
            raise PactError(f"{key}: for a model, only settings of the section `model` apply; name a recipe instead")
        values[key.removeprefix("model.")] = yaml.safe_load(value)
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise PactError(f"model.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class _Row:
    """The cells of the row; each may fail by itself."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def all(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("decoder", self.decoder),
            ("prefixes", self.prefixes),
            ("engine", self.engine),
            ("format", self.format),
            ("template", self.template),
            ("user turns", self.user_turns),
        ]

    def decoder(self) -> str:
        import torch

        from pact_fast.model.build import architecture, from_config
        from pact_fast.model.forward import layer_kinds

        assert self.config.path is not None
        with torch.device("meta"):
            self.model = from_config(architecture(self.config), self.config.path)
        config = self.model.config.get_text_config()
        kinds = Counter(layer_kinds(config)) or Counter({"attention": config.num_hidden_layers})
        layers = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
        return f"{config.model_type}; layers: {layers}"

    def prefixes(self) -> str:
        from pact_fast.model.forward import unsupported

        reason = unsupported(self._made())
        return (
            "tree: shared prefixes are computed once" if reason is None else f"paths, every sequence whole ({reason})"
        )

    def engine(self) -> str:
        from pact_fast.rollout.embedded.builder import unserved

        reason = unserved(self._made())
        return "embedded, vLLM" if reason is None else f"vLLM; not the embedded one ({reason})"

    def format(self) -> str:
        from transformers import AutoTokenizer

        from pact_fast.chat.rendering import make_renderer
        from pact_fast.model.build import from_pretrained
        from pact_fast.model.tokenizer import with_template

        source = self.config.tokenizer or self.config.path
        assert source is not None
        tokenizer = from_pretrained(AutoTokenizer, source, "tokenizer")
        self.renderer = make_renderer(self.config, with_template(tokenizer, self.config))
        opening, closing = self.renderer.format.think
        prompt = self.renderer.template.generation_prompt.rstrip()
        state = "closed" if prompt.endswith(closing) else "opened" if prompt.endswith(opening) else "left open"
        return (
            f"{type(self.renderer.format).__name__}, {'several calls' if self.renderer.template.several_calls else 'one call'} "
            f"per turn; reasoning between {opening} and {closing}, {state} by the generation prompt"
        )

    def template(self) -> str:
        from pact_fast.chat.template_check import check_template

        notes = check_template(self._rendered())
        return "; ".join(["appended turns equal the template's rendering", *notes])

    def user_turns(self) -> str:
        from pact_fast.chat.template_check import check_user_turns

        check_user_turns(self._rendered())
        return BRANCHES if self._rendered().history.drops_reasoning else APPENDED

    def _made(self):
        if not hasattr(self, "model"):
            raise PactError("unknown, since the model cannot be made; see decoder")
        return self.model

    def _rendered(self):
        if not hasattr(self, "renderer"):
            raise PactError("unknown, since the chat template cannot be used; see format")
        return self.renderer
