"""The config of a language model: sizes, block pattern, numerics."""

import dataclasses
from typing import Literal, get_args

from xlstm_jax.config import ConfigError
from xlstm_jax.modules.checks import check_at_least, check_choice, check_rate
from xlstm_jax.modules.large import LargeConfig
from xlstm_jax.modules.mlstm import MLSTMConfig
from xlstm_jax.modules.slstm import SLSTMConfig

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "names", "offload"]
FinalNorm = Literal["layer", "rms", "none"]

SIZED_BY = {"m": "mlstm", "s": "slstm", "M": "large"}
"""Letter of a block -> the field of `LMConfig` that holds its sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model: embedding, one block per letter of the pattern, norm, head.

    Raises:
        ConfigError: a value is out of range, unknown, or does not fit another one.
    """

    vocab_size: int
    dim: int  # D
    pattern: str  # one letter per block: m and s first-generation mLSTM and sLSTM, M large
    mlstm: MLSTMConfig = MLSTMConfig()
    slstm: SLSTMConfig = SLSTMConfig()
    large: LargeConfig = LargeConfig()
    final_norm: FinalNorm = "layer"
    final_norm_eps: float = 1e-5
    final_norm_bias: bool = False
    tie_embeddings: bool = False  # the table of token vectors is the head as well
    logit_soft_cap: float | None = None
    embedding_std: float | None = None  # initial; None: sqrt(2 / (5 dim))
    head_std: float | None = None  # initial; None: sqrt(2 / (5 dim))
    dropout: float = 0.0  # after mLSTM layers and sLSTM cells
    embedding_dropout: bool = False  # the same rate after the embedding
    dtype: Dtype = "float32"  # of activations; parameters are float32, gates and memory wider
    remat: Remat = "none"  # kept: all, nothing, products, outputs of blocks (on the host)

    def __post_init__(self):
        check_at_least("vocab_size", self.vocab_size, 1)
        check_at_least("dim", self.dim, 1)
        if not self.pattern:
            raise ConfigError("pattern must name at least one block, got ''; try 'mmms'.")
        for letter in dict.fromkeys(self.pattern):
            check_choice(f"pattern={self.pattern!r}: letter", letter, SIZED_BY)
            self.sizes_of(letter).check(self.dim)
        check_choice("final_norm", self.final_norm, get_args(FinalNorm))
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("remat", self.remat, get_args(Remat))
        check_rate("dropout", self.dropout)

    @property
    def num_blocks(self) -> int:
        return len(self.pattern)

    def sizes_of(self, letter: str) -> MLSTMConfig | SLSTMConfig | LargeConfig:
        """The config of the blocks with this letter."""
        return getattr(self, SIZED_BY[letter])
