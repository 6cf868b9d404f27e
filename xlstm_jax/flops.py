"""The cost of a config by formula: parameters, and FLOPs of a training step.

Large blocks are counted as in the scaling study (arXiv:2510.02228): a multiply-add is 2, an
elementwise function 1; norms, residual additions and the embedding count nothing, the head counts;
the backward pass is twice the forward pass. First-generation blocks follow the same convention,
with every elementwise product, sum and function of convolution, gates and cell counted.
"""

import collections
from collections.abc import Callable

from xlstm_jax.config import ConfigError
from xlstm_jax.modules.config import LMConfig

CHUNK_SIZE = 64  # L where a config leaves the chunk to the op; the study's own
CAUSAL_SHARE = 0.75  # of the pairs in a chunk that tiles of the causal mask leave to compute


def count_params(cfg: LMConfig) -> int:
    """All parameters, both embedding matrices included."""
    letters = collections.Counter(cfg.pattern)
    blocks = sum(count * BLOCK_PARAMS[letter](cfg) for letter, count in letters.items())
    tables = cfg.vocab_size * cfg.dim * (1 if cfg.tie_embeddings else 2)
    norm = 0 if cfg.final_norm == "none" else cfg.dim * (1 + cfg.final_norm_bias)
    return blocks + tables + norm


def train_flops(cfg: LMConfig, seq_len: int, *, count: str = "first") -> float:
    """FLOPs of one training sequence, forward and backward.

    Args:
        seq_len: tokens of the sequence.
        count: how the mLSTM cell is counted: "first", which labels budgets in the study, or
            "tfla", its later account that skips masked tiles.

    Raises:
        ConfigError: `seq_len` is below 1 or `count` is not known.
    """
    return 3 * forward_flops(cfg, seq_len, count=count)


def forward_flops(cfg: LMConfig, seq_len: int, *, count: str = "first") -> float:
    """FLOPs of one sequence without its gradients; arguments and errors of `train_flops`."""
    if seq_len < 1:
        raise ConfigError(f"seq_len must be at least 1, got {seq_len}; count a sequence of tokens.")
    if count not in CELL_FLOPS:
        raise ConfigError(f"count={count!r} is not known; use one of: {', '.join(CELL_FLOPS)}.")
    letters = collections.Counter(cfg.pattern)
    per_token = sum(n * BLOCK_FLOPS[letter](cfg, count) for letter, n in letters.items())
    return seq_len * (per_token + 2 * cfg.vocab_size * cfg.dim)


def _mlstm_params(cfg: LMConfig) -> int:
    D, F, H = cfg.dim, cfg.mlstm.width(cfg.dim), cfg.mlstm.num_heads
    conv = _conv_params(F, cfg.mlstm.conv_width, cfg.mlstm.conv_mixing)
    qkv = 3 * F * cfg.mlstm.qkv_block_size
    gates = 2 * (3 * F * H + H)
    biases = 2 * F + 3 * F + D if cfg.mlstm.use_bias else 0
    norm_and_skip = D + F + F
    return 3 * D * F + conv + qkv + gates + norm_and_skip + biases


def _conv_params(features: int, width: int, mixing: bool) -> int:
    return features * (width * (features if mixing else 1) + 1) if width else 0


