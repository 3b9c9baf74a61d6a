"""The command line as a person meets it: messages, exit codes, what is loaded, what is written; and one tiny sweep from end to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from iclgd_dist import cli, run_commands
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results

SLOW_IMPORTS = ("torch", "transformers", "pandas", "ray", "datasets", "accelerate", "scipy", "plotly")
ROOT = Path(__file__).parent.parent
PAPER = ROOT / "sweeps" / "paper.toml"


def iclgd(folder: Path, *arguments: str, before: str = "", **environment: str) -> tuple[int, str, str, set[str]]:
    """Run the command line in a process of its own; return exit code, both outputs and which slow modules it imported."""
    program = f"import sys\n{before}\nfrom iclgd_dist.cli import main\nsys.argv = ['iclgd', *sys.argv[1:]]\ntry:\n    main()\n"
    program += f"finally:\n    print('imported', *(set(sys.modules) & {set(SLOW_IMPORTS)!r}))\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300", "HF_HOME": str(folder / "hub"), "ICLGD_CACHE": str(folder / "cache")} | environment
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    out, _, imported = done.stdout.rpartition("imported")
    return done.returncode, out, done.stderr, set(imported.split())


def change(sweep_file: Path, old: str, new: str) -> None:
    text = sweep_file.read_text()
    assert old in text
    sweep_file.write_text(text.replace(old, new))


# --- Wrong usage: exit 2, one clear message, nothing loaded, nothing written


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = [2, 4]", "steps = [2, 9]", "tiny.toml:7: steps must lie in 1..4 (4 demonstrations / batch 1 x 1 epoch), got 9"),
        ('tasks = ["fruit"]', 'tasks = ["friut"]', "tiny.toml:3: unknown task 'friut'; did you mean 'fruit'?; known: "),
        ('source = "model"', 'source = "./nowhere"', "model './nowhere': a directory, a .gguf file or a hub id (organisation/name) is required"),
    ],
)
def test_what_a_file_gets_wrong_is_one_message_and_exit_code_2(sweep_file: Path, old: str, new: str, message: str) -> None:
    change(sweep_file, old, new)
    for command in ("plan", "run"):
        code, out, errors, imported = iclgd(sweep_file.parent, command, "tiny.toml")
        assert (code, out, imported) == (2, "", set())
        assert errors.startswith(message)
        assert errors.count("\n") == 1
    assert not (sweep_file.parent / "results").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("fruit.csv", "sour", "bitter", "task 'fruit': every label needs a word, got none for 'bitter' (24 rows); labels that have one: 'sweet' (24 rows), 'sour' (0 rows)"),
        ("tiny.toml", "Is {text} sweet?", "Is {txt} sweet?", "fruit.csv:2: unknown column 'txt'; did you mean 'text'?; known: label, text"),
    ],
)  # fmt: skip
def test_what_the_data_get_wrong_is_found_before_a_model_is_loaded(sweep_file: Path, file: str, old: str, new: str, message: str) -> None:
    change(sweep_file.parent / file, old, new)
    code, out, errors, imported = iclgd(sweep_file.parent, "run", "tiny.toml")
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert imported.isdisjoint({"torch", "transformers", "ray"})
    assert not (sweep_file.parent / "results").exists()


@pytest.mark.parametrize("arguments", [["plan"], ["run", "tiny.toml", "--stor", "x"], ["fly"], ["status"]])
def test_arguments_that_are_missing_or_unknown_exit_with_2(tmp_path: Path, arguments: list[str]) -> None:
    code, out, errors, imported = iclgd(tmp_path, *arguments)
    assert (code, out, imported) == (2, "", set())
    assert "Usage: iclgd" in errors


def test_a_store_that_is_a_file_is_refused_with_74(sweep_file: Path) -> None:
    (sweep_file.parent / "taken").write_text("mine")
    for command in ("plan", "run"):
        code, out, errors, _ = iclgd(sweep_file.parent, command, "tiny.toml", "--store", "taken")
        assert (code, out) == (74, "")
        assert errors.startswith("taken/")
        assert errors.count("\n") == 1
        assert "choose a directory for the store, not a file" in errors
    assert (sweep_file.parent / "taken").read_text() == "mine"


def test_the_status_of_a_store_that_is_not_there_is_wrong_usage(sweep_file: Path) -> None:
    for where in ("results/tiny", "tiny.toml", "fruit.csv"):
        code, out, errors, imported = iclgd(sweep_file.parent, "status", where)
        assert (code, out, imported) == (2, "", set())
        assert errors.endswith(": no such store; `iclgd run SWEEP` makes one, by default results/<name of the sweep>\n")
    assert not (sweep_file.parent / "results").exists()


def test_more_than_a_hundred_thousand_cells_are_not_run_unasked(sweep_file: Path) -> None:
    change(sweep_file, "seeds = [1, 2]", f"seeds = {list(range(20_000))}")
    code, _, errors, imported = iclgd(sweep_file.parent, "run", "tiny.toml")
    assert (code, imported) == (2, set())
    assert errors == "tiny.toml: 180,001 cells are more than 100,000; look at `iclgd plan tiny.toml`, then add --yes\n"


# --- Plans without a network


def test_the_paper_is_planned_from_its_file_alone_without_slow_imports(tmp_path: Path) -> None:
    # A port where nothing listens: without a network, and with the offline switch.
    for environment in ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        start = time.monotonic()
        code, out, errors, imported = iclgd(tmp_path, "plan", str(PAPER), **environment)
        assert time.monotonic() - start < 10  # about 1 s alone; the machine may be busy
        assert (code, errors, imported) == (0, "", set())
        assert out.startswith("paper: 4,002 cells in 36 blocks; store results/paper\nnot reachable: tokens, FLOPs and finished cells unknown (model 'KoboldAI/")
        assert out.count("\n") == 2
        told = json.loads(iclgd(tmp_path, "plan", str(PAPER), "--json", **environment)[1])
        assert told["cells"] == 4002 and told["unreachable"]
        unknown = ("cells_to_run", "blocks_to_run", "cells_done", "flops", "peak_gib", "seconds", "training_tokens")
        assert {told[name] for name in unknown} == {None}, "what is not known is not 0"
        code, out, errors, imported = iclgd(tmp_path, "run", str(PAPER), **environment)
        assert (code, out, imported) == (2, "", set())
        assert errors.startswith("model 'KoboldAI/fairseq-dense-1.3B': ")
        assert errors.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("is_finished", [False, True])
def test_what_computes_nothing_imports_no_torch(sweep_file: Path, is_finished: bool) -> None:
    folder, store = sweep_file.parent, Store(sweep_file.parent / "results" / "tiny")
    store.prepare()
    if is_finished:
        for key in make_plan(load_sweep(sweep_file)).keys:
            assert store.commit({"key": key})
    for arguments in (["--help"], ["plan", "tiny.toml"], ["status", "tiny.toml"]):
        code, out, errors, imported = iclgd(folder, *arguments)
        assert (code, errors, imported & {"torch", "transformers", "ray"}) == (0, "", set()), arguments
        if arguments[0] == "plan":
            assert ("to run" in out) is not is_finished


def test_a_name_server_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    hanging = "import socket, time\nsocket.getaddrinfo = lambda *a, **k: time.sleep(100)"
    start = time.monotonic()
    code, out, _, _ = iclgd(tmp_path, "plan", str(PAPER), before=hanging, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://hub.invalid")
    assert code == 0
    assert "not reachable: tokens, FLOPs and finished cells unknown" in out
    assert time.monotonic() - start < 15


def test_the_plan_says_what_kept_captures_take(sweep_file: Path) -> None:
    assert "captures  " not in iclgd(sweep_file.parent, "plan", "tiny.toml")[1]
    change(sweep_file, "[learning_rates]", '[capture]\nkeep = "final_step"\n[learning_rates]')
    code, out, _, _ = iclgd(sweep_file.parent, "plan", "tiny.toml")
    assert code == 0
    assert re.search(r"captures +\d+\.\d kB kept, of 11 cells", out), out  # zero-shot once, per seed: in-context, and two rates of two methods


def test_help_shows_the_commands_in_the_order_of_their_use(tmp_path: Path) -> None:
    code, out, _, imported = iclgd(tmp_path, "--help")
    assert (code, imported) == (0, set())
    assert re.findall(r"iclgd (\w+) +(?:sweeps|results)/demo", out) == ["plan", "run", "status", "report"]
    assert "The command line" not in out


@pytest.mark.parametrize("name", sorted(path.name for path in PAPER.parent.glob("*.toml")))
def test_every_sweep_that_comes_with_the_project_counts_its_cells_rightly_in_its_comment(name: str) -> None:
    from iclgd_dist.config import load_sweep
    from iclgd_dist.plan import count_cells
    from iclgd_dist.search import num_cells_at_most

    comment = [line for line in (PAPER.parent / name).read_text().splitlines() if line.startswith("#")]
    sweep = load_sweep(PAPER.parent / name)
    counted = f"at most {num_cells_at_most(sweep):,} finetuned cells" if sweep.search else f"= {count_cells(sweep)[0]:,} cells"
    assert counted in " ".join(comment)


# --- Stopped before any block runs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_planning_ends_with_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["iclgd", "run", "a sweep.toml"])
    monkeypatch.setattr(run_commands, "loaded_if_small", lambda path, **_: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])
    assert ended.value.code == code
    assert capsys.readouterr().out.endswith("To resume:\niclgd run 'a sweep.toml'\n")


# --- A sweep from end to end


def figures(out: str) -> dict[str, str]:
    """Return the lines `name   value` of `iclgd status`."""
    return {match[1]: match[2].strip() for line in out.splitlines() if (match := re.match(r" ?(\S.*?)  +(\S.*)", line))}


@pytest.mark.slow
def test_a_sweep_runs_once_resumes_to_nothing_and_grows(sweep_file: Path) -> None:
    folder, store = sweep_file.parent, Store(sweep_file.parent / "results" / "tiny")
    code, out, errors, imported = iclgd(folder, "plan", "tiny.toml")
    assert (code, errors) == (0, "")
    assert "tiny: 19 cells in 2 blocks; store results/tiny\n" in out
    assert figures(out)["to run"] == "19 cells in 2 blocks; 0 are there"
    code, out, errors, _ = iclgd(folder, "plan", "tiny.toml", "--json")
    told = json.loads(out)
    assert (code, told["cells"], told["cells_to_run"], told["blocks_to_run"], told["cells_done"]) == (0, 19, 19, 2, 0) and told["flops"] > 0
    assert len(told["notes"]) == 2, "labels of several tokens"
    assert not store.root.exists()

    code, out, errors, _ = iclgd(folder, "run", "tiny.toml")
    assert code == 0, errors
    assert "next: iclgd report results/tiny" in out
    first = store.keys()
    assert len(first) == len(read_results(store).cells) == 19
    _, out, _, imported = iclgd(folder, "status", "tiny.toml")
    assert imported.isdisjoint({"torch", "transformers", "ray"})
    shown = figures(out)
    assert (shown["cells planned"], shown["cells committed"], shown["cells missing"], shown["cells no sweep asks for"]) == ("19", "19", "0", "0")
    attempts = read_results(store).attempts.to_pylist()
    assert shown["blocks run"] == str(len(attempts))
    assert shown["baselines computed"].startswith(f"{2 * len(attempts)} ")
    assert shown["training steps"].startswith(f"{2 * 4 * 2 * 2} ")  # seeds x steps x methods x learning rates
    assert shown["models loaded"] == f"{shown['actors']} (at most 1 by one actor)"
    assert shown["attempts not done"] == "0"
    told = json.loads(iclgd(folder, "status", "tiny.toml", "--json")[1])
    assert (told["planned"], told["committed"], told["missing"], told["attempts"]) == (19, 19, 0, {"done": len(attempts)})
    told = json.loads(iclgd(folder, "verify", "results/tiny", "--json")[1])
    assert told["is_whole"] and told["cells"] == 19 and not told["missing"] + told["damaged"]

    code, out, errors, imported = iclgd(folder, "run", "tiny.toml")
    assert (code, errors, imported & {"ray"}) == (0, "", set())
    assert "0 cells to run: all 19 are in results/tiny\n" in out
    assert read_results(store).attempts.to_pylist() == attempts

    change(sweep_file, "vanilla = [0.003, 0.05]", "vanilla = [0.003, 0.05, 0.2]")
    _, out, _, _ = iclgd(folder, "plan", "tiny.toml")
    assert figures(out)["to run"] == "4 cells in 2 blocks; 19 are there"
    code, _, errors, _ = iclgd(folder, "run", "tiny.toml")
    assert code == 0, errors
    results = read_results(store)
    new = [row for row in results.cells.to_pylist() if row["key"] not in first]
    assert sorted((row["seed"], row["method"], row["learning_rate"], row["step"]) for row in new) == [(s, "vanilla", 0.2, n) for s in (1, 2) for n in (2, 4)]
    later = results.attempts.to_pylist()[len(attempts) :]
    assert (sum(row["num_cells"] for row in later), sum(row["num_training_steps"] for row in later)) == (4, 2 * 4)
    _, out, _, _ = iclgd(folder, "status", "results/tiny")
    assert figures(out)["cells committed"] == "23"


def test_own_methods_and_metrics_controls_and_random_weights_run_through_a_sweep_and_appear_in_its_report(sweep_file: Path) -> None:
    folder, store = sweep_file.parent, Store(sweep_file.parent / "results" / "tiny")
    (folder / "rules.py").write_text(
        "from iclgd_dist.updates import Vanilla\n\nclass Signed(Vanilla):\n    def direction(self, gradient, state):\n        return gradient.sign()\n"
    )
    (folder / "mine.py").write_text("def margin(zero_shot, in_context, finetuned):\n    return finetuned.label_scores_QC.diff(dim=1)[:, 0]\n")
    change(sweep_file, "seeds = [1, 2]", 'seeds = [1]\nmethods = ["vanilla", "one_layer", "lora", "everything", "adam", "signed"]')
    change(sweep_file, "layer_causal = [0.003, 0.05]", "\n".join(f"{name} = [0.0005]" for name in ("one_layer", "lora", "everything", "adam", "signed")))
    variations = {"one_layer": "layers = [-1]", "lora": "rank = 2", "everything": 'weights = "all_linear"', "adam": 'optimizer = "adam"'}
    methods = "".join(f'[[method]]\nname = "{name}"\nbase = "vanilla"\n{how}\n\n' for name, how in variations.items())
    more = '[controls]\ncontexts = ["separator"]\nrandom_delta = true\n\n[capture]\nkeep = "final_step"\n\n[[method]]\nname = "signed"\ncode = "rules.py:Signed"\n\n'
    more += "[resources]\nmax_actors = 1\n\n"  # a block that is split over two lacks pairs of learning rates, which `measure` would train again
    change(sweep_file, "[[models]]", methods + more + "[[models]]")
    code, out, errors, _ = iclgd(folder, "run", "tiny.toml")
    assert code == 0, errors
    assert "random weights of the same effect for " in out
    results = read_results(store)
    assert len(results.cells) == 2 + 2 * 7
    assert {"separator", "random_delta_0", "random_delta_2"} <= set(results.controls["control"].to_pylist())
    code, out, errors, imported = iclgd(folder, "run", "tiny.toml")
    assert (code, errors, imported & {"ray"}) == (0, "", set()), "random weights that are there are not made again"

    change(sweep_file, "[[models]]", '[[metric]]\nname = "margin"\ncode = "mine.py:margin"\n\n[[models]]')
    assert "0 cells to run" in iclgd(folder, "run", "tiny.toml")[1]  # a metric changes no key
    change(sweep_file, "steps = [2, 4]", "steps = 4")  # of step 2 no captures were kept
    code, out, errors, imported = iclgd(folder, "measure", "tiny.toml")
    assert (code, errors, imported & {"ray"}) == (0, "", set())
    assert "7 cells measured from kept captures\nnothing to train again\n" in out
    assert "0 cells measured from kept captures\nnothing to train again\n" in iclgd(folder, "measure", "tiny.toml")[1]
    assert len(set(read_results(store).metrics["cell"].to_pylist())) == 7
    code, out, errors, _ = iclgd(folder, "report", "tiny.toml")
    assert code == 0, errors
    table, measures, controls = (pd.read_csv(store.root / "figures" / f"{name}.csv") for name in ("table", "measures", "controls"))
    assert {"one_layer", "lora", "everything", "adam", "signed"} <= {*table["method"]}
    assert "margin" in {*measures["metric"]} and {"separator", "random_delta"} <= {*controls["against"]}


def test_help_loses_no_word_to_markup() -> None:
    """Brackets in a help text are markup, and vanish."""
    assert not [command.callback.__name__ for command in cli.app.registered_commands if command.callback and "[" in (command.callback.__doc__ or "")]
