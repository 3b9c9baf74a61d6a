"""iclgd_dist/SCHEMA.md: every column with its type and meaning, and which kinds of rows ever hold it, as rows of a real block say.

`python -m tests.schema_docs` writes the file anew; a test fails when it is not what the code says.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from iclgd_dist import schema
from iclgd_dist.schema import Column
from iclgd_dist.store import Results

FILE = Path(schema.__file__).with_name("SCHEMA.md")
LIKE = {f"{name}_{part}" for name in (*schema.SIMILARITIES, *schema.POOLED) for part in ("median", "lower", "middle", "upper", "n")}  # said of all at once
UNSEEN = {"kappa_icl": "finetuned", "rec2ftp": "finetuned"}  # undefined for the tiny model, which predicts one label in context
KINDS = {"zero_shot": "zero-shot", "icl": "in-context", "finetuned": "finetuned", "diverged": "diverged"}
MORE = """
[controls]
contexts = ["separator"]
[measures]
calibration = true
outputs = true
spectra = true
geometry = true
supervised_icl = true
[[metric]]
name = "moved"
code = "mine.py:moved"
[[method]]
name = "wide"
base = "vanilla"
weights = "all_linear"
"""
HEAD = """# The store's tables

`read_results(STORE)` returns nine Arrow tables: `cells`, one row per cell, and seven with several rows per cell, to be joined on the cell's key (their first
column); `attempts` holds what could not be run, by block. They are what is stored; nothing is computed while reading.

- NULL means undefined or not applicable, never zero, and no column holds NaN. Where no text says more, a column is NULL in rows of the kinds that the last
  column of its table leaves out, and where a figure is undefined: similarities whose changes lie at or below ten times the noise floor, shares of nothing.
- A cell is `zero_shot`, `icl` or `finetuned` (`kind`). A finetuned cell whose loss, gradient or capture was not finite has `status` = `diverged` and no figures.
- Units stand between brackets. [0..1] is a share, [-1..1] a cosine or a rank correlation.
- Rows of an older version lack columns that came later: these are NULL.

This page is made by `python -m tests.schema_docs` from `schema.py` and from the rows of a block; a test holds it to them.
"""


def document(results: Results) -> str:
    """Return the page; `results` hold cells of every kind."""
    cells = results.cells
    kind_of = {
        key: "diverged" if status == "diverged" else kind for key, kind, status in zip(*(cells[n].to_pylist() for n in ("key", "kind", "status")), strict=True)
    }
    assert set(kind_of.values()) == set(KINDS), "cells of every kind are required"

    def held(table: pa.Table, name: str) -> str:
        kinds = {kind_of[key] for key, value in zip(table.column(0).to_pylist(), table[name].to_pylist(), strict=True) if value is not None}
        return "all" if kinds == set(KINDS) else ", ".join(shown for kind, shown in KINDS.items() if kind in kinds) or UNSEEN.get(name, "none here")

    parts = [HEAD]

    def section(title: str, text: str, columns: Sequence[Column], table: pa.Table | None = None) -> None:
        lines = [f"## {title}", "", text, "", "| column | type | meaning |" + (" in rows of |" if table else ""), "|---|---|---|" + ("---|" if table else "")]
        for name, kind, meaning in columns:
            if name in LIKE:
                continue
            safe = meaning.replace("|", "\\|").replace("<", "\\<")
            lines.append(f"| `{name}` | {_named(kind)} | {safe} |" + (f" {held(table, name)} |" if table else ""))
        parts.append("\n".join(lines) + "\n")

    section("cells: what a cell is", "Two cells with the same key are the same; the rest of these columns is in the key, or names what is.", schema.IDENTITY)
    text = "Over all queries; a mean over layers is over those where the figure is defined. Each of these has four more columns, `<name>_median`, `_lower`, `_middle` "
    text += "and `_upper`: the median over layers, and the means over the three thirds of the layers, the lowest first."
    section("cells: what came of it", text, schema.OUTCOME, cells)
    section("cells: where it comes from", "Never part of the key.", schema.PROVENANCE)
    section("folds", "Two rows per cell: fold A, on which learning rates are selected, and fold B.", schema.FOLD, results.folds)
    section(
        "layers",
        "Three rows per layer: fold A, B and all. A mean over queries has a column `<name>_n`: the queries for which the figure is defined.",
        schema.LAYER,
        results.layers,
    )
    section("examples", "One row per query, in the order drawn.", schema.EXAMPLE, results.examples)
    columns = [(name, kind, meaning) for name, kind, meaning in schema.MEASURE if name not in ("kind", "name")]
    text = (
        "Their first two columns name what is compared: `controls` has `cell` and `control` (`other_task` with its task: `other_task:trec`), `pairs` the keys "
    )
    text += "`cell_a` and `cell_b`, `metrics` `cell` and `version`, `extras` `cell` and `group`. A figure is there once, or not at all."
    section("controls, pairs, metrics, extras", text, columns)
    lines = ["| group | metric | meaning |", "|---|---|---|"]
    lines += [f"| `{group}` | `{metric}` | {meaning} |" for group, metrics in schema.EXTRAS.items() for metric, meaning in metrics.items()]
    parts.append("The extras, where `[measures]` asks for them:\n\n" + "\n".join(lines) + "\n")
    section("attempts", "One row per execution of a block, whatever came of it. Never a result.", schema.ATTEMPT)
    return "\n".join(parts)


def _named(kind: pa.DataType) -> str:
    return str(kind).replace("double", "float64").replace("list<item: ", "list of ").replace(">", "")


def small_results(sweep_file: Path) -> Results:
    """Run a block with cells of every kind on the tiny model. `sweep_file`: that of conftest.py."""
    from iclgd_dist.block import run_block
    from iclgd_dist.config import load_sweep
    from iclgd_dist.plan import make_plan
    from iclgd_dist.store import Store, read_results
    from tests.test_measuring import changed
    from tests.tiny import lm_for

    path = changed(sweep_file, methods='["vanilla", "layer_causal", "wide"]', more=MORE)
    text = path.read_text()
    for old, new in {
        "vanilla = [0.003, 0.05]": "vanilla = [0.003, 1, 20, 1e200]",
        "top = 0.05": "wide = 0.05",
        "num_demonstrations = 4": "num_demonstrations = 12",
        "steps = [2, 4]": "steps = [2, 8]",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text.replace("num_queries = 8", "num_queries = 16"))
    store = Store(path.parent / "store")
    store.prepare()
    (block,) = make_plan(load_sweep(path)).blocks
    run_block(lm_for(block), block, store)
    return read_results(store)


def main() -> int:
    """Write the page."""
    from tests.conftest import SWEEP
    from tests.tiny import save_fruit, save_tiny, save_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ICLGD_CACHE"] = str(folder / "cache")
        (folder / "model").mkdir()
        save_tiny(folder / "model", save_tokenizer(folder / "model"))
        save_fruit(folder / "fruit.csv")
        path = folder / "tiny.toml"
        path.write_text(SWEEP.format(more=""))
        FILE.write_text(document(small_results(path)), encoding="utf-8")
    print(FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
