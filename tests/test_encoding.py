"""Token ids: what each preset puts together, where the loss and the items are, and what does not fit."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iclgd_dist.config import SweepError
from iclgd_dist.encoding import encode, fits_context
from iclgd_dist.protocol import Protocol
from iclgd_dist.tasks import CLEAN, Draw, Example, Query, Variation, draw
from tests.test_draws import make_task

REFERENCE = Protocol(preset="reference")


def byte_tokenizer(*, merges: tuple[tuple[str, str], ...] = (), drop_newlines: bool = False, **special: str) -> Any:
    """One token per byte, unless `merges` says more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *(left + right for left, right in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if drop_newlines:
        inner.normalizer = normalizers.Replace("\n", " ")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **(special or {"bos_token": "<s>", "eos_token": "</s>"}))


def small_draw(words: tuple[str, ...] = ("No", "Yes"), num_demonstrations: int = 3) -> Draw:
    demonstrations = tuple(Example(f"d{i}", f"Q: demo {i} A:", i % 2) for i in range(num_demonstrations))
    queries = (Query("q0", "Q: first A:", 0, "A"), Query("q1", "Q: and a second one A:", 1, "B"))
    return Draw("made", "Q: {text} A:", words, demonstrations, queries, 0)


def test_sequences_are_put_together_from_prompts_labels_sink_and_separator():
    tokenizer = byte_tokenizer()
    encoded = encode(small_draw(), tokenizer, protocol=CLEAN, max_positions=None)
    bos = tokenizer.bos_token_id

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    newline = ids("\n")
    assert encoded.prefix_ids == (bos, *newline)
    assert encoded.label_ids == (ids(" No"), ids(" Yes"))
    assert encoded.queries == (ids("Q: first A:"), ids("Q: and a second one A:"))
    assert encoded.training.sequences[1] == (bos, *newline, *ids("Q: demo 1 A: Yes"))
    assert encoded.context_ids == (bos, *newline, *ids("Q: demo 0 A: No\nQ: demo 1 A: Yes\nQ: demo 2 A: No\n"))


def test_the_protocol_chooses_sink_and_separator():
    tokenizer = byte_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = encode(small_draw(), tokenizer, protocol=Protocol(sink="eos", separator="eos"), max_positions=None)
    assert encoded.prefix_ids == (eos, eos)
    assert encoded.context_ids.count(eos) == 5
    assert encode(small_draw(), tokenizer, protocol=Protocol(separator="none"), max_positions=None).prefix_ids == (bos,)
    only_eos = byte_tokenizer(eos_token="</s>")
    assert encode(small_draw(), only_eos, protocol=CLEAN, max_positions=None).sink_ids == (only_eos.eos_token_id,)


def test_a_tokenizer_without_the_wanted_special_token_is_refused():
    bare = byte_tokenizer(pad_token="<pad>")
    for protocol in (CLEAN, Protocol(sink="bos"), Protocol(sink="eos")):
        with pytest.raises(SweepError, match=f"sink = '{protocol.sink}' is required, it has bos None and eos None"):
            encode(small_draw(), bare, protocol=protocol, max_positions=None)
    with pytest.raises(SweepError, match="an end-of-sequence token is required"):
        encode(small_draw(), byte_tokenizer(bos_token="<s>"), protocol=Protocol(separator="eos"), max_positions=None)


def test_a_tokenizer_that_loses_newlines_is_refused_unless_the_separator_is_another():
    tokenizer = byte_tokenizer(drop_newlines=True)
    with pytest.raises(SweepError, match=r'loses the newline .* set \[protocol\] separator = "eos"'):
        encode(small_draw(), tokenizer, protocol=CLEAN, max_positions=None)
    assert encode(small_draw(), tokenizer, protocol=Protocol(separator="eos"), max_positions=None).queries


def test_a_tokenizer_that_merges_the_label_with_the_prompt_is_refused():
    tokenizer = byte_tokenizer(merges=((":", "\u0120"),))  # U+0120 stands for the space
    with pytest.raises(SweepError, match=r"label 'No': tokenizer '?.*merges it with the end of the prompt .*A:'"):
        encode(small_draw(), tokenizer, protocol=CLEAN, max_positions=None)


