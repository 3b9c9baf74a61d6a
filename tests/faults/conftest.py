"""What the faults share: a case with its sweep, a cluster of three nodes, and the matrix that `make faults` prints."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.case import Case

TOKEN = secrets.token_hex(32)  # Ray reads it once in a process
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # nodes at 127.0.0.1


@pytest.fixture
def case(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, Any], None]) -> Iterator[Case]:
    """Return a sweep of six blocks; what the test finds of it becomes a line of the matrix."""
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    made = Case(tmp_path, tiny_model)
    yield made
    made.end()
    record_property("facts", made.facts)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a Ray of three nodes on this machine: a head without CPUs and two workers of one."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1, node_ip_address="127.0.0.1")
    yield made
    if made.head_node is not None:
        made.shutdown()
