"""Domains of τ²-bench, and how they differ: toolkits, policy, and the state of an episode."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pact_fast.data.types import ToolSchema
from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.arithmetic import calculate
from pact_fast.envs.tau2.tables import EpisodeTable, SharedTable
from pact_fast.errors import PactError

Side = Literal["assistant", "user"]  # who calls a tool: the package's `requestor`
Tools = dict[str, Callable[..., Any]]
DOMAINS = ("airline", "retail", "telecom")
RECORDS = {  # classes of the records of a table
    "airline": {"flights": "Flight", "users": "User", "reservations": "Reservation"},
    "retail": {"products": "Product", "users": "User", "orders": "Order"},
}


class State:
    """The databases of one episode, and the tools that read and write them.

    tools  {side: {name: callable}}: all that may be called, and nothing else
    """

    def __init__(self, tools: dict[Side, Tools]):
        self.tools = tools

    def sync(self) -> None:
        """Bring the two sides' databases in line, as the package does after each call."""

    def run(self, call: dict[str, Any]) -> Any:
        """Run a function that the task's own data names: an initialisation or an assertion."""
        raise NotImplementedError

    def changes(self) -> dict[str, dict[str, str]]:
        """{table: {id: text}} of the records that differ from the shipped database."""
        return {}


@dataclass(frozen=True)
class Domain:
    """One domain of the package.

    name     airline, retail or telecom
    schemas  {side: tools on offer}
    policy   rules that the agent must follow; solo: the policy of an agent that works on a ticket alone
    start    makes the state of an episode, before the task's initialisation
    """

    name: str
    schemas: dict[Side, list[ToolSchema]]
    policy: str
    solo_policy: str
    start: Callable[[], State]


@functools.cache
def domain(name: str) -> Domain:
    """A domain by name, loaded once per process. PactError if it is unknown or the package is missing."""
    if name not in DOMAINS:
        raise PactError(f"tau2 has no domain {name!r}; domains: {', '.join(DOMAINS)}")
    return _telecom() if name == "telecom" else _records(name)


def _text(name: str, *files: str) -> list[str]:
    return [(upstream.folder() / "data/tau2/domains" / name / file).read_text(encoding="utf-8") for file in files]


class RecordState(State):
    """Airline and retail: tables of records, copied on write."""

    def __init__(self, toolkit: Any, database: Any, shared: dict[str, SharedTable]):
        self._tables = {name: EpisodeTable(table) for name, table in shared.items()}
        kit = toolkit(database.model_construct(**self._tables))
        super().__init__({"assistant": _tools(kit), "user": {}})

    def changes(self) -> dict[str, dict[str, str]]:
        return {name: table.changes() for name, table in self._tables.items()}


def _records(name: str) -> Domain:
    module = upstream.load(f"domains.{name}.tools")
    models = upstream.load(f"domains.{name}.data_model")
    toolkit = module.AirlineTools if name == "airline" else module.RetailTools
    database = models.FlightDB if name == "airline" else models.RetailDB
    raw = upstream.read_json(name, "db.json")
    shared = {table: SharedTable(raw[table], getattr(models, record)) for table, record in RECORDS[name].items()}
    schemas: dict[Side, list[ToolSchema]] = {"assistant": upstream.tool_schemas(toolkit), "user": []}
    return Domain(name, schemas, _text(name, "policy.md")[0], "", lambda: RecordState(toolkit, database, shared))


class TelecomState(State):
    """Telecom: two small databases, the operator's and the user's phone, created for each episode."""

    def __init__(self, kit: Any, user_kit: Any, environment: Any):
        self._environment = environment
        super().__init__({"assistant": _tools(kit), "user": _tools(user_kit)})

    def sync(self) -> None:
        self._environment.sync_tools()

    def run(self, call: dict[str, Any]) -> Any:
        kit = self._environment.user_tools if call["env_type"] == "user" else self._environment.tools
        result = getattr(kit, call["func_name"])(**call["arguments"])
        self.sync()
        return result


def _telecom() -> Domain:
    tools, user_tools = upstream.load("domains.telecom.tools"), upstream.load("domains.telecom.user_tools")
    models, phone = upstream.load("domains.telecom.data_model"), upstream.load("domains.telecom.user_data_model")
    make_environment = upstream.load("domains.telecom.environment").TelecomEnvironment
    load_file = upstream.load("utils").load_file
    data = upstream.folder() / "data/tau2/domains/telecom"
    raw, raw_user = load_file(data / "db.toml"), load_file(data / "user_db.toml")
    toolkit = _with_repeatable_ids(tools.TelecomTools)
    excellent = phone.PerformanceLevel.EXCELLENT

    def start() -> State:
        kit = toolkit(models.TelecomDB.model_validate(raw))
        user_kit = user_tools.TelecomUserTools(phone.TelecomUserDB.model_validate(raw_user))
        # the package keeps these in the class, where `break_vpn` of one episode changes them for all later ones
        user_kit.default_vpn_details = user_kit.default_vpn_details.model_copy(update={"server_performance": excellent})
        return TelecomState(kit, user_kit, make_environment("telecom", "", kit, user_kit))

    main, solo, manual = _text("telecom", "main_policy.md", "main_policy_solo.md", "tech_support_manual.md")
    schemas: dict[Side, list[ToolSchema]] = {
        "assistant": upstream.tool_schemas(tools.TelecomTools),
        "user": upstream.tool_schemas(user_tools.TelecomUserTools),
    }
    return Domain("telecom", schemas, _telecom_policy(main, manual), _telecom_policy(solo, manual), start)


def _telecom_policy(main: str, support: str) -> str:
    return f"<main_policy>\n{main}\n</main_policy>\n<tech_support_policy>\n{support}\n</tech_support_policy>"


def _with_repeatable_ids(toolkit: Any) -> Any:
    """The toolkit, whose new bills get the same id whenever the same actions are repeated; the package draws uuid4."""

    class RepeatableTools(toolkit):
        def _apply_one_time_charge(self, customer_id: str, amount: float, description: str) -> None:
            before = len(self.db.bills)
            super()._apply_one_time_charge(customer_id, amount, description)
            if len(self.db.bills) > before:
                customer = self.get_customer_by_id(customer_id)
                bill_id = f"B{zlib.crc32(f'{customer_id}/{len(customer.bill_ids)}'.encode()):08x}"
                self.db.bills[-1].bill_id = customer.bill_ids[-1] = bill_id

    return RepeatableTools


def _tools(kit: Any) -> Tools:
    """The callables that the package marks as tools, with our own `calculate`."""
    tools = dict(kit.tools)
    if "calculate" in tools:
        tools["calculate"] = calculate
    return tools


def solo_schemas(of: Domain) -> list[ToolSchema]:
    """The tools of an agent that works alone: both sides', and `done`."""
    done: ToolSchema = {
        "type": "function",
        "function": {
            "name": "done",
            "description": "Call this function when you are done with the task.",
            "parameters": {"properties": {}, "title": "parameters", "type": "object"},
        },
    }
    return copy.deepcopy([*of.schemas["assistant"], *of.schemas["user"], done])
