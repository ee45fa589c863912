"""Messages between ranks: values come back equal, and other bytes are refused."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.data.types import ToolCall, Trajectory, TurnRecord
from pact_fast.distributed.serialization import decode, encode

SIMPLE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SIMPLE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_json_like_values_come_back(value):
    assert decode(encode(value)) == value


def test_a_trajectory_comes_back():
    call = ToolCall("look_up", {"type": "dict", "items": [1, {"type": "array"}], "é": None})
    trajectory = Trajectory(
        task_id="t",
        prompt_ids=np.arange(3),
        ids=np.arange(5) * 1000,
        components=np.array([1, 2, 3, 0, 1], np.uint8),
        turn_ids=np.zeros(5, np.int16),
        sampled=np.array([1, 1, 1, 0, 1], bool),
        logprobs=np.array([-0.5, math.nan, -math.inf, 0.0, -1e-30], np.float32),
        versions=np.full(5, 7, np.int32),
        turns=[TurnRecord("text", "why", "what", [call, "malformed"], ["a", "b"])],
        stop_reason="answer",
        turn_rewards=[0.5, math.nan],
        reward=np.float32(0.25),
        reward_parts={"success": 1.0},
    )
    (found,) = decode(encode([trajectory]))
    for name in ("prompt_ids", "ids", "components", "turn_ids", "sampled", "logprobs", "versions"):
        old, new = getattr(trajectory, name), getattr(found, name)
        assert old.dtype == new.dtype and old.tobytes() == new.tobytes()
        new[...] = 0  # it can be written
    assert found.turns == trajectory.turns and found.reward == 0.25 and found.reward_parts == {"success": 1.0}
    assert math.isnan(found.turn_rewards[1])


@pytest.mark.parametrize("array", [np.zeros((0, 2)), np.arange(6).reshape(2, 3).T, np.array(3.5), np.zeros(0, bool)])
def test_arrays_of_any_shape_come_back(array):
    found = decode(encode({"a": array, "b": [array]}))
    for one in (found["a"], found["b"][0]):
        assert one.shape == array.shape and one.dtype == array.dtype and (one == array).all()


@pytest.mark.parametrize("value", [object(), {1: 2}, np.array(["x"]), np.array([None]), {1, 2}, b"bytes"])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError):
        encode(value)


def test_other_bytes_are_refused():
    good = encode({"a": np.arange(4), "b": ToolCall("f", {})})
    bad = [
        pickle.dumps({"a": 1}), b"", good[:-1], good + b"x", good.replace(b"ToolCall", b"Popen123"),
        good.replace(b'"<i8"', b'"|O8"'),
    ]  # fmt: skip
    for data in bad:
        with pytest.raises(ValueError):
            decode(data)
