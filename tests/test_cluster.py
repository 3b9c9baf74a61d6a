"""What travels with a job, under which id, and what is refused before anything is sent. The job server itself: tests/faults/test_jobs.py."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from iclgd_dist import session
from iclgd_dist.cluster import Cluster, id_of, pack, shared_store
from iclgd_dist.config import Resources, SweepError, load_sweep
from iclgd_dist.store import Store

METHOD = """
[[method]]
name = "mine"
code = "rules/my_rules.py:Mine"
"""


def test_the_sweep_its_files_and_the_code_travel_and_plan_the_same_cells_there(sweep_file: Path, tmp_path: Path) -> None:
    (sweep_file.parent / "rules").mkdir()
    (sweep_file.parent / "rules" / "my_rules.py").write_text("class Mine:\n    pass\n")
    text = sweep_file.read_text().replace("[learning_rates]", 'methods = ["vanilla", "mine"]\n[learning_rates]\nmine = [0.1]')
    text = text.replace('source = "model"', f'source = "{sweep_file.parent / "model"}"')
    sweep_file.write_text(text + METHOD)
    folder = tmp_path / "packed"
    folder.mkdir()
    pack(load_sweep(sweep_file), sweep_file, folder)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"tiny.toml", "fruit.csv", "rules/my_rules.py", "iclgd_dist/cli.py", "iclgd_analysis/load.py"} <= there
    assert not [name for name in there if "__pycache__" in name or name.startswith(("tests", ".git"))]
    planned = [
        subprocess.run([sys.executable, "-m", "iclgd_dist.cli", "plan", "tiny.toml"], cwd=place, capture_output=True, text=True, check=True).stdout
        for place in (folder, sweep_file.parent)
    ]
    assert planned[0].splitlines()[0] == planned[1].splitlines()[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('file = "fruit.csv"', 'file = "../fruit.csv"', r"tiny.toml: \.\./fruit.csv lies outside its folder"),
        ("", "", r"models: model lies on this machine; give a full path that every node has, or a hub id"),
    ],
)
def test_what_no_other_machine_has_is_refused(sweep_file: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    inside = folder / "tiny.toml"
    text = sweep_file.read_text()
    if old:
        text = text.replace(old, new).replace('source = "model"', f'source = "{sweep_file.parent / "model"}"')
    inside.write_text(text)
    for name in ("model", "fruit.csv"):
        (folder / name).symlink_to(sweep_file.parent / name)
    (tmp_path / "packed").mkdir()
    with pytest.raises(SweepError, match=message):
        pack(load_sweep(inside), inside, tmp_path / "packed")


def test_the_same_cells_into_the_same_store_are_one_job(sweep_file: Path) -> None:
    sweep, store = load_sweep(sweep_file), Store("/shared/results")
    sweep_file.write_text("# a comment\n" + sweep_file.read_text().replace("seeds = [1, 2]", "seeds = [2, 1]"))
    assert id_of(load_sweep(sweep_file), store) == id_of(sweep, store)
    assert id_of(sweep, Store("/shared/others")) != id_of(sweep, store)
    sweep_file.write_text(sweep_file.read_text().replace("seeds = [2, 1]", "seeds = [2, 1, 3]"))
    assert id_of(load_sweep(sweep_file), store) != id_of(sweep, store)
    assert id_of(sweep, store).startswith("iclgd-tiny-")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"cpus_per_actor": 4}, ""),
        ({"cpus_per_actor": 5}, "cpus_per_actor = 5, but no node of the cluster has more than 4"),
        ({"gpus_per_actor": 2}, "gpus_per_actor = 2, but no node of the cluster has more than 1"),
        ({"cpus_per_actor": 4, "gpus_per_actor": 1}, "no single node of the cluster has both"),
    ],
)
def test_a_plan_for_a_cluster_looks_at_its_nodes(monkeypatch: pytest.MonkeyPatch, wanted: dict[str, int], message: str) -> None:
    monkeypatch.setattr(session, "require_answer", lambda address: None)
    monkeypatch.setattr(session, "connected", lambda address, *, is_open: contextlib.nullcontext())
    monkeypatch.setattr(session, "nodes", lambda: [{"Resources": {"CPU": 4.0}}, {"Resources": {"CPU": 2.0, "GPU": 1.0}}])
    with pytest.raises(SweepError, match=message) if message else contextlib.nullcontext():
        session.check_cluster(Resources(**wanted), "10.0.0.1:6379")


def test_without_a_token_it_says_where_one_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refused(**_: object) -> None:
        raise RuntimeError("Token authentication is enabled but no authentication token was found. Ensure that")

    assert any("but no authentication token was found" in path.read_text() for path in Path(ray.__file__).parent.glob("_private/authentication/*.py"))
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(SweepError, match="no token was found; export RAY_AUTH_TOKEN_PATH") as caught, session.connected("auto"):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", [None, "results/tiny"])
def test_a_store_that_only_this_machine_finds_is_refused(where: str | None) -> None:
    with pytest.raises(SweepError, match="--store"):
        shared_store(where)


@pytest.mark.parametrize(
    ("address", "message"), [("auto", "that of the dashboard"), ("http://127.0.0.1:1", "no Ray cluster answers at http://127.0.0.1:1: Connection refused")]
)
def test_an_address_that_is_none_is_refused_at_once(address: str, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        Cluster(address)
