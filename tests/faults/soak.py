"""`python -m tests.faults.soak [--minutes 10] [--seed N]`: actors, nodes and drivers die at random, two drivers at a time; then one resume and the invariants.

The seed is printed. The last line is JSON: injections, cells, lost, duplicated, most open files and memory of a driver, holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.faults.case import Case
from tests.tiny import save_tiny, save_tokenizer

MAX_OPEN_FILES, MAX_GIB = 500, 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.getrandbits(31))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory(prefix="iclgd-soak-") as name:
        folder = Path(name)
        os.environ["ICLGD_CACHE"] = str(folder / "cache")
        save_tiny(folder / "tiny", save_tokenizer(folder / "tiny"))
        return _soak(Case(folder, folder / "tiny", seeds=int(100 * options.minutes), actors=2), chance, options.minutes * 60)


def _soak(case: Case, chance: random.Random, seconds: float) -> int:
    from ray.cluster_utils import Cluster

    node = {"node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **node)
    case.plot({"what": "slow", "seconds": 0.2, "times": 100_000})
    injections: dict[str, int] = dict.fromkeys(("actor", "node", "driver"), 0)
    began, most_files, most_gib = time.monotonic(), 0, 0.0
    drivers = [case.start("--address", cluster.address) for _ in range(2)]
    case.wait(lambda: case.store.keys(), seconds=300)
    pace = time.monotonic() - began  # of this machine: accidents that came faster would leave no time for a single cell
    end = time.monotonic() + seconds
    print(f"{pace:.0f} s from a start to the first cells", flush=True)
    while time.monotonic() < end:
        drivers = [driver for driver in drivers if driver.poll() is None]
        while len(drivers) < 2:
            drivers.append(case.start("--address", cluster.address))
        time.sleep(pace * chance.uniform(0.1, 0.7))
        for driver in drivers:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(driver.pid)
                most_files = max(most_files, process.num_fds())
                most_gib = max(most_gib, process.memory_info().rss / 2**30)
        actors = _actors()
        what = chance.choice(["actor", "actor", "node", "driver"] if actors else ["node", "driver"])
        injections[what] += 1
        print(f"{time.strftime('%X')} {what}: {len(case.store.keys())} cells", flush=True)
        if what == "actor":
            with contextlib.suppress(psutil.Error):
                chance.choice(actors).kill()
        elif what == "node":
            cluster.remove_node(chance.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
            cluster.add_node(num_cpus=1, **node)
        else:
            drivers[0].kill()
            drivers[0].wait()
    for driver in drivers:
        if driver.poll() is None:
            os.kill(driver.pid, signal.SIGTERM)
            driver.communicate(timeout=120)
    before = case.committed()
    case.plot()
    case.write(seeds=case.sizes["seeds"][: max(1, len(before) // 9)])  # what is left would take longer than what was there
    case.run("--address", cluster.address, seconds=1200)
    cluster.shutdown()
    facts = case.check(before, extra=True)
    holds = most_files <= MAX_OPEN_FILES and most_gib <= MAX_GIB and not facts["lost"] and not facts["duplicated"]
    facts |= {"injections": injections, "most_open_files": most_files, "most_gib": round(most_gib, 2), "holds": holds}
    print(json.dumps(facts))
    return 0 if holds else 1


def _actors() -> list[psutil.Process]:
    """Return the processes of this cluster in which an actor is at work; another Ray of this machine has another cache."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if "ray::ResourceTrainable" in " ".join(each.info["cmdline"] or []) and each.environ().get("ICLGD_CACHE") == os.environ["ICLGD_CACHE"]:
                found.append(each)
    return sorted(found, key=lambda each: each.pid)


if __name__ == "__main__":
    sys.exit(main())
