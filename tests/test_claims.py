"""Claims spare double work and decide nothing."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from iclgd_dist import claims, locks
from iclgd_dist.blocks import Block, halve
from iclgd_dist.claims import claimed, claims_of, is_claimed
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store


@pytest.fixture
def block(sweep_file: Path) -> Block:
    return make_plan(load_sweep(sweep_file)).blocks[0]


@pytest.fixture
def made(tmp_path: Path) -> Store:
    found = Store(tmp_path / "store")
    found.prepare()
    return found


def test_what_one_holds_another_does_not_get_until_it_is_given_back(made: Store, block: Block) -> None:
    with claimed(made, block, "a") as first:
        assert first is not None and first.num_deaths == 0
        assert is_claimed(made, block)
        with claimed(made, block, "b") as second:
            assert second is None
        assert is_claimed(made, block), "who did not get it gave nothing back"
    assert not is_claimed(made, block)
    with claimed(made, block, "b") as second:
        assert second is not None


def test_blocks_that_were_cut_differently_know_what_they_share(made: Store, block: Block, sweep_file: Path) -> None:
    lower, upper = halve(block)
    other = make_plan(load_sweep(sweep_file)).blocks[1]
    assert sorted(claims_of(lower) + claims_of(upper)) == claims_of(block)
    assert set(claims_of(other)).isdisjoint(claims_of(block))
    later = replace(block, cells=tuple(cell for cell in block.cells if cell.step != 2))
    assert claims_of(later) == claims_of(block), "some of its steps are there by now"
    with claimed(made, lower, "a") as first:
        assert first is not None
        for part, is_free in ((block, False), (upper, True), (other, True)):
            with claimed(made, part, "b") as second:
                assert (second is not None) is is_free


def test_a_holder_that_is_gone_holds_nothing(made: Store, block: Block) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = made.root / "claims"
    folder.mkdir()
    for name in claims_of(block):
        (folder / name).write_text(json.dumps({"host": os.uname().nodename, "pid": gone.pid, "owner": "a"}))
    with claimed(made, block, "b") as second:
        assert second is not None
    for name in claims_of(block):
        (folder / name).write_text(json.dumps({"host": "elsewhere", "pid": 1, "owner": "a"}))
    assert is_claimed(made, block)
    long_ago = time.time() - claims.STALE_SECONDS - 1
    for name in claims_of(block):
        os.utime(folder / name, (long_ago, long_ago))
    assert not is_claimed(made, block)
    with claimed(made, block, "b") as second:
        assert second is not None


def test_a_run_takes_its_own_claims_over_and_counts_the_deaths(made: Store, block: Block) -> None:
    (made.root / "claims").mkdir()
    for deaths in range(3):
        held = [locks.acquire(made.root / "claims" / name, owner="a", stale_seconds=1e9) for name in claims_of(block)]
        assert [lock and lock.num_deaths for lock in held] == [deaths] * len(held)
    with claimed(made, block, "a") as claim:
        assert claim is not None and claim.num_deaths == 3


def test_a_claim_is_touched_while_it_is_held(made: Store, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.02)
    with claimed(made, block, "a"):
        path = made.root / "claims" / claims_of(block)[0]
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_claim_that_was_taken_over_is_not_given_back_by_the_first(made: Store, block: Block) -> None:
    with claimed(made, block, "a"):
        for name in claims_of(block):
            (made.root / "claims" / name).write_text('{"owner": "b", "host": "elsewhere", "pid": 1}')
    assert is_claimed(made, block)
