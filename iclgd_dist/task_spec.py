"""The [[task]] section: a labelled file of the user's. Knows names; reads no file."""

from __future__ import annotations

import re

from pydantic import field_validator

from iclgd_dist.axes import Name
from iclgd_dist.protocol import Frozen


class OwnTask(Frozen):
    """A labelled file of the user's: one row per example, a template, one word per label."""

    name: Name
    file: str  # .csv, .tsv, .jsonl or .parquet; relative to the sweep file
    query_file: str | None = None  # None = the rows of `file` are split by the hash of their text
    template: str  # e.g. "Review: {text} Sentiment:"; fields in braces are columns
    label_field: str = "label"
    labels: dict[str, str]  # value in the data -> word the model predicts

    @field_validator("template")
    @classmethod
    def _has_a_field(cls, template: str) -> str:
        if not re.search(r"\{[^{}]+\}", template):
            raise ValueError("must hold at least one {column}")
        return template

    @field_validator("labels")
    @classmethod
    def _two_words(cls, labels: dict[str, str]) -> dict[str, str]:
        words = [word.strip() for word in labels.values()]
        if len(words) < 2:
            raise ValueError(f"must name at least 2 labels, got {len(words)}")
        if "" in words or len(set(words)) < len(words):
            raise ValueError(f"must map each label to its own non-empty word, got {list(labels.values())}")
        return labels
