"""Check a method of one's own on a tiny random model: what must hold of any method, whatever it computes. Knows methods; knows nothing of sweeps or stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from iclgd_dist.deltas import ALL_PARTS
from iclgd_dist.families import family_of
from iclgd_dist.model import LanguageModel, attention_of, default_dtype
from iclgd_dist.sites import sites
from iclgd_dist.updates import Method, Probe, TrainingSequence

RATES = (0.0, 0.003, 0.05)
STEPS = (1, 4)
TOLERANCE = 1e-9  # float64: other lanes may change the order of a sum, never more


@dataclass(frozen=True)
class Finding:
    """One thing that must hold, and what was seen where it does not."""

    what: str
    problem: str = ""

    @property
    def holds(self) -> bool:
        return not self.problem


def check_method(make: Callable[[], Method]) -> Iterator[Finding]:
    """Yield findings, in the order they are checked; a method that cannot train at all yields one that says so."""
    lm = tiny_model()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    try:
        probes = _run(lm, make(), RATES, STEPS)
    except Exception as error:
        yield Finding("it trains a tiny random llama", f"{type(error).__name__}: {error}")
        return
    got = sorted(probes)
    yield Finding("it yields a probe after each of the steps asked for", "" if got == list(STEPS) else f"asked for {list(STEPS)}, got {got}")
    if got != list(STEPS):
        return
    yield Finding("its deltas fit the model's projections", _misfits(lm, probes[STEPS[-1]]))
    written = [name for name, value in lm.model.state_dict().items() if not torch.equal(value, before[name])]
    yield Finding("the model's own weights are untouched", f"written: {', '.join(written[:3])}" if written else "")
    moved = {step: max(float(delta[0].abs().max()) for delta in _deltas(probe).values()) for step, probe in probes.items()}
    yield Finding("learning rate 0 adds nothing", "" if not any(moved.values()) else f"largest change {max(moved.values()):.1e}")
    last = max(float(delta[-1].abs().max()) for delta in _deltas(probes[STEPS[-1]]).values())
    yield Finding("a learning rate above 0 adds something", "" if last > 0 else "every delta is 0")
    yield Finding("steps [1, 4] and [4] agree", _differ(probes[4], _run(lm, make(), RATES, [4])[4], exactly=True))
    yield Finding("the same twice", _differ(probes[4], _run(lm, make(), RATES, STEPS)[4], exactly=True))
    for lane, rate in enumerate(RATES):
        alone = _run(lm, make(), [rate], STEPS)[4]
        if problem := _differ(probes[4], alone, lane=lane):
            yield Finding("lanes are independent", f"learning rate {rate:g} alone gives other deltas: {problem}")
            break
    else:
        yield Finding("lanes are independent")
    probe, lanes, layers = probes[4], len(RATES), lm.num_layers
    shapes = {"loss_SN": (tuple(probe.loss_SN.shape), (4, lanes)), "gradient_norm_SNL": (tuple(probe.gradient_norm_SNL.shape), (4, lanes, layers))}
    wrong = [f"{name} must be {required}, got {shape}" for name, (shape, required) in shapes.items() if shape != required]
    yield Finding("losses and gradient norms are given for each step, lane and layer", "; ".join(wrong))


def tiny_model() -> LanguageModel:
    """Return a random two-layer llama in float64, the same each time."""
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=97, initializer_range=0.2, **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention_of(family_of("llama")), trust_remote_code=False)
    model.eval().requires_grad_(False)
    return LanguageModel(model, family_of("llama"), "tiny", None, torch.float64)


def _run(lm: LanguageModel, method: Method, rates: tuple[float, ...] | list[float], steps: tuple[int, ...] | list[int]) -> dict[int, Probe]:
    generator = torch.Generator().manual_seed(1)
    sequences = [TrainingSequence(torch.randint(3, 97, (5 + 2 * n,), generator=generator), 1) for n in range(4)]
    return {probe.step: probe for probe in method.train(lm, sequences, list(rates), steps=list(steps), seed=3)}


def _deltas(probe: Probe) -> dict[str, Tensor]:
    """Return what each projection's outputs gain, as matrices (N, I + 1, O) with the bias below the weight: the same for full and low-rank deltas."""
    found = {}
    for name, delta in probe.deltas.items():
        first = delta.tensors()[0]
        eye = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
        inputs = torch.cat([eye, torch.zeros_like(eye[:1])]).expand(len(first), -1, -1)
        found[name] = delta.change(inputs)
    return found


def _misfits(lm: LanguageModel, probe: Probe) -> str:
    known = {site.name: site for index in range(lm.num_layers) for site in sites(lm, index, ALL_PARTS).values()}
    for name, change in _deltas(probe).items():
        if name not in known:
            return f"no projection is called {name!r}; known: {', '.join(list(known)[:3])}, ..."
        required = (len(RATES), known[name].num_inputs + 1, known[name].num_outputs)
        if tuple(change.shape) != required:
            return f"{name}: (lanes, inputs, outputs) must be {(required[0], required[1] - 1, required[2])}, got {(*change.shape[:1], change.shape[1] - 1, *change.shape[2:])}"
    return "" if probe.deltas else "there are none"


def _differ(a: Probe, b: Probe, *, lane: int | None = None, exactly: bool = False) -> str:
    if a.deltas.keys() != b.deltas.keys():
        return "other projections have deltas"
    whole, other = _deltas(a), _deltas(b)
    scale = max(float(change.abs().max()) for change in whole.values()) or 1.0
    off = max(float(((change if lane is None else change[lane : lane + 1]) - other[name]).abs().max()) for name, change in whole.items()) / scale
    return "" if off <= (0.0 if exactly else TOLERANCE) else f"largest difference {off:.1e} of the largest change"
