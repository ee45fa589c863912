"""An engine of the user's own: one class in one file, named by `file.py:Class` or registered by a decorator line."""

import json
import math

import numpy as np
import pytest

from pact_fast.config import parse_config
from pact_fast.data.types import StopReason
from pact_fast.distributed.world import World
from pact_fast.envs.lookup_chain import LookupChain, LookupChainTasks
from pact_fast.errors import PactError
from pact_fast.plugins import load_object
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.engine_check import EngineSmokeTest
from pact_fast.rollout.registry import engine_builder, make_engine
from pact_fast.train.run import Trainer
from tests.support.groups import lookup_chain_renderer
from tests.support.runs import TINY_RUN

ENGINE = """
import numpy as np

from pact_fast.rollout.engine import Completion, Engine
from pact_fast.rollout.registry import engine


@engine("fixed-answer")
class FixedAnswer(Engine):
    '''Answers every turn with the same three tokens.'''

    synchronous = True

    def __init__(self, config, model, renderer):
        self.answer = np.array([5, 6, renderer.eot_id])
        self.waiting, self.open, self.updates = [], set(), []

    def submit(self, request):
        self.waiting.append(request.session)
        self.open.add(request.session)

    def step(self, timeout=None):
        done, self.waiting = self.waiting, []
        logprobs = np.full(3, -1.5, np.float32)
        return [Completion(s, self.answer, logprobs, ended=True, version=self.version) for s in done]

    def close(self, session):
        self.open.discard(session)

    def update_weights(self, model, version):
        self.version = version
        self.updates.append(version)


not_an_engine = 3
"""
TINY = {**TINY_RUN, "device": "cpu"}


@pytest.fixture(scope="module")  # a name can be registered once
def engine_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "fixed_answer.py"
    path.write_text(ENGINE)
    return path


def config(engine, **more):
    return parse_config({**TINY, **more, "rollout": {**TINY["rollout"], "engine": str(engine)}})


def test_a_run_trains_on_what_an_engine_from_a_file_samples(engine_file, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(config(f"{engine_file}:FixedAnswer", output_dir=str(run)))
    trainer.train()
    assert type(trainer.engine).__name__ == "FixedAnswer"
    assert trainer.engine.updates == [0, 1] and not trainer.engine.open
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (step,) = [record for record in records if "loss" in record]
    assert math.isfinite(step["loss"]) and step["lengths/completion_max"] == 3 and step["stop/answer"] == 1
    assert step["control_token_prob"] == pytest.approx(math.exp(-1.5))  # of the end of turn, by the engine's log-probs


@pytest.mark.parametrize("named", ["by file", "by decorator"])
def test_the_agent_loop_samples_with_it(named, engine_file):
    name = f"{engine_file}:FixedAnswer"
    if named == "by decorator":  # registered when its file is imported
        load_object(name, "engine")
        name = "fixed-answer"
    renderer = lookup_chain_renderer()
    settings = config(name)
    engine = make_engine(settings, None, renderer)
    engine.update_weights(None, 7)
    loop = AgentLoop(engine, renderer, lambda task: LookupChain(), settings.rollout)
    trajectories = loop.run([Job(LookupChainTasks("train", 1).task(i), (0, i)) for i in range(3)])
    assert len(trajectories) == 3 and not engine.open
    for t in trajectories:
        assert t.stop_reason is StopReason.ANSWER
        np.testing.assert_array_equal(t.ids, [5, 6, renderer.eot_id])
        assert t.sampled.all() and (t.logprobs == -1.5).all() and (t.versions == 7).all()


def test_an_engine_that_does_not_say_that_it_filters_is_refused_top_p(engine_file):
    settings = config(f"{engine_file}:FixedAnswer")
    rollout = settings.rollout.model_copy(update={"top_p": 0.9})
    engine = make_engine(settings, None, lookup_chain_renderer())
    with pytest.raises(PactError, match=r"does not apply rollout\.top_p, top_k and min_p \(top-p 0\.9\)"):
        AgentLoop(engine, None, None, rollout)
    engine.applies_filters = True
    AgentLoop(engine, None, None, rollout)


def test_it_has_the_properties_of_a_plain_engine(engine_file):
    builder = engine_builder(config(f"{engine_file}:FixedAnswer"))
    assert builder.own_weights and builder.sampler_differs and builder.shares_device()
    assert builder.engine_ranks(World(1, 3)) == [0, 1, 2]
    assert (builder.memory_fraction(), builder.devices_per_engine()) == (0.0, 1)


def test_the_smoke_test_needs_no_sync_report(engine_file):
    settings, renderer = config(f"{engine_file}:FixedAnswer"), lookup_chain_renderer()
    checks = EngineSmokeTest(
        settings, None, renderer, lambda t: LookupChain(), LookupChainTasks("train", 1).tasks(2), None
    )
    assert checks.engine() == "the engine has accepted the model's weights"
    assert checks.rollouts().startswith("2 trajectories of the first tasks: 2 turns, 6 tokens; ended by answer")
    checks.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vlm", r"rollout\.engine: unknown engine 'vlm' \(did you mean 'vllm'\?\)"),
        ("transformer", r"did you mean 'transformers'\?"),
        ("{file}:FixedAnser", r"did you mean 'FixedAnswer'\?"),
        ("{file}:not_an_engine", r"it is a int; name a function or class"),
        ("nowhere.py:Engine", r"no file nowhere\.py"),
    ],
)
def test_an_unknown_engine_names_the_nearest(name, message, engine_file):
    with pytest.raises(PactError, match=message):
        engine_builder(config(name.format(file=engine_file)))
