"""MTR's ToolMaker and ToolActor by a small model in real vLLM: its output is valid, or rejected with a reason.

`PACT_MODEL_TASKS=50` takes fifty rows and kills the run five times, which takes minutes of a free machine; without it, two
rows and one kill.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import runpy
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")
pytest.importorskip("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")
pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install 'pact-fast[mtr]'")

import jsonschema

from examples.mtr_with_a_model import main
from pact_fast.envs.simulated.actor import error_kind
from pact_fast.envs.simulated.backend import ERROR_KINDS
from pact_fast.llm.server import COMPACT, cpu_args
from pact_fast.synthesis.mtr.tool_maker import REASONS
from pact_fast.vllm_process import command_line, server_environment
from tests.support.llm_server import forks_of, running, wait_for
from tests.support.vllm_servers import Server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SMOLLM2 = runpy.run_path(str(Path(__file__).parent.parent / "examples/smollm2_from_package.py"))
COUNT = int(os.environ.get("PACT_MODEL_TASKS", "2"))
KILLS = 5 if COUNT >= 50 else 1
SECONDS = 3600.0
ARGS = {
    "dtype": "bfloat16", "max_model_len": 4096, "enforce_eager": True, "max_num_seqs": 8, "generation_config": "vllm",
    "structured_outputs_config": COMPACT, **cpu_args(),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    source = SMOLLM2["gguf_file"]()
    if source is None:
        pytest.skip(f"the model is not installed: {SMOLLM2['CURE']}")
    return str(SMOLLM2["convert"](source, tmp_path_factory.mktemp("smollm2") / "model"))


@pytest.fixture(scope="module")
def url(model, tmp_path_factory) -> Iterator[str]:
    """A server that outlives the runs that are killed."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "m",
        "--host", "127.0.0.1", "--port", str(port), *command_line(ARGS),
    ]  # fmt: skip
    environment = {**server_environment(folder), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("ab") as log:
        server = Server(command, environment, log)
    try:
        wait_for(lambda: server.poll() is not None or healthy(port), SECONDS)
        assert server.poll() is None, (folder / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def healthy(port: int) -> bool:
    time.sleep(0.2)
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status == 200
    except (OSError, urllib.error.URLError):
        return False


@pytest.fixture
def rows(tmp_path) -> Path:
    """Questions of HotpotQA without a plan, so that the model has to write their tools."""
    source = Path(os.environ.get("PACT_TEST_DATA", "")) / "qa" / "hotpotqa_dev_passages.jsonl"
    if "PACT_TEST_DATA" not in os.environ or not source.exists():
        pytest.skip("set PACT_TEST_DATA to a folder with qa/hotpotqa_dev_passages.jsonl")
    with source.open(encoding="utf-8") as lines:
        (tmp_path / "rows.jsonl").write_text("".join(itertools.islice(lines, COUNT)))
    return tmp_path / "rows.jsonl"


def report_to(path: Path, *arguments: str) -> None:
    """Run the example, and write its output to `path`."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    main(list(arguments))
    sys.stdout.flush()


def test_a_small_models_tools_and_observations_are_valid_and_no_answer_is_asked_for_twice(url, rows, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    settings = ["model=m", f"base_url={url}", "max_tokens=400", "timeout=600", "total_timeout=3000"]
    arguments = [str(rows), str(out), "--rows", str(COUNT), *settings]
    with forks_of(report_to) as fork:
        for _ in range(KILLS):
            before = answers(out)
            pid = fork(tmp_path / "killed", *arguments)
            goal = len(before) + rng.randint(1, max(1, 2 * COUNT // KILLS))
            wait_for(lambda pid=pid, goal=goal: len(answers(out)) >= goal or not running(pid), SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: not running(pid))
            assert before.items() <= answers(out).items()
        kept, texts, reports = answers(out), [], []
        for name in ("first", "second"):
            pid = fork(tmp_path / name, *arguments)
            wait_for(lambda pid=pid: not running(pid), SECONDS)
            texts.append((out / "tools.jsonl").read_text(encoding="utf-8"))
            reports.append(json.loads((tmp_path / name).read_text()))
    assert texts[0] == texts[1] and kept.items() <= answers(out).items()
    assert sum(usage["requests"] for usage in reports[1]["usage"]) == 0, "the second run asks nothing"
    lines = [json.loads(line) for line in texts[0].splitlines()]
    assert len(lines) == COUNT
    problems = [problem for line in lines for problem in invalid(line)]
    print(json.dumps(reports[0]["outcome"]), reports[0]["usage"])
    assert problems == []


def answers(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "answers").glob("??/*.json")}


def invalid(line: dict) -> list[str]:
    """List the errors in a row's tools, rejections and observations."""
    problems = [] if line["tools"] or line["rejected"] else [f"{line['id']}: no tool, and no reason"]
    problems += [
        f"{one['name']}: {one['reasons']}" for one in line["rejected"] if not set(one["reasons"]) <= REASONS.keys()
    ]
    problems += [f"{one['name']}: rejected without a reason" for one in line["rejected"] if not one["reasons"]]
    outputs = {tool["name"]: tool["output"] for tool in line["tools"]}
    for tool in line["tools"]:
        jsonschema.Draft202012Validator.check_schema(tool["parameters"])
        jsonschema.Draft202012Validator.check_schema(tool["output"])
    for call in line["calls"]:
        kind = error_kind(call["observation"])
        if kind is None:
            jsonschema.validate(json.loads(call["observation"]), outputs[call["tool"]])
        elif kind not in ERROR_KINDS:
            problems.append(f"{call['tool']}: unknown error {kind}")
    return problems
