"""QA rows as the data sets' own files have them."""

import csv
import json

import pytest

from pact_fast.envs.simulated.world import Passage
from pact_fast.errors import DataError
from pact_fast.synthesis.mtr.qa import QARow, SubQuestion
from pact_fast.synthesis.mtr.readers import read_rows
from tests.support.qa_data import qa_rows

SENTENCES = [["Free Guy", ["Free Guy is a film.", " It is directed by Shawn Levy."]], ["Oslo", ["A city."]]]
FREE_GUY = (Passage("Free Guy", "Free Guy is a film. It is directed by Shawn Levy.", True), Passage("Oslo", "A city."))
HOTPOT = {
    "_id": "5a", "question": "Who directed  Free Guy?", "answer": "Shawn Levy", "type": "bridge", "level": "hard",
    "supporting_facts": [["Free Guy", 1]], "context": SENTENCES,
}  # fmt: skip
WIKI = {**HOTPOT, "type": "compositional", "evidences": [["Free Guy", "director", "Shawn Levy"]], "answer_id": "Q1"}
MUSIQUE = {
    "id": "2hop__1_2", "question": "Who directed Free Guy?", "answer": "Shawn Levy", "answer_aliases": ["Levy"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Free Guy", "paragraph_text": "A film by Levy.", "is_supporting": True},
        {"idx": 1, "title": "Oslo", "paragraph_text": "A city.", "is_supporting": False},
    ],
    "question_decomposition": [{"id": 1, "question": "Free Guy >> director", "answer": "Shawn Levy"}],
}  # fmt: skip
FLASH = {"id": "dev_0", "question": "Who directed Free Guy?", "golden_answers": ["Shawn Levy", "Levy"],
         "metadata": {"type": "bridge", "supporting_facts": {"title": ["Free Guy"], "sent_id": [1]},
                      "context": {"title": ["Free Guy", "Oslo"], "sentences": [SENTENCES[0][1], ["A city."]]}}}  # fmt: skip


def read(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return list(read_rows(path))


def test_hotpotqa_and_2wiki_arrays(tmp_path):
    (hotpot,) = read(tmp_path, [HOTPOT], "hotpot_dev_distractor_v1.json")
    assert hotpot == QARow("5a", "Who directed Free Guy?", ("Shawn Levy",), FREE_GUY, type="bridge")
    (wiki,) = read(tmp_path, [WIKI], "dev.json")
    assert wiki.triples == (("Free Guy", "director", "Shawn Levy"),) and wiki.type == "compositional"


def test_musique_lines_without_the_unanswerable_rows(tmp_path):
    (row,) = read(tmp_path, [MUSIQUE, {**MUSIQUE, "id": "x", "answerable": False}])
    assert row.answers == ("Shawn Levy", "Levy") and row.passages[0].supporting and not row.passages[1].supporting
    assert row.decomposition == (SubQuestion("Free Guy >> director", "Shawn Levy"),)


def test_flashrag_keeps_the_columns_of_the_data_set_under_metadata(tmp_path):
    (row,) = read(tmp_path, [FLASH])
    assert row == QARow("dev_0", "Who directed Free Guy?", ("Shawn Levy", "Levy"), FREE_GUY, type="bridge")


def test_bamboogle_as_csv(tmp_path):
    with (tmp_path / "bamboogle.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Question", "Answer"], ["Who, or what?", "x, y"]])
    (row,) = read_rows(tmp_path / "bamboogle.csv")
    assert row == QARow("bamboogle-0", "Who, or what?", ("x, y",))


def test_a_row_written_in_our_columns_is_read_back(tmp_path):
    rows = [*read(tmp_path, [WIKI], "a.json"), *read(tmp_path, [MUSIQUE])]
    assert read(tmp_path, [row.to_json() for row in rows]) == rows


@pytest.mark.parametrize(
    "change, field, problem",
    [
        ({"question": " "}, "question", "non-empty text"),
        ({"answer": None}, "answer", "no answer"),
        ({"answer": {"x": 1}}, "answer", "found an object"),
        ({"context": [["Free Guy"]]}, "context", "title"),
        ({"context": [["Free Guy", 3]]}, "context", "no sentences"),
        ({"evidences": [["a", "b"]]}, "evidences", "subject, relation, object"),
        ({"question_decomposition": [{"question": "x"}]}, "question_decomposition", "'answer'"),
        ({"_id": []}, "id", "text or an integer"),
    ],
)
def test_a_wrong_row_is_an_error_with_file_line_and_field(tmp_path, change, field, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(MUSIQUE) + "\n" + json.dumps({**WIKI, **change}) + "\n")
    with pytest.raises(DataError, match=problem) as error:
        list(read_rows(path))
    assert (error.value.line, error.value.field) == (2, field) and str(path) in str(error.value)
    errors: list[DataError] = []
    assert len(list(read_rows(path, errors.append))) == 1 and len(errors) == 1


def test_ids_are_unique(tmp_path):
    with pytest.raises(DataError, match="earlier row"):
        read(tmp_path, [MUSIQUE, MUSIQUE])


@pytest.mark.parametrize(
    "name, count",
    [
        ("bamboogle", 125),
        ("hotpotqa_dev_passages", 156),
        ("musique_dev_passages", 86),
        ("2wikimultihopqa_dev_passages", 164),
    ],
)
def test_real_rows_are_read_whole(name, count):
    rows = qa_rows(name)
    assert len(rows) == count and all(row.answers for row in rows)
    assert all(row.passages for row in rows) == (name != "bamboogle")
    assert all(any(p.supporting for p in row.passages) for row in rows) or name == "bamboogle"
