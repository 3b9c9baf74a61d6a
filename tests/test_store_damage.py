"""The store beside foreign files, and with damaged ones: an error that names the file, never a smaller table."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from iclgd_dist import cells, files, store
from iclgd_dist.store import Store, StoreError, read_results
from iclgd_dist.upkeep import verify
from tests.stores import assert_holds, key, prepared, row


def test_temporary_and_foreign_files_are_no_data(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    folder = made.root / "cells"
    content = cells.encode(row(2))
    for name in (".tmp-old", ".tmp-new", f"{key(2)}.arrows.tmp", f"{key(2)}.arrows~", f".{key(2)}.arrows", "part-0.arrows", "README"):
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    old = files.now(folder) - store.DEBRIS_STALE_SECONDS - 1
    os.utime(folder / ".tmp-old", (old, old))
    os.utime(folder / "README", (old, old))
    for _ in range(2):
        assert made.keys() == {key(1)}
        assert_holds(read_results(made), [row(1)])
        assert made.compact() in (0, 1)
    assert not (folder / ".tmp-old").exists()
    assert (folder / ".tmp-new").exists()
    assert (folder / "README").exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"hello",
    "magic only": lambda data: b"PAR1PAR1",
    "zero page": lambda data: data[:1000] + bytes(1000) + data[2000:],
}


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_by_readers_and_can_be_set_aside(tmp_path: Path, damage: str, is_compacted: bool) -> None:
    made = prepared(tmp_path, row(1))
    made.compact()
    made.commit(row(2))
    if is_compacted:
        made.compact()
    path = made.root / "compacted" / made.manifest().parts[1].file if is_compacted else made.root / "cells" / f"{key(2)}.arrows"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(StoreError, match="verify") as caught:
        read_results(made)
    assert caught.value.filename == str(path)
    assert [error.filename for error in verify(made).damaged] == [str(path)]
    assert path.exists()
    assert len(verify(made, quarantine=True).damaged) == 1
    assert verify(made).damaged == []
    assert made.keys() == {key(1)}
    assert made.commit(row(2))
    assert_holds(read_results(made), [row(1), row(2)])
    assert len(os.listdir(made.root / "set_aside")) == 1


@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_flipped_bit_is_an_error(tmp_path: Path, is_compacted: bool) -> None:
    made = prepared(tmp_path, row(3))
    if is_compacted:
        made.compact()
    path = next((made.root / ("compacted" if is_compacted else "cells")).glob("*.arrows"))
    data, choose = path.read_bytes(), random.Random(1)
    for _ in range(60):
        place = choose.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << choose.randrange(8))]) + data[place + 1 :])
        with pytest.raises(StoreError) as caught:
            read_results(made)
        assert caught.value.filename == str(path)


@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_changed_figure_is_an_error(tmp_path: Path, is_compacted: bool) -> None:
    made = prepared(tmp_path, row(3))
    if is_compacted:
        made.compact()
    path = next((made.root / ("compacted" if is_compacted else "cells")).glob("*.arrows"))
    figure = struct.pack("<d", 3 / 7)
    assert path.read_bytes().count(figure) == 1
    path.write_bytes(path.read_bytes().replace(figure, struct.pack("<d", 4 / 7)))
    with pytest.raises(StoreError, match="damaged") as caught:
        read_results(made)
    assert caught.value.filename == str(path)


def test_a_missing_part_is_an_error_not_a_smaller_table(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    made.compact()
    part = next((made.root / "compacted").glob("part-*"))
    part.unlink()
    with pytest.raises(StoreError, match="missing") as caught:
        read_results(made)
    assert caught.value.filename == str(part)
    assert len(verify(made, quarantine=True).damaged) == 1
    assert made.keys() == set()


def test_a_cell_under_another_cells_name_is_damage(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    (made.root / "cells" / f"{key(1)}.arrows").rename(made.root / "cells" / f"{key(2)}.arrows")
    with pytest.raises(StoreError, match="one cell of its name"):
        read_results(made)


def test_a_manifest_that_is_torn_newer_or_points_elsewhere_is_an_error(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    made.compact()
    path = next((made.root / "compacted").glob("manifest-*"))
    content = json.loads(path.read_text())
    stolen = [content["parts"][0] | {"file": "../../secret.parquet"}]
    flipped = json.dumps(content).replace(content["parts"][0]["sha256"][:8], "0" * 8)
    for text in (flipped, "", "{", "[]", "{}", '{"version": 1, "parts": [{}]}', json.dumps(content | {"parts": stolen}), json.dumps(content | {"version": 4})):
        path.write_text(text)
        for read in (lambda: Store(made.root).keys(), lambda: read_results(made.root)):
            with pytest.raises(StoreError) as caught:
                read()
            assert caught.value.filename == str(path)
    assert "update iclgd" in str(caught.value)


def test_a_pipe_in_a_store_from_elsewhere_is_refused_without_waiting(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    os.mkfifo(made.root / "cells" / f"{key(1)}.parquet")
    with pytest.raises(StoreError, match="not a regular file"):
        read_results(made)
