"""Options of the block kinds that xLSTM is compared with, as frozen dataclasses."""

import dataclasses
import math
from typing import ClassVar

from xlstm_jax.config.fields import check_fields, check_range
from xlstm_jax.errors import ConfigError
from xlstm_jax.modules.kinds import IMPLEMENTATIONS
from xlstm_jax.modules.options import ACTIVATION_NAMES, CellConfig, check_choice, check_divides


def llama_width(dim: int) -> int:
    """2.667 * dim rounded up to a multiple of 64, as the Transformers of arXiv:2510.02228."""
    # The product is rounded down first, unlike in `options.scaling_width`: dim=768 gives 2048.
    return 64 * math.ceil(math.floor(2.667 * dim) / 64)


def check_implementation(field: str, op: str, name: str) -> None:
    """Raises ConfigError unless `name` is an implementation of the op, or "auto"."""
    check_choice(f"{field}.implementation", name, ("auto", *IMPLEMENTATIONS.get(op, ())))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """Sizes of an LSTM layer (letter l), and of an LSTM in a Transformer block (letter L)."""

    # Each step depends nonlinearly on the previous hidden state, so time cannot be sharded.
    sharded_over_time: ClassVar[bool] = False

    num_heads: int = 1  # H; recurrent weights mix cells within a head
    ffn_dim: int | None = None  # of letter L; None: 4 * dim; 0: no layer
    ffn_activation: str = "gelu"  # of letter L
    norm_eps: float = 1e-5  # of letter L
    implementation: str = "auto"  # of ops.lstm

    def __post_init__(self):
        demands = {"at least 1": "num_heads", "at least 0": "ffn_dim", "above 0": "norm_eps"}
        check_fields(self, "lstm.", demands)
        check_implementation("lstm", "lstm", self.implementation)
        check_choice("lstm.ffn_activation", self.ffn_activation, ACTIVATION_NAMES)

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`; 0: no layer."""
        return 4 * dim if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` divides `dim`."""
        check_divides("lstm.num_heads", self.num_heads, "dim", dim)


def check_window(field: str, window: int | None, num_sinks: int, cache_size: int) -> None:
    """Raises ConfigError unless window and sink tokens fit in the cache."""
    check_range(f"{field}.num_sinks", num_sinks, "at least 0")
    slots = (1 if window is None else window) + num_sinks
    if slots > cache_size:
        name, fits = ("num_sinks", num_sinks) if window is None else ("window", window)
        raise ConfigError(
            f"{field}.{name} must fit in {field}.cache_size={cache_size} beside "
            f"{field}.num_sinks={num_sinks}, got {fits}; set {field}.cache_size to at least "
            f"{slots}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of a Transformer block with rotary attention and a gated feed-forward (letter a)."""

    FIELD: ClassVar[str] = "attention"
    sharded_over_time: ClassVar[bool] = False  # keys of all positions are all-gathered

    num_heads: int = 4  # H, of queries
    num_kv_heads: int | None = None  # of keys and values; None: num_heads
    head_dim: int | None = None  # K; None: dim / num_heads
    window: int | None = None  # positions that a query sees; None: as many as the cache has
    num_sinks: int = 0  # first positions of a document, which all of its queries see
    cache_size: int = 2048  # positions in the state
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0  # of the features of a head that are rotated; 0: no rotation
    qk_norm: bool = False  # an RMS norm of queries and keys
    output_gate: bool = False  # a sigmoid of the input times the output
    use_bias: bool = False  # in the projections of attention
    norm_offset: bool = False  # norms store their scale as its offset from one
    ffn_dim: int | None = None  # None: 2.667 * dim, rounded to a multiple of 64
    norm_eps: float = 1e-6
    implementation: str = "auto"  # of ops.attention

    def __post_init__(self):
        demands = {
            "at least 1": "num_heads num_kv_heads head_dim window cache_size ffn_dim",
            "above 0": "norm_eps rotary_base",
            "from 0 to 1": "rotary_fraction",
        }
        check_fields(self, f"{self.FIELD}.", demands)
        check_implementation(self.FIELD, "attention", self.implementation)
        check_window(self.FIELD, self.window, self.num_sinks, self.cache_size)
        check_divides(f"{self.FIELD}.num_kv_heads", self.kv_heads, "num_heads", self.num_heads)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def window_size(self) -> int:
        """Positions that a query sees, its own included, besides the sinks."""
        return self.cache_size - self.num_sinks if self.window is None else self.window

    @property
    def max_length(self) -> int | None:
        """The longest document of which a query sees every position; None if it need not."""
        return self.window_size if self.window is None else None

    def head_width(self, dim: int) -> int:
        """K in a model of width `dim`."""
        return dim // self.num_heads if self.head_dim is None else self.head_dim

    def rotary_dim(self, dim: int) -> int:
        """Rotated features of a head in a model of width `dim`."""
        return int(self.rotary_fraction * self.head_width(dim))

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`."""
        return llama_width(dim) if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless heads divide `dim` and rotated features come in pairs."""
        if self.head_dim is None:
            check_divides(f"{self.FIELD}.num_heads", self.num_heads, "dim", dim)
        if self.rotary_dim(dim) % 2:
            width = self.head_width(dim)
            raise ConfigError(
                f"{self.FIELD}.rotary_fraction must rotate an even number of the {width} features "
                f"of a head, got {self.rotary_fraction} and {self.rotary_dim(dim)} of them; use an "
                "even width of heads, or another fraction."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig(AttentionConfig):
    """As `AttentionConfig`, for a block that sees a sliding window and sink tokens (letter w)."""

    FIELD: ClassVar[str] = "window"

    window: int | None = 256
    num_sinks: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(CellConfig):
    """Sizes of a block of an mLSTM and a sliding window side by side (letter h)."""

    FIELD = "hybrid"
    sharded_over_time: ClassVar[bool] = False

    window: int = 256  # positions that a query of the window sees
    num_sinks: int = 4  # first positions of a document, which all of its queries see
    cache_size: int = 2048  # most positions in the state
    rotary_base: float = 10_000.0  # of queries and keys of the window
    gate_soft_cap: float | None = 15.0  # bounds input and forget gates; None: no cap
    input_bias: float = -10.0  # of the input gates, which start almost closed
    ffn_dim: int | None = None  # None: 2.667 * dim, rounded to a multiple of 64
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        demands = {
            "at least 1": "window cache_size ffn_dim",
            "above 0": "gate_soft_cap norm_eps rotary_base",
        }
        check_fields(self, "hybrid.", demands)
        check_window("hybrid", self.window, self.num_sinks, self.cache_size)

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`."""
        return llama_width(dim) if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless `num_heads` divides `dim` into even widths."""
        check_divides("hybrid.num_heads", self.num_heads, "dim", dim)
        if dim // self.num_heads % 2:
            raise ConfigError(
                f"hybrid.num_heads={self.num_heads} must divide dim={dim} into heads of an even "
                f"width, got {dim // self.num_heads}; rotary positions rotate pairs of features."
            )


