"""Tasksets of the package verifiers from 0.4 on, for tests."""

import verifiers.v1 as vf


class Data(vf.TaskData):
    answer: str


class Stack(vf.State):
    items: list[str] = []  # noqa: RUF012


class Stacker(vf.Toolset[vf.ToolsetConfig, Stack]):
    """Two tools with a state, and an attribute of the server's own."""

    async def setup(self) -> None:
        self.calls = 0

    async def setup_task(self, data) -> None:
        self.answer = data.answer

    @vf.tool
    def push(self, item: str, times: int = 1) -> str:
        """Put an item on the stack."""
        self.calls += 1
        self.state.items += [item] * times
        return f"{len(self.state.items)} items after {self.calls} calls for {self.answer}"

    @vf.tool(name="fail")
    async def broken(self) -> dict:
        """Fails."""
        raise ValueError("on purpose")


class SayTask(vf.Task[Data, Stack]):
    @classmethod
    def toolsets(cls, config):
        return [Stacker(vf.ToolsetConfig())]

    @vf.reward(weight=0.75)
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.25)
    async def pushed(self, trace) -> float:
        return float(len(trace.state.items) > 0)

    @vf.metric
    async def turns(self, trace) -> float:
        return float(trace.num_turns)

    @vf.metric
    async def seen(self, trace) -> dict:
        return {"tool_messages": float(len(trace.tool_messages)), "messages": float(len(trace.messages))}


class SayConfig(vf.TasksetConfig):
    count: int = 3


class Say(vf.Taskset[SayTask, SayConfig]):
    def load(self):
        for n in range(self.config.count):
            yield SayTask(Data(prompt=f"Say {n}.", system_prompt="Be brief.", answer=str(n)), self.config.task)


class Endless(Say):
    INFINITE = True


class Empty(Say):
    def load(self):
        return []


class BoxedTask(SayTask):
    NEEDS_CONTAINER = True


class PreparedTask(SayTask):
    async def setup(self, trace, runtime) -> None:
        pass


class GradedTask(SayTask):
    @vf.reward
    async def graded(self, trace, runtime) -> float:
        return 1.0


class StoppedTask(SayTask):
    @vf.stop
    async def full(self, trace: vf.Trace) -> bool:
        return len(trace.state.items) > 3


class _Of(vf.Taskset[SayTask, SayConfig]):
    kind = SayTask

    def load(self):
        yield self.kind(Data(prompt="Say 1.", answer="1"), self.config.task)


class Boxed(_Of):
    kind = BoxedTask


class Prepared(_Of):
    kind = PreparedTask


class Graded(_Of):
    kind = GradedTask


class Stopped(_Of):
    kind = StoppedTask


class Nothing:
    pass
