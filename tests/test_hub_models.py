"""The hub as a source: models are known without their weights, what it refuses is said without the token, and offline its local cache is used."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from iclgd_dist import sources
from iclgd_dist.config import ModelSpec, SweepError
from tests.model_dirs import COMMIT, INDEX, TEXT, WEIGHTS, identify, in_shards, message

pytestmark = pytest.mark.usefixtures("cache")


class Hub:
    """A hub with one model, whose files lie in a directory: notes what is asked of it."""

    def __init__(self, directory: Path, snapshot: Path) -> None:
        self.directory, self.snapshot = directory, snapshot
        self.asked: list[tuple[Any, ...]] = []
        self.downloaded: list[str] = []
        self.error: Exception | None = None

    def model_info(self, model: str, *, revision: str, files_metadata: bool, timeout: float) -> SimpleNamespace:
        self.asked.append((model, revision))
        assert files_metadata and timeout <= 3
        if self.error:
            raise self.error
        siblings = [SimpleNamespace(rfilename=f"onnx/{name}", lfs=None) for name in ("config.json", "tokenizer.model", WEIGHTS)]
        for path in self.directory.iterdir():
            large = SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest()) if path.stat().st_size > 5000 else None
            siblings.append(SimpleNamespace(rfilename=path.name, lfs=large))
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def download(self, model: str, file: str, *, revision: str) -> str:
        assert (model, revision) == ("org/tiny", COMMIT)  # the commit, not the branch: a branch can move
        self.downloaded.append(file)
        self.snapshot.mkdir(exist_ok=True)
        return str(shutil.copy(str(self.directory / file), str(self.snapshot / file)))


@pytest.fixture
def hub(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub(directory, tmp_path / "snapshot")
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stub.download)
    return stub


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_model_is_identified_without_its_weights_and_has_the_hash_of_the_same_files_in_a_directory(hub: Hub, sharded: bool) -> None:
    if sharded:
        in_shards(hub.directory)
    (hub.directory / "README.md").touch()
    (hub.directory / "pytorch_model.bin").touch()
    found = identify("org/tiny")
    assert hub.asked == [("org/tiny", "main")]
    assert set(hub.downloaded) == {"config.json", "tokenizer.json", "tokenizer_config.json"} | ({INDEX} if sharded else set()) | {
        path.name for path in hub.directory.glob("*.safetensors") if path.stat().st_size <= 5000
    }
    assert (found.revision, found.name, found.model_type, found.location) == (COMMIT, "tiny", "llama", "org/tiny")
    assert found.content_hash == identify(hub.directory).content_hash


def test_the_files_of_a_hub_model_are_fetched_at_the_commit_that_was_identified(hub: Hub) -> None:
    (hub.directory / "consolidated.safetensors").touch()
    found = sources.identify(ModelSpec(source="org/tiny", revision="v2"))
    assert hub.asked == [("org/tiny", "v2")]
    hub.downloaded.clear()
    assert sources.load_tokenizer(found)(TEXT)["input_ids"]
    assert WEIGHTS not in hub.downloaded
    hub.downloaded.clear()
    assert sources.fetch(found) == hub.snapshot
    assert sorted(hub.downloaded) == ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
    assert len(hub.asked) == 1


def test_a_hub_model_that_arrives_damaged_is_not_used(hub: Hub) -> None:
    found = identify("org/tiny")
    with (hub.directory / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7e")
    with pytest.raises(SweepError, match="not those that were planned with"):
        sources.fetch(found)


def response(status: int) -> Any:
    request = SimpleNamespace(url="https://hub/api", headers={"authorization": "Bearer hf_canary"})
    return SimpleNamespace(status_code=status, headers={}, request=request)


@pytest.mark.parametrize(
    ("error", "said", "unreachable"),
    [
        (errors.RepositoryNotFoundError("Bearer hf_canary", response=response(404)), "no such model on the hub and no such directory", False),
        (errors.GatedRepoError("hf_canary", response=response(403)), "is gated; accept its terms", False),
        (errors.RevisionNotFoundError("hf_canary", response=response(404)), "has no revision 'main'", False),
        (errors.HfHubHTTPError("hf_canary", response=response(401)), "the hub refuses it (status 401)", False),
        (errors.HfHubHTTPError("503 for Bearer hf_canary", response=response(503)), "cannot be reached", True),
        (errors.HTTPError("Illegal header value b'Bearer hf_canary'"), "cannot be reached (HTTPError: Illegal header value b'***')", True),
        (errors.HTTPError("proxy http://me:canary@proxy:1 is down"), "cannot be reached", True),
        (errors.LocalEntryNotFoundError("offline"), "give a local directory, or set HF_HUB_OFFLINE=1", True),
        (ConnectionError("no route"), "cannot be reached (ConnectionError: no route)", True),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line_without_the_token(hub: Hub, error: Exception, said: str, unreachable: bool) -> None:
    hub.error = error
    with pytest.raises(SweepError) as raised:
        identify("org/tiny")
    text = str(raised.value)
    assert said in text and "'org/tiny'" in text and "canary" not in text and "\n" not in text
    assert isinstance(raised.value, sources.SourceUnreachable) == unreachable
    assert raised.value.__suppress_context__


def test_a_gated_file_is_refused_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise errors.GatedRepoError("no", response=response(403))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert "is gated" in message("org/tiny")


def test_a_hub_that_never_answers_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(sources.SourceUnreachable, match="TimeoutError"):
        identify("org/tiny")
    assert time.monotonic() - start < 2


def test_a_closed_port_is_reported_at_once_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    start = time.monotonic()
    with pytest.raises(sources.SourceUnreachable, match="cannot be reached"):
        identify("org/tiny")
    assert time.monotonic() - start < 3


@pytest.fixture
def hub_cache(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache with one model in it, and no network."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(directory, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


def test_offline_the_local_cache_of_the_hub_is_used_if_it_is_whole(hub_cache: Path, directory: Path) -> None:
    found = identify("org/tiny")
    assert (found.revision, found.location, found.name) == (COMMIT, "org/tiny", "tiny")
    assert found.content_hash == identify(directory).content_hash
    assert sources.fetch(found) == hub_cache
    assert sources.load_tokenizer(found)(TEXT)["input_ids"]


def test_offline_a_model_that_is_not_whole_in_the_cache_is_unreachable(hub_cache: Path) -> None:
    (hub_cache / WEIGHTS).unlink()
    with pytest.raises(sources.SourceUnreachable, match="local hub cache is not complete"):
        identify("org/tiny")
    with pytest.raises(sources.SourceUnreachable, match="unset HF_HUB_OFFLINE"):
        identify("org/other")


def test_a_directory_goes_before_a_hub_model_of_the_same_name(hub: Hub) -> None:
    assert identify("tiny", folder=hub.directory.parent).revision is None
    assert not hub.asked
