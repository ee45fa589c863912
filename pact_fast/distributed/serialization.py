"""What processes of a run tell each other, as bytes: JSON, arrays, and the records of a rollout.

No pickle: bytes from a peer can make these types, and nothing else.

    8 bytes: length of the JSON text | the JSON text | the arrays, one behind the other
"""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import numpy as np

from pact_fast.data.types import ToolCall, Trajectory, TurnRecord

RECORDS = {record.__name__: record for record in (Trajectory, TurnRecord, ToolCall)}
KINDS = "biuf"  # of arrays: booleans and numbers


def encode(value: Any) -> bytes:
    """None, booleans, numbers, text, lists, tuples (which arrive as lists), dicts with text keys, arrays, and RECORDS."""
    arrays: list[np.ndarray] = []
    text = json.dumps(_flat(value, arrays)).encode()
    return b"".join([struct.pack("<q", len(text)), text, *(array.tobytes() for array in arrays)])


def decode(data: bytes) -> Any:
    """The inverse of `encode`. ValueError if these are other bytes."""
    try:
        (length,) = struct.unpack_from("<q", data)
        reader = _Reader(data, 8 + length)
        value = reader.restore(json.loads(data[8 : 8 + length]))
    except (struct.error, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a message of this program: {error!r}") from None
    if reader.at != len(data):
        raise ValueError(f"not a message of this program: {len(data) - reader.at} bytes are left")
    return value


def _flat(value: Any, arrays: list[np.ndarray]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_flat(item, arrays) for item in value]
    if isinstance(value, dict):
        return {"type": "dict", "items": [[_key(k), _flat(v, arrays)] for k, v in value.items()]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in KINDS:
            raise TypeError(f"arrays of {value.dtype} are not sent")
        arrays.append(np.ascontiguousarray(value))
        return {"type": "array", "dtype": value.dtype.str, "shape": value.shape}
    name = type(value).__name__
    if RECORDS.get(name) is type(value):
        fields = {field.name: _flat(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {"type": name, "fields": fields}
    raise TypeError(f"{name} is not sent between processes")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys must be text, found {key!r}")
    return key


class _Reader:
    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at

    def restore(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.restore(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value["type"] == "dict":
            return {key: self.restore(item) for key, item in value["items"]}
        if value["type"] == "array":
            return self._array(np.dtype(value["dtype"]), value["shape"])
        return RECORDS[value["type"]](**{name: self.restore(item) for name, item in value["fields"].items()})

    def _array(self, dtype: np.dtype, shape: list[int]) -> np.ndarray:
        if dtype.kind not in KINDS:
            raise TypeError(f"arrays of {dtype}")
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(self.data, dtype, count, self.at).reshape(shape)
        self.at += array.nbytes
        return array.copy()  # their own memory, writable
