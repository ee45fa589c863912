"""The run report: reading incomplete runs, intervals, curve geometry, safe embedding, terminal tables.

The sample run made here also serves the browser tests.
"""

from __future__ import annotations

import io
import json
import math
import random
import re

import pytest
from rich.console import Console

from pact_fast.config import load_config
from pact_fast.errors import PactError
from pact_fast.report import write_report, write_view
from pact_fast.report.before_after import Comparison, Rate, comparisons
from pact_fast.report.charts import SPECS, format_value, panels
from pact_fast.report.console import print_rollout, rollout_table, summary_table
from pact_fast.report.html import duration, embed_json
from pact_fast.report.run_data import Rollout, read_run, sample_evenly
from pact_fast.train.run import Trainer
from tests.support.report_samples import (
    ATTACK,
    SUMMARY,
    embedded,
    sample_metrics,
    sample_rollout,
    write_lines,
    write_sample_run,
)
from tests.support.runs import SETTINGS

TEMPLATE, REASONING, CALL, ANSWER, OBSERVATION = range(5)


# ---- a sample run that looks like a real one


@pytest.fixture
def run(tmp_path):
    return write_sample_run(tmp_path / "quickstart")


# ---- reading runs that are incomplete


def test_truncated_lines_are_skipped_and_counted(run):
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + '{"step": 61, "loss": 0.')
    read = read_run(run, rollouts=5)
    assert read.metrics[-1]["step"] == 60 and len(read.metrics) == 61
    assert read.problems == ["metrics.jsonl: 1 truncated line skipped."]


def test_a_line_cut_inside_a_character_is_skipped(run):
    path = run / "rollouts/step_000060.jsonl"
    path.write_bytes(path.read_bytes() + '{"question": "é'.encode()[:-1])
    read = read_run(run, rollouts=100, step=60)
    assert len(read.rollouts) == 13 and read.rollouts_written == 14
    assert "rollouts: 1 truncated line skipped." in read.problems


def test_a_repeated_step_of_a_resumed_run_counts_once_and_the_later_value_wins(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 9.0}]
    )
    assert [(r["step"], r["loss"]) for r in read_run(tmp_path, rollouts=1).metrics] == [(1, 9.0), (2, 2.0)]


def test_numbers_that_are_not_finite_are_named_not_drawn(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan, "note": "x"}])
    read = read_run(tmp_path, rollouts=1)
    assert read.metrics[1] == {"step": 2}
    assert read.problems == ["loss was not a finite number at step 2."]


@pytest.mark.parametrize("kept", ["nothing", "config.yaml", "metrics.jsonl", "summary.json", "rollouts"])
def test_a_report_is_written_whatever_the_run_holds(run, kept, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    if kept != "nothing":
        (run / kept).rename(part / kept)
    html = write_report(part).read_text()
    assert ("No result yet" in html) == (kept == "metrics.jsonl")
    assert ("which may be chance" in html or "rose" in html) == (kept == "summary.json")
    assert ("<h2>Curves" in html) == (kept == "metrics.jsonl")
    assert ("None on disk" in html) == (kept != "rollouts")
    write_view(part)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"success": "high", "versions": 3, "wall_seconds": "x"}'])
def test_a_broken_summary_is_as_good_as_none(run, text):
    (run / "summary.json").write_text(text)
    assert 'class="rates"' not in write_report(run).read_text()


def test_a_missing_directory_is_one_line_with_a_cure(tmp_path):
    with pytest.raises(PactError, match=r"no run directory at .*give the output_dir"):
        write_report(tmp_path / "absent")


def test_an_unknown_step_is_refused(run):
    with pytest.raises(PactError, match="no rollouts of step 7"):
        write_view(run, step=7)


