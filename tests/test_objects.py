"""The store in a bucket: the promises of test_store*.py on a real S3 server, and what goes wrong between."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from iclgd_dist import files, locks, objects
from iclgd_dist.files import StoreError, Vanished
from iclgd_dist.objects import ObjectPath
from iclgd_dist.store import Store, read_results
from iclgd_dist.upkeep import forget, matching, verify
from tests.stores import assert_holds, at, key, row, run_python


def prepared(bucket: str, *rows: dict[str, Any]) -> Store:
    made = Store(bucket)
    made.prepare()
    for each in rows:
        assert made.commit(each)
    return made


def test_cells_are_committed_read_compacted_and_read_again(bucket: str) -> None:
    rows = [row(number) for number in range(7)]
    made = prepared(bucket, *rows[:4])
    assert_holds(read_results(bucket), rows[:4])
    assert made.compact() == 4
    assert files.names_in(made.root / "cells") == []
    for each in rows[4:]:
        assert made.commit(each)
    assert not made.commit(rows[0]), "it is in a part"
    assert not made.commit(rows[5]), "it is loose"
    assert_holds(read_results(bucket), rows)
    assert Store(bucket).keys() == {each["key"] for each in rows}
    assert verify(made).is_whole


def test_a_new_store_is_empty_and_prefixes_are_apart(bucket: str) -> None:
    assert Store(bucket).keys() == set()
    with pytest.raises(StoreError, match="is not a store"):
        read_results(bucket)
    prepared(bucket + "-too", row(1))
    assert Store(bucket).keys() == set() and not files.is_folder(Store(bucket).root)


def test_of_processes_that_commit_a_cell_at_once_exactly_one_is_told_that_it_did(bucket: str) -> None:
    made = prepared(bucket)
    code = """
        made = store.Store(sys.argv[1])
        made.keys()
        print("ready", flush=True)
        while not files.names_in(made.root / "go"):
            time.sleep(0.001)
        print("".join("1" if made.commit(row(number, host=sys.argv[2])) else "0" for number in range(10)))
    """
    both = [run_python(code, bucket, name) for name in ("a", "b")]
    for process in both:
        assert process.stdout and process.stdout.readline() == "ready\n"
    (made.root / "go" / "now").put(b"")
    told = [process.communicate()[0].strip() for process in both]
    assert [int(a) + int(b) for a, b in zip(*told, strict=True)] == [1] * 10
    hosts = {each["key"]: each["host"] for each in read_results(made).cells.to_pylist()}
    assert [hosts[key(number)] for number in range(10)] == ["a" if flag == "1" else "b" for flag in told[0]]


@pytest.mark.parametrize("point", ["before_link", "after_link"])
def test_a_writer_killed_around_a_commit_leaves_a_whole_cell_or_none(bucket: str, point: str) -> None:
    code = """
        made = store.Store(sys.argv[1])
        made.prepare()
        made.commit(row(1))
        store.fault_point = lambda name: os._exit(7) if name == sys.argv[2] else None
        made.commit(row(2))
    """
    assert run_python(code, bucket, point).wait() == 7
    made, rows = Store(bucket), [row(1), row(2)]
    assert_holds(read_results(made), rows if point == "after_link" else rows[:1])
    assert made.commit(row(2)) is (point == "before_link")
    assert_holds(read_results(made), rows)


def test_of_two_compactions_at_once_one_counts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(bucket, row(1), row(2))

    def overtake() -> None:
        files.remove(made.root / "compacted" / "lock")  # as if it had gone stale
        assert Store(bucket).compact() == 2

    at("before_manifest", overtake, monkeypatch)
    assert made.compact() == 0
    assert_holds(read_results(made), [row(1), row(2)])
    assert len([name for name in files.names_in(made.root / "compacted") if name.startswith("part")]) == 1


def test_an_answer_that_was_lost_is_no_loss(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks again: then the object is there, and it is ours."""
    path, real, answers = Store(bucket).root / "cells" / "one", objects._client().put, []

    def put(*arguments: Any, **options: Any) -> Any:
        answers.append(real(*arguments, **options))
        return real(*arguments, **options)

    monkeypatch.setattr(objects._client(), "put", put)
    assert path.create(b"mine")
    assert len(answers) == 1
    assert not path.create(b"another's")
    assert files.read(path) == b"mine"


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_put_whose_fate_is_not_known_is_asked_again(bucket: str, monkeypatch: pytest.MonkeyPatch, is_stored: bool) -> None:
    """The client does not ask again by itself: it cannot know whether the first one came through."""
    path, real, calls = Store(bucket).root / "cells" / "one", objects._client().put, []

    def put(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            if is_stored:
                real(*arguments, **options)
            raise objects._client().exceptions.GenericError("operation timed out")
        return real(*arguments, **options)

    monkeypatch.setattr(objects._client(), "put", put)
    monkeypatch.setattr(objects, "PAUSES", (0.0, 0.0))
    assert path.create(b"mine") and len(calls) == 2
    assert files.read(path) == b"mine" and not path.create(b"another's")


def test_a_conflict_with_a_delete_is_asked_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers as if the object were there; it is not."""
    path, real, calls = Store(bucket).root / "cells" / "one", objects._client().put, []

    def put(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise objects._client().exceptions.AlreadyExistsError("409 ConditionalRequestConflict")
        return real(*arguments, **options)

    monkeypatch.setattr(objects._client(), "put", put)
    monkeypatch.setattr(objects, "PAUSES", (0.0, 0.0))
    assert path.create(b"mine") and files.read(path) == b"mine"


def test_a_live_lock_is_respected_and_a_stale_one_is_not(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Store(bucket).root / "compacted" / "lock"
    first = locks.acquire(path)
    assert first and locks.acquire(path) is None
    first.touch()
    first.release()
    path.put(b'{"host": "elsewhere", "pid": 1}')
    assert locks.acquire(path) is None and locks.is_held(path)
    second = locks.acquire(path, stale_seconds=0.0)
    assert second and files.read(path) == second.note
    with ThreadPoolExecutor(4) as pool:
        second.release()
        assert sum(lock is not None for lock in pool.map(lambda _: locks.acquire(path), range(4))) == 1


def test_damage_is_found_and_set_aside(bucket: str) -> None:
    made = prepared(bucket, row(1), row(2))
    made.compact()
    assert made.commit(row(3)) and made.commit(row(4))
    (made.root / "cells" / f"{key(3)}.arrows").put(b"")
    (made.root / "cells" / "notes.txt").put(b"of a stranger")
    part = made.root / "compacted" / made.manifest().parts[0].file
    data = bytearray(files.read(part))
    data[len(data) // 2] ^= 1
    part.put(bytes(data))
    assert {error.filename.rpartition("/")[2] for error in verify(made).damaged} == {f"{key(3)}.arrows", "notes.txt", part.name}
    assert len(verify(made, quarantine=True).damaged) == 3
    assert verify(made).is_whole and made.keys() == {key(4)}
    assert len(files.names_in(made.root / "set_aside")) == 3


def test_cells_are_forgotten_and_run_again(bucket: str) -> None:
    made = prepared(bucket, *(row(number) for number in range(4)))
    made.compact()
    assert made.commit(row(4)) and made.commit(row(5))
    assert forget(made, matching(made, ["step>=3", "step<5"])) == 2
    assert made.keys() == {key(number) for number in (0, 1, 2, 5)}
    assert made.commit(row(3)) and made.commit(row(4))
    assert_holds(read_results(made), [row(number) for number in range(6)])


def test_what_cannot_be_reached_is_one_clear_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    before = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://nowhere/x.*cannot be .*check the address") as caught:
        Store("s3://nowhere/x").prepare()
    assert time.monotonic() - before < 30
    assert "canary-secret" not in str(caught.value)
    with pytest.raises(ValueError, match=r"ftp://a/b: is no store; give a directory, s3://"):
        Store("ftp://a/b")


def test_a_missing_bucket_and_a_missing_object_are_told_apart(bucket: str) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        Store(bucket.replace("s3://b", "s3://c")).prepare()
    with pytest.raises(Vanished):
        files.read(Store(bucket).root / "cells" / "none")


def test_a_store_that_does_not_keep_the_first_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(self: ObjectPath, data: bytes) -> bool:
        self.put(data)
        return True

    monkeypatch.setattr(ObjectPath, "create", overwrite)
    with pytest.raises(StoreError, match="does not keep the first"):
        Store(bucket).prepare()


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    objects._bucket.cache_clear()
    with pytest.raises(StoreError, match=r"pip install 'iclgd-dist\[objects\]'"):
        Store("s3://bucket/x")
