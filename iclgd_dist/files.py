"""Files that appear whole or not at all, first writer first. Knows local and NFS directories; knows nothing of cells or tables.

Everything the store promises rests on `publish`: create this name with these bytes unless it exists. Here: temporary file, fsync, hard link, fsync of the
directory; a variant for an object store would use a conditional put and replace this module only. Where hard links are missing, the file goes into a directory that
is renamed to the final name: a rename onto a directory that holds something fails, so the first writer still wins. (Creating the final name with O_EXCL would show
half a file; renaming a file would replace the first one.) Windows is not supported.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

LOCK_STALE_SECONDS = 600  # by the clock of the directory
_INNER = "content"  # the file in the directory that stands for a file where hard links are missing
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
_AGAIN = "then run the same command again: finished cells are kept"
_DAMAGED = "`iclgd verify` lists damaged files and can set them aside, so that their cells run again"
_WAY_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free space, {_AGAIN}"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a directory that this user can write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "choose a directory for the store, not a file"),
    errno.ENOENT: "check the path and that the disk is mounted; `iclgd run` makes a new store",
}


class StoreError(OSError):
    """The store cannot be read or written; names the file and the way out. The command line prints it and exits with 74."""

    def __init__(self, what: str, path: str | Path, errno: int | None = None, way_out: str = _DAMAGED) -> None:
        super().__init__(errno, what, str(path))
        self.way_out = way_out

    @property
    def is_damage(self) -> bool:
        """Whether the file's content is at fault, not the disk, the permissions or this version's age."""
        return self.way_out == _DAMAGED

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreError, (self.strerror, self.filename, self.errno, self.way_out)

    def __str__(self) -> str:
        code = f" ({errno.errorcode.get(self.errno, self.errno)})" if self.errno else ""
        return f"{self.filename}: {self.strerror}{code}; {self.way_out}"


class Vanished(Exception):
    """A file that was listed is gone: a compaction ran in between."""


@contextlib.contextmanager
def naming(path: Path, verb: str) -> Iterator[None]:
    """Turn what goes wrong inside into a StoreError that names `path`. With verb "read" a file that is gone is `Vanished`, one that cannot be decoded damaged."""
    try:
        yield
    except (StoreError, MemoryError):
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        code = error.errno if isinstance(error, OSError) else None
        if verb == "read" and code in (errno.ENOENT, errno.ESTALE):
            raise Vanished(str(path)) from error
        if code is not None:
            raise StoreError(f"cannot be {verb}: {os.strerror(code)}", path, code, _WAY_OUT.get(code, f"check the disk, {_AGAIN}")) from error
        if verb != "read":
            raise
        raise StoreError(f"is damaged: {(str(error).splitlines() or [type(error).__name__])[0][:200]}", path) from error


def names_in(folder: Path) -> list[str]:
    """Return the names in a directory; a missing one is empty."""
    try:
        with naming(folder, "read"):
            return os.listdir(folder)
    except Vanished:
        return []


def read(path: Path) -> bytes:
    """Return what `publish` wrote. Errors: Vanished; StoreError."""
    with naming(path, "read"):
        if path.is_dir():
            path = path / _INNER
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in a store from elsewhere must not hang us
        with open(descriptor, "rb") as file:
            require_regular(path, os.fstat(descriptor))
            return file.read()


def contents(path: Path) -> pa.Buffer:
    """Return a file that is never written again: mapped, or read where a map could break.

    Over a network a file that another machine deletes is gone under a map, which ends the process. What no disk of this machine holds is read therefore.
    Errors: Vanished; StoreError.
    """
    with naming(path, "read"):
        status = os.lstat(path)
        require_regular(path, status)
        if os.major(status.st_dev) == 0 or not status.st_size:
            return pa.py_buffer(path.read_bytes())
        with pa.memory_map(str(path)) as file:
            return file.read_buffer()


def require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise StoreError("is not a regular file", path)


def publish(path: Path, data: bytes, *, reach: Callable[[str], None]) -> bool:
    """Create `path` with `data` unless it exists: whole or not at all, and on disk on return. Returns True if this call created it.

    `reach` is told the points at which tests let the process die.
    """
    temporary, view = temporary_in(path.parent), memoryview(data)
    with naming(path, "written"):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(descriptor, view[: len(data) // 2])
                reach("mid_write")
                _write_all(descriptor, view[len(data) // 2 :])
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            reach("before_link")
            is_created = _link(temporary, path)
            reach("after_link")
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        sync_folder(path.parent)
    return is_created


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # an NFS server may have made the link and lost the answer
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    folder = temporary.with_name(temporary.name + "-folder")
    os.mkdir(folder)
    try:
        os.rename(temporary, folder / _INNER)
        sync_folder(folder)
        os.rename(folder, path)
        return True
    except OSError as error:
        remove(folder)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False


def sync_folder(folder: Path) -> None:
    """Make names created in or removed from `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def temporary_in(folder: Path) -> Path:
    """Return a new hidden name: no reader takes it for data."""
    return folder / f".tmp-{uuid.uuid4().hex}"


def remove(path: Path) -> None:
    """Delete a file, or the directory that stands for it; what is gone already is fine."""
    with naming(path, "deleted"):
        if path.is_dir() and not path.is_symlink():
            (path / _INNER).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(path)
        else:
            path.unlink(missing_ok=True)


def now(folder: Path) -> float:
    """Return the time by the clock that stamps the files of `folder`: on NFS it is not this machine's."""
    probe = temporary_in(folder)
    with naming(probe, "written"):
        probe.touch()
        seconds = probe.stat().st_mtime
        probe.unlink()
    return seconds


def acquire(lock: Path) -> bool:
    """Take an advisory lock unless its holder lives: a file made with O_EXCL (flock is unreliable on NFS), to be touched while it is held and unlinked after.

    It is stale, and taken over, after LOCK_STALE_SECONDS untouched, or when its holder ran on this machine and is gone.
    Two may still hold it, one of them having been paused: it may spare work, correctness must not rest on it.
    """
    note = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()
    for _ in range(2):
        with naming(lock, "written"), contextlib.suppress(FileExistsError):
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                os.write(descriptor, note)
            finally:
                os.close(descriptor)
            return True
        with naming(lock, "written"), contextlib.suppress(FileNotFoundError):
            if now(lock.parent) - lock.stat().st_mtime < LOCK_STALE_SECONDS and not _is_orphan(lock):
                return False
            stolen = temporary_in(lock.parent)
            os.rename(lock, stolen)  # of several that find it stale, the rename lets one through
            os.unlink(stolen)
    return False


def _is_orphan(lock: Path) -> bool:
    try:
        holder = json.loads(lock.read_bytes())
        if holder["host"] == socket.gethostname():
            os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # a torn note: its age decides
        pass
    return False
