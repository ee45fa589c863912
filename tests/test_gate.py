"""The gate against slowdowns: ratios, the criterion for a slowdown, and its short form."""

from __future__ import annotations

import json
import statistics

import pytest

from benchmarks import gate
from benchmarks.gate import Ratio


def test_the_ratio_is_taken_within_rounds_and_its_error_shrinks_with_their_number():
    ours, peer = [1.0, 20.0, 3.3], [2.0, 40.0, 6.0]
    ratio = Ratio.of(ours, peer)
    assert ratio.median == 0.5
    assert ratio.error == 0.0  # two of three rounds agree
    few, many = (Ratio.of([1.0, 1.1, 1.2, 1.3] * n, [1.0] * 4 * n) for n in (1, 9))
    assert few.error == pytest.approx(1.2533 * 1.4826 * 0.1 / 2, rel=1e-3)
    assert many.error == pytest.approx(few.error / 3)
    assert many.median == statistics.median([1.0, 1.1, 1.2, 1.3])


def test_worse_is_beyond_tolerance_and_noise():
    assert Ratio(1.3, 0.01).worse(1.0, 0.25)
    assert not Ratio(1.26, 0.01).worse(1.0, 0.25)  # within two standard errors of the limit
    assert not Ratio(0.5, 0.0).worse(1.0, 0.25)


def run(tmp_path, monkeypatch, recorded: dict, *options: str) -> int:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(recorded))
    monkeypatch.setattr(gate, "measure", lambda case: (Ratio(0.8, 0.01), {"ours": 8.0, "peer": 10.0}))
    return gate.main(["--short", "--recorded", str(path), "--commit", "abc", *options])


def test_a_case_that_became_slower_is_an_exit_status(tmp_path, monkeypatch, capsys):
    here = gate.machine()
    short = [name for name, case in gate.GATES.items() if case.short]
    assert run(tmp_path, monkeypatch, {here: {"ratios": dict.fromkeys(short, 0.8)}}) == 0
    assert run(tmp_path, monkeypatch, {here: {"ratios": dict.fromkeys(short, 0.8) | {short[0]: 0.5}}}) == 1
    assert f"FAIL {short[0]}: 0.800 times its peer, recorded were 0.500" in capsys.readouterr().out


def test_another_machine_has_nothing_to_compare_with_and_records_its_own(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, {"avx2, torch, threads 64": {"ratios": {"head fp32": 0.1}}}) == 0
    assert "nothing to compare with" in capsys.readouterr().out
    assert run(tmp_path, monkeypatch, {}, "--record") == 0
    recorded = json.loads((tmp_path / "gate.json").read_text())
    assert recorded[gate.machine()]["ratios"]["head fp32"] == 0.8


@pytest.mark.slow
@pytest.mark.timing
def test_head_and_update_are_not_slower_than_recorded():
    # of a machine that others use too: bf16 products were a third slower there than alone, and their peer was not
    assert gate.main(["--short", "--tolerance", "0.5"]) == 0
