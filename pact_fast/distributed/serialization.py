"""Serialization of the data that ranks exchange: JSON values, numpy arrays, and the records of a rollout.

Not pickle: decoding bytes from a peer can create the types listed here and nothing else. Format:

    8 bytes: length of the JSON text, little-endian | the JSON text | the bytes of all arrays, in order
"""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import numpy as np

from pact_fast.data.types import ToolCall, Trajectory, TurnRecord

RECORDS = {record.__name__: record for record in (Trajectory, TurnRecord, ToolCall)}
DTYPE_KINDS = "biuf"  # kinds of numpy dtypes that may be sent: booleans, integers and floats


def encode(value: Any) -> bytes:
    """Serialize a value of None, booleans, numbers, text, lists, dicts with text keys, arrays and RECORDS.

    Tuples are decoded as lists. Raises TypeError for any other type.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_to_json(value, arrays)).encode()
    return b"".join([struct.pack("<q", len(text)), text, *(array.tobytes() for array in arrays)])


def decode(data: bytes) -> Any:
    """The inverse of `encode`. Raises ValueError if `data` is not its output."""
    try:
        (length,) = struct.unpack_from("<q", data)
        reader = _Reader(data, 8 + length)
        value = reader.from_json(json.loads(data[8 : 8 + length]))
    except (struct.error, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a message of this program: {error!r}") from None
    if reader.offset != len(data):
        raise ValueError(f"not a message of this program: {len(data) - reader.offset} bytes are left")
    return value


def _to_json(value: Any, arrays: list[np.ndarray]) -> Any:
    """The JSON form of a value; the arrays in it are appended to `arrays`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_to_json(item, arrays) for item in value]
    if isinstance(value, dict):
        return {"type": "dict", "items": [[_check_key(k), _to_json(v, arrays)] for k, v in value.items()]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in DTYPE_KINDS:
            raise TypeError(f"cannot send an array of {value.dtype} to other ranks; use booleans, integers or floats")
        arrays.append(np.ascontiguousarray(value))
        return {"type": "array", "dtype": value.dtype.str, "shape": value.shape}
    name = type(value).__name__
    if RECORDS.get(name) is type(value):
        fields = {field.name: _to_json(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {"type": name, "fields": fields}
    raise TypeError(f"cannot send a value of type {name} to other ranks")


def _check_key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys of a dict that is sent to other ranks must be text, found {key!r}")
    return key


class _Reader:
    """Decodes JSON forms; `offset` is the position of the next array in `data`."""

    def __init__(self, data: bytes, offset: int):
        self.data, self.offset = data, offset

    def from_json(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.from_json(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value["type"] == "dict":
            return {key: self.from_json(item) for key, item in value["items"]}
        if value["type"] == "array":
            return self._next_array(np.dtype(value["dtype"]), value["shape"])
        return RECORDS[value["type"]](**{name: self.from_json(item) for name, item in value["fields"].items()})

    def _next_array(self, dtype: np.dtype, shape: list[int]) -> np.ndarray:
        if dtype.kind not in DTYPE_KINDS:
            raise TypeError(f"arrays of {dtype}")
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(self.data, dtype, count, self.offset).reshape(shape)
        self.offset += array.nbytes
        return array.copy()  # frombuffer is a read-only view of `data`
