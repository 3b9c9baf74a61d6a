"""The protocol: presets fill in what is not set, and equal protocols are equal however they are written."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from iclgd_dist.protocol import REFERENCE, Protocol

# paper.md's two columns, written down once more.
CLEAN_SWITCHES = {
    "sink": "auto",
    "separator": "newline",
    "leading_separator": True,
    "record_position": "last_prompt",
    "loss_tokens": "all",
    "truncation": "refuse",
    "order_rule": "shared",
    "demonstration_draw": "hashed",
    "query_draw": "balanced",
    "label_tokens": "joint",
    "line_breaks": "text",
    "first_layer": "skip",
    "undefined": "null",
}
REFERENCE_SWITCHES = {
    "sink": "bos",
    "separator": "eos",
    "leading_separator": False,
    "record_position": "label",
    "loss_tokens": "all",
    "truncation": "greedy",
    "order_rule": "separate",
    "demonstration_draw": "shuffled",
    "query_draw": "shuffled",
    "label_tokens": "separate",
    "line_breaks": "eos",
    "first_layer": "count",
    "undefined": "eps",
}
OTHER = {name: REFERENCE_SWITCHES[name] for name in REFERENCE_SWITCHES} | {"loss_tokens": "label"}


def test_the_presets_are_what_they_are():
    assert Protocol().model_dump() == {"preset": "clean"} | CLEAN_SWITCHES
    assert Protocol(preset="reference").model_dump() == {"preset": "reference"} | REFERENCE_SWITCHES == {"preset": "reference"} | REFERENCE


@pytest.mark.parametrize("name", CLEAN_SWITCHES)
def test_every_switch_can_be_set_alone_in_either_preset(name):
    alone = Protocol(**{name: OTHER[name]})
    assert alone.model_dump() == {"preset": "clean"} | CLEAN_SWITCHES | {name: OTHER[name]}
    assert alone.switches() == {name: OTHER[name]}
    back = CLEAN_SWITCHES[name] if name != "loss_tokens" else "label"
    assert Protocol(preset="reference", **{name: back}).model_dump() == {"preset": "clean"} | REFERENCE_SWITCHES | {name: back}


def test_a_preset_spelled_out_switch_by_switch_is_the_preset():
    assert Protocol(**REFERENCE_SWITCHES) == Protocol(preset="reference")
    assert Protocol(**REFERENCE_SWITCHES).preset == "reference"
    assert Protocol(preset="reference", **CLEAN_SWITCHES) == Protocol()
    assert "preset" not in Protocol(preset="reference").switches()


@pytest.mark.parametrize("protocol", [Protocol(), Protocol(preset="reference"), Protocol(preset="reference", sink="eos")], ids=repr)
def test_a_protocol_that_is_dumped_and_read_again_is_the_same(protocol):
    assert Protocol.model_validate(protocol.model_dump()) == protocol


@pytest.mark.parametrize("name", ["preset", *CLEAN_SWITCHES])
def test_no_switch_takes_a_value_it_does_not_know(name):
    for value in ("other", 1, None, []):
        with pytest.raises(ValidationError):
            Protocol(**{name: value})
