"""`pact-fast doctor` and `pact-fast train --dry-run`: checks that find problems before a run does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from math import ceil
from typing import TYPE_CHECKING

import yaml

from pact_fast.cli import versions
from pact_fast.components import Component
from pact_fast.config import Config
from pact_fast.data.types import Task
from pact_fast.errors import PactError
from pact_fast.text import one_line

if TYPE_CHECKING:
    from pact_fast.rollout.engine_check import EngineSmokeTest

PREREQUISITES = ("data", "tokenizer", "logits", "engine", "rollouts")  # if one of these fails, later checks cannot run
EMBEDDED_PARAMETERS = 200_000_000  # beyond these, the embedded engine takes most of a step's time
EMBEDDED_TOKENS = 65_536  # sampled tokens per training step


def doctor(config: Config) -> int:
    """Run all checks and print one line for each: ok, warn or FAIL. Returns 1 if a check failed, else 0."""
    from pact_fast.rollout.registry import engine_builder

    checks = _Checks(config)
    failed = run_checks(checks.all(), checks.warnings)
    if not failed and engine_builder(config).own_weights:  # the smoke test relies on these checks
        with closing(checks.smoke_test()) as smoke_test:
            failed = run_checks(smoke_test.all(), [])
    return 1 if failed else 0


def run_checks(checks: list[tuple[str, Callable[[], str]]], warnings: list[str]) -> int:
    """Run checks and print their results. `warnings`: filled by the checks. Returns the number of failures."""
    failed = 0
    for name, check in checks:
        warnings.clear()
        try:
            _print(f"ok    {name}: {check()}")
        except PactError as error:
            failed += 1
            _print(f"FAIL  {name}: {error}")
            if name in PREREQUISITES:
                break
        for warning in warnings:
            _print(f"warn  {name}: {warning}")
    return failed


def _print(line: str) -> None:
    """Print one line; parts of it come from data and models."""
    print(one_line(line), flush=True)


def embedded_engine_warning(config: Config, parameters: int) -> str | None:
    """Why the embedded engine (the training model, one token per forward pass) is too slow for a run; None if it is not.

    The rule: more than 200 M parameters, or more than 65,536 sampled tokens per step at the length limits.

    Args:
        config: The run's configuration.
        parameters: Elements of the model's parameters.
    """
    from pact_fast.algorithms.registry import make_algorithm
    from pact_fast.rollout.registry import engine_builder

    if engine_builder(config).own_weights or not make_algorithm(config.algorithm).needs_rollouts:
        return None
    rollout = config.rollout
    rollouts = config.trainer.prompts_per_step * ceil(rollout.num_generations * rollout.oversampling_factor)
    tokens = rollouts * min(rollout.max_completion_length, rollout.max_turns * rollout.max_turn_tokens)
    if parameters <= EMBEDDED_PARAMETERS and tokens <= EMBEDDED_TOKENS:
        return None
    return (
        f"the embedded engine is for small models, and this run asks it for up to {tokens:,} sampled tokens per step of a "
        f"model of {parameters / 1e6:,.0f} M parameters (advised: at most {EMBEDDED_TOKENS:,} tokens and "
        f"{EMBEDDED_PARAMETERS / 1e6:.0f} M parameters); set rollout.engine=vllm"
    )


def dry_run(config: Config) -> int:
    """Run the checks, then print the resolved settings. Returns the status of `doctor`."""
    status = doctor(config)
    print("\n" + yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), end="")
    return status


class _Checks:
    """The checks, in an order in which later ones use results of earlier ones. `warnings`: of the check that ran last."""

    def __init__(self, config: Config):
        self.config = config
        self.warnings: list[str] = []
        self.parameters = 0  # of the model

    def all(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("versions", self.versions),
            ("data", self.data),
            ("tokenizer", self.tokenizer),
            ("template", self.template),
            ("rows", self.rows),
            ("masks", self.masks),
            ("environment", self.environment),
            ("model", self.model),
            ("logits", self.logits),
            ("memory", self.memory),
            ("kernels", self.kernels),
        ]

    def versions(self) -> str:
        installed = versions.installed()
        self.warnings += versions.untested(installed)
        return ", ".join(f"{package} {version}" for package, version in installed.items())

    def data(self) -> str:
        from pact_fast.algorithms.registry import make_algorithm
        from pact_fast.envs.registry import make_tasks
        from pact_fast.train.preflight import check_settings, check_tasks

        algorithm = make_algorithm(self.config.algorithm)
        check_settings(self.config, algorithm)
        self.tasks = make_tasks(self.config)
        check_tasks(self.config, algorithm, self.tasks, self.warnings)
        self.sample = self.tasks.train(0, self.config.trainer.prompts_per_step)
        held_out = len(self.tasks.held_out(self.config.trainer.eval_tasks))
        experts = sum(task.expert is not None for task in self.sample)
        return f"{experts} of the first {len(self.sample)} prompts have an expert trace; {held_out} held-out tasks"

    def tokenizer(self) -> str:
        from pact_fast.chat.rendering import make_renderer
        from pact_fast.model.tokenizer import make_tokenizer

        self.tokens = make_tokenizer(self.config.model, self.tasks)
        self.renderer = make_renderer(self.config.model, self.tokens)
        return f"{len(self.tokens)} tokens; tool calls are written as {type(self.renderer.format).__name__}"

    def template(self) -> str:
        from pact_fast.chat.template_check import check_template

        notes = check_template(self.renderer)
        self.warnings += notes
        blanks = " but for blanks" if notes else ""
        return f"parser and template agree; appended turns equal the template's rendering{blanks}"

    def masks(self) -> str:
        task = next((task for task in self.sample if task.expert and task.expert.turns), None)
        if task is None or task.expert is None:
            return "no expert trace among the first prompts"
        context = self.renderer.trace_context(task, task.expert, "turns")
        counts = {component.name.lower(): int((context.components == component).sum()) for component in Component}
        ends = context.components[[int(i) in self.renderer.eot_ids for i in context.ids]]
        if not (ends == Component.TOOL_CALL).any():
            raise PactError("the end-of-turn token after a tool call is not supervised; check the chat template")
        return "tokens of a trace by component: " + ", ".join(
            f"{name} {count}" for name, count in counts.items() if count
        )

    def environment(self) -> str:
        from pact_fast.envs.base import has_user
        from pact_fast.envs.registry import EnvironmentFactory

        make_env = EnvironmentFactory(self.config)
        offered = calls = 0
        needed = False
        failed: list[str] = []
        reports: dict[type, list[str]] = {}
        for task in self.sample[:8]:
            env = make_env(task)
            env.reset(task)
            if type(env) not in reports and hasattr(env, "machine_report"):
                reports[type(env)] = env.machine_report()
            offered += len(env.tools)
            needed = needed or getattr(env, "needs_tools", not has_user(env))
            for call in _expert_calls(task):
                calls += 1
                result = env.call(call.name, call.arguments)
                if result.lower().startswith(("error", '{"error')):
                    failed.append(f"{call.name} of task {task.id}: {result[:200]}")
        if not offered and needed:
            raise PactError("the first tasks offer no tools; a tool-use agent needs the column `tools` in its data")
        if failed and len(failed) == calls:
            raise PactError(
                f"all {calls} expert calls of the first tasks return an error, for example "
                f"{' '.join(failed[0].split())}; correct the tools"
            )
        if failed:
            self.warnings.append(f"{len(failed)} of {calls} expert calls return an error, for example {failed[0]}")
        tasks = min(8, len(self.sample))
        lines = "".join(f"\n      {line}" for report in reports.values() for line in report)
        return f"{offered} tools in the first {tasks} tasks; {calls} expert calls run, {len(failed)} returned an error{lines}"

    def rows(self) -> str:
        """The check of all rows, as training makes it before its first step, or when rows are drawn."""
        from pact_fast.algorithms.registry import make_algorithm
        from pact_fast.data.sources import FileTasks
        from pact_fast.train.check_rows import check_rows, rows_to_check
        from pact_fast.train.progress import Progress

        algorithm, progress = make_algorithm(self.config.algorithm), Progress()
        try:
            count = rows_to_check(self.tasks, self.config, complete=True)
            with progress.rollouts(count, "checking rows") as advance:
                found = check_rows(self.tasks, self.config, self.renderer, algorithm, advance, complete=True)
        finally:
            progress.close()
        if isinstance(self.tasks, FileTasks):
            self.tasks.skip(found.errors)
            self.sample = self.tasks.train(0, self.config.trainer.prompts_per_step)
            skipped = self.tasks.skipped
            if skipped:
                self.warnings.append(f"{len(skipped):,} rows cannot be used and are skipped; the first: {skipped[0]}")
        trace = f"; longest with its expert trace: {found.trace:,} tokens" if found.trace else ""
        return (
            f"{found.rows:,} rows checked; longest prompt: {found.prompt:,} tokens (limit "
            f"{self.config.rollout.max_prompt_length:,}){trace}"
        )

    def model(self) -> str:
        import torch

        from pact_fast.model import lora
        from pact_fast.model.build import architecture, check_context, from_config, make_model
        from pact_fast.rollout.registry import engine_builder

        if self.config.model.path:  # the configuration suffices; weights may be large
            with torch.device("meta"):
                model = from_config(architecture(self.config.model), self.config.model.path)
        else:
            model = make_model(self.config, self.tokens)
        if self.config.model.lora:
            lora.attach(model, self.config.model.lora, self.config.seed)
        check_context(self.config, model)
        engine_builder(self.config).check_model(model)
        count = self.parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapters = f", {trained / 1e6:,.2f} M of them in adapters" if self.config.model.lora else ""
        warning = embedded_engine_warning(self.config, count)
        self.warnings += [warning] if warning else []
        return f"{model.config.model_type}, {count / 1e6:,.1f} M parameters{adapters}"

    def logits(self) -> str:
        """Trainer and embedded engine against the model's own logits, with the real weights."""
        from pact_fast.model.build import make_policy
        from pact_fast.model.device import free_memory, pick_device
        from pact_fast.model.logit_check import check_run
        from pact_fast.rollout.registry import engine_builder

        device = pick_device(self.config)
        if 4 * self.parameters > free_memory(device):
            self.warnings.append("not compared with the model's own logits: its fp32 weights exceed the free memory")
            return "not compared"
        model = make_policy(self.config, self.tokens, device=device)
        return check_run(self.config, model, self.tokens, engine_builder(self.config).logprobs, device)

    def memory(self) -> str:
        """The estimate of `doctor --memory` in one line."""
        from pact_fast.estimate.memory import estimate, format_bytes
        from pact_fast.estimate.sharding import sharding_of
        from pact_fast.model.device import pick_device

        try:
            peak = estimate(self.config, sharding=sharding_of(self.config), device=pick_device(self.config).type)
        except PactError as error:  # the model's code cannot be traced; it may train all the same
            self.warnings.append(str(error))
            return "not estimated"
        parts = ", ".join(
            f"{name} {format_bytes(size)}" for name, size in peak.parts.items() if size > peak.total / 1000
        )
        return f"an update with packs of {peak.tokens:,} tokens is estimated to peak at {format_bytes(peak.total)}: {parts}"

    def smoke_test(self) -> EngineSmokeTest:
        """A trial of the engine with the model's real weights."""
        from pact_fast.envs.registry import EnvironmentFactory
        from pact_fast.model.build import make_model
        from pact_fast.model.device import pick_device, precision
        from pact_fast.rollout.engine_check import EngineSmokeTest

        device = pick_device(self.config)
        model = make_model(self.config, self.tokens, device=device).eval()
        make_env, autocast = EnvironmentFactory(self.config), precision(self.config, device)
        return EngineSmokeTest(self.config, model, self.renderer, make_env, self.sample, autocast)

    def kernels(self) -> str:
        from pact_fast.kernels import backends

        return "; ".join(f"{name}: {state}" for name, state in backends().items())


def _expert_calls(task: Task) -> list:
    return task.expert.calls if task.expert else []
