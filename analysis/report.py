"""One self-contained HTML page about a store, and the data of its figures as CSV. Knows the other scripts; what it says is counted from the store.

Everything that comes from data is escaped: by the template, and by `panels.safe` where plotly reads a text. The page asks nothing of any network: its
Content-Security-Policy admits two scripts by hash and no address at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from iclgd_dist.schema import POOLED, SIMILARITIES

from . import (
    accuracy,
    alpha,
    calibration,
    controls,
    ensembles,
    equal_size,
    explorer,
    extra_profiles,
    extras,
    forest,
    gradient_norms,
    heatmap,
    layer_profile,
    measures,
    order_sensitivity,
    paper_tables,
    pareto,
    pattern_pairs,
    protocol_effects,
    ratio,
    reliability,
    table,
    verdict,
)
from .chosen import select
from .intervals import MIN_SEEDS
from .load import Frames, load
from .panels import Panel
from .setting import SMALLEST_EFFECT, Setting
from .text import counted, number, rate

FIGURES: dict[str, Any] = {"heatmap": heatmap, "ratio": ratio, "pareto": pareto, "layer_profile": layer_profile, "gradient_norms": gradient_norms}
MORE_FIGURES: dict[str, Any] = {"reliability": reliability, "extra_profiles": extra_profiles}  # there only where the store has such rows
PARTS = ("table", *FIGURES, *MORE_FIGURES)
# Tables that are there only where the store has such rows.
OF_A_SETTING: dict[str, Any] = {
    "controls": controls,
    "alpha": alpha,
    "measures": measures,
    "calibration": calibration,
    "extras": extras,
    "order_sensitivity": order_sensitivity,
}
ACROSS_SETTINGS: dict[str, Any] = {
    "accuracy": accuracy,
    "paper_tables": paper_tables,
    "equal_size": equal_size,
    "protocol_effects": protocol_effects,
    "pattern_pairs": pattern_pairs,
    "ensembles": ensembles,
}
SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")


def write_report(store: str | Path, out: Path | None = None, *, only: str | None = None, frames: Frames | None = None) -> Path:
    """Write the page and <page's folder>/figures/*.csv; return the page's path.

    `only` names one of PARTS and makes a page of that part alone (default figures/<only>.html). `frames`: the store, where it is loaded already.
    Errors: StoreError as the store raises it; ValueError for a store elsewhere without `out`.
    """
    if out is None and "://" in str(store):
        raise ValueError(f"{store}: the report of a store that is not a local directory needs a path to write to (--out)")
    folder = Path(out).parent if out else Path(store)
    page = Path(out) if out else folder / (f"figures/{only}.html" if only else "report.html")
    return write_page(frames or load(store), page, figures=page.parent if only else folder / "figures", name=str(store), only=only)


def write_page(frames: Frames, page: Path, *, figures: Path, name: str, only: str | None = None) -> Path:
    """Write the page of Frames that are already loaded."""
    figures.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, list[pd.DataFrame]] = {part: [] for part in PARTS}
    sections = []
    settings = frames.settings()
    for index, setting in enumerate(settings):
        rows = table.summary(frames, setting)
        ratios, layers = ratio.data(frames, setting), layer_profile.data(frames, setting)
        points, norms = pareto.data(setting, ratios), gradient_norms.data(frames, setting)
        more = {part: module.data(frames, setting) for part, module in MORE_FIGURES.items()}
        for part, found in zip(PARTS, (rows, heatmap.data(rows), ratios, points, layers, norms, *more.values()), strict=True):
            data[part].append(found)
        compared = (ratio.panels(setting, ratios, rows), pareto.panels(setting, points, rows))
        drawn = (heatmap.panels(setting, rows), *compared, layer_profile.panels(setting, layers), gradient_norms.panels(setting, norms))
        drawn_more = (module.panels(setting, more[part]) for part, module in MORE_FIGURES.items())
        figured = zip({**FIGURES, **MORE_FIGURES}.items(), (*drawn, *drawn_more), strict=True)
        shown = [(part, module, panels) for (part, module), panels in figured if only in (None, part) and panels]
        section: dict[str, Any] = {
            "id": f"s{index}",
            "number": index,
            "title": setting.title,
            "caption": setting.caption,
            "sentence": sentence(frames, setting, rows),
        }
        section["rows"] = table.display(frames, setting, rows) if only in (None, "table") else []
        section["grids"] = []
        for part, module in OF_A_SETTING.items() if only is None else ():
            found = module.data(frames, setting)
            section["grids"] += module.grids(setting, found)
            data.setdefault(part, []).append(found)
        section["figures"] = [_figure(f"s{index}-{part}", module.TITLE, module.NOTE, panels) for part, module, panels in shown]
        sections.append(section)
    across = []
    for part, module in ACROSS_SETTINGS.items() if only is None else ():
        data[part] = [module.data(frames)]
        across += module.grids(*data[part])
    known = verdict.findings(frames) if only is None else []
    data["verdict"] = [verdict.data(known)]
    for part, tables in data.items():
        written = pd.concat(tables) if tables else pd.DataFrame()
        if part == only or (only is None and (part in ("table", *FIGURES) or len(written))):
            written.to_csv(figures / f"{part}.csv", index=False)
    scripts = [get_plotlyjs(), SCRIPT]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined).get_template("report.html.j2")
    text = template.render(
        name=name,
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        scripts=[Markup(script) for script in scripts],
        verdicts=[(verdict.paragraph(each), _figure(f"v{index}", forest.TITLE, forest.NOTE, forest.panels(each))) for index, each in enumerate(known)],
        effect=" or ".join(dict.fromkeys(f"{setting.smallest_effect:g}" for setting in settings)) or f"{SMALLEST_EFFECT:g}",
        lead=lead(frames),
        sections=sections,
        cells=explorer.data(frames, settings) if only is None and settings else None,
        across=across,
        has_controls=bool(controls.contexts(frames, settings)),
        headers=table.HEADERS,
        table_note=table.NOTE,
        provenance=provenance(frames) if only is None else [],
        nulls=null_counts(frames) if only is None else [],
    )
    page.write_text(text, encoding="utf-8", newline="\n")
    return page


def lead(frames: Frames) -> list[str]:
    """Return the opening sentences: what is there, what is missing, and how much weight it bears."""
    kinds, done = frames.cells["kind"].value_counts(), frames.finetuned
    text = [
        f"The store holds {counted(frames.num_cells, 'cell')} ({kinds.get('zero_shot', 0)} zero-shot, {kinds.get('icl', 0)} in-context, "
        f"{kinds.get('finetuned', 0)} finetuned)"
        + (f"; of {frames.num_planned:,} planned, {frames.num_missing:,} are missing." if frames.num_planned else "; no sweep file says how many were planned.")
    ]
    if len(done):
        num_diverged, num_collapsed = int((done["status"] == "diverged").sum()), int(done["collapsed"].sum())
        text.append(
            f"Of the finetuned cells {len(done) - num_diverged} are done and {num_diverged} diverged; in {num_collapsed} of them the classifier collapsed (one "
            "label predicted for nearly all queries); their similarities are kept and marked."
        )
    settings = frames.settings()
    if not settings:
        return [*text, "No in-context or finetuned cell is there yet: nothing to compare."]
    seeds = [count for setting in settings for count in ([setting.num_seeds(method) for method in setting.methods] or [setting.num_seeds()])]
    fewest, most = min(seeds), max(seeds)
    if fewest < MIN_SEEDS:
        bound = "the intervals speak of this draw only" if fewest == 1 else "the intervals are wide and the differences untested"
        where = "" if fewest == most else "some figures are over "
        text.append(f"Descriptive: {where}{counted(fewest, 'seed')}, fewer than {MIN_SEEDS}; {bound if fewest == most else f'{bound} there'}.")
    if num_searched := int((done["origin"] == "search").sum()):
        text.append(
            f"{counted(num_searched, 'cell')} of the grid were found by a search, which judged them on fold A: what fold B says of them is free of that choice."
        )
    if frames.num_search:
        text.append(f"{counted(frames.num_search, 'cell')} found by a search are left out of every mean and curve.")
    if frames.num_superseded:
        text.append(
            f"{counted(frames.num_superseded, 'cell')} of an earlier template, or of other data, are left out: they equal a later one in every named column, or their baseline does."
        )
    return text


def sentence(frames: Frames, setting: Setting, rows: pd.DataFrame) -> str:
    """Return the setting's result in words: baselines on all queries, then each method at the learning rate selected on one fold, shown on the other."""
    zero_shot, icl = (frames.estimate(part, "balanced_accuracy") for part in (setting.zero_shot, setting.icl))
    chance = 1 / max(1, len(setting.first["label_words"])) if setting.first["label_words"] is not None else float("nan")
    text = f"Balanced accuracy, all queries: zero-shot {zero_shot}, in-context {icl} (chance {number(chance, 2)})."
    if not setting.methods:
        return text + " No finetuned cell yet."
    base = [str(frames.estimate(part, "balanced_accuracy", fold="B")) for part in (setting.zero_shot, setting.icl)]
    num_queries = frames.folds.loc[(frames.folds["fold"] == "B") & frames.folds["key"].isin(setting.finetuned["key"]), "n"].max()
    shown, edges = [], []
    for method in setting.methods:
        on_a, on_b = select(frames, setting, method), select(frames, setting, method, fold="B")
        if not on_a or not on_b:
            shown.append(f"{method} has {setting.no_rate(method)}")
            continue
        there = frames.estimate(setting.at(method, on_a.learning_rate, setting.last_step_of(method)), "balanced_accuracy", fold="B")
        back = frames.estimate(setting.at(method, on_b.learning_rate, setting.last_step_of(method)), "balanced_accuracy", fold="A")
        shown.append(f"{method} ({rate(on_a.learning_rate)}) {there} (folds swapped: {rate(on_b.learning_rate)}, {number(back.mean)})")
        edges += [method] if on_a.is_edge or on_b.is_edge else []
    of_fold = f" ({num_queries:.0f} queries)" if num_queries == num_queries else ""  # all diverged: no query has a figure
    text += f" Learning rate selected on fold A by nll_label at step {setting.last_step}, shown on fold B{of_fold}: {'; '.join(shown)}; "
    text += f"on the same fold zero-shot {base[0]}, in-context {base[1]}."
    if edges:
        text += f" Extend the grid: the selected learning rate of {' and '.join(edges)} lies at the edge of its grid."
    is_last = rows["step"] == rows["method"].map({method: setting.last_step_of(method) for method in setting.methods})
    num_diverged, num_collapsed, num_cells = rows.loc[is_last, ["num_diverged", "num_collapsed", "num_cells"]].sum()
    return text + f" At step {setting.last_step}: {num_diverged} diverged, {num_collapsed} collapsed of {num_cells} cells."


