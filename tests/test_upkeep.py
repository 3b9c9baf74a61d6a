"""Looking after a store: what is wrong is found and told apart, what is forgotten runs again, what is deleted is missed by nobody."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from iclgd_dist import cells, cli, files, manifests, measured, store
from iclgd_dist.files import StoreError
from iclgd_dist.schema import CELL
from iclgd_dist.store import Store, publish, read_results
from iclgd_dist.upkeep import debris, forget, matching, verify
from tests.stores import assert_holds, at, key, prepared, row


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte": flip,
    "a truncated file": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "a zero-length file": lambda path: path.write_bytes(b""),
}


@pytest.fixture
def made(tmp_path: Path) -> Store:
    """Return a store of three compacted and three loose cells, all of them planned, and one cell that is missing."""
    found = prepared(tmp_path, *(row(number) for number in range(3)))
    found.compact()
    for number in range(3, 6):
        assert found.commit(row(number))
    found.save_sweep(digest="0" * 16, resolved={}, keys=[key(number) for number in range(7)])
    return found


def iclgd(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, list(arguments))
    return done.exit_code, done.output


def test_a_whole_store_is_whole_and_what_is_missing_or_extra_is_counted(made: Store) -> None:
    found = verify(made)
    assert found.is_whole and (found.num_cells, found.missing, found.extra) == (6, [key(6)], [])
    assert made.commit(row(8))
    assert verify(made).extra == [key(8)]
    code, said = iclgd("verify", str(made.root))
    assert code == 3 and "1 cell missing" in said and "1 cell asked for by no sweep" in said
    made.save_sweep(digest="1" * 16, resolved={}, keys=[key(8), key(9)], kind="search")
    found = verify(made)
    assert (found.missing, found.extra) == ([key(6)], []), "what a search asked for is not out of place, nor missing where it ended before"
    told = json.loads(iclgd("status", str(made.root), "--json")[1])
    assert (told["planned"], told["missing"], told["extra"]) == (7, 1, 0)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["loose", "compacted", "attempt"])
def test_each_damage_is_found_named_and_quarantined(made: Store, damage: str, place: str) -> None:
    attempt = dict.fromkeys(("num_model_loads", "num_baselines", "num_lanes", "num_training_steps", "num_cells"), 0)
    made.record_attempt(attempt | {"block": "b", "outcome": "done", "created_at": "2026"})
    folder = made.root / {"loose": "cells", "compacted": "compacted", "attempt": "attempts"}[place]
    path = folder / (
        f"{key(4)}.arrows" if place == "loose" else next(n for n in os.listdir(folder) if n.startswith("part") or (n.endswith(".json") and place == "attempt"))
    )
    DAMAGES[damage](path)
    code, said = iclgd("verify", str(made.root))
    assert code == 74 and path.name in said
    found = verify(made, quarantine=True)
    assert [error.filename for error in found.damaged] == [str(path)]
    again = verify(Store(made.root))
    lost = {"loose": {key(4)}, "compacted": {key(0), key(1), key(2)}, "attempt": set()}[place]
    assert again.is_whole and set(again.missing) == lost | {key(6)}
    assert len(os.listdir(made.root / "set_aside")) == 1
    for number in range(6):
        assert made.commit(row(number)) is (key(number) in lost)
    assert_holds(read_results(made), [row(number) for number in range(6)])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_set_aside_and_made_anew_from_the_parts(made: Store, damage: str) -> None:
    for number in (6, 7):
        assert made.commit(row(number))
        made.compact()
    path = made.root / "compacted" / "manifest-00000003.json"
    DAMAGES[damage](path)
    broken = Store(made.root)
    with pytest.raises(StoreError, match="is damaged"):
        broken.keys()
    assert [error.filename for error in verify(broken).damaged] == [str(path)]
    assert [error.filename for error in verify(broken, quarantine=True).damaged] == [str(path)]
    assert_holds(read_results(Store(made.root)), [row(number) for number in range(8)])
    assert verify(Store(made.root)).is_whole
    assert not Store(made.root).commit(row(6)) and Store(made.root).commit(row(9))
    assert Store(made.root).compact() == 1
    assert verify(Store(made.root)).num_cells == 9


def test_a_foreign_file_is_found(made: Store) -> None:
    (made.root / "cells" / "notes.txt").write_text("of a stranger")
    (made.root / "compacted" / "part-1.arrows").write_text("also")
    (made.root / "cells" / f"{key(9)}.arrows").write_bytes((made.root / "cells" / f"{key(4)}.arrows").read_bytes())
    assert len(verify(made).damaged) == 3
    verify(made, quarantine=True)
    assert verify(made).is_whole and made.keys() == {key(number) for number in range(6)}


def test_a_cell_that_is_there_twice_is_found(made: Store) -> None:
    (made.root / "cells" / f"{key(2)}.arrows").write_bytes(cells.encode(row(2, accuracy=0.2)))
    assert verify(made).duplicates == [key(2)]
    code, said = iclgd("verify", str(made.root))
    assert code == 74 and "1 cell there twice" in said
    assert verify(made, quarantine=True).duplicates == [key(2)]
    assert verify(made).is_whole
    assert_holds(read_results(made), [row(number) for number in range(6)])


def test_a_manifest_that_lists_a_cell_in_two_parts_is_damaged_and_made_anew(made: Store) -> None:
    (part,) = made.manifest().parts
    other = made.write_part(
        2, [cells.stored(cells.table_of([row(number, accuracy=0.1) for number in (1, 9)], CELL))], dict.fromkeys((key(1), key(9)), "0" * 16)
    )
    assert publish(*manifests.following(made.root / "compacted", made.manifest().number, [part, other]))
    with pytest.raises(StoreError, match="lists a cell in two parts"):
        read_results(Store(made.root))
    assert len(verify(Store(made.root), quarantine=True).damaged) == 1
    there = {each["key"]: each for each in read_results(Store(made.root)).cells.to_pylist()}
    assert there.keys() == {key(number) for number in (*range(6), 9)} and len(read_results(made).cells) == 7
    assert verify(Store(made.root)).is_whole


def test_a_manifest_that_is_gone_is_noticed_and_its_cells_come_back(made: Store) -> None:
    assert made.commit(row(6)) and made.compact() == 4
    (made.root / "compacted" / "manifest-00000002.json").unlink()
    alone = Store(made.root)
    assert alone.keys() == {key(number) for number in range(3)}, "nothing else says that one is gone"
    (stray,) = verify(alone).damaged
    assert "holds 4 cells that are nowhere else" in str(stray)
    assert alone.commit(row(7)) and alone.compact() == 1, "a compaction deletes no part that it does not know"
    assert not [path for path, _ in debris(alone) if "part-" in path.name]
    assert len(verify(Store(made.root), quarantine=True).damaged) == 1
    assert_holds(read_results(Store(made.root)), [row(number) for number in range(8)])
    assert verify(Store(made.root)).is_whole


def test_of_an_orphan_and_the_part_that_was_meant_the_rebuilt_manifest_loses_no_cell(made: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    at("before_manifest", die, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        made.compact()  # leaves a part that holds 3, 4 and 5
    (orphan,) = (made.root / "compacted").glob("part-00000002-*")
    orphan.rename(orphan.with_name("part-00000002-ffffffffffffffff.arrows"))  # it is looked at before the one that was meant
    assert made.commit(row(6)) and made.compact() == 4
    (made.root / "compacted" / "manifest-00000002.json").write_text("torn")
    assert len(verify(Store(made.root), quarantine=True).damaged) == 1
    assert_holds(read_results(Store(made.root)), [row(number) for number in range(7)])


def test_a_part_of_a_newer_version_is_no_reason_to_drop_it(made: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (made.root / "compacted" / "manifest-00000001.json").write_text("torn")
    real = cells.decode

    def newer(data: object, path: Path) -> object:
        if path.name.startswith("part"):
            raise StoreError("holds columns this version does not know", path, way_out=cells.UPDATE)
        return real(data, path)

    monkeypatch.setattr(cells, "decode", newer)
    with pytest.raises(StoreError, match="update iclgd"):
        verify(Store(made.root), quarantine=True)
    monkeypatch.undo()
    verify(Store(made.root), quarantine=True)
    assert_holds(read_results(Store(made.root)), [row(number) for number in range(6)])


def test_what_is_forgotten_does_not_come_back_from_a_part_that_a_killed_compaction_left(made: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    at("before_manifest", die, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        made.compact()  # leaves a part that holds 3, 4 and 5
    assert forget(made, [key(4)]) == 1
    assert verify(made, quarantine=True).is_whole
    assert made.keys() == {key(number) for number in (0, 1, 2, 3, 5)}


@pytest.mark.parametrize("is_loose", [False, True])
def test_a_compaction_that_was_paused_brings_nothing_forgotten_back(made: Store, monkeypatch: pytest.MonkeyPatch, is_loose: bool) -> None:
    other, gone = Store(made.root), key(4 if is_loose else 1)

    def overtake() -> None:
        (made.root / "compacted" / "lock").unlink()  # as if it had gone stale
        assert forget(other, [gone]) == 1
        assert other.commit(row(4 if is_loose else 1, accuracy=0.25))

    at("before_manifest", overtake, monkeypatch)
    assert made.compact() == 0
    monkeypatch.undo()
    there = {each["key"]: each["accuracy"] for each in read_results(made).cells.to_pylist()}
    assert there[gone] == 0.25 and there.keys() == {key(number) for number in range(6)}
    assert Store(made.root).compact() == 3 + (not is_loose)
    assert {each["key"]: each["accuracy"] for each in read_results(made).cells.to_pylist()}[gone] == 0.25


def test_a_manifest_whose_fate_is_not_known_costs_no_cell(made: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call fails, and what it asked for comes about later: on a network that loses answers."""
    real, late = publish, []

    def lose_the_answer(path: Path, data: bytes) -> bool:
        if path.name.startswith("manifest"):
            late.append((path, data))
            raise StoreError("cannot be written: the answer is lost", path, way_out="check the network")
        return real(path, data)

    monkeypatch.setattr(store, "publish", lose_the_answer)
    with pytest.raises(StoreError, match="the answer is lost"):
        made.compact()
    monkeypatch.undo()
    assert real(*late[0])
    assert Store(made.root).compact() == 0 and Store(made.root).commit(row(6)) and Store(made.root).compact() == 1
    assert_holds(read_results(Store(made.root)), [row(number) for number in range(7)])


