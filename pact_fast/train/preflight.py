"""Checks of settings and tasks together, before a model is loaded: each alone is valid, and together they train nothing.

`check_settings` needs no data; `check_tasks` reads the tasks of the data files (of large ones, a sample), or the first step
of generated ones.
"""

from __future__ import annotations

from collections.abc import Collection

from pact_fast.algorithms.base import OWN_SECTIONS, Algorithm
from pact_fast.config import Config, RewardConfig
from pact_fast.data.absent import is_absent
from pact_fast.data.sources import FileTasks, TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.registry import environment, environment_name
from pact_fast.errors import PactError
from pact_fast.model.deepspeed import deepspeed_config
from pact_fast.rewards.score import NO_OUTCOME
from pact_fast.train.trackers.registry import check_trackers
from pact_fast.users.endpoint import user_llm


def check_settings(config: Config, algorithm: Algorithm) -> None:
    """PactError for settings that are pointless together with any data, or that name a missing tracker or a
    wrong setting of the user's language model."""
    check_trackers(config.trainer.report_to)
    if config.trainer.deepspeed:
        deepspeed_config(config.trainer, config.model.dtype)
    user_llm(config.rollout)
    name, reward, data = config.algorithm.name, config.algorithm.reward, config.data
    rewarded = algorithm.needs_rollouts and algorithm.needs_rewards
    if rewarded and config.rollout.num_generations == 1:
        raise PactError(
            f"rollout.num_generations=1 with algorithm.name={name}: the advantages of a group of one rollout are 0, so "
            "nothing is learned from it; set rollout.num_generations to 2 or more"
        )
    if rewarded and config.rollout.top_k == 1:
        raise PactError(
            f"rollout.top_k=1 with algorithm.name={name}: all rollouts of a prompt are the greedy one, so their advantages "
            "are 0 and nothing is learned; set rollout.top_k to 2 or more, or to 0 for all tokens"
        )
    if config.algorithm.filter_groups.enable and not rewarded:
        raise PactError(
            f"algorithm.filter_groups has no effect with algorithm.name={name}, which {_no_use(algorithm)}; remove it, or use "
            "another algorithm"
        )
    if not algorithm.turn_advantages or not rewarded:
        _refuse_weights(name, reward, algorithm)
    if reward.outcome == NO_OUTCOME and rewarded and not algorithm.turn_advantages and not reward.functions:
        raise PactError(
            "algorithm.reward.outcome=none leaves nothing to reward; set algorithm.reward.functions, for example [toolrl]"
        )
    buffer, limit = reward.overlong_buffer, config.rollout.max_completion_length
    if buffer.enable and buffer.len > limit:
        raise PactError(
            f"algorithm.reward.overlong_buffer.len={buffer.len} is longer than a rollout "
            f"(rollout.max_completion_length={limit}), so every rollout would be penalised; lower it"
        )
    if not data.train and (data.eval or data.expert):
        key = "data.eval" if data.eval else "data.expert"
        raise PactError(f"{key} is set without data.train, and would not be read; set data.train, or remove {key}")
    if data.train and not data.eval:
        _check_held_out(config, 0)


def _refuse_weights(name: str, reward: RewardConfig, algorithm: Algorithm) -> None:
    """PactError for reward settings that an algorithm without turn-level rewards, rewards or rollouts ignores."""
    rewarded = algorithm.needs_rollouts and algorithm.needs_rewards
    keys = ["env_weight", "match_weight"] if rewarded else ["env_weight", "match_weight", "functions"]
    for key in keys:
        if getattr(reward, key) != RewardConfig.model_fields[key].get_default(call_default_factory=True):
            uses = "its reward is success + your functions" if rewarded else f"it {_no_use(algorithm)}"
            raise PactError(
                f"algorithm.reward.{key} has no effect with algorithm.name={name} ({uses}); remove it, or use "
                "algorithm.name=matchtir or pact"
            )


def _no_use(algorithm: Algorithm) -> str:
    """Why an algorithm has no use for settings of rewards."""
    return "uses no rewards" if algorithm.needs_rollouts else "samples no rollouts"


def ignored_settings(config: Config, algorithm: Algorithm) -> list[str]:
    """Keys with a value that is not their default, and that the algorithm says it does not read."""
    others = {section: None for section in OWN_SECTIONS if section != algorithm.own_section}
    unused = {**others, **algorithm.unused_settings}
    return [key for section, names in unused.items() for key in _changed(config, section, names)]


