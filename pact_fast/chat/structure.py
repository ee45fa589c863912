"""The tokens of a conversation's structure: they stand around turns, and never in one."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import AddedToken

from pact_fast.chat.chat_template import ChatTemplate

# Tokens that end a turn in every tokenizer that has them, beside the end-of-turn token of the template.
OTHER_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


def structure_tokens(tokenizer, template: ChatTemplate, markers: Collection[str], after_calls: str = "") -> list[str]:
    """Contents of the added tokens that are structure.

    Structure are tokens that end a turn, those beside a turn in the template, those to which the tokenizer gives a role
    (beginning, end, padding, unknown, …), and special tokens that the template writes anywhere. Other added tokens are
    vocabulary: a user adds them so that the model writes them, special or not.

    Args:
        tokenizer: A fast tokenizer of transformers.
        template: Its chat template.
        markers: Strings that structure a turn from inside: those of the tool format. They are not included.
        after_calls: The text that the template writes after calls; it may begin with a token that ends the turn.
    """
    beside = template.generation_prompt + template.after_turn
    named = (tokenizer.special_tokens_map.get(name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    roles = {str(token) for token in named if isinstance(token, str | AddedToken)}

    def is_structure(token: AddedToken) -> bool:
        content = token.content
        return (
            content in roles
            or content in OTHER_ENDS
            or content in beside
            or after_calls.startswith(content)
            or (token.special and content in template.written)
        )

    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if is_structure(token) and token.content not in markers]
