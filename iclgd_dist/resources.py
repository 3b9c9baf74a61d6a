"""What an actor needs and how it packs its work: the sweep file's [resources]. None of it is part of a cell's key."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, field_validator

from iclgd_dist.axes import At, Count, refuse
from iclgd_dist.protocol import Frozen


class Resources(Frozen):
    """What one actor needs."""

    cpus_per_actor: Count = 1
    gpus_per_actor: Annotated[StrictInt, Field(ge=0)] = 0
    max_actors: Count | None = None  # None = as many as fit the cluster
    device_map: Literal["auto", "balanced", "sequential", "cpu", "disk"] = "auto"
    max_memory: dict[str, str] = Field(default_factory=dict)  # per device, e.g. {"0" = "70GiB", "cpu" = "100GiB"}
    tokens_per_batch: Count | None = None  # padded tokens of one micro-batch, over all lanes; None = by device
    lanes: Count | Literal["auto"] = "auto"  # most learning rates of a method that train at once; auto = as many as fit in memory
    hidden_states: Literal["device", "host"] = "device"  # where the queries' hidden states wait between layers; host = the machine's memory, for a small GPU

    @field_validator("max_memory", mode="before")
    @classmethod
    def _sizes(cls, sizes: Any) -> Any:
        given = sizes if isinstance(sizes, dict) else {}
        places = [name for name in given if not (name.isascii() and name.isdigit()) and name not in ("cpu", "disk")]
        sized = re.compile(r"\d+(\.\d+)?\s*[GMK]i?B", re.IGNORECASE | re.ASCII)
        wrong = {name: size for name, size in given.items() if name not in places and not (isinstance(size, str) and sized.fullmatch(size))}
        problems = [At(f'resources.max_memory is for "cpu", "disk" and the numbers of GPUs, got {name!r}', name) for name in places]
        refuse(problems + [At(f'resources.max_memory.{name} must be like "70GiB" or "500MB", got {size!r:.80}', name) for name, size in wrong.items()])
        return sizes

    @field_validator("lanes", mode="before")
    @classmethod
    def _number_or_auto(cls, lanes: Any) -> Any:
        if lanes != "auto" and (isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1):
            raise ValueError(f'must be "auto" or a whole number above 0, got {lanes!r:.80}')
        return lanes

    @property
    def is_offloaded(self) -> bool:
        """Whether weights rest elsewhere than where they are used, or may, for want of memory."""
        return self.device_map == "disk" or bool(self.max_memory)
