"""The package as a library: names come when they are used, and the README's example runs."""

from __future__ import annotations

import re
import subprocess
import sys
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


@pytest.mark.slow
def test_the_readmes_example_runs(sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(from iclgd_dist import Store, load_model.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(sweep_file.parent)
    for _ in range(2):
        exec(example.replace("sweeps/demo.toml", str(sweep_file)), {})
    said = capsys.readouterr().out
    assert said.count(" 10 cells") == 1 and said.count(" 9 cells") == 1, "the second time nothing is missing"
    assert "layer_causal" in said
