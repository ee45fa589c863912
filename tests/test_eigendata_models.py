"""Roles that a model plays: its words pass the controls or are rejected, and its revisions are measured like others."""

from __future__ import annotations

import json
import random
import re
import threading
import time

import pytest

from pact_fast.envs.domain.controls import check_instance
from pact_fast.llm import LLMClient
from pact_fast.synthesis.eigendata.engine import DataEngine, Settings
from pact_fast.synthesis.eigendata.model_reflector import ModelReflector
from pact_fast.synthesis.eigendata.model_synthesizers import ModelWording
from pact_fast.synthesis.eigendata.pipeline import Roles
from tests.support import eigendata as support
from tests.support.llm_server import llm_server, said
from tests.support.optional import needs

needs("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

DOMAIN = support.helpdesk()


def wording(body: dict) -> str:
    """A model that follows its instructions."""
    prompt = body["messages"][0]["content"]
    return "Well, hello. " + prompt.split("sentence by sentence:\n")[1].split("\n\nHow the customer talks")[0]


def made_with(answer) -> list:
    with llm_server(lambda body: said(answer(body))) as server, LLMClient(server.config(), "tester") as client:
        plan = next(plan for plan in support.plans(DOMAIN, 16) if "suspended" in plan.issues)
        rng = random.Random(1)
        model = ModelWording(client)
        return [model.synthesize(DOMAIN, plan, s, support.VERSION, rng) for s in DOMAIN.subjects()[:6]]


def test_a_models_words_make_sound_tasks_and_name_their_prompt():
    for instance in made_with(wording):
        assert instance.user.opening.startswith("Well, hello.") and check_instance(DOMAIN, instance) == []
        assert instance.versions["wording.md"].startswith("wording.md@1:") and len(instance.versions) == 4


def test_words_that_give_something_away_or_leave_something_out_are_caught():
    for instance in made_with(lambda body: "Call take_payment for me."):
        assert check_instance(DOMAIN, instance)[0].control in ("findable", "keeps_secrets")
    assert made_with(lambda body: " ") == [None] * 6


@pytest.mark.slow
def test_a_models_revisions_are_measured_and_may_rewrite_a_prompt(tmp_path):
    """It corrects a prompt by which the user gives tools away; its bad and impossible proposals change nothing."""
    start = tmp_path / "start"
    support.VERSION.save(tmp_path)
    (tmp_path / "0001").rename(start)
    good = (start / "wording.md").read_text()
    (start / "wording.md").write_text(good.replace("customer", "LEAK customer"))
    revision = {"reason": "r", "control": "keeps_secrets"}
    ideas = [
        {"file": "workflow.yaml", "key": "min_score", "value": 0.1, **revision},
        {"file": "nothing.md", "key": "text", "value": "x", **revision},
        {"file": "synthesis.yaml", "key": "last_steps", "value": "never", **revision},
        {"file": "wording.md", "key": "text", "value": good, **revision},
    ]

    def answer(body: dict) -> str:
        if "response_format" in body:
            return json.dumps({"revisions": ideas})
        return wording(body) + (" Use take_payment." if "LEAK" in body["messages"][0]["content"] else "")

    with llm_server(lambda body: said(answer(body))) as server, LLMClient(server.config(), "tester") as client:
        roles = Roles(synthesizer=ModelWording(client), reflector=ModelReflector(client))
        engine = DataEngine(DOMAIN, tmp_path / "out", Settings("helpdesk", rounds=2, plans=6, count=8), roles, start)
        engine.run()
    assert [trial.adopted for trial in engine.trials] == [False, True]
    assert engine.rounds[0]["accepted"] == 0 and engine.rounds[1]["accepted"] == 4


def test_tasks_made_at_the_same_time_are_those_made_one_by_one(tmp_path):
    """Also where some are too similar to earlier ones. The model is asked for several at a time."""
    start = tmp_path / "start"
    support.VERSION.save(tmp_path)
    (tmp_path / "0001").rename(start)
    workflow = start / "workflow.yaml"
    workflow.write_text(re.sub(r"max_similarity: .*", "max_similarity: 0.2", workflow.read_text()))
    open_requests, most = 0, 0
    lock = threading.Lock()

    def answer(body: dict) -> dict:
        nonlocal open_requests, most
        with lock:
            open_requests += 1
            most = max(most, open_requests)
        time.sleep(0.01)
        with lock:
            open_requests -= 1
        return said(wording(body))

    files = []
    for workers in (1, 6):
        out = tmp_path / str(workers)
        with llm_server(answer) as server, LLMClient(server.config(), "tester") as client:
            roles, settings = Roles(synthesizer=ModelWording(client)), Settings("helpdesk", rounds=1, plans=3, count=15)
            candidates = DataEngine(DOMAIN, out, settings, roles, start, workers).run()
        files.append((out / "candidates.jsonl").read_bytes())
        assert (most > 1) is (workers > 1)
    assert files[0] == files[1]
    assert {"duplicate"} == {finding.control for candidate in candidates for finding in candidate.findings}
    assert any(candidate.accepted for candidate in candidates)
