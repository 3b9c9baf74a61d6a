"""The [protocol] section: how prompts are built and where states are recorded. Knows names and defaults; knows nothing of tokenizers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Protocol(Frozen):
    """How prompts are built and where states are recorded. Every switch is part of a cell's key."""

    preset: Literal["clean"] = "clean"
    record_position: Literal["last_prompt"] = "last_prompt"  # where states are captured
    sink: Literal["auto", "bos", "eos"] = "auto"  # the one token every sequence starts with; auto = bos, else eos
    separator: Literal["newline", "eos", "none"] = "newline"  # after the sink and after each demonstration
