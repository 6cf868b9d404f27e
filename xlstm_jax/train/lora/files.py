"""Adapters as a folder in the layout of `peft`."""

import re
from pathlib import Path

from xlstm_jax.train.config import LoraConfig
from xlstm_jax.train.lora.adapters import flatten, nest
from xlstm_jax.typing import PyTree


def save(folder: str | Path, adapters: PyTree, cfg: LoraConfig) -> None:
    """Writes adapters of a model of large blocks as a folder that `peft` reads.

    Raises:
        ConfigError: the folder has adapters already, or `peft` cannot represent these.
    """
    from xlstm_jax.convert import peft  # needs safetensors, which is optional

    peft.save(folder, flatten(adapters), rank=cfg.rank, alpha=cfg.alpha)


def load(folder: str | Path) -> tuple[LoraConfig, PyTree]:
    """Reads a folder of `save`, or of `peft` for a model of large blocks.

    Raises:
        ConfigError: the folder has no adapters, or of another kind.
        WeightsError: a file is corrupt.
    """
    from xlstm_jax.convert import peft

    rank, alpha, pairs = peft.load(folder)
    target = f"^({'|'.join(map(re.escape, pairs))})$"
    return LoraConfig(rank=rank, alpha=alpha, target=target), nest(pairs)