def test_misshapen_rollouts_become_empty_fields_and_columns_of_one_length():
    rollout = Rollout.from_record(
        {"step": "x", "tokens": ["a", None, 3], "components": [9, 2], "sampled": [True], "logprobs": [math.inf, "y"],
         "turn_ids": None, "reward": 10**400, "reward_parts": [1], "success": True, "expert": {"tokens": "ab"}}
    )  # fmt: skip
    response = rollout.response
    assert (
        response.text == ["a", "", "3"]
        and response.components == [0, 2, 0]
        and response.sampled == [True, False, False]
    )
    assert response.logprobs == [None] * 3 and response.turns == [0, 0, 0]
    assert rollout.step == 0 and rollout.reward is None and rollout.reward_parts == {} and rollout.success is None
    assert rollout.expert is not None and len(rollout.expert) == 0


# ---- which rollouts are shown, and how large a page may become


def test_sampling_is_even_and_keeps_both_ends():
    assert sample_evenly(range(10), 4) == [0, 3, 6, 9]
    assert sample_evenly(range(3), 4) == [0, 1, 2]
    assert sample_evenly(range(5), 1) == [4]


def test_the_report_shows_at_most_sixty_rollouts_from_the_first_to_the_last_step(tmp_path):
    for step in range(0, 400, 10):
        write_lines(
            tmp_path / f"rollouts/step_{step:06d}.jsonl",
            [{"step": step, "tokens": ["a"], "task_id": str(i)} for i in range(30)],
        )
    path = write_report(tmp_path)
    steps = [rollout["step"] for rollout in embedded(path)["rollouts"]]
    assert len(steps) == 60 and steps[0] == 390 and steps[-1] == 0 and len(set(steps)) == 15
    assert "60 of the 1,200 rollouts" in path.read_text()


def test_a_view_honours_its_step_its_limit_and_its_place(run, tmp_path):
    path = write_view(run, out=tmp_path / "page.html", step=20, limit=5)
    rollouts = embedded(path)["rollouts"]
    assert path == tmp_path / "page.html" and len(rollouts) == 5 and {r["step"] for r in rollouts} == {20}


@pytest.mark.slow
def test_long_rollouts_lose_their_middle_and_the_page_says_so(tmp_path):
    n = 500_000
    record = {"step": 1, "tokens": [str(i) for i in range(n)], "logprobs": [-0.123456] * n, "prompt": "p" * 50_000}
    write_lines(tmp_path / "rollouts/step_000001.jsonl", [record])
    shown = embedded(write_view(tmp_path))["rollouts"][0]
    text, (kept, left_out) = shown["response"]["text"], shown["response"]["cut"]
    assert len(text) == 400_000 and left_out == 100_000
    assert text[kept - 1] == str(kept - 1) and text[kept] == str(kept + left_out) and text[-1] == str(n - 1)
    assert shown["response"]["logprob"][0] == -0.1235
    assert len(shown["prompt"]) < 20_100 and "30,000 characters left out" in shown["prompt"]


# ---- nothing from a run can become part of the page


def test_embedded_json_holds_no_markup_and_survives_the_round_trip():
    value = {"a": ATTACK, "b": "<!--<script>", "c": "\u2028&amp;\ud800"}
    text = embed_json(value)
    assert not re.search(r"[<>&\u2028]", text) and text.isascii()
    assert json.loads(text) == value


def test_hostile_text_in_every_field_stays_text(run):
    (run / "summary.json").write_text(
        json.dumps(SUMMARY | {"recipe": ATTACK, "seed": ATTACK, "versions": {ATTACK: ATTACK}})
    )
    (run / "config.yaml").write_text(ATTACK)
    tag = ATTACK.removeprefix("</script>")  # a slash would end the name of a series
    metrics = {"step": 1, f"time/{tag}": 1.0, f"reward/{tag}": 1.0, f"x{ATTACK}": math.nan}
    write_lines(run / "metrics.jsonl", [metrics])
    changes = {key: ATTACK for key in ("kind", "task_id", "route", "stop_reason", "question", "prompt")}
    hostile = sample_rollout(1, 0, random.Random(0), tokens=[ATTACK, "\ud800"], reward_parts={ATTACK: 1.0}, **changes)
    write_lines(run / "rollouts/step_000001.jsonl", [hostile])
    html = write_report(run).read_text(encoding="utf-8")
    assert html.count("<script") == 2 and html.count("</script") == 2
    assert "<img" not in html and "&lt;img" in html


