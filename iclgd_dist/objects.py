"""Objects of a bucket under names like those of files: s3://, gs:// and az://. Knows the client (obstore) and its errors; knows nothing of cells or tables.

What the store's promises rest on is the conditional put: an object is created whole, and by the first who asks. There are no directories, no temporary names and
nothing to sync. Credentials and regions come from the environment, as the client documents them (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from iclgd_dist.store_errors import AGAIN, StoreError, Vanished

URL = re.compile(r"(s3|gs|az|abfss?)://[^/]+(/.*)?")
_CREDENTIALS = "check the credentials in the environment and what they may do with the bucket"
PAUSES = (0.5, 2.0)  # before a conditional put is tried again [s]
_NETWORK = f"check the address, the bucket's name and the network, {AGAIN}"


@dataclass(frozen=True)
class ObjectPath:
    """A name in a bucket, with as much of pathlib's manners as the store needs."""

    root: str  # URL of the store: bucket and prefix
    key: str = ""  # below it

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.root, f"{self.key}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}".rstrip("/")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def with_suffix(self, suffix: str) -> ObjectPath:
        return self.parent / Path(self.name).with_suffix(suffix).name

    def absolute(self) -> ObjectPath:
        return self

    def names(self) -> list[str]:
        """Return the names directly below this one."""
        with self._asking("listed"):
            listed = [meta["path"] for page in _client().list(_bucket(self.root), self.key or None, chunk_size=10_000) for meta in page]
        below = [path[len(self.key) :].lstrip("/") for path in listed]
        return [name for name in below if "/" not in name]

    def holds_anything(self) -> bool:
        with self._asking("listed"):
            return any(len(page) for page in _client().list(_bucket(self.root), self.key or None, chunk_size=1))

    def exists(self) -> bool:
        try:
            self._head()
        except Vanished:
            return False
        return True

    def read(self) -> pa.Buffer:
        with self._asking("read"):
            return pa.py_buffer(_client().get(_bucket(self.root), self.key).bytes())

    def create(self, data: bytes) -> bool:
        """Create the object unless it exists; it is stored on return. Returns True if this call created it."""
        for pause in (*PAUSES, None):
            try:
                with self._asking("written"):
                    _client().put(_bucket(self.root), self.key, data, mode="create", use_multipart=False)
                return True
            except _client().exceptions.AlreadyExistsError:
                with contextlib.suppress(Vanished):
                    return bool(self.read().to_pybytes() == data)  # an answer was lost, and we or the client asked again: then it was this call
            except StoreError as error:  # the client does not ask again when it is not known whether a put came through
                if pause is None or error.way_out != _NETWORK:
                    raise
            if pause is not None:
                time.sleep(pause)
        return False  # it was there, and somebody deletes it all the time

    def put(self, data: bytes | Path) -> None:
        """Store the object, whatever was there. A file may be of any size."""
        with self._asking("written"):
            _client().put(_bucket(self.root), self.key, data)

    def delete(self) -> None:
        with self._asking("deleted"), contextlib.suppress(FileNotFoundError):
            _client().delete(_bucket(self.root), self.key)

    def modified(self) -> float:
        """Return when the object was written, by the clock of the object store [s]."""
        return float(self._head()["last_modified"].timestamp())

    def size(self) -> int:
        """Return the bytes of the object; 0 where it is gone."""
        try:
            return int(self._head()["size"])
        except Vanished:
            return 0

    def _head(self) -> Any:
        with self._asking("read"):
            return _client().head(_bucket(self.root), self.key)

    @contextlib.contextmanager
    def _asking(self, verb: str) -> Iterator[None]:
        errors = _client().exceptions
        try:
            yield
        except FileNotFoundError as error:
            if verb == "read":
                raise Vanished(str(self)) from error
            raise StoreError(f"cannot be {verb}: no such bucket", self, way_out=_NETWORK) from error
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise StoreError(f"cannot be {verb}: not allowed", self, way_out=_CREDENTIALS) from error
        except errors.AlreadyExistsError:
            raise
        except (errors.BaseError, OSError, ValueError) as error:
            raise StoreError(f"cannot be {verb}: {_first_line(error)}", self, way_out=_NETWORK) from error


def object_path(url: str) -> ObjectPath:
    """Return the path of a store's URL. Errors: StoreError where the client is not installed or does not take the URL."""
    path = ObjectPath(url.rstrip("/"))
    with path._asking("opened"):
        _bucket(path.root)
    return path


@lru_cache(maxsize=8)
def _bucket(root: str) -> Any:
    from obstore.store import from_url

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    # A read timeout runs while a request is sent, too: it bounds the upload of a kept capture.
    options: Any = {"connect_timeout": "5s", "read_timeout": "10m", "timeout": "1h", **({"allow_http": True} if endpoint.startswith("http://") else {})}
    return from_url(root, client_options=options, retry_config={"max_retries": 6, "retry_timeout": timedelta(seconds=60)})


def _client() -> Any:
    try:
        import obstore
        import obstore.exceptions
    except ImportError:
        raise StoreError("needs the client of object stores", "s3://, gs:// or az://", way_out="pip install 'iclgd-dist[objects]'") from None
    return obstore


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
