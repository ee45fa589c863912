"""All roles by a real, small model in a vLLM server: answers fit their schemas, and nothing unverified is accepted.

`PACT_MODEL_TASKS=20` makes twenty tasks, as the shipped workflow does; it takes minutes of a free machine. Without it,
two tasks, between which the roles are shared out, and a rejected one is not tried again.
"""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")
pytest.importorskip("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

from pact_fast.envs.domain.base import make_domain
from pact_fast.envs.domain.controls import check_instance
from pact_fast.llm import LLMClient, LLMConfig
from pact_fast.synthesis.eigendata.engine import DataEngine, Settings
from pact_fast.synthesis.eigendata.make_roles import ROLES, make_roles
from pact_fast.synthesis.eigendata.versions import START
from tests.support.eigendata import failing_controls
from tests.support.vllm_servers import forked_servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples/smollm2_from_package.py"))
LONG = "PACT_MODEL_TASKS" in os.environ
COUNT = int(os.environ.get("PACT_MODEL_TASKS", "1"))  # for each of:
WORDING = ("planner", "wording")  # apart from the others: a wording that cannot be used ends an attempt
MODELS = (ROLES,) if LONG else (WORDING, tuple(role for role in ROLES if role not in WORDING))
ARGS = {"dtype": "bfloat16", "max_model_len": 4096, "enforce_eager": True, "max_num_seqs": 8}


@pytest.fixture
def start(tmp_path) -> Path:
    """Prompts and workflow of the first version."""
    if LONG:
        return START
    folder = Path(shutil.copytree(START, tmp_path / "start"))
    workflow = folder / "workflow.yaml"
    text = workflow.read_text(encoding="utf-8")
    assert "\nretries: 2 " in text
    workflow.write_text(text.replace("\nretries: 2 ", "\nretries: 0 "), encoding="utf-8")
    return folder


def test_a_small_model_in_every_role(start, tmp_path):
    source = EXAMPLE["gguf_file"]()
    if source is None:
        pytest.skip(f"the model is not installed: {EXAMPLE['CURE']}")
    model = EXAMPLE["convert"](source, tmp_path / "model")
    config = LLMConfig(
        model=str(model), vllm_args=ARGS, cache_dir=str(tmp_path / "answers"), max_tokens=160 if LONG else 96,
        timeout=600.0, total_timeout=1800.0, server_timeout=1200.0,
    )  # fmt: skip
    domain = make_domain("helpdesk_small")
    variables = mock.patch.dict(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    candidates = []
    with forked_servers(), variables, LLMClient(config, "tester") as client:
        for number, models in enumerate(MODELS):
            settings = Settings(domain.name, rounds=1, plans=min(4, COUNT), count=COUNT, models=models)
            roles, out = make_roles(models, client), tmp_path / f"out{number}"
            made = DataEngine(domain, out, settings, roles, start, workers=config.max_concurrency).run()
            assert {candidate.slot for candidate in made} == set(range(COUNT))
            candidates += made
        usage = {row["role"]: row for row in client.report()["usage"]}
    print(usage)
    accepted = [candidate.instance for candidate in candidates if candidate.accepted]
    print(f"{len(accepted)} accepted, {len(candidates)} attempts")
    assert [control for instance in accepted for control in failing_controls(domain, instance)] == []
    assert all(check_instance(domain, instance) == [] for instance in accepted)
    assert {"planner", "synthesizer"} <= set(usage)