def check_tasks(config: Config, algorithm: Algorithm, tasks: TaskSource, notes: list[str]) -> None:
    """Check that the tasks can be rewarded and evaluated as the settings ask; single rows are checked by check_rows.

    Args:
        config: The run's configuration.
        algorithm: Its algorithm.
        tasks: Its tasks.
        notes: Gets notes on settings that are allowed but probably unintended.

    Raises:
        PactError: No task has anything to reward, or there are no held-out tasks for trainer.eval_steps.
    """
    if ignored := ignored_settings(config, algorithm):
        notes.append(f"algorithm.name={config.algorithm.name} does not use {', '.join(ignored)}")
    train = list(tasks.training()) if isinstance(tasks, FileTasks) else tasks.train(0, config.trainer.prompts_per_step)
    held_out = tasks.held_out(config.trainer.eval_tasks)
    _check_held_out(config, len(held_out))
    if held_out and not any(_gives_success(config, task) for task in held_out):
        notes.append("no held-out task has an outcome to evaluate (env_args.scoring)")
    if algorithm.needs_rollouts and algorithm.needs_rewards:
        _check_rewards(config, algorithm, train, notes)


def _check_rewards(config: Config, algorithm: Algorithm, train: list[Task], notes: list[str]) -> None:
    """PactError if no task has anything to reward, or env_weight counts a success that a task does not have."""
    for task in train:
        check_success(config, algorithm, task)
    if config.algorithm.reward.functions:
        return
    without = [task for task in train if not _is_rewarded(config, algorithm, task)]
    if without and len(without) == len(train):
        cure = "give the rows reference_calls, an expert trace or an answer"
        if any(_gives_success(config, task) for task in train):
            cure = "set algorithm.reward.env_weight=1 to count the environment's success"
        raise PactError(
            f"no task has anything to reward, so nothing would be learned (first task: {without[0].id}); {cure}, or "
            "set algorithm.reward.functions"
        )
    if without:
        notes.append(f"{len(without)} of {len(train)} tasks have nothing to reward, the first is {without[0].id}")


def check_success(config: Config, algorithm: Algorithm, task: Task) -> None:
    """PactError if env_weight counts a success that a training task does not have."""
    rewarded = algorithm.needs_rollouts and algorithm.needs_rewards
    if rewarded and config.algorithm.reward.env_weight and not _gives_success(config, task):
        raise PactError(
            f"task {task.id}: algorithm.reward.env_weight counts the environment's 'success', and its row has none "
            "(env_args.scoring); add it, or set algorithm.reward.env_weight=0"
        )


def _is_rewarded(config: Config, algorithm: Algorithm, task: Task) -> bool:
    """Whether rewards of the task's rollouts can differ, user functions apart."""
    reward = config.algorithm.reward
    calls = task.reference_calls
    if calls is None and task.expert is not None:
        calls = task.expert.calls
    matched = bool(calls) or (calls is not None and reward.unmatched_penalty > 0) or not is_absent(task.answer)
    success = _gives_success(config, task)
    if algorithm.turn_advantages:
        return matched or (success and reward.env_weight != 0)
    return success or matched


def _check_held_out(config: Config, count: int) -> None:
    if config.trainer.eval_steps and not count:
        raise PactError(
            f"trainer.eval_steps={config.trainer.eval_steps} evaluates on held-out tasks, and there are none; set "
            "data.eval, or trainer.eval_steps=null"
        )


def _environment(config: Config, task: Task) -> type:
    return environment.get(task.env or environment_name(config.env, config.data))


def _gives_success(config: Config, task: Task) -> bool:
    """Whether the task's environment returns `success`; assumed of one that does not say."""
    says = getattr(_environment(config, task), "gives_success", None)
    return bool(says(task)) if says else True


def _changed(config: Config, section: str, names: Collection[str] | None) -> list[str]:
    """Dotted keys of a section of `algorithm` (all, or `names`) whose values are not the defaults."""
    values = getattr(config.algorithm, section)
    return [
        f"algorithm.{section}.{name}"
        for name, info in type(values).model_fields.items()
        if (names is None or name in names) and getattr(values, name) != info.get_default(call_default_factory=True)
    ]
