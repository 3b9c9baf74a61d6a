"""The extras of a block against the slow loop of tests/plain.py, scipy and scikit-learn; what older stores lack of them is filled in, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier

from iclgd_dist import captures, geometry
from iclgd_dist.block import run_block
from iclgd_dist.blocks import Block, with_cells
from iclgd_dist.config import load_sweep
from iclgd_dist.encoding import Encoded, encode
from iclgd_dist.measuring import Missing
from iclgd_dist.metrics import Capture
from iclgd_dist.plan import make_plan
from iclgd_dist.schema import EXTRAS
from iclgd_dist.store import Results, Store, read_results
from tests import plain
from tests.tiny import lm_for

MEASURES = "[measures]\ncalibration = true\noutputs = true\nspectra = true\ngeometry = true\nsupervised_icl = true\n"
CAPTURE = '[capture]\nkeep = "all"\n'


def changed(path: Path, more: str = MEASURES + CAPTURE) -> Path:
    text = path.read_text().replace("seeds = [1, 2]", "seeds = [1]").replace("num_queries = 8", "num_queries = 20")
    path.write_text(text.replace('source = "model"', 'source = "model"\ncompute_dtype = "float64"') + more)
    return path


class Ran:
    """A block with everything that is measured, and what the slow loop makes of the same cells."""

    def __init__(self, path: Path, store: Store) -> None:
        store.prepare()
        (self.block,) = make_plan(load_sweep(path)).blocks
        self.path_without = path.with_name("without.toml")
        self.path_without.write_text(path.read_text().replace(MEASURES, ""))
        self.lm, self.store = lm_for(self.block), store
        run_block(self.lm, self.block, store)
        self.encoded: Encoded = encode(self.block.draw, self.lm.tokenizer, protocol=self.block.protocol, max_positions=512)
        self.results = read_results(store)
        self.base = plain.copied(self.lm.model)
        self.gold = np.array([query.label for query in self.block.draw.queries])

    def cell(self, kind: str, method: str | None = None, rate: float | None = None, step: int | None = None) -> dict[str, Any]:
        rows = [row for row in self.results.cells.to_pylist() if (row["kind"], row["method"], row["learning_rate"], row["step"]) == (kind, method, rate, step)]
        assert len(rows) == 1
        return rows[0]

    def extras(self, cell: dict[str, Any], group: str, fold: str = "all") -> dict[tuple[str, Any], float]:
        rows = [row for row in self.results.extras.to_pylist() if (row["cell"], row["group"], row["fold"]) == (cell["key"], group, fold)]
        return {(row["metric"], row["layer"]): row["mean"] for row in rows}

    def capture(self, cell: dict[str, Any]) -> Capture:
        found = captures.recall(self.store, cell["key"], cell["capture_sha256"])
        assert found is not None
        return found

    def trained(self, method: str, rate: float, step: int) -> tuple[list[torch.Tensor], Any]:
        """Return what training added to each K and V, layer by layer, and the trained model, by the slow loop."""
        sequences = [list(ids) for ids in self.encoded.training.sequences[:step]]
        *_, (added, _, model) = plain.train(self.base, sequences, self.encoded.training.first_loss[0], rate, method)
        return added, model

    def next_tokens(self, model: Any, lead: tuple[int, ...]) -> np.ndarray:
        """Return the log-probabilities (Q, V) of what follows each query's prompt."""
        return np.stack([scipy.special.log_softmax(plain.logits(model, torch.tensor([[*lead, *ids]]))[-1].detach().numpy()) for ids in self.encoded.queries])

    def label_scores(self, model: Any, lead: tuple[int, ...], prompts: tuple[tuple[int, ...], ...]) -> np.ndarray:
        found = []
        for ids in prompts:
            of_labels = []
            for label in self.encoded.label_ids:
                chances = scipy.special.log_softmax(plain.logits(model, torch.tensor([[*lead, *ids, *label]])).detach().numpy(), axis=-1)
                start = len(lead) + len(ids) - 1
                of_labels.append(np.mean([chances[start + n, token] for n, token in enumerate(label)]))
            found.append(of_labels)
        return np.array(found)


@pytest.fixture(scope="module")
def ran(shared_sweep_file: Path) -> Ran:
    return Ran(changed(shared_sweep_file), Store(shared_sweep_file.with_name("store")))


