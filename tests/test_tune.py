"""`iclgd tune` through the command line, on a real Ray: what it finds stays in the store, apart from the grid, and is never computed twice."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from tensorboardX.proto.event_pb2 import Event

from iclgd_dist import run_commands
from iclgd_dist.config import load_sweep
from iclgd_dist.search import studies_of
from iclgd_dist.stopping import Budget
from iclgd_dist.store import Store, read_results
from iclgd_dist.trackers import guarded
from tests.searches import stopped_early

pytestmark = pytest.mark.slow
ICLGD = [sys.executable, "-m", "iclgd_dist.cli"]
SEARCH = """
[resources]
max_actors = 1

[search]
samples = 6
per_round = 3
rungs = [{ num_queries = 4 }]
constraints = ["balanced_accuracy >= 0.0"]

[search.learning_rates]
vanilla = [1e-4, 1e-1]
layer_causal = [1e-4, 1e-1]
"""


@pytest.fixture
def search_file(sweep_file: Path) -> Path:
    sweep_file.write_text(sweep_file.read_text() + SEARCH)
    return sweep_file


def iclgd(*arguments: str, folder: Path, code: int = 0) -> str:
    done = subprocess.run([*ICLGD, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_a_search_is_resumed_and_what_it_found_is_the_grids_once_a_grid_asks_for_it(search_file: Path) -> None:
    folder, store = search_file.parent, Store(search_file.parent / "results" / "tiny")
    driver = subprocess.Popen(
        [*ICLGD, "tune", str(search_file)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while len(store.keys()) < 4:
        assert driver.poll() is None and time.monotonic() < end, driver.communicate()[0]
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    told = json.loads(iclgd("status", str(store.root), "--json", folder=folder))
    assert (told["extra"], told["missing"]) == (0, 0) and told["committed"] >= 4, "what a search asks for is asked for, and no grid's"
    said = iclgd("tune", str(search_file), folder=folder)
    assert "next: put what was found into [learning_rates]" in said, said
    (row,) = [line for line in said.splitlines() if re.match(r" *fruit +vanilla ", line)]
    assert re.search(r"vanilla +\d\S* +4 +\d\.\d{4} ", row), said
    cells = read_results(store).cells.to_pandas()
    trained = cells[cells.kind == "finetuned"]
    assert set(cells.origin) == {"search"} and not trained.key.duplicated().any()
    assert set(trained.num_queries) == {4, 8} and set(trained[trained.num_queries == 4].seed) == {1}
    steps = sum(attempt["num_training_steps"] for attempt in store.attempts().to_pylist())
    again = iclgd("tune", str(search_file), folder=folder)
    assert again.split("next:")[0].splitlines()[-3:] == said.split("next:")[0].splitlines()[-3:], "the same search, the same answer"
    assert sum(attempt["num_training_steps"] for attempt in store.attempts().to_pylist()) == steps, "all of it from the store"

    iclgd("report", str(store.root), folder=folder)
    assert "(0 zero-shot, 0 in-context, 0 finetuned)" in (store.root / "report.html").read_text()
    whole = trained[(trained.num_queries == 8) & (trained.method == "vanilla")]
    rate = float(whole.learning_rate.iloc[0])
    search_file.write_text(
        search_file.read_text()
        .replace("vanilla = [0.003, 0.05]", f"vanilla = [{rate!r}]")
        .replace("layer_causal = [0.003, 0.05]", f"layer_causal = [{rate!r}]")
        + '\n[controls]\ncontexts = ["separator"]\n'
    )
    said = iclgd("run", str(search_file), folder=folder)
    assert "4 finetuned cells, there before this run, have none of the controls, metrics or measures that the sweep file asks for" in said, said
    assert "have none of" not in iclgd("measure", str(search_file), folder=folder) + iclgd("run", str(search_file), folder=folder)
    found = read_results(store).cells.to_pandas()
    same = found[(found.method == "vanilla") & (found.learning_rate == rate) & (found.num_queries == 8)]
    assert set(same.key) == set(whole[whole.learning_rate == rate].key), "not computed again"
    from iclgd_analysis import load

    frames = load(str(store.root))
    assert set(frames.finetuned.learning_rate) == {rate} and set(frames.finetuned.method) == {"vanilla", "layer_causal"}
    assert frames.num_search and frames.num_missing == 0


def test_a_search_that_is_stopped_anywhere_shows_what_it_found(search_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By a signal while it plans, or as its hours are over before a round."""

    def stopped(*arguments: object, **options: object) -> int:
        raise SystemExit(75)

    monkeypatch.chdir(search_file.parent)
    monkeypatch.setattr(run_commands, "run_sweep", stopped)
    with pytest.raises(SystemExit):
        run_commands._tune(str(search_file), None, None, budget=Budget(), is_open=False, track=())
    assert capsys.readouterr().out.count("nothing was computed") == 2
    with pytest.raises(typer.Exit) as ended:
        run_commands._tune(str(search_file), None, None, budget=Budget(hours=0.0), is_open=False, track=())
    said = capsys.readouterr().out
    assert ended.value.exit_code == 75 and "0 hours are spent" in said and said.count("nothing was computed") == 2


