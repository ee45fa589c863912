"""MTR's tools by a language model: for QA rows, write interfaces, check them, and call each tool once.

    python examples/mtr_with_a_model.py rows.jsonl out --rows 50 model=models/smollm2 "vllm_args={max_model_len: 4096}"
    python examples/mtr_with_a_model.py rows.jsonl out --rows 50 model=NAME base_url=https://host/v1 api_key_env=MY_KEY

Settings are those of docs/llm.md. `out/tools.jsonl` has a line for each row: accepted tools, those that were rejected with
their reasons, and an observation, or a typed error, for a call of each tool. Every answer of the model is kept in
`out/answers`: a killed run continues when it is repeated, and a second run sends no request.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from pact_fast.envs.simulated.actor import ToolActor, error_kind
from pact_fast.envs.simulated.model import ModelBackend
from pact_fast.envs.simulated.recorded import ObservationStore
from pact_fast.envs.simulated.world import MODEL
from pact_fast.errors import PactError
from pact_fast.files import write_text
from pact_fast.llm import LLMClient, LLMConfig
from pact_fast.synthesis.mtr.model_tool_maker import ModelToolMaker
from pact_fast.synthesis.mtr.plan import make_plan
from pact_fast.synthesis.mtr.qa import QARow
from pact_fast.synthesis.mtr.readers import read_rows


def use(row: QARow, maker: ModelToolMaker, actor: ToolActor) -> dict[str, Any]:
    """Print the tools of a row, and the answer of each to a call with names of the question."""
    plan = make_plan(row)
    made = maker.make(row, plan)
    names = [name for hop in plan.hops for name in hop.arguments.values()] or [row.question]
    episode = actor.episode(row.id, made.world, row.answers)
    tools, calls = [], []
    for tool in made.world.tools.values():
        if tool.kind != MODEL:
            continue
        typed = {name: schema["type"] for name, schema in tool.parameters["properties"].items()}
        examples = {"string": names[0], "integer": 1, "number": 1.0, "boolean": True}
        arguments = {name: examples[kind] for name, kind in typed.items()}
        tools.append({**tool.schema["function"], "output": tool.output})
        calls.append({"tool": tool.name, "arguments": arguments, "observation": episode.call(tool.name, arguments)})
    rejected = [{"name": one.name, "reasons": one.reasons} for one in made.rejected]
    return {
        "id": row.id,
        "class": plan.task_class,
        "class_by_model": maker.classify(row),
        "tools": tools,
        "rejected": rejected,
        "calls": calls,
    }


def run(rows: Path, out: Path, count: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Write `out/tools.jsonl` for the first rows of a file. Returns the client's report."""
    out.mkdir(parents=True, exist_ok=True)
    config = LLMConfig.read({"cache_dir": str(out / "answers"), **settings})
    with LLMClient(config, "tool_maker") as client, ThreadPoolExecutor(config.max_concurrency) as pool:
        maker = ModelToolMaker(client)
        actor = ToolActor(ModelBackend(client.with_role("tool_actor")), ObservationStore(out / "observations.jsonl"))
        lines = list(pool.map(lambda row: use(row, maker, actor), itertools.islice(read_rows(rows), count)))
        write_text(out / "tools.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return client.report() | {"outcome": outcome(lines)}


def outcome(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of rows, tools, reasons, observations and typed errors."""
    kinds = Counter(error_kind(call["observation"]) or "valid" for line in lines for call in line["calls"])
    reasons = Counter(reason for line in lines for one in line["rejected"] for reason in one["reasons"])
    tools = sum(len(line["tools"]) for line in lines)
    return {"rows": len(lines), "tools": tools, "rejected": dict(reasons), "observations": dict(kinds)}


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a file of HotpotQA, MuSiQue, 2WikiMultiHopQA or Bamboogle")
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--rows", dest="count", type=int, default=50, help="how many rows")
    parser.add_argument("settings", nargs="*", help="key=value, of the language model")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        pairs = (setting.partition("=") for setting in parsed.settings)
        report = run(parsed.rows, parsed.out, parsed.count, {key: yaml.safe_load(value) for key, _, value in pairs})
    except PactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
