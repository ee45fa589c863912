"""A run directory that looks like a real one, without a run."""

from __future__ import annotations

import json
import math
import random
import re

TEMPLATE, REASONING, CALL, ANSWER, OBSERVATION = range(5)

ATTACK = '</script><img src=x onerror="document.documentElement.dataset.attacked=1">'
SUMMARY = {
    "recipe": "quickstart",
    "steps": 60,
    "seed": 0,
    "wall_seconds": 552.4,
    "base_success": {"mean": 0.25, "low": 0.21, "high": 0.294, "n": 400},
    "success": {"mean": 0.61, "low": 0.561, "high": 0.657, "n": 400},
    "base_greedy": {"mean": 0.99, "low": 0.975, "high": 0.996, "n": 400},
    "greedy": {"mean": 0.985, "low": 0.968, "high": 0.993, "n": 400},
    "versions": {"pact_fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}


def sample_metrics(step: int, steps: int, rng: random.Random) -> dict[str, float]:
    done = step / steps
    success = 0.25 + 0.4 * (1 - math.exp(-3 * done))
    values = {
        "step": step,
        "success": min(1.0, max(0.0, success + rng.gauss(0, 0.06))),
        "reward/mean": 1.1 + 1.6 * success + rng.gauss(0, 0.12),
        "reward/std": 0.6 - 0.2 * done,
        "reward/match": 0.7 + 0.25 * done + rng.gauss(0, 0.02),
        "reward/answer_f1": success + rng.gauss(0, 0.04),
        "reward/zero_advantage_groups": 0.1 + 0.2 * done + rng.gauss(0, 0.02),
        "loss": rng.gauss(0.02, 0.01),
        "prompt/loss_rl": rng.gauss(-0.01, 0.008),
        "trace/loss_rl": rng.gauss(-0.01, 0.008),
        "expert/loss_sft": 0.31 * math.exp(-done) + rng.gauss(0, 0.01),
        "trace/approx_kl": abs(rng.gauss(2e-3, 6e-4)),
        "prompt/approx_kl": abs(rng.gauss(8e-4, 3e-4)),
        "trace/clip_fraction": abs(rng.gauss(0.03, 0.01)),
        "prompt/clip_fraction": abs(rng.gauss(0.012, 0.004)),
        "prompt/entropy": 0.55 - 0.3 * done + rng.gauss(0, 0.02),
        "grad_norm": abs(rng.gauss(0.8, 0.2)),
        "control_token_prob": 0.93 + 0.05 * done + rng.gauss(0, 0.005),
        "lengths/completion_mean": 118 - 20 * done + rng.gauss(0, 4),
        "lengths/sampled_mean": 84 - 12 * done + rng.gauss(0, 3),
        "turns/mean": 3.4 - 0.2 * done + rng.gauss(0, 0.08),
        "tools/calls_mean": 2.4 - 0.2 * done + rng.gauss(0, 0.06),
        "stop/answer": 0.86 + 0.1 * done,
        "stop/max_turns": 0.09 - 0.06 * done,
        "stop/max_completion_length": 0.05 - 0.04 * done,
        "time/rollout": abs(rng.gauss(2.4, 0.2)),
        "time/optimizer": abs(rng.gauss(0.1, 0.01)),
        "time/forward_backward": abs(rng.gauss(1.6, 0.1)),
        "time/weight_sync": abs(rng.gauss(0.15, 0.02)),
        "tokens_per_second": rng.gauss(5200, 260),
        "learning_rate": 5e-5,
        "schedule/sft_lambda": 0.8 - 0.6 * done,
        "schedule/reasoning_level": float(4 - int(4.999 * done)),
    }
    if step % 10 == 0:
        values |= {"eval/success": success, "eval/greedy": 0.99 - 0.005 * done}
    return values


def pieces(text: str) -> list[str]:
    return re.findall(r"<[^>]*>|\s*\w{1,6}|\n|.", text)


def sample_turns(rng: random.Random, hops: int) -> list[tuple[str, int, int]]:
    """(text, component, sampled) segments of a rollout with `hops` calls."""
    names = ["Ada Okoro", "Lindholm", "Port Vesna", "Gullmark Institute", "Tarn"]
    segments: list[tuple[str, int, int]] = []
    for hop in range(hops):
        thought = f"I need the {['birthplace', 'mayor', 'founder', 'river'][hop % 4]} of {names[hop % 5]}."
        call = json.dumps({"name": "lookup", "arguments": {"entity": names[hop % 5], "relation": "place_of_birth"}})
        segments += [
            ("<think>\n", REASONING, 1),
            (thought, REASONING, 1),
            ("\n</think>\n\n", REASONING, 1),
            (f"<tool_call>\n{call}\n</tool_call>", CALL, 1),
            ("<|im_end|>", CALL, 1),
            ("\n<|im_start|>user\n<tool_response>\n", TEMPLATE, 0),
            (json.dumps({"result": names[(hop + 1) % 5], "confidence": round(rng.random(), 2)}), OBSERVATION, 0),
            ("\n</tool_response><|im_end|>\n<|im_start|>assistant\n", TEMPLATE, 0),
        ]
    return [
        *segments,
        ("<think>\nThe last result answers the question.\n</think>\n\n", REASONING, 1),
        (f"<answer>{names[hops % 5]}</answer>", ANSWER, 1),
        ("<|im_end|>", ANSWER, 1),
    ]


def sample_rollout(step: int, index: int, rng: random.Random, **changes) -> dict:
    hops = 1 + index % 3
    record: dict = {
        name: [] for name in ("tokens", "components", "sampled", "turn_ids", "logprobs", "advantages", "weights")
    }
    advantages = [rng.gauss(0, 1.2) for _ in range(hops + 1)]
    for number, (text, component, sampled) in enumerate(sample_turns(rng, hops)):
        turn = min(number // 8, hops)
        for token in pieces(text):
            record["tokens"].append(token)
            record["components"].append(component)
            record["sampled"].append(sampled)
            record["turn_ids"].append(turn)
            record["logprobs"].append(-rng.expovariate(3) if sampled else None)
            record["advantages"].append(advantages[turn] if sampled else None)
            record["weights"].append(1 / (128 * 60) if sampled else None)
    expert_tokens, expert_components, expert_weights = [], [], []
    for text, component, _ in sample_turns(rng, hops)[: 8 * hops]:
        for token in pieces(text):
            expert_tokens.append(token)
            expert_components.append(component)
            expert_weights.append({REASONING: 1.0, CALL: 0.62}.get(component, 0.0) / 900)
    success = float(rng.random() < 0.3 + step / 100)
    return {
        "step": step,
        "kind": "train",
        "task_id": f"chain-{hops}hop-{index:04d}",
        "route": ["trace", "prompt", "trace"][index % 3],
        "stop_reason": "answer",
        "reward": round(hops * 0.8 + success, 3),
        "reward_parts": {"match": 0.8, "answer_f1": success, "success": success},
        "turn_rewards": [0.8] * hops + [success],
        "success": success,
        "question": "Who is the mayor of the place where the founder of the Gullmark Institute was born?",
        "prompt": "<|im_start|>system\nYou can call tools.\n<|im_end|>\n<|im_start|>user\nWho is …?<|im_end|>\n",
        "expert": {"tokens": expert_tokens, "components": expert_components, "weights": expert_weights},
        **record,
        **changes,
    }


def write_lines(path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_sample_run(run, steps: int = 60):
    rng = random.Random(0)
    write_lines(run / "metrics.jsonl", [sample_metrics(step, steps, rng) for step in range(steps + 1)])
    for step in range(0, steps + 1, 10):
        write_lines(
            run / f"rollouts/step_{step:06d}.jsonl",
            [sample_rollout(step, index, rng) for index in range(12)],
        )
        record = sample_rollout(step, 12, rng, kind="eval", route=None, expert=None, advantages=None, weights=None)
        write_lines(run / f"rollouts/eval_{step:06d}.jsonl", [record])
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "config.yaml").write_text("seed: 0\nalgorithm:\n  name: pact\n  # <script>alert(1)</script>\n")
    return run


def embedded(path) -> dict:
    """The data block of a page."""
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))
