"""Expand a sweep into cells with keys, subtract what the store holds, group the rest into blocks, estimate what they cost.

Knows axes, keys and arithmetic. Loads no weights and imports no torch; models are known by hash, config and tokenizer only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from iclgd_dist.blocks import Block, Cell, max_positions, with_cells
from iclgd_dist.config import HUB_TASKS, ModelSpec, Sweep, SweepError
from iclgd_dist.contexts import with_controls
from iclgd_dist.cost import Cost, layers_and_width, num_embeddings, stored_dtype
from iclgd_dist.encoding import Encoded, encode, fits_context
from iclgd_dist.families import family_of
from iclgd_dist.light_tokenizer import light_tokenizer
from iclgd_dist.sources import ModelIdentity, SourceUnreachable, identify
from iclgd_dist.tasks import Draw, Task, blank_prompts, draw_bare, draw_demonstrations, load_task, query_order, with_demonstrations

KEY_SCHEMA = 1
MAX_CELLS = 10_000_000  # more would take hours to write down


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, and the blocks that remain. `unreachable` names models or tasks known from the file alone."""

    num_cells: int
    num_done: int
    keys: tuple[str, ...]  # distinct
    blocks: tuple[Block, ...]
    num_blocks_planned: int
    unreachable: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what may be a mistake
    notes: tuple[str, ...] = ()  # what a reader of the results must know

    @property
    def num_to_run(self) -> int:
        """Cells that remain; the zero-shot cell that blocks of one task share counts once."""
        return len({cell.key for block in self.blocks for cell in block.cells})

    def of_blocks(self) -> Plan:
        """Return the plan of its blocks alone, as if nothing else had been planned."""
        keys = tuple(dict.fromkeys(cell.key for block in self.blocks for cell in block.cells))
        return replace(self, num_cells=len(keys), num_done=0, keys=keys, num_blocks_planned=len(self.blocks))


def count_cells(sweep: Sweep) -> tuple[int, int]:
    """Return the numbers of cells and of blocks, from the file alone."""
    num_cells = num_blocks = 0
    for task in sweep.tasks:
        runs = sweep.num_runs(task)
        rates = sweep.rates_of(task)
        for k in sweep.num_demonstrations:
            trained = sum(len(values) * len(sweep.steps_of(method, k)) for method, values in rates.items())
            num_cells += runs * (1 + len(sweep.controls.train_on) * trained)
        num_cells += 1
        num_blocks += runs * len(sweep.num_demonstrations)
    times = len(sweep.models) * max(1, len(sweep.protocols))
    return times * num_cells, times * num_blocks


def make_plan(
    sweep: Sweep,
    finished: Collection[str] = (),
    *,
    tolerate_unreachable: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    choose: Callable[[Block, Encoded], Block | None] | None = None,
) -> Plan:
    """Expand, subtract the keys in `finished`, group and estimate. Blocks are ordered by model, then seed, longest first: a sweep stopped half-way has whole seeds.

    `choose` sees each whole block and returns what is to be run of it, instead of the cells that are not finished.

    Errors: SweepError for every task, model, label, prompt or draw that cannot be used, all at once; SourceUnreachable unless tolerated.
    """
    num_cells, num_blocks = count_cells(sweep)
    if num_cells > MAX_CELLS:
        raise SweepError(f"a sweep has at most {MAX_CELLS:,} cells, got {num_cells:,}; ask for fewer seeds, orders or learning rates")
    said = _Said(list(sweep.warnings))
    if searched := [method for method, rates in sweep.learning_rates.items() if not rates]:
        said.warnings.append(f"{', '.join(searched)}: no learning rates but those that [search] looks for, which only `iclgd tune` does")
    tasks: dict[str, Task | None] = {}
    parts = [_planned(each, finished, said, tasks, tolerate_unreachable, progress, choose) for each in sweep.of_each_protocol()]
    said.refuse()
    keys = tuple(dict.fromkeys(key for of_part, _ in parts for key in of_part))
    blocks = tuple(block for _, of_part in parts for block in of_part)
    if not said.unreachable and len(keys) < num_cells:
        said.warnings.append(f"models or protocols with the same content: {num_cells - len(keys)} cells are others' and count once")
        num_cells = len(keys)
    unreachable, warned, notes = (tuple(dict.fromkeys(lines)) for lines in (said.unreachable, said.warnings, said.notes))
    return Plan(num_cells, sum(key in finished for key in keys), keys, blocks, num_blocks, unreachable, warned, notes)


