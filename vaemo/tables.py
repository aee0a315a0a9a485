"""What pyarrow's tables lack: a column in the place of another, numbers in the place of names, a table as bytes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def with_column(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with a column in the place of the one that has its name."""
    return table.set_column(table.column_names.index(name), name, column)


def codes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The number of each row's value, (rows,), int64: from 0, in the order of first appearance, null like any other."""
    joined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pc.dictionary_encode(joined, null_encoding="encode").indices.to_numpy().astype(np.int64)


def to_bytes(table: pa.Table) -> bytes:
    """A table as it travels to another process, for `from_bytes`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(content: bytes) -> pa.Table:
    """The table that `to_bytes` packed."""
    return pa.ipc.open_stream(content).read_all()