def test_a_file_that_cannot_be_opened_hides_no_other_fault(made: Store) -> None:
    os.mkfifo(made.root / "cells" / f"{key(8)}.arrows")
    flip(made.root / "cells" / f"{key(4)}.arrows")
    code, said = iclgd("verify", str(made.root))
    assert code == 74 and key(8) in said and key(4) in said


@pytest.mark.parametrize(
    ("hashed", "old", "new", "what"),
    [
        (True, '"kind"', '"kinder"', "its content is not that of its name"),
        (True, key(3), key(9), "its content is not that of its name"),
        (False, key(3), key(9), "its content is not that of its name"),  # records of older versions have no hash: the keys are in their names
        (False, '"keys": [', '"keys": 1, "resolved": [', "no list of keys"),
    ],
)
def test_a_damaged_sweep_is_named_by_whoever_reads_it(made: Store, hashed: bool, old: str, new: str, what: str) -> None:
    (path,) = (made.root / "sweeps").iterdir()
    said = json.loads(path.read_text())
    text = path.read_text() if hashed else json.dumps({name: value for name, value in said.items() if name != "sha256"})
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(StoreError, match=what) as caught:
        made.sweeps()
    assert caught.value.filename == str(path)
    assert [error.filename for error in verify(made).damaged] == [str(path)]
    verify(made, quarantine=True)
    assert verify(made).is_whole


