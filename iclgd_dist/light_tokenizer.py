"""The tokenizer of a plan: text to ids by the `tokenizers` library alone, where transformers would take seconds and torch with it.

What transformers makes of a model's files is saved once, in a process of its own, and kept in the cache. Knows files; knows nothing of prompts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iclgd_dist.apart import apart
from iclgd_dist.model_files import cache_folder, make_once
from iclgd_dist.sources import PROBES, ModelIdentity, load_tokenizer, tokenizer_folder

VERSION = 1  # raise it when something else is saved
_TOKENIZER, _IDS = "tokenizer.json", "ids.json"


class LightTokenizer:
    """Gives the ids that the model's transformers tokenizer gives."""

    def __init__(self, folder: Path, name: str) -> None:
        from tokenizers import Tokenizer

        ids = json.loads((folder / _IDS).read_text())
        self.bos_token_id, self.eos_token_id, self.name_or_path = ids["bos"], ids["eos"], name
        self._backend = Tokenizer.from_file(str(folder / _TOKENIZER))
        self._backend.encode_special_tokens = True

    def __call__(self, texts: list[str], *, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert split_special_tokens, "a special token inside a text is text"
        return {"input_ids": [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)]}

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))


def light_tokenizer(identity: ModelIdentity) -> Any:
    """Return the tokenizer to plan with; for those that are more than their `tokenizers` backend, the transformers tokenizer itself.

    Errors: SweepError, as `load_tokenizer`.
    """
    folder = tokenizer_folder(identity)  # what has to be downloaded is, in this process
    made_by = [identity.content_hash, VERSION, version("transformers"), version("tokenizers")]
    name = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:32]
    made = make_once(cache_folder("tokenizers") / name, lambda target: apart(_save, asdict(identity), str(target)))
    return LightTokenizer(made, str(folder)) if (made / _TOKENIZER).exists() else load_tokenizer(identity)


def _save(of_model: dict[str, Any], folder: str) -> None:
    """Write what a LightTokenizer reads, or nothing where it would not give the same ids."""
    from transformers import TokenizersBackend

    tokenizer, target = load_tokenizer(ModelIdentity(**of_model)), Path(folder)
    plain: Any = TokenizersBackend
    if not isinstance(tokenizer, plain) or any(getattr(type(tokenizer), name) is not getattr(plain, name) for name in ("__call__", "_encode_plus")):
        return
    try:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.save(str(target / _TOKENIZER))
    except Exception:  # a part written in Python cannot be saved, and `tokenizers` has no error of its own
        return
    (target / _IDS).write_text(json.dumps({"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}))
    texts = [*PROBES, *(f"{probe} {token}" for probe in PROBES for token in tokenizer.all_special_tokens)]
    options = {"add_special_tokens": False, "split_special_tokens": True}
    if LightTokenizer(target, "")(texts, **options)["input_ids"] != tokenizer(texts, **options)["input_ids"]:
        (target / _TOKENIZER).unlink()
