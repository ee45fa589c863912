"""A model of its own that plays the user: two embedded engines, the policy's and the user's, behind one interface."""

from __future__ import annotations

from transformers import PreTrainedModel

from pact_fast.rollout.engine import Completion, Engine, Request, SyncReport


class WithUserModel(Engine):
    """The policy's engine, and another one for the turns of the user (`Request.user`), whose weights stay as they are.

    Args:
        policy: The engine of the policy, synchronous.
        user: The engine of the user's model, synchronous.
    """

    def __init__(self, policy: Engine, user: Engine):
        self.policy, self.user = policy, user
        self.name, self.synchronous = policy.name, policy.synchronous and user.synchronous
        self.rewinds = policy.rewinds and user.rewinds
        self.applies_filters = policy.applies_filters and user.applies_filters

    @property
    def version(self) -> int:  # type: ignore[override]
        return self.policy.version

    @property
    def sync_report(self) -> SyncReport | None:  # type: ignore[override]
        return self.policy.sync_report

    def submit(self, request: Request) -> None:
        (self.user if request.user else self.policy).submit(request)

    def step(self, timeout: float | None = None) -> list[Completion]:
        """One token of every session on either side."""
        return [*self.policy.step(timeout), *self.user.step(timeout)]

    def close(self, session: int) -> None:
        self.policy.close(session)  # numbers are of one side alone; the other knows none of them
        self.user.close(session)

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        self.policy.update_weights(model, version)

    def sleep(self) -> None:
        self.policy.sleep()
        self.user.sleep()

    def shutdown(self) -> None:
        self.policy.shutdown()
        self.user.shutdown()