def test_cells_are_forgotten_with_what_belongs_to_them_and_run_again(made: Store) -> None:
    captures = made.root / "captures"
    captures.mkdir()
    for number in (1, 4, 5):
        (captures / f"{key(number)}.safetensors").write_bytes(b"kept")
    figure = {"kind": "metric", "name": "1", "metric": "mine", "layer": None, "fold": "all", "n": 1, "mean": 0.5, "sd": None}
    measured.commit(made.root, [{"key": key(number), **figure} for number in (1, 2, 4)], reach=lambda point: None)
    keys = matching(made, ["step>=1", "step<5", "kind=finetuned"])
    assert keys == [key(number) for number in (1, 2, 3, 4)]
    code, said = iclgd("forget", str(made.root), "step>=1", "step<5")
    assert code == 0 and "4 cells" in said and "add --yes" in said and len(made.keys()) == 6
    code, said = iclgd("forget", str(made.root), "step>=1", "step<5", "--yes")
    assert code == 0 and "4 cells set aside" in said
    assert Store(made.root).keys() == {key(0), key(5)}
    assert_holds(read_results(made.root), [row(0), row(5)])
    assert os.listdir(captures) == [f"{key(5)}.safetensors"]
    assert len(measured.read(made.root)) == 0
    for number in range(1, 5):
        assert Store(made.root).commit(row(number))
    assert_holds(read_results(made.root), [row(number) for number in range(6)])
    assert verify(Store(made.root)).is_whole


