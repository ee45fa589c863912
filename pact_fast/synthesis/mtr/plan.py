"""The plan of a question: which look-ups answer it, in which order. From MuSiQue's decompositions or 2Wiki's triples.

Arguments are worded as the question words them, so that the policy can know them: "Free Guy" and not "Free Guy (film)".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pact_fast.envs.simulated.world import Fact, same_text
from pact_fast.rewards.qa import normalize_answer
from pact_fast.rewards.trace import holds
from pact_fast.synthesis.mtr.mentions import capitalised, mention, shared_span
from pact_fast.synthesis.mtr.names import tool_name
from pact_fast.synthesis.mtr.qa import QARow, SubQuestion, Triple

REFERENCE = re.compile(r"#(\d+)")
RELATION = re.compile(r"\s*>>\s*")  # of MuSiQue's sub-questions that are triples: "Bubye River >> country"
SAME_NAME = 0.4  # least overlap of two spellings of a name
# First words of relations that are not nouns: "shares border with"
_VERBS = re.compile(
    r"(?:applies|contains|educated|follow\w*|has|headquarters|is|located|made|named|owned|part|present|shares|was)\b"
)


@dataclass(frozen=True)
class Hop:
    """One look-up.

    relation     name of the relation, which is also that of its tool, without "get_"
    description  description of the tool's result
    arguments    by parameter, as the question or an earlier value words them; empty: there is no entity to look up, so the
                 passages are searched
    values       results of the look-up
    goal         goal of the look-up, for the reasoning: "the director of Free Guy", or a question that ends with "?"
    depth        0 if it needs the question alone, else 1 + the depth of the hops it needs
    """

    relation: str
    description: str
    arguments: dict[str, str]
    values: tuple[str, ...]
    goal: str
    depth: int

    @property
    def fact(self) -> Fact:
        return Fact(self.relation, self.arguments, self.values)


@dataclass(frozen=True)
class LookupPlan:
    """The look-ups of a question, and how their values give the answer.

    task_class  bridge, comparison, bridge_comparison, inference or composition
    hops        in order
    entities    comparison: the two that are compared, as the question words them; else empty
    other       facts beyond those that the question needs
    """

    task_class: str
    hops: tuple[Hop, ...] = ()
    entities: tuple[str, ...] = ()
    other: tuple[Hop, ...] = field(default=())

    def by_depth(self) -> list[list[Hop]]:
        """Hops that can be made in the same turn."""
        depths = sorted({hop.depth for hop in self.hops})
        return [[hop for hop in self.hops if hop.depth == depth] for depth in depths]

    def roots(self) -> list[tuple[str, tuple[Hop, ...]]]:
        """(entity of the question, the chain of hops that begins with it), for comparisons."""
        chains: list[tuple[str, list[Hop]]] = []
        for hop in self.hops:
            start = next(iter(hop.arguments.values()), "")
            chain = next((c for c in chains if hop.depth and any(start in h.values for h in c[1])), None)
            chain = chain or next((c for c in chains if not hop.depth and c[0] == start), None)
            if chain is None:
                chains.append((start, [hop]))
            else:
                chain[1].append(hop)
        return [(entity, tuple(hops)) for entity, hops in chains]


def classify(row: QARow) -> str:
    """The class of a task: that of its data set, else from its decomposition, else from the words of its question."""
    if row.type in ("comparison", "bridge_comparison", "inference", "bridge"):
        return row.type
    if row.type == "compositional" or row.decomposition:
        return "composition"
    words = f" {row.question.lower()} "
    if re.search(r"\bboth\b|\bsame\b|\b(?:which|who|what|was|is|are)\b.* or ", words):
        return "comparison"
    return "bridge"


def make_plan(row: QARow) -> LookupPlan:
    """The plan of a row. Without decomposition and triples it has no hops."""
    task_class = classify(row)
    if row.triples:
        hops = _hops_of_triples(row.triples, row.question)
        other = _hops_of_triples(row.other_facts, row.question)
        plan = LookupPlan(task_class, tuple(hops), other=tuple(other))
        if task_class.endswith("comparison"):
            return LookupPlan(task_class, tuple(hops), tuple(entity for entity, _ in plan.roots()), tuple(other))
        return plan
    return LookupPlan(task_class, tuple(_hops_of_decomposition(row.decomposition, row.question)))


def _hops_of_triples(triples: Sequence[Triple], question: str) -> list[Hop]:
    """A hop for every (subject, relation), its values in order; subjects that an earlier triple found are deeper."""
    values: dict[tuple[str, str], list[str]] = {}
    for subject, relation, value in triples:
        values.setdefault((subject, relation), []).append(value)
    depths: dict[str, tuple[int, str]] = {}  # subject -> (depth, wording)
    taken: list[str] = []

    def place(subject: str, pending: tuple[str, ...] = ()) -> tuple[int, str]:
        if subject not in depths:
            exact = holds(question, subject)
            source = None if exact else _source(subject, triples)
            if source is not None and source[0] not in (subject, *pending):
                depths[subject] = place(source[0], (*pending, subject))[0] + 1, source[2]
            else:
                wording = mention(question, subject) or capitalised(question, taken) or subject
                taken.append(wording)
                depths[subject] = 0, wording
        return depths[subject]

    hops = []
    for (subject, relation), found in values.items():
        depth, wording = place(subject)
        goal = f"{_noun(relation)} of {wording}"
        hops.append(Hop(tool_name(relation), described(relation), {"entity": wording}, tuple(found), goal, depth))
    return sorted(hops, key=lambda hop: hop.depth)


def _source(subject: str, triples: Sequence[Triple]) -> Triple | None:
    """The earlier triple whose object is the subject of a later one, perhaps in another spelling."""
    triples = triples[: next(i for i, triple in enumerate(triples) if triple[0] == subject)]
    equal = next((t for t in triples if same_text(t[2], subject)), None)
    within = equal or next((t for t in triples if holds(t[2], subject) or holds(subject, t[2])), None)
    return within or next((t for t in triples if _overlap(t[2], subject) >= SAME_NAME), None)


def _overlap(one: str, other: str) -> float:
    """Words that two names share, as a fraction of all their words: 0.5 for Joe De Grasse and Joseph De Grasse."""
    a, b = (set(normalize_answer(name).split()) for name in (one, other))
    return len(a & b) / len(a | b) if a | b else 0.0


def _hops_of_decomposition(steps: Sequence[SubQuestion], question: str) -> list[Hop]:
    hops: list[Hop] = []
    for step in steps:
        references = [int(n) for n in REFERENCE.findall(step.question) if int(n) <= len(hops)]
        depth = 1 + max((hops[n - 1].depth for n in references), default=-1)
        hops.append(_hop_of_step(step, hops, list(dict.fromkeys(references)), depth, question))
    return hops


def _hop_of_step(step: SubQuestion, before: Sequence[Hop], references: list[int], depth: int, question: str) -> Hop:
    subject, *relation = RELATION.split(step.question, maxsplit=1)
    template, arguments = step.question, dict[str, str]()
    if references:
        for place, n in enumerate(references):
            name = "entity" if place == 0 else f"entity_{place + 1}"
            arguments[name] = before[n - 1].values[0]
            template = template.replace(f"#{n}", f"[{name}]")
    elif (span := mention(question, subject) if relation else shared_span(question, step.question)) is not None:
        arguments["entity"] = span
        template = f"[entity] >> {relation[0]}" if relation else _replace(step.question, span, "[entity]")
    filled = step.question
    for n in references:
        filled = filled.replace(f"#{n}", before[n - 1].values[0])
    if relation and RELATION.split(template)[0].strip() == "[entity]":
        goal = f"{_noun(relation[0])} of {arguments['entity']}"
        return Hop(tool_name(relation[0]), described(relation[0]), arguments, (step.answer,), goal, depth)
    name = tool_name(re.sub(r"\[\w+\]", " ", template))
    return Hop(name, f"Answers: {_as_question(template)}", arguments, (step.answer,), _as_question(filled), depth)


def described(relation: str) -> str:
    """The description of a look-up."""
    return f"{_noun(relation).capitalize() if _noun(relation)[0].isalpha() else _noun(relation)} of an entity."


def _noun(relation: str) -> str:
    """`the director`, or `"shares border with"` for a relation that is not a noun."""
    return f'"{relation}"' if _VERBS.match(relation.lower()) else f"the {relation}"


def _as_question(text: str) -> str:
    """The sub-question, with one question mark at its end."""
    return " ".join(text.replace(">>", ":").split()).rstrip(" ?.") + "?"


def _replace(text: str, span: str, by: str) -> str:
    """The text with the first place that reads like `span` replaced."""
    pattern = r"\W+".join(map(re.escape, re.findall(r"\w+", span)))
    replaced = re.sub(pattern, lambda m: by, text, count=1, flags=re.IGNORECASE) if pattern else text
    return replaced if replaced != text else f"{text} {by}"


def is_yes_no(row: QARow) -> bool:
    """Whether the question is answered by yes or no."""
    return normalize_answer(row.answers[0]) in ("yes", "no")
