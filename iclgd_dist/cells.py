"""Cells as Arrow tables: check and encode a row, decode and align files of any version, explode nested lists. Knows the schema and formats, no directories.

A file is an Arrow stream and its checksum. It is read without decoding: its tables are views of its bytes. (The same numbers as nested Parquet take half the
disk and ten times as long to read.) Older versions wrote Parquet, which is read too.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from xxhash import xxh3_64

from iclgd_dist.files import Location, StoreError, naming
from iclgd_dist.schema import CELL, MEASURE

GROUP_CELLS = 1_000  # cells per batch: what is held in memory while a part is written
SUFFIX, OLDER_SUFFIX = ".arrows", ".parquet"
KINDS = {"control": "controls", "pair": "pairs", "metric": "metrics", "extra": "extras"}  # of measures
UPDATE = "update iclgd to the version that wrote it, or a later one"
_COMPARED = {"control": ("cell", "control"), "pair": ("cell_a", "cell_b"), "metric": ("cell", "version"), "extra": ("cell", "group")}
_MEASURED = [name for name, _, _ in MEASURE if name != "kind"]
_MEASURES = pa.list_(pa.struct([(name, kind) for name, kind, _ in MEASURE if name != "kind"]))
# A cell as it lies in a file: the columns of CELL, the measures of each kind in a column of their own, so that no reader has to tell them apart.
STORED = pa.schema([*(pa.field(f.name, f.type) for f in CELL if f.name != "measures"), *((name, _MEASURES) for name in KINDS.values())])
_NESTED = ["folds", "layers", "examples", *KINDS.values()]
_CHECKSUM_BYTES = xxh3_64().digest_size
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


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


def align(table: pa.Table, schema: pa.Schema, path: Location) -> pa.Table:
    """Return `table` with the columns of `schema`: those an older version did not write are NULL; those of a newer version are an error."""
    if table.schema.equals(schema):
        return table
    if strangers := list(_strangers(pa.struct(list(table.schema)), pa.struct(list(schema)), "")):
        raise StoreError(f"holds columns this version does not know: {', '.join(strangers[:5])}", path, way_out=UPDATE)
    with naming(path, "read"):
        columns = [table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in schema]
        return pa.Table.from_arrays(columns, names=schema.names).cast(schema)


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


def stored(table: pa.Table) -> pa.Table:
    """Return a table of CELL as one of STORED: the measures of each cell in a list for each kind."""
    lists = _whole(table["measures"])
    elements, rows = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
    kinds, inner = pc.struct_field(elements, "kind"), [pc.struct_field(elements, name) for name in _MEASURED]
    columns = [table[name] for name in STORED.names[: -len(KINDS)]]
    for kind, name in KINDS.items():
        mask = pc.fill_null(pc.equal(kinds, kind), False)
        ends = np.searchsorted(rows[mask.to_numpy(zero_copy_only=False)], np.arange(len(table) + 1))
        items = STORED.field(name).type.value_type
        structs = pa.StructArray.from_arrays([column.filter(mask) for column in inner], fields=list(items))
        columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs))
    return pa.Table.from_arrays(columns, schema=STORED)


def _messages(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[pa.Buffer | bytes]:
    """Yield the parts of a file: an Arrow stream with a batch for each table, then its checksum, which readers of Arrow streams do not look at."""
    checksum = xxh3_64()
    for message in chain([schema.serialize()], (batch.serialize() for table in tables for batch in table.combine_chunks().to_batches()), [_END]):
        checksum.update(message)
        yield message
    yield checksum.digest()


def encode(row: dict[str, Any]) -> bytes:
    """Return one row of CELL as a file. Errors: ValueError, as `table_of`."""
    return b"".join(_messages(STORED, [stored(table_of([row], CELL))]))


def write_part(path: Path, groups: Iterable[pa.Table]) -> list[str]:
    """Write tables of STORED to one file, a batch each, and return their keys. Memory: two tables."""
    keys: list[str] = []

    def noted() -> Iterator[pa.Table]:
        for group in groups:
            keys.extend(group["key"].to_pylist())
            yield group

    # No two parts have the same hash: whoever wrote one may delete it.
    with open(path, "wb") as file:
        for message in _messages(STORED.with_metadata({"part": uuid.uuid4().hex}), noted()):
            file.write(message)
    return keys


def decode(data: pa.Buffer | bytes, path: Location) -> list[pa.Table]:
    """Return what `encode` or `write_part` wrote, now or in an older version, as tables of STORED that share the memory of `data`.

    Errors: StoreError naming `path`.
    """
    with naming(path, "read"):
        if path.suffix == OLDER_SUFFIX:
            with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as old:
                return [stored(align(old.read_row_group(number), CELL, path)) for number in range(old.num_row_groups)]
        whole = memoryview(data)
        stream, checksum = whole[:-_CHECKSUM_BYTES], whole[-_CHECKSUM_BYTES:]
        if xxh3_64(stream).digest() != bytes(checksum):
            raise ValueError("its checksum is not that of its content")
        with pa.ipc.open_stream(pa.BufferReader(stream)) as reader:
            tables = [pa.Table.from_batches([batch]).replace_schema_metadata() for batch in reader]
        for table in tables:
            table.validate(full=True)
        return [align(table, STORED, path) for table in tables]


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
    tables = [STORED.empty_table(), *tables]
    described = CELL.empty_table().select(STORED.names[: -len(_NESTED)])
    rows = pa.concat_tables([described, *(table.drop_columns(_NESTED) for table in tables)])
    keys = rows["key"].combine_chunks()
    first_rows = accumulate(map(len, tables), initial=0)
    with ThreadPoolExecutor() as pool:
        exploded = list(pool.map(lambda table, first: [_explode(table[name], keys, first) for name in _NESTED], tables, first_rows))
    flat = {name: pa.concat_tables(parts) for name, parts in zip(_NESTED, zip(*exploded, strict=True), strict=True)}
    return {"cells": rows} | flat


def named(kind: str, measures: pa.Table) -> pa.Table:
    """Return measures of one kind with the two columns that name what was compared called by what they are."""
    rest = ["layer", "fold", "metric", "n", "mean", "sd"]
    return measures.select(["key", "name", *rest]).rename_columns([*_COMPARED[kind], *rest])


def _explode(column: pa.ChunkedArray, keys: pa.Array, first_row: int) -> pa.Table:
    lists = _whole(column)
    elements = pc.list_flatten(lists)
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    rows = np.repeat(np.arange(first_row, first_row + len(lists), dtype=np.int32), lengths)
    columns = [pa.DictionaryArray.from_arrays(rows, keys, safe=False), *elements.flatten()]
    return pa.Table.from_arrays(columns, names=["key", *(field.name for field in elements.type)])


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
