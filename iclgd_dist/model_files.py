"""Files of models and the cache they are made in: which files a directory's model is, what they hold, their hashes. Knows no library that opens models."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from iclgd_dist.config import SweepError
from iclgd_dist.hub import one_line
from iclgd_dist.weights import first_nan

CONFIG, SINGLE, INDEX, ADAPTER = "config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_DIGESTS = "weights.sha256.json"  # beside weights of ours
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "added_tokens.json")
MAX_LEVELS = 50  # of JSON
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
VOCABULARIES = ("tokenizer.json", "vocab*", "*.model")  # one of them at least makes a tokenizer
log = logging.getLogger(__name__)


def files_of(where: str, names: set[str], read: Callable[[str], Any]) -> list[str]:
    """Return the names that make up the model, out of those at hand; `read` parses one of them."""
    if CONFIG not in names:
        raise SweepError(f"{where}: has no {CONFIG}" + (": name one of its .gguf files" if any(name.endswith(".gguf") for name in names) else ""))
    tokenizer = [name for name in names if any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)]
    if not any(fnmatch(name, pattern) for name in tokenizer for pattern in VOCABULARIES):
        raise SweepError(f"{where}: has no tokenizer; one of {', '.join(VOCABULARIES)} is required")
    if ADAPTER in names:
        raise SweepError(f"{where}: has {ADAPTER}, and what it names may take the place of these weights; merge the adapter into them, or remove it")
    if SINGLE in names:
        return [CONFIG, *tokenizer, SINGLE]
    if INDEX not in names:
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        way_out = "`iclgd convert-weights DIR` reads the tensors in a directory's pickles, and nothing else, and writes safetensors"
        got = f"got only pickles ({', '.join(pickles[:3])}), which can run code; {way_out}" if pickles else "got neither"
        raise SweepError(f"{where}: weights in {SINGLE} or {INDEX} are required, {got}")
    return [CONFIG, *tokenizer, INDEX, *_shards(where, names, read(INDEX))]


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a directory's weights. What else lies there was not looked at and must not be opened: it may be a FIFO."""
    names = set(os.listdir(directory))
    return [directory / name for name in ([SINGLE] if SINGLE in names else _shards(f"{directory}", names, read_json(directory / INDEX)))]


def _shards(where: str, names: set[str], index: Any) -> list[str]:
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise SweepError(f"{where}: {INDEX} has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or shard not in names or not shard.endswith(".safetensors"):
            raise SweepError(f"{where}: {INDEX} must name .safetensors files that lie beside it, got {shard!r}")
    return sorted(set(shards.values()))


def _require_file(path: Path) -> None:
    if not path.is_file():  # opening a FIFO would wait for ever
        raise SweepError(f"{path}: must be a regular file, or a link to one")


def read_json(path: Path) -> Any:
    """Return what a file holds. Errors: SweepError for one that is no regular file, no JSON, or nested so deeply that libraries give up."""
    _require_file(path)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SweepError(f"{path}: is not JSON: {one_line(error)}") from None
    level = [found]
    for _ in range(MAX_LEVELS):
        level = [inner for each in level if isinstance(each, dict | list) for inner in (each.values() if isinstance(each, dict) else each)]
    if level:
        raise SweepError(f"{path}: is nested too deeply: more than {MAX_LEVELS} levels")
    return found


def sha256_of(path: Path) -> str:
    """Return the file's hash. Checked and hashed only when its size or times are new: a file, no git-lfs pointer, what its name says, and without NaN."""
    _require_file(path)
    status = path.stat()
    # The change time too: copying tools put the modification time back, and a finetuned model has the size of its base.
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    known = cache_folder("hashes") / (hashlib.sha256(os.path.abspath(path).encode()).hexdigest() + ".json")
    try:
        entry = json.loads(known.read_bytes())
        if entry["stamp"] == stamp:
            return str(entry["sha256"])
        log.warning("%s has changed since it was last used: if its content has, its cells get new keys", path)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed before, or a damaged entry
    with path.open("rb") as file:
        start = file.read(24)
        if start.startswith(b"version https://git-lfs"):
            raise SweepError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in that directory")
        if path.suffix == ".gguf" and start[:4] != b"GGUF":
            raise SweepError(f"{path}: is not a GGUF file: it must start with b'GGUF', got {start[:4]!r}")
        if path.suffix == ".safetensors":
            try:
                safe_open(path, "np")  # checks the header against the file's size; reads no weights
            except SafetensorError as error:
                raise SweepError(f"{path}: is not a whole safetensors file ({one_line(error)})") from None
            if name := first_nan(path):
                raise SweepError(f"{path}: its weights must be numbers, {name} holds NaN; get the file again, or an earlier checkpoint")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    new = known.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    new.write_text(json.dumps({"path": os.path.abspath(path), "stamp": stamp, "sha256": digest}))
    new.replace(known)
    return digest


def cache_dir() -> Path:
    """Return where converted models and file hashes are kept: $ICLGD_CACHE, else `iclgd` in the user's cache directory."""
    if own := os.environ.get("ICLGD_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "iclgd"


def cache_folder(kind: str) -> Path:
    try:
        (cache_dir() / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{cache_dir()}: the cache cannot be written ({error.strerror}); set ICLGD_CACHE to a directory that can") from None
    return cache_dir() / kind


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return `target`, filled by `make` if it is not there: by one process only, and never seen half-made; SweepError if its weights changed since."""
    if not target.is_dir():
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                new = target.with_name(f"{target.name}.new")
                shutil.rmtree(new, ignore_errors=True)  # left by a process that was killed: the lock says nobody else is at it
                new.mkdir()
                make(new)
                if weights := sorted(new.glob("*.safetensors")):
                    (new / _DIGESTS).write_text(json.dumps({path.name: sha256_of(path) for path in weights}))
                new.rename(target)
    made = json.loads((target / _DIGESTS).read_text()) if (target / _DIGESTS).exists() else {}
    for name, digest in made.items():
        if sha256_of(target / name) != digest:
            raise SweepError(f"{target / name} is not what was written there; delete {target}, and it is made anew")
    return target
