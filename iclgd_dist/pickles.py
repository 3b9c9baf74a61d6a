"""Pickled weights of a model directory -> safetensors, at the user's word. Knows torch's files; runs nothing that is in them: what is more than tensors is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from iclgd_dist.config import SweepError
from iclgd_dist.hub import one_line
from iclgd_dist.model_files import INDEX, PICKLES, SINGLE, read_json, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

WHOLE, MAP = "pytorch_model.bin", "pytorch_model.bin.index.json"


def convert_pickles(directory: Path) -> list[Path]:
    """Write a directory's pickled weights as safetensors beside them, and return the new files; the pickles stay.

    Each is read by torch.load(weights_only=True), which makes tensors and calls nothing that a file names.
    Errors: SweepError for a directory without pickles or with safetensors, a pickle that holds more than tensors, a file that cannot be read or written.
    """
    if not directory.is_dir():
        raise SweepError(f"{directory}: a model directory with pickled weights is required, got {'a file' if directory.exists() else 'no such directory'}")
    if there := [name for name in (SINGLE, INDEX) if (directory / name).exists()]:
        raise SweepError(f"{directory}: has {there[0]} already, which is what is used; nothing to convert")
    names, places = _pickles(directory), dict[str, str]()
    targets = [SINGLE] if len(names) == 1 else [f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)]
    new = [directory / f"{target}.new" for target in targets]
    try:
        for name, target, path in zip(names, targets, new, strict=True):
            tensors = _tensors(directory / name)
            _save(tensors, path)
            places |= dict.fromkeys(tensors, target)
        for path in new:
            path.replace(path.with_suffix(""))
        if len(names) > 1:
            (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    except OSError as error:
        raise SweepError(f"{directory}: cannot be written ({one_line(error)}); copy it to where you may write") from None
    finally:
        for path in new:
            path.unlink(missing_ok=True)
    return [directory / target for target in targets]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _pickles(directory: Path) -> list[str]:
    """Return the names of the pickles that hold the weights: those of the index, the usual one, or the only one."""
    there = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
    if MAP in {path.name for path in directory.iterdir()}:
        index = read_json(directory / MAP)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        names = list(dict.fromkeys(shards.values())) if isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values()) else []
        if not names or any(name not in there for name in names):
            strange = next((name for name in names if name not in there), None)
            raise SweepError(f"{directory}: {MAP} must name pickles that lie beside it, got {strange!r}" if names else f"{directory}: {MAP} has no weight_map")
        return sorted(names)
    if WHOLE in there:
        return [WHOLE]
    if len(there) != 1:
        raise SweepError(f"{directory}: weights in {WHOLE}, or in one pickle ({', '.join(PICKLES)}), are required, got {_some(there) or 'none'}")
    return there


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tensors(path: Path) -> dict[str, Tensor]:
    sha256_of(path)  # a regular file, no git-lfs pointer
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global:?) (\S+)", str(error))
        what = f"it names {named[1]}" if named else "it is damaged, or no pickle of tensors"
        raise SweepError(f"{path}: must hold tensors and nothing else, {what}; nothing of it was run: ask for safetensors where it comes from") from None
    except MemoryError:
        raise SweepError(f"{path}: cannot be read: it asks for more memory than there is; it is damaged, or too large for this machine") from None
    except Exception as error:  # whatever a damaged file makes torch raise
        raise SweepError(f"{path}: cannot be read: {one_line(error)}") from None
    if not isinstance(found, dict) or not found:
        raise SweepError(f"{path}: must hold tensors by name, got {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise SweepError(f"{path}: must hold dense tensors by name, got {type(tensor).__name__} for {name!r:.80}")
    # Copies: two names of one tensor (a tied head) would be refused.
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
