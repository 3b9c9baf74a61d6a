"""The model that a block needs, loaded as an actor loads it. Knows blocks and where models come from; knows nothing of what runs on them."""

from __future__ import annotations

from iclgd_dist import model as models
from iclgd_dist import sources
from iclgd_dist.blocks import Block
from iclgd_dist.config import SweepError
from iclgd_dist.hub import one_line
from iclgd_dist.machine import is_out_of_memory
from iclgd_dist.model import LanguageModel
from iclgd_dist.prepared import prepared


def load_model(block: Block) -> LanguageModel:
    """Return the model of a block, placed as its resources say; a model of the hub is downloaded, a GGUF converted, once on each machine.

    Errors: SweepError for a model that cannot be used; SourceUnreachable.
    """
    directory, storage_dtype = sources.fetch(block.model), block.storage_dtype
    if block.resources.gpus_per_actor == 0 and not block.resources.is_offloaded and block.spec.init_seed is None:
        # Trained weights that stay in this machine's memory are mapped, and shared with the processes beside this one.
        directory = prepared(directory, block.model.content_hash, storage_dtype=storage_dtype, compute_dtype=block.spec.compute_dtype)
        storage_dtype = block.spec.compute_dtype
    tokenizer = sources.load_tokenizer(block.model)
    try:
        return models.load(directory, block.spec, block.resources, storage_dtype=storage_dtype, name=block.model.name, tokenizer=tokenizer)
    except Exception as error:  # whatever the files make transformers raise
        if isinstance(error, SweepError) or is_out_of_memory(error):
            raise
        raise SweepError(f"model {block.model.source!r}: its weights cannot be loaded ({one_line(error)}); config.json must be that of its weights") from error
