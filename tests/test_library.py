"""The package as a library: names come when they are used, and the README's example runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_no_name_brings_torch_before_a_model_is_loaded() -> None:
    code = """
        import sys, iclgd_dist
        assert set(dir(iclgd_dist)) >= {"__getattr__"} and "torch" not in sys.modules
        from iclgd_dist import Store, load_sweep, plan_sweep, read_results
        assert "torch" not in sys.modules and "ray" not in sys.modules
        from iclgd_dist import load_model, run_block
        assert "torch" in sys.modules and "ray" not in sys.modules
        try:
            iclgd_dist.nothing
        except AttributeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "has no attribute 'nothing'" in done.stdout, done.stderr


EXTRAS = {  # name -> what it brings, a command that needs it
    "objects": ("obstore", ["run", "tiny.toml", "--store", "s3://bucket/prefix"]),
    "search": ("optuna", ["tune", "tiny.toml"]),
}
SEARCH = '\n[search]\nsampler = "tpe"\n[search.learning_rates]\nvanilla = [1e-4, 1e-1]\nlayer_causal = [1e-4, 1e-1]\n'
PROGRAM = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # as if it were not installed
import iclgd_dist
from iclgd_dist.cli import main
try:
    main()
finally:
    print("imported", *(name for name in ("obstore", "optuna", "mlflow", "wandb") if sys.modules.get(name)))
"""


def iclgd(folder: Path, *arguments: str, without: str = "none") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, without, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def test_each_extra_has_a_row() -> None:
    assert set(EXTRAS) == set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]) - {"dev"}


def test_what_is_optional_is_neither_needed_nor_imported_by_what_does_without_it(sweep_file: Path) -> None:
    sweep_file.write_text(sweep_file.read_text() + SEARCH)
    for without in ("none", "obstore,optuna,mlflow,wandb,tensorboardX"):
        for arguments in (["--help"], ["plan", "tiny.toml"]):
            done = iclgd(sweep_file.parent, *arguments, without=without)
            assert done.returncode == 0 and done.stdout.endswith("imported\n"), done.stdout + done.stderr


@pytest.mark.parametrize("extra", EXTRAS)
def test_where_an_extra_is_missing_it_is_named_in_one_line(sweep_file: Path, extra: str) -> None:
    sweep_file.write_text(sweep_file.read_text() + SEARCH)
    package, command = EXTRAS[extra]
    done = iclgd(sweep_file.parent, *command, without=package)
    assert done.returncode in (2, 74) and f"pip install 'iclgd-dist[{extra}]'" in done.stderr and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert not (sweep_file.parent / "results").exists()


def test_the_command_line_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "iclgd_dist", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "iclgd plan" in done.stdout, done.stderr


def test_code_that_travelled_without_being_installed_has_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from iclgd_dist import provenance

    def version(name: str) -> str:
        if name == "iclgd-dist":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(provenance, "version", version)
    said = json.loads(provenance._versions.__wrapped__())
    assert (said["iclgd-dist"], said["ray"]) == ("unknown", "1")


@pytest.mark.slow
def test_the_readmes_example_runs(sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(from iclgd_dist import Store, load_model.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(sweep_file.parent)
    for _ in range(2):
        exec(example.replace("sweeps/demo.toml", str(sweep_file)), {})
    said = capsys.readouterr().out
    assert said.count(" 10 cells") == 1 and said.count(" 9 cells") == 1, "the second time nothing is missing"
    assert "layer_causal" in said
