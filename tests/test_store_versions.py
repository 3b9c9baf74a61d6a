"""Files of older and newer versions of the store."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iclgd_dist import cells, store
from iclgd_dist.schema import CELL
from iclgd_dist.store import StoreError, read_results
from iclgd_dist.upkeep import verify
from tests.stores import assert_holds, key, prepared, row


def without(kind: pa.DataType, name: str) -> pa.DataType:
    return pa.list_(pa.struct([field for field in kind.value_type if field.name != name]))


def write_as(path: Path, schema: pa.Schema, *rows: dict[str, Any]) -> None:
    """Write rows as a version with this schema would: Parquet with one column of measures, or a stream in which each kind has a column."""
    if path.suffix == ".arrows":
        kinds = {name: [m for m in rows[0].get("measures") or [] if f"{m['kind']}s" == name] for name in ("controls", "pairs", "metrics")}
        schema = pa.schema([field for field in schema if field.name != "measures"] + [field for field in cells.STORED if field.name in kinds])
        table = pa.Table.from_pylist([each | kinds for each in rows], schema=schema)
        path.write_bytes(b"".join(cells._messages(schema, [table])))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrows"])
@pytest.mark.parametrize("is_compacted", [False, True])
def test_files_of_an_older_version_read_with_null_for_what_it_did_not_know(tmp_path: Path, is_compacted: bool, suffix: str) -> None:
    made = prepared(tmp_path, row(1))
    old = pa.schema(
        [
            pa.field(
                field.name,
                without(field.type, "sim_aou") if field.name == "layers" else without(field.type, "fold") if field.name == "examples" else field.type,
            )
            for field in CELL
            if field.name != "accuracy"
        ]
    )
    write_as(made.root / "cells" / f"{key(2)}{suffix}", old, row(2))
    write_as(made.root / "cells" / f"{key(3)}{suffix}", old, row(3, layers=None))
    if is_compacted:
        assert made.compact() == 3
    expected = [row(2), row(3, layers=None)]
    for each in expected:
        del each["accuracy"]
        each["layers"] = each["layers"] and [{name: value for name, value in layer.items() if name != "sim_aou"} for layer in each["layers"]]
        each["examples"] = [{name: value for name, value in example.items() if name != "fold"} for example in each["examples"]]
    assert_holds(read_results(made), [row(1), *expected])


def test_a_part_of_an_older_version_is_read_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = pa.schema(
        [pa.field(field.name, without(field.type, "noise_floor") if field.name == "layers" else field.type) for field in CELL if field.name != "peak_gib"]
    )
    made = prepared(tmp_path)
    part = made.root / "compacted" / f"part-00000001-{'0' * 16}.parquet"
    write_as(part, old, row(1), row(2))
    listed = {"file": part.name, "sha256": hashlib.sha256(part.read_bytes()).hexdigest(), "commits": {key(1): "1" * 16, key(2): "2" * 16}}
    (part.parent / "manifest-00000001.json").write_text(json.dumps({"version": 1, "parts": [listed]}))
    assert made.keys() == {key(1), key(2)}
    assert_holds(read_results(made), [row(1), row(2)])
    assert verify(made).damaged == []
    monkeypatch.setattr(store, "MAX_SMALL_PARTS", 1)
    made.commit(row(3))
    assert made.compact() == 1
    assert not part.exists()
    assert_holds(read_results(made), [row(1), row(2), row(3)])


def test_a_cell_that_an_older_version_wrote_is_there(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    for number in (1, 2):  # the first at the same time as this version
        write_as(made.root / "cells" / f"{key(number)}.parquet", CELL, row(number))
    assert key(2) in made
    assert not made.commit(row(2, accuracy=0.5))
    assert made.keys() == {key(1), key(2)}
    assert_holds(read_results(made), [row(1), row(2)])
    assert made.compact() == 2
    assert os.listdir(made.root / "cells") == []
    assert_holds(read_results(made), [row(1), row(2)])


@pytest.mark.parametrize("is_mapped", [True, False])
def test_what_was_read_stays_when_its_file_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mapped: bool) -> None:
    made = prepared(tmp_path, row(1), row(2))
    made.compact()
    mapped = []
    real = pa.memory_map
    monkeypatch.setattr(pa, "memory_map", lambda path: (mapped.append(path), real(path))[1])
    monkeypatch.setattr(os, "major", lambda device: 8 if is_mapped else 0)  # 0: no disk of this machine
    results = read_results(made)
    (part,) = (made.root / "compacted").glob("part-*")
    assert mapped == [str(part)] * is_mapped
    part.unlink()
    assert_holds(results, [row(1), row(2)])


@pytest.mark.parametrize("suffix", [".parquet", ".arrows"])
@pytest.mark.parametrize("where", ["row", "layers", "type"])
def test_files_of_a_newer_version_are_refused_with_the_advice_to_update_and_never_set_aside(tmp_path: Path, where: str, suffix: str) -> None:
    made = prepared(tmp_path)
    newer = CELL.append(pa.field("surprise", pa.float64()))
    if where == "layers":
        longer = pa.list_(pa.struct([*CELL.field("layers").type.value_type, pa.field("surprise", pa.float64())]))
        newer = CELL.set(CELL.get_field_index("layers"), pa.field("layers", longer))
    if where == "type":
        newer = CELL.set(CELL.get_field_index("step"), pa.field("step", pa.float64()))
    write_as(made.root / "cells" / f"{key(2)}{suffix}", newer, row(2))
    with pytest.raises(StoreError, match="step as double" if where == "type" else "surprise") as caught:
        read_results(made)
    assert "update iclgd" in str(caught.value)
    assert key(2) in str(caught.value)
    with pytest.raises(StoreError, match="update iclgd"):
        made.compact()
    assert len(verify(made, quarantine=True).damaged) == 1
    assert made.keys() == {key(2)}
