"""What torch says of the machine it runs on: threads, memory that ran out, how fast a matrix product is. Knows nothing of models."""

from __future__ import annotations

import math
import time

import torch


def set_num_threads(number: int) -> None:
    torch.set_num_threads(number)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out: of the GPU, or of the process (torch raises a plain RuntimeError then)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def num_gpus() -> int:
    """Return how many GPUs torch can use: 0 with a driver that is too old for it, of which `device_count` alone, asking the driver, knows nothing."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def without_gpus(wanted: float) -> str:
    """Return why this process lacks GPUs that it was given; an empty text where it has them. Ray counts what a node declares, torch what its driver can use."""
    here = num_gpus()
    if here >= math.ceil(wanted):
        return ""
    return (
        f"an actor was given gpus_per_actor = {wanted:g} there, but torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}) finds {here}: see `nvidia-smi` "
        "on that node; its driver may be too old for this build of torch, or not be visible in the container"
    )


def empty_cache() -> None:
    """Give memory that torch keeps for later back to the device, so that pieces of another size fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def matmul_gflops(size: int = 1024, repeats: int = 3) -> float:
    """Return this process's float32 matrix-product rate [GFLOP/s]: the best of a few, so that times can be compared across machines."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