def _planned(
    sweep: Sweep,
    finished: Collection[str],
    said: _Said,
    tasks: dict[str, Task | None],
    tolerate_unreachable: bool,
    progress: Callable[[str], None],
    choose: Callable[[Block, Encoded], Block | None] | None,
) -> tuple[dict[str, None], list[Block]]:
    """Return the keys of all cells under one protocol, and the blocks to run."""
    for k in sweep.num_demonstrations:
        of_updates: dict[int, list[str]] = {}
        for method in sweep.methods:
            of_updates.setdefault(sweep.method_spec(method).num_updates(k), []).append(method)
        for updates, methods in of_updates.items():
            if too_far := [step for step in sweep.steps if step > updates]:
                whose = (f"its {updates} updates", "") if len(of_updates) == 1 else (f"the {updates} updates of {', '.join(methods)}", " there")
                said.warnings.append(f"num_demonstrations {k}: steps {', '.join(map(str, too_far))} exceed {whose[0]} and are left out{whose[1]}")
    keys: dict[str, None] = {}
    blocks: list[Block] = []
    orders: dict[tuple[int, str], list[int]] = {}
    for name in sweep.tasks:
        for seed, order in sweep.runs_of(name):
            orders.setdefault((seed, name), []).append(order)
    models = list(_identified(sweep, said, tolerate_unreachable, progress))
    others = [sweep.control_task_of(name) for name in sweep.tasks if sweep.controls.need_other_task]
    for name in (*sweep.tasks, *others):  # before a tokenizer, which may have to be converted
        if name not in tasks and (models or said.are_refused):
            progress(f"reading {name}")
            tasks[name] = None
            with said.collecting():
                tasks[name] = _load(sweep, name, said, tolerate_unreachable=tolerate_unreachable)
    encoders: dict[str, _Encoder | None] = {}  # by content: untrained models have the tokenizer of the trained one
    for spec, model in models:
        if model.content_hash not in encoders:
            progress(f"reading the tokenizer of {model.name}")
            encoders[model.content_hash] = None
            with said.collecting():
                encoders[model.content_hash] = _Encoder(sweep, model, tasks, said)
        if (encoder := encoders[model.content_hash]) is None:
            continue
        of_model: list[Block] = []
        for seed, name in product(dict.fromkeys(seed for seed, _ in orders), sweep.tasks):
            if (seed, name) not in orders or not encoder.has(name):
                continue
            progress(f"drawing {name}, seed {seed}")
            encoder.refused.add(name)
            with said.collecting():
                for block, encoded in _blocks(sweep, spec, model, name, seed, orders[seed, name], encoder):
                    missing = tuple(cell for cell in block.cells if cell.key not in finished)
                    if choose is not None:
                        of_model += [chosen] if (chosen := choose(block, encoded)) else []
                    elif any(cell.key not in keys for cell in missing):  # else another block does all of it
                        of_model.append(with_cells(block, missing, encoded))
                    keys |= dict.fromkeys(cell.key for cell in block.cells)
                encoder.refused.discard(name)
        turns = {seed: turn for turn, seed in enumerate(dict.fromkeys(seed for seed, _ in orders))}
        blocks += sorted(of_model, key=lambda block: (turns[block.seed], -block.cost.flops))
    return keys, blocks


def _identified(sweep: Sweep, said: _Said, tolerate_unreachable: bool, progress: Callable[[str], None]) -> Iterator[tuple[ModelSpec, ModelIdentity]]:
    """Yield the models that can be used; what is wrong with the others is collected."""
    for spec in sweep.models:
        progress(f"identifying {spec.source}")
        with said.collecting(tolerate_unreachable=tolerate_unreachable):
            model = identify(spec, folder=sweep.folder)
            if found := list(_problems_of(sweep, model)):
                said.problems += map(SweepError, found)
            else:
                yield spec, model


def _problems_of(sweep: Sweep, model: ModelIdentity) -> Iterator[str]:
    """Yield what is wrong with a model, and with methods that name layers which it lacks, or a rank that is no restriction."""
    try:
        family, (num_layers, width) = family_of(model.model_type), layers_and_width(model.config)
        stored_dtype(model.config)
        max_positions(model.config)
    except SweepError as error:
        yield f"model {model.source!r}: {error}"
        return
    for method in map(sweep.method_spec, sweep.methods):
        named = f"method {method.name!r}: "
        if beyond := [layer for layer in method.layers or () if not -num_layers <= layer < num_layers]:
            yield f"{named}layers must lie in {-num_layers}..{num_layers - 1} ({model.name} has {num_layers}), got {beyond[0]}"
        elif len({layer % num_layers for layer in method.layers or ()}) < len(method.layers or ()):
            yield f"{named}layers {list(method.layers or ())} name one of the {num_layers} of {model.name} twice"
        if method.residual and not (family.adds_plainly and model.config.get("do_layer_norm_before", True)):
            yield f"{named}residual is for models that add the attention output as it is; {model.model_type} norms or scales it first"
        if method.rank is not None and method.rank > width:
            yield f"{named}rank must be at most {width}, the width of {model.name}, got {method.rank}"


