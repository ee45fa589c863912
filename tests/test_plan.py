"""The plan of a step: its amounts are those of a real update, its seconds near them, its words plain."""

import pytest
import yaml

from pact_fast.cli.main import main
from pact_fast.config import parse_config
from pact_fast.estimate import hardware, overhead
from pact_fast.estimate.sharding import Sharding
from pact_fast.estimate.time import estimate_step
from pact_fast.estimate.workload import Lengths
from pact_fast.model.build import meta_model
from tests.support.models import DEEP
from tests.support.update_probe import probe

WIDE = {**DEEP, "num_hidden_layers": 2, "vocab_size": 32768}
FLAT = {**DEEP, "num_hidden_layers": 1}  # where depth does not matter: every layer is traced
LENGTHS = Lengths(128, 64, 64, 4)
FACTOR = 2.0  # between estimated and measured seconds
ATTEMPTS = 3  # a machine shared with others may be busy during one measurement and idle during another


def settings(architecture, **sections):
    config = {
        "model": {"random_init": architecture},
        "algorithm": {"anchor": {"mode": "blend"}},
        "trainer": {"prompts_per_step": 1},
        "rollout": {"max_prompt_length": 128, "max_completion_length": 64, "num_generations": 4},
    }
    return config | {name: config.get(name, {}) | values for name, values in sections.items()}


def planned(config, gpu="h100", gpus=1, stage=0, lengths=LENGTHS):
    parsed = parse_config(config)
    return estimate_step(parsed, hardware.named(gpu), lengths, Sharding(gpus, stage), gpus)


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize(("shape", "lengths"), [(DEEP, (256, 128, 64, 4)), (WIDE, (128, 128, 64, 4))])
def test_seconds_are_near_those_of_a_real_update(shape, lengths):
    config = settings(shape)
    parsed = parse_config(config)
    for _ in range(ATTEMPTS):
        real = probe(config, lengths, rates=True)
        ratios = []
        for rates in real["rates"]:
            found = estimate_step(parsed, hardware.Hardware(**rates), Lengths(*lengths), Sharding(), 1)
            seconds = sum(part.seconds for part in found.parts if part.phase == "update")
            ratios.append(seconds / real["seconds"])
        amounts = {part.name: part.amount for part in found.parts if part.phase == "update"}
        decoder = amounts["decoder, matrix products"] + amounts["decoder, attention"]
        assert decoder == pytest.approx(real["flops"], rel=1e-9)
        print(f"measured {real['seconds']:.2f} s; estimated, of that: {ratios[0]:.2f} before, {ratios[1]:.2f} after")
        if any(1 / FACTOR < ratio < FACTOR for ratio in ratios):
            return
    pytest.fail(f"estimated over measured seconds: {ratios}")


def test_devices_share_the_work_and_pay_for_it_in_bytes():
    config = settings(WIDE, trainer={"prompts_per_step": 16}, rollout={"engine": "vllm"})
    one, eight = planned(config), planned(config, gpus=8)
    by_name = {part.name: part.amount for part in eight.parts}
    for part in one.parts:
        if part.phase == "update" and part.name != "optimizer":
            assert by_name[part.name] == pytest.approx(part.amount / 8)
    parameters = one.memory.parameters
    assert by_name["gradients, reduce"] == pytest.approx(2 * 7 / 8 * 4 * parameters, rel=1e-3)
    assert not any(part.name == "gradients, reduce" for part in one.parts)


def test_stage_3_sends_more_than_stage_2():
    config = settings(WIDE, trainer={"prompts_per_step": 16}, model={"dtype": "bfloat16"})

    def sent(stage):
        return sum(part.amount for part in planned(config, gpus=8, stage=stage).parts if part.phase == "communication")

    assert 0 < sent(1) <= sent(2) < sent(3)


def test_sharing_prefixes_saves_what_the_plan_says():
    config = settings(FLAT, rollout={"num_generations": 8})
    found = planned(config, lengths=Lengths(1024, 1024, 256, 8))
    # the lengths of docs/tree.md, where "every sequence alone" runs the demonstration once more for itself
    assert (found.tokens, found.unshared) == (6144, 30720 - 2048)


def seconds_of(found, name):
    return sum(part.seconds for part in found.parts if part.name == name)


def test_what_does_not_shrink_with_the_number_of_devices_is_planned_too():
    """By hand: 64 prompts of 4 rollouts of 64 tokens. Constants as measured, see estimate/overhead.py."""
    config = settings(FLAT, trainer={"prompts_per_step": 64, "save_rollouts": 32})
    for gpus in (8, 64):
        expected = 256 * 64 / gpus * 3.1e-7 + 256 * 4.6e-6 + gpus * 2.5e-4
        found = planned(config, gpus=gpus)
        assert seconds_of(found, "packs and metrics, CPU time") == pytest.approx(expected)
        assert seconds_of(found, "rollouts to disk, CPU time") == pytest.approx(32 * 64 * 8e-7)
    many = seconds_of(planned(config, gpus=512), "packs and metrics, CPU time")
    assert many > seconds_of(planned(config, gpus=64), "packs and metrics, CPU time")


