"""The example that makes MTR's tools with a language model: killed at any moment it ends with the same files."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from examples.mtr_with_a_model import main
from pact_fast.synthesis.mtr.model_tool_maker import CLASS, INTERFACES
from tests.support.llm_server import forks_of, llm_server, running, said, wait_for
from tests.support.optional import needs

needs("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

pytestmark = pytest.mark.slow
ROWS = 12


def scripted(rng):
    """A model that never repeats an output, and half of the time writes an invalid one."""
    lock, count = threading.Lock(), iter(range(10**6))

    def answer(body):
        time.sleep(0.01)
        schema = body["response_format"]["json_schema"]["schema"]
        with lock:
            n, bad = next(count), rng.random() < 0.4
        if schema == CLASS:
            return said('{"class": "bridge"}')
        if schema != INTERFACES:
            keys = schema["properties"]
            return said("nonsense" if bad else json.dumps({key: f"text {n}" for key in keys}))
        parameter = {"name": "entity", "description": "A name.", "type": "string", "example": "Oslo"}
        returned = {"name": "found", "description": "What is found.", "type": "string"}
        name = "no name" if bad else f"find_{n}"
        tool = {"name": name, "description": "Finds it.", "parameters": [parameter], "returns": [returned]}
        return said(json.dumps({"tools": [tool]}))

    return answer


def silent_main(*arguments):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(list(arguments))


def test_a_run_killed_at_random_moments_ends_with_one_set_of_files_and_a_second_run_asks_nothing(tmp_path):
    rows, out, rng = tmp_path / "rows.jsonl", tmp_path / "out", random.Random(1)
    lines = [{"id": f"r{i}", "question": f"Where was person {i} born?", "answers": [f"Town {i}"]} for i in range(ROWS)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with llm_server(scripted(rng)) as server, forks_of(silent_main) as fork:
        arguments = [str(rows), str(out), "--rows", str(ROWS), "model=m", f"base_url={server.url}", "max_concurrency=3"]
        stored: dict[Path, bytes] = {}
        for kill in range(3):
            pid = fork(*arguments)
            goal = len(server.bodies) + rng.randint(3, 8)
            wait_for(lambda goal=goal: len(server.bodies) >= goal)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: not running(pid))
            now = {path: path.read_bytes() for path in (out / "answers").glob("??/*.json")}
            assert stored.items() <= now.items() and not (out / "tools.jsonl").exists(), kill
            stored = now
        assert stored
        texts = []
        for _ in range(2):
            asked = len(server.bodies)
            pid = fork(*arguments)
            wait_for(lambda pid=pid: not running(pid))
            texts.append((out / "tools.jsonl").read_bytes())
        assert len(server.bodies) == asked  # the second run asked nothing
    assert texts[0] == texts[1]
    made = [json.loads(line) for line in texts[0].splitlines()]
    assert [line["id"] for line in made] == [f"r{i}" for i in range(ROWS)]
    assert all(line["tools"] or line["rejected"] for line in made) and any(line["calls"] for line in made)
    kept = {str(path.relative_to(out)): path.read_bytes() for path in stored}
    assert all((out / name).read_bytes() == data for name, data in kept.items())
