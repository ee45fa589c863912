"""A frozen model that plays one side of a dialogue: two embedded engines, the policy's and its own, behind one interface."""

from __future__ import annotations

from transformers import PreTrainedModel

from pact_fast.rollout.engine import Completion, Engine, Request, SyncReport


class WithFrozenModel(Engine):
    """The policy's engine, and another one for the turns of the other side (`Request.user`), whose weights stay as they are.

    Args:
        policy: The engine of the policy, synchronous.
        frozen: The engine of the frozen model, synchronous.
        plays_user: Whether the frozen model plays the user; else it plays the agent.
    """

    def __init__(self, policy: Engine, frozen: Engine, plays_user: bool = True):
        self.policy, self.frozen, self._plays_user = policy, frozen, plays_user
        self.name, self.synchronous = policy.name, policy.synchronous and frozen.synchronous
        self.rewinds = policy.rewinds and frozen.rewinds
        self.applies_filters = policy.applies_filters and frozen.applies_filters

    @property
    def version(self) -> int:  # type: ignore[override]
        return self.policy.version

    @property
    def sync_report(self) -> SyncReport | None:  # type: ignore[override]
        return self.policy.sync_report

    def submit(self, request: Request) -> None:
        (self.frozen if request.user == self._plays_user else self.policy).submit(request)

    def step(self, timeout: float | None = None) -> list[Completion]:
        """One token of every session on either side."""
        return [*self.policy.step(timeout), *self.frozen.step(timeout)]

    def close(self, session: int) -> None:
        self.policy.close(session)  # numbers are of one side alone; the other knows none of them
        self.frozen.close(session)

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        self.policy.update_weights(model, version)

    def sleep(self) -> None:
        self.policy.sleep()
        self.frozen.sleep()

    def shutdown(self) -> None:
        self.policy.shutdown()
        self.frozen.shutdown()
