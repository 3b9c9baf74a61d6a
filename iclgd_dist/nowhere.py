"""A file system in the memory of one process, for Tune's own state: it ends with the run, and every start plans anew from the store. Knows pyarrow and fsspec."""

from __future__ import annotations

from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem


def nowhere() -> PyFileSystem:
    """Return a new, empty one; a copy in another process is another one."""
    return PyFileSystem(FSSpecHandler(MemoryFileSystem(global_store=False, skip_instance_cache=True)))
