"""Sizes and numerics of a TiRex-2 forecaster."""

import dataclasses
from typing import Literal

from xlstm_jax.config.fields import check_fields
from xlstm_jax.errors import ConfigError, quote
from xlstm_jax.modules.feedforward import ACTIVATIONS
from xlstm_jax.modules.options import check_choice, check_divides, large_width

TOLERANCE = 1e-6
"""Largest difference of two quantile levels that count as equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiRexBlockConfig:
    """One block: the cell of its time mixer, and the heads of both mixers."""

    cell: Literal["mlstm", "slstm"]
    num_heads: int = 4  # of the cell
    num_variate_heads: int = 4  # of the attention over variates

    def __post_init__(self):
        check_fields(self, "block.", {"at least 1": "num_heads num_variate_heads"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiRexConfig:
    """Sizes and numerics.

    The defaults have the published numbers of parameters, 38.4M for one variate and 44.1M more for
    several; the order of the blocks is not published.
    """

    dim: int = 512  # D
    blocks: tuple[TiRexBlockConfig, ...] = 6 * (
        TiRexBlockConfig(cell="mlstm"),
        TiRexBlockConfig(cell="slstm"),
    )
    patch_size: int = 32  # P, values of a series that are one position of the network
    context_len: int = 2048  # values; shorter contexts are padded, longer ones truncated
    future_len: int = 320  # the longest horizon, in values
    quantiles: tuple[float, ...] = tuple(round(0.1 * n, 1) for n in range(1, 10))
    embed_dim: int = 2048  # hidden width of the patch embedding
    head_dim: int = 2048  # hidden width of the output head
    activation: str = "swish"  # of embedding, head and variate mixer; a name in `ACTIVATIONS`
    normalize_qk: bool = True  # RMS norm of queries and keys of the attention over variates
    final_norm_eps: float | None = 1e-7  # None: no norm before the head
    scale_eps: float = 1e-8  # least standard deviation
    arcsinh: bool = True  # compress standardized values
    binary_aware: bool = True  # leave variates of zeros and ones alone
    sign_flip: bool = False  # average with the forecast of the negated series
    difference: bool = True  # forecast differences of targets that have a trend

    def __post_init__(self):
        positive = "dim patch_size context_len future_len embed_dim head_dim"
        check_fields(
            self, "tirex.", {"at least 1": positive, "above 0": "final_norm_eps scale_eps"}
        )
        self._check_blocks()
        self._check_quantiles()
        if self.future_len % self.patch_size:
            raise ConfigError(
                f"tirex.future_len must be a multiple of patch_size={self.patch_size}, got "
                f"{self.future_len}; change one of them."
            )
        check_choice("tirex.activation", self.activation, ACTIVATIONS)

    def _check_blocks(self) -> None:
        if not self.blocks:
            raise ConfigError("tirex.blocks must have at least one block, got none; add one.")
        for index, block in enumerate(self.blocks):
            name = f"tirex.blocks[{index}]"
            # Queries and keys of an mLSTM have half the width.
            width = self.dim // 2 if block.cell == "mlstm" else self.dim
            check_divides(f"{name}.num_heads", block.num_heads, "width of its queries", width)
            check_divides(f"{name}.num_variate_heads", block.num_variate_heads, "dim", self.dim)

    def _check_quantiles(self) -> None:
        levels = self.quantiles
        if not levels or not all(0 < level < 1 for level in levels):
            raise ConfigError(
                f"tirex.quantiles must be between 0 and 1, got {quote(levels)}; use (0.1, 0.5, 0.9)"
                ", say."
            )
        if self.sign_flip and not self.is_symmetric:
            raise ConfigError(
                f"tirex.quantiles must have 1 - q for every q with sign_flip, got {quote(levels)}; "
                "set sign_flip to False."
            )

    @property
    def complements(self) -> tuple[int, ...]:
        """For each quantile level q, the index of the one nearest to 1 - q."""
        levels = self.quantiles
        return tuple(
            min(range(len(levels)), key=lambda n: abs(levels[n] - 1 + level)) for level in levels
        )

    @property
    def is_symmetric(self) -> bool:
        """Whether every quantile level q has its complement 1 - q."""
        pairs = zip(self.quantiles, self.complements, strict=True)
        return all(abs(self.quantiles[n] - 1 + level) <= TOLERANCE for level, n in pairs)

    @property
    def ffn_dim(self) -> int:
        """Width of the gated feed-forward layer of a time mixer."""
        return large_width(self.dim, 2.6667)
