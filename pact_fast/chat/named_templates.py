"""The chat templates of a tokenizer by name, and which of them renders a conversation."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pact_fast.data.types import ToolSchema
from pact_fast.errors import PactError

DEFAULT, TOOL_USE = "default", "tool_use"


class NamedTemplates:
    """Most tokenizers have one chat template; some have several, for instance Hermes 2 Pro `default` and `tool_use`.

    They may stand in `chat_template` of tokenizer_config.json, as a list of {"name", "template"}, or in the folder
    additional_chat_templates. The choice is that of transformers: `tool_use` where tools are on offer, else `default`;
    a template whose name is neither is chosen if it is the only one.

    sources  their Jinja texts

    Raises PactError if there is no template, or nothing to choose one by.
    """

    def __init__(self, tokenizer):
        named = _by_name(getattr(tokenizer, "chat_template", None))
        if not named:
            raise PactError(
                "the tokenizer has no chat template; name a Jinja file in model.chat_template, or chatml_hermes for a model "
                "of ChatML"
            )
        if len(named) > 1 and not named.keys() & {DEFAULT, TOOL_USE}:
            raise PactError(
                f"the tokenizer has several chat templates ({', '.join(sorted(named))}), and none is named '{DEFAULT}' or "
                f"'{TOOL_USE}'; save one of them as a Jinja file and name it in model.chat_template"
            )
        only = next(iter(named.values()))
        self.sources: Collection[str] = tuple(named.values())
        self._without_tools = named.get(DEFAULT, named.get(TOOL_USE, only))
        self._with_tools = named.get(TOOL_USE, self._without_tools)

    def choose(self, tools: Collection[ToolSchema]) -> str:
        """The template for a conversation with these tools on offer."""
        return self._with_tools if tools else self._without_tools


def _by_name(given: object) -> dict[str, str]:
    if isinstance(given, str):
        return {DEFAULT: given} if given else {}
    if isinstance(given, list | tuple):
        given = {entry["name"]: entry["template"] for entry in given}
    return {str(name): str(text) for name, text in given.items()} if isinstance(given, Mapping) else {}