def test_merges_within_a_label_are_fine_and_two_labels_with_the_same_ids_are_refused():
    tokenizer = byte_tokenizer(merges=(("\u0120", "N"), ("\u0120N", "o")))
    assert len(encode(small_draw(), tokenizer, protocol=CLEAN, max_positions=None).label_ids[0]) == 1
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(SweepError, match="labels 'Yes' and 'YES' must differ, got the same token ids"):
        encode(small_draw(("Yes", "YES")), lower, protocol=CLEAN, max_positions=None)


class Characters:
    """One token per character, changed by `rewrite(text, ids)`."""

    bos_token_id, eos_token_id, name_or_path = 1, 2, "characters"

    def __init__(self, rewrite):
        self.rewrite = rewrite

    def __call__(self, texts, **options):
        return {"input_ids": [self.rewrite(text, [ord(c) for c in text]) for text in texts]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_label_whose_ids_depend_on_the_prompt_or_are_none_is_refused():
    depends = Characters(lambda text, ids: [*ids[:-1], ids[-1] + 1000] if "second" in text and text.endswith("Yes") else ids)
    with pytest.raises(SweepError, match=r"label 'Yes': its token ids must be the same after every prompt, .* from tokenizer 'characters'"):
        encode(small_draw(), depends, protocol=CLEAN, max_positions=None)
    vanishes = Characters(lambda text, ids: ids[: text.rindex(":") + 1] if ":" in text else ids)
    with pytest.raises(SweepError, match=r"label 'No': .* at least one, got \[\] after"):
        encode(small_draw(), vanishes, protocol=CLEAN, max_positions=None)


def test_demonstrations_that_exceed_the_context_are_refused_with_the_number_that_fit():
    tokenizer = byte_tokenizer()
    made = small_draw()
    whole = encode(made, tokenizer, protocol=CLEAN, max_positions=None)
    needed = len(whole.context_ids) + len(whole.queries[1]) + len(" Yes")
    assert encode(made, tokenizer, protocol=CLEAN, max_positions=needed) == whole
    with pytest.raises(SweepError, match=f"3 demonstrations and the longest query need {needed} positions, the model takes {needed - 1}; 2 would fit"):
        encode(made, tokenizer, protocol=CLEAN, max_positions=needed - 1)
    with pytest.raises(SweepError, match="the longest query needs 28 positions with its label, the model takes 27"):
        encode(made, tokenizer, protocol=CLEAN, max_positions=27)


def test_a_special_token_inside_a_text_is_text():
    tokenizer = byte_tokenizer()
    made = small_draw()
    made = Draw(made.task, made.template, made.label_words, (Example("d", "Q: evil </s> <s> A:", 0),), made.queries, 0)
    (demonstration,) = encode(made, tokenizer, protocol=CLEAN, max_positions=None).demonstrations
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(demonstration)


def test_an_encoded_draw_without_demonstrations_is_zero_shot():
    encoded = encode(small_draw(num_demonstrations=0), byte_tokenizer(), protocol=CLEAN, max_positions=64)
    assert encoded.context_ids == encoded.prefix_ids
    assert encoded.training.sequences == ()


@pytest.mark.parametrize("text", ["plain", "\u00e9\U0001f600", ""])
def test_fits_context_is_exact_at_the_edge(text):
    tokenizer, task = byte_tokenizer(), make_task()
    example = Example("x", f"Text: {text} Label:", 0)
    needed = 2 + len(example.prompt.encode()) + len(" word0")
    assert fits_context(tokenizer, task, protocol=CLEAN, max_positions=needed)(example)
    assert not fits_context(tokenizer, task, protocol=CLEAN, max_positions=needed - 1)(example)
    assert fits_context(tokenizer, task, protocol=CLEAN, max_positions=None)(example)


def test_fits_context_does_not_tokenise_where_bytes_prove_it():
    tokenizer = Characters(lambda text, ids: ids)
    fits = fits_context(tokenizer, make_task(), protocol=CLEAN, max_positions=100)
    tokenizer.rewrite = None  # a call would raise
    assert fits(Example("x", "Text: short Label:", 0))
    with pytest.raises(TypeError):
        fits(Example("x", "Text: " + "long " * 40 + " Label:", 0))


def test_fits_context_knows_that_normalisation_can_lengthen_a_text():
    tokenizer, task = byte_tokenizer(), make_task()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert not fits_context(tokenizer, task, protocol=CLEAN, max_positions=60)(Example("x", "Text: \ufdfa\ufdfa Label:", 0))


def test_encoding_two_hundred_queries_with_six_labels_is_fast():
    task = make_task((60,) * 6)
    made = draw(task, num_demonstrations=16, seed=1, order=0, num_queries=200, query_seed=1)
    tokenizer = byte_tokenizer()
    start = time.monotonic()
    encode(made, tokenizer, protocol=CLEAN, max_positions=4096)
    assert time.monotonic() - start < 2


# --- the presets and their switches

D0, D1, Q0, Q1 = "Q: demo 0 A:", "Q: demo 1 A:", "Q: first A:", "Q: and a second one A:"


def spelled(tokenizer: Any, *parts: str) -> tuple[int, ...]:
    """Return ids put down by hand: "<s>" and "</s>" alone are the special tokens, everything else is one token per byte."""
    special = {"<s>": tokenizer.bos_token_id, "</s>": tokenizer.eos_token_id}
    found: list[int] = []
    for part in parts:
        found += [special[part]] if part in special else tokenizer(part, add_special_tokens=False)["input_ids"]
    return tuple(found)


def test_the_clean_preset_by_hand():
    tokenizer = byte_tokenizer()
    encoded = encode(small_draw(num_demonstrations=2), tokenizer, protocol=CLEAN, max_positions=200)
    assert encoded.prefix_ids == spelled(tokenizer, "<s>", "\n")
    assert encoded.context_ids == spelled(tokenizer, "<s>", "\n", f"{D0} No", "\n", f"{D1} Yes", "\n")
    assert encoded.training.sequences == (spelled(tokenizer, "<s>", "\n", f"{D0} No"), spelled(tokenizer, "<s>", "\n", f"{D1} Yes"))
    assert encoded.training.first_loss == (2, 2)
    assert encoded.training.items == ((2, 17), (2, 18))
    assert encoded.context_items == ((2, 17), (18, 34))
    assert encoded.queries == (spelled(tokenizer, Q0), spelled(tokenizer, Q1))
    assert encoded.same_order


def test_the_reference_preset_by_hand():
    tokenizer = byte_tokenizer()
    encoded = encode(small_draw(num_demonstrations=2), tokenizer, protocol=REFERENCE, max_positions=200)
    assert encoded.prefix_ids == spelled(tokenizer, "<s>")
    assert encoded.context_ids == spelled(tokenizer, "<s>", f"{D0} No", "</s>", f"{D1} Yes", "</s>")
    assert encoded.training.sequences == (spelled(tokenizer, "<s>", f"{D0} No"), spelled(tokenizer, "<s>", f"{D1} Yes"))
    assert encoded.training.first_loss == (1, 1)
    assert encoded.training.items == ((1, 16), (1, 17))
    assert encoded.context_items == ((1, 16), (17, 33))
    assert encoded.label_ids == (spelled(tokenizer, " No"), spelled(tokenizer, " Yes"))


@pytest.mark.parametrize("protocol", [CLEAN, REFERENCE, Protocol(separator="none"), Protocol(leading_separator=False)], ids=repr)
def test_items_are_the_demonstrations_own_tokens(protocol):
    tokenizer = byte_tokenizer()
    encoded = encode(small_draw(), tokenizer, protocol=protocol, max_positions=None)
    texts = [tokenizer.decode(list(encoded.context_ids[start:stop])) for start, stop in encoded.context_items]
    assert texts == ["Q: demo 0 A: No", "Q: demo 1 A: Yes", "Q: demo 2 A: No"]
    assert [tokenizer.decode(list(ids[start:stop])) for ids, (start, stop) in zip(encoded.training.sequences, encoded.training.items, strict=True)] == texts


def test_loss_on_label_tokens_starts_at_the_label():
    encoded = encode(small_draw(), byte_tokenizer(), protocol=Protocol(loss_tokens="label"), max_positions=None)
    tails = [ids[first:] for ids, first in zip(encoded.training.sequences, encoded.training.first_loss, strict=True)]
    assert tails == [encoded.label_ids[0], encoded.label_ids[1], encoded.label_ids[0]]


def test_a_label_of_its_own_tokens_is_not_merged_with_its_prompt():
    tokenizer = byte_tokenizer(merges=((":", "\u0120"),))  # joint tokenisation would merge them: refused above
    separate = encode(small_draw(), tokenizer, protocol=Protocol(label_tokens="separate"), max_positions=None)
    assert separate.label_ids == (spelled(tokenizer, " No"), spelled(tokenizer, " Yes"))
    assert separate.demonstrations[0] == spelled(tokenizer, D0) + spelled(tokenizer, " No")


def test_line_breaks_become_ends_of_sequence():
    tokenizer = byte_tokenizer()
    made = replace(small_draw(), demonstrations=(Example("d", "one\n\ntwo A:", 0),))
    for tokens in ("joint", "separate"):
        encoded = encode(made, tokenizer, protocol=Protocol(line_breaks="eos", label_tokens=tokens), max_positions=None)
        assert encoded.demonstrations == (spelled(tokenizer, "one", "</s>", "</s>", "two A: No"),)
    assert encode(made, tokenizer, protocol=CLEAN, max_positions=None).demonstrations == (spelled(tokenizer, "one\n\ntwo A: No"),)
    with pytest.raises(SweepError, match=r'an end-of-sequence token is required for \[protocol\] line_breaks = "eos"'):
        encode(made, byte_tokenizer(bos_token="<s>"), protocol=Protocol(line_breaks="eos"), max_positions=None)


def long_draw(lengths: list[int]) -> Draw:
    demonstrations = tuple(Example(f"d{i}", "d" * length, i % 2) for i, length in enumerate(lengths))
    return Draw("made", "{text}", ("No", "Yes"), demonstrations, (Query("q0", "q" * 9, 0, "A"), Query("q1", "q" * 5, 1, "B")), 0)


@pytest.mark.parametrize("limit", range(30, 120))
def test_greedy_truncation_is_that_of_a_plain_loop(limit):
    lengths = [20, 3, 40, 1, 2]
    context, kept = 1, 0  # the reference's loop, on numbers: BOS, then each demonstration with its label and an EOS
    for i, length in enumerate(lengths):
        demonstration = length + len((" No", " Yes")[i % 2])
        if not context + demonstration + max(1 + 9 + 4, 1 + 5 + 4) < limit:
            break
        context, kept = context + demonstration + 1, kept + 1
    encoded = encode(long_draw(lengths), byte_tokenizer(), protocol=REFERENCE, max_positions=max(limit, 45))
    if limit >= 45:  # below, the longest demonstration cannot be trained on
        assert (encoded.num_context_demonstrations, len(encoded.context_ids)) == (kept, context)
        assert len(encoded.training.sequences) == 5
        assert encoded.same_order == (kept == 5)


def test_greedy_truncation_stops_at_the_first_that_does_not_fit_and_refuses_what_cannot_be_trained_on():
    encoded = encode(long_draw([20, 60, 1]), byte_tokenizer(), protocol=REFERENCE, max_positions=70)
    assert encoded.num_context_demonstrations == 1
    with pytest.raises(SweepError, match="task 'made': the longest demonstration needs 65 positions in training, the model takes 64"):
        encode(long_draw([20, 60, 1]), byte_tokenizer(), protocol=REFERENCE, max_positions=64)


def test_the_context_of_the_first_demonstrations_trained_on():
    tokenizer, made = byte_tokenizer(), small_draw()
    same = encode(made, tokenizer, protocol=CLEAN, max_positions=None)
    for number in range(4):
        ids, items = same.context_of(number)
        assert ids == same.context_ids[: len(ids)]
        assert items == same.context_items[:number]
    assert ids == same.context_ids
    other = encode(replace(made, reordered=made.demonstrations[::-1]), tokenizer, protocol=REFERENCE, max_positions=None)
    assert not other.same_order
    assert other.context_of(2)[0] == spelled(tokenizer, "<s>", "Q: demo 2 A: No", "</s>", "Q: demo 1 A: Yes", "</s>")
    assert [tokenizer.decode(list(ids[1:])) for ids in other.training.sequences] == ["Q: demo 2 A: No", "Q: demo 1 A: Yes", "Q: demo 0 A: No"]


def test_the_first_demonstrations_trained_on_may_not_fit_a_context():
    made = long_draw([20, 3, 40, 1, 2])
    encoded = encode(replace(made, reordered=made.demonstrations[::-1]), byte_tokenizer(), protocol=REFERENCE, max_positions=78)
    assert [encoded.context_of(number) is None for number in range(6)] == [False, False, False, False, True, True]


# --- controls


def with_variations(made: Draw, *names: str, train: bool = False, words: tuple[str, ...] = ("No", "Yes"), prompt: str = "Q: other {i} A:") -> Draw:
    examples = [tuple(Example(f"{name}{i}", prompt.format(i=i), (i + 1) % 2) for i in range(3)) if name != "separator" else () for name in names]
    found = tuple(Variation(name, words, each) for name, each in zip(names, examples, strict=True))
    return replace(made, trainings=found) if train else replace(made, contexts=found)


def test_control_contexts_are_built_as_the_true_one():
    tokenizer = byte_tokenizer()
    made = with_variations(small_draw(), "other_draw", "separator")
    clean, reference = (encode(made, tokenizer, protocol=protocol, max_positions=None).control_contexts for protocol in (CLEAN, REFERENCE))
    others = ("Q: other 0 A: Yes", "Q: other 1 A: No", "Q: other 2 A: Yes")
    assert clean["other_draw"] == spelled(tokenizer, "<s>", "\n", others[0], "\n", others[1], "\n", others[2], "\n")
    assert clean["separator"] == spelled(tokenizer, "<s>", "\n", "\n")
    assert reference["other_draw"] == spelled(tokenizer, "<s>", others[0], "</s>", others[1], "</s>", others[2], "</s>")
    assert reference["separator"] == spelled(tokenizer, "<s>", "</s>")
    assert set(encode(made, tokenizer, protocol=Protocol(separator="none"), max_positions=None).control_contexts) == {"other_draw"}


def test_another_task_keeps_its_own_words_and_they_are_checked():
    tokenizer = byte_tokenizer()
    made = with_variations(small_draw(), "other_task", words=("Place", "Person"), train=True)
    encoded = encode(made, tokenizer, protocol=CLEAN, max_positions=None)
    assert encoded.training_for("other_task").sequences[0] == spelled(tokenizer, "<s>", "\n", "Q: other 0 A: Person")
    assert encoded.training_for("true").sequences == encoded.training.sequences != encoded.training_for("other_task").sequences
    assert encoded.label_ids == (spelled(tokenizer, " No"), spelled(tokenizer, " Yes"))
    label = encode(made, tokenizer, protocol=Protocol(loss_tokens="label"), max_positions=None).training_for("other_task")
    assert label.sequences[1][label.first_loss[1] :] == spelled(tokenizer, " Place")
    with pytest.raises(SweepError, match="labels 'Same' and 'Same' must differ"):
        encode(with_variations(small_draw(), "other_task", words=("Same", "Same")), tokenizer, protocol=CLEAN, max_positions=None)


def test_a_control_that_does_not_fit_is_refused_by_name_or_truncated_as_the_context_is():
    tokenizer, made = byte_tokenizer(), with_variations(small_draw(), "other_draw", prompt="Q: a much longer other {i} A:")
    needed = len(encode(small_draw(), tokenizer, protocol=CLEAN, max_positions=None).context_ids) + len(Q1) + len(" Yes")
    with pytest.raises(SweepError, match=f"task 'made', control 'other_draw': 3 demonstrations and the longest query need .* takes {needed}; 1 would fit"):
        encode(made, tokenizer, protocol=CLEAN, max_positions=needed)
    encoded = encode(made, tokenizer, protocol=REFERENCE, max_positions=needed)
    assert encoded.num_context_demonstrations == 3
    assert encoded.control_contexts["other_draw"].count(tokenizer.eos_token_id) == 1
    training = with_variations(small_draw(), "other_task", prompt="x" * needed, train=True)
    with pytest.raises(SweepError, match="task 'made', train_on 'other_task': the longest demonstration needs"):
        encode(training, tokenizer, protocol=CLEAN, max_positions=needed)


def test_shuffled_words_that_change_the_number_of_tokens_are_refused():
    tokenizer = byte_tokenizer()
    same, longer = (with_variations(small_draw(), "shuffled_words", prompt=prompt) for prompt in ("Q: 0 demo A:", "Q: {i} demo and A:"))
    assert len(encode(same, tokenizer, protocol=CLEAN, max_positions=None).control_contexts) == 1
    with pytest.raises(SweepError, match=r"control 'shuffled_words': the number of tokens may change by 5%, it goes from 46 to 59"):
        encode(longer, tokenizer, protocol=CLEAN, max_positions=None)
