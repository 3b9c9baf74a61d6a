"""Rows of a block into the store, with what is the same for all its cells, and with the figures that compare cells with one another.

Knows blocks, captures, rows and the store. Knows nothing of how captures are made.
"""

from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from iclgd_dist import captures, measured
from iclgd_dist import store as stores
from iclgd_dist.baselines import Baselines
from iclgd_dist.blocks import WORST, Block, Cell
from iclgd_dist.comparison import Baseline
from iclgd_dist.encoding import Encoded
from iclgd_dist.extras import Extras, supervised_rows
from iclgd_dist.measures import alpha_measures, context_measures, control_measures, metric_measures, pair_measures, score_directions
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel
from iclgd_dist.provenance import peak_gib, provenance
from iclgd_dist.rows import Lane, Row, diverged_row, finetuned_rows, icl_row, zero_shot_row
from iclgd_dist.store import Store
from iclgd_dist.trajectory import Trajectory

Point = tuple[str, int, float | None]  # see Block.point

TRACKED = ("nll_label", "balanced_accuracy", "sim_aou", "sim_am_delta", "update_ratio", "loss")


@dataclass(frozen=True)
class Held:
    """A finetuned cell that others will be compared with; `directions` of its attention scores where they may have another learning rate."""

    cell: Cell
    capture: Capture
    directions: Sequence[Tensor]


