from __future__ import annotations

import random
import time

import pytest

from pact_fast.chat.segments import prefix_ends, reasoning_level_at, segments, sft_lambda
from pact_fast.data.types import ToolCall

WEATHER = ToolCall("get_weather", {"city": "Paris", "days": 3})
SEARCH = ToolCall("search", {"query": "tallest tower"})


def safe_segments(text: str, calls: list[ToolCall]) -> int:
    """Number of segments in the longest safe prefix."""
    end = prefix_ends(text, calls)[-1]
    return sum(stop <= end for _, stop in segments(text))


def cut(text: str) -> list[str]:
    return [text[a:b] for a, b in segments(text)]


@pytest.mark.parametrize(
    "parts",
    [
        ["One. ", "Two! ", "Three? ", "Four"],
        ["One.\n", "Two\n", "- three\n", "- four"],
        ["Steps:\n", "1. Call it.\n", "2. Read it. ", "Then stop."],
        ["Para one.\n\n", "Para two."],
        ["It costs 3.14 euros. ", "That is 1,000.50 in all."],
        ["See https://a.org/x.html?q=1.5. ", "Then go."],
        ["See https://a.org/x. now and then.\n", "Go."],
        ["Use e.g. Paris, i.e. the city. ", "Dr. Who and J. R. Tolkien know it."],
        ["approx. ten, etc. and so on. ", "Next."],
        ["Version 2.0 is out. ", "The file a.py. is odd."],
        ['I send {"a": "One. Two. Three."} and\n', "wait."],
        ["A list [1. x\n2. y] of things. ", "Done."],
        ["Run `a. b. c.` now. ", "Done."],
        ["Code:\n", "```\nx = 1. \ny = 2. \n```\n", "Done."],
        ['He said "Stop." ', "Then (we left.) ", "End."],
        ["Wait... ", "Really?! ", "Yes."],
        ["你好。", "再见！", "好"],
        ["中文。 ", "English. ", "完"],
        ["Open { brace. ", "Still cut."],
    ],
)
def test_segments_are_sentences_lines_and_items(parts):
    assert cut("".join(parts)) == parts


@pytest.mark.parametrize("text", ["", " ", "\n\n", "x", " x. ", "\n\nx.\n\n", "...", "\u3002\u3002"])
def test_segments_tile_any_text(text):
    assert "".join(cut(text)) == text


def test_segments_tile_random_text_and_hold_something():
    rng = random.Random(3)
    alphabet = [*"ab .!?\n`{}[]\"'()。-1", "e.g.", "http://x.y/z.", "```"]
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 40)))
        parts = cut(text)
        assert "".join(parts) == text
        assert all(part.strip() for part in parts[:-1])


@pytest.mark.timing
@pytest.mark.parametrize(
    "unit", ["a. ", "{", "[", "`", "http://", "http://)", "\n", ". ", "...", "A.", "{}", "get_weather ", "city=", "。"]
)
def test_long_text_takes_linear_time(unit):
    text = unit * (100_000 // len(unit))
    begin = time.process_time()
    prefix_ends(text, [WEATHER, SEARCH])
    assert time.process_time() - begin < 1.5


@pytest.mark.parametrize(
    ("text", "call", "safe"),
    [
        (
            "I need the weather. It is in Paris. Now act.",
            WEATHER,
            3,
        ),  # naming what the question names gives nothing away
        ("First think. Then get_weather helps. Go.", WEATHER, 1),
        ("The tool `get_weather` helps.", WEATHER, 0),
        ("Not forget_weathers. Fine.", WEATHER, 2),
        ("I search for it. Then I read.", SEARCH, 2),  # an ordinary word
        ("Hm. I use the search tool.", SEARCH, 1),
        ("Hm. I call search now.", SEARCH, 1),
        ("Hm. It is search(query).", SEARCH, 1),
        ('Hm. It is "search" here.', SEARCH, 1),
        ("Research tool is no match. Ok.", SEARCH, 2),
        ("Hm. With city=Paris it works.", WEATHER, 1),
        ('Hm. With "city": "Paris" it works.', WEATHER, 1),
        ("Hm. Set days = 3 now.", WEATHER, 1),
        ("The city is Paris. Good. City: Rome.", WEATHER, 3),
        ('Hm. So {"name": "x"} then.', WEATHER, 1),
        ('Hm. So {"city": "Rome"} then.', WEATHER, 1),
        ('Hm. So {"other": "Rome"} then.', WEATHER, 2),
        ("Hm. <tool_call> comes. End.", WEATHER, 1),
        ("", WEATHER, 0),
    ],
)
def test_safe_prefix_stops_before_the_call_is_given_away(text, call, safe):
    assert safe_segments(text, [call]) == safe


def test_any_of_several_calls_ends_the_safe_prefix():
    text = "One. Two get_weather. Three call search."
    assert safe_segments(text, [SEARCH]) == 2
    assert safe_segments(text, [SEARCH, WEATHER]) == 1
    assert safe_segments(text, []) == 3


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, [0] * 5), (1, [0, 1, 1, 1, 1]), (2, [0, 1, 1, 2, 2]), (4, [0, 1, 2, 3, 4]), (7, [0, 2, 4, 6, 7])],
)
def test_levels_split_the_safe_segments_evenly(count, expected):
    text = "Yes. " * count + "So get_weather. And more."
    assert prefix_ends(text, [WEATHER]) == [5 * n for n in expected]


def test_level_falls_linearly_and_stays():
    assert [reasoning_level_at(s, 8, 4, 0) for s in range(11)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0]
    assert [reasoning_level_at(s, 4, 0, 4) for s in range(6)] == [0, 1, 2, 3, 4, 4]
    assert reasoning_level_at(0, 1, 3, 3) == 3


def test_lambda_is_the_methods():
    assert [sft_lambda(s, 10, 0.8, 0.2) for s in (0, 5, 10, 99)] == pytest.approx([0.8, 0.5, 0.2, 0.2])
