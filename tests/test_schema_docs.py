"""The page of the store's tables is what the code and the rows of a block say."""

from __future__ import annotations

from pathlib import Path

from iclgd_dist import schema
from tests.schema_docs import FILE, LIKE, document, small_results


def test_the_page_is_up_to_date_and_has_every_column(sweep_file: Path) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert text == document(small_results(sweep_file)), "run `python -m tests.schema_docs`"
    every = (schema.IDENTITY, schema.OUTCOME, schema.PROVENANCE, schema.FOLD, schema.LAYER, schema.EXAMPLE, schema.ATTEMPT)
    assert not [name for columns in every for name, _, _ in columns if f"| `{name}` |" not in text and name not in LIKE]
    assert "none here" not in text
