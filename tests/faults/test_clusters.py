"""Accidents of a cluster of three nodes: a node or the head is lost, calls between nodes fail, nodes join."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from iclgd_dist import files
from tests.faults.case import Case

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("notice", [False, True])
def test_f5_a_node_is_lost_and_the_sweep_finishes_on_the_others(case: Case, cluster: Any, notice: bool) -> None:
    """With notice: it is drained for preemption before. Neither counts against the blocks that it ran."""
    case.write(seeds=list(range(1, 25)))
    case.plot({"what": "slow", "seconds": 1, "times": 200})
    driver = case.start("--address", cluster.address)
    case.wait(lambda: len(case.committed()) >= 6)
    before = case.committed()
    node = next(iter(cluster.worker_nodes))
    if notice:
        drain = ["drain-node", "--address", cluster.address, "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        drain += ["--reason-message", "spot", "--deadline-remaining-seconds", "60"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], check=True, timeout=60)
    cluster.remove_node(node, allow_graceful=False)
    case.facts["injections"] = 1
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert len(case.attempts("lost")) >= 1
    assert not [name for name in files.names_in(case.store.root / "claims") if name.startswith("died")], said
    case.check(before)


def test_f9_the_head_is_lost_and_the_driver_ends_in_bounded_time(case: Case, cluster: Any) -> None:
    case.write(seeds=list(range(1, 13)))
    case.plot({"what": "slow", "seconds": 0.3, "times": 200})
    driver = case.start("--address", cluster.address)
    case.wait(lambda: len(case.committed()) >= 6)
    (head,) = cluster.head_node.all_processes["gcs_server"]
    os.kill(head.process.pid, signal.SIGKILL)
    lost = time.monotonic()
    case.facts["injections"] = 1
    said, _ = driver.communicate(timeout=180)
    assert driver.returncode == 75 and "the cluster is lost" in said and time.monotonic() - lost < 60, said
    before = case.committed()
    case.run()
    case.check(before)


def test_f16_calls_between_nodes_that_fail_are_asked_again(case: Case, cluster: Any) -> None:
    chaos = json.dumps(
        {
            "ray::rpc::CoreWorkerService.grpc_client.PushTask": {"num_failures": 3, "req_failure_prob": 20, "resp_failure_prob": 0},
            "ray::rpc::InternalKVGcsService.grpc_client.InternalKVGet": {"num_failures": 5, "req_failure_prob": 25, "resp_failure_prob": 25},
        }
    )
    case.run("--address", cluster.address, RAY_testing_rpc_failure=chaos)
    case.facts["injections"] = 1
    case.check()


BROKEN = {
    "store": "import os\nreal = os.listdir\nos.listdir = lambda path='.': [] if str(path).endswith('/claims') else real(path)\n",
    "package": "import sys\nsys.modules['iclgd_dist'] = None\n",
}


@pytest.mark.parametrize(("lacks", "code", "what"), [("store", 74, "does not see a file that the driver wrote"), ("package", 2, "install this project there")])
def test_a_node_that_lacks_the_store_or_the_package_is_named_before_anything_starts(case: Case, cluster: Any, lacks: str, code: int, what: str) -> None:
    _join(cluster, case, lacks)
    said = case.run("--address", cluster.address, code=code)
    assert what in said and "node " in said and not case.attempts(), said
    case.facts["injections"] = 1


@pytest.mark.parametrize("lacks", BROKEN)
def test_a_node_that_joins_without_the_store_or_the_package_is_left_out_and_nothing_is_lost(case: Case, cluster: Any, lacks: str) -> None:
    case.write(seeds=list(range(1, 17)), actors=8)
    case.file.write_text(case.file.read_text().replace("max_actors = 8", "cpus_per_actor = 1"))
    case.plot({"what": "slow", "seconds": 5, "times": 400})
    driver = case.start("--address", cluster.address)
    case.wait(lambda: len(case.committed()) >= 6)
    before = case.committed()
    _join(cluster, case, lacks)
    case.facts["injections"] = 1
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0 and said.count("is left out from now on") == 1, said
    case.check(before)


def _join(cluster: Any, case: Case, lacks: str) -> None:
    """Let a node join whose processes do not see the store's claims, or do not find this package."""
    folder = case.folder / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BROKEN[lacks])
    cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1", env_vars={"PYTHONPATH": str(folder)})


def test_nodes_that_join_while_the_sweep_runs_take_part(case: Case, cluster: Any) -> None:
    """And the blocks start in the plan's order. Blocks last longer than an actor takes to start: else it would not be worth it."""
    case.write(seeds=list(range(1, 17)), actors=8)
    case.file.write_text(case.file.read_text().replace("max_actors = 8", "cpus_per_actor = 1"))
    case.plot({"what": "slow", "seconds": 5, "times": 400})
    driver = case.start("--address", cluster.address)
    case.wait(lambda: len(case.committed()) >= 6)
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
    case.facts["injections"] = 1
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    done = case.attempts("done")
    assert len({attempt["actor"] for attempt in done}) == 3, f"one actor for each place, kept from block to block:\n{said}"
    order = [int(attempt["block"].split("-")[2][1:]) for attempt in done]
    assert max(abs(place - sorted(order).index(seed)) for place, seed in enumerate(order)) <= 4
    case.check()
