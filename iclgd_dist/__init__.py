"""Compare in-context learning with finetuning over grids of learning rates and steps. Names are resolved when first used: no torch until then."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# Read by torch when it makes its first tensor: large ones lie on huge pages. Mapping small pages anew took a tenth of the time of training.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # by cuBLAS, once: without it no product on a GPU counts as deterministic

_HOMES = {"load_sweep": "config", "read_results": "store", "Store": "store"}
__all__ = ["Store", "load_sweep", "read_results"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
