"""Growth of costs with size: exponents, not seconds."""

import pytest

from benchmarks import scale, scale_parts
from benchmarks.scale_parts import Measured

pytestmark = pytest.mark.timing


def exponent(measure, small: int, large: int, times: int = 3) -> float:
    """Of the fastest of several measurements at each of two sizes."""
    rows = [min((measure(size) for _ in range(times)), key=lambda row: row.seconds) for size in (small, large)]
    return scale.exponent(rows)


def test_an_exponent_is_the_slope_of_the_last_two_sizes():
    rows = [Measured(1, 5.0, {}), Measured(10, 2.0, {}), Measured(100, 200.0, {})]
    assert scale.exponent(rows) == pytest.approx(2.0) and scale.exponent(rows[:1]) != scale.exponent(rows[:1])


def test_packs_are_assigned_in_the_time_of_sorting():
    assert exponent(scale_parts.assign_packs, 1_000, 8_000) < 1.5


def test_a_rank_has_no_more_to_do_when_prompts_and_ranks_grow_together():
    """Its own share stays the same; only tables of a few numbers grow. It used to be 1."""
    from benchmarks.scale_ranks import make_step

    def measure(prompts: int) -> Measured:
        rank_step = make_step(prompts, ranks=prompts // 2, tokens=2048)
        rank_step(0)
        return Measured(prompts, min(rank_step(step) for step in (1, 2, 3)), {})

    assert exponent(measure, 16, 128, times=1) < 0.6


@pytest.mark.slow
def test_parts_have_a_table(capsys):
    assert scale.main(["--parts", "assign", "--largest", "1024"]) == 0
    assert "| assign | 1,024 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_turn_costs_no_more_when_many_are_open():
    """It used to take 4 times as long at 8,192 as at 64: the pool looked at all connections for every request."""
    assert exponent(scale_parts.turns, 64, 1_024, times=1) < 1.4