FINETUNED = [("vanilla", 0.05, 4), ("layer_causal", 0.003, 2)]


@pytest.mark.parametrize(("method", "rate", "step"), FINETUNED)
def test_next_tokens_are_those_of_the_trained_model_itself(ran: Ran, method: str, rate: float, step: int) -> None:
    ours = ran.extras(ran.cell("finetuned", method, rate, step), "outputs")
    p = ran.next_tokens(ran.base, ran.encoded.context_ids)
    q = ran.next_tokens(ran.trained(method, rate, step)[1], ran.encoded.prefix_ids)
    tops = [set(np.argsort(-row)[:10]) for row in p], [set(np.argsort(-row)[:10]) for row in q]
    assert ours["top10_overlap", None] == pytest.approx(np.mean([len(a & b) / 10 for a, b in zip(*tops, strict=True)]), abs=1e-9)
    assert ours["kl_output", None] == pytest.approx(np.mean([scipy.special.rel_entr(np.exp(a), np.exp(b)).sum() for a, b in zip(p, q, strict=True)]), abs=1e-6)
    assert ours["tv_output", None] == pytest.approx(np.abs(np.exp(p) - np.exp(q)).sum(1).mean() / 2, abs=1e-6)
    cosines = []
    for a, b, shared in zip(np.exp(p), np.exp(q), (sorted(a & b) for a, b in zip(*tops, strict=True)), strict=True):
        cosines += [a[shared] @ b[shared] / np.linalg.norm(a[shared]) / np.linalg.norm(b[shared])] if shared else []
    assert ours["top10_cosine", None] == pytest.approx(np.mean(cosines), abs=1e-6)


@pytest.mark.parametrize(("method", "rate", "step"), FINETUNED)
def test_ranks_of_the_weights_are_scipys(ran: Ran, method: str, rate: float, step: int) -> None:
    ours, added = ran.extras(ran.cell("finetuned", method, rate, step), "weights"), ran.trained(method, rate, step)[0]
    for number, matrix in enumerate(added):
        values = scipy.linalg.svdvals(matrix.numpy())
        layer, part = number // 2, "kv"[number % 2]
        assert ours[f"stable_rank_{part}", layer] == pytest.approx((values**2).sum() / values[0] ** 2, abs=1e-6)
        # Of what lies within the smallest of the squares that can be told from rounding.
        shares = np.where(values > values[0] * 1e-6, values, 0) / values.sum()
        assert ours[f"effective_rank_{part}", layer] == pytest.approx(np.exp(-np.sum(shares[shares > 0] * np.log(shares[shares > 0]))), rel=1e-4)
    assert len(ours) == 2 * len(added)


@pytest.mark.parametrize(("method", "rate", "step"), FINETUNED)
def test_changes_are_compared_as_scipy_would(ran: Ran, method: str, rate: float, step: int) -> None:
    cell = ran.cell("finetuned", method, rate, step)
    zero_shot, icl, own = (ran.capture(each).attention_LQD.double().numpy() for each in (ran.cell("zero_shot"), ran.cell("icl"), cell))
    ours, of_icl = ran.extras(cell, "change"), ran.extras(ran.cell("icl"), "change")
    for layer in range(2):
        a, b = icl[layer] - zero_shot[layer], own[layer] - zero_shot[layer]
        for change, found in ((a, of_icl), (b, ours)):
            values = scipy.linalg.svdvals(change)
            assert found["stable_rank", layer] == pytest.approx((values**2).sum() / values[0] ** 2, abs=1e-6)
            assert found["participation_ratio", layer] == pytest.approx((values**2).sum() ** 2 / (values**4).sum(), abs=1e-6)
        right_a, right_b = (scipy.linalg.svd(change, full_matrices=False)[2][:8] for change in (a, b))
        assert ours["icl_share_in_ft", layer] == pytest.approx(((a @ right_b.T) ** 2).sum() / (a**2).sum(), abs=1e-6)
        assert ours["ft_share_in_icl", layer] == pytest.approx(((b @ right_a.T) ** 2).sum() / (b**2).sum(), abs=1e-6)
        assert ours["principal_cosine", layer] == pytest.approx(np.cos(scipy.linalg.subspace_angles(right_a.T, right_b.T)).mean(), abs=1e-6)
        x, y = (change - change.mean(0) for change in (a, b))
        assert ours["cka", layer] == pytest.approx(((x @ x.T) * (y @ y.T)).sum() / np.linalg.norm(x @ x.T) / np.linalg.norm(y @ y.T), abs=1e-6)


