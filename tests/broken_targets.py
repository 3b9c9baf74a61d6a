"""Readers that are broken on purpose: what `tests/fuzz.py` has to find."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from iclgd_dist.config import SweepError
from tests.fuzzing import Target, work


def _broken(read: Any) -> Target:
    def whole_or_broken(folder: Path) -> Any:
        if (folder / "x").read_bytes() == b"whole":
            return None
        return read(folder)

    return Target(lambda: {"x": b"whole"}, lambda files, choose: {"x": choose.randbytes(4)}, whole_or_broken)


def _refuse(folder: Path) -> None:
    raise SweepError("is damaged")


def _spin(folder: Path) -> None:
    while True:
        pass


def _hold_much(folder: Path) -> None:
    try:
        assert bytearray(5 << 29)
    except MemoryError as error:
        raise SweepError("is damaged") from error


TARGETS = {
    "sound": _broken(_refuse),
    "raises": _broken(lambda folder: {}["x"]),
    "spins": _broken(_spin),
    "sleeps": _broken(lambda folder: time.sleep(1e6)),
    "dies": _broken(lambda folder: os.abort()),
    "swells": _broken(_hold_much),
}


if __name__ == "__main__":
    work(TARGETS, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
