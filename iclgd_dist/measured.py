"""Measures that were made after their cells: `measures/<hash>.parquet` in the store, many rows to a file, each file written once.

Knows the columns of a measure and how files appear whole. Knows nothing of cells beyond their keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iclgd_dist import files
from iclgd_dist.cells import UPDATE, table_of
from iclgd_dist.files import Location, StoreError, Vanished, naming
from iclgd_dist.schema import MEASURE

SCHEMA = pa.schema([("key", pa.string()), *((name, kind) for name, kind, _ in MEASURE)])
_NAMED = ["key", "kind", "name", "metric", "layer", "fold"]  # what a figure is called; the first of two that are called the same counts


def commit(root: Location, rows: list[dict[str, Any]], *, reach: Callable[[str], None]) -> bool:
    """Store measures of any cells, on disk on return. The same figures are stored once; returns whether this call stored them.

    Errors: ValueError, as `cells.table_of`; StoreError when they cannot be written.
    """
    if not rows:
        return False
    said = "\n".join(sorted("\t".join(str(row[name]) for name in _NAMED) for row in rows))
    buffer = pa.BufferOutputStream()
    pq.write_table(table_of(rows, SCHEMA), buffer, write_page_checksum=True)
    folder = root / "measures"
    files.make_folder(folder)
    return files.publish(folder / f"{hashlib.sha256(said.encode()).hexdigest()}.parquet", buffer.getvalue().to_pybytes(), reach=reach)


def read(root: Location) -> pa.Table:
    """Return all figures, files in the order of their names.

    Errors: StoreError naming a file that is damaged or of a newer version.
    """
    return pa.concat_tables([SCHEMA.empty_table(), *(_read(root / "measures" / name) for name in _names(root))])


def _names(root: Location) -> list[str]:
    return sorted(name for name in files.names_in(root / "measures") if name.endswith(".parquet") and not name.startswith("."))


def _read(path: Location) -> pa.Table:
    with naming(path, "read"), pq.ParquetFile(pa.BufferReader(files.read(path)), page_checksum_verification=True) as file:
        table = file.read()
    if strange := sorted(set(table.column_names) - set(SCHEMA.names)):
        raise StoreError(f"holds columns this version does not know: {', '.join(strange)}", path, way_out=UPDATE)
    return table.select(SCHEMA.names).cast(SCHEMA)


def verify(root: Location) -> list[StoreError]:
    """Read every file and return what is wrong, one error per damaged file."""
    errors = []
    for name in _names(root):
        try:
            _read(root / "measures" / name)
        except StoreError as error:
            errors.append(error)
        except Vanished:
            pass
    return errors


def forget(root: Location, keys: Collection[str], *, aside: Callable[[Location], None], reach: Callable[[str], None]) -> None:
    """Take all figures of some cells out; files that held any are handed to `aside` after what they hold of other cells is stored anew."""
    gone = pa.array(sorted(keys), pa.string())
    for name in _names(root):
        table = _read(root / "measures" / name)
        goes = pc.is_in(table["key"], gone)
        if pc.any(goes).as_py():
            commit(root, table.filter(pc.invert(goes)).to_pylist(), reach=reach)
            aside(root / "measures" / name)


def only_new(known: pa.Table, later: pa.Table, keys: pa.Array) -> pa.Table:
    """Return the figures of `later`, of cells in `keys`, that neither `known` nor an earlier file has. In `known` the cell's key is a dictionary column over `keys`."""
    rows = pc.index_in(later["key"], keys).combine_chunks()
    found = later.set_column(0, "key", pa.DictionaryArray.from_arrays(rows, keys)).select(known.column_names).filter(rows.is_valid())
    is_same_cell = pa.chunked_array([pc.is_in(chunk.indices, rows.drop_null()) for chunk in known["key"].chunks], pa.bool_())
    before = known.filter(is_same_cell)
    numbers = _firsts(pa.concat_tables([before, found]))
    return found.take(pc.subtract(numbers.filter(pc.greater_equal(numbers, len(before))), len(before)))


def _firsts(measures: pa.Table) -> pa.Array:
    """Return the numbers of the rows whose figure no earlier row has; all are of one kind."""
    columns = {name: measures[name] for name in _NAMED if name != "kind"}
    columns["key"] = pa.chunked_array([chunk.indices for chunk in measures["key"].chunks], pa.int32())
    numbered = pa.table(columns | {"row": np.arange(len(measures))})
    return numbered.group_by(list(columns), use_threads=False).aggregate([("row", "min")])["row_min"].combine_chunks().sort()