@pytest.mark.parametrize("kind", ["zero_shot", "icl", "finetuned"])
def test_geometry_is_of_the_attention_outputs(ran: Ran, kind: str) -> None:
    cell = ran.cell(kind) if kind != "finetuned" else ran.cell(kind, *FINETUNED[0])
    ours, values = ran.extras(cell, "geometry"), ran.capture(cell).attention_LQD.double()
    for layer in range(2):
        points, labels = values[layer].numpy(), geometry.kmeans(values[layer]).numpy()
        others = [np.arange(len(points)) != n for n in range(len(points))]
        learners = [KNeighborsClassifier(5, algorithm="brute").fit(points[rest], labels[rest]) for rest in others]
        assert ours["learnability", layer] == pytest.approx(np.mean([each.predict(points[n : n + 1])[0] == labels[n] for n, each in enumerate(learners)]))
        near = np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)
        logs = np.sort(np.log(near[:, 2] / near[:, 1]))[: int(0.9 * len(points))]
        heights = -np.log(1 - np.arange(1, len(logs) + 1) / len(points))
        assert ours["intrinsic_dimension", layer] == pytest.approx(logs @ heights / (logs @ logs), abs=1e-6)


@pytest.mark.parametrize("kind", ["zero_shot", "icl", "finetuned"])
def test_the_bias_of_the_labels_is_that_after_prompts_without_content(ran: Ran, kind: str) -> None:
    cell = ran.cell(kind) if kind != "finetuned" else ran.cell(kind, *FINETUNED[0])
    model = ran.base if kind != "finetuned" else ran.trained(*FINETUNED[0])[1]
    lead = ran.encoded.context_ids if kind == "icl" else ran.encoded.prefix_ids
    assert len(ran.encoded.blanks) == 3
    scores, blank = (scipy.special.softmax(ran.label_scores(model, lead, prompts), axis=1) for prompts in (ran.encoded.queries, ran.encoded.blanks))
    calibrated = scores / blank.mean(0)
    calibrated /= calibrated.sum(1, keepdims=True)
    ours = ran.extras(cell, "calibration")
    assert ours["balanced_accuracy", None] == pytest.approx(balanced_accuracy_score(ran.gold, calibrated.argmax(1)))
    assert ours["nll_label", None] == pytest.approx(log_loss(ran.gold, calibrated, labels=[0, 1]), abs=1e-6)
    divided = scores / scores.mean(0)
    divided /= divided.sum(1, keepdims=True)
    assert cell["nll_label_batch"] == pytest.approx(log_loss(ran.gold, divided, labels=[0, 1]), abs=1e-6)
    assert cell["brier"] == pytest.approx(
        np.mean([sum((p - (n == truth)) ** 2 for n, p in enumerate(row)) for row, truth in zip(scores, ran.gold, strict=True)])
    )
    assert cell["entropy"] == pytest.approx(scipy.stats.entropy(scores, axis=1).mean(), abs=1e-6)


@pytest.mark.parametrize(("method", "rate", "step"), FINETUNED)
def test_supervised_icl_is_the_trained_model_with_the_demonstrations(ran: Ran, method: str, rate: float, step: int) -> None:
    ours = ran.extras(ran.cell("finetuned", method, rate, step), "supervised_icl")
    said = scipy.special.softmax(ran.label_scores(ran.trained(method, rate, step)[1], ran.encoded.context_ids, ran.encoded.queries), axis=1)
    assert ours["balanced_accuracy", None] == pytest.approx(balanced_accuracy_score(ran.gold, said.argmax(1)))
    assert ours["nll_label", None] == pytest.approx(log_loss(ran.gold, said, labels=[0, 1]), abs=1e-6)
    plain_icl = scipy.special.softmax(ran.label_scores(ran.base, ran.encoded.context_ids, ran.encoded.queries), axis=1)
    assert abs(ours["nll_label", None] - log_loss(ran.gold, plain_icl, labels=[0, 1])) > 1e-4


