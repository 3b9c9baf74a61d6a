"""Claims: which trajectories somebody is computing now, so that two drivers on one store share the work. Knows blocks and locks; nothing of models or Ray.

A claim spares work and decides nothing: whoever commits a cell first is right. One file for each trajectory (method, version of the demonstrations,
learning rate) of a block, so that blocks which were cut differently know what they share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from iclgd_dist import files, locks
from iclgd_dist.blocks import Block
from iclgd_dist.locks import Lock
from iclgd_dist.store import Store

STALE_SECONDS = 180.0  # by the clock of the store: then the holder is taken to be gone
TOUCH_SECONDS = 30.0


@dataclass(frozen=True)
class Claim:
    """What this run holds; `num_deaths`: its actors that died over it."""

    num_deaths: int


@contextlib.contextmanager
def claimed(store: Store, block: Block, run: str) -> Iterator[Claim | None]:
    """Claim what a block computes for the time of the `with` block; yields None where somebody else has part of it.

    Claims of the same run are its own earlier attempts, whose actors died.
    """
    folder = store.root / "claims"
    files.make_folder(folder)
    held: list[Lock] = []
    names = claims_of(block)
    for name in names:  # sorted: of two that want the same, one gets the first
        lock = locks.acquire(folder / name, owner=run, stale_seconds=STALE_SECONDS)
        if lock is None:
            break
        held.append(lock)
    with locks.touched(held, every_seconds=TOUCH_SECONDS):
        yield Claim(max(lock.num_deaths for lock in held)) if len(held) == len(names) else None


def is_claimed(store: Store, block: Block) -> bool:
    """Say whether somebody who lives computes part of a block."""
    return any(locks.is_held(store.root / "claims" / name, stale_seconds=STALE_SECONDS) for name in claims_of(block))


def claims_of(block: Block) -> list[str]:
    """Return the names of a block's claims, sorted; one of its own for baselines alone, or for measures."""
    spec, protocol = block.spec.model_dump(mode="json"), block.protocol.model_dump(mode="json")
    draw = [block.draw.task, block.num_demonstrations, block.seed, block.order, block.query_seed, len(block.draw.queries)]
    place = [block.model.content_hash, block.storage_dtype, spec, protocol, draw]
    if block.is_measuring or block.random_targets:
        place.append(sorted(cell.key for cell in block.cells))
    trained = {(cell.method, cell.train_on, (cell.learning_rate or 0.0).hex()) for cell in block.cells if cell.kind == "finetuned"}
    return sorted(hashlib.sha256(json.dumps([place, each], sort_keys=True).encode()).hexdigest()[:32] for each in trained or [()])
