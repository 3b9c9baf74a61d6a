"""Files that appear whole or not at all, first writer first. Knows local and NFS directories, and where objects of a bucket take their place.

Everything the store promises rests on `publish`: create this name with these bytes unless it exists. In a directory: temporary file, fsync, hard link, fsync of the
directory; in a bucket a conditional put (objects.py). Where hard links are missing, the file goes into a directory that
is renamed to the final name: a rename onto a directory that holds something fails, so the first writer still wins. (Creating the final name with O_EXCL would show
half a file; renaming a file would replace the first one.) Windows is not supported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from iclgd_dist.objects import URL, ObjectPath, object_path
from iclgd_dist.store_errors import StoreError, Vanished, naming

__all__ = ["Location", "StoreError", "Vanished", "naming"]

Location = Path | ObjectPath
T = TypeVar("T")
P = TypeVar("P", bound=Location)
_INNER = "content"  # the file in the directory that stands for a file where hard links are missing
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def location(where: str | Location) -> Location:
    """Return where a store lies: a directory, or s3://bucket/prefix and its like. Errors: ValueError for another URL; StoreError for one that cannot be used."""
    if isinstance(where, Path | ObjectPath):
        return where
    if URL.fullmatch(where):
        return object_path(where)
    if "://" in where:
        raise ValueError(f"{where}: is no store; give a directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix")
    return Path(where)


def make_folder(folder: Location) -> None:
    """Make a directory, with those above it; durable on return. A bucket needs none."""
    if isinstance(folder, Path):
        with naming(folder, "made a directory"):
            missing = [level for level in (folder, *folder.parents) if not level.is_dir()]
            os.makedirs(folder, exist_ok=True)
        for level in missing:
            sync(level.parent)


def num_readers(folder: Location) -> int | None:
    """Return how many threads read from there at once: a bucket answers late and to many; None = as many as the machine is made for."""
    return None if isinstance(folder, Path) else 32


def is_folder(folder: Location) -> bool:
    if isinstance(folder, ObjectPath):
        return folder.holds_anything()
    with naming(folder, "looked at"):
        return folder.is_dir()


def is_writable(folder: Location) -> bool:
    """Whether this user may write there, or make it; of a bucket only writing tells. Nothing is written."""
    if isinstance(folder, ObjectPath):
        return True
    level = next((level for level in (folder, *folder.absolute().parents) if os.path.isdir(level)), folder)
    return os.access(level, os.W_OK | os.X_OK)


def exists(path: Location) -> bool:
    with naming(path, "looked at"):
        return path.exists()


def names_in(folder: Location) -> list[str]:
    """Return the names in a directory; a missing one is empty."""
    if isinstance(folder, ObjectPath):
        return folder.names()
    try:
        with naming(folder, "read"):
            return os.listdir(folder)
    except Vanished:
        return []


def read(path: Location) -> bytes:
    """Return what `publish` wrote. Errors: Vanished; StoreError."""
    if isinstance(path, ObjectPath):
        return bytes(path.read().to_pybytes())
    with naming(path, "read"):
        if path.is_dir():
            path = path / _INNER
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in a store from elsewhere must not hang us
        with open(descriptor, "rb") as file:
            require_regular(path, os.fstat(descriptor))
            return file.read()


def contents(path: Location) -> pa.Buffer:
    """Return a file that is never written again: mapped, or read where a map could break.

    Over a network a file that another machine deletes is gone under a map, which ends the process. What no disk of this machine holds is read therefore.
    (A disk that fails under a map ends the process too; `sha256_of`, which `iclgd verify` asks first, says which file it is.)
    Errors: Vanished; StoreError.
    """
    if isinstance(path, ObjectPath):
        return path.read()
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


def publish(path: Location, data: bytes, *, reach: Callable[[str], None]) -> bool:
    """Create `path` with `data` unless it exists: whole or not at all, and on disk on return. Returns True if this call created it.

    `reach` is told the points at which tests let the process die.
    """
    if isinstance(path, ObjectPath):
        reach("before_link")
        is_created = path.create(data)
        reach("after_link")
        return is_created
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


def sync(folder: Location) -> None:
    """Make names created in or removed from `folder` durable, also those that others made. A bucket needs none."""
    if isinstance(folder, Path):
        with naming(folder, "written"):
            sync_folder(folder)


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


def temporary_in(folder: P) -> P:
    """Return a new hidden name: no reader takes it for data."""
    made: Any = folder / f".tmp-{uuid.uuid4().hex}"
    return made


def add(folder: Location, write: Callable[[Path], T], name: Callable[[str], str]) -> tuple[T, str, str]:
    """Create a file of any size whose name is made of its sha256; on disk on return. Returns what `write` returned, the sha256 and the name."""
    with contextlib.ExitStack() as stack, naming(tempfile.gettempdir(), "written"):
        near = folder if isinstance(folder, Path) else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="iclgd-")))
        temporary = temporary_in(near)
        left = [temporary]
        try:
            with naming(temporary, "written"):
                made = write(temporary)
                with open(temporary, "rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
                final = folder / name(sha256)
                if isinstance(final, Path):
                    os.rename(temporary, final)
                    left = [final]
                    sync_folder(final.parent)
                    left = []
                else:
                    final.put(temporary)
        finally:
            for path in left:
                with contextlib.suppress(OSError):
                    os.unlink(path)
    return made, sha256, final.name


def sha256_of(path: Location) -> str:
    """Return the sha256 of a file's bytes. Errors: Vanished; StoreError."""
    if isinstance(path, ObjectPath):
        return hashlib.sha256(path.read()).hexdigest()
    with naming(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move(path: Location, to: Location) -> None:
    """Rename a file to a name that is free, in the same store; what is gone already is fine."""
    if isinstance(path, ObjectPath):
        with contextlib.suppress(Vanished):
            assert isinstance(to, ObjectPath)
            to.put(read(path))
            path.delete()
        return
    with naming(path, "moved"), contextlib.suppress(FileNotFoundError):
        os.rename(path, str(to))


def remove(path: Location) -> None:
    """Delete a file, or the directory that stands for it; what is gone already is fine."""
    if isinstance(path, ObjectPath):
        return path.delete()
    with naming(path, "deleted"):
        if path.is_dir() and not path.is_symlink():
            (path / _INNER).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(path)
        else:
            path.unlink(missing_ok=True)


def size_of(path: Location) -> int:
    """Return the bytes of a file; 0 where it is gone."""
    if isinstance(path, ObjectPath):
        return path.size()
    with contextlib.suppress(Vanished), naming(path, "read"):
        return sum(inner.stat().st_size for inner in (path.iterdir() if path.is_dir() else [path]))
    return 0


def touch(path: Location, data: bytes) -> None:
    """Say that a file is needed: it counts as written now. `data` is what it holds. Errors: Vanished where it is gone."""
    if isinstance(path, ObjectPath):
        return path.put(data)
    with naming(path, "read"):
        os.utime(path)


def modified(path: Location) -> float:
    """Return when a file was last written or touched, by the clock that stamps it [s]. Errors: Vanished where it is gone."""
    if isinstance(path, ObjectPath):
        return path.modified()
    with naming(path, "read"):
        return path.stat().st_mtime


def now(folder: Location) -> float:
    """Return the time by the clock that stamps the files of `folder`: on NFS and in a bucket it is not this machine's."""
    probe = temporary_in(folder)
    if isinstance(probe, ObjectPath):
        probe.put(b"")
        seconds = probe.modified()
        probe.delete()
        return seconds
    with naming(probe, "written"):
        probe.touch()
        seconds = probe.stat().st_mtime
        probe.unlink()
    return seconds
