"""Manifests: which files of many cells count, and which cells they hold. Knows their format; knows nothing of cells or of how files appear."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from iclgd_dist import files
from iclgd_dist.cells import UPDATE
from iclgd_dist.files import Location, StoreError, naming

VERSION = 3  # 1: all parts are Parquet; 2: without a checksum
PART_NAME = re.compile(r"part-\d{8}-[0-9a-f]{16}\.(?:arrows|parquet)")
NAME = re.compile(r"manifest-(\d{8})\.json")


@dataclass(frozen=True)
class Part:
    """A file of many cells."""

    file: str
    sha256: str
    commits: dict[str, str]  # key -> 16 hex digits of the sha256 of the loose file it came from


@dataclass(frozen=True)
class Manifest:
    """The files that count, as of one compaction. Never changed once written."""

    number: int = 0
    parts: tuple[Part, ...] = ()

    @cached_property
    def commits(self) -> dict[str, str]:
        return {key: commit for part in self.parts for key, commit in part.commits.items()}


def read(path: Location, number: int) -> Manifest:
    """Read a manifest. Errors: StoreError when it is damaged or of a newer version; Vanished when it is gone."""
    with naming(path, "read"):
        try:
            content = json.loads(files.read(path))
            version, said = content["version"], content.pop("sha256", None)
            if version > VERSION:
                raise StoreError("is of a newer version", path, way_out=UPDATE)
            if version not in range(1, VERSION + 1):
                raise ValueError(f"its version must be one of 1 to {VERSION}, got {version!r:.80}")
            if (said is not None or version == VERSION) and said != checksum(content):
                raise ValueError("its checksum is not that of its content")
            parts = tuple(Part(file=part["file"], sha256=part["sha256"], commits=dict(part["commits"])) for part in content["parts"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error
        if not all(isinstance(said, str) for part in parts for said in (part.file, part.sha256, *part.commits, *part.commits.values())):
            raise ValueError("not a manifest: names and hashes must be text")
        if strange := [part.file for part in parts if not PART_NAME.fullmatch(part.file)]:
            raise ValueError(f"names the file {strange[0]!r}, which is not a part")
        manifest = Manifest(number, parts)
        if len(manifest.commits) < sum(len(part.commits) for part in parts):
            raise ValueError("lists a cell in two parts")
    return manifest


def following(folder: Location, number: int, parts: Sequence[Part]) -> tuple[Location, bytes]:
    """Return name and content of the manifest that follows manifest `number`."""
    content: dict[str, Any] = {"version": VERSION, "parts": [vars(part) for part in parts]}
    return folder / f"manifest-{number + 1:08d}.json", json.dumps(content | {"sha256": checksum(content)}).encode()


def checksum(content: dict[str, Any]) -> str:
    """Return what a record says of itself: the sha256 of its content without this."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
