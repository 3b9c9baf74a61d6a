"""What an actor needs and how it packs its work: the sweep file's [resources]. None of it is part of a cell's key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from iclgd_dist.axes import Count
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

    @property
    def is_offloaded(self) -> bool:
        """Whether weights rest elsewhere than where they are used, or may, for want of memory."""
        return self.device_map == "disk" or bool(self.max_memory)
