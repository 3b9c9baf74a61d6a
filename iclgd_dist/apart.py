"""Calls that need seconds of imports, made in a process of their own: this one stays without torch. Knows SweepError; knows nothing of what is done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from iclgd_dist.config import SweepError

_REFUSED = 2  # exit code of a call that ended in a SweepError
_PROGRAM = "import json, sys; given = json.load(sys.stdin); sys.path[:] = given.pop(); from iclgd_dist.apart import _answer; _answer(*given)"


def apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call a module's function with what JSON can say, for what it writes to disk; in this process where torch is loaded already.

    Errors: SweepError, where the function raises it or its process dies.
    """
    if "torch" in sys.modules:
        return function(*arguments)
    given = json.dumps([function.__module__, function.__name__, arguments, sys.path])
    done = subprocess.run([sys.executable, "-P", "-c", _PROGRAM], input=given, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode == _REFUSED:
        raise SweepError(done.stdout)
    if done.returncode:
        last = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SweepError(f"{function.__module__}.{function.__name__} failed in a process of its own: {last[:300]}")


def _answer(module: str, name: str, arguments: list[Any]) -> None:
    answer, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    try:
        getattr(import_module(module), name)(*arguments)
    except SweepError as error:
        answer.write(str(error))
        answer.flush()
        raise SystemExit(_REFUSED) from None
