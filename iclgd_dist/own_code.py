"""Turn the code of a [[method]] or [[metric]] into an object. Knows Python's import machinery; knows nothing of what the object is for.

Actors call it, and `run`, `measure` and `check-method` before a model is loaded: the sweep file is trusted, but planning runs nothing.
"""

from __future__ import annotations

import linecache
import sys
import traceback
import types
from functools import lru_cache
from typing import Any

from iclgd_dist.config import SweepError
from iclgd_dist.extensions import Code


def made(code: Code) -> Any:
    """Return what the named class makes with the options, or the named object itself when it is no class.

    Errors: SweepError naming the file, when it cannot be imported or lacks the name, or when the class does not take the options.
    """
    assert code.code is not None
    file, _, name = code.code.rpartition(":")
    try:
        found = getattr(_module(file, code.text, code.sha256), name)
        return found(**code.options) if callable(found) and (isinstance(found, type) or code.options) else found
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _shown(file, code.sha256)]
        place = f"{file}:{lines[-1]}" if lines else file
        raise SweepError(f"{code.name}: {place} cannot be used: {type(error).__name__}: {error}") from error


def _shown(file: str, digest: str) -> str:
    return f"<{file} {digest[:12]}>"


@lru_cache(maxsize=64)
def _module(file: str, text: str, digest: str) -> types.ModuleType:
    module = types.ModuleType(f"iclgd_own_{digest[:12]}")
    # Known to tracebacks, dataclasses and pickle by a name that no other file has.
    shown = _shown(file, digest)
    linecache.cache[shown] = (len(text), None, text.splitlines(keepends=True), shown)
    module.__file__ = shown
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, shown, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module
