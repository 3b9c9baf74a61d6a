"""Weights as they are computed with, in files that every process of a machine maps: frozen weights are in memory once, however many actors there are.

safetensors maps a file whose dtype is the one that is asked for; anything else each process converts into memory of its own, which is what this spares.
Knows model directories, dtypes. Knows nothing of devices, tasks or actors.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from iclgd_dist.model_files import cache_folder, make_once, weight_files


def prepared(directory: Path, content_hash: str, *, storage_dtype: str, compute_dtype: str) -> Path:
    """Return a directory with the model rounded to `storage_dtype` and kept in `compute_dtype`; `directory` itself where its files are so.

    Made once, by one process.
    """
    storage, compute = getattr(torch, storage_dtype), getattr(torch, compute_dtype)
    if storage == compute and all(kind == compute or not kind.is_floating_point for kind in _dtypes(directory)):
        return directory
    target = cache_folder("prepared") / f"{content_hash[:32]}-{storage_dtype}-{compute_dtype}"
    return make_once(target, lambda new: _convert(directory, new, storage, compute))


def _dtypes(directory: Path) -> set[torch.dtype]:
    found = set()
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name)[:0].dtype if file.get_slice(name).get_shape() else file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    return found


def _convert(directory: Path, new: Path, storage: torch.dtype, compute: torch.dtype) -> None:
    for path in directory.iterdir():
        if path.suffix == ".json" and path.is_file():
            shutil.copyfile(path, new / path.name)
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made = {name: tensor.to(storage).to(compute) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(made, new / path.name, metadata={"format": "pt"})
