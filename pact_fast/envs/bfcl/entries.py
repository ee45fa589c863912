"""The tasks of BFCL v4, read from the data files of the installed package; its own code is not imported for that."""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_fast.data.types import Message
from pact_fast.errors import PactError
from pact_fast.registry import did_you_mean

INSTALL = "pip install --no-deps bfcl-eval"
VERSION = "BFCL_v4"
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
NON_LIVE = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = (
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
    *("live_irrelevance", "live_relevance"),
)
CATEGORIES = (*MULTI_TURN, *NON_LIVE, *LIVE)
UNANSWERED = ("irrelevance", "live_irrelevance", "live_relevance")  # nothing to compare with: a call or none
_MEMORY = (
    "its tasks ask for what the policy itself wrote into a memory during earlier episodes; episodes here share nothing"
)
_WEB = "it needs the network and a paid search service"
_OTHER = "its calls are in another language than Python"
REFUSED = {
    "memory_kv": _MEMORY, "memory_vector": _MEMORY, "memory_rec_sum": _MEMORY, "web_search_base": _WEB,
    "web_search_no_snippet": _WEB, "simple_java": _OTHER, "simple_javascript": _OTHER,
    "format_sensitivity": "it repeats single-turn tasks under 26 prompts and enters no score",
}  # fmt: skip
DOCUMENTS = {
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TwitterAPI": "posting_api", "TicketAPI": "ticket_api", "TradingBot": "trading_bot", "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}  # fmt: skip
Function = dict[str, Any]  # a function document of the benchmark: name, description, parameters


@dataclass(frozen=True)
class Entry:
    """One task. Nothing in it may be changed: entries are shared.

    id         as in the benchmark
    category   see CATEGORIES
    question   the messages of every user turn; empty where functions are added instead
    functions  that are offered from the start
    late       user turn → functions that are offered from then on (miss_func)
    truth      multi-turn: per user turn, its calls as text; single-turn: per call, {name: {argument: accepted values}}
    classes    API classes of a multi-turn task, in order
    config     their initial state
    """

    id: str
    category: str
    question: list[list[Message]]
    functions: list[Function]
    truth: list[Any] = field(default_factory=list)
    late: dict[int, list[Function]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def multi_turn(self) -> bool:
        return self.category in MULTI_TURN

    @property
    def long_context(self) -> bool:
        return self.category == "multi_turn_long_context"


@functools.cache
def entries(category: str) -> dict[str, Entry]:
    """{id: task} of a category, in the benchmark's order.

    Raises:
        PactError: The category is unknown or refused, or the package or its data is missing.
    """
    if category in REFUSED:
        raise PactError(f"the BFCL category {category} cannot be run: {REFUSED[category]}")
    if category not in CATEGORIES:
        hint = did_you_mean(category, list(CATEGORIES))
        raise PactError(f"unknown BFCL category '{category}'{hint}; there are: {', '.join(CATEGORIES)}")
    data = data_folder()
    rows = _read(data / f"{VERSION}_{category}.json")
    answers: dict[str, Any] = {}
    if category not in UNANSWERED:
        found = _read(data / "possible_answer" / f"{VERSION}_{category}.json")
        answers = {row["id"]: row["ground_truth"] for row in found}
    make = _multi_turn if category in MULTI_TURN else _single_turn
    return {row["id"]: make(row, category, answers.get(row["id"], [])) for row in rows}


def entry(task_id: str) -> Entry:
    """The task with an id. PactError if there is none."""
    category = category_of(task_id)
    known = entries(category)
    if task_id not in known:
        raise PactError(f"BFCL {category} has no task '{task_id}'")
    return known[task_id]


def category_of(task_id: str) -> str:
    """`multi_turn_base` of `multi_turn_base_12`, `live_simple` of `live_simple_19-3-15`."""
    return task_id.rpartition("_")[0]


def data_folder() -> Path:
    """The data of the installed package. PactError if it is not installed."""
    found = importlib.util.find_spec("bfcl_eval")
    if found is None or not found.submodule_search_locations:
        raise PactError(f"BFCL needs the package bfcl-eval, which carries its tasks: {INSTALL}")
    return Path(found.submodule_search_locations[0]) / "data"


def _multi_turn(row: dict[str, Any], category: str, truth: list[Any]) -> Entry:
    functions = [document for name in row["involved_classes"] for document in documents(name)]
    late: dict[int, list[Function]] = {}
    for turn, names in row.get("missed_function", {}).items():
        held_back = []
        for name in names:  # the first document of the name, as in the official loader
            index = next((i for i, function in enumerate(functions) if function["name"] == name), None)
            if index is not None:
                held_back.append(functions.pop(index))
        late[int(turn)] = held_back
    return Entry(
        row["id"],
        category,
        row["question"],
        functions,
        truth,
        late,
        tuple(row["involved_classes"]),
        row["initial_config"],
    )


def _single_turn(row: dict[str, Any], category: str, truth: list[Any]) -> Entry:
    return Entry(row["id"], category, row["question"], row["function"], truth)


@functools.cache
def documents(class_name: str) -> tuple[Function, ...]:
    """The function documents of an API class."""
    return tuple(_read(data_folder() / "multi_turn_func_doc" / f"{DOCUMENTS[class_name]}.json"))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise PactError(f"{path}: {error.strerror}; install BFCL v4 again: {INSTALL}") from None
    except ValueError as error:
        raise PactError(f"{path}: not JSON lines ({error}); install BFCL v4 again: {INSTALL}") from None
