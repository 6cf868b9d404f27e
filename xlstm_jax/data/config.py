"""Configuration of the data of a run."""

import dataclasses

from xlstm_jax.config import ConfigError, check_fields
from xlstm_jax.data import tokenizers
from xlstm_jax.data.documents.files import alternatives
from xlstm_jax.data.documents.splits import SPLITS, Split

__all__ = ["SPLITS", "DataConfig", "Split"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source, tokenizer, sequence length and batch size of the data of a run."""

    source: str = "stdlib"  # a name in `loader.DATASETS`, or the path of a text file or a folder
    seq_len: int = 256  # T: input tokens of a sequence
    batch_size: int = 16  # sequences of one step, over all hosts
    tokenizer: str = "byte"
    seed: int = 0  # any integer, of the shuffle; for synthetic tasks, of the samples themselves
    pattern: str | None = None  # files of a folder, at any depth: *.py; None: .txt, .md, .gz, .zst
    min_len: int = 3  # synthetic tasks: tokens of the shortest sample, with the answer
    max_len: int | None = None  # synthetic tasks: of the longest; None: seq_len + 1
    num_eval_samples: int = 8192  # synthetic tasks: samples of a held-out split

    def __post_init__(self):
        demands = {
            "at least 1": "seq_len batch_size num_eval_samples",
            "at least 2": "min_len max_len",  # one symbol and the answer
        }
        check_fields(self, "data.", demands)
        if not self.source:
            raise ConfigError(
                "data.source must be the name of a data set or a path, got ''; use '.' for the "
                "working directory."
            )
        if self.pattern is not None:
            alternatives(self.pattern)  # raises if it is invalid
        tokenizers.get(self.tokenizer)  # raises if the name is unknown