def check_steps(field: str, dt_min: float, dt_max: float) -> None:
    """Raises ConfigError unless the bounds of the initial step sizes are in order."""
    if dt_min > dt_max:
        raise ConfigError(
            f"{field}.dt_max must be at least {field}.dt_min={dt_min}, got {dt_max}; raise it, or "
            f"lower {field}.dt_min."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes of a Mamba block (letter b)."""

    sharded_over_time: ClassVar[bool] = False

    inner_dim: int | None = None  # F; None: 2 * dim
    state_dim: int = 16  # K, per channel
    dt_rank: int | None = None  # width of the input of the step sizes; None: dim / 16, rounded up
    conv_width: int = 4  # W
    conv_bias: bool = True
    use_bias: bool = False  # in the projections from and to the residual stream
    dt_min: float = 1e-3  # initial step sizes are log-uniform between dt_min and dt_max
    dt_max: float = 0.1
    norm_eps: float = 1e-5
    chunk_size: int | None = None  # L; affects only speed; None: the op chooses
    implementation: str = "auto"  # of ops.selective_scan

    def __post_init__(self):
        demands = {
            "at least 1": "inner_dim state_dim dt_rank conv_width chunk_size",
            "above 0": "dt_min dt_max norm_eps",
        }
        check_fields(self, "mamba.", demands)
        check_steps("mamba", self.dt_min, self.dt_max)
        check_implementation("mamba", "selective_scan", self.implementation)

    def width(self, dim: int) -> int:
        """F in a model of width `dim`."""
        return 2 * dim if self.inner_dim is None else self.inner_dim

    def rank(self, dim: int) -> int:
        """Width of the input of the step sizes in a model of width `dim`."""
        return math.ceil(dim / 16) if self.dt_rank is None else self.dt_rank

    def check(self, dim: int) -> None:
        """Nothing depends on `dim`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Sizes of a Mamba-2 block (letter B)."""

    sharded_over_time: ClassVar[bool] = False

    inner_dim: int | None = None  # F; None: 2 * dim
    head_dim: int = 64  # V; the number of heads is F / V
    state_dim: int = 128  # K
    groups: int = 1  # of heads, which share queries and keys
    conv_width: int = 4  # W
    conv_bias: bool = True
    use_bias: bool = False  # in the projections from and to the residual stream
    dt_min: float = 1e-3  # initial step sizes are log-uniform between dt_min and dt_max
    dt_max: float = 0.1
    norm_eps: float = 1e-5
    chunk_size: int | None = None  # L; affects only speed; None: the op chooses
    implementation: str = "auto"  # of ops.ssd

    def __post_init__(self):
        demands = {
            "at least 1": "inner_dim head_dim state_dim groups conv_width chunk_size",
            "above 0": "dt_min dt_max norm_eps",
        }
        check_fields(self, "mamba2.", demands)
        check_steps("mamba2", self.dt_min, self.dt_max)
        check_implementation("mamba2", "ssd", self.implementation)

    def width(self, dim: int) -> int:
        """F in a model of width `dim`."""
        return 2 * dim if self.inner_dim is None else self.inner_dim

    def heads(self, dim: int) -> int:
        """H in a model of width `dim`."""
        return self.width(dim) // self.head_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless heads divide the inner width and groups divide the heads."""
        check_divides("mamba2.head_dim", self.head_dim, "the inner width", self.width(dim))
        check_divides("mamba2.groups", self.groups, "the number of heads", self.heads(dim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig:
    """Sizes of a block with a gated delta net and a gated feed-forward (letter d)."""

    sharded_over_time: ClassVar[bool] = False

    num_heads: int = 4  # H, of values
    num_qk_heads: int | None = None  # of queries and keys; None: num_heads
    qk_dim: int | None = None  # K, per head; None: 0.75 * dim / num_heads
    v_dim: int | None = None  # V, per head; None: 2 * K
    conv_width: int = 4  # W
    norm_offset: bool = False  # block norms store their scale as its offset from one
    ffn_dim: int | None = None  # None: 2.667 * dim, rounded to a multiple of 64
    norm_eps: float = 1e-6
    chunk_size: int | None = None  # L; affects only speed; None: the op chooses
    implementation: str = "auto"  # of ops.gated_delta_rule

    def __post_init__(self):
        demands = {
            "at least 1": "num_heads num_qk_heads qk_dim v_dim conv_width ffn_dim chunk_size",
            "above 0": "norm_eps",
        }
        check_fields(self, "gated_delta.", demands)
        check_implementation("gated_delta", "gated_delta_rule", self.implementation)
        check_divides("gated_delta.num_qk_heads", self.qk_heads, "num_heads", self.num_heads)

    @property
    def qk_heads(self) -> int:
        """Heads of queries and keys."""
        return self.num_heads if self.num_qk_heads is None else self.num_qk_heads

    def widths(self, dim: int) -> tuple[int, int]:
        """K and V in a model of width `dim`."""
        K = 3 * dim // (4 * self.num_heads) if self.qk_dim is None else self.qk_dim
        return K, 2 * K if self.v_dim is None else self.v_dim

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`."""
        return llama_width(dim) if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError unless keys have at least one feature."""
        check_range("gated_delta.qk_dim", self.widths(dim)[0], "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV4Config:
    """Sizes of an RWKV-4 block (letter r)."""

    sharded_over_time: ClassVar[bool] = False

    inner_dim: int | None = None  # F, of the WKV operator; None: dim
    ffn_dim: int | None = None  # None: 4 * dim
    norm_eps: float = 1e-5
    implementation: str = "auto"  # of ops.wkv

    def __post_init__(self):
        demands = {"at least 1": "inner_dim ffn_dim", "above 0": "norm_eps"}
        check_fields(self, "rwkv4.", demands)
        check_implementation("rwkv4", "wkv", self.implementation)

    def width(self, dim: int) -> int:
        """F in a model of width `dim`."""
        return dim if self.inner_dim is None else self.inner_dim

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`."""
        return 4 * dim if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Nothing depends on `dim`."""
