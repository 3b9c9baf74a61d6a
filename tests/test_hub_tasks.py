"""Tasks of the hub: columns, splits and classes of each, and no network."""

from __future__ import annotations

import time
from typing import Any

import pytest

from iclgd_dist.config import SweepError
from iclgd_dist.tasks import load_task


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory in the layout of the hub, and a function that adds a dataset's split to it."""
    import datasets

    monkeypatch.setenv("ICLGD_HUB_DATA", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def add(repository: str, splits: dict[str, list[dict[str, Any]]], classes: dict[str, list[str]] | None = None, config: str | None = None) -> None:
        root = tmp_path / "hub" / repository.replace("/", "__")
        folder = root / (config or "data")
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            data = datasets.Dataset.from_list(rows)
            for column, names in (classes or {}).items():
                data = data.cast_column(column, datasets.ClassLabel(names=names))
            data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        if config:
            files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
            (root / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")

    return add


def rows_of(split: str, labels: int, num: int = 12, columns: tuple[str, ...] = ("text",)) -> list[dict[str, Any]]:
    return [{column: f"{split} {column} {i}" for column in columns} | {"label": i % labels} for i in range(num)]


def test_sst2_is_read_from_its_configuration_and_unlabelled_rows_are_dropped(hub):
    splits = {s: rows_of(s, 2, columns=("sentence",)) for s in ("train", "validation", "test")}
    splits["validation"][0]["label"] = -1
    hub("nyu-mll/glue", splits, {"label": ["negative", "positive"]}, config="sst2")
    task = load_task("sst2")
    assert task.label_words == ("Negative", "Positive")
    assert {(e.prompt, e.label) for e in task.train} == {(f"Sentence: train sentence {i} Label:", i % 2) for i in range(12)}
    assert {(e.prompt, e.label) for e in task.queries} == {(f"Sentence: validation sentence {i} Label:", i % 2) for i in range(1, 12)}


def test_agnews_takes_its_queries_from_the_test_split_and_its_words_from_the_class_names(hub):
    hub("fancyzhx/ag_news", {s: rows_of(s, 4) for s in ("train", "test")}, {"label": ["World", "Sports", "Business", "Sci/Tech"]})
    task = load_task("agnews")
    assert task.label_words == ("World", "Sports", "Business", "Technology")
    assert {e.label for e in task.queries if "test text 3 " in e.prompt} == {3}


def test_cb_has_two_texts_and_its_own_order_of_classes(hub):
    splits = {s: rows_of(s, 3, columns=("premise", "hypothesis")) for s in ("train", "validation")}
    hub("aps/super_glue", splits, {"label": ["entailment", "contradiction", "neutral"]}, config="cb")
    task = load_task("cb")
    wanted = "train premise 1 Question: train hypothesis 1. True, False, or Neither? Answer:"
    assert [task.label_words[e.label] for e in task.train if e.prompt == wanted] == ["False"]


def test_trec_hub_maps_classes_by_name_not_by_number(hub):
    rows = {s: [{"text": f"{s} {i}", "coarse_label": i % 6, "fine_label": 0} for i in range(12)] for s in ("train", "test")}
    hub("CogComp/trec", rows, {"coarse_label": ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]})
    task = load_task("trec_hub")
    found = {e.prompt: task.label_words[e.label] for e in task.queries}
    assert [found[f"Question: test {i} Type:"] for i in range(6)] == ["Expression", "Entity", "Description", "Person", "Location", "Number"]


def test_sst5_and_subj_take_their_labels_from_the_text_column(hub):
    names = ["very negative", "negative", "neutral", "positive", "very positive"]
    hub("SetFit/sst5", {s: [r | {"label_text": names[r["label"]]} for r in rows_of(s, 5)] for s in ("train", "validation", "test")})
    found = {e.prompt: e.label for e in load_task("sst5").queries}
    assert [found[f"Sentence: validation text {i} Label:"] for i in range(5)] == [0, 1, 2, 3, 4]
    hub("SetFit/subj", {s: [r | {"label_text": ["objective", "subjective"][r["label"]]} for r in rows_of(s, 2)] for s in ("train", "test")})
    assert load_task("subj").label_words == ("objective", "subjective")


def test_rte_and_mr_are_read(hub):
    hub(
        "nyu-mll/glue",
        {s: rows_of(s, 2, columns=("sentence1", "sentence2")) for s in ("train", "validation")},
        {"label": ["entailment", "not_entailment"]},
        config="rte",
    )
    task = load_task("rte")
    assert "Passage: train sentence1 4 Question: train sentence2 4 Yes or No? Answer:" in {e.prompt for e in task.train if task.label_words[e.label] == "Yes"}
    hub("cornell-movie-review-data/rotten_tomatoes", {s: rows_of(s, 2) for s in ("train", "validation")}, {"label": ["neg", "pos"]})
    assert len(load_task("mr").queries) == 12


def test_a_hub_dataset_with_other_columns_splits_or_classes_is_refused(hub):
    hub("fancyzhx/ag_news", {s: rows_of(s, 4, columns=("body",)) for s in ("train", "test")}, {"label": ["World", "Sports", "Business", "Sci/Tech"]})
    with pytest.raises(SweepError, match="task 'agnews': unknown column 'text'"):
        load_task("agnews")
    hub("SetFit/subj", {"train": [r | {"label_text": "objective"} for r in rows_of("train", 2)]})
    with pytest.raises(SweepError, match="task 'subj': unknown split 'test'"):
        load_task("subj")
    hub("cornell-movie-review-data/rotten_tomatoes", {s: rows_of(s, 2) for s in ("train", "validation")}, {"label": ["bad", "good"]})
    with pytest.raises(SweepError, match=r"task 'mr': every label needs a word, got none for 'bad' \(12 rows\)"):
        load_task("mr")
    with pytest.raises(SweepError, match=r"needs a copy of SetFit/sst5 in .*SetFit__sst5 .*got no such directory"):
        load_task("sst5")


@pytest.mark.parametrize("is_offline", [True, False], ids=["offline", "unreachable"])
def test_without_a_network_a_hub_task_is_refused_at_once_in_one_line(monkeypatch, tmp_path, is_offline):
    import datasets
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.delenv("ICLGD_HUB_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    start = time.monotonic()
    with pytest.raises(SweepError, match="task 'sst2' needs the dataset nyu-mll/glue, which cannot be loaded") as caught:
        load_task("sst2")
    assert time.monotonic() - start < 3
    assert "\n" not in str(caught.value)
    assert "HF_HUB_OFFLINE=1" in str(caught.value)
