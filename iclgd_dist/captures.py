"""Captures beside the store, for metrics that are thought of later: `captures/<key>.safetensors`, one for each cell that keeps its own.

Knows the tensors of a Capture and how files appear whole. Knows nothing of models, or of what will be computed from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields

from safetensors.torch import load, save
from torch import Tensor

from iclgd_dist import cells, files
from iclgd_dist import store as stores
from iclgd_dist.files import Location, StoreError, Vanished
from iclgd_dist.metrics import Capture
from iclgd_dist.store import Store, read_results


def keep(store: Store, key: str, capture: Capture) -> tuple[str, str]:
    """Write every tensor of a cell's capture and return the file, relative to the store, and its sha256: columns of the cell's row.

    On disk on return, so that a row never names a file that is not there. A file that is there already stays, and its sha256 is returned.
    Errors: StoreError when it cannot be written.
    """
    path = _path(store, key)
    tensors = {field.name: value for field in fields(Capture) if isinstance(value := getattr(capture, field.name), Tensor)}
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    files.make_folder(path.parent)
    if not files.publish(path, data, reach=stores.fault_point):
        data = files.read(path)  # of another process, or of one that was killed before it committed the row
        files.touch(path, data)  # `gc` takes the old captures of no cell for debris
    return f"captures/{path.name}", hashlib.sha256(data).hexdigest()


def recall(store: Store, key: str, sha256: str) -> Capture | None:
    """Return what `keep` wrote for a cell, or None where the file is gone.

    Errors: StoreError when it is not the file of this sha256, or of a newer version.
    """
    path = _path(store, key)
    try:
        data = files.read(path)
    except Vanished:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreError("is damaged: its sha256 is not that of the cell's row", path)
    tensors = load(data)
    if unknown := sorted(tensors.keys() - {field.name for field in fields(Capture)}):
        raise StoreError(f"holds tensors this version does not know: {', '.join(unknown)}", path, way_out=cells.UPDATE)
    return Capture(**tensors)


def verify(store: Store, *, aside: Callable[[Location], None] | None = None) -> list[StoreError]:
    """Read every kept capture that a row names and return what is wrong; one that was deleted is no error. For a store whose cells are whole.

    Damaged files are handed to `aside`, which takes them away as if they had been deleted.
    """
    if not files.names_in(store.root / "captures"):
        return []
    errors = []
    for row in read_results(store).cells.select(["key", "capture_sha256"]).to_pylist():
        try:
            if row["capture_sha256"] is not None:
                recall(store, row["key"], row["capture_sha256"])
        except StoreError as error:
            errors.append(error)
            if aside and error.is_damage:
                aside(_path(store, row["key"]))
    return errors


def _path(store: Store, key: str) -> Location:
    return store.root / "captures" / f"{key}.safetensors"
