"""The [protocol] section: how demonstrations are drawn, how prompts are built, where states are recorded. Knows names and defaults; knows nothing of tokenizers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, model_validator


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# What the published figures used, switch by switch; the defaults of `Protocol` are the clean preset.
REFERENCE: dict[str, Any] = {
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
NUM_SEPARATE_ORDERS = 5  # permutations that the reference draws for each side


class Protocol(Frozen):
    """Every switch, each at its preset's value unless set alone. Switches are part of a cell's key, the preset's name is not.

    Source: Deutch et al. 2024 and its code, for `reference`.
    """

    preset: Literal["clean", "reference"] = "clean"  # once validated: reference where every switch is the reference's, else clean
    sink: Literal["auto", "bos", "eos"] = "auto"  # the one token every sequence starts with; auto = bos, else eos
    separator: Literal["newline", "eos", "none"] = "newline"  # after each demonstration of a context
    leading_separator: StrictBool = True  # one more after the sink: in zero-shot, in context and in training
    record_position: Literal["last_prompt", "label"] = "last_prompt"  # where states are captured; label = at the first label's token after the prompt
    loss_tokens: Literal["all", "label"] = "all"  # of a training sequence, after sink and separator
    truncation: Literal["refuse", "greedy"] = "refuse"  # greedy: the context ends before the first demonstration that does not fit; training has all
    order_rule: Literal["shared", "separate"] = "shared"  # separate: order p > 0 of finetuning is another permutation than that of the context
    demonstration_draw: Literal["hashed", "balanced", "shuffled"] = "hashed"  # balanced: labels take turns; shuffled: rows as in their file, in numpy's order
    query_draw: Literal["balanced", "shuffled"] = "balanced"  # shuffled: rows likewise, by query_seed, at most num_queries; no text of the train split
    label_tokens: Literal["joint", "separate"] = "joint"  # separate: prompt and " " + label are tokenised on their own
    line_breaks: Literal["text", "eos"] = "text"  # eos: line by line, the end-of-sequence token between lines
    first_layer: Literal["skip", "count"] = "skip"  # whether layer 0 is in the mean over layers of sim_am_delta
    undefined: Literal["null", "eps"] = "null"  # cosines of changes near the noise floor: NULL, or norms raised to 1e-8

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """Fill in the switches of the preset that are not set, and give equal protocols equal presets."""
        if not isinstance(values, dict):
            return values
        if values.get("preset") == "reference":
            values = REFERENCE | values
        is_reference = all(values.get(name, cls.model_fields[name].default) == value for name, value in REFERENCE.items())
        preset = "reference" if is_reference else "clean"
        return values | ({"preset": preset} if values.get("preset", preset) in ("clean", "reference") else {})

    def switches(self) -> dict[str, Any]:
        """Return the switches that differ from the clean preset: what a cell's key holds of the protocol."""
        return self.model_dump(exclude_defaults=True, exclude={"preset"})
