"""`python -m tests.faults.mutants [NAME...]`: break the code in one way at a time, in a copy, and see that the test of that fault fails.

The last line is JSON: mutants, survivors, holds. A mutant that cannot be made any more (the code has changed) is an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HALF_A_CELL = """    if isinstance(path, Path) and path.suffix == ".arrows":
        if path.exists():
            return False
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            reach("mid_write")
            file.write(data[len(data) // 2 :])
        reach("before_link")
        reach("after_link")
        return True
    temporary, view = temporary_in(path.parent), memoryview(data)
"""


@dataclass(frozen=True)
class Mutant:
    what: str
    test: str  # file of tests/, and what pytest -k selects
    edits: tuple[tuple[str, str, str], ...]  # module, old, new

    def make(self, root: Path) -> None:
        for module, old, new in self.edits:
            path = root / "iclgd_dist" / f"{module}.py"
            text = path.read_text()
            assert text.count(old) >= 1, f"{self.what}: {path.name} does not hold {old!r}"
            path.write_text(text.replace(old, new))


MUTANTS = {
    "bucket": Mutant("the last writer wins in a bucket", "test_objects.py at_once", (("objects", 'mode="create", ', ""),)),
    "bucket conflict": Mutant(
        "any conflict is a loss",
        "test_objects.py conflict",
        (("objects", "with contextlib.suppress(Vanished):\n", "with contextlib.suppress(Vanished):\n                    return False\n"),),
    ),
    "manifest": Mutant(
        "a compaction takes every answer for yes",
        "test_store_at_once.py two_compactions",
        (
            ("store", "            is_published = publish(*", "            is_published = True or publish(*"),
            ("store", "            is_published &= self.manifest()", "            self.manifest()"),
        ),
    ),
    "late cell": Mutant(
        "a cell is not looked for in the manifest after its commit",
        "test_store_at_once.py",
        (("store", '        if self.manifest().commits.get(row["key"], short_hash(data)) != short_hash(data):\n', "        if False:\n"),),
    ),
    "reader": Mutant(
        "a reader asks for the manifest before it reads the loose cells",
        "test_store_at_once.py",
        (
            ("store", "        manifest = self.manifest()  # after", "        pass  # after"),
            ("store", "        known = self.manifest().commits\n", "        known = (manifest := self.manifest()).commits\n"),
        ),
    ),
    "rebuilt": Mutant(
        "a part that shares a cell with a newer one is dropped",
        "test_upkeep.py orphan",
        (("upkeep", 'if new := dict.fromkeys(sorted(keys - seen), ""):', 'if (new := dict.fromkeys(sorted(keys - seen), "")) and len(new) == len(keys):'),),
    ),
    "forgotten": Mutant(
        "forget publishes no manifest where no part changes",
        "test_upkeep.py paused",
        (
            (
                "upkeep",
                "        following = _replace(store, manifest, changed)  # also",
                "        following = _replace(store, manifest, changed) if changed else manifest  # also",
            ),
        ),
    ),
    "secrets": Mutant("credentials travel with the actors", "faults/test_buckets.py killed", (("trials", "    _keep_secrets()\n", ""),)),
    "store missing": Mutant(
        "a node without the store is no matter",
        "test_actor.py reach",
        (("actor", "        if self.problem:  # what", "        if False:  # what"),),
    ),
    "preempted": Mutant(
        "a node that dies counts against its blocks",
        "faults/test_clusters.py f5",
        (
            ("trials", 'if "node has died" not in reason:', "if True:"),
            ("trials", "if node and node not in alive and counts.deaths.get(name):", "if False:"),  # what the first line missed is made good here
        ),
    ),
    "F1": Mutant(
        "a death leaves no record",
        "faults/test_actors.py f1_an_actor",
        (("trials", "        running.store.record_attempt(attempt |", "        dict(attempt |"),),
    ),
    "F1 given up": Mutant("a block is given up after two deaths", "faults/test_actors.py f1_a_block", (("trials", "MAX_FAILURES = 3", "MAX_FAILURES = 1"),)),
    "F2": Mutant(
        "a cell is written under its name",
        "faults/test_actors.py f2",
        (("files", "    temporary, view = temporary_in(path.parent), memoryview(data)\n", HALF_A_CELL),),
    ),
    "F3": Mutant(
        "trouble with the store is one like any other",
        "faults/test_stores.py f3",
        (
            ("actor", "trouble = error if isinstance(error, StoreError) else None", "trouble = None"),
            ("actor", '"storage" if isinstance(error, StoreError) else "failed"', '"failed"'),
        ),
    ),
    "F4 deaths": Mutant("deaths change no lanes", "faults/test_actors.py f4_after", (("actor", "    if not num_deaths:\n", "    if True:\n"),)),
    "F4 oom": Mutant("nothing is out of memory", "faults/test_actors.py f4_out", (("block", "not is_out_of_memory(error)", "is_out_of_memory(error)"),)),
    "F5": Mutant(
        "what a lost node ran is not run again",
        "faults/test_clusters.py f5",
        (("trials", "MAX_FAILURES = 3", "MAX_FAILURES = 0"), ("trials", "MAX_ROUNDS = 10", "MAX_ROUNDS = 0")),
    ),
    "F7": Mutant("loose cells are not known", "faults/test_drivers.py f7", (("store", "self.loose().keys() | self", "set() | self"),)),
    "F8": Mutant("every signal is Ctrl-C", "faults/test_drivers.py f8", (("stopping", "CONTROL_C if number == signal.SIGINT else INTERRUPTED", "CONTROL_C"),)),
    "F9": Mutant("a lost cluster is not seen", "faults/test_clusters.py f9", (("stopping", "if now - answered > HEAD_LOST_SECONDS:", "if False:"),)),
    "F10": Mutant(
        "Tune keeps its state in the store",
        "faults/test_drivers.py f10",
        (
            ("trials", 'storage_path="/nowhere"', 'storage_path=str(running.store.root.absolute() / ".tune")'),
            ("trials", "            storage_filesystem=nowhere(),\n", ""),
        ),
    ),
    "F11": Mutant("claims are not looked at", "faults/test_drivers.py f11", (("claims", "            if lock is None:\n", "            if False:\n"),)),
    "F12": Mutant("this machine's clock decides", "test_store_at_once.py clock", (("locks", "files.now(path.parent)", "time.time()"),)),
    "F13": Mutant("a full disk says nothing of space", "faults/test_stores.py f13", (("store_errors", "free space", "try again"),)),
    "F14": Mutant("hard links are needed", "faults/test_stores.py f14_without", (("files", "if error.errno not in _NO_HARD_LINKS:", "if True:"),)),
    "F15": Mutant(
        "the last writer wins",
        "faults/test_actors.py f15",
        (
            ("store", 'if row["key"] in self or not publish', "if not publish"),
            ("files", "        os.link(temporary, path)\n", "        os.rename(temporary, path)\n"),
        ),
    ),
    "F17": Mutant("a diverged lane is a row like others", "faults/test_actors.py f17", (("commits", "if diverged is None or diverged > step:", "if True:"),)),
    "F18": Mutant("diverged cells are called done", "faults/test_stores.py f18", (("rows", '"diverged"', '"done"'),)),
    "F19": Mutant("what is there is run again", "faults/test_drivers.py f19", (("plan", "if cell.key not in finished)", "if cell.key)"),)),
    "F21": Mutant("checksums are not looked at", "faults/test_stores.py f21", (("cells", "if xxh3_64(stream).digest() != bytes(checksum):", "if False:"),)),
    "F22": Mutant(
        "loose cells go before the manifest is there",
        "faults/test_stores.py f22",
        (
            (
                "store",
                '            fault_point("before_manifest")\n',
                '            [files.remove(path) for path in fresh.values()]\n            fault_point("before_manifest")\n',
            ),
        ),
    ),
}


def main() -> int:
    names = sys.argv[1:] or list(MUTANTS)
    survivors = []
    for name in names:
        mutant = MUTANTS[name]
        with tempfile.TemporaryDirectory(prefix="iclgd-mutant-") as folder:
            root = Path(folder) / "project"
            for part in ("iclgd_dist", "analysis", "tests", "cluster", "sweeps"):
                shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", root)
            (root / "iclgd_analysis").symlink_to(root / "analysis")
            mutant.make(root)
            file, _, selected = mutant.test.partition(" ")
            start = time.perf_counter()
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-m", "long or not long", "-p", "no:cacheprovider", f"tests/{file}", "-k", selected]
            done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        survivors += [] if done.returncode == 1 and failed else [name]
        said = failed[0].partition("::")[2] if failed else f"SURVIVES (exit {done.returncode})"
        print(f"{name}: {mutant.what}: {said} [{time.perf_counter() - start:.0f} s]", flush=True)
    print(json.dumps({"mutants": len(names), "survivors": survivors, "holds": not survivors}))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
