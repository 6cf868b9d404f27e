"""Configuration of the data of a run."""

import dataclasses
from typing import Literal, get_args

from xlstm_jax.config import ConfigError, check_fields
from xlstm_jax.data import tokenizers

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source, tokenizer, sequence length and batch size of the data of a run."""

    source: str = "stdlib"  # a name in `loader.DATASETS`, a text file, or a folder of text files
    seq_len: int = 256  # T: input tokens of a sequence
    batch_size: int = 16  # sequences of one step, over all hosts
    tokenizer: str = "byte"
    seed: int = 0  # of the shuffle; for synthetic tasks, of the samples themselves
    pattern: str = "*.txt"  # files of a folder to read, at any depth
    min_len: int = 3  # synthetic tasks: tokens of the shortest sample, with the answer
    max_len: int | None = None  # synthetic tasks: of the longest; None: seq_len + 1
    num_eval_samples: int = 8192  # synthetic tasks: samples of a held-out split

    def __post_init__(self):
        check_fields(self, "data.", {})
        for name, least in (
            ("seq_len", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("min_len", 2),  # one symbol and the answer
            ("num_eval_samples", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(
                    f"data.{name} must be at least {least}, got {value}; "
                    f"leave it out for the default of {getattr(DataConfig, name)}."
                )
        tokenizers.get(self.tokenizer)  # raises if the name is unknown
