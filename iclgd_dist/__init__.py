"""Compare in-context learning with finetuning over grids of learning rates and steps. Names are resolved when first used: no torch until then."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# Read by torch when it makes its first tensor: large ones lie on huge pages. Mapping small pages anew took a tenth of the time of training.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # by cuBLAS, once: without it no product on a GPU counts as deterministic

_HOMES = {
    "Store": ("store", "Store"),
    "load_model": ("loading", "load_model"),
    "load_sweep": ("config", "load_sweep"),
    "plan_sweep": ("plan", "make_plan"),
    "read_results": ("store", "read_results"),
    "run_block": ("block", "run_block"),
}
__all__ = ["Store", "load_model", "load_sweep", "plan_sweep", "read_results", "run_block"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, there = _HOMES[name]
        return getattr(import_module(f"{__name__}.{module}"), there)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