def test_fingerprints_read_the_weights_three_times():
    config = settings(FLAT, rollout={"engine": "vllm"})
    found = planned(config)
    [part] = [part for part in found.parts if part.name == "fingerprints of the weights"]
    assert part.amount == 3 * 4 * found.memory.parameters and part.rate == found.hardware.memory
    assert part.seconds <= 3 / LENGTHS.response * seconds_of(found, "decoding")  # as docs/planning.md says
    assert "fingerprints" not in str(planned(settings(FLAT)).parts)  # the embedded engine has the trainer's weights
    never = settings(FLAT, rollout={"engine": "vllm", "verify_weights": "never"})
    assert "fingerprints" not in str(planned(never).parts)


def test_a_save_waits_for_the_copies_that_a_step_leaves_over():
    """By hand: 12 bytes a parameter at 6 GB/s, divided among the devices under ZeRO."""
    config = settings(FLAT, trainer={"save_steps": 4})
    parsed, parameters = parse_config(config), planned(config).memory.parameters
    model = meta_model(parsed)

    def waited(sharding, seconds):
        [part] = overhead.checkpoint(parsed, hardware.named("h100"), sharding, model, seconds)
        return part.seconds

    copies = 12 * parameters / 6e9
    assert waited(Sharding(), 2 * copies) == 0 and waited(Sharding(), copies / 4) == pytest.approx(3 / 16 * copies)
    assert waited(Sharding(8, 2), 100.0) == 0
    assert waited(Sharding(8, 3), copies / 16) == pytest.approx((copies / 8 - copies / 16) / 4)


@pytest.mark.slow
def test_decoding_is_bound_by_memory_and_its_batch():
    alone = planned(settings(DEEP, rollout={"max_batch_size": 1}), lengths=LENGTHS)
    many = planned(settings(DEEP, rollout={"max_batch_size": 4}), lengths=LENGTHS)

    def decoding(found):
        return next(part.seconds for part in found.parts if part.name == "decoding")

    assert decoding(alone) > 3 * decoding(many)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(FLAT)))
    return str(path)


def test_the_command_prints_the_bottleneck_and_that_rates_are_assumed_and_times_experimental(
    recipe, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--gpus", "16", "--gpu", "h200", "--prompt", "1000", "--trace", "500", "--response", "200"]
    assert main(["plan", recipe, "seed=1", *options, "--zero-stage", "2"]) == 0
    report = capsys.readouterr().out
    assert "16 × h200" in report and "bottleneck: " in report
    assert "assumed efficiencies" in report and "nothing here was measured" in " ".join(report.split())
    assert "one training step (experimental)" in report and "note: experimental: the time estimate" in report
    for part in ("matrix products", "attention", "head", "optimizer", "reduce-scatter", "all-gather", "decoding"):
        assert part in report


def test_several_numbers_of_devices_are_compared(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", recipe, "seed=1", "--gpu", "h100", "--gpus", "8", "64", "512"]) == 0
    report = capsys.readouterr().out
    for words in ("8 devices", "64 devices", "512 devices: bottleneck", "packs and metrics", "decoding", "optimizer"):
        assert words in report
    total = next(line for line in report.splitlines() if "total" in line)
    seconds = [float(cell) for cell in total.replace("│", " ").split()[1:]]
    assert len(seconds) == 3 and seconds[0] < seconds[2]  # of a tiny model, which collectives slow down


@pytest.mark.slow
def test_this_machine_is_measured(recipe, capsys):
    assert main(["plan", recipe]) == 0
    assert "measured here" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_too_large_for_the_device_is_said_to_be():
    large = {
        **DEEP,
        "hidden_size": 16384,
        "intermediate_size": 57344,
        "num_hidden_layers": 4,
        "num_attention_heads": 64,
    }
    found = planned(settings(large))
    assert found.memory.total > found.hardware.capacity
    assert "does not fit" in found.notes[0]


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--gpu", "v100"], "choose one of a100, h100"),
        (["--gpu", "h100", "--gpus", "0"], "at least 1"),
        (["--gpu", "h100", "--response", "0"], "at least 1"),
        (["--gpu", "h100", "--trace", "-1"], "0 for none"),
        (["--gpu", "h100", "--zero-stage", "5"], "the stages are"),
    ],
)
def test_wrong_options_are_one_line(recipe, options, cure, capsys):
    assert main(["plan", recipe, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert cure in error and error.startswith("error:") and "\n" not in error


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "published peaks times assumed efficiencies" in text and "tokens of an expert trace" in text
