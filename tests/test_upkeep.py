"""Looking after a store: what is wrong is found and told apart, what is forgotten runs again, what is deleted is missed by nobody."""

from __future__ import annotations

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


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["loose", "compacted", "attempt"])
def test_each_damage_is_found_named_and_quarantined(made: Store, damage: str, place: str) -> None:
    attempt = dict.fromkeys(("num_model_loads", "num_baselines", "num_lanes", "num_training_steps", "num_cells"), 0)
    made.record_attempt(attempt | {"block": "b", "outcome": "done", "created_at": "2026"})
    folder = made.root / {"loose": "cells", "compacted": "compacted", "attempt": "attempts"}[place]
    path = folder / (
        f"{key(4)}.arrows" if place == "loose" else next(n for n in os.listdir(folder) if n.startswith("part") or (n.endswith(".json") and place == "attempt"))
    )
    if (damage, place) == ("a flipped byte", "attempt"):
        path.write_bytes(b"[]")
    else:
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
    DAMAGES[damage](path) if damage != "a flipped byte" else path.write_text("[]")
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
    (part,) = made.manifest().parts
    other = made.write_part(2, [cells.stored(cells.table_of([row(1, accuracy=0.1)], CELL))], {key(1): "0" * 16})
    assert publish(*manifests.following(made.root / "compacted", made.manifest().number, [part, other]))
    (made.root / "cells" / f"{key(2)}.arrows").write_bytes(cells.encode(row(2, accuracy=0.2)))
    assert sorted(verify(made).duplicates) == [key(1), key(2)]
    code, said = iclgd("verify", str(made.root))
    assert code == 74 and "2 cells there twice" in said


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
