"""Low-rank adapters (LoRA) of a tree of parameters: training, merging, and files of `peft`."""

from xlstm_jax.train.lora.adapters import (
    Targets,
    attach,
    attached_shapes,
    init,
    merge,
    merged,
    targets,
)
from xlstm_jax.train.lora.files import load, save

__all__ = [
    "Targets",
    "attach",
    "attached_shapes",
    "init",
    "load",
    "merge",
    "merged",
    "save",
    "targets",
]
