"""`offload`: layer-causal on a model whose layers stay on disk: peak memory, and how often each weight is read.

The block runs twice, each time in a process of its own: from disk, and with the model in memory; the rows have to agree. Not a test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from iclgd_dist import sources
from iclgd_dist.block import block_steps
from iclgd_dist.config import load_sweep
from iclgd_dist.model import load
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results

SWEEP = """
name = "offload"
tasks = ["mr_snippets"]
methods = ["layer_causal"]
seeds = [1]
num_demonstrations = {k}
num_queries = {queries}
steps = {steps}

[learning_rates]
layer_causal = {rates}

[[models]]
source = "model"
compute_dtype = "float32"

[resources]
cpus_per_actor = {threads}
device_map = "{place}"
"""
GOAL = {"peak_anonymous_gib": 2.0, "peak_resident_gib": 3.0, "reads_of_each_weight": 1.05, "largest_difference": 0.0}


def run(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    shape = {"layers": 32, "width": 2560, "inner": 6912, "heads": 32, "key_heads": 8, "vocabulary": 32_000}
    for name, value in {**shape, "k": 8, "queries": 32, "rates": 4, "threads": 2}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--steps", type=lambda text: [int(step) for step in text.split(",")], default=list(range(1, 9)))
    parser.add_argument("--no-comparison", action="store_true", help="do not run the model in memory")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="iclgd-offload-benchmark-") as name:
        folder = Path(name)
        num_bytes = _make_model(folder / "model", **{part: getattr(options, part) for part in shape})
        rates = [round(1e-4 * 3**n, 10) for n in range(options.rates)]
        found: dict[str, dict[str, Any]] = {}
        for place in ["disk"] if options.no_comparison else ["disk", "cpu"]:
            sweep = folder / f"{place}.toml"
            sweep.write_text(SWEEP.format(k=options.k, queries=options.queries, steps=options.steps, rates=rates, threads=options.threads, place=place))
            child = subprocess.run([sys.executable, "-m", "tests.benchmarks.offload", sweep, folder / place], stdout=subprocess.PIPE, text=True, check=True)
            found[place] = json.loads(child.stdout.splitlines()[-1])
        disk = found["disk"]
        values = {
            "peak_anonymous_gib": disk["peak_anonymous_gib"],
            "peak_resident_gib": disk["peak_resident_gib"],
            "reads_of_each_weight": disk["bytes_read"] / num_bytes["layers"],
            "largest_difference": None if options.no_comparison else _difference(folder / "disk", folder / "cpu"),
        }
    holds = {name: value is not None and value <= GOAL[name] for name, value in values.items()}
    parts = {"holds_each": holds, "model_gb": num_bytes["all"] / 1e9, **{f"{place}_{name}": value for place, of in found.items() for name, value in of.items()}}
    return {"value": values, "goal": GOAL, "holds": all(holds.values()), **parts}


def _make_model(directory: Path, *, layers: int, width: int, inner: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, int]:
    """Write a random llama in bfloat16, one file a layer, with a tokenizer of the task's words; return bytes of the layers and of all."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    directory.mkdir()
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": width // heads}
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **heads_of,
    ).save_pretrained(directory)
    _save_tokenizer(directory, vocabulary)
    keys = key_heads * width // heads
    matrices = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, width)}
    matrices |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    where, num_bytes = dict[str, str](), {"layers": 0, "all": 0}
    for number in range(layers + 1):
        if number < layers:
            start = f"model.layers.{number}."
            tensors = {f"{start}{name}.weight": drawn(*size) for name, size in matrices.items()}
            tensors |= {f"{start}{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name in ("input_layernorm", "post_attention_layernorm")}
        else:
            tensors = {"model.embed_tokens.weight": drawn(vocabulary, width), "lm_head.weight": drawn(vocabulary, width)}
            tensors["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        num_bytes = {"layers": num_bytes["layers"] + size * (number < layers), "all": num_bytes["all"] + size}
        where |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": num_bytes["all"]}, "weight_map": where}))
    return num_bytes


def _save_tokenizer(directory: Path, vocabulary: int) -> None:
    """Write a tokenizer learned from the task's texts, so that prompts have the length they have for a real model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from iclgd_dist.tasks import load_task

    task = load_task("mr_snippets")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"{example.prompt} {word}" for example in task.train for word in task.label_words], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def _difference(here: Path, there: Path) -> float:
    """Return the largest difference of any number of any cell, apart from what is measured of the machine."""
    tables = []
    for store in (here, there):
        results = read_results(store)
        machine = {"wall_seconds", "peak_gib"}
        kept = [table.drop_columns([name for name in table.column_names if name in machine]) for table in (results.cells, results.layers)]
        tables.append([table.set_column(0, "key", table["key"].cast("string")) for table in kept])  # no dictionary can be sorted by
    largest = 0.0
    for ours, theirs in zip(*tables, strict=True):
        for column in ours.column_names:
            if str(ours.schema.field(column).type) in ("double", "float"):
                order = [("key", "ascending")] + ([("layer", "ascending"), ("fold", "ascending")] if "layer" in ours.column_names else [])
                pair = [table.sort_by(order)[column].to_pylist() for table in (ours, theirs)]
                assert [value is None for value in pair[0]] == [value is None for value in pair[1]], f"{column}: not NULL in the same rows"
                largest = max([largest, *(abs(a - b) for a, b in zip(*pair, strict=True) if a is not None)])
    return largest


class _Watch(threading.Thread):
    """Reads this process's resident memory fifty times a second and keeps the largest figures [KiB]."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "VmRSS": 0}

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(rest.split()[0]))
            time.sleep(0.02)


def _child(sweep: Path, root: Path) -> None:
    from accelerate.utils import OffloadedWeightsLoader

    read = {"bytes": 0}
    plain = OffloadedWeightsLoader.__getitem__

    def counting(self: Any, key: str) -> torch.Tensor:
        tensor = plain(self, key)
        read["bytes"] += tensor.nbytes
        return tensor

    OffloadedWeightsLoader.__getitem__ = counting  # type: ignore[method-assign]
    (block,) = make_plan(load_sweep(sweep)).blocks
    torch.set_num_threads(block.resources.cpus_per_actor)
    store = Store(root)
    store.prepare()
    directory, tokenizer = sources.fetch(block.model), sources.load_tokenizer(block.model)
    watch = _Watch()
    watch.start()
    lm = load(directory, block.spec, block.resources, storage_dtype=block.storage_dtype, tokenizer=tokenizer)
    loaded, start, last = dict(watch.peak), time.perf_counter(), 0.0
    read["bytes"] = 0
    for progress in block_steps(lm, block, store):
        if (now := time.perf_counter()) - last > 15:
            print(f"{sweep.stem}: {progress.done_flops / progress.total_flops:.0%} after {now - start:.0f} s; {progress.stage}", file=sys.stderr, flush=True)
            last = now
    figures = {"peak_anonymous_gib": watch.peak["RssAnon"] / 2**20, "peak_resident_gib": watch.peak["VmRSS"] / 2**20, "loaded_gib": loaded["VmRSS"] / 2**20}
    print(json.dumps({**figures, "planned_gib": block.cost.peak_gib, "bytes_read": read["bytes"], "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    _child(*map(Path, sys.argv[1:]))
