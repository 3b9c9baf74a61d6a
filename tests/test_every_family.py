"""One sweep with every method and control on every family: planned from the files, loaded through accelerate, one block, rows in the store."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from iclgd_dist.block import run_block
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results
from tests import tiny
from tests.tiny import lm_for

MORE = """
[controls]
contexts = ["other_draw", "flipped_labels", "shuffled_words", "separator", "shifted"]
train_on = ["true", "random_labels"]

[[method]]
name = "everything"
base = "vanilla"
weights = "all_linear"
"""
ABSOLUTE = ("gpt2", "gpt_neo", "opt", "opt_projected", "opt_post_norm", "xglm")


def save(variant: str, directory: Path, tokenizer: Path) -> None:
    """Write the tiny model of a family with a vocabulary that fits the tokenizer."""
    made = tiny.config(variant, layers=2)
    made.vocab_size, made.bos_token_id, made.eos_token_id, made.pad_token_id = 258, 0, 1, 0
    if getattr(made, "sliding_window", None):
        made.sliding_window = 64  # in windows shorter than a query no context would reach its last token
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if name in made.to_dict():
            setattr(made, name, 512)
    model = AutoModelForCausalLM.from_config(made)
    tiny.fill(model, variant)
    model.save_pretrained(directory)
    for file in tokenizer.iterdir():
        if "token" in file.name:
            shutil.copy(file, directory)


@pytest.mark.parametrize(
    ("variant", "protocol"), [*((variant, "clean") for variant in tiny.VARIANTS), ("llama", "reference"), ("gpt2", "reference"), ("xglm", "reference")]
)
def test_the_same_sweep_runs_on_every_family(variant: str, protocol: str, sweep_file: Path, tmp_path: Path, tiny_model: Path) -> None:
    save(variant, tmp_path / variant, tiny_model)
    text = sweep_file.read_text().replace("seeds = [1, 2]", 'seeds = [1]\nmethods = ["vanilla", "layer_causal", "layer_causal_attn", "everything"]')
    text = text.replace("layer_causal = [0.003, 0.05]", "layer_causal = [0.003, 0.05]\nlayer_causal_attn = 0.05\neverything = 0.003")
    text = text.replace('source = "model"', f'source = "{variant}"').replace("num_queries = 8", "num_queries = 4")
    sweep_file.write_text(text + MORE + f'\n[protocol]\npreset = "{protocol}"\n')
    (block,) = make_plan(load_sweep(sweep_file)).blocks
    store = Store(tmp_path / "store")
    store.prepare()
    run_block(lm_for(block), block, store)
    results = read_results(store)
    rows = results.cells.to_pylist()
    assert len(rows) == len(block.cells) == 2 + 2 * 2 * 6
    assert {row["status"] for row in rows} == {"done"}
    finetuned = [row for row in rows if row["kind"] == "finetuned"]
    for row in finetuned:
        for name in ("sim_aou", "sim_aou_prefix", "sim_am", "sim_am_delta", "kendall_tokens", "update_ratio", "nll_label"):
            assert row[name] is not None and math.isfinite(row[name]), (row["method"], name)
    assert ("shifted" in results.controls["control"].to_pylist()) == (variant in ABSOLUTE)
