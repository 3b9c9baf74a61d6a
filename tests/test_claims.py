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
from iclgd_dist.claims import claimed, claims_of, is_claimed, note_death, num_deaths
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
        assert first and is_claimed(made, block) and not is_claimed(made, block, "a")
        with claimed(made, block, "b") as second:
            assert not second
        assert is_claimed(made, block), "who did not get it gave nothing back"
    assert not is_claimed(made, block)
    with claimed(made, block, "b") as second:
        assert second


def test_blocks_that_were_cut_differently_know_what_they_share(made: Store, block: Block, sweep_file: Path) -> None:
    lower, upper = halve(block)
    other = make_plan(load_sweep(sweep_file)).blocks[1]
    assert sorted(claims_of(lower) + claims_of(upper)) == claims_of(block)
    assert set(claims_of(other)).isdisjoint(claims_of(block))
    later = replace(block, cells=tuple(cell for cell in block.cells if cell.step != 2))
    assert claims_of(later) == claims_of(block), "some of its steps are there by now"
    with claimed(made, lower, "a") as first:
        assert first
        for part, is_free in ((block, False), (upper, True), (other, True)):
            with claimed(made, part, "b") as second:
                assert second is is_free


def test_a_holder_that_is_gone_holds_nothing(made: Store, block: Block) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = made.root / "claims"
    for name in claims_of(block):
        (folder / name).write_text(json.dumps(locks.here() | {"pid": gone.pid, "owner": "a"}))
    with claimed(made, block, "b") as second:
        assert second
    for name in claims_of(block):
        (folder / name).write_text(json.dumps({"host": "elsewhere", "pid": 1, "owner": "a"}))
    assert is_claimed(made, block)
    long_ago = time.time() - claims.STALE_SECONDS - 1
    for name in claims_of(block):
        os.utime(folder / name, (long_ago, long_ago))
    assert not is_claimed(made, block)
    with claimed(made, block, "b") as second:
        assert second


def test_a_run_takes_its_own_claims_over(made: Store, block: Block) -> None:
    held = [locks.acquire(made.root / "claims" / name, owner="a", stale_seconds=1e9) for name in claims_of(block)]
    assert all(held)
    with claimed(made, block, "a") as again:
        assert again
        held[0].release()  # of a self that was thought to be dead
        with claimed(made, block, "b") as second:
            assert not second


def test_deaths_are_counted_for_each_block_and_run(made: Store, block: Block, sweep_file: Path) -> None:
    other = make_plan(load_sweep(sweep_file)).blocks[1]
    for number in (1, 2):
        note_death(made, block, "a", number)
    assert [num_deaths(made, *where) for where in ((block, "a"), (block, "b"), (other, "a"))] == [2, 0, 0]


def test_a_claim_is_touched_while_it_is_held(made: Store, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.02)
    with claimed(made, block, "a"):
        path = made.root / "claims" / claims_of(block)[0]
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_claim_of_a_process_that_does_nothing_is_not_touched(made: Store, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.02)
    with claimed(made, block, "a", lives=lambda: False):
        path = made.root / "claims" / claims_of(block)[0]
        os.utime(path, (0, 0))
        time.sleep(0.3)
        assert path.stat().st_mtime == 0


def test_a_claim_that_was_taken_over_is_not_given_back_by_the_first(made: Store, block: Block) -> None:
    with claimed(made, block, "a"):
        for name in claims_of(block):
            (made.root / "claims" / name).write_text('{"owner": "b", "host": "elsewhere", "pid": 1}')
    assert is_claimed(made, block)
