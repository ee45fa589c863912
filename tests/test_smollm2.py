"""A real pre-trained model, SmolLM2-135M-Instruct: checked, trained, sampled, evaluated, exported and reloaded.

Its tokenizer has no token for any tag of a tool call, its vocabulary is a hundred times that of the tiny models of other
tests, and its weights make the activations of a trained model. The recipe is `smollm2-cpu`, cut to few tokens, and
what the doctor sees and what trains are the first layers with the whole vocabulary; `PACT_MODEL_LAYERS=30` takes all.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.chat.rendering import make_renderer
from pact_fast.cli.main import main
from pact_fast.cli.session import open_session
from pact_fast.components import Component
from pact_fast.config import load_config
from pact_fast.envs.registry import make_tasks
from pact_fast.train.evaluate import Sampling, evaluate

pytestmark = pytest.mark.slow
EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples/smollm2_from_package.py"))
LAYERS = int(os.environ.get("PACT_MODEL_LAYERS", "8"))
SMALL = [
    "pretrain=null",  # its own file tests the warm-up; here, a step changes the model's own weights
    "env.args.hops=[1, 2]",
    "rollout.num_generations=2",
    "rollout.max_turns=1",
    "rollout.max_turn_tokens=6",
    "rollout.max_completion_length=8",
    "algorithm.anchor.mode=blend",  # both contexts in every step
    "trainer.max_steps=2",
    "trainer.prompts_per_step=1",
    "trainer.eval_tasks=2",
    "trainer.log_completions=0",
    "threads=1",
]
RUNS = {  # both dtypes, all weights and adapters
    "float32": ["model.dtype=float32", "model.lora={r: 8, alpha: 16}", "trainer.learning_rate=2e-3"],
    "bfloat16": ["model.dtype=bfloat16", "trainer.learning_rate=1e-4"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The model as a Hugging Face folder."""
    source = EXAMPLE["gguf_file"]()
    if source is None:
        pytest.skip(f"the model is not installed: {EXAMPLE['CURE']}")
    return EXAMPLE["convert"](source, tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def shallow(model, tmp_path_factory) -> Path:
    """Its first layers, with tokenizer, embedding, last norm and head."""
    folder = tmp_path_factory.mktemp("shallow")
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.model.layers, lm.config.num_hidden_layers = lm.model.layers[:LAYERS], LAYERS
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def run(request, shallow, tmp_path_factory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("smollm2") / "run"
    settings = [f"model.path={shallow}", *SMALL, *RUNS[request.param], f"output_dir={run}"]
    assert main(["train", "smollm2-cpu", *settings]) == 0
    return run


@pytest.fixture(scope="module")
def exported(run) -> Path:
    assert main(["export", str(run), str(run.parent / "exported")]) == 0
    return run.parent / "exported"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_the_folder_from_the_package_holds_the_model(model):
    """Weights, names, layout of heads, tokens and template: a slip in any of them would end its English."""
    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    assert sum(p.numel() for p in lm.parameters()) == 134_515_008 and lm.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = lm.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]


def test_doctor_finds_nothing_wrong(shallow, capsys):
    settings = [f"model.path={shallow}", "model.dtype=bfloat16", "trainer.prompts_per_step=2", "threads=1"]
    assert main(["doctor", "smollm2-cpu", *settings]) == 0
    report = capsys.readouterr().out
    assert "FAIL" not in report and "warn" not in report, report
    parameters = 49152 * 576 + LAYERS * 3_540_096 + 576
    assert f"{parameters / 1e6:.1f} M parameters" in report and "written as Hermes" in report


def test_its_own_template_is_refused_with_the_cure(model, capsys):
    assert main(["train", "smollm2-cpu", f"model.path={model}", "model.chat_template=null", "--dry-run"]) == 1
    assert "chatml_hermes for a model of ChatML" in capsys.readouterr().out


def test_every_loss_has_tokens_and_a_gradient(run):
    steps = [record for record in metrics(run) if "loss" in record]
    assert len(steps) == 2
    for record in steps:
        assert record["updates/skipped"] == 0 and record["grad_norm"] > 0
        assert record["prompt/tokens"] and record["trace/tokens"] and record["expert/tool_call/tokens"]


@torch.inference_mode()
def test_two_steps_make_the_expert_trace_more_probable(run, shallow, exported):
    config = load_config(str(run / "config.yaml"))
    renderer = make_renderer(config.model, AutoTokenizer.from_pretrained(exported))
    [task] = make_tasks(config).train(0, 1)
    context = renderer.trace_context(task, task.expert, "turns")
    prompt = renderer.prompt_ids(task.prompt, task.tools)
    ids = torch.from_numpy(np.concatenate([prompt, context.ids]))
    calls = torch.from_numpy(context.components == Component.TOOL_CALL)

    def logprob(folder: Path) -> float:
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(ids[None]).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0][calls].mean())

    assert logprob(exported) > logprob(shallow) + 0.1


@pytest.mark.parametrize("run", ["bfloat16"], indirect=True)  # the tiny models of other tests are evaluated in float32
def test_eval_repeats_the_runs_last_evaluation(run, tmp_path, capsys):
    assert main(["eval", str(run), "--out", str(tmp_path / "eval.json")]) == 0
    result, summary = json.loads((tmp_path / "eval.json").read_text()), json.loads((run / "summary.json").read_text())
    for ours, theirs in (("sampled", "success"), ("greedy", "greedy")):
        assert result[ours]["success"] == summary[theirs]["mean"]
        assert result[ours]["samples"] == summary[theirs]["n"] == 2


@pytest.mark.parametrize("run", ["float32"], indirect=True)
def test_rollouts_are_written_token_by_token(run, tmp_path):
    out = tmp_path / "rollouts.jsonl"
    assert main(["rollout", str(run), "--tasks", "2", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(records) == 2
    for record in records:
        assert "<tool_call>" in record["prompt"] and "get_" in record["prompt"]
        assert len(record["tokens"]) == len(record["components"]) == len(record["logprobs"]) >= 1


@torch.inference_mode()
def test_a_reloaded_export_is_the_policy(run, exported):
    """The model that transformers loads gives sampled tokens the log-probs that the engine reported."""
    dtype = getattr(torch, load_config(str(run / "config.yaml")).model.dtype)
    session = open_session(str(run), [])
    trajectories = evaluate(session.loop, session.select("eval", 2), sampling=Sampling(1.0), seed=1)
    session.close()
    reloaded = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert reloaded.dtype == torch.float32 and reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    for trajectory in trajectories:
        ids = torch.from_numpy(np.concatenate([trajectory.prompt_ids, trajectory.ids]))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = reloaded(ids[None]).logits[0, len(trajectory.prompt_ids) - 1 : -1]
        theirs = logits.float().log_softmax(-1).gather(-1, torch.from_numpy(trajectory.ids)[:, None])[:, 0].numpy()
        off = np.abs(theirs - trajectory.logprobs)[trajectory.sampled]
        # two bf16 computations of an improbable token differ by tenths of a nat; other weights by whole ones
        assert off.max() < (2e-4 if dtype == torch.float32 else 0.75)


def test_the_exported_tokenizer_has_the_recipes_template(run, exported):
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (run / "tokenizer", exported))
    assert ours.chat_template == theirs.chat_template and "<tool_call>" in theirs.chat_template