def _slstm_params(cfg: LMConfig) -> int:
    D, sizes = cfg.dim, cfg.slstm
    conv = _conv_params(D, sizes.conv_width, sizes.conv_mixing)
    gates = 2 * 4 * D * (D // sizes.num_heads) + 4 * D  # input and recurrent weights, bias
    norms = D + D * sizes.group_norm_weight
    U = sizes.ffn_width(D)
    ffn = D + 3 * D * U + (2 * U + D) * sizes.ffn_bias if U else 0
    return conv + gates + norms + ffn


def _large_params(cfg: LMConfig) -> int:
    D, H = cfg.dim, cfg.large.num_heads
    QK, V, U = cfg.large.widths(D)
    linear = D * (2 * QK + V) + 2 * D * V + 3 * D * U
    gates = 2 * D * H + 2 * H
    norms = 2 * D + V
    biases = (2 * QK + 2 * V + D) + (2 * U + D) + norms if cfg.large.use_bias else 0
    return linear + gates + norms + biases


BLOCK_PARAMS: dict[str, Callable[[LMConfig], int]] = {
    "m": _mlstm_params,
    "s": _slstm_params,
    "M": _large_params,
}
"""Letter -> parameters of one block."""


def first_cell_flops(L: int, K: int, V: int) -> float:
    """The mLSTM cell, per chunk and head, in the study's first account."""
    states = L * (L + 1) / 2 + 7 * L + 5 + 2 * K * V + 4 * L * K * V + 7 * L * K + 2 * K
    outputs = L * (L + 1) / 2 + 10 * L**2 + 9 * L + 2 * L**2 * (K + V) + 2 * L * V
    return states + outputs


def tfla_cell_flops(L: int, K: int, V: int) -> float:
    """The mLSTM cell, per chunk and head, as tiled flash linear attention computes it."""
    share = CAUSAL_SHARE if L > 64 else 1.0
    recurrent = L * (L + 1) / 2 + 6 * L + 5 + 2 * K * V + 2 * L * K * V + 3 * L * K + 2 * K
    intra = share * (8 * L**2 + 2 * L + 2 * L**2 * (K + V)) + L * (L + 1) / 2 + 2 * L
    inter = 2 * L * K * V + 3 * L * K
    combine = 2 * L * V + 4 * L
    return recurrent + intra + inter + combine


CELL_FLOPS = {"first": first_cell_flops, "tfla": tfla_cell_flops}
"""Account -> FLOPs of the mLSTM cell, per chunk and head, from L, K and V."""


def _large_flops(cfg: LMConfig, count: str) -> float:
    D, H = cfg.dim, cfg.large.num_heads
    QK, V, U = cfg.large.widths(D)
    # Output gate and output projection with the gating; the study counts no soft caps.
    linear = 2 * D * (2 * QK + V + 2 * H) + 4 * D * V + V + 6 * D * U
    chunk = cfg.large.chunk_size or CHUNK_SIZE
    cell = H / chunk * CELL_FLOPS[count](chunk, QK // H, V // H)
    return linear + 2 * U + cell


def _mlstm_flops(cfg: LMConfig, count: str) -> float:
    D, F, H = cfg.dim, cfg.mlstm.width(cfg.dim), cfg.mlstm.num_heads
    linear = 2 * D * 2 * F + 2 * F * D + 3 * 2 * F * cfg.mlstm.qkv_block_size
    gates = 2 * (2 * 3 * F * H + H)
    conv = _conv_flops(F, cfg.mlstm.conv_width, cfg.mlstm.conv_mixing)
    elementwise = 5 * F  # two silu, the skip's product and sum, the gating product
    chunk = cfg.mlstm.chunk_size or CHUNK_SIZE
    cell = H / chunk * CELL_FLOPS[count](chunk, F // H, F // H)
    return linear + gates + conv + elementwise + cell


def _conv_flops(features: int, width: int, mixing: bool) -> float:
    return features * (2 * width * (features if mixing else 1) + 1) if width else 0


def _slstm_flops(cfg: LMConfig, count: str) -> float:
    del count  # there is one way to count an sLSTM step
    D, sizes = cfg.dim, cfg.slstm
    silu = D if sizes.conv_width else 0
    conv = _conv_flops(D, sizes.conv_width, sizes.conv_mixing) + silu
    products = 2 * 2 * 4 * D * (D // sizes.num_heads)  # input and recurrent weights
    # Two sums per gate; log sigmoid and its sum with m, the maximum, two exponents and their exp;
    # tanh and c (3), n (2), sigmoid and h (2).
    pointwise = (2 * 4 + 3 + 4 + 1 + 3 + 2 + 1 + 2) * D
    U = sizes.ffn_width(D)
    return conv + products + pointwise + 6 * D * U + 2 * U


BLOCK_FLOPS: dict[str, Callable[[LMConfig, str], float]] = {
    "m": _mlstm_flops,
    "s": _slstm_flops,
    "M": _large_flops,
}
"""Letter -> forward FLOPs of one block and token, for a way to count the mLSTM cell."""
