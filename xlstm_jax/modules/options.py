"""Options of the built-in block kinds: sizes, numerics and initializers, as frozen dataclasses."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from xlstm_jax.config.fields import check_fields, check_range
from xlstm_jax.errors import ConfigError, quote
from xlstm_jax.modules.kinds import IMPLEMENTATIONS

RecurrentInit = Literal["zeros", "standard"]
BiasInit = Literal["powerlaw_blockdependent", "small_init", "standard", "zeros"]
ACTIVATION_NAMES = ("gelu", "relu", "relu2", "selu", "sigmoid", "swish")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ConfigError if the value is not one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{name}={quote(value)} is not known; use one of: {', '.join(choices)}.")


def check_divides(name: str, divisor: int, width_name: str, width: int) -> None:
    """Raises ConfigError, with the nearest divisors, unless `divisor` divides `width`."""
    if divisor < 1 or width % divisor:
        small = [n for n in range(1, math.isqrt(width) + 1) if width % n == 0]
        near = {*small, *(width // n for n in small)}
        near = sorted(near, key=lambda n: abs(n - divisor))[:3]
        raise ConfigError(
            f"{name} must divide {width_name}={width}, got {quote(divisor)}; "
            f"use for example {', '.join(map(str, sorted(near)))}, or change {width_name}."
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


def rarely(name: str, default: Any) -> Any:
    """A field that config.json has only if it is set: those of earlier versions do not have it."""
    is_set = {"is_recorded": lambda cfg: getattr(cfg, name) != default}
    return dataclasses.field(default=default, metadata=is_set)


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
    # First and last head: a range of time constants. With forget_gate="exp" about (-1, 0), as a
    # positive bias multiplies the memory in every step.
    forget_bias: tuple[float, float] = (3.0, 6.0)
    eps: float = 1e-6  # added to the normalizer
    stabilize: bool = rarely("stabilize", True)  # False: no running maximum; gates may overflow
    chunk_size: int | None = None  # L; affects only speed; None: the op chooses
    implementation: str = "auto"

    def __post_init__(self):
        demands = {"at least 1": "num_heads chunk_size", "at least 0": "eps"}
        check_fields(self, f"{self.FIELD}.", demands)
        for gate in ("input_gate", "forget_gate"):
            if not self.normalize and getattr(self, gate) == "exp":
                raise ConfigError(
                    f"{self.FIELD}.{gate} must be 'sigmoid' with normalize=False, got 'exp'; h "
                    "would grow without bound, so change one of them."
                )
        names = "auto", *IMPLEMENTATIONS.get("mlstm", ())
        check_choice(f"{self.FIELD}.implementation", self.implementation, names)

    @property
    def cell(self) -> dict[str, Any]:
        """Keyword arguments for `ops.mlstm`."""
        speed = {"chunk_size": self.chunk_size, "implementation": self.implementation}
        return self.numerics | speed

    @property
    def numerics(self) -> dict[str, Any]:
        """Those of `cell` that change the result."""
        names = "input_gate", "forget_gate", "normalize", "eps", "stabilize"
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
    # What a gate depends on besides its bias: q, k and v, or with False nothing.
    input_gate_kernel: bool = rarely("input_gate_kernel", True)
    forget_gate_kernel: bool = rarely("forget_gate_kernel", True)
    # v k^T is added to the memory, a K x V matrix per head; with False only its diagonal, so that
    # the memory is a vector like that of an LSTM.
    covariance_update: bool = rarely("covariance_update", True)
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        demands = {
            "at least 1": "inner_dim qkv_block_size",
            "at least 0": "conv_width input_bias_std",
            "above 0": "norm_eps",
        }
        check_fields(self, "mlstm.", demands)

    def memory_shape(self, dim: int) -> tuple[int, int]:
        """H and K = V of the cell in a model of width `dim`."""
        F = self.width(dim)
        return (self.num_heads, F // self.num_heads) if self.covariance_update else (F, 1)

    def width(self, dim: int) -> int:
        """F, the inner width of a block in a model of width `dim`."""
        return first_generation_width(dim, 2.0) if self.inner_dim is None else self.inner_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` and `qkv_block_size` divide the inner width."""
        inner_dim = self.width(dim)
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
    stabilize: bool = rarely("stabilize", True)  # False: no running maximum; gates may overflow
    memory_mixing: bool = rarely("memory_mixing", True)  # False: no recurrent weights
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
        demands = {
            "at least 1": "num_heads",
            "at least 0": "conv_width ffn_dim",
            "above 0": "norm_eps",
            "at least 0 and below 1": "ffn_dropout",
        }
        check_fields(self, "slstm.", demands)
        names = "auto", *IMPLEMENTATIONS.get("slstm", ())
        check_choice("slstm.implementation", self.implementation, names)
        check_choice("slstm.ffn_activation", self.ffn_activation, ACTIVATION_NAMES)

    @property
    def has_dropout(self) -> bool:
        """Whether `deterministic=False` changes the feed-forward layer."""
        return self.ffn_dropout > 0

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`; 0: no layer."""
        return first_generation_width(dim, 1.3) if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` divides `dim`."""
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
    input_bias_std: float = rarely("input_bias_std", 0.0)  # of a normal distribution around it
    # Of a feed-forward layer without a gate, in `ACTIVATION_NAMES`; None: a gate with SiLU.
    ffn_activation: str | None = rarely("ffn_activation", None)
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        demands = {
            "at least 1": "qk_dim v_dim ffn_dim",
            "at least 0": "input_bias_std",
            "above 0": "gate_soft_cap norm_eps",
        }
        check_fields(self, "large.", demands)
        if self.ffn_activation is not None:
            check_choice("large.ffn_activation", self.ffn_activation, ACTIVATION_NAMES)

    def widths(self, dim: int) -> tuple[int, int, int]:
        """H * K, H * V and the feed-forward width in a model of width `dim`."""
        return (
            dim // 2 if self.qk_dim is None else self.qk_dim,
            dim if self.v_dim is None else self.v_dim,
            scaling_width(dim) if self.ffn_dim is None else self.ffn_dim,
        )

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` divides both widths."""
        qk_dim, v_dim, _ = self.widths(dim)
        check_range("large.qk_dim", qk_dim, "at least 1")  # half of dim by default
        check_divides("large.num_heads", self.num_heads, "qk_dim", qk_dim)
        check_divides("large.num_heads", self.num_heads, "v_dim", v_dim)