def null_counts(frames: Frames) -> list[tuple[str, str]]:
    """Return, per metric, how many finetuned cells have a value, of how many in the store."""
    there = len(frames.finetuned)
    metrics = ("balanced_accuracy", "nll_label", *SIMILARITIES, *POOLED, "update_ratio")
    return [(metric, f"{int(frames.finetuned[metric].notna().sum())} used of {there} finetuned cells in the store") for metric in metrics]


def provenance(frames: Frames) -> list[tuple[str, str]]:
    """Return what made the numbers: sweeps, weights, versions, devices, time, memory, attempts that failed."""
    cells = frames.cells

    def values(column: str) -> str:
        return ", ".join(sorted({str(value) for value in cells[column].dropna()})) or "unknown"

    versions: dict[str, set[str]] = {}
    for written in cells["versions"].dropna().unique():
        found: dict[str, Any] = json.loads(written)
        for library, version in found.items():
            versions.setdefault(str(library), set()).add(str(version))
    outcomes = frames.attempts["outcome"].value_counts() if len(frames.attempts) else {}
    memory = cells["peak_gib"].max()
    return [
        ("sweeps", values("sweep")),
        ("model sources", values("model_source")),
        ("weights (sha256)", values("model_hash")),
        ("hub revisions", values("model_revision")),
        ("versions", "; ".join(f"{library} {' and '.join(sorted(found))}" for library, found in sorted(versions.items())) or "unknown"),
        ("code", values("git_commit")),
        ("devices", values("device")),
        ("hosts", counted(cells["host"].nunique(), "machine")),
        ("TF32", values("tf32")),
        ("deterministic", values("deterministic")),
        ("time", f"{cells['wall_seconds'].sum():,.0f} s in all, summed over cells"),
        ("peak memory", f"{number(memory, 2)} GiB"),
        ("committed", f"{cells['created_at'].min():%Y-%m-%d %H:%M} to {cells['created_at'].max():%Y-%m-%d %H:%M} UTC" if len(cells) else "nothing"),
        ("attempts", ", ".join(f"{count} {outcome}" for outcome, count in dict(outcomes).items()) or "none recorded"),
    ]


def _figure(name: str, title: str, note: str, panels: list[Panel]) -> dict[str, Any]:
    drawn = [
        {
            "id": f"{name}-{index}",
            "title": panel.title,
            "height": panel.figure.layout.height,
            "json": Markup(panel.figure.to_json()),  # plotly writes < and > as \\u003c and \\u003e: no text can close the script element
        }
        for index, panel in enumerate(panels)
    ]
    return {"id": name, "title": title, "note": note, "panels": drawn}


def main(only: str | None = None) -> None:
    """Run a script from the command line: STORE [PAGE]."""
    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit(f"usage: python -m iclgd_analysis.{only or 'report'} STORE [PAGE]")
    print(write_report(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) == 3 else None, only=only))


if __name__ == "__main__":
    main()
