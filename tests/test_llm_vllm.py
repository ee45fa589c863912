"""A client that starts its own vLLM server: answers that fit a JSON schema, from real vLLM."""

import os
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")
pytest.importorskip("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

from pact_fast.errors import PactError
from pact_fast.llm import InvalidAnswer, LLMClient, LLMConfig, Request
from tests.support.vllm_engines import make_policy
from tests.support.vllm_servers import forked_servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green"]},
        "small": {"type": "boolean"},
        "tag": {"enum": ["<|im_end|>", "x"]},
    },
    "required": ["color", "small", "tag"],
    "additionalProperties": False,
}
ARGS = {"dtype": "float32", "max_model_len": 640, "enforce_eager": True, "max_num_batched_tokens": 2048}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with random weights: only the schema constrains its output."""
    folder, policy = tmp_path_factory.mktemp("model"), make_policy(trained=False)
    policy.model.save_pretrained(folder)
    policy.renderer.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_server_of_its_own_answers_by_schema_and_a_second_run_starts_none(model, tmp_path):
    settings = {
        "model": model,
        "vllm_args": ARGS,
        "cache_dir": str(tmp_path / "cache"),
        "max_tokens": 64,
        "temperature": 1.0,
    }
    asked = [Request([{"role": "user", "content": f"question {i}"}], schema=SCHEMA, sample=i % 2) for i in range(8)]
    with forked_servers(), mock.patch.dict(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1"}):
        with LLMClient(LLMConfig(**settings), "tester") as client:
            first = client.map(asked)
            process = client._shared._server._process
            with pytest.raises(InvalidAnswer) as caught:  # a model with random weights does not end by itself
                client.complete([{"role": "user", "content": "hi"}], max_tokens=4)
            assert caught.value.reason == "truncated"
            report = client.report()["usage"][0]
        assert process.poll() is not None
    assert all(set(one.value) == {"color", "small", "tag"} for one in first)
    assert len({one.text for one in first}) > 1  # seeds differ
    assert report["requests"] == 9 and report["completion_tokens"] > 0
    with LLMClient(LLMConfig(**settings), "tester") as client:
        again = client.map(asked)
        assert client._shared._server is None
    assert [one.value for one in again] == [one.value for one in first] and all(one.cached for one in again)


def test_prompts_that_do_not_fit_into_one_batch_are_answered(model, tmp_path):
    """vLLM's CPU build ends where the prompt of a request with a seed is computed in chunks."""
    words = " ".join(["word"] * 100)
    asked = [Request([{"role": "user", "content": f"{i} {words}"}], schema=SCHEMA) for i in range(12)]
    settings = {"model": model, "vllm_args": ARGS, "max_tokens": 64, "temperature": 1.0, "max_concurrency": 12}
    environment = mock.patch.dict(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    with forked_servers(), environment, LLMClient(LLMConfig(**settings), "tester") as client:
        assert len(client.map(asked)) == 12
        assert client.report()["usage"][0]["prompt_tokens"] > 2 * ARGS["max_num_batched_tokens"]


def test_a_server_that_cannot_start_is_an_error_with_its_log(tmp_path):
    config = LLMConfig(model=str(tmp_path / "nothing"), vllm_args=ARGS, server_timeout=200)
    with forked_servers(), LLMClient(config, "tester") as client, pytest.raises(PactError, match="ended with status"):
        client.complete([{"role": "user", "content": "hi"}])
