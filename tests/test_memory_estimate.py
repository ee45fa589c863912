"""The estimate of training memory against the kernel's measurement of a real update."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from pact_fast.cli.main import main
from pact_fast.config import parse_config
from pact_fast.errors import PactError
from pact_fast.estimate import update_trace
from pact_fast.estimate.memory import auto_pack_tokens, default_load, estimate
from pact_fast.estimate.sharding import Sharding
from pact_fast.estimate.workload import Lengths, full_load, update_loads
from pact_fast.kernels import LossTokens, pact_loss
from pact_fast.kernels.runtime import build
from pact_fast.model.patch import without_fused_kernels
from tests.support.models import DEEP
from tests.support.update_probe import probe

WIDE = {**DEEP, "num_hidden_layers": 2, "vocab_size": 65536}
UNTIED = {**WIDE, "tie_word_embeddings": False}
LENGTHS = (256, 192, 80, 4)  # of prompt, trace and response, and rollouts: activations decide, and are soon computed
WITHIN = 0.10
MIB = 1 << 20


def settings(architecture, pack=16384, **model):
    return {
        "model": {"random_init": architecture, **model},
        "algorithm": {"anchor": {"mode": "blend"}},
        "trainer": {"max_tokens_per_pack": pack},
    }


CASES = {
    "one pack": (settings(DEEP), LENGTHS, 1),
    "checkpointing, two packs": (settings(DEEP, 1536, gradient_checkpointing=True), (384, 128, 128, 4), 2),
    "bf16": (settings(DEEP, dtype="bfloat16"), LENGTHS, 1),
    "LoRA": (settings(DEEP, lora={"r": 16}), LENGTHS, 1),
    "wide vocabulary, tied": (settings(WIDE), (256, 128, 128, 4), 1),
    "wide vocabulary, untied, small packs": (settings(UNTIED, 512), (128, 64, 64, 2), 2),
}  # fmt: skip


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("name", CASES)
def test_estimate_is_within_a_tenth_of_the_measured_peak(name):
    """Compared are the whole training memory, and that of an update beyond weights and optimizer states."""
    config, lengths, prompts = CASES[name]
    parsed = parse_config(config)
    loads = update_loads(parsed, Lengths(*lengths), prompts)
    found = estimate(parsed, loads)
    measured = probe(config, lengths, prompts)
    assert measured["packs"] == len(loads)
    assert measured["tokens"] == sum(len(load.batch) for load in loads)
    beyond = found.total - found.parts["weights"] - found.parts["optimizer states"]
    for what, mine, real in (("peak", found.total, measured["peak"]), ("update", beyond, measured["beyond"])):
        print(f"{name}, {what}: estimated {mine / MIB:.0f} MiB, measured {real / MIB:.0f}, {mine / real - 1:+.1%}")
        assert real > 150 * MIB  # or noise would decide
        assert abs(mine / real - 1) < WITHIN


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(("stage", "dtype"), [(2, "float32"), (3, "bfloat16")])
def test_the_estimate_under_zero_is_within_a_tenth_of_two_real_processes(stage, dtype):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    config = settings(DEEP, dtype=dtype)
    config["trainer"]["deepspeed"] = {"stage": stage}
    parsed = parse_config(config)
    [load] = update_loads(parsed, Lengths(*LENGTHS), 1)
    found = estimate(parsed, [load], sharding=Sharding(2, stage))
    measured = probe(config, LENGTHS, prompts=2, ranks=2)
    assert measured["packs"] == 2 and measured["tokens"] == 2 * len(load.batch)
    print(f"ZeRO-{stage}, {dtype}: estimated {found.total / MIB:.0f} MiB, measured {measured['peak'] / MIB:.0f}")
    assert abs(found.total / measured["peak"] - 1) < WITHIN


@pytest.fixture
def deep():
    config = parse_config(settings(DEEP))
    config.rollout.max_prompt_length = config.rollout.max_completion_length = 512
    return config


@pytest.fixture
def flat(deep):
    """A config with one layer, for tests in which depth does not matter: every layer is traced."""
    deep.model.random_init["num_hidden_layers"] = 1
    return deep


@pytest.mark.slow
def test_activations_are_those_of_the_device(flat):
    """Norms, gated units and rotary embeddings are one step each on CPU only (model/patch.py)."""
    if build.status() != "ready":
        pytest.skip("no C++ library: the steps are the same everywhere")
    load = full_load(flat, 2048)

    def activations(device: str) -> int:
        return estimate(flat, [load], device=device).parts["activations"]

    on_cpu, on_cuda = activations("cpu"), activations("cuda")
    with without_fused_kernels():
        assert on_cpu < activations("cpu")
        assert on_cuda == activations("cuda")


@pytest.mark.slow
def test_packs_are_as_large_as_they_fit(deep):
    free = 1200 * MIB
    tokens = auto_pack_tokens(deep, free)
    assert tokens % 128 == 0

    def peak(tokens):
        return estimate(deep, [full_load(deep, tokens)] * 2).total

    assert 0.97 * free < peak(tokens) <= free


def test_a_path_that_cannot_fit_is_one_line_that_names_the_cure(deep):
    with pytest.raises(PactError, match="gradient_checkpointing"):
        auto_pack_tokens(deep, 400 * MIB)


def test_a_path_longer_than_the_budget_counts_whole(flat):
    flat.trainer.max_tokens_per_pack = 256
    assert len(default_load(flat).batch) == 1024
    assert "longest path" in estimate(flat).notes[0]


@pytest.mark.slow
def test_zero_shards_more_with_every_stage(flat):
    flat.model.dtype = "bfloat16"
    found = [estimate(flat, sharding=Sharding(8, stage)) for stage in (1, 2, 3)]
    weights = 2 * found[0].parameters
    states = 8 * found[0].parameters / 8
    for stage, one in zip((1, 2, 3), found, strict=True):
        assert one.parts["weights"] == pytest.approx(weights / (8 if stage == 3 else 1), rel=0.01)
        assert one.parts["optimizer states"] == pytest.approx(states, rel=0.01)
        assert one.parts["fp32 master weights"] == pytest.approx(states / 2, rel=0.01)
    assert found[0].parts["gradients"] > 4 * found[1].parts["gradients"]
    offloaded = estimate(flat, sharding=Sharding(8, 2, optimizer_on_host=True))
    assert offloaded.parts["optimizer states"] == offloaded.parts["fp32 master weights"] == 0


@pytest.mark.slow
def test_reference_model_and_rollout_engine_count(flat):
    plain = estimate(flat).total
    flat.algorithm.beta = 0.01
    assert estimate(flat).total == plain + 4 * estimate(flat).parameters
    flat.rollout.engine = "vllm"
    assert estimate(flat, device="cuda", capacity=10 << 30).parts["rollout engine"] == 3 << 30
    assert "rollout engine takes 30%" in estimate(flat).notes[0]


@pytest.mark.timing
@pytest.mark.slow
def test_a_large_model_costs_the_doctor_no_memory(tmp_path, capsys):
    """Layers of a 70B: tens of gigabytes of weights, none of which is made."""
    import resource

    large = {**DEEP, "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 151_936}
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(settings(large, dtype="bfloat16", gradient_checkpointing=True)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["doctor", str(path), "--memory", "--world-size", "16", "--zero-stage", "3", "device=cpu"]) == 0
    report = capsys.readouterr().out
    assert all(
        word in report for word in ("weights", "optimizer states", "activations", "GiB", "stage 3", "16 devices")
    )
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--memory", "--zero-stage", "4"], "the stages are 0"),
        (["--memory", "--world-size", "0"], "at least one device"),
        (["--world-size", "2"], "add --memory"),
    ],
)
def test_wrong_options_are_one_line(options, cure, capsys):
    assert main(["doctor", "quickstart", *options]) == 2
    assert cure in capsys.readouterr().err


class Made(TorchDispatchMode):
    """(rows, dtype) of the matrices of width 8 that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, torch.dtype]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == 8:
            self.shapes.add((len(result), result.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_hidden_gradients_are_as_large_as_those_of_the_kernel(dtype):
    """In 16-bit types a row that no token reads has no sum in fp32."""
    found = []
    for call in ("kernel", "estimate"):
        hidden, weight = torch.zeros(50, 8, dtype=dtype, requires_grad=True), torch.zeros(11, 8, dtype=dtype)
        with Made() as made:
            if call == "kernel":
                row = torch.arange(3)
                tokens = LossTokens(row, row, sft_weight=1.0)
                pact_loss(hidden, weight, tokens, sft_loss=torch.neg, backend="torch")  # a function: no operator
            else:
                update_trace._Head.apply(hidden, weight, 3, "cpu")
        found.append({shape for shape in made.shapes if shape[0] == 50})
    assert found[0] == found[1] == {(50, dtype)}
