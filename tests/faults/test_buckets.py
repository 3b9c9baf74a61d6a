"""A sweep whose store is a bucket of an S3 server on loopback: killed, resumed, verified; and two drivers at once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from iclgd_dist import files
from iclgd_dist.store import Store
from tests.faults.case import ICLGD, Case

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_sweep_into_a_bucket_is_killed_resumed_and_verified(case: Case, bucket: str) -> None:
    case.store = Store(bucket)
    case.plot({"what": "slow", "seconds": 0.3, "times": 100})
    driver = case.start()
    case.wait(lambda: len(case.committed()) >= 6)
    driver.kill()
    driver.wait()
    before = case.committed()
    case.facts["injections"] = 1
    case.run()
    case.check(before)
    said = subprocess.run([*ICLGD, "verify", bucket], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stdout + said.stderr
    said = subprocess.run([*ICLGD, "status", bucket], capture_output=True, text=True, timeout=120)
    assert "cells missing" in said.stdout
    assert not [name for folder in ("cells", "compacted") for name in files.names_in(case.store.root / folder) if name.startswith(".tmp")]
    page = case.folder / "page.html"
    said = subprocess.run([*ICLGD, "report", bucket, "--out", str(page)], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0 and page.exists(), said.stderr
    secret = b"canary-secret"
    assert secret not in page.read_bytes() + said.stdout.encode()
    ours = [path for driver in case.drivers for path in Path("/tmp/ray").glob(f"session_*_{driver.pid}/**/*") if path.is_file() and not path.is_symlink()]
    assert len(ours) > 10 and not [path for path in ours if secret in path.read_bytes()], "what Ray writes of a run holds no secret"


def test_two_drivers_share_a_bucket(case: Case, bucket: str) -> None:
    case.store = Store(bucket)
    case.share()
