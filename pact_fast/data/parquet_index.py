"""Rows of a parquet file by number.

A parquet file cannot give one row without decoding its whole row group, often a hundred thousand rows. It is therefore
decoded once, into blocks of a few rows, each a stream of Arrow's, which stand one after the other in a file of the cache
folder. That file is as large as the decoded rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pact_fast.data.line_index import read_errors, read_fully
from pact_fast.data.row_cache import CacheEntry
from pact_fast.data.row_files import NumberedRow, batch_row, parquet_batches, parquet_errors
from pact_fast.errors import DataError

BLOCK = 16  # rows that are read to get one of them
PLACE = np.dtype([("first", "<u8"), ("size", "<u4"), ("row", "<u4")])  # of a row: bytes of its block, number in it
_BLOCKS, _PLACES = "blocks", "places"


class ParquetRows:
    """Rows of a parquet file by number, as `line_index.LineRows`. `name`: of the file, for messages."""

    suspects: tuple[int, ...] = ()

    def __init__(self, name: str, path: Path, limit: int | None = None):
        self._name, self._path = name, path
        what = f"blocks-{limit or 'all'}"
        self._index = CacheEntry(path, what, lambda folder: write_blocks(name, path, limit, folder))
        self._length = (self._index.folder / _PLACES).stat().st_size // PLACE.itemsize

    def __len__(self) -> int:
        return self._length

    def row(self, number: int) -> NumberedRow:
        """(row number from 1, the row or the reason why it cannot be read). FileChanged if the file is another one."""
        import pyarrow as pa

        with read_errors(self._path):
            self._index.check(self._path)
            with self._index.open(_PLACES) as places:
                start = PLACE.itemsize * number
                (place,) = np.frombuffer(read_fully(places, start, start + PLACE.itemsize), PLACE)
            with self._index.open(_BLOCKS) as blocks:
                first = int(place["first"])
                data = read_fully(blocks, first, first + int(place["size"]))
        try:
            with parquet_errors(self._name), pa.ipc.open_stream(data) as reader:
                return number + 1, batch_row(reader.read_next_batch(), int(place["row"]))
        except DataError as error:
            return number + 1, error


def write_blocks(name: str, path: Path, limit: int | None, folder: Path) -> None:
    """Write the first rows of a parquet file as blocks, and the place of every row (PLACE), to a folder."""
    rows = 0
    with (folder / _BLOCKS).open("wb") as blocks, (folder / _PLACES).open("wb") as places, path.open("rb") as file:
        for batch in parquet_batches(name, file):
            batch = _plain(batch if limit is None else batch.slice(0, limit - rows))
            for start in range(0, batch.num_rows, BLOCK):
                block = batch.slice(start, BLOCK)
                first, size = blocks.tell(), blocks.write(_stream(block))
                place = np.empty(block.num_rows, PLACE)
                place["first"], place["size"], place["row"] = first, size, np.arange(block.num_rows)
                place.tofile(places)
            rows += batch.num_rows
            if rows == limit:
                break


def _plain(batch: Any) -> Any:
    """The batch with repeated values written out: a block would else hold the dictionary of all rows."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def _stream(block: Any) -> Any:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_batch(block)
    return sink.getvalue()
