"""Claims: which trajectories somebody is computing now, so that two drivers on one store share the work. Knows blocks and locks; nothing of models or Ray.

A claim spares work and decides nothing: whoever commits a cell first is right. One file for each trajectory (method, version of the demonstrations,
learning rate) of a block, so that blocks which were cut differently know what they share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator

from iclgd_dist import files, locks
from iclgd_dist.blocks import Block
from iclgd_dist.locks import Lock
from iclgd_dist.store import Store, StoreError

STALE_SECONDS = 180.0  # by the clock of the store: then the holder is taken to be gone
TOUCH_SECONDS = 30.0
SEEN_TRIES = 20  # half seconds within which a machine sees what another wrote


@contextlib.contextmanager
def claimed(store: Store, block: Block, run: str, lives: Callable[[], bool] = lambda: True) -> Iterator[bool]:
    """Claim what a block computes for the time of the `with` block, and as long as `lives` holds; yields False where somebody else has part of it.

    Claims of the same run are its own earlier attempts, whose actors died.
    """
    held: list[Lock] = []
    with locks.touched(held, every_seconds=TOUCH_SECONDS, lives=lives):
        for name in claims_of(block):  # sorted: of two that want the same, one gets the first
            lock = locks.acquire(store.root / "claims" / name, owner=run, stale_seconds=STALE_SECONDS)
            if lock is None:
                break
            held.append(lock)
        else:
            yield True
            return
        yield False


def is_claimed(store: Store, block: Block, run: str = "") -> bool:
    """Say whether somebody who lives computes part of a block, apart from `run`."""
    return any(locks.is_held(store.root / "claims" / name, owner=run, stale_seconds=STALE_SECONDS) for name in claims_of(block))


def note_death(store: Store, block: Block, run: str, number: int) -> None:
    """Leave word that an actor of this run died over a block, which is no preemption, for the actors that take it up again."""
    files.publish(store.root / "claims" / f"{_deaths(block, run)}{number}", b"", reach=lambda point: None)


def take_death_back(store: Store, block: Block, run: str, number: int) -> None:
    files.remove(store.root / "claims" / f"{_deaths(block, run)}{number}")


def num_deaths(store: Store, block: Block, run: str) -> int:
    return sum(name.startswith(_deaths(block, run)) for name in files.names_in(store.root / "claims"))


@contextlib.contextmanager
def announced(store: Store, run: str) -> Iterator[None]:
    """Leave a file that says a run is under way, for the time of the block: who sees it there reaches the store that the driver means."""
    lock = locks.acquire(store.root / "claims" / f"run-{run}", owner=run)
    with locks.touched([lock] if lock else [], every_seconds=TOUCH_SECONDS):
        yield


def unreachable(store: Store, run: str) -> str:
    """Return what keeps this process from the store of a run's driver; an empty text where nothing does."""
    folder = store.root / "claims"
    try:
        for _ in range(SEEN_TRIES):  # NFS: another machine's file may be late
            if f"run-{run}" in files.names_in(folder):
                break
            time.sleep(0.5)
        else:
            return "it does not see a file that the driver wrote"
        mine = folder / f"probe-{uuid.uuid4().hex}"
        files.publish(mine, b"", reach=lambda point: None)
        files.remove(mine)
    except StoreError as error:
        return str(error)
    return ""


def _deaths(block: Block, run: str) -> str:
    return f"died-{run}-{hashlib.sha256(block.name.encode()).hexdigest()[:16]}-"


def claims_of(block: Block) -> list[str]:
    """Return the names of a block's claims, sorted; one of its own for baselines alone, or for measures."""
    spec, protocol = block.spec.model_dump(mode="json"), block.protocol.model_dump(mode="json")
    draw = [block.draw.task, block.num_demonstrations, block.seed, block.order, block.query_seed, len(block.draw.queries)]
    place = [block.model.content_hash, block.storage_dtype, spec, protocol, draw]
    if block.is_measuring or block.random_targets:
        place.append(sorted(cell.key for cell in block.cells))
    trained = {(cell.method, cell.train_on, (cell.learning_rate or 0.0).hex()) for cell in block.cells if cell.kind == "finetuned"}
    return sorted(hashlib.sha256(json.dumps([place, each], sort_keys=True).encode()).hexdigest()[:32] for each in trained or [()])
