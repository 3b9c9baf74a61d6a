"""What is known of one method's training in a block: losses, gradients, sizes of deltas, and which lanes diverged when.

Knows probes and training records. Knows nothing of captures, rows or files.
"""

# Shapes: N lanes  L layers  S steps

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from iclgd_dist.deltas import norms, ranks
from iclgd_dist.model import LanguageModel
from iclgd_dist.rows import TrainingRecord
from iclgd_dist.updates import Probe, first_bad_step


@dataclass
class Trajectory:
    """One method trained on one version of the demonstrations, at all its learning rates."""

    method: str
    train_on: str
    learning_rates: list[float]
    steps: list[int]
    loss_SN: Tensor | None = None  # summed over layers where layers have losses of their own
    loss_LSN: list[Tensor] = field(default_factory=list)
    norm_SNL: Tensor | None = None
    norm_LSN: list[Tensor] = field(default_factory=list)
    delta_norms: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)  # step -> per layer: part -> norms (N,); empty where nothing learns
    bad_capture: dict[int, int] = field(default_factory=dict)  # lane -> first probed step whose capture was not finite
    keeps_ranks: bool = False
    ranks: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)  # step -> per layer: figure -> its value (N,); where they are kept

    def add_model(self, lm: LanguageModel, probe: Probe) -> None:
        """Take in a probe of the whole model: it holds everything up to its step."""
        self.loss_SN, self.norm_SNL = probe.loss_SN.cpu(), probe.gradient_norm_SNL.cpu()
        for index in range(lm.num_layers):
            self._measure(lm, index, probe)

    def add_layer(self, lm: LanguageModel, index: int, probe: Probe) -> None:
        """Take in a probe of one layer; the last one of a layer holds all its steps."""
        self._measure(lm, index, probe)
        if probe.step == self.steps[-1]:
            self.loss_LSN.append(probe.loss_SN)
            self.norm_LSN.append(probe.gradient_norm_SNL[:, :, 0])

    def _measure(self, lm: LanguageModel, index: int, probe: Probe) -> None:
        self.delta_norms.setdefault(probe.step, []).append(norms(lm, index, probe.deltas))
        if self.keeps_ranks:
            self.ranks.setdefault(probe.step, []).append(ranks(lm, index, probe.deltas))

    def ranks_of(self, lane: int, step: int) -> list[dict[str, float]]:
        """Return per layer the figures of the weights that a lane's training added; nothing where they are not kept."""
        return [{name: float(values_N[lane]) for name, values_N in of_layer.items()} for of_layer in self.ranks.get(step, [])]

    def settle(self) -> None:
        """Fetch from the devices what was noted layer by layer, once all layers are trained."""
        self.loss_LSN, self.norm_LSN = [loss_SN.cpu() for loss_SN in self.loss_LSN], [norm_SN.cpu() for norm_SN in self.norm_LSN]
        self.loss_SN, self.norm_SNL = torch.stack(self.loss_LSN).sum(0), torch.stack(self.norm_LSN, dim=2)

    def steps_since_last(self, step: int) -> int:
        return step - max((earlier for earlier in self.steps if earlier < step), default=0)

    def diverged_step(self, lane: int) -> int | None:
        """Return the first step whose loss, gradient or capture was not finite."""
        assert self.loss_SN is not None and self.norm_SNL is not None
        steps = [first_bad_step(self.loss_SN, self.norm_SNL)[lane], self.bad_capture.get(lane)]
        return min((step for step in steps if step is not None), default=None)

    def last_finite_loss(self, lane: int, step: int) -> float | None:
        assert self.loss_SN is not None
        losses = [float(loss) for loss in self.loss_SN[:step, lane] if loss.isfinite()]
        return losses[-1] if losses else None

    def record(self, lane: int, step: int) -> TrainingRecord:
        assert self.loss_SN is not None and self.norm_SNL is not None
        of_layers = self.delta_norms[step]
        parts = dict.fromkeys(part for of_layer in of_layers for part in of_layer)
        delta_norms = {part: [float(of_layer[part][lane]) if part in of_layer else math.nan for of_layer in of_layers] for part in parts}
        learns = [bool(of_layer) for of_layer in of_layers]
        per_layer = [float(loss_SN[step - 1, lane]) if learning else math.nan for loss_SN, learning in zip(self.loss_LSN, learns, strict=False)]
        gradients = [float(norm) if learning else math.nan for norm, learning in zip(self.norm_SNL[step - 1, lane], learns, strict=True)]
        return TrainingRecord(float(self.loss_SN[step - 1, lane]), per_layer or None, gradients, delta_norms)