def test_the_page_names_no_outside_resource(run):
    html = write_report(run).read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"(https?:)?//[a-z]|<link|@import|url\(|\ssrc=", html)


# ---- before and after


def test_the_interval_of_a_change_agrees_with_the_published_example():
    """56/70 against 48/80 (Newcombe 1998, Table II, column a): difference 0.2, method 10 gives 0.0524 to 0.3339."""

    def wilson(k: int, n: int) -> Rate:
        p, z = k / n, 1.959964
        centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return Rate(p, ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), n)

    change = Comparison("Sampled", wilson(48, 80), wilson(56, 70)).change
    assert change is not None and change.ends is not None
    assert (change.mean, *change.ends) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_verdicts_follow_the_interval():
    def verdict(base, trained):
        return comparisons({"base_success": base, "success": trained})[0].verdict.replace("\u00a0", " ")

    low, high = SUMMARY["base_success"], SUMMARY["success"]
    assert verdict(low, high).startswith("Sampled success rose from 25.0 % to 61.0 %, +36.0 points (95 % interval +29")
    assert verdict(high, low).startswith("Sampled success fell from 61.0 % to 25.0 %, −36.0 points")
    assert "may be chance (95 % interval −" in verdict(low, low)
    assert "without intervals" in verdict(0.25, 0.61)
    assert verdict(None, high) == ""


def test_rates_are_read_from_objects_and_bare_numbers():
    assert Rate.read({"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}) == Rate(0.5, (0.4, 0.6), 10)
    assert Rate.read(0.5) == Rate(0.5)
    assert Rate.read({"mean": 0.5, "low": 0.4}) == Rate(0.5)
    assert Rate.read("0.5") is None and Rate.read({"low": 0.1}) is None and Rate.read(True) is None


# ---- curves


def test_curves_follow_the_values():
    panel = panels([{"step": s, "success": v} for s, v in [(0, 0.0), (5, 0.5), (10, 1.0)]])[0]
    assert panel.lines[0].path == "M44 128L174 68L304 8"
    assert panel.readout["steps"] == [0, 5, 10] and panel.readout["texts"] == [["0\u00a0%", "50\u00a0%", "100\u00a0%"]]


def test_statistics_of_streams_are_drawn_but_not_of_their_components_nor_totals_as_a_layer():
    row = {"step": 1, "trace/entropy": 1.0, "trace/tool_call/entropy": 2.0, "time/step": 9.0, "time/rollout": 1.0}
    labels = {panel.spec.title: [line.label for line in panel.lines] for panel in panels([row])}
    assert labels == {"Entropy": ["trace"], "Time per step": ["rollout"]}


def test_layers_of_a_stack_lie_on_each_other():
    panel = panels([{"step": s, "time/rollout": 1.0, "time/update": 3.0} for s in (0, 1)])[0]
    rollout, update = (line.area for line in panel.lines)
    top_of_rollout, bottom_of_update = rollout[1:-1].split("L")[:2], update[1:-1].split("L")[2:]
    assert sorted(top_of_rollout) == sorted(bottom_of_update)
    assert panel.y_ticks[0] == (128, "0") and panel.y_ticks[-1] == (8, "4")


def test_every_part_of_the_drawing_stays_inside_its_panel(run):
    for panel in panels(read_run(run, rollouts=1).metrics):
        for line in panel.lines:
            for path in (line.path, line.raw, line.area):
                for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path):
                    assert 44 <= float(x) <= 304 and 8 <= float(y) <= 128, panel.spec.title


def test_sparse_evaluations_are_dots_and_leave_gaps_in_the_readout(run):
    success = panels(read_run(run, rollouts=1).metrics)[0]
    train, held_out = success.lines[:2]
    assert len(held_out.dots) == 7 and not train.dots
    assert held_out.texts[0] and held_out.texts[1] is None and held_out.last == held_out.texts[-1]


def test_long_runs_are_thinned_without_moving_their_mean():
    panel = panels([{"step": s, "loss": float(s)} for s in range(10_000)])[0]
    assert len(panel.steps) <= 240 and panel.steps[-1] == 9999
    values = [float(t.replace(",", "").replace("−", "-")) for t in panel.readout["texts"][0]]
    assert sum(values) / len(values) == pytest.approx(4999.5, rel=0.01)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 3, "loss": 0.0}],
        [{"step": s, "loss": 5e-5 + s * 1e-20} for s in range(3)],
        [{"step": 0, "loss": -1e-9}, {"step": 1, "loss": 1e12}],
    ],
)
def test_odd_ranges_are_drawn(rows):
    panel = panels(rows)[0]
    assert all(8 <= y <= 128 for y, _ in panel.y_ticks) and len(panel.y_ticks) >= 2


