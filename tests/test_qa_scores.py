"""Exact match and F1 of the multi-hop question-answering sets: by hand, and against another implementation on their rows."""

import json
import os
import random
from pathlib import Path

import pytest

from pact_fast.rewards.qa import normalize_answer, qa_exact_match, qa_f1, qa_scores

SETS = ["hotpotqa", "2wikimultihopqa", "musique", "bamboogle"]
# copied from string.punctuation's definition, so that the oracle shares nothing with the code
ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Beatles", "beatles"),
        ("  An  apple, a day.", "apple day"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),  # nothing takes the place of a character that is dropped
        ("Theatre of Athens", "theatre of athens"),
        ("Beyoncé’s “Halo”", "beyoncé’s “halo”"),  # other punctuation and accents stay
        ("l’a b", "l’ b"),  # a word is what \b says
        ("the", ""),
        ("", ""),
        ("ÀÉ", "àé"),
        ("3,776 m", "3776 m"),
    ],
)
def test_the_normal_form(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("got", "want", "hotpot", "musique"),
    [
        ("yes", "yes", 1, 1),
        ("yes", "no", 0, 0),
        ("yes it is", "yes", 0, 0.5),  # HotpotQA's rule for closed answers, which MuSiQue does not have
        ("no", "no man", 0, 2 / 3),
        ("noanswer", "noanswer please", 0, 2 / 3),
        ("Yes.", "yes", 1, 1),
        ("", "", 0, 1),
        ("the", "a", 0, 1),
        ("", "x", 0, 0),
        ("New York City", "New York", 0.8, 0.8),
        ("la la land", "la land", 0.8, 0.8),  # words count as often as they occur in both
        ("x", "y", 0, 0),
    ],
)
def test_f1_by_hand(got, want, hotpot, musique):
    for name, expected in zip(SETS, (hotpot, hotpot, musique, musique), strict=True):
        assert qa_f1(got, [want], name) == pytest.approx(expected), name
        assert qa_f1(want, [got], name) == pytest.approx(expected), name


def test_the_best_accepted_answer_counts_for_each_score_apart():
    assert qa_exact_match("Big Apple", ["New York", "the Big Apple"])
    assert qa_f1("Big Apple pie", ["New York", "Big Apple"], "musique") == pytest.approx(0.8)
    assert qa_scores("no", ["yes", "no"], "hotpotqa") == {"em": 1.0, "f1": 1.0}
    assert qa_scores(None, [""], "musique") == {"em": 0.0, "f1": 0.0}
    assert qa_scores("x", [], "musique") == {"em": 0.0, "f1": 0.0}


# another implementation: character by character, without regular expressions and counters


def oracle_words(text):
    kept = "".join(c for c in text.lower() if c not in ASCII_PUNCTUATION)
    out, word = [], ""
    for c in kept + "\0":
        if c.isalnum() or c == "_":
            word += c
        else:
            out.append(" " if word in ("a", "an", "the") else word)
            out.append(c)
            word = ""
    return "".join(out)[:-1].split()


def oracle(prediction, answers, name):
    """(exact match, F1), the sums of precision and recall written out as in the sets' programs."""
    em = f1 = 0.0
    got = oracle_words(prediction)
    for answer in answers:
        want = oracle_words(answer)
        em = max(em, 1.0 if got == want else 0.0)
        left, common = list(want), 0
        for word in got:
            if word in left:
                left.remove(word)
                common += 1
        if name in ("musique", "bamboogle") and (not got or not want):
            one = 1.0 if got == want else 0.0
        elif common == 0:
            one = 0.0
        else:
            precision, recall = common / len(got), common / len(want)
            one = 2 * precision * recall / (precision + recall)
        closed = [["yes"], ["no"], ["noanswer"]]
        if name in ("hotpotqa", "2wikimultihopqa") and got != want and (got in closed or want in closed):
            one = 0.0
        f1 = max(f1, one)
    return em, f1


def mutations(rng, answer, others):
    """Predictions near an accepted answer, and far from it."""
    words = answer.split()
    yield answer
    yield f"  The {answer.upper()}, "
    yield f"“{answer}”"
    yield " ".join(words[: rng.randint(0, len(words))])
    yield " ".join(rng.sample(words, len(words)))
    yield answer + " " + rng.choice(others)
    yield "".join(c for c in answer if rng.random() > 0.1)
    yield answer.replace(" ", rng.choice(["-", "_", "\u00a0", "\n", " a ", " – "]))
    yield rng.choice(others)
    yield rng.choice(["yes", "no", "noanswer", "Yes.", "no, the", "", "a", "the answer is " + answer])


@pytest.mark.slow
def test_scores_equal_those_of_another_implementation_on_the_rows_of_the_sets():
    if "PACT_TEST_DATA" not in os.environ:
        pytest.skip("set PACT_TEST_DATA to a folder with qa/*.jsonl")
    folder, rng, pairs, partial = Path(os.environ["PACT_TEST_DATA"]) / "qa", random.Random(0), 0, 0
    for name in SETS:
        files = sorted(folder.glob(f"{name}*.jsonl"))
        assert files
        rows = [json.loads(line)["answers"] for file in files for line in file.read_text("utf-8").splitlines()]
        others = [answers[0] for answers in rows]
        for answers in rows:
            for answer in answers[:2]:
                for prediction in mutations(rng, answer, others):
                    em, f1 = oracle(prediction, answers, name)
                    assert qa_exact_match(prediction, answers) == em, (prediction, answers)
                    assert qa_f1(prediction, answers, name) == pytest.approx(f1, abs=1e-12), (prediction, answers)
                    pairs, partial = pairs + 1, partial + (0 < f1 < 1)
    assert pairs > 10_000 and partial > 2_000
