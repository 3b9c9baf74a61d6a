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
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclgd_dist import files
from iclgd_dist.background import background
from iclgd_dist.files import Location
from iclgd_dist.store_errors import StoreError, Vanished, naming

STALE_SECONDS = 600.0  # by the clock of the store


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    path: Location
    note: bytes

    def touch(self) -> None:
        """Say that the holder lives. Where the lock was taken over meanwhile, the work of whoever commits first counts."""
        with contextlib.suppress(FileNotFoundError, Vanished):
            if files.read(self.path) == self.note:
                files.touch(self.path, self.note)

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
    note = json.dumps(here() | {"pid": os.getpid(), "time": time.time(), "owner": owner, "lock": uuid.uuid4().hex}).encode()
    for _ in range(2):
        if _create(path, note):
            return Lock(path, note)
        with contextlib.suppress(Vanished):  # given back meanwhile
            if not _is_free(path, owner, stale_seconds):
                return None
            _steal(path)
    return None


def is_held(path: Location, *, owner: str = "", stale_seconds: float = STALE_SECONDS) -> bool:
    """Say whether somebody who lives, other than `owner`, holds a lock."""
    try:
        return not _is_free(path, owner, stale_seconds)
    except Vanished:
        return False


@contextlib.contextmanager
def touched(locks: list[Lock], *, every_seconds: float = STALE_SECONDS / 10, lives: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Touch locks in the background while the block runs and `lives` holds, and give them back after it. More may be added to the list meanwhile."""

    def touch(ended: threading.Event) -> None:
        while not ended.wait(every_seconds):
            for lock in list(locks) if lives() else ():
                with contextlib.suppress(StoreError, OSError):  # whoever writes results meets the same trouble, and tells of it
                    lock.touch()

    try:
        with background(touch):
            yield
    finally:
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
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)
    return True


def here() -> dict[str, Any]:
    """Return where a process id means something: on this machine, in this container."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return {"host": socket.gethostname(), "space": space}


def _holder(path: Location) -> dict[str, Any]:
    """Return what the holder says of itself; nothing where its note is torn."""
    try:
        said = json.loads(files.read(path))
    except (StoreError, ValueError, RecursionError):
        said = None
    return said if isinstance(said, dict) else {}


def _is_free(path: Location, owner: str, stale_seconds: float) -> bool:
    holder = _holder(path)
    if files.now(path.parent) - files.modified(path) >= stale_seconds or (owner and holder.get("owner") == owner):
        return True
    try:
        if here().items() <= holder.items():
            os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # somebody else's process, or a strange note: its age decides
        pass
    return False


def _steal(path: Location) -> None:
    """Take a stale lock away. Who looked before that and comes after it takes the new one away: then two hold it, which is allowed."""
    if not isinstance(path, Path):
        files.remove(path)
        return
    stolen = files.temporary_in(path.parent)
    with naming(path, "taken over"), contextlib.suppress(FileNotFoundError):
        os.rename(path, stolen)  # of several that come at once, it lets one through
        os.unlink(stolen)
