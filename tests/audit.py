"""The supply chain, as far as one machine can look at it: `make audit`, or python -m tests.audit. Not a test.

Holds what is installed against pyproject.toml and constraints/, for which no network is needed, and then lets pip-audit ask for known vulnerabilities of the
exact versions. Where no advisory service answers it says so and goes by the rest: exit code 1 is for what was found, 0 for nothing, with a line for each check.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from iclgd_dist.embedded import PACKAGES

ROOT = Path(__file__).parent.parent
OURSELVES = "iclgd-dist"
TOOLS = {"pip", "wheel"}  # of the virtual environment itself
OF_CUDA = re.compile("nvidia-|cuda-|triton$")  # which a CUDA build of torch brings and pins
LICENCES = re.compile(  # of everything that is installed; each part of an expression has to be one of them
    r"MIT(-0| License)?|0BSD|BSD( License|-[23]-Clause)|3-Clause BSD License|Apache[- ]2\.0( License| WITH LLVM-exception)?|Apache-2\.0 WITH LLVM-exception|"
    r"Apache Software License|PSF-2\.0|Python Software Foundation License|CNRI-Python|ISC License \(ISCL\)|Zlib|CC0-1\.0|BSL-1\.0|"
    r"MPL-2\.0|Mozilla Public License 2\.0 \(MPL 2\.0\)"
)

Pins = Mapping[str, str]  # name -> exact version


def declared(pyproject: str) -> list[Requirement]:
    """Return every requirement of a pyproject.toml, extras included; of the project itself none."""
    project = tomllib.loads(pyproject)["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    return [found for found in map(Requirement, lines) if found.name != project["name"]]


def pins_of(constraints: str) -> dict[str, str]:
    lines = [line.split("\\")[0].strip() for line in constraints.splitlines() if re.match(r"\w", line)]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def ranges(requirements: Iterable[Requirement], pins: Pins) -> Iterator[str]:
    """Yield each requirement without a range, without an exact version, or with one outside its range."""
    for wanted in requirements:
        version = pins.get(canonicalize_name(wanted.name))
        if not wanted.specifier:
            yield f"{wanted.name} has no range in pyproject.toml"
        if version is None:
            yield f"{wanted.name} has no exact version in the constraints"
        elif not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name} {version} of the constraints is outside {wanted.specifier}"


def installed_versions(installed: Iterable[Distribution], pins: Pins) -> Iterator[str]:
    """Yield each installed package that is pinned nowhere, or to another version."""
    for package in installed:
        name = canonicalize_name(package.name)
        if name in TOOLS or name == OURSELVES or OF_CUDA.match(name):
            continue
        if name not in pins:
            yield f"{name} {package.version} is installed, but has no exact version in the constraints"
        elif pins[name] != package.version.partition("+")[0]:
            yield f"{name} {package.version} is installed, {pins[name]} is in the constraints"


def conflicts(embedded: Pins) -> Iterator[str]:
    """Yield what `pip check` finds, but for the packages that are installed without what they import."""
    said = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True).stdout
    for line in said.splitlines():
        if (" requires " in line or " has requirement " in line) and canonicalize_name(line.split()[0]) not in embedded:
            yield line


def hashes(constraints: str) -> Iterator[str]:
    """Yield each embedded package whose download would not be compared with a hash, or that is another version than the code expects."""
    blocks = re.split(r"\n(?=\w)", re.sub(r"^#.*\n", "", constraints, flags=re.MULTILINE).strip())
    for block in blocks:
        if not re.fullmatch(r"[\w.-]+==[\w.]+( \\\n    --hash=sha256:[0-9a-f]{64})+", block.strip()):
            yield f"{block.split()[0]} has no exact version with its sha256"
    pins = pins_of(constraints)
    for task, row in PACKAGES.items():
        if pins.get(canonicalize_name(row.package)) != row.version:
            yield f"task {task} expects {row.package} {row.version}, pinned is {pins.get(canonicalize_name(row.package))}"


def changed_files(installed: Iterable[Distribution], names: Iterable[str]) -> Iterator[str]:
    """Yield each file of some packages that is not what was installed."""
    found = {canonicalize_name(package.name): package for package in installed}
    for name in names:
        if name not in found:
            yield f"{name} is not installed"
            continue
        for file in found[name].files or ():
            path = Path(str(found[name].locate_file(file)))
            if file.hash is None or file.hash.mode != "sha256":
                continue
            if not path.is_file() or base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=") != file.hash.value:
                yield f"{path} is not the file that {name} came with"


def licence_of(package: Distribution) -> str:
    """Return what a package says of its licence: an SPDX expression, else its classifiers, else a first line of text."""
    about = package.metadata
    classifiers = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License ::") and line.count("::") > 1]
    return str(about.get("License-Expression") or " AND ".join(classifiers) or (about.get("License") or "none").strip().splitlines()[0])


def licences(installed: Iterable[Distribution]) -> Iterator[str]:
    for package in installed:
        if OF_CUDA.match(canonicalize_name(package.name)):  # under NVIDIA's own terms, which whoever installs such a build has accepted
            continue
        said = licence_of(package)
        if not all(LICENCES.fullmatch(part) or LICENCES.fullmatch(part.strip("()")) for part in re.split(" AND | OR |; ", said)):
            yield f"{package.name} {package.version} has a licence that is not on the list: {said:.100}"


def advisories(pins: Pins) -> tuple[list[str], str]:
    """Return the known vulnerabilities of exact versions, and why they could not be asked for, where they could not.

    One package is asked for first: without a network that is said in seconds, not once for each of them.
    """
    if importlib.util.find_spec("pip_audit") is None:
        return [], "pip-audit is not installed (`make setup` brings it)"
    found = list[str]()
    for some in (list(pins)[:1], list(pins)):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(f"{name}=={pins[name]}\n" for name in some))
            file.flush()
            command = [
                sys.executable,
                "-m",
                "pip_audit",
                "--requirement",
                file.name,
                "--no-deps",
                "--disable-pip",
                "--format",
                "json",
                "--progress-spinner",
                "off",
            ]
            done = subprocess.run([*command, "--timeout", "10"], capture_output=True, text=True)
        try:
            asked = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError, TypeError):
            return [], f"the advisory service cannot be asked: {(done.stderr.strip().splitlines() or ['no answer'])[-1]:.200}"
        found = [
            f"{each['name']} {each['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'none'}"
            for each in asked
            for flaw in each.get("vulns", ())
        ]
        if skipped := [each for each in asked if "skip_reason" in each]:
            return found, f"the advisory service does not answer for {len(skipped)} of {len(asked)} asked for: {skipped[0]['skip_reason']:.200}"
    return found, ""


def main() -> int:
    constraints = {name: (ROOT / "constraints" / f"{name}.txt").read_text() for name in ("python", "embedded")}
    pins, embedded = pins_of(constraints["python"]), pins_of(constraints["embedded"])
    installed = list(distributions())
    checks = {
        "every dependency has a range, and an exact version within it": ranges(declared((ROOT / "pyproject.toml").read_text()), pins),
        "what is installed are the exact versions": installed_versions(installed, pins | embedded),
        "what is installed fits together (pip check)": conflicts(embedded),
        "packages of model and text are pinned by hash": hashes(constraints["embedded"]),
        "their files are those that were installed": changed_files(installed, embedded),
        "licences are on the list": licences(installed),
    }
    found = {name: sorted(problems) for name, problems in checks.items()}
    found["no version has a known vulnerability"], unknown = advisories(pins)
    for name, problems in found.items():
        state = "fails  " if problems else "unknown" if unknown and name.startswith("no version") else "holds  "
        print(f"{state} {name}", *problems, *([unknown] if state == "unknown" else ()), sep="\n    ")
    print(json.dumps({"holds": not any(found.values()), "advisories_asked": not unknown, "packages": len(installed)}))
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
