"""Reads QA rows as HotpotQA, MuSiQue, 2WikiMultiHopQA, Bamboogle and FlashRAG write them, and in columns of our own."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from pact_fast.data.row_files import add_location, file_rows
from pact_fast.data.rows import read_id, type_name
from pact_fast.envs.simulated.world import Passage
from pact_fast.errors import DataError
from pact_fast.files import OTHER_FILE_CURE, io_errors
from pact_fast.synthesis.mtr.qa import QARow, SubQuestion, Triple
from pact_fast.text import short

Row = dict[str, Any]


def read_rows(path: Path, on_bad_row: Callable[[DataError], None] | None = None) -> Iterator[QARow]:
    """The rows of a file: JSONL, a JSON array, parquet, or CSV with the columns Question and Answer (Bamboogle).

    The columns decide the format, row by row. Rows that MuSiQue marks as unanswerable are left out.

    Args:
        path: The file.
        on_bad_row: Called with the error of a row that cannot be read, which is then left out; None: raise it.

    Raises:
        DataError: The file or a row cannot be read. Names file, line and field.
    """
    ids: set[str] = set()
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else file_rows(path)
    for number, (line, row) in enumerate(rows):
        try:
            with add_location(path, line):
                if isinstance(row, DataError):
                    raise row
                read = _read(row, f"{path.stem}-{number}")
                if read is None:
                    continue
                if read.id in ids:
                    raise DataError(f"{short(read.id)} is also the id of an earlier row; ids are unique", field="id")
        except DataError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
            continue
        ids.add(read.id)
        yield read


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with io_errors(path, OTHER_FILE_CURE):
        text = path.read_bytes().decode("utf-8-sig", "replace")
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 1):
        yield number, {str(key).strip().lower(): value for key, value in row.items() if key is not None}


def _read(row: Row, default_id: str) -> QARow | None:
    """The row; None if it has no answer."""
    if row.get("answerable") is False:
        return None
    row = _flat(row)
    question = _text(row, "question")
    kind = row.get("type")
    return QARow(
        id=read_id(row.get("_id", row.get("id")), default_id),
        question=question,
        answers=_answers(row),
        passages=_passages(row),
        decomposition=_decomposition(row),
        triples=_triples(row, "evidences"),
        other_facts=_triples(row, "other_facts"),
        type=kind if isinstance(kind, str) else "",
    )


def _flat(row: Row) -> Row:
    """FlashRAG keeps all further columns of the data set under `metadata`."""
    metadata = row.get("metadata")
    return {**metadata, **row} if isinstance(metadata, dict) else row


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"must be non-empty text, found {short(value)}", field=name)
    return " ".join(value.split())


ANSWER_COLUMNS = ("answers", "golden_answers", "answer", "answer_aliases")


def _answers(row: Row) -> tuple[str, ...]:
    found: list[str] = []
    for name in ANSWER_COLUMNS:
        value = row.get(name)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(one, bool) or not isinstance(one, str | int | float):
                raise DataError(f"must hold text, found {type_name(one)}", field=name)
            found.append(str(one).strip())
    answers = tuple(dict.fromkeys(filter(None, found)))
    if not answers:
        raise DataError(f"the row has no answer; give one of {', '.join(ANSWER_COLUMNS)}", field="answer")
    return answers


def _passages(row: Row) -> tuple[Passage, ...]:
    """`context` of HotpotQA and 2Wiki, as pairs or as columns; `paragraphs` of MuSiQue; `passages` of our own."""
    titles = _supporting_titles(row.get("supporting_facts"))
    context = row.get("context")
    if isinstance(context, dict):
        sentences = context.get("sentences", context.get("content"))
        context = list(zip(_list(context.get("title"), "context"), _list(sentences, "context"), strict=False))
    if context is not None:
        return tuple(_passage(_pair(one, "context"), titles, "context") for one in _list(context, "context"))
    name = "paragraphs" if row.get("paragraphs") is not None else "passages"
    return tuple(_passage(one, titles, name) for one in _list(row.get(name) or [], name))


def _pair(value: Any, field: str) -> Row:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise DataError(f"must hold [title, [sentence, …]], found {short(value)}", field=field)
    return {"title": value[0], "sentences": value[1]}


def _passage(value: Any, titles: Collection[str], field: str) -> Passage:
    if not isinstance(value, dict) or not isinstance(value.get("title"), str):
        raise DataError(f"must hold passages with a 'title', found {short(value)}", field=field)
    text = next((value[k] for k in ("text", "paragraph_text", "contents") if isinstance(value.get(k), str)), None)
    if text is None:
        sentences = value.get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(one, str) for one in sentences):
            raise DataError(f"{short(value['title'])} has no text and no sentences", field=field)
        text = " ".join(one.strip() for one in sentences)
    marked = value.get("supporting", value.get("is_supporting", value["title"] in titles))
    return Passage(value["title"].strip(), text.strip(), bool(marked))


def _supporting_titles(value: Any) -> set[str]:
    """Titles of the supporting facts: [[title, sentence], …], or columns."""
    if isinstance(value, dict):
        value = value.get("title")
        return {str(title) for title in value} if isinstance(value, list) else set()
    pairs = value if isinstance(value, list) else []
    return {str(pair[0]) for pair in pairs if isinstance(pair, list | tuple) and pair}


def _decomposition(row: Row) -> tuple[SubQuestion, ...]:
    name = "question_decomposition" if row.get("question_decomposition") is not None else "decomposition"
    steps = []
    for step in _list(row.get(name) or [], name):
        if not isinstance(step, dict) or not all(isinstance(step.get(k), str) for k in ("question", "answer")):
            raise DataError(f"must hold steps with 'question' and 'answer', found {short(step)}", field=name)
        steps.append(SubQuestion(" ".join(step["question"].split()), step["answer"].strip()))
    return tuple(steps)


def _triples(row: Row, field: str) -> tuple[Triple, ...]:
    value = row.get(field) or []
    if isinstance(value, dict):  # columns
        value = list(zip(*(_list(value.get(k), field) for k in ("fact", "relation", "entity")), strict=False))
    triples: list[Triple] = []
    for one in _list(value, field):
        parts = list(one.values()) if isinstance(one, dict) else one
        if not isinstance(parts, list | tuple) or len(parts) != 3 or not all(isinstance(p, str) for p in parts):
            raise DataError(f"must hold [subject, relation, object], found {short(one)}", field=field)
        subject, relation, value_ = (" ".join(p.split()) for p in parts)
        triples.append((subject, relation, value_))
    return tuple(dict.fromkeys(triples))


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"must be a list, found {type_name(value)}", field=field)
    return value
