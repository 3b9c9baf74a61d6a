"""What can go wrong with a store, named by file and way out. Knows error codes; knows nothing of how files are read or written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

AGAIN = "then run the same command again: finished cells are kept"
_DAMAGED = "`iclgd verify` lists damaged files and can set them aside, so that their cells run again"
_WAY_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free space, {AGAIN}"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a directory that this user can write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "choose a directory for the store, not a file"),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path and that the disk is mounted; `iclgd run` makes a new store",
}


class StoreError(OSError):
    """The store cannot be read or written; names the file and the way out. The command line prints it and exits with 74."""

    def __init__(self, what: str, path: object, errno: int | None = None, way_out: str = _DAMAGED) -> None:
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
def naming(path: object, verb: str) -> Iterator[None]:
    """Turn what goes wrong inside into a StoreError that names `path`. With verb "read" a file that is gone is `Vanished`, one that cannot be decoded damaged."""
    try:
        yield
    except (StoreError, MemoryError):
        raise
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        code = error.errno if isinstance(error, OSError) else None
        if verb == "read" and code in (errno.ENOENT, errno.ESTALE):
            raise Vanished(str(path)) from error
        if code is not None:
            raise StoreError(f"cannot be {verb}: {os.strerror(code)}", path, code, _WAY_OUT.get(code, f"check the disk, {AGAIN}")) from error
        if verb != "read":
            raise
        raise StoreError(f"is damaged: {(str(error).splitlines() or [type(error).__name__])[0][:200]}", path) from error
