"""Advisory locks: a file made only where there is none, touched while it is held. Knows locations and clocks; knows nothing of what is locked.

Two may hold the same lock, one of them having been paused: a lock may spare work, correctness must not rest on it. (flock is unreliable on NFS, and a
bucket has none.)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclgd_dist import files
from iclgd_dist.files import Location
from iclgd_dist.store_errors import StoreError, Vanished, naming

STALE_SECONDS = 600.0  # by the clock of the store


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    path: Location
    note: bytes
    num_deaths: int = 0  # of holders of the same name that did not give it back

    def touch(self) -> None:
        """Say that the holder lives. Where the lock was taken over meanwhile, the work of whoever commits first counts."""
        with contextlib.suppress(FileNotFoundError, Vanished):
            if isinstance(self.path, Path):
                os.utime(self.path)
            elif files.read(self.path) == self.note:
                self.path.put(self.note)

    def release(self) -> None:
        """Give the lock back; one that was taken over stays."""
        with contextlib.suppress(FileNotFoundError, Vanished, StoreError):
            if files.read(self.path) == self.note:
                files.remove(self.path)


def acquire(path: Location, *, owner: str = "", stale_seconds: float = STALE_SECONDS) -> Lock | None:
    """Take a lock, or return None while its holder lives.

    A holder that has not touched it for `stale_seconds` is taken to be gone, and so is a process of this machine that ended, and whoever has the same `owner`:
    it asks again because its earlier self died.
    """
    num_deaths = 0
    for _ in range(2):
        said = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "owner": owner, "deaths": num_deaths}
        note = json.dumps(said).encode()
        if _create(path, note):
            return Lock(path, note, num_deaths)
        try:
            holder = _holder(path)
            if not _is_free(path, holder, owner, stale_seconds):
                return None
            num_deaths = int(holder.get("deaths", 0)) + 1 if owner and holder.get("owner") == owner else 0
            _steal(path)
        except (FileNotFoundError, Vanished):
            pass  # given back meanwhile
    return None


def is_held(path: Location, *, stale_seconds: float = STALE_SECONDS) -> bool:
    """Say whether somebody who lives holds a lock."""
    try:
        return not _is_free(path, _holder(path), "", stale_seconds)
    except (FileNotFoundError, Vanished):
        return False


@contextlib.contextmanager
def touched(locks: Sequence[Lock], *, every_seconds: float = STALE_SECONDS / 10) -> Iterator[None]:
    """Touch locks in the background while the block runs, and give them back after it."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(every_seconds):
            for lock in locks:
                with contextlib.suppress(StoreError, OSError):  # whoever writes results meets the same trouble, and tells of it
                    lock.touch()

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for lock in locks:
            lock.release()


def _create(path: Location, note: bytes) -> bool:
    if not isinstance(path, Path):
        return path.create(note)
    with naming(path, "written"):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, note)
        finally:
            os.close(descriptor)
    return True


def _holder(path: Location) -> dict[str, Any]:
    """Return what the holder says of itself; nothing where its note is torn."""
    try:
        said = json.loads(files.read(path))
    except (StoreError, ValueError):
        said = None
    return said if isinstance(said, dict) else {}


def _is_free(path: Location, holder: dict[str, Any], owner: str, stale_seconds: float) -> bool:
    if files.now(path.parent) - files.modified(path) >= stale_seconds or (owner and holder.get("owner") == owner):
        return True
    try:
        if holder.get("host") == socket.gethostname():
            os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # somebody else's process, or a strange note: its age decides
        pass
    return False


def _steal(path: Location) -> None:
    if not isinstance(path, Path):
        files.remove(path)  # of two that find it stale at once, both may get it
        return
    stolen = files.temporary_in(path.parent)
    with naming(path, "taken over"), contextlib.suppress(FileNotFoundError):
        os.rename(path, stolen)  # of several that find it stale, the rename lets one through
        os.unlink(stolen)
