"""The [[models]] section: where a model comes from, its dtypes, and whether its weights are trained. Knows names; knows nothing of files or weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, ValidationInfo, field_validator

from iclgd_dist.axes import Seed
from iclgd_dist.protocol import Frozen

DType = Literal["float64", "float32", "bfloat16", "float16"]


class ModelSpec(Frozen):
    """Where a model comes from, the dtypes it is kept and computed in, and which of its weights are drawn anew."""

    source: Annotated[str, Field(min_length=1)]  # hub id, directory, .gguf file or pkg://package/file.gguf
    revision: str | None = None  # hub only: branch, tag or commit
    storage_dtype: DType | None = None  # weights are rounded to it; None = as stored in the files
    compute_dtype: DType = "float32"
    tf32: StrictBool = False  # GPUs only: float32 products may round what they multiply to TF32 (10 bits of mantissa), which is faster
    deterministic: StrictBool = False  # GPUs only: kernels whose sums have one order, so that two runs agree to the last bit, which is slower
    init: Literal["trained", "random", "embeddings_norms", "norms"] = "trained"  # all but these drawn anew; embeddings_norms keeps the output head too
    init_scheme: Literal["model", "fairseq"] = "model"  # transformers' own initialisation of the class, or fairseq's
    init_seeds: Annotated[tuple[Seed, ...], Field(validate_default=True)] = ()  # in the file: a model each; in a Sweep: the model's own, none if trained

    @field_validator("tf32")
    @classmethod
    def _of_float32(cls, tf32: bool, info: ValidationInfo) -> bool:
        if tf32 and (dtype := info.data.get("compute_dtype")) != "float32":
            raise ValueError(f"is for compute_dtype = 'float32', got {dtype!r}; leave it out")
        return tf32

    @field_validator("init_scheme")
    @classmethod
    def _of_an_untrained_model(cls, scheme: str, info: ValidationInfo) -> str:
        if scheme != "model" and info.data.get("init") == "trained":
            raise ValueError(f"{scheme!r} is for untrained models; init = 'random', 'embeddings_norms' or 'norms' makes one, got 'trained'")
        return scheme

    @field_validator("init_seeds", mode="before")
    @classmethod
    def _list_or_one(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("init_seeds")
    @classmethod
    def _one_for_each_untrained_model(cls, seeds: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if seeds and info.data.get("init") == "trained":
            raise ValueError("are for untrained models; init = 'random', 'embeddings_norms' or 'norms' makes one, got 'trained'")
        if not seeds and info.data.get("init", "trained") != "trained":
            raise ValueError(f"are required, one for each replicate, as init = {info.data['init']!r}; got none")
        if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise ValueError(f"must be distinct, got {twice[0]} more than once")
        return seeds

    @property
    def init_seed(self) -> int | None:
        """Seed of the weights that are drawn anew; None for a trained model."""
        return self.init_seeds[0] if self.init_seeds else None