@pytest.mark.parametrize("point", ["mid_write", "before_link", "after_link"])
def test_a_forgetting_that_is_cut_short_loses_nothing_and_is_finished_by_the_next(made: Store, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    at(point, die, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        forget(made, [key(1), key(4)])
    monkeypatch.setattr(store, "fault_point", lambda name: None)
    left = read_results(Store(made.root)).cells["key"].to_pylist()
    assert len(left) == len(set(left)) and set(left) >= {key(number) for number in (0, 2, 3, 5)}
    assert forget(Store(made.root), [key(1), key(4)]) == 2
    assert_holds(read_results(Store(made.root)), [row(number) for number in (0, 2, 3, 5)])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("method", "is no condition; write column=value"),
        ("methd=vanilla", "cells have no column 'methd'; did you mean 'method'?"),
        ("learning_rate=fast", "learning_rate is double, got 'fast'"),
        ("prediction_counts=1", "prediction_counts is a list; choose another column"),
    ],
)
def test_a_condition_that_is_none_says_what_is_meant(made: Store, condition: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".*") as caught:
        matching(made, [condition])
    assert message in str(caught.value)


def test_null_fits_no_condition(made: Store) -> None:
    assert made.commit(row(6, learning_rate=0.5))
    assert matching(made, ["learning_rate=0.5"]) == [key(6)]
    assert matching(made, ["learning_rate!=0.5"]) == []


def test_a_store_that_is_being_compacted_is_not_changed_under_it(made: Store) -> None:
    (made.root / "compacted" / "lock").write_text('{"host": "elsewhere", "pid": 1}')
    with pytest.raises(StoreError, match="is being compacted"):
        forget(made, [key(1)])


def test_only_what_nothing_needs_is_deleted(made: Store) -> None:
    rows = [row(number) for number in range(6)]
    old = files.now(made.root) - store.DEBRIS_STALE_SECONDS - 1
    (made.root / "captures").mkdir()
    dead = [
        made.root / "cells" / ".tmp-1",
        made.root / "compacted" / f"part-00000009-{'0' * 16}.arrows",
        made.root / "claims" / "ab",
        made.root / "captures" / f"{key(77)}.safetensors",
    ]
    fresh = [made.root / "cells" / ".tmp-2", made.root / "captures" / f"{key(78)}.safetensors", made.root / "captures" / f"{key(1)}.safetensors"]
    for path in (*dead, *fresh):
        path.write_bytes(b"x")
    for path in (*dead, fresh[-1]):
        os.utime(path, (old, old))
    forget(made, [key(4)])
    found = {path for path, _ in debris(made)}
    aside = {made.root / "set_aside" / name for name in os.listdir(made.root / "set_aside")}
    assert found == set(dead) | aside
    code, said = iclgd("gc", str(made.root))
    assert code == 0 and "would be deleted" in said and dead[0].exists()
    code, said = iclgd("gc", str(made.root), "--yes")
    assert code == 0 and not any(path.exists() for path in found) and all(path.exists() for path in fresh)
    assert_holds(read_results(made.root), [each for number, each in enumerate(rows) if number != 4])