def test_a_prompt_without_content_takes_no_room_from_demonstrations(ran: Ran) -> None:
    draw, tokenizer = ran.block.draw, ran.lm.tokenizer
    short = replace(draw, queries=tuple(replace(query, prompt="?") for query in draw.queries))
    limit = encode(replace(short, blanks=()), tokenizer, protocol=ran.block.protocol, max_positions=512)
    needed = len(limit.context_ids) + 1 + max(map(len, limit.label_ids))
    found = encode(short, tokenizer, protocol=ran.block.protocol, max_positions=needed)
    assert found.blanks == () and found.demonstrations == limit.demonstrations


def test_the_plan_knows_the_size_of_a_kept_capture(ran: Ran) -> None:
    (file,) = Path(str(ran.store.root), "captures").glob(f"{ran.cell('icl')['key']}*")
    assert 0 < file.stat().st_size - ran.block.cost.capture_bytes < 1000
    assert ran.block.cost.flops > 1.3 * make_plan(load_sweep(ran.path_without)).blocks[0].cost.flops, "supervised ICL is as much work as the captures"


def test_every_figure_has_a_meaning_and_every_meaning_a_figure(ran: Ran) -> None:
    found: dict[str, set[str]] = {}
    for row in ran.results.extras.to_pylist():
        found.setdefault(row["group"], set()).add(row["metric"])
    known = {group: {m.replace("<part>", part) for m in metrics for part in "kv"} for group, metrics in EXTRAS.items() if group in found}
    assert found == known and found.keys() == {"calibration", "outputs", "weights", "change", "geometry", "supervised_icl"}
    diverged = [row["key"] for row in ran.results.cells.to_pylist() if row["status"] != "done"]
    assert not set(diverged) & set(ran.results.extras["cell"].to_pylist())


def test_what_is_measured_beside_them_changes_no_other_figure_and_no_key(ran: Ran, tmp_path: Path, sweep_file: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    (block,) = make_plan(load_sweep(changed(sweep_file, more=""))).blocks
    assert [cell.key for cell in block.cells] == [cell.key for cell in ran.block.cells]
    run_block(lm_for(block), block, store)
    without, made = read_results(store), {"wall_seconds", "peak_gib", "created_at", "capture_file", "capture_sha256"}
    assert len(without.extras) == 0
    rows = {row["key"]: row for row in without.cells.to_pylist()}
    for row in ran.results.cells.to_pylist():
        for name in row.keys() - made:
            if isinstance(row[name], float):
                assert math.isclose(row[name], rows[row["key"]][name], rel_tol=1e-9, abs_tol=1e-12), name
            else:
                assert row[name] == rows[row["key"]][name], name


def filled(store: Store, path: Path) -> tuple[Block, ...]:
    """Return the blocks that `iclgd measure` would compute."""
    missing = Missing(read_results(store))

    def lacking(block: Block, encoded: Encoded) -> Block | None:
        return replace(with_cells(block, cells, encoded), is_measuring=True) if (cells := missing.to_train(block, encoded)) else None

    return make_plan(load_sweep(path), choose=lacking).blocks


def figures(results: Results) -> dict[tuple[Any, ...], float]:
    return {tuple(row[name] for name in ("cell", "group", "metric", "layer", "fold")): row["mean"] for row in results.extras.to_pylist()}


def test_cells_that_are_there_are_measured_when_asked_and_keep_their_rows(ran: Ran, tmp_path: Path, sweep_file: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    (block,) = make_plan(load_sweep(changed(sweep_file, more=""))).blocks
    run_block(lm_for(block), block, store)
    before = read_results(store)
    assert make_plan(load_sweep(sweep_file), store.keys()).blocks == () and filled(store, sweep_file) == ()
    sweep_file.write_text(sweep_file.read_text() + MEASURES)
    assert make_plan(load_sweep(sweep_file), store.keys()).blocks == (), "asking for measures runs no cell again"
    (block,) = filled(store, sweep_file)
    run_block(lm_for(block), block, store)
    after = read_results(store)
    assert after.cells.equals(before.cells) and filled(store, sweep_file) == ()
    ours, theirs = figures(after), figures(ran.results)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value is None) == (theirs[name] is None) and (value is None or math.isclose(value, theirs[name], rel_tol=1e-6, abs_tol=1e-9)), name
