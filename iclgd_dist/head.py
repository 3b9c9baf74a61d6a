"""The output head, some words of the vocabulary at a time.

Knows its weights, and what a model does to the product with them. Knows nothing of layers, tokens or losses.
"""

# Shapes: X states  D width  V vocabulary  P words of a part

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Head:
    """Weights where they compute, and what follows the product: logits times or over a number, or softly capped at it.

    `dtype`: of the products, where the weights rest in another one.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    how: Literal["times", "over", "cap"] = "times"
    number: float | None = None
    dtype: torch.dtype | None = None

    def rows(self, words: slice) -> Tensor:
        """Return the weights (P, D) of some words, as they compute."""
        return self.weight_VD[words].to(self.dtype or self.weight_VD.dtype)

    def logits(self, normed_XD: Tensor, words: slice = slice(None), weight_PD: Tensor | None = None) -> Tensor:
        """Return the logits (..., P) of some words; `weight_PD`: their rows, where the caller has them."""
        weight_PD = self.rows(words) if weight_PD is None else weight_PD
        logits_XP = linear(normed_XD, weight_PD, None if self.bias_V is None else self.bias_V[words].to(weight_PD.dtype))
        if self.number is None:
            return logits_XP
        if self.how == "cap":
            return torch.tanh(logits_XP / self.number) * self.number
        return logits_XP * self.number if self.how == "times" else logits_XP / self.number

    def slope(self, logits_XP: Tensor) -> Tensor | float:
        """Return the derivative of the logits in the product."""
        if self.number is None:
            return 1.0
        if self.how == "cap":
            return 1 - (logits_XP / self.number).square()
        return self.number if self.how == "times" else 1 / self.number
