"""What a sweep file adds to the built-in methods and metrics: [[method]] and [[metric]] sections. Knows names, ranges and files of code; runs none of it."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, field_validator, model_validator

from iclgd_dist.axes import At, Name
from iclgd_dist.protocol import Frozen
from iclgd_dist.toml_text import meant

METHOD_VERSIONS = {"vanilla": 2, "layer_causal": 2, "layer_causal_attn": 1}  # raised when a method's numbers change; part of a cell's key
METHODS = tuple(METHOD_VERSIONS)

Option = bool | int | float | str


class Code(Frozen):
    """A class in a file beside the sweep file; the text travels to the actors, which import it. `plan` reads it and runs nothing."""

    name: Name
    code: str | None = None  # "my_rules.py:Mine"
    options: dict[str, Option] = Field(default_factory=dict)  # keyword arguments of the class
    text: str = ""  # of the file, read when the sweep file is; not a key of the file

    @field_validator("options", mode="before")
    @classmethod
    def _plain(cls, options: Any) -> Any:
        for name, value in options.items() if isinstance(options, dict) else ():
            if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"must be text, finite numbers, true or false, got {name} = {value!r:.80}")
        return options

    @field_validator("code")
    @classmethod
    def _file_and_class(cls, code: str | None) -> str | None:
        if code is not None and not re.fullmatch(r"[^:]+\.py:[A-Za-z_]\w*", code):
            raise ValueError(f'must name a file and a class in it, "my_rules.py:Mine", got {code!r}')
        return code

    def with_text(self, folder: Path) -> Any:
        """Return the same with the file's text. Errors: ValueError for a file that cannot be read or is no Python."""
        if self.code is None:
            return self
        path, name = folder / self.code.rpartition(":")[0], self.code.rpartition(":")[2]
        is_whole = True
        try:
            is_whole = path.is_file() or not path.exists()  # opening a FIFO would wait for ever
            text = path.read_text(encoding="utf-8") if is_whole else ""
            compile(text, str(path), "exec")
        except FileNotFoundError:
            others = [other.stem for other in path.parent.glob("*.py")]
            raise ValueError(f"code: {path}: no such file{meant(path.stem, others, ending='.py')}") from None
        except OSError as error:
            raise ValueError(f"code: {path} cannot be read: {error.strerror}") from None
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two: nested too deeply
            raise ValueError(f"code: {path} is not Python: {error}") from None
        if not is_whole:
            raise ValueError(f"code: {path} must be a regular file, or a link to one")
        if not re.search(rf"^(class\s+{name}\b|{name}\s*=|def\s+{name}\b|from\s.*\b{name}\b)", text, re.MULTILINE):
            raise ValueError(f"code: {path} must define {name}, it does not")
        return self.model_copy(update={"text": text})

    @property
    def sha256(self) -> str:
        """Hash of the code and its options: what defines the numbers it makes."""
        said = f"{(self.code or '').rpartition(':')[2]}\0{sorted(self.options.items())}\0{self.text}"
        return hashlib.sha256(said.encode()).hexdigest()


def members(update: int, num_demonstrations: int, batch_size: int) -> range:
    """Return which demonstrations update 0, 1, ... sees, batch by batch and pass by pass."""
    start = update % -(-num_demonstrations // batch_size) * batch_size
    return range(start, min(start + batch_size, num_demonstrations))


class MethodSpec(Code):
    """A way of finetuning: a built-in one, a variation of it, or code of the user's."""

    base: Literal["vanilla", "layer_causal", "layer_causal_attn"] | None = None  # what is varied; required unless `code` is given
    weights: Literal["attn_k", "attn_v", "attn_kv", "attn_q", "attn_o", "mlp", "all_linear"] = "attn_kv"  # which projections learn
    layers: tuple[StrictInt, ...] | None = None  # which layers learn; negative numbers count from the last; None = all
    optimizer: Literal["sgd", "adam"] = "sgd"  # adam: betas .9 and .999, eps 1e-8, bias-corrected
    rank: Annotated[StrictInt, Field(ge=1)] | None = None  # of the update (LoRA); None = full
    residual: StrictBool = False  # layer_causal_attn: the loss reads attention output + residual stream
    batch_size: Annotated[StrictInt, Field(ge=1)] = 1  # demonstrations of an update, whose losses are averaged; the last of a pass may be smaller
    epochs: Annotated[StrictInt, Field(ge=1, le=1000)] = 1  # passes over the demonstrations, each in the same order

    @model_validator(mode="after")
    def _one_kind(self) -> MethodSpec:
        varied = {"weights", "layers", "optimizer", "rank", "residual", "batch_size", "epochs"} & self.model_fields_set
        if (self.code is None) == (self.base is None):
            raise ValueError("needs either base (a built-in method to vary) or code (a class of one's own)")
        if self.code is not None and varied:
            names = sorted(varied)
            raise At(f"method.{', '.join(names)}: for variations of a built-in method; code takes its own options = {{...}}", names[0])
        if self.code is None and self.options:
            raise At("method.options are for code; a variation is described by weights, layers, optimizer, rank, batch_size and epochs", "options")
        if self.base == "layer_causal_attn" and self.weights in ("mlp", "all_linear"):
            raise At(f"method.weights {self.weights!r}: the loss of layer_causal_attn reads the attention output, which no MLP weight changes", "weights")
        if self.residual and self.base != "layer_causal_attn":
            raise At(f"method.residual is an option of layer_causal_attn, got base = {self.base!r}", "residual")
        if self.layers is not None and len(set(self.layers)) < max(1, len(self.layers)):
            raise At(f"method.layers must be distinct and at least one, got {list(self.layers)}", "layers")
        return self

    @property
    def is_builtin(self) -> bool:
        return self.name == self.base

    @property
    def is_bottom_up(self) -> bool:
        """Whether its layers need nothing from above; of own code that is not known before it is run."""
        return self.base in ("layer_causal", "layer_causal_attn")

    def num_updates(self, num_demonstrations: int) -> int:
        return self.epochs * -(-num_demonstrations // self.batch_size)

    def num_trained(self, step: int, num_demonstrations: int) -> int:
        """Return how many different demonstrations the first `step` updates saw: the first of them."""
        return min(num_demonstrations, step * self.batch_size)

    def described(self) -> dict[str, Any]:
        """Return what the sweep file says beyond the name, defaults left out."""
        if self.code is not None:
            return {"code": self.code.rpartition(":")[2], "sha256": self.sha256, "options": dict(self.options)}
        return {} if self.is_builtin else {"base": self.base, **self.model_dump(mode="json", exclude_defaults=True, exclude={"name", "base", "text", "code"})}

    def key(self) -> dict[str, Any]:
        """Return what of a cell's key says how it was trained."""
        if self.code is not None:
            # It may build on any of them.
            return {"method": self.name, "method_sha256": self.sha256, "builtin_versions": METHOD_VERSIONS}
        assert self.base is not None
        return {"method": self.name, "method_version": METHOD_VERSIONS[self.base], **{f"method.{name}": value for name, value in self.described().items()}}


BUILTIN = {name: MethodSpec(name=name, base=name) for name in METHODS}  # type: ignore[arg-type]


class MetricSpec(Code):
    """A figure of the user's own: code that compares captures."""

    code: str

    @property
    def version(self) -> str:
        return hashlib.sha256(f"{self.name}\0{self.sha256}".encode()).hexdigest()[:16]
