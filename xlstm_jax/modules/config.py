"""The config of a language model: sizes, block pattern, numerics."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import tyro

from xlstm_jax.config import ConfigError, from_dict, to_dict
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.options import (
    LargeConfig,
    MLSTMConfig,
    SLSTMConfig,
    check_at_least,
    check_choice,
    check_rate,
)

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "names", "offload"]
FinalNorm = Literal["layer", "rms", "none"]


def _options_to_json(options: tuple[Any, ...]) -> dict[str, Any]:
    names = {kind.options: kind.name for kind in BLOCKS.values()}
    return {names[type(own)]: to_dict(own) for own in options}


def _options_from_json(values: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table from block kinds to options, got {values!r}.")
    classes = {kind.name: kind.options for kind in BLOCKS.values()}
    for name in values:
        if name not in classes:
            raise ConfigError(
                f"{where}.{name} is of a block kind that is not registered; use --import with the "
                "module that registers it."
            )
    return tuple(from_dict(classes[name], own, f"{where}.{name}.") for name, own in values.items())


# Not an option of commands: which classes it holds is known at run time only.
Options = Annotated[tuple[Any, ...], tyro.conf.Suppress]
_OPTIONS = {"to_json": _options_to_json, "from_json": _options_from_json}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model: embedding, one block per letter of the pattern, norm, head.

    Raises:
        ConfigError: a value is out of range, unknown, or does not fit another one.
    """

    vocab_size: int
    dim: int  # D
    pattern: str  # one letter of `BLOCKS` per block
    mlstm: MLSTMConfig = MLSTMConfig()
    slstm: SLSTMConfig = SLSTMConfig()
    large: LargeConfig = LargeConfig()
    options: Options = dataclasses.field(default=(), metadata=_OPTIONS)  # of other block kinds
    final_norm: FinalNorm = "layer"
    final_norm_eps: float = 1e-5
    final_norm_bias: bool = False
    tie_embeddings: bool = False  # the embedding is the head as well
    logit_soft_cap: float | None = None
    embedding_std: float | None = None  # initial; None: sqrt(2 / (5 dim))
    head_std: float | None = None  # initial; None: sqrt(2 / (5 dim))
    dropout: float = 0.0  # after mLSTM layers and sLSTM cells
    embedding_dropout: bool = False  # the same rate after the embedding
    dtype: Dtype = "float32"  # of activations; parameters are float32, gates and state wider
    # Saved for the backward pass. none: everything; full: inputs of steps over blocks; dots: matrix
    # products too; names: outputs of blocks too; offload: as names, in host memory.
    remat: Remat = "none"

    def __post_init__(self):
        check_at_least("vocab_size", self.vocab_size, 1)
        check_at_least("dim", self.dim, 1)
        if not self.pattern:
            raise ConfigError("pattern must name at least one block, got ''; try 'mmms'.")
        classes = [type(own) for own in self.options]
        known = {kind.options for kind in BLOCKS.values()}
        for cls in classes:
            if cls not in known or classes.count(cls) > 1:
                raise ConfigError(
                    f"options must hold one entry per block kind of modules.BLOCKS, got {cls}; "
                    "register its kind first, and give it once."
                )
        for letter in dict.fromkeys(self.pattern):
            if letter not in BLOCKS:
                raise ConfigError(
                    f"pattern={self.pattern!r}: letter={letter!r} is not known; use one of: "
                    f"{', '.join(BLOCKS)}, or --import with the module that registers its kind."
                )
            own = self.options_of(letter)
            own.check(self.dim)
            if own not in (self.mlstm, self.slstm, self.large, *self.options):
                # Defaults are recorded too: config.json has every option of the model.
                object.__setattr__(self, "options", (*self.options, own))
        check_choice("final_norm", self.final_norm, get_args(FinalNorm))
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("remat", self.remat, get_args(Remat))
        check_rate("dropout", self.dropout)

    @property
    def num_blocks(self) -> int:
        return len(self.pattern)

    @property
    def has_dropout(self) -> bool:
        """Whether `deterministic=False` changes anything."""
        own = (self.options_of(letter) for letter in dict.fromkeys(self.pattern))
        return self.dropout > 0 or any(getattr(x, "has_dropout", False) for x in own)

    def options_of(self, letter: str) -> Any:
        """The options of the blocks with this letter: a field, an entry of `options`, or defaults.

        Raises:
            KeyError: no block kind has this letter.
        """
        kind = BLOCKS[letter]
        given = (getattr(self, kind.name, None), *self.options)
        return next((own for own in given if type(own) is kind.options), None) or kind.options()
