"""An environment of the package verifiers: sums with a tool, scored by a rubric.

    pact-fast train quickstart env.name=verifiers "env.args={id: examples/verifiers_environment.py:load_environment, args: {largest: 9}}" algorithm.name=grpo pretrain=null

An installed environment is named by its id: `env.args={id: wordle}`.
"""  # noqa: E501

import random

import verifiers as vf
from datasets import Dataset


def add(a: int, b: int) -> int:
    """The sum of two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def right(completion, answer) -> float:
    """Whether the last message is the sum."""
    return float((completion[-1].content or "").strip() == answer)


def load_environment(largest: int = 99, rows: int = 32) -> vf.Environment:
    """Make the environment. `vf.load_environment` calls this function of an installed package."""
    rng = random.Random(0)
    pairs = [(rng.randint(0, largest), rng.randint(0, largest)) for _ in range(rows)]
    table = [{"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in pairs]
    dataset, held_out = Dataset.from_list(table[4:]), Dataset.from_list(table[:4])
    rubric = vf.Rubric(funcs=[right])
    return vf.ToolEnv(dataset=dataset, eval_dataset=held_out, tools=[add], rubric=rubric, max_turns=4)
