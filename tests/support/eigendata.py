"""Deliberately broken generators of tasks, and an independent replay of controls that shares no code with the package.

`python -m tests.support.eigendata FOLDER` replays every task that `pact-fast data eigendata helpdesk -o FOLDER` wrote.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from pact_fast.envs.domain import Checker, Domain, Instance, Step
from pact_fast.envs.domain.base import make_domain
from pact_fast.synthesis.eigendata.compose import RulesSynthesizer, seed_of, with_id
from pact_fast.synthesis.eigendata.planner import RulesPlanner
from pact_fast.synthesis.eigendata.roles import TaskPlan
from pact_fast.synthesis.eigendata.versions import START, Version

VERSION = Version.read(START)


def helpdesk() -> Domain:
    return make_domain("helpdesk")


def plans(domain: Domain, count: int, version: Version = VERSION) -> list[TaskPlan]:
    made: list[TaskPlan] = []
    for number in range(count):
        plan = RulesPlanner().plan(domain, made, version, random.Random(number))
        assert plan
        made.append(plan)
    return made


def instances(domain: Domain, count: int, seed: int = 0, *, issues: int = 1) -> list[Instance]:
    """Sound tasks with at least `issues` issues each."""
    wanted = [plan for plan in plans(domain, 64) if len(plan.issues) >= issues]
    found = []
    for number in range(count):
        rng = random.Random(seed_of(seed, number))
        plan = wanted[number % len(wanted)]
        made = RulesSynthesizer().synthesize(domain, plan, rng.choice(domain.subjects()), VERSION, rng)
        assert made
        found.append(made)
    return found


# -- broken generators: each turns a sound task into one with one defect; None where the task cannot have it ---------------


def writes(domain: Domain, instance: Instance) -> list[int]:
    """Positions of the gold calls that change the state."""
    state, found = OwnWorld(domain, instance), []
    for index, step in enumerate(instance.gold):
        before = state.dump()
        state.act(step)
        if state.dump() != before:
            found.append(index)
    return found


def wrong_gold(domain: Domain, instance: Instance, rng: random.Random) -> Instance | None:
    """A write of the gold solution is missing."""
    positions = [i for i in writes(domain, instance) if instance.checker.assertions]
    if not positions:
        return None
    gone = rng.choice(positions)
    gold = (*instance.gold[:gone], *instance.gold[gone + 1 :])
    return with_id(replace(instance, gold=gold))


def vacuous_checker(domain: Domain, instance: Instance, rng: random.Random) -> Instance:
    """The checker demands nothing."""
    return with_id(replace(instance, checker=Checker(compare=False)))


def leaking_user(domain: Domain, instance: Instance, rng: random.Random) -> Instance:
    """The user says what the agent has to find."""
    secret = rng.choice(instance.user.secrets)
    opening = f"{instance.user.opening} I think that it is {secret}."
    return with_id(replace(instance, user=replace(instance.user, opening=opening)))


def unsolvable(domain: Domain, instance: Instance, rng: random.Random) -> Instance | None:
    """A gold call is refused: it names something that does not exist, as a model would invent."""
    positions = [i for i, step in enumerate(instance.gold) if step.by == "agent" and i >= 2]
    if not positions:
        return None
    index = rng.choice(positions)
    step = instance.gold[index]
    name = next(name for name in step.arguments if name.endswith("_id"))
    invented = Step(step.name, {**step.arguments, name: f"X{rng.randint(1, 99)}"}, step.by)
    return with_id(replace(instance, gold=(*instance.gold[:index], invented, *instance.gold[index + 1 :])))


def order_sensitive_checker(domain: Domain, instance: Instance, rng: random.Random) -> Instance | None:
    """The checker compares the journal, too, which lists the actions in their order."""
    made = {instance.gold[i].name for i in writes(domain, instance) if instance.gold[i].by == "agent"}
    if len(made - {"resume_line"}) < 2:  # resuming depends on paying; two others never depend on each other
        return None
    return with_id(replace(instance, checker=replace(instance.checker, normalise=())))


class RandomKeys(type(helpdesk())):  # type: ignore[misc]
    """A helpdesk whose refunds and cancellations leave a reference that cannot be known before."""

    agent_tools = tuple(type(helpdesk()).agent_tools)

    def __init__(self) -> None:
        super().__init__()
        for name in list(self.agent):
            if name.startswith(("cancel", "refund", "change", "add", "take", "set", "unlock", "send")):
                self.agent[name] = _with_reference(self.agent[name])


def _with_reference(tool):
    def call(db, **arguments):
        text = tool(db, **arguments)
        table = "orders" if "order_id" in arguments else "accounts" if "account_id" in arguments else "lines"
        db[table][next(v for k, v in arguments.items() if k.endswith("_id"))]["reference"] = uuid.uuid4().hex
        return text

    return call


# -- a second implementation of the controls ---------------------------------------------------------------------------


class OwnWorld:
    """An episode on plain copies of the tables, reduced to the records of the subject and of a few others."""

    def __init__(self, domain: Domain, instance: Instance):
        self.domain, self.instance = domain, instance
        shown = [instance.subject, *list(domain.base["accounts"])[:3]]
        keys = {*shown, *(domain.base["accounts"][k]["line"] for k in shown)}
        keys |= {order for k in shown for order in domain.base["accounts"][k]["orders"]}
        self.tables = _Tables(
            {name: {k: copy.deepcopy(r) for k, r in table.items() if k in keys} for name, table in domain.base.items()}
        )
        for edit in instance.init:
            self.tables[edit.table][edit.key][edit.field] = edit.value

    def act(self, step: Step) -> bool:
        tools = self.domain.agent_tools if step.by == "agent" else self.domain.user_tools
        function = next(tool for tool in tools if tool.__name__ == step.name)
        device = {} if step.by == "agent" else {"device": self.instance.user.device}
        before = copy.deepcopy(dict(self.tables))
        try:
            function(self.tables, **device, **step.arguments)
        except Exception:
            self.tables = _Tables(before)
            return False
        return True

    def dump(self) -> str:
        return json.dumps(self.tables, sort_keys=True)

    def without_bookkeeping(self) -> dict[str, Any]:
        tables = copy.deepcopy(dict(self.tables))
        for rule in self.instance.checker.normalise:
            assert rule.how == "ignore"
            if rule.field is None:
                tables[rule.table] = {}
            else:
                for record in tables[rule.table].values():
                    record.pop(rule.field, None)
        return tables

    def passes(self, gold: OwnWorld, said: str) -> bool:
        checker = self.instance.checker
        if checker.compare and self.without_bookkeeping() != gold.without_bookkeeping():
            return False
        for item in checker.assertions:
            function = next(p for p in self.domain.predicates if p.__name__ == item.predicate)
            if function(self.tables, **item.arguments) != item.equals:
                return False
        return all(re.search(rf"\b{re.escape(text)}\b", said) for text in checker.say)


class _Tables(dict):
    """Plain tables with the few methods of a Database that the tools use."""

    def __init__(self, tables: dict[str, dict[str, dict[str, Any]]]):
        super().__init__({name: _Table(table) for name, table in tables.items()})

    def new_key(self, table: str, prefix: str) -> str:
        return f"{prefix}{len(self[table]) + 1}"


class _Table(dict):
    def peek(self, key: str) -> dict[str, Any]:
        return copy.deepcopy(self[key])

    def find(self, **fields: Any) -> list[str]:
        return [key for key, record in self.items() if all(record[name] == value for name, value in fields.items())]


def after(domain: Domain, instance: Instance, steps: list[Step]) -> OwnWorld:
    world = OwnWorld(domain, instance)
    for step in steps:
        world.act(step)
    return world


def failing_controls(domain: Domain, instance: Instance) -> list[str]:
    """Names of controls that do not hold, by this file's own replay."""
    gold_world, problems = OwnWorld(domain, instance), []
    if not all(gold_world.act(step) for step in instance.gold):
        problems.append("gold raises")
    if after(domain, instance, list(instance.gold)).dump() != gold_world.dump():
        problems.append("not repeatable")
    told = " and ".join(instance.checker.say)
    if not gold_world.passes(gold_world, told):
        problems.append("gold fails")
    changing = [instance.gold[i] for i in writes(domain, instance)]
    if after(domain, instance, []).passes(gold_world, ""):
        problems.append("nothing passes")
    if instance.checker.say and gold_world.passes(gold_world, ""):
        problems.append("silence passes")
    for index in range(len(changing)):
        if after(domain, instance, changing[:index] + changing[index + 1 :]).passes(gold_world, told):
            problems.append(f"without {changing[index].name} passes")
        if after(domain, instance, changing[:index]).passes(gold_world, told):
            problems.append(f"prefix of {index} passes")
    agent_only = [step for step in changing if step.by == "agent"]
    user_only = [step for step in changing if step.by == "user"]
    last = [step for step in user_only if step.name == "restart_phone"]
    # repairs on the phone itself do not depend on those of the desk, but for the restart, which comes last
    other = [*(step for step in user_only if step not in last), *agent_only, *last]
    if not after(domain, instance, other).passes(gold_world, told):
        problems.append("another order fails")
    words = f"{instance.user.opening} {instance.user.goal} {' '.join(instance.user.knows.values())}"
    for hidden in (
        instance.subject,
        instance.user.device,
        *instance.checker.say,
        *re.findall(r"R\d{5}", str(instance.gold)),
    ):
        if hidden and re.search(rf"\b{re.escape(hidden)}\b", words):
            problems.append(f"leaks {hidden}")
    return problems


def confirm(folder: Path) -> int:
    """Replay all tasks of a folder, and print violations. Returns the number of tasks with problems."""
    domain, wrong, count = helpdesk(), 0, 0
    for file in ("train.jsonl", "held_out.jsonl"):
        for line in (folder / file).read_text(encoding="utf-8").splitlines():
            instance = Instance.from_json(json.loads(line)["env_args"])
            problems = failing_controls(domain, instance)
            wrong, count = wrong + bool(problems), count + 1
            for problem in problems:
                print(f"{instance.id}: {problem}", flush=True)
            if count % 100 == 0:
                print(f"{count} replayed, {wrong} with problems", flush=True)
    print(f"{count} replayed, {wrong} with problems")
    return wrong


if __name__ == "__main__":
    sys.exit(confirm(Path(sys.argv[1])) > 0)
