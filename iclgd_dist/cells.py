"""Cells as Arrow tables: check and encode a row, decode and align files of any version, explode nested lists. Knows the schema and Parquet, no directories."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iclgd_dist import files
from iclgd_dist.files import StoreError, naming
from iclgd_dist.schema import CELL, NESTED

GROUP_CELLS = 1_000  # cells per row group: what is held in memory while a part is written
UPDATE = "update iclgd to the version that wrote it, or a later one"
_NESTED = [name for name, _, _ in NESTED]
# lz4: mantissas hardly compress, so that zstd saves 13 % of the bytes and takes half as long again to read. Checksums: a flipped bit must not become a result.
_PLAIN = {"compression": "lz4", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows as a table of exactly this schema: what is missing is NULL; a name it lacks, NaN and infinity are errors that name the column."""
    for row in rows:
        if unknown := sorted(set(_unknown_names(row, schema))):
            raise ValueError(f"{', '.join(unknown)}: no such column; add it to schema.py or leave it out")
    columns = []
    for field in schema:
        try:
            column = pa.array([row.get(field.name) for row in rows], field.type)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(f"{field.name}: must be {field.type}: {error}") from error
        if path := _first_non_finite(column, field.name):
            raise ValueError(f"{path}: holds NaN or infinity; undefined values are stored as None, a diverged cell has status 'diverged'")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _unknown_names(row: dict[str, Any], schema: pa.Schema) -> Iterator[str]:
    yield from row.keys() - set(schema.names)
    for field in schema:
        if pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type):
            known = {inner.name for inner in field.type.value_type}
            yield from (f"{field.name}.{name}" for item in row.get(field.name) or () for name in item.keys() - known)


def _first_non_finite(array: pa.Array, path: str) -> str | None:
    if pa.types.is_floating(array.type):
        return None if pc.all(pc.is_finite(array), min_count=0).as_py() else path
    if pa.types.is_list(array.type):
        return _first_non_finite(array.flatten(), path)
    if pa.types.is_struct(array.type):
        return next(filter(None, (_first_non_finite(array.field(i), f"{path}.{f.name}") for i, f in enumerate(array.type))), None)
    return None


def align(table: pa.Table, path: Path) -> pa.Table:
    """Return `table` with today's columns: those an older version did not write are NULL; those of a newer version are an error."""
    if table.schema.equals(CELL):
        return table
    if strangers := list(_strangers(pa.struct(list(table.schema)), pa.struct(list(CELL)), "")):
        raise StoreError(f"holds columns this version does not know: {', '.join(strangers[:5])}", path, way_out=UPDATE)
    with naming(path, "read"):
        columns = [table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in CELL]
        return pa.Table.from_arrays(columns, names=CELL.names).cast(CELL)


def _strangers(got: pa.DataType, known: pa.DataType, path: str) -> Iterator[str]:
    if pa.types.is_struct(got) and pa.types.is_struct(known):
        for field in got:
            position = known.get_field_index(field.name)
            name = f"{path}.{field.name}".lstrip(".")
            yield from [name] if position < 0 else _strangers(field.type, known.field(position).type, name)
    elif pa.types.is_list(got) and pa.types.is_list(known):
        yield from _strangers(got.value_type, known.value_type, path)
    elif got != known:
        yield f"{path} as {got}"


def encode(row: dict[str, Any]) -> bytes:
    """Return one row of CELL as a Parquet file. Errors: ValueError, as `table_of`."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table_of([row], CELL), buffer, store_schema=False, **_PLAIN)  # Parquet's own types say all that the schema says
    return buffer.getvalue().to_pybytes()


def decode(data: bytes, path: Path) -> pa.Table:
    """Return what `encode` encoded, now or in an older version. Errors: StoreError naming `path`."""
    with naming(path, "read"), pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        return align(file.read(use_threads=False), path)


def write_part(path: Path, groups: Iterable[pa.Table]) -> list[str]:
    """Write tables of cells to one file, a row group each, and return their keys. Memory: one table."""
    keys: list[str] = []
    schema = CELL.with_metadata({"part": uuid.uuid4().hex})  # no two parts have the same hash: whoever wrote one may delete it
    with pq.ParquetWriter(path, schema, **_PLAIN) as writer:
        for group in groups:
            writer.write_table(group.cast(schema), row_group_size=len(group))
            keys += group["key"].to_pylist()
    return keys


def row_groups(path: Path) -> Iterator[pa.Table]:
    with naming(path, "read"):
        files.require_regular(path, os.lstat(path))
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                yield align(file.read_row_group(number), path)


def regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of at least GROUP_CELLS rows (the last may have fewer)."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= GROUP_CELLS:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def flatten(tables: list[pa.Table]) -> dict[str, pa.Table]:
    """Return the rows without their nested columns as `cells`, and each nested column as a table with one row per list element and the cell's `key` first.

    `key` is a dictionary column there: a key is held once, not once per layer and query. What can be shared with `tables` is not copied.
    """
    tables = [CELL.empty_table(), *tables]
    rows = pa.concat_tables([table.drop_columns(_NESTED) for table in tables])
    keys = rows["key"].combine_chunks()
    flat: dict[str, list[pa.Table]] = {name: [] for name in _NESTED}
    first_row = 0
    for table in tables:
        for name, exploded in flat.items():
            exploded.append(_explode(table[name], keys, first_row))
        first_row += len(table)
    return {"cells": rows} | {name: pa.concat_tables(exploded) for name, exploded in flat.items()}


def by_kind(measures: pa.Table) -> dict[str, pa.Table]:
    """Return the measures as one table per kind, the two columns that name what was compared called by what they are."""
    names = {"control": ("controls", "cell", "control"), "pair": ("pairs", "cell_a", "cell_b"), "metric": ("metrics", "cell", "version")}
    rest = ["layer", "fold", "metric", "n", "mean", "sd"]
    tables = {}
    for kind, (table, cell, other) in names.items():
        rows = measures.filter(pc.equal(measures["kind"], kind)).select(["key", "name", *rest])
        tables[table] = rows.rename_columns([cell, other, *rest])
    return tables


def _explode(column: pa.ChunkedArray, keys: pa.Array, first_row: int) -> pa.Table:
    lists = column.combine_chunks()
    elements = pc.list_flatten(lists)
    rows = pc.add(pc.list_parent_indices(lists), first_row).cast(pa.int32())
    columns = [pa.DictionaryArray.from_arrays(rows, keys), *elements.flatten()]
    return pa.Table.from_arrays(columns, names=["key", *(field.name for field in elements.type)])
