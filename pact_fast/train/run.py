"""The life cycle of a training run: build, resume, step, evaluate, save, stop.

All random numbers are functions of (seed, step, position), never of earlier draws, and nothing depends on the speed of
tools. A run that is killed and resumed therefore repeats its lost steps bit for bit (on CPU, with the same number of
threads).

Every rank runs the same life cycle (docs/scaling.md): it samples its part of the rollouts, makes batches of its part of the
prompts and trains its part of the packs. Only rank 0 writes files and logs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.chat.rendering import make_renderer
from pact_fast.chat.template_check import check_template
from pact_fast.config import Config
from pact_fast.distributed.world import init_world
from pact_fast.envs.registry import EnvironmentFactory, make_tasks
from pact_fast.errors import PactError, ShutdownRequested
from pact_fast.files import write_text
from pact_fast.model import lora
from pact_fast.model.adapter import adapter_tensors
from pact_fast.model.device import device_kind, free_memory, precision
from pact_fast.model.sharded_weights import ShardedWeights, sharded_weights
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.model.weights import checkpoint_weights, save_model_config
from pact_fast.plugins import no_exit
from pact_fast.report.console import summary_table
from pact_fast.rewards.functions import load_reward_functions
from pact_fast.rollout.agent import AgentLoop
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.registry import engine_builder, make_engine
from pact_fast.text import short
from pact_fast.train import checkpoint, rng
from pact_fast.train.check_rows import SkippedRows
from pact_fast.train.checkpoint_writer import NamedTensors, PendingSave, start_save
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.evaluate import Evaluator
from pact_fast.train.frozen_heap import frozen_heap
from pact_fast.train.inputs import newest_checkpoint, resolve_run_data, save_tokenizer, skip_bad_rows
from pact_fast.train.learner import Learner, PacksTooLarge
from pact_fast.train.metrics import MetricsWriter
from pact_fast.train.models import ModelLoader
from pact_fast.train.pack_budget import lower_pack_budget, with_pack_budget
from pact_fast.train.preflight import check_settings, check_tasks
from pact_fast.train.progress import Progress
from pact_fast.train.records import RolloutWriter
from pact_fast.train.run_dir import LATEST, open_run, save_config, versions
from pact_fast.train.run_lock import RunLock
from pact_fast.train.seeds import seed_generators
from pact_fast.train.shutdown import GracefulShutdown
from pact_fast.train.step import Stepper, StepResult
from pact_fast.train.trackers.group import open_trackers
from pact_fast.train.user_model import with_frozen_model
from pact_fast.train.warning_signs import WarningSigns
from pact_fast.users.endpoint import ANSWERS, EndpointUsers


@dataclass
class RunState:
    """Progress of a run, as saved in checkpoints.

    step             finished training steps
    wall_seconds     of all earlier processes of this run
    base             evaluation of the base model; None before it, or without held-out tasks
    owes_evaluation  the evaluation after `step` was put off to the process that resumes
    """

    step: int = 0
    wall_seconds: float = 0.0
    base: dict[str, Any] | None = None
    owes_evaluation: bool = False


class Trainer:
    """Builds a run from its configuration and trains it.

        summary = Trainer(load_config("quickstart")).train()

    The constructor checks everything that is cheap to check and opens the run directory; `train` builds the model.

    Raises:
        PactError: Configuration, data, tokenizer or run directory cannot be used.
    """

    # built by `train`
    model: PreTrainedModel
    learner: Learner
    engine: Engine
    loop: AgentLoop
    users: EndpointUsers | None
    collector: RolloutCollector
    stepper: Stepper
    records: RolloutWriter
    evaluator: Evaluator
    metrics: MetricsWriter | None = None
    signs: WarningSigns  # rank 0 has them
    skipped_rows: SkippedRows | None = None  # rank 0 has them, where rows are checked when they are drawn
    _pending_save: PendingSave | None = None
    _lock: RunLock | None = None  # rank 0 has it

    def __init__(self, config: Config):
        self._started = time.monotonic()
        if config.threads:
            torch.set_num_threads(config.threads)
        kind, trainer = device_kind(config), config.trainer
        self.world = init_world(kind, timeout=trainer.dist_timeout, sequence_parallel=trainer.sequence_parallel_size)
        self.device = torch.device(kind, self.world.local_rank) if kind == "cuda" else torch.device(kind)
        self.progress = Progress(quiet=not self.world.is_main)
        self.algorithm = make_algorithm(config.algorithm)
        check_settings(config, self.algorithm)
        self.engine_builder = engine_builder(config)
        self.run = Path(config.output_dir)
        config = resolve_run_data(config, self.run, self.world)
        self.tasks = make_tasks(config)
        notes: list[str] = []
        check_tasks(config, self.algorithm, self.tasks, notes)
        self.reward_functions = load_reward_functions(config.algorithm.reward.functions)
        self.make_env = EnvironmentFactory(config)
        self.shutdown = GracefulShutdown()
        self._skipped = 0  # consecutive skipped updates
        self._saved_at = time.monotonic()
        self.world.run_on_main(self._take_lock, "the lock of the run directory")
        try:
            self._open(config, notes)
        except BaseException:
            self._release_lock()
            raise

    def _open(self, config: Config, notes: list[str]) -> None:
        """Open the run directory, whose lock this process holds, and make the objects that need its files."""
        self._newest = newest_checkpoint(config, self.run, self.world)
        self.world.run_on_main(
            lambda: notes.append(open_run(config, self._newest is not None) or ""), "the run directory"
        )
        for note in filter(None, notes):
            self.progress.note(note)
        self._given = config
        self.config = with_pack_budget(config, self.run, self.world, self.device, self.progress.note)
        self.world.run_on_main(
            lambda: save_tokenizer(self.config, self.run, self.tasks, self.make_env, resumed=self._newest is not None),
            "the tokenizer",
        )
        self.tokenizer = make_tokenizer(config.model, self.tasks, self.run / "tokenizer")
        self.renderer = make_renderer(config.model, self.tokenizer)
        for note in check_template(self.renderer):
            self.progress.note(note)
        self.skipped_rows = skip_bad_rows(
            self.config, self.run, self.tasks, self.renderer, self.algorithm, self.world, self.progress
        )
        self._note_skipped_rows()

    def _note_skipped_rows(self) -> None:
        """List rows that have been drawn since the last call, and that cannot be used."""
        if self.skipped_rows and (note := self.skipped_rows.write()):
            self.progress.note(note)

    def _take_lock(self) -> None:
        self._lock = RunLock(self.run, self.progress.note)

    def _release_lock(self) -> None:
        if self._lock:
            self._lock.release()

    def train(self) -> dict[str, Any] | None:
        """Train to the end. Returns the summary (also in summary.json), or None if a signal stopped the run after a step.

        The run directory is unlocked afterwards.

        Raises:
            ShutdownRequested: SIGTERM or SIGHUP came before the first step or after the last, with nothing to save.
        """
        with self.shutdown:
            try:
                with no_exit("code of the run"), frozen_heap():
                    return self._train()
            except ShutdownRequested:
                name = self.shutdown.signal_name
                self.progress.note(f"stopped by {name}, and nothing had to be saved; continue with resume=auto")
                raise
            finally:
                self.progress.close()
                self._release_lock()

    def _train(self) -> dict[str, Any] | None:
        """Build, resume, and run the steps that are left. Always stops the engine."""
        newest = self._newest
        self._build(newest)
        try:
            state = self._restore(newest) if newest else self._start()
            self._began = self._started - state.wall_seconds
            self.engine.update_weights(self.model, self.learner.updates)
            if state.step == 0:
                state.base = self.evaluator.evaluate(0, "base")
            if state.owes_evaluation:
                self.evaluator.evaluate(state.step, "eval")
            self.shutdown.deferred = True  # from here on, a step is finished and saved before stopping
            while state.step < self.config.trainer.max_steps:
                self._log_step(state.step + 1, self.stepper(state.step))
                state.step += 1
                self._finish_save(wait=False)
                if self._maybe_evaluate_and_save(state):
                    return None
            self.shutdown.deferred = False
            return self._finish(state)
        except PacksTooLarge as error:
            lower_pack_budget(self.run, error.tokens)
            raise
        finally:
            self._close()

    # -- build and resume --------------------------------------------------------------------------------------------

    def _build(self, newest: Path | None) -> None:
        """Build model, learner, engine and the parts of a step. `newest`: the checkpoint that the weights come from."""
        config = self.config
        loader = ModelLoader(
            config=config,
            run=self.run,
            tokenizer=self.tokenizer,
            renderer=self.renderer,
            tasks=self.tasks,
            make_env=self.make_env,
            algorithm=self.algorithm,
            engine_builder=self.engine_builder,
            device=self.device,
            world=self.world,
            progress=self.progress,
            shutdown=self.shutdown,
        )
        self.model, reference = loader.load(newest)
        autocast = precision(config, self.device)
        per_update = config.trainer.prompts_per_update or config.trainer.prompts_per_step
        updates_per_batch = config.trainer.prompts_per_step // per_update
        self.learner = Learner(
            self.model,
            config.trainer,
            self.algorithm,
            total_updates=config.trainer.max_steps * updates_per_batch,
            updates_per_batch=updates_per_batch,
            temperature=config.rollout.temperature,
            filters=config.rollout.filters,
            reference=reference,
            autocast=autocast,
            sampler_differs=self.engine_builder.sampler_differs,
            world=self.world,
            dtype=config.model.dtype,
            before_step=self._wait_for_copies,
        )
        # after the learner: ZeRO may have sharded the model over ranks
        engine = make_engine(config, self.model, self.renderer, folder=self.run, autocast=autocast, world=self.world)
        self.engine = with_frozen_model(
            engine, config, self.tokenizer, self.renderer, self.run, device=self.device, autocast=autocast
        )
        self.users = EndpointUsers.of(config.rollout, self.run / ANSWERS)
        self.loop = AgentLoop(self.engine, self.renderer, self.make_env, config.rollout, self.users)
        samplers = self.engine_builder.engine_ranks(self.world)
        self.collector = RolloutCollector(
            config, self.tasks, self.loop, self.algorithm, self.reward_functions, samplers, self.world, self.progress
        )
        self.stepper = Stepper(config, self.algorithm, self.learner, self.engine, self.collector, self.renderer)
        self.records = RolloutWriter(
            self.run, self.renderer, config.trainer.save_rollouts, keep=config.trainer.keep_rollouts, world=self.world
        )

    def _start(self) -> RunState:
        """The state of a new run."""
        seed_generators(self.config.seed)  # independent of draws while it was built, perhaps by an earlier process
        self._open_metrics(0, 0)
        return RunState()

    def _restore(self, path: Path) -> RunState:
        """Restore optimizer, random number generators and metrics from a checkpoint."""
        saved = checkpoint.load(path)
        state = saved.state
        try:
            self.learner.backend.load_state(saved.tensors["optimizer"])
            rng.set_rng_state(state["rng"], saved.tensors["rng"])
            self.learner.updates, written = int(state["updates"]), int(state["metrics_bytes"])
            restored = RunState(
                saved.step, float(state["wall_seconds"]), state["base"], bool(state.get("owes_evaluation", False))
            )
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:  # written by something else
            raise PactError(
                f"{path} holds another state than this version saves ({type(error).__name__}: {short(str(error))}); delete "
                "it to continue from an older one"
            ) from error
        self._open_metrics(saved.step, written)
        self.world.run_on_main(lambda: save_config(self._given), "config.yaml")
        self.progress.note(f"resuming {self.run} from step {saved.step}")
        return restored

    def _open_metrics(self, step: int, size: int) -> None:
        """Open metrics.jsonl, cut to its first `size` bytes (steps up to `step`), and make the evaluator that writes to it."""
        if self.world.is_main:
            checkpoint.rewind_metrics(self.run / "metrics.jsonl", size)
            trackers = open_trackers(self.config, self.run, step, self.progress.note)
            self.metrics = MetricsWriter(self.run, trackers)
            self.signs = WarningSigns.resumed(self.run / "metrics.jsonl")
        self.evaluator = Evaluator(
            self.config, self.tasks, self.collector, self.metrics, self.records, self.progress, self.world
        )

    # -- after each step ---------------------------------------------------------------------------------------------

    def _log_step(self, step: int, result: StepResult) -> None:
        """Write metrics and rollouts of step `step` (from 1). PactError after too many skipped updates."""
        if self.metrics:
            self._check_lock()
            warnings, texts = self.signs.see(result.metrics)
            self.metrics.write(step, result.metrics | warnings)
            for text in texts:
                self.progress.note(f"step {step}: {text}")
            self._note_skipped_rows()
        self.records.write_step(step, result.batches, result.prompts)
        self.progress.step(step, self.config.trainer.max_steps, result.metrics)
        self._check_skipped(step, result)

    def _check_lock(self) -> None:
        """PactError if another process has taken the run directory meanwhile."""
        if self._lock:
            self._lock.check()

    def _check_skipped(self, step: int, result: StepResult) -> None:
        """Count consecutive skipped updates (loss or gradient not finite) and save their batch for inspection."""
        for update in result.results:
            self._skipped = self._skipped + 1 if update.skipped else 0
        if not any(update.skipped for update in result.results):
            return
        saved = self.run / "rollouts" / f"skipped_{step:06d}.jsonl.gz"
        self.records.write_skipped(step, result.batches)
        self.progress.note(
            f"step {step}: loss or gradient is not finite; the update is skipped, its batch is in {saved}"
        )
        if self._skipped > self.config.trainer.max_skipped_updates:
            raise PactError(
                f"{self._skipped} updates in a row had a non-finite loss or gradient (trainer.max_skipped_updates); "
                f"look at {saved}, lower trainer.learning_rate, and continue from the last checkpoint with resume=auto"
            )

    def _maybe_evaluate_and_save(self, state: RunState) -> bool:
        """Evaluate and save when due. Returns True if the run was asked to stop.

        Then a due evaluation is left to the process that resumes the run, so that the step is saved quickly.
        """
        trainer, done = self.config.trainer, state.step
        last = done == trainer.max_steps
        stop = self._shutdown_requested()
        due = bool(trainer.eval_steps) and done % (trainer.eval_steps or 1) == 0 and not last
        if due and not stop:
            self.evaluator.evaluate(done, "eval")
            due, stop = False, self._shutdown_requested()
        state.owes_evaluation = due
        if last or stop or self._save_is_due(done):
            self._save(state)
        if last or stop:
            self._finish_save(wait=True)
        if stop:
            self.progress.note(
                f"stopped by {self.shutdown.signal_name}: step {done} is saved; continue with resume=auto"
            )
        return stop

    def _shutdown_requested(self) -> bool:
        """True on all ranks if any rank has received SIGTERM or SIGHUP."""
        return self.world.any(self.shutdown.requested)

    def _save_is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`: by the number of steps, or by rank 0's clock."""
        minutes = self.config.trainer.save_minutes
        if minutes is None:
            return step % self.config.trainer.save_steps == 0
        return self.world.any(self.world.is_main and time.monotonic() - self._saved_at >= 60 * minutes)

    def _save(self, state: RunState) -> None:
        """Begin to save a checkpoint of the finished step; the one before it is completed first."""
        self._finish_save(wait=True)
        self._saved_at = time.monotonic()
        rng_state, rng_tensors = rng.rng_state()
        lora_config = self.config.model.lora
        saved = {
            "rng": rng_state,
            "updates": self.learner.updates,
            "wall_seconds": time.monotonic() - self._began,
            "base": state.base,
            "owes_evaluation": state.owes_evaluation,
            "metrics_bytes": (self.run / "metrics.jsonl").stat().st_size if self.metrics else 0,
        }
        adapters = adapter_tensors(self.model)  # a collective under ZeRO-3

        def write_model(path: Path) -> None:
            self._check_lock()
            if lora_config:
                lora.save(self.model, adapters, path, lora_config)
            else:
                save_model_config(self.model, path)
            self.tokenizer.save_pretrained(path)

        weights: NamedTensors | ShardedWeights | None = None
        if not lora_config:
            weights = sharded_weights(self.model, self.world.rank) or checkpoint_weights(self.model)
        backend = self.learner.backend
        optimizer: dict[str, NamedTensors] = {"optimizer": backend.state()}
        self._pending_save = start_save(
            self.run / "checkpoints",
            state.step,
            tensors={"rng": rng_tensors, **({} if backend.sharded else optimizer)},
            sharded=optimizer if backend.sharded else {},
            state=saved,
            write_model=write_model,
            weights=weights,
            keep=self.config.trainer.save_total_limit,
            live=backend.changed_by_step(),
            world=self.world,
            budget=free_memory(torch.device("cpu")) // 2,
            before_rename=self._check_lock,
            after_rename=lambda path: write_text(self.run / LATEST, path.name + "\n"),
        )

    def _finish_save(self, wait: bool) -> None:
        """Raise the error of the last checkpoint's writing, if any; with `wait`, it is complete when this returns."""
        pending = self._pending_save
        if pending is None or not (wait or pending.ready()):
            return
        self._pending_save = None
        pending.finish()

    def _wait_for_copies(self) -> None:
        """Wait until the checkpoint that is being written has copies of weights and optimizer state."""
        if self._pending_save:
            self._pending_save.wait_copied()

    def _finish(self, state: RunState) -> dict[str, Any]:
        """Evaluate the trained model; write summary.json and report.html."""
        from pact_fast.report import write_report

        base, final = state.base, self.evaluator.evaluate(self.config.trainer.max_steps, "trained")
        summary: dict[str, Any] = {
            "recipe": self.run.name,
            "algorithm": self.config.algorithm.name,
            "steps": self.config.trainer.max_steps,
            "base_success": base and base["success"],
            "success": final and final["success"],
            "base_greedy": base and base["greedy"],
            "greedy": final and final["greedy"],
            "wall_seconds": round(time.monotonic() - self._began, 1),
            "seed": self.config.seed,
            "versions": versions(),
        }
        if not self.world.is_main:
            return summary
        write_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        report = write_report(self.run)
        self.progress.print(summary_table(summary))
        self.progress.note(f"report: {report}")
        return summary

    def _close(self) -> None:
        """Stop sampling, environments and the engine; then let the trackers send remaining metrics."""
        failed = sys.exc_info()[0] is not None
        pending, self._pending_save = self._pending_save, None
        if pending and self.world.size == 1:
            with contextlib.suppress(PactError):
                pending.finish()
        elif pending:  # who knows whether the others are still there
            pending.finish_alone()
        self.collector.close()
        self.loop.close()
        if self.users:
            self.users.close()
        self.engine.shutdown()
        if self.metrics:
            self.metrics.close(failed)
