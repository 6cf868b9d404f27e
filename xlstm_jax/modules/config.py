"""Configuration of a language model: sizes, block pattern, numerics."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from xlstm_jax.config.fields import check_fields, from_dict, to_dict
from xlstm_jax.errors import ConfigError, quote, quote_path
from xlstm_jax.modules.baselines.options import (
    AttentionConfig,
    GatedDeltaConfig,
    HybridConfig,
    LSTMConfig,
    Mamba2Config,
    MambaConfig,
    RWKV4Config,
    WindowConfig,
)
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.options import LargeConfig, MLSTMConfig, SLSTMConfig

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "names", "offload"]
# Layer norm and RMS norm. A scale is stored as such, or as its offset from one: "layer" and
# "rms_offset" store offsets.
FinalNorm = Literal["layer", "rms", "none", "layer_scale", "rms_offset"]
EmbeddingNorm = Literal["none", "layer_scale"]


def _options_to_json(options: tuple[Any, ...]) -> dict[str, Any]:
    names = {kind.options: kind.name for kind in BLOCKS.values()}
    return {names[type(entry)]: to_dict(entry) for entry in options}


def _options_from_json(values: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where} must map block kinds to options, got {quote(values)}; "
            "use the name of each kind as its key."
        )
    classes = {kind.name: kind.options for kind in BLOCKS.values()}
    for name in values:
        if name not in classes:
            raise ConfigError(
                f"{quote_path(f'{where}.{name}')} names a block kind that is not registered; use "
                "--import with the module that registers it."
            )
    return tuple(
        from_dict(classes[name], fields, f"{where}.{name}.") for name, fields in values.items()
    )


_DEMANDS = {
    "at least 1": "vocab_size dim",
    "at least 0": "head_std",
    "above 0": "final_norm_eps logit_soft_cap embedding_std",
    "at least 0 and below 1": "dropout",
}


def _field(name: str, options: Any) -> Any:
    """A field that config.json has if the pattern has blocks of this kind, or if it is set."""

    def is_recorded(cfg: "LMConfig") -> bool:
        is_used = any(BLOCKS[letter].name == name for letter in cfg.pattern)
        return is_used or getattr(cfg, name) != options

    return dataclasses.field(default=options, metadata={"is_recorded": is_recorded})


# Hidden from the command line: the classes of its entries are only known at run time.
Options = Annotated[tuple[Any, ...], tyro.conf.Suppress]
_OPTIONS = {"to_json": _options_to_json, "from_json": _options_from_json}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model: embedding, one block per letter of the pattern, norm, head.

    Raises:
        ConfigError: a value is out of range, unknown, or inconsistent with another field.
    """

    vocab_size: int
    dim: int  # D
    pattern: str  # one letter of `BLOCKS` per block
    mlstm: MLSTMConfig = MLSTMConfig()
    slstm: SLSTMConfig = SLSTMConfig()
    large: LargeConfig = LargeConfig()
    lstm: LSTMConfig = _field("lstm", LSTMConfig())
    attention: AttentionConfig = _field("attention", AttentionConfig())
    window: WindowConfig = _field("window", WindowConfig())
    hybrid: HybridConfig = _field("hybrid", HybridConfig())
    mamba: MambaConfig = _field("mamba", MambaConfig())
    mamba2: Mamba2Config = _field("mamba2", Mamba2Config())
    gated_delta: GatedDeltaConfig = _field("gated_delta", GatedDeltaConfig())
    rwkv4: RWKV4Config = _field("rwkv4", RWKV4Config())
    options: Options = dataclasses.field(default=(), metadata=_OPTIONS)  # of kinds without a field
    embedding_norm: EmbeddingNorm = dataclasses.field(
        default="none", metadata={"to_json": lambda norm: "" if norm == "none" else norm}
    )
    final_norm: FinalNorm = "layer"
    final_norm_eps: float = 1e-5  # also of the norm of the embedding
    final_norm_bias: bool = False
    tie_embeddings: bool = False  # the head reuses the embedding matrix
    logit_soft_cap: float | None = None
    embedding_std: float | None = None  # initial; None: sqrt(2 / (5 dim))
    head_std: float | None = None  # initial; None: sqrt(2 / (5 dim))
    dropout: float = 0.0  # rate after mLSTM layers and sLSTM cells
    embedding_dropout: bool = False  # the same rate on embedded tokens
    dtype: Dtype = "float32"  # of activations; parameters are float32, gates and state wider
    # Rematerialization: what is saved for the backward pass.
    #   none: all residuals.
    #   full: the input of each scan step.
    #   dots: that, and matrix products without batch dimensions.
    #   names: that of full, and the output of each block.
    #   offload: as names, with block outputs in host memory.
    remat: Remat = "none"

    def __post_init__(self):
        check_fields(self, "", _DEMANDS)
        if not self.pattern:
            raise ConfigError("pattern must have at least one letter, got ''; try 'mmms'.")
        classes = [type(entry) for entry in self.options]
        known = {kind.options for kind in BLOCKS.values()}
        for cls in classes:
            if cls not in known or classes.count(cls) > 1:
                raise ConfigError(
                    "options must have at most one entry per kind in modules.BLOCKS, got "
                    f"{quote(cls)}; "
                    "register its kind first, and pass it once."
                )
        for letter in dict.fromkeys(self.pattern):
            if letter not in BLOCKS:
                raise ConfigError(
                    f"pattern={quote(self.pattern)}: letter={letter!r} is not known; use one of: "
                    f"{', '.join(BLOCKS)}, or --import with the module that registers its kind."
                )
            options = self.options_of(letter)
            options.check(self.dim)
            if options not in (getattr(self, BLOCKS[letter].name, None), *self.options):
                # Record defaults too, so that config.json has every option of the model.
                object.__setattr__(self, "options", (*self.options, options))

    @property
    def num_blocks(self) -> int:
        """Depth of the model: one block per letter of `pattern`."""
        return len(self.pattern)

    @property
    def has_dropout(self) -> bool:
        """Whether `deterministic=False` changes anything."""
        options = (self.options_of(letter) for letter in dict.fromkeys(self.pattern))
        return self.dropout > 0 or any(getattr(x, "has_dropout", False) for x in options)

    def options_of(self, letter: str) -> Any:
        """Options of the blocks with this letter: a field, an entry of `options`, or the defaults.

        Raises:
            KeyError: no block kind has this letter.
        """
        kind = BLOCKS[letter]
        entries = (getattr(self, kind.name, None), *self.options)
        return next((x for x in entries if type(x) is kind.options), None) or kind.options()
