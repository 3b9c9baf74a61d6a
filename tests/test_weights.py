"""A NaN among weights is found in every dtype and at every place; infinities and negative numbers are numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from iclgd_dist import weights
from iclgd_dist.weights import first_nan

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 7, 12, 23])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_a_nan_is_found_by_its_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, place: int, nan: float) -> None:
    monkeypatch.setattr(weights, "_AT_ONCE", 5)
    a, b = torch.linspace(-3, 3, 12, dtype=dtype), torch.full((3, 4), float("inf"), dtype=dtype)
    b[0] = -float("inf")
    tensors = {"a": a, "b": b, "numbers": torch.tensor([-1, 2**63 - 1]), "one": torch.tensor(1.0, dtype=dtype), "none": torch.empty(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert first_nan(tmp_path / "w.safetensors") is None
    (a if place < 12 else b.view(-1))[place % 12] = nan
    save_file(tensors, tmp_path / "w.safetensors")
    assert first_nan(tmp_path / "w.safetensors") == ("a" if place < 12 else "b")
