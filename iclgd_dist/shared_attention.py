"""Attention behind a prefix that all rows share: its keys and values are read where they are, never copied per row.

Each query attends to the prefix and to its own row apart; the two outputs are weighed by how much of the softmax each part holds. Knows tensors only.
"""

# Shapes: B rows  T new tokens  P tokens of the prefix  H query heads  K key heads, shared by H / K query heads each  d channels of a head

from __future__ import annotations

import torch
from torch import Tensor

NUM_WORTH = 64  # tokens of a prefix: copying shorter ones costs less than attending twice (measured on two CPU cores: equal near 60, half the time at 1,300)


def pays(query_BHTd: Tensor, prefix_key_1KPd: Tensor, window: int | None) -> bool:
    """Whether attending in two parts is right and faster: on a CPU, behind a long prefix, all of which every query sees."""
    num_seen = prefix_key_1KPd.shape[2] + query_BHTd.shape[2]
    is_whole = window is None or window >= num_seen
    return is_whole and prefix_key_1KPd.shape[2] >= NUM_WORTH and query_BHTd.device.type == "cpu" and query_BHTd.dtype in (torch.float32, torch.float64)


def attend_behind(prefix: tuple[Tensor, Tensor], query_BHTd: Tensor, key_BKTd: Tensor, value_BKTd: Tensor, *, scaling: float | None) -> Tensor:
    """Return the attention output (B, H, T, d): all of the prefix, then each row's own tokens causally. For what `pays`; nothing is masked.

    `prefix`: keys and values (1, K, P, d).
    Source: Dao et al. 2022, section 3.1 (softmax over blocks, put together by their log-sum-exp).
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    (num_rows, num_heads, num_tokens, _), num_key_heads = query_BHTd.shape, key_BKTd.shape[1]
    shape = (num_key_heads, num_heads // num_key_heads, num_rows, num_tokens)
    # All rows and all query heads of a key head are one long sequence to the prefix.
    folded_1KXd = query_BHTd.unflatten(1, shape[:2]).permute(1, 2, 0, 3, 4).flatten(1, 3)[None]
    shared_1KXd, log_shared_1KX = flash(folded_1KXd, *prefix, scale=scaling)
    shared_BHTd = shared_1KXd[0].unflatten(1, shape[1:]).permute(2, 0, 1, 3, 4).flatten(1, 2)
    log_shared_BHT = log_shared_1KX[0].unflatten(1, shape[1:]).permute(2, 0, 1, 3).flatten(1, 2)
    keys, values = (part.repeat_interleave(shape[1], dim=1) for part in (key_BKTd, value_BKTd))
    own_BHTd, log_own_BHT = flash(query_BHTd, keys, values, is_causal=True, scale=scaling)
    share_BHT1 = torch.sigmoid(log_shared_BHT - log_own_BHT)[..., None].to(own_BHTd.dtype)
    return torch.lerp(own_BHTd, shared_BHTd, share_BHT1)
