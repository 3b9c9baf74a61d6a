"""The page's cells: figures of every cell to filter and draw, and, packed, what each cell did in every layer and to every query.

The page reads the packed part when a cell is opened: for each setting gzip of little-endian float32, NaN = undefined. Of each cell first
LAYERED x layers, then PREDICTED x queries. Knows settings and columns; what is drawn of it is page.js's.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from .load import Frames
from .panels import colour, safe
from .setting import Setting
from .text import BASELINES, counted

FIGURES = ("balanced_accuracy", "accuracy", "nll_label", "sim_aou", "sim_aou_norm", "sim_am_delta", "recovered_aou", "update_ratio", "agreement_icl")
LAYERED = ("sim_aou", "sim_am_delta", "update_ratio")
PREDICTED = ("prediction", "nll_label", "sim_aou")
MAX_NUMBERS = 12_000_000  # of layers and queries on the page, some 20 MB; of larger stores the cells of the largest steps
_KEPT_BITS = np.uint32(0xFFFFFC00)  # of a float32: four digits, and half the bytes after compression


def data(frames: Frames, settings: Sequence[Setting]) -> dict[str, Any]:
    """Return what the page holds of all cells: settings, columns of the cells, and the packed figures of each setting (base64).

    A baseline that several settings share (zero-shot of every k, ICL of every train_on) is a cell of each, so that each can be looked at alone.
    """
    kept = ["key", "kind", "method", "status", "collapsed", "replicate", "draw", "n", "learning_rate", "step", *FIGURES]
    of_setting = [pd.concat([setting.zero_shot[kept], setting.icl[kept], setting.finetuned[kept]]) for setting in settings]
    cells = pd.concat([part.assign(setting=number) for number, part in enumerate(of_setting)])
    num_layers = frames.layers.groupby("key", observed=True)["layer"].max().add(1)
    finished = cells[cells["status"] == "done"].drop_duplicates("key").sort_values("step", ascending=False, na_position="first", kind="stable")
    numbers = len(LAYERED) * finished["key"].map(num_layers).astype(float).fillna(0) + len(PREDICTED) * finished["n"]
    detailed = set(finished.loc[numbers.cumsum() <= MAX_NUMBERS, "key"])
    columns_of_examples = [frames.examples[name].to_numpy(dtype="<f4") for name in PREDICTED]
    layers = dict(iter(frames.layers[frames.layers["fold"] == "all"].groupby("key", observed=True)))
    described, packed, places, texts = [], [], [], _Texts()
    for number, (setting, part) in enumerate(zip(settings, of_setting, strict=True)):
        keys = [key for key in part["key"] if key in detailed]
        queries, content = _packed(frames, setting, keys, layers, columns_of_examples)
        queries["prompts"] = texts.number(queries["prompts"])
        described.append(_described(setting, texts) | queries)
        packed.append({"id": f"packed{number}", "content": content})
        at = {key: place for place, key in enumerate(keys)} if content else {}
        places += [at.get(key) for key in part["key"]]
    methods = [*BASELINES, *dict.fromkeys(method for setting in settings for method in setting.methods)]
    columns: dict[str, Any] = {name: _numbers(cells[name]) for name in ("learning_rate", "step", *FIGURES)}
    columns |= {"setting": cells["setting"].tolist(), "method": [methods.index(name) for name in cells["method"].fillna(cells["kind"])]}
    columns |= {"seed": _numbers(cells["replicate"]), "draw": cells["draw"].tolist(), "key": cells["key"].str[:16].tolist(), "place": places}
    columns |= {name: flags.astype(int).tolist() for name, flags in (("collapsed", cells["collapsed"]), ("diverged", cells["status"] == "diverged"))}
    named = [
        {"name": BASELINES.get(method, method), "safe": safe(BASELINES.get(method, method)), "colour": colour(method, settings[0].own_methods)}
        for method in methods
    ]
    page = {"settings": described, "texts": texts.lists, "methods": named, "columns": columns, "figures": FIGURES, "layered": LAYERED, "predicted": PREDICTED}
    return {"json": Markup(_safe(page)), "packed": packed, "note": _note(frames, len(finished) - len(detailed))}


class _Texts:
    """Lists of texts, each held once, however many settings show it."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []
        self._numbers: dict[tuple[str, ...], int] = {}

    def number(self, texts: list[str] | None) -> int | None:
        """Return where a list stands among those that the page holds."""
        if texts is None:
            return None
        if (number := self._numbers.setdefault(tuple(texts), len(self.lists))) == len(self.lists):
            self.lists.append(texts)
        return number


