"""All roles by a real, small model in a vLLM server: answers fit their schemas, and nothing unverified is accepted.

`PACT_MODEL_TASKS=20` makes twenty tasks, which takes minutes of a free machine; without it, four.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")
pytest.importorskip("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

from pact_fast.envs.domain.base import make_domain
from pact_fast.envs.domain.controls import check_instance
from pact_fast.llm import LLMClient, LLMConfig
from pact_fast.synthesis.eigendata.backends import ROLES, make_roles
from pact_fast.synthesis.eigendata.engine import DataEngine, Settings
from tests.support.eigendata import failing_controls
from tests.support.vllm_servers import forked_servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples/smollm2_from_package.py"))
COUNT = int(os.environ.get("PACT_MODEL_TASKS", "4"))
ARGS = {"dtype": "bfloat16", "max_model_len": 4096, "enforce_eager": True, "max_num_seqs": 8}


def test_a_small_model_in_every_role(tmp_path):
    source = EXAMPLE["gguf_file"]()
    if source is None:
        pytest.skip(f"the model is not installed: {EXAMPLE['CURE']}")
    model = EXAMPLE["convert"](source, tmp_path / "model")
    config = LLMConfig(
        model=str(model), vllm_args=ARGS, cache_dir=str(tmp_path / "answers"), max_tokens=160, timeout=600.0,
        total_timeout=1800.0, server_timeout=1200.0,
    )  # fmt: skip
    domain = make_domain("helpdesk_small")
    variables = mock.patch.dict(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    with forked_servers(), variables, LLMClient(config, "tester") as client:
        settings = Settings(domain.name, rounds=1, plans=4, count=COUNT, models=ROLES)
        engine = DataEngine(
            domain, tmp_path / "out", settings, make_roles(ROLES, client), workers=config.max_concurrency
        )
        candidates = engine.run()
        usage = {row["role"]: row for row in client.report()["usage"]}
    print(usage)
    assert {candidate.slot for candidate in candidates} == set(range(COUNT))
    accepted = [candidate.instance for candidate in candidates if candidate.accepted]
    print(f"{len(accepted)} of {COUNT} accepted, {len(candidates)} attempts")
    assert [control for instance in accepted for control in failing_controls(domain, instance)] == []
    assert all(check_instance(domain, instance) == [] for instance in accepted)
    assert {"planner", "synthesizer"} <= set(usage)
