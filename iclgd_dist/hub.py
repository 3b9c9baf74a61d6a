"""What the hub's client says, in time and in our words. Knows the client's errors; knows nothing of models or files."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from iclgd_dist.config import SweepError


class SourceUnreachable(SweepError):
    """The hub does not answer, so nothing can be said of the model: it may well exist."""


def one_line(error: Exception) -> str:
    """Return what went wrong in one line, without anything that looks like a token or a password."""
    text = " ".join(str(error).split())
    return re.sub(r"(\bhf_|Bearer\s+)[^\s'\"]+|(?<=//)[^/\s@]+@", "***", f"{type(error).__name__}: {text}" if text else type(error).__name__)[:300]


def answer(call: Callable[[], Any], seconds: float) -> Any:
    """Return what `call` returns. Errors: TimeoutError after so many seconds; whatever it raises."""
    future: Future[Any] = Future()

    def ask() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # raised again where the answer is waited for
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return future.result(timeout=seconds)


@contextmanager
def hub_errors(model: str, revision: str) -> Iterator[None]:
    """Say in our words what the hub's client says. Never chained: its requests carry the token."""
    from huggingface_hub import errors, is_offline_mode

    refusals: dict[type[Exception], str] = {
        errors.HFValidationError: "is not a hub id (organisation/name)",
        errors.GatedRepoError: "is gated; accept its terms on the hub, then log in (`hf auth login`, or set HF_TOKEN)",
        errors.RevisionNotFoundError: f"has no revision {revision!r} on the hub",
        errors.RepositoryNotFoundError: "no such model on the hub and no such directory; a private one needs `hf auth login` or HF_TOKEN",
    }
    try:
        yield
    except tuple(refusals) as error:
        raise SweepError(f"model {model!r}: {next(text for kind, text in refusals.items() if isinstance(error, kind))}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError, TimeoutError, ConnectionError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise SweepError(f"model {model!r}: the hub refuses it (status {status}); check the name and your login") from None
        way_out = "give a local directory, or " + ("unset HF_HUB_OFFLINE" if is_offline_mode() else "set HF_HUB_OFFLINE=1 to use the local hub cache")
        raise SourceUnreachable(f"model {model!r}: the hub cannot be reached ({one_line(error)}); {way_out}") from None