def _described(setting: Setting, texts: _Texts) -> dict[str, Any]:
    words = setting.first["label_words"]
    shown = {draw: texts.number(_texts(each)) for draw, each in zip(setting.icl["draw"], setting.icl["demonstrations"], strict=True)}
    named = setting.named
    model = setting.model + (f" ({named['init']})" if setting.is_random else "") + (f", {setting.variant}" if setting.variant else "")
    first = setting.first
    facets = {"model": model, "task": named["task"], "k": named["k"], "protocol": named["protocol"], "trained on": named["train_on"]}
    facets |= {"queries": f"{first['num_queries']:.0f} (seed {first['query_seed']:.0f})", "weights": str(first["model_hash"])[:8]}
    facets |= {"computed in": f"{first['compute_dtype']}{', TF32' if first['tf32'] == True else ''}, stored as {first['storage_dtype']}"}  # noqa: E712 may be NULL
    return {"title": setting.title, "facets": facets, "labels": [] if words is None else list(map(str, words)), "demonstrations": shown}


def _packed(
    frames: Frames, setting: Setting, keys: Sequence[str], layers: Mapping[str, pd.DataFrame], columns: Sequence[np.ndarray]
) -> tuple[dict[str, Any], str]:
    """Return gold labels, folds, ids and prompts of a setting's queries, and the figures of its cells; nothing where the cells did not see the same queries."""
    prompts = next((_texts(texts) for texts in setting.zero_shot["prompts"]), None)
    of_cells = [frames.positions(key) for key in (*setting.zero_shot["key"], *keys)]
    first = frames.examples.iloc[of_cells[0] if of_cells else []]
    num_layers = max((len(layers[key]) for key in keys if key in layers), default=0)
    asked = {"num_layers": num_layers, "gold": first["gold"].tolist(), "folds": "".join(first["fold"]), "ids": first["query"].str[:12].tolist()}
    asked |= {"prompts": prompts if prompts and len(prompts) == len(first) else None}
    of_cells = of_cells[-len(keys) :]
    if not keys or any(len(at) != len(first) for at in of_cells):
        return asked, ""
    at_KQ = np.stack(of_cells)
    if (frames.examples["query_number"].to_numpy()[at_KQ] != first["query_number"].to_numpy()).any():
        return asked, ""
    in_layers = np.full((len(keys), len(LAYERED), num_layers), math.nan, dtype="<f4")
    for place, key in enumerate(keys):
        if key in layers:
            in_layers[place][:, layers[key]["layer"].to_numpy()] = layers[key][list(LAYERED)].to_numpy(dtype=float).T
    of_queries = np.stack([column[at_KQ] for column in columns], axis=1)
    figures = np.concatenate([part.reshape(len(keys), -1) for part in (in_layers, of_queries)], axis=1)
    rounded = (figures.view("<u4") & _KEPT_BITS).tobytes()
    return asked, base64.b64encode(gzip.compress(rounded, 6, mtime=0)).decode()


def _texts(values: Any) -> list[str] | None:
    return None if values is None or isinstance(values, float) else list(map(str, values))


def _numbers(column: pd.Series) -> list[float | None]:
    """Return six digits of each number; None where it is undefined."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in column.astype(float)]


def _safe(value: Any) -> str:
    """Return JSON that no text in it can end the script element of."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _note(frames: Frames, num_without: int) -> str:
    text = "A point is a cell: one draw, method, learning rate and step. Open: collapsed. Lines, where learning rates are drawn: means over the cells shown."
    text += " A cell that diverged has no figures and stands in the table only. A baseline that several settings share (zero-shot of every k, ICL of whatever is trained on) is a cell of each."
    if num_without:
        text += f" Layers and queries of {counted(num_without, 'cell')} are not on the page, which has room for {MAX_NUMBERS:,} numbers: use read_results."
    return text + (" Cells that only a search asked for are left out." if frames.num_search else "")
