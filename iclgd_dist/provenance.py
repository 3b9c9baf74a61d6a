"""What made a row, none of it part of a key: versions, code, device, memory. Knows the machine; knows nothing of results."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from iclgd_dist.model import LanguageModel


def provenance(lm: LanguageModel) -> dict[str, Any]:
    """Return what made a row: library versions, code, device. None of it is part of a key."""
    device = lm.input_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": _versions(),
        "git_commit": git_commit(),
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads",
        "host": platform.node(),
    }


@cache
def _versions() -> str:
    names = ("iclgd-dist", "transformers", "accelerate", "ray", "pyarrow")
    found = {name: _version(name) for name in names} | {"torch": str(torch.__version__), "python": platform.python_version()}  # torch's own says which build
    return json.dumps(found, sort_keys=True)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this project, where its code travelled with a job or lies in the PYTHONPATH
        return "unknown"


@cache
def git_commit() -> str | None:
    """Return the commit of this project's code, with `+` when files were changed since; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        said = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty=+"], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def peak_gib() -> float:
    """Return the largest memory this process has held: of the GPU where there is one, else resident [GiB]."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
