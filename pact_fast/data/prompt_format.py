"""Formats of prompts: instructions that are added to the question of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pact_fast.data.types import Task, text_of

PromptFormat = Literal["row", "matchtir"]

# MatchTIR (arXiv 2601.10712): reasoning before calls, and an answer in tags, whose token F1 is the reward of the last turn.
# How reasoning and calls are marked is the chat template's affair. The words are ours.
MATCHTIR = (
    "Reason step by step before every tool call. When the results tell you the answer, stop calling tools and give the "
    "final answer, as short as possible, between <answer> and </answer>."
)


def format_prompt(task: Task, prompt_format: PromptFormat) -> Task:
    """The task with its prompt in a format: `row`, as it is, or `matchtir`, with `MATCHTIR` before the question.

    A question that asks for <answer> tags already stays as it is.
    """
    *before, question = task.prompt
    text = text_of(question.get("content"))
    if prompt_format == "row" or "<answer>" in text:
        return task
    return replace(task, prompt=[*before, {**question, "content": f"{MATCHTIR}\n\n{text}"}])
