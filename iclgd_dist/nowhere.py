"""A file system that keeps nothing, for Tune's own state: every start plans anew from the store. Knows pyarrow.

One in memory would be part of the state that it is to keep (trials hold their file system), and each snapshot would hold the ones before it.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem


class _Nothing(FileSystemHandler):
    """Every file is there and empty, as Tune looks for what it has just written; every directory holds the one snapshot whose name it asks for at the end.

    Errors of trials, error.pkl, are not there: Tune would unpickle them.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Nothing)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def get_type_name(self) -> str:
        return "nowhere"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [FileInfo(path, FileType.NotFound if path.endswith("/error.pkl") else FileType.File, size=0) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return self.get_file_info([f"{selector.base_dir}/experiment_state-.json"])

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.MockOutputStream()

    open_append_stream = open_output_stream

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(b"")

    open_input_file = open_input_stream

    def _nothing_to_do(self, *arguments: Any, **options: Any) -> None:
        pass

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = move = copy_file = _nothing_to_do


def nowhere() -> PyFileSystem:
    """Return a file system whose files are all empty."""
    return PyFileSystem(_Nothing())
