"""Environments of the package verifiers, for tests."""

import verifiers as vf
from datasets import Dataset

from tests.support.adapters import RAN, echo


def rows(count=4):
    table = [{"question": f"Say {n}.", "answer": str(n), "info": {"level": n}} for n in range(count)]
    return Dataset.from_list(table)


def right(completion, answer) -> float:
    return float(completion[-1].content == answer)


def turns(state) -> float:
    return float(len(state["trajectory"]))


def broken(completion) -> float:
    raise ValueError("the rubric swallows this")


def rubric():
    return vf.Rubric(funcs=[right, turns, broken], weights=[1.0, 0.0, 0.0])


def single():
    return vf.SingleTurnEnv(dataset=rows(), rubric=rubric(), system_prompt="Be brief.")


def tools(max_turns=10):
    return vf.ToolEnv(dataset=rows(), rubric=rubric(), tools=[echo], max_turns=max_turns)


class Stateful(vf.StatefulToolEnv):
    """A tool with an argument that the policy does not see, from the state of the rollout."""

    def __init__(self, **options):
        super().__init__(tools=[], **options)
        self.add_tool(self.push, args_to_skip=["stack"])

    def push(self, item: str, stack: list) -> str:
        """Push.

        Args:
            item: What.
            stack: Where.
        """
        stack.append(item)
        return str(len(stack))

    async def setup_state(self, state):
        state["stack"] = []

    def update_tool_args(self, tool_name, tool_args, messages, state, **kwargs):
        return {**tool_args, "stack": state["stack"]}

    @vf.stop
    async def full(self, state) -> bool:
        return len(state["stack"]) >= 3


def stateful():
    return Stateful(dataset=rows(), rubric=vf.Rubric(funcs=[right, turns]))


class Asks(vf.MultiTurnEnv):
    """Answers with how often it was asked; ends after "bye"."""

    async def env_response(self, messages, state, **kwargs):
        said = messages[-1].content
        if said == "bye":
            state["final_env_response"] = [{"role": "user", "content": "bye"}]
            return state["final_env_response"]
        state["asked"] = state.get("asked", 0) + 1
        return [{"role": "user", "content": f"{state['asked']}: {said} ({state['info']['level']})"}]


def asks(max_turns=5):
    return Asks(dataset=rows(), rubric=rubric(), max_turns=max_turns)


class OwnLoop(Asks):
    async def get_prompt_messages(self, state):
        return state["prompt"]


def own_loop():
    return OwnLoop(dataset=rows(), rubric=rubric())


def compared(completions, **kwargs) -> list[float]:
    return [0.0 for _ in completions]


def group():
    return vf.SingleTurnEnv(dataset=rows(), rubric=vf.Rubric(funcs=[compared]))


def pictures():
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    table = [{"prompt": [{"role": "user", "content": [part]}], "answer": "1"}]
    return vf.SingleTurnEnv(dataset=Dataset.from_list(table), rubric=rubric())


def nothing():
    RAN.append("nothing")
    return 3
