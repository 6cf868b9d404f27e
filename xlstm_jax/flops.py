"""Cost of a config by formula: parameters, and FLOPs of a training step.

Large blocks are counted as in the scaling study (arXiv:2510.02228): a multiply-add is 2, an
elementwise function 1; norms, residual additions and the embedding are 0; the head is included;
the backward pass costs twice the forward pass. First-generation blocks follow the same convention,
and include every elementwise product, sum and function of convolution, gates and cell. The formulas
of a block belong to its kind (`modules.BLOCKS`).
"""

import collections

from xlstm_jax.config import check_range
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.counts import CELL_FLOPS
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.options import check_choice


def count_params(cfg: LMConfig) -> int:
    """Number of parameters, including the token embedding and the head (one matrix if tied)."""
    letters = collections.Counter(cfg.pattern)
    blocks = sum(n * BLOCKS[letter].count_params(cfg) for letter, n in letters.items())
    embeddings = cfg.vocab_size * cfg.dim * (1 if cfg.tie_embeddings else 2)
    norm = 0 if cfg.final_norm == "none" else cfg.dim * (1 + cfg.final_norm_bias)
    embedding_norm = 0 if cfg.embedding_norm == "none" else 2 * cfg.dim
    return blocks + embeddings + embedding_norm + norm


def train_flops(
    cfg: LMConfig, seq_len: int, *, count: str = "first", attention: str = "causal"
) -> float:
    """FLOPs of one training sequence, forward and backward.

    Args:
        seq_len: tokens per sequence.
        count: how the mLSTM cell is counted: "first", by which the study labels its budgets, or
            "tfla", its later count, which skips masked tiles.
        attention: which pairs of a query and a key are counted: "causal", those that are seen, or
            "full", all.

    Raises:
        ConfigError: `seq_len` is below 1, or `count` or `attention` is unknown.
    """
    return 3 * forward_flops(cfg, seq_len, count=count, attention=attention)


def forward_flops(
    cfg: LMConfig, seq_len: int, *, count: str = "first", attention: str = "causal"
) -> float:
    """FLOPs of the forward pass of one sequence; arguments and errors as in `train_flops`."""
    check_range("seq_len", seq_len, "at least 1")
    check_choice("count", count, CELL_FLOPS)
    check_choice("attention", attention, ("causal", "full"))
    per_token = 0.0
    for letter, n in collections.Counter(cfg.pattern).items():
        kind = BLOCKS[letter]
        context = kind.context_flops(cfg, seq_len, attention)
        per_token += n * (kind.forward_flops(cfg, count) + context)
    return seq_len * (per_token + 2 * cfg.vocab_size * cfg.dim)