class Committer:
    """Commits the cells of one block. A finetuned capture is held as long as another method's cell of the same point is to come."""

    def __init__(self, lm: LanguageModel, block: Block, store: Store, encoded: Encoded) -> None:
        self.lm, self.block, self.store = lm, block, store
        self._extras: Extras | None = None
        sink = "".join(lm.tokenizer.convert_ids_to_tokens(list(encoded.sink_ids)))
        protocol = json.dumps(block.protocol.model_dump() | {"sink_token": sink}, sort_keys=True)
        self.shared = provenance(lm) | {"model_revision": block.model.revision, "protocol": protocol}
        self.num_context_demonstrations = encoded.num_context_demonstrations
        self.cells = {(cell.train_on, cell.method, cell.learning_rate, cell.step, cell.kind): cell for cell in block.cells}
        finetuned = [cell for cell in block.cells if cell.kind == "finetuned"]
        self.points = {cell.key: cell.point for cell in finetuned}
        self.to_come = Counter((self.points[cell.key], cell.method) for cell in finetuned)
        self.held: dict[Point, dict[str, Held]] = {}  # by key: a cell that runs twice, after memory ran out, is held once
        self.figures: dict[str, dict[str, float]] = {}  # of the step committed last, where a tracker asks for them: method and learning rate -> figures
        self.judged: tuple[int, float] | None = None  # step and figure of the step committed last, where a scheduler asks for it
        self.problems: list[str] = []  # of the user's own metrics
        self.done: set[str] = set()  # keys of the cells that are committed, or measured
        self.since = time.perf_counter()

    def extras(self, baseline: Baseline) -> Extras:
        if self._extras is None:
            self._extras = Extras(self.lm, baseline, self.block.measured)
        return self._extras

    def measures(self, rows: Sequence[Row]) -> None:
        """Commit measures of cells that are there; each row holds the key of its cell."""
        measured.commit(self.store.root, list(rows), reach=stores.fault_point)

    def baselines(self, baselines: Baselines, baseline: Baseline) -> int:
        """Commit zero-shot and ICL, where they are missing; return how many cells were."""
        rows, draw = [], self.block.draw
        for cell in self.block.cells:
            if cell.kind == "zero_shot":
                texts = {"prompts": [query.prompt for query in draw.queries]}
                measures = {"measures": self.extras(baseline).of_zero_shot()}
                rows.append((cell, zero_shot_row(baseline) | measures | self._texts(texts) | self._kept(cell, baseline.zero_shot)))
            elif cell.kind == "icl":
                shown = draw.demonstrations[: self.num_context_demonstrations]
                texts = {"demonstrations": [f"{each.prompt} {draw.label_words[each.label]}" for each in shown]}
                measures = {"measures": context_measures(baseline, baselines.controls) + self.extras(baseline).of_icl()}
                rows.append((cell, icl_row(baseline) | measures | self._texts(texts) | self._kept(cell, baseline.in_context.capture)))
        return self._commit(rows, num_lanes=1)

    def finetuned(
        self, baselines: Baselines, baseline: Baseline, trajectory: Trajectory, step: int, states: Sequence[Capture], supervised: Sequence[Tensor] = ()
    ) -> int:
        """Commit one step of all lanes; return how many cells were committed. What diverged is a row too.

        `supervised`: each lane's label scores with the demonstrations in the prompt.
        """
        lanes: list[tuple[int, Cell, Capture]] = []
        rows: list[tuple[Cell, Row]] = []
        for lane, (rate, capture) in enumerate(zip(trajectory.learning_rates, states, strict=True)):
            if not capture.is_finite():
                trajectory.bad_capture.setdefault(lane, step)
            cell = self.cells.get((trajectory.train_on, trajectory.method, rate, step, "finetuned"))
            if cell is None:
                continue
            diverged = trajectory.diverged_step(lane)
            if diverged is None or diverged > step:
                lanes.append((lane, cell, capture))
                continue
            self._settle(cell)
            row = diverged_row(
                num_queries=len(self.block.draw.queries),
                label_words=self.block.draw.label_words,
                step=diverged,
                last_finite_loss=trajectory.last_finite_loss(lane, diverged),
                num_queries_left_out=self.block.draw.num_queries_left_out,
            )
            rows.append((cell, row))
        captured = [capture for _, _, capture in lanes]
        controls = control_measures(baseline, baselines.controls, captured) if baselines.controls else [[] for _ in lanes]
        made: list[Row] = [{} for _ in lanes]
        if lanes and not self.block.is_measuring:
            seeded = [Lane(capture, trajectory.record(lane, step), int(cell.key[:15], 16)) for lane, cell, capture in lanes]
            made = finetuned_rows(baseline, seeded, prefix=baselines.prefix(trajectory.train_on, self.block.num_trained(trajectory.method, step)))
        extras = self.extras(baseline).of_finetuned(captured, [trajectory.ranks_of(lane, step) for lane, _, _ in lanes])
        extras = [rows + (supervised_rows(supervised[lane], baseline) if supervised else []) for rows, (lane, _, _) in zip(extras, lanes, strict=True)]
        for (_, cell, capture), of_controls, of_extras, row in zip(lanes, controls, extras, made, strict=True):
            of_metrics, problems = metric_measures(baseline, self.block.metrics, capture)
            self.problems += problems
            measures = of_controls + self._pairs(baseline, cell, capture) + of_metrics + of_extras
            rows.append((cell, row | {"measures": measures} | self._kept(cell, capture)))
        if self.block.is_tracked:
            variant = "" if trajectory.train_on == "true" else f"_on_{trajectory.train_on}"
            known = {f"{cell.method}{variant}_{cell.learning_rate:g}": {name: row.get(name) for name in TRACKED} for cell, row in rows}
            self.figures = {name: {figure: float(value) for figure, value in of.items() if value is not None} for name, of in known.items()}
        if (judged := self.block.judged) and rows:
            values = [each[judged.metric] for _, row in rows for each in row["folds"] if each["fold"] == "A"]
            is_known = len(values) == len(rows) and None not in values
            self.judged = step, judged.sign * sum(values) / len(rows) if is_known else WORST
        return self._commit(rows, num_lanes=len(trajectory.learning_rates))

    def _pairs(self, baseline: Baseline, cell: Cell, capture: Capture) -> list[Row]:
        """Compare a cell with those of other methods at the same point, and keep its capture if more of them are to come."""
        point = self.points[cell.key]
        others = self.held.setdefault(point, {})
        theirs = [held for held in others.values() if held.cell.method != cell.method]
        is_awaited = any(count > 0 for (other, method), count in self.to_come.items() if other == point and method != cell.method)
        directions = score_directions(baseline, capture) if point[2] is None and (theirs or is_awaited) else []
        rows = []
        for held in theirs:
            if held.cell.learning_rate == cell.learning_rate:
                rows += pair_measures(baseline, held.cell.key, held.capture, capture)
            else:
                rows += alpha_measures(baseline, held.cell.key, held.directions, directions)
        if is_awaited:
            others[cell.key] = Held(cell, capture.clone(), directions)  # a view would keep all lanes alive
        self._settle(cell)
        return rows

    def _settle(self, cell: Cell) -> None:
        point = self.points[cell.key]
        self.to_come[point, cell.method] -= 1
        if not any(count > 0 for (other, _), count in self.to_come.items() if other == point):
            self.held.pop(point, None)

    def _texts(self, texts: Row) -> Row:
        return texts if self.block.keeps_texts else {}

    def _kept(self, cell: Cell, capture: Capture) -> Row:
        """Keep the capture of a cell beside the store where the sweep asks for it; return the columns that name it."""
        if not cell.is_kept or self.block.is_measuring:
            return {}
        file, sha256 = captures.keep(self.store, cell.key, capture)
        return {"capture_file": file, "capture_sha256": sha256}

    def _commit(self, rows: Sequence[tuple[Cell, Row]], *, num_lanes: int) -> int:
        if self.block.is_measuring:
            self.measures([{"key": cell.key, **measure} for cell, row in rows for measure in row["measures"]])
            self.done |= {cell.key for cell, _ in rows}
            return len(rows)
        seconds, num_committed = time.perf_counter() - self.since, 0
        for cell, row in rows:
            made: dict[str, Any] = {"lanes": num_lanes, "wall_seconds": seconds / len(rows), "peak_gib": peak_gib()}
            made |= {"created_at": datetime.datetime.now(datetime.UTC)}
            made |= {} if cell.kind == "zero_shot" else {"num_context_demonstrations": self.num_context_demonstrations}
            num_committed += self.store.commit(self.block.identity(cell) | row | self.shared | made)
            self.done.add(cell.key)
        if rows:
            self.since = time.perf_counter()
        return num_committed
