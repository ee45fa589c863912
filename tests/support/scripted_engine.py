"""An engine with scripted output."""

from __future__ import annotations

import numpy as np

from pact_fast.rollout.engine import Completion


class Script:
    """Says `turns[session]`, turn by turn; one turn per session and step.

    contexts  {session: arrays of ids that it was given and that it said, in order}
    seen      {session: the whole context before each of its turns}
    """

    version = 3
    synchronous = True
    rewinds = True

    def __init__(self, renderer, turns):
        self.renderer, self.turns = renderer, turns
        self.seen = {}
        self.contexts, self.limits, self.closed, self.ready = {}, [], [], []

    def submit(self, request):
        context = self.contexts.setdefault(request.session, [])
        if request.keep is not None:
            context[:] = [np.concatenate(context)[: request.keep]]
        context.append(request.ids)
        self.seen.setdefault(request.session, []).append(np.concatenate(context))
        self.limits.append(request.max_new_tokens)
        self.ready.append(request)

    def step(self, timeout=None):
        done, self.ready = self.ready, []
        out = []
        for request in done:
            ids = np.array(self.turns[request.session].pop(0), np.int64)
            ended = len(ids) <= request.max_new_tokens
            ids = ids[: request.max_new_tokens]
            self.contexts[request.session].append(ids)
            out.append(Completion(request.session, ids, np.full(len(ids), -0.5, np.float32), ended, self.version))
        return out

    def close(self, session):
        self.closed.append(session)


def turn(renderer, text):
    """The ids of a turn of this text, ended."""
    return [*renderer.tokenizer.encode(text, add_special_tokens=False), renderer.eot_id]
