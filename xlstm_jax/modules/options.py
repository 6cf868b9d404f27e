"""Options of the built-in block kinds: sizes, numerics and initializers, as frozen dataclasses."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, get_args

from xlstm_jax.config import ConfigError
from xlstm_jax.modules.kinds import IMPLEMENTATIONS

RecurrentInit = Literal["zeros", "standard"]
BiasInit = Literal["powerlaw_blockdependent", "small_init", "standard", "zeros"]
ACTIVATION_NAMES = ("gelu", "relu", "relu2", "selu", "sigmoid", "swish")


def check_at_least(name: str, value: float, smallest: float) -> None:
    """Raises ConfigError if the value is below `smallest`."""
    if value < smallest:
        raise ConfigError(
            f"{name} must be at least {smallest}, got {value}; give it a larger value."
        )


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ConfigError if the value is not one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; use one of: {', '.join(choices)}.")


def check_divides(name: str, divisor: int, width_name: str, width: int) -> None:
    """Raises ConfigError, with the nearest divisors, unless `divisor` divides `width`."""
    if divisor < 1 or width % divisor:
        near = [n for n in range(1, width + 1) if width % n == 0]
        near = sorted(near, key=lambda n: abs(n - divisor))[:3]
        raise ConfigError(
            f"{name} must divide {width_name}={width}, got {divisor}; "
            f"use for example {', '.join(map(str, sorted(near)))}, or change {width_name}."
        )


def check_rate(name: str, value: float) -> None:
    """Raises ConfigError unless 0 <= value < 1, the range of a dropout rate."""
    if not 0 <= value < 1:
        raise ConfigError(
            f"{name} must be at least 0 and below 1, got {value}; use 0 for no dropout."
        )


def first_generation_width(
    dim: int, factor: float, multiple: int = 64, *, round_up: bool = True
) -> int:
    """factor * dim rounded to a multiple, as in the up-projections of the first generation."""
    round_factor = math.ceil if round_up else math.floor
    return multiple * round_factor(factor * dim / multiple)


def large_width(dim: int, factor: float, multiple: int = 64) -> int:
    """factor * dim rounded to a multiple, as in the reference code of the large architecture.

    This is not a ceiling: floating-point arithmetic rounds a product less than one above a multiple
    down (2048.03 gives 2048).
    """
    return int((dim * factor + multiple - 1) // multiple * multiple)


def scaling_width(dim: int) -> int:
    """2.667 * dim rounded up to a multiple of 64, as in the scaling study (arXiv:2510.02228)."""
    # Always up, unlike `large_width`: dim=768 gives 2112, not 2048.
    return 64 * math.ceil(math.ceil(2.667 * dim) / 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellConfig:
    """Heads and numerics of an mLSTM cell, under the argument names of `ops.mlstm`."""

    FIELD: ClassVar[str]  # name of the field of LMConfig, for error messages

    num_heads: int = 4  # H
    input_gate: Literal["exp", "sigmoid"] = "exp"
    forget_gate: Literal["sigmoid", "exp"] = dataclasses.field(
        default="sigmoid",
        # config.json of earlier versions has no such field.
        metadata={"to_json": lambda gate: "" if gate == "sigmoid" else gate},
    )
    normalize: bool = True  # False requires that both gates are sigmoids
    forget_bias: tuple[float, float] = (3.0, 6.0)  # first and last head: a range of time constants
    eps: float = 1e-6  # added to the normalizer
    chunk_size: int | None = None  # L; affects only speed; None: the op chooses
    implementation: str = "auto"

    def __post_init__(self):
        # With an exponential gate h grows without bound, unless it is divided by the normalizer.
        gates = ("exp", "sigmoid") if self.normalize else ("sigmoid",)
        condition = "" if self.normalize else " with normalize=False"
        for name in ("input_gate", "forget_gate"):
            check_choice(f"{self.FIELD}.{name}{condition}", getattr(self, name), gates)
        names = "auto", *IMPLEMENTATIONS.get("mlstm", ())
        check_choice(f"{self.FIELD}.implementation", self.implementation, names)
        if self.chunk_size is not None:
            check_at_least(f"{self.FIELD}.chunk_size", self.chunk_size, 1)

    @property
    def cell(self) -> dict[str, Any]:
        """Keyword arguments for `ops.mlstm`."""
        names = "input_gate", "forget_gate", "normalize", "eps", "chunk_size", "implementation"
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMConfig(CellConfig):
    """Sizes and numerics of a first-generation mLSTM block (letter m)."""

    FIELD = "mlstm"

    inner_dim: int | None = None  # F, of all heads; None: 2 * dim, rounded up to a multiple of 64
    qkv_block_size: int = 4  # q, k and v are block-diagonal projections; block size
    conv_width: int = 4  # W; 0: no convolution
    conv_mixing: bool = False  # the convolution mixes channels; otherwise it is depthwise
    use_bias: bool = False  # in projections; gates and convolution always have one
    input_bias_std: float = 0.1  # std of the initial input-gate bias, of mean 0
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        check_at_least("mlstm.conv_width", self.conv_width, 0)

    def width(self, dim: int) -> int:
        """F, the inner width of a block in a model of width `dim`."""
        return first_generation_width(dim, 2.0) if self.inner_dim is None else self.inner_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` and `qkv_block_size` divide the inner width."""
        inner_dim = self.width(dim)
        check_at_least("mlstm.inner_dim", inner_dim, 1)
        check_divides("mlstm.num_heads", self.num_heads, "the inner width", inner_dim)
        check_divides("mlstm.qkv_block_size", self.qkv_block_size, "the inner width", inner_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLSTMConfig:
    """Sizes and numerics of a first-generation sLSTM block (letter s) and its feed-forward."""

    # Each step depends nonlinearly on the previous hidden state, so time cannot be sharded.
    sharded_over_time: ClassVar[bool] = False

    num_heads: int = 4  # H; recurrent weights mix cells within a head
    conv_width: int = 4  # W; 0: no convolution and no activation after it
    conv_mixing: bool = False  # the convolution mixes channels; otherwise it is depthwise
    forget_gate: Literal["sigmoid", "exp"] = "sigmoid"
    recurrent_init: RecurrentInit = "zeros"
    bias_init: BiasInit = "powerlaw_blockdependent"
    group_norm_weight: bool = True  # whether the norm after the cell has a scale
    norm_eps: float = 1e-5
    ffn_dim: int | None = None  # None: 1.3 * dim, rounded up to a multiple of 64; 0: no layer
    ffn_activation: str = "gelu"
    ffn_bias: bool = False
    ffn_dropout: float = 0.0  # separate from `LMConfig.dropout`
    implementation: str = "auto"  # of ops.slstm

    def __post_init__(self):
        check_at_least("slstm.conv_width", self.conv_width, 0)
        check_choice("slstm.forget_gate", self.forget_gate, ("sigmoid", "exp"))
        check_choice("slstm.recurrent_init", self.recurrent_init, get_args(RecurrentInit))
        check_choice("slstm.bias_init", self.bias_init, get_args(BiasInit))
        names = "auto", *IMPLEMENTATIONS.get("slstm", ())
        check_choice("slstm.implementation", self.implementation, names)
        check_choice("slstm.ffn_activation", self.ffn_activation, ACTIVATION_NAMES)
        check_rate("slstm.ffn_dropout", self.ffn_dropout)

    @property
    def has_dropout(self) -> bool:
        """Whether `deterministic=False` changes the feed-forward layer."""
        return self.ffn_dropout > 0

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`; 0: no layer."""
        return first_generation_width(dim, 1.3) if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` divides `dim`."""
        check_at_least("slstm.ffn_dim", self.ffn_width(dim), 0)
        check_divides("slstm.num_heads", self.num_heads, "dim", dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeConfig(CellConfig):
    """Sizes and numerics of a large-architecture block (letter M)."""

    FIELD = "large"

    qk_dim: int | None = None  # H * K; None: dim // 2
    v_dim: int | None = None  # H * V; None: dim
    ffn_dim: int | None = None  # None: 2.667 * dim, rounded up to a multiple of 64
    use_bias: bool = False  # in projections and norms; gates always have one
    gate_soft_cap: float | None = 15.0  # bounds both gates; None: no cap
    input_bias: float = -10.0  # of the input gates, which start almost closed
    norm_eps: float = 1e-6

    def widths(self, dim: int) -> tuple[int, int, int]:
        """H * K, H * V and the feed-forward width in a model of width `dim`."""
        return (
            dim // 2 if self.qk_dim is None else self.qk_dim,
            dim if self.v_dim is None else self.v_dim,
            scaling_width(dim) if self.ffn_dim is None else self.ffn_dim,
        )

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` divides both widths."""
        qk_dim, v_dim, ffn_dim = self.widths(dim)
        check_at_least("large.qk_dim", qk_dim, 1)
        check_at_least("large.v_dim", v_dim, 1)
        check_at_least("large.ffn_dim", ffn_dim, 1)
        check_divides("large.num_heads", self.num_heads, "qk_dim", qk_dim)
        check_divides("large.num_heads", self.num_heads, "v_dim", v_dim)
