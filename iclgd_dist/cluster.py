"""Sweeps as jobs of a Ray cluster: pack, submit once, follow, stop. Knows Ray's job server and which files a sweep needs; the job itself is `iclgd run`.

What travels is the sweep file, the files beside it that it names, and this project's code. No secret does: Ray logs what a job is started with.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclgd_dist.config import Sweep, SweepError
from iclgd_dist.files import ObjectPath
from iclgd_dist.session import require_answer, require_token, said_by_ray
from iclgd_dist.store import Store
from iclgd_dist.terminal import AS_JOB

PREFIX = "iclgd-"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
DRAIN_SECONDS = 15  # that a job has from SIGTERM to its end
STOP_SECONDS = 30.0
MAX_PACKED_BYTES = 90_000_000  # Ray takes 100 MiB
_RECONNECTS = 20


@dataclass(frozen=True)
class Job:
    """One sweep on a cluster."""

    id: str
    status: str
    message: str = ""
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class Cluster:
    """The job server of a Ray cluster, e.g. http://127.0.0.1:8265. Errors: SweepError when it does not answer or does not take the token."""

    def __init__(self, address: str, *, is_open: bool = False) -> None:
        require_token(is_open=is_open)
        if not address.startswith(("http://", "https://")):
            raise SweepError(f"--address must be that of the dashboard, e.g. http://127.0.0.1:8265, got {address!r}")
        require_answer(address)
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
        self.address, self._errors = address, (RuntimeError, OSError, RayError)
        self._client: Any = self._asking(lambda: JobSubmissionClient(address))

    def _asking(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._errors as error:
            raise SweepError(f"{self.address}: {said_by_ray(error)}") from error

    def job(self, job_id: str) -> Job | None:
        return next((job for job in self.jobs() if job.id == job_id), None)

    def jobs(self) -> list[Job]:
        """Return this project's jobs, the newest last."""
        found = [each for each in self._asking(lambda: self._client.list_jobs()) if (each.submission_id or "").startswith(PREFIX)]
        found.sort(key=lambda each: each.start_time or 0)
        return [Job(each.submission_id, str(each.status.value), " ".join((each.message or "").split()), each.driver_exit_code) for each in found]

    def submit(self, sweep: Sweep, sweep_file: Path, store: Store, *, more: tuple[str, ...] = ()) -> tuple[str, bool]:
        """Start a sweep as a job, unless it runs already; return the job's id and whether this call started it."""
        job_id = id_of(sweep, store)
        known = self.job(job_id)
        if known and not known.has_ended:
            return job_id, False
        if known:
            self._asking(lambda: self._client.delete_job(job_id))
        with tempfile.TemporaryDirectory(prefix="iclgd-job-") as folder:
            pack(sweep, sweep_file, Path(folder))
            command = ["python", "-m", "iclgd_dist.cli", "run", sweep_file.name, "--address", "auto", "--store", str(store.root), *more]
            environment = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(DRAIN_SECONDS), AS_JOB: "1"}}
            try:
                self._asking(lambda: self._client.submit_job(entrypoint=shlex.join(command), submission_id=job_id, runtime_env=environment))
            except SweepError:
                if self.job(job_id) is None:
                    raise
                return job_id, False  # somebody else was a moment earlier
        return job_id, True

    def follow(self, job_id: str) -> Iterator[str]:
        """Yield the job's log as it grows, from its beginning, until the job ends. A lost connection is taken up again."""
        from aiohttp import ClientError

        num_shown, tries = 0, 0
        while True:
            seen = 0
            try:
                for text in _pulled(self._client.tail_job_logs(job_id)):
                    new = text[max(0, num_shown - seen) :]
                    seen += len(text)
                    if new:
                        num_shown, tries = max(num_shown, seen), 0
                        yield new
                job = self.job(job_id)
                if job is None or job.has_ended:
                    return
            except (*self._errors, ClientError, SweepError):
                pass
            tries += 1
            if tries > _RECONNECTS:
                raise SweepError(f"{self.address}: the log of {job_id} does not come; the job goes on, see `iclgd status --address {self.address}`")
            time.sleep(1.0)

    def log(self, job_id: str) -> str:
        return str(self._asking(lambda: self._client.get_job_logs(job_id)))

    def stop(self, job_id: str) -> Job:
        """Ask a job to stop, as SIGTERM would, and wait until it has."""
        self._asking(lambda: self._client.stop_job(job_id))
        end = time.monotonic() + STOP_SECONDS
        while (job := self.job(job_id)) and not job.has_ended and time.monotonic() < end:
            time.sleep(0.5)
        return job or Job(job_id, "STOPPED")


def id_of(sweep: Sweep, store: Store) -> str:
    """Return the id of a sweep's job: the same cells into the same store are one job, whoever submits them and however often."""
    return f"{PREFIX}{sweep.name}-{hashlib.sha256(f'{sweep.digest()} {store.root}'.encode()).hexdigest()[:12]}"


def shared_store(where: str | None) -> Store:
    """Return the store of a job. Errors: SweepError unless it is a place that any machine finds under the same name."""
    if where is None:
        raise SweepError("--store is required: a directory that every node shares, by its full path, or s3://bucket/prefix")
    try:
        store = Store(where)
    except ValueError as error:
        raise SweepError(f"--store {error}") from None
    if not isinstance(store.root, ObjectPath) and not store.root.is_absolute():
        raise SweepError(f"--store must be a full path that every node shares, or s3://bucket/prefix, got {where!r}")
    return store


def pack(sweep: Sweep, sweep_file: Path, folder: Path) -> None:
    """Copy what the job needs into a folder: the sweep file, the files that it names relative to itself, and the code.

    Errors: SweepError for a relative name that leads out of the sweep file's folder, or to a model, and for more than Ray takes.
    """
    shutil.copy(sweep_file, folder / sweep_file.name)
    for name in _named_files(sweep):
        source, inside = sweep.folder / name, (sweep.folder / name).resolve()
        if not source.is_file():
            raise SweepError(f"{sweep_file}: {name}: no such file")
        if not inside.is_relative_to(sweep.folder.resolve()):
            raise SweepError(
                f"{sweep_file}: {name} lies outside its folder and cannot travel; put it beside the sweep file, or give a full path that every node has"
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    for package in ("iclgd_dist", "iclgd_analysis"):
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin
        shutil.copytree(Path(spec.origin).parent, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_PACKED_BYTES:
        raise SweepError(f"{sweep_file}: its files have {size:,} bytes, more than the {MAX_PACKED_BYTES:,} that travel with a job; put them on the shared disk")


def _named_files(sweep: Sweep) -> list[str]:
    """Return the relative names in a sweep file that lead to files."""
    names = [name for own in sweep.task for name in (own.file, own.query_file) if name]
    names += [added.code.rpartition(":")[0] for added in (*sweep.method, *sweep.metric) if added.code]
    for model in sweep.models:
        if "://" not in model.source and (sweep.folder / model.source).exists() and not Path(model.source).is_absolute():
            raise SweepError(f"models: {model.source} lies on this machine; give a full path that every node has, or a hub id")
    return [name for name in dict.fromkeys(names) if not Path(name).is_absolute()]


def _pulled(chunks: Any) -> Iterator[str]:
    """Yield from an asynchronous iterator, one at a time."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(chunks))
            except StopAsyncIteration:
                return
    finally:
        for task in asyncio.all_tasks(loop):  # where a signal came in between
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