def test_rows_that_differ_in_an_option_alone_say_it(search_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search_file.write_text(search_file.read_text().replace("[search]", '[[protocols]]\n\n[[protocols]]\nseparator = "eos"\n\n[search]'))
    studies = studies_of(load_sweep(search_file))
    for study in studies:
        study.scores.append({})
    run_commands._show_studies(studies)
    said = capsys.readouterr().out
    assert said.count("separator eos") == said.count("separator newline") == 4 and "sink" not in said


def test_without_the_section_it_says_what_to_write(sweep_file: Path) -> None:
    done = subprocess.run([*ICLGD, "tune", str(sweep_file)], cwd=sweep_file.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "[search.learning_rates]" in done.stderr
    assert not (sweep_file.parent / "results").exists()


def test_ray_tunes_asha_stops_learning_rates_that_are_behind_and_nobody_asks_for_them_again(sweep_file: Path) -> None:
    sweep_file.write_text(stopped_early(sweep_file.read_text(), highest=1e3))
    folder, store = sweep_file.parent, Store(sweep_file.parent / "results" / "tiny")
    said = iclgd("tune", str(sweep_file), folder=folder)
    cells = read_results(store).cells.to_pandas()
    trained = cells[cells.kind == "finetuned"]
    last = trained.groupby("learning_rate")["step"].max()
    assert len(last) == 6 and set(last) > {4} and (last < 4).any(), last
    first = trained[trained.step == 1].merge(read_results(store).folds.to_pandas().query("fold == 'A'")[["key", "nll_label"]], on="key", suffixes=("", "_A"))
    losses = first.set_index("learning_rate")["nll_label_A"].fillna(1e9)
    assert losses[last[last == 1].index].min() >= losses[last[last == 4].index].min()
    attempts = store.attempts().to_pylist()
    stopped = [attempt for attempt in attempts if attempt["outcome"] == "stopped"]
    assert len(stopped) == (last < 4).sum() and all("behind other learning rates" in attempt["reason"] for attempt in stopped)
    assert len(attempts) == 6 and {attempt["outcome"] for attempt in attempts} == {"stopped", "done"}
    status = json.loads(iclgd("status", str(store.root), "--json", folder=folder))
    assert (status["missing"], status["failed"], status["attempts"]["stopped"]) == (0, [], len(stopped))
    iclgd("verify", str(store.root), folder=folder)
    again = iclgd("tune", str(sweep_file), folder=folder)
    assert len(store.attempts()) == 6 and again.split("next:")[0].splitlines()[-1] == said.split("next:")[0].splitlines()[-1]


def test_a_tracker_is_told_of_each_committed_step_by_rays_own_callback(sweep_file: Path) -> None:
    folder = sweep_file.parent
    for track, said in (
        ("tensorbored", "--track: unknown tracker 'tensorbored'; did you mean 'tensorboard'?; known: mlflow, tensorboard, wandb"),
        ("wandb", "pip install wandb"),
    ):
        done = subprocess.run([*ICLGD, "run", str(sweep_file), "--track", track], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and said in done.stderr and not (folder / "results").exists()
    iclgd("run", str(sweep_file), "--track", "tensorboard", folder=folder)
    points = {}
    for file in (folder / "tensorboard" / "tiny").glob("*/events.out.tfevents.*"):
        for record in records(file.read_bytes()):
            event = Event.FromString(record)
            points |= {(file.parent.name, value.tag, event.step): value.simple_value for value in event.summary.value}
    cells = read_results(Store(folder / "results" / "tiny")).cells.to_pandas()
    trained = cells[cells.kind == "finetuned"]
    for row in trained.itertuples():
        tag = f"ray/tune/figures/{row.method}_{row.learning_rate:g}/sim_aou"
        (found,) = [value for (block, name, step), value in points.items() if f"-s{row.seed:.0f}-" in block and (name, step) == (tag, row.step)]
        assert found == pytest.approx(row.sim_aou, rel=1e-6)


def records(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def test_a_tracker_that_fails_is_switched_off_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    from ray.tune import Callback

    calls = []

    class Broken(Callback):
        def setup(self, **info: object) -> None:
            calls.append("setup")

        def on_trial_result(self, *arguments: object, **info: object) -> None:
            calls.append("result")
            raise ConnectionError("no such\nserver")

    made = guarded("mlflow", Broken())
    made.setup(total_num_samples=3)
    for _ in range(3):
        made.on_trial_result(iteration=1, trials=[], trial=None, result={})
    made.on_trial_complete(iteration=1, trials=[], trial=None)
    assert calls == ["setup", "result"]
    said = capsys.readouterr()
    assert (said.out + said.err).count("--track mlflow is switched off: ConnectionError: no such server") == 1