@dataclass
class _Said:
    """What a plan has to tell, as it is found; the same line may come many times."""

    warnings: list[str]
    notes: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    problems: list[SweepError] = field(default_factory=list)

    @property
    def are_refused(self) -> bool:
        """Whether something is wrong that more than a missing network is."""
        return any(not isinstance(problem, SourceUnreachable) for problem in self.problems)

    @contextlib.contextmanager
    def collecting(self, *, tolerate_unreachable: bool = False) -> Iterator[None]:
        """Keep what cannot be used for the end, where all of it is told at once."""
        try:
            yield
        except SweepError as error:
            if tolerate_unreachable and isinstance(error, SourceUnreachable):
                self.unreachable.append(str(error))
            else:
                self.problems.append(error)

    def refuse(self) -> None:
        """Raise the problems that were collected; a single one as it is."""
        distinct = {str(problem): problem for problem in self.problems}
        if len(distinct) == 1:
            raise next(iter(distinct.values()))
        if distinct:
            raise SweepError("\n".join(distinct))


def _load(sweep: Sweep, name: str, said: _Said, *, tolerate_unreachable: bool) -> Task | None:
    """Return the task, or None where the dataset hub cannot be reached and that is tolerated."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            task = load_task(name, own=sweep.own_task(name), folder=sweep.folder)
    except SweepError as error:
        # A cause: the hub or its client failed. Without one, the data are there and wrong.
        if not (tolerate_unreachable and name in HUB_TASKS and error.__cause__ is not None):
            raise
        said.unreachable.append(str(error))
        return None
    draw_demonstrations(task, num_demonstrations=max(sweep.num_demonstrations), seed=0, protocol=sweep.protocol)  # are there enough?
    if name in sweep.tasks and not _query_pool(sweep, task):
        raise SweepError(f"task {name!r}: at least one query is required, got none: a text of the train split is no query, nor is one with two labels")
    said.warnings += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    if name in sweep.tasks and sweep.num_queries > (size := _query_pool(sweep, task)):
        said.warnings.append(f"task {name!r}: its query pool holds {size}; all of them are taken, instead of num_queries = {sweep.num_queries}")
    return task


def _query_pool(sweep: Sweep, task: Task) -> int:
    return len(query_order(task, query_seed=sweep.query_seed, protocol=sweep.protocol))


class _Encoder:
    """Draws and token ids for one model. Each text is tokenised once and each task's queries are drawn once, however many draws share them."""

    def __init__(self, sweep: Sweep, model: ModelIdentity, tasks: Mapping[str, Task | None], said: _Said) -> None:
        self.sweep, self.tasks, self.said, self.tokenizer = sweep, tasks, said, _Remembering(light_tokenizer(model), model)
        self.refused: set[str] = set()  # tasks of which a draw could not be used
        self.max_positions = max_positions(model.config)
        self.bare: dict[str, Draw] = {}  # with queries, without demonstrations

    def has(self, name: str) -> bool:
        """Say whether a task, and the one that its controls are made of, can be drawn from."""
        return self.tasks[name] is not None and name not in self.refused and not (self.sweep.controls.need_other_task and self._other(name) is None)

    def _other(self, name: str) -> Task | None:
        return self.tasks[self.sweep.control_task_of(name)] if self.sweep.controls.need_other_task else None

    def draw(self, name: str, k: int, seed: int, order: int) -> Draw:
        sweep, task = self.sweep, self.tasks[name]
        assert task is not None
        if name not in self.bare:
            fits = fits_context(self.tokenizer, task, protocol=sweep.protocol, max_positions=self.max_positions)
            num_queries = min(sweep.num_queries, _query_pool(sweep, task))
            self.bare[name] = draw_bare(task, num_queries=num_queries, query_seed=sweep.query_seed, fits=fits, protocol=sweep.protocol)
        found = with_demonstrations(self.bare[name], task, num_demonstrations=k, seed=seed, order=order, protocol=sweep.protocol)
        controls, other = sweep.controls, self._other(name)
        found = replace(found, blanks=blank_prompts(found.template) if sweep.measures.calibration else ())
        return with_controls(found, task, contexts=controls.contexts, train_on=controls.train_on, other=other, seed=seed, protocol=sweep.protocol)

    def encode(self, draw: Draw) -> Encoded:
        encoded = encode(draw, self.tokenizer, protocol=self.sweep.protocol, max_positions=self.max_positions)
        for word, ids in zip(draw.label_words, encoded.label_ids, strict=True):
            if len(ids) > 1:
                self.said.notes.append(f"label {word!r} of {draw.task} has {len(ids)} tokens; scored by the mean of their log-probabilities")
        if encoded.num_context_demonstrations < (k := len(draw.demonstrations)):
            self.said.notes.append(f"{draw.task}: some contexts have room for fewer than {k} demonstrations; finetuning sees all of them")
        return encoded


