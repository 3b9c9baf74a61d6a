"""What has to hold for every family holds, tiny and random, in both dtypes; a plain loop is the judge."""

from __future__ import annotations

import pytest
import torch

from iclgd_dist.families import FAMILIES
from iclgd_dist.model import default_dtype
from iclgd_dist.probes import QueryPass
from tests import plain
from tests.families import CHECKS, DTYPES, TINY, TOLERANCE, climbed
from tests.tiny import VARIANTS, config, tiny


def test_every_family_has_a_row_here() -> None:
    assert {config(variant).model_type for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_package_and_a_plain_loop_agree(variant: str, dtype: str) -> None:
    lm = tiny(variant, DTYPES[dtype], layers=2)
    with default_dtype(torch.float64):
        model = plain.copied(lm.model)
        errors = {check.__name__: max(check(lm, model, TINY)) for check in CHECKS.values()}
    assert {name: value for name, value in errors.items() if not value <= TOLERANCE[DTYPES[dtype]]} == {}


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neo", "opt", "xglm"])
def test_tokens_at_shifted_positions_still_see_what_came_before_the_gap(variant: str) -> None:
    lm = tiny(variant)
    with default_dtype(torch.float64):
        (shifted,) = climbed(lm, QueryPass(lm, TINY.queries, [[17]], lead=TINY.lead, shift=9))
        for number, query in enumerate(TINY.queries):
            ids = torch.tensor([TINY.lead + query])
            positions = torch.arange(ids.shape[1]) + 9 * (torch.arange(ids.shape[1]) >= len(TINY.lead))
            logits = plain.logits(plain.copied(lm.model), ids, position_ids=positions[None], attention_mask=torch.ones_like(ids))
            assert abs(float(shifted.label_scores_QC[number, 0] - logits[-1].log_softmax(-1)[17])) <= TOLERANCE[torch.float64]
