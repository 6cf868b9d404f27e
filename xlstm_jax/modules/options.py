"""Options of the built-in block kinds: sizes, numerics, initial values, as frozen dataclasses."""

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
    if value < smallest:
        raise ConfigError(
            f"{name} must be at least {smallest}, got {value}; give it a larger value."
        )


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; use one of: {', '.join(choices)}.")


def check_divides(name: str, divisor: int, width_name: str, width: int) -> None:
    if divisor < 1 or width % divisor:
        near = [n for n in range(1, width + 1) if width % n == 0]
        near = sorted(near, key=lambda n: abs(n - divisor))[:3]
        raise ConfigError(
            f"{name} must divide {width_name}={width}, got {divisor}; "
            f"use for example {', '.join(map(str, sorted(near)))}, or change {width_name}."
        )


def check_rate(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be at least 0 and below 1, got {value}; 0 drops nothing.")


def first_generation_width(
    dim: int, factor: float, multiple: int = 64, *, round_up: bool = True
) -> int:
    """factor * dim rounded to a multiple, as the first generation rounds its up-projections."""
    whole = math.ceil if round_up else math.floor
    return multiple * whole(factor * dim / multiple)


def large_width(dim: int, factor: float, multiple: int = 64) -> int:
    """factor * dim rounded as the large architecture's own code does, in floating point.

    Not a ceiling: a product less than one above a multiple is rounded down (2048.03 gives 2048).
    """
    return int((dim * factor + multiple - 1) // multiple * multiple)


def scaling_width(dim: int) -> int:
    """2.667 * dim rounded up to a multiple of 64, as in the scaling study (arXiv:2510.02228)."""
    return 64 * math.ceil(math.ceil(2.667 * dim) / 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellConfig:
    """Heads and numerics of an mLSTM cell; the arguments of `ops.mlstm` by their names."""

    FIELD: ClassVar[str]  # of LMConfig, to name in errors

    num_heads: int = 4  # H
    input_gate: Literal["exp", "sigmoid"] = "exp"
    normalize: bool = True  # False needs the sigmoid input gate
    forget_bias: tuple[float, float] = (3.0, 6.0)  # first and last head: a range of time constants
    eps: float = 1e-6  # added to the normalizer
    chunk_size: int | None = None  # L; speed only, None lets the op choose
    implementation: str = "auto"

    def __post_init__(self):
        # An exponential input gate without a normalizer grows without bound.
        gates = ("exp", "sigmoid") if self.normalize else ("sigmoid",)
        condition = "" if self.normalize else " with normalize=False"
        check_choice(f"{self.FIELD}.input_gate{condition}", self.input_gate, gates)
        names = "auto", *IMPLEMENTATIONS.get("mlstm", ())
        check_choice(f"{self.FIELD}.implementation", self.implementation, names)
        if self.chunk_size is not None:
            check_at_least(f"{self.FIELD}.chunk_size", self.chunk_size, 1)

    @property
    def cell(self) -> dict[str, Any]:
        """The keyword arguments of `ops.mlstm`."""
        names = ("input_gate", "normalize", "eps", "chunk_size", "implementation")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMConfig(CellConfig):
    """Sizes and numerics of a first-generation mLSTM block (letter m)."""

    FIELD = "mlstm"

    inner_dim: int | None = None  # F, of all heads; None: 2 * dim, rounded up to a multiple of 64
    qkv_block_size: int = 4  # q, k and v mix features in groups of this size
    conv_width: int = 4  # W; 0: no convolution
    conv_mixing: bool = False  # the convolution mixes features; else each has its own window
    use_bias: bool = False  # of the projections; gates and convolution always have theirs
    input_bias_std: float = 0.1  # initial input-gate bias, normal around 0
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        check_at_least("mlstm.conv_width", self.conv_width, 0)

    def width(self, dim: int) -> int:
        """F, the inner width in a model of width `dim`."""
        return first_generation_width(dim, 2.0) if self.inner_dim is None else self.inner_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError where heads or groups do not divide the inner width."""
        inner_dim = self.width(dim)
        check_at_least("mlstm.inner_dim", inner_dim, 1)
        check_divides("mlstm.num_heads", self.num_heads, "the inner width", inner_dim)
        check_divides("mlstm.qkv_block_size", self.qkv_block_size, "the inner width", inner_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLSTMConfig:
    """Sizes and numerics of a first-generation sLSTM block (letter s), feed-forward included."""

    # Every step reads the hidden state of the step before: devices cannot share a sequence.
    sharded_over_time: ClassVar[bool] = False

    num_heads: int = 4  # H; cells mix inside a head
    conv_width: int = 4  # W; 0: neither convolution nor its activation
    conv_mixing: bool = False  # the convolution mixes features; else each has its own window
    forget_gate: Literal["sigmoid", "exp"] = "sigmoid"
    recurrent_init: RecurrentInit = "zeros"
    bias_init: BiasInit = "powerlaw_blockdependent"
    group_norm_weight: bool = True  # the norm after the cell has a scale
    norm_eps: float = 1e-5
    ffn_dim: int | None = None  # None: 1.3 * dim, rounded up to a multiple of 64; 0: none
    ffn_activation: str = "gelu"
    ffn_bias: bool = False
    ffn_dropout: float = 0.0  # of its own: the model's dropout does not reach the feed-forward
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
        return self.ffn_dropout > 0

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`; 0 where there is none."""
        return first_generation_width(dim, 1.3) if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError where heads do not divide the width."""
        check_at_least("slstm.ffn_dim", self.ffn_width(dim), 0)
        check_divides("slstm.num_heads", self.num_heads, "dim", dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeConfig(CellConfig):
    """Sizes and numerics of a large-architecture block (letter M)."""

    FIELD = "large"

    qk_dim: int | None = None  # H * K; None: dim // 2
    v_dim: int | None = None  # H * V; None: dim
    ffn_dim: int | None = None  # None: 2.667 * dim, rounded up to a multiple of 64
    use_bias: bool = False  # of projections and norms; the gates always have theirs
    gate_soft_cap: float | None = 15.0
    input_bias: float = -10.0  # input gates start almost closed
    norm_eps: float = 1e-6

    def widths(self, dim: int) -> tuple[int, int, int]:
        """H * K, H * V and the feed-forward width in a model of width `dim`."""
        return (
            dim // 2 if self.qk_dim is None else self.qk_dim,
            dim if self.v_dim is None else self.v_dim,
            scaling_width(dim) if self.ffn_dim is None else self.ffn_dim,
        )

    def check(self, dim: int) -> None:
        """Raises ConfigError where heads do not divide a width."""
        qk_dim, v_dim, ffn_dim = self.widths(dim)
        check_at_least("large.qk_dim", qk_dim, 1)
        check_at_least("large.v_dim", v_dim, 1)
        check_at_least("large.ffn_dim", ffn_dim, 1)
        check_divides("large.num_heads", self.num_heads, "qk_dim", qk_dim)
        check_divides("large.num_heads", self.num_heads, "v_dim", v_dim)