def test_numbers_are_short():
    assert [format_value(v) for v in (0, 0.12345, 5432.1, 5e-5, -2)] == ["0", "0.123", "5,432", "5e−5", "−2"]
    assert format_value(0.1234, True) == "12.3\u00a0%"
    assert [duration(s) for s in (9.6, 552, 7300)] == ["10 s", "9 min 12 s", "2 h 1 min"]


def test_the_curves_of_a_run_are_drawn(run):
    titles = {panel.spec.title for panel in panels(read_run(run, rollouts=1).metrics)}
    assert {"SFT weight λ of calls", "Reasoning level", "Loss", "Entropy", "Stop reasons", "Time per step"} <= titles


def test_every_curve_shows_a_metric_that_runs_write(tmp_path):
    """One step of PACT with both contexts writes every metric that SPECS names; the sample run has no others."""
    config = [
        "algorithm.anchor.mode=blend",
        "trainer.max_steps=1",
        "trainer.eval_steps=null",
        f"output_dir={tmp_path / 'run'}",
    ]
    Trainer(load_config("quickstart", [*SETTINGS, *config])).train()
    metrics = read_run(tmp_path / "run", rollouts=1).metrics
    written = {key for record in metrics for key in record}
    for spec in SPECS:
        for key in [*spec.keys, *([spec.band] if spec.band else [])]:
            assert any(re.fullmatch(re.escape(key).replace(r"\*", "[^/]+"), name) for name in written), key
    for key in sample_metrics(0, 1, random.Random(0)):
        assert key in written or key.startswith(("stop/", "reward/")), key


# ---- terminal


def printed(thing) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="truecolor")
    if isinstance(thing, dict):
        print_rollout(thing, console)
    else:
        console.print(thing)
    return console.file.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\u00a0", " ")


def test_the_table_shows_question_completion_and_rewards_and_cuts_them():
    records = [sample_rollout(1, i, random.Random(i)) for i in range(6)]
    text = plain(printed(rollout_table(records, limit=2, width=120)))
    assert text.count("match 0.8") == 2 and text.count("…") == 2
    assert "Who is the mayor" in text and "tool_call" in text and "tool_response" not in text


def test_a_printed_rollout_is_whole_and_coloured_by_component():
    text = printed(sample_rollout(1, 2, random.Random(0)))
    assert "expert trace" in text and "Gullmark Institute" in plain(text)
    for style in ("36m", "4;33m", "1;32m", "3;35m"):
        assert f"\x1b[{style}" in text


def test_a_rollout_cannot_drive_the_terminal_nor_rich_markup():
    text = "\x1b]0;owned\x07\x1b[2J [bold red]x[/] \u202eabc"
    parts = {f"[link=x]{text}": 1.0}
    record = sample_rollout(
        1, 0, random.Random(0), tokens=[text], question=text, task_id=text, stop_reason=text, reward_parts=parts
    )
    for output in (printed(rollout_table([record])), printed(record)):
        assert "\x1b[2J" not in output and "\x1b]" not in output and "\u202e" not in output and "\x07" not in output
        assert "[bold red]" in plain(output)


def test_the_summary_table_shows_rates_and_intervals():
    text = plain(printed(summary_table(SUMMARY)))
    assert "61.0 %" in text and "56.1 to 65.7" in text and "+36.0" in text and "Greedy" in text
    assert "–" in plain(printed(summary_table({"success": 0.5})))
