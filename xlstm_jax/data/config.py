"""What data a run sees, and how it is cut into rows."""

import dataclasses
from typing import Literal, get_args

from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source, tokenizer and row size of a run's data."""

    source: str = "stdlib"  # a name of `loader.DATASETS`, or a text file, or a folder of them
    seq_len: int = 256  # T: tokens a row feeds to the model
    batch_size: int = 16  # rows of one step, over all hosts
    tokenizer: str = "byte"
    seed: int = 0  # order of the rows; the samples themselves of a synthetic task
    pattern: str = "*.txt"  # which files of a folder to read, at any depth
    min_len: int = 3  # synthetic tasks: shortest sample, its answer included
    max_len: int | None = None  # synthetic tasks: longest sample; None: what a row holds
    num_eval_samples: int = 8192  # synthetic tasks: samples of a held-out split

    def __post_init__(self):
        for name, least in (
            ("seq_len", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("min_len", 2),
            ("num_eval_samples", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(
                    f"data.{name} must be at least {least}, got {value}; "
                    f"leave it out for the default of {getattr(DataConfig, name)}."
                )
        tokenizers.get(self.tokenizer)
