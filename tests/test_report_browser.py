"""The report in a real browser: the script runs, shows every token, honours the address; hostile text stays inert."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from pact_fast.report import write_report, write_view
from tests.support.report_samples import ATTACK, embedded, sample_rollout, write_lines, write_sample_run

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """browse(path, fragment) -> Page, the document after its script ran."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is in PATH")
    profile = tmp_path_factory.mktemp("profile")

    def load(path, fragment: str = "") -> Page:
        command = [browser, *QUIET, f"--user-data-dir={profile}", "--dump-dom", f"{path.as_uri()}#{fragment}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        page = Page()
        page.feed(done.stdout)
        assert "data-ready" in page.root and "data-error" not in page.root, done.stderr[-2000:]
        return page

    return load


class Page(HTMLParser):
    """Counts the elements of a document and collects the parts that the tests check."""

    def __init__(self):
        super().__init__()
        self.root: dict = {}
        self.tags: list[str] = []
        self.tokens: list[dict] = []  # attributes of token spans in the list of rollouts
        self.cards = 0
        self.pressed = ""
        self.texts: list[str] = []
        self._in_list = False

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        classes = (attributes.get("class") or "").split()
        self.tags.append(tag)
        self._in_list |= attributes.get("id") == "list"
        if tag == "html":
            self.root = attributes
        if attributes.get("aria-pressed") == "true":
            self.pressed = attributes["data-colour"]
        if self._in_list:
            self.cards += "rollout" in classes
            if "t" in classes:
                self.tokens.append(attributes | {"classes": classes})

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def with_class(self, name: str) -> int:
        return sum(name in token["classes"] for token in self.tokens)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_sample_run(tmp_path_factory.mktemp("runs") / "quickstart")


def test_the_report_shows_its_first_page_with_every_token(run, browse):
    path = write_report(run)
    page = browse(path)
    first = embedded(path)["rollouts"][:10]
    sides = [side for rollout in first for side in (rollout["response"], rollout["expert"]) if side]
    assert page.cards == 10 and page.pressed == "component"
    assert len(page.tokens) == sum(len(side["text"]) for side in sides) > 500
    assert "page 1 of 6" in page.text
    assert page.tags.count("figure") == 18


def test_every_token_of_a_rollout_is_one_span_with_its_component_and_context(tmp_path, browse):
    record = {
        "step": 1, "tokens": ["<think>", "\n", " ", "{", "ok", "\u202ebad"], "components": [1, 1, 2, 2, 4, 0],
        "sampled": [1, 1, 1, 1, 0, 0], "turn_ids": [0, 0, 0, 1, 1, 1],
    }  # fmt: skip
    write_lines(tmp_path / "rollouts/step_000001.jsonl", [record])
    page = browse(write_view(tmp_path))
    classes = [" ".join(token["classes"]) for token in page.tokens]
    assert classes == ["t c1", "t c1", "t c2", "t c2", "t c4 context", "t c0 context"]
    assert "↵\n" in page.text and "·" in page.texts and "\\u202e" in page.texts and "turn 2" in page.texts


def test_the_address_chooses_the_colours(run, browse):
    plain, coloured = (browse(write_view(run), f"colour={c}&step=60") for c in ("component", "advantage"))
    assert coloured.pressed == "advantage" and coloured.with_class("shaded") > 100 > plain.with_class("shaded") == 0
    sampled = sum("context" not in token["classes"] for token in coloured.tokens)
    marked = coloured.with_class("positive") + coloured.with_class("negative")
    assert coloured.with_class("positive") and coloured.with_class("negative")
    assert marked == coloured.with_class("shaded") < sampled  # expert tokens have no advantage
    assert all("--depth" in token["style"] for token in coloured.tokens if "shaded" in token["classes"])


def test_the_address_filters_and_turns_pages(run, browse):
    view = write_view(run)
    assert browse(view, "kind=eval").cards == 7
    page = browse(view, "step=30&outcome=failed&min=0&page=99&colour=nonsense")
    outcomes = re.findall(r"[✓✗] (\w+)", page.text)
    assert page.pressed == "component" and 0 < page.cards == len(outcomes) and set(outcomes) == {"failed"}
    assert browse(view, "min=1000").cards == 0


def test_hostile_text_is_shown_and_does_nothing(run, tmp_path, browse):
    fields = {key: ATTACK for key in ("kind", "task_id", "route", "stop_reason", "question", "prompt")}
    hostile = sample_rollout(1, 0, random.Random(0), tokens=[ATTACK] * 3, reward_parts={ATTACK: 1.0}, **fields)
    hostile["expert"]["tokens"][0] = ATTACK
    write_lines(tmp_path / "rollouts/step_000001.jsonl", [hostile, hostile])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "time/<img src=x>": 1.0}])
    page = browse(write_report(tmp_path), f"task={ATTACK}&colour={ATTACK}")
    assert page.cards == 2 and page.texts.count(ATTACK) >= 2 * (3 + 1)
    assert "img" not in page.tags and page.tags.count("script") == 2
    assert not any(name.startswith("data-attacked") for name in page.root)