class _Remembering:
    """A tokenizer that remembers the ids of every text it was given. Errors: SweepError for an id that the model has no embedding for."""

    def __init__(self, tokenizer: Any, model: ModelIdentity) -> None:
        self._tokenizer, self._known, self._model, self._size = tokenizer, dict[str, list[int]](), model, num_embeddings(model.config)
        self._check({"the beginning or end of a sequence": [number for number in (tokenizer.bos_token_id, tokenizer.eos_token_id) if number is not None]})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            found = dict(zip(new, self._tokenizer(new, **options)["input_ids"], strict=True))
            self._check(found)
            self._known.update(found)
        return {"input_ids": [self._known[text] for text in texts]}

    def _check(self, found: Mapping[str, Sequence[int]]) -> None:
        for text, ids in found.items():
            if self._size and max(ids, default=0) >= self._size:
                raise SweepError(
                    f"model {self._model.source!r}: its tokenizer gives token {max(ids)} for {text!r:.60}, but its embedding has {self._size} rows "
                    "(vocab_size in config.json): give it the tokenizer that it was trained with"
                )


def _blocks(
    sweep: Sweep, spec: ModelSpec, model: ModelIdentity, name: str, seed: int, orders: Sequence[int], encoder: _Encoder
) -> Iterator[tuple[Block, Encoded]]:
    storage = spec.storage_dtype or stored_dtype(model.config)
    for k, order in product(sweep.num_demonstrations, orders):
        drawn = encoder.draw(name, k, seed, order)
        block = Block(
            name="",
            model=model,
            spec=spec,
            storage_dtype=storage,
            protocol=sweep.protocol,
            controls=sweep.controls,
            measured=sweep.measures,
            resources=sweep.resources,
            methods=tuple(sweep.method_spec(method) for method in sweep.methods),
            metrics=sweep.metric,
            draw=drawn,
            num_demonstrations=k,
            seed=seed,
            order=order,
            query_seed=sweep.query_seed,
            sweep=sweep.name,
            cells=_cells(sweep, spec, model, storage, drawn, k, seed, order),
            cost=Cost(0, 0, 0.0, 0.0, 0.0),
            keeps_texts=sweep.capture.texts,
        )
        yield block, encoder.encode(drawn)  # labels, tokens and context length are checked before anything is loaded


def _cells(sweep: Sweep, spec: ModelSpec, model: ModelIdentity, storage: str, drawn: Draw, k: int, seed: int, order: int) -> tuple[Cell, ...]:
    base = {
        "schema": KEY_SCHEMA,
        "model": model.content_hash,
        "storage_dtype": storage,
        "compute_dtype": spec.compute_dtype,
        **{name: True for name in ("tf32", "deterministic") if getattr(spec, name)},
        "task": drawn.task,
        "template": drawn.template,
        "label_words": list(drawn.label_words),
        "queries": [[query.id, query.prompt, query.label] for query in drawn.queries],
        **{f"protocol.{name}": value for name, value in sweep.protocol.switches().items()},
        **({"init": spec.init, "init_scheme": spec.init_scheme, "init_seed": spec.init_seed} if spec.init != "trained" else {}),
    }
    keeps = sweep.capture.keep
    shown = base | {"demonstrations": [[d.id, d.prompt, d.label] for d in drawn.demonstrations], "seed": seed, "order": order}
    baselines = {"zero_shot": base, "icl": shown}
    cells = [Cell(key_of(values | {"kind": kind}), kind, is_kept=keeps != "none") for kind, values in baselines.items()]
    # Hashed once for the block: a cell's key is the hash of its draw's hash and its own few values.
    trained = {"kind": "finetuned", "draw": key_of(shown)}
    variants: dict[str, dict[str, Any]] = {"true": {}}
    for each in drawn.trainings:
        texts = [[d.id, d.prompt, each.label_words[d.label]] for d in each.demonstrations]
        variants[each.name] = {"train_on": each.name, "training": texts}
    for train_on, (method, rates) in product(sweep.controls.train_on, sweep.rates_of(drawn.task).items()):
        steps = sweep.steps_of(method, k)
        for rate, step in product(rates, steps):
            point = sweep.method_spec(method).key() | {"learning_rate": float(rate).hex(), "step": step}
            is_kept = keeps == "all" or (keeps == "final_step" and step == steps[-1])
            cells.append(Cell(key_of(trained | variants[train_on] | point), "finetuned", method, rate, step, train_on, is_kept, is_last=step == steps[-1]))
    return tuple(cells)


def key_of(values: dict[str, Any]) -> str:
    """Return the sha256 of canonical JSON. An option at its default is left out of `values`, so that later options leave old keys as they are."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()
