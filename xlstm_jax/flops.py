"""Cost of a config by formula: parameters, FLOPs of training, and cost of inference.

Large blocks are counted as in the scaling study (arXiv:2510.02228): a multiply-add is 2, an
elementwise function 1; norms, residual additions and the embedding are 0; the head is included;
the backward pass costs twice the forward pass. First-generation blocks follow the same convention,
and include every elementwise product, sum and function of convolution, gates and cell. The formulas
of a block belong to its kind (`modules.BLOCKS`).
"""

import collections
from typing import NamedTuple

from xlstm_jax.config import check_range
from xlstm_jax.errors import ArgumentError, UnsupportedError, quote
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.counts import CELL_FLOPS
from xlstm_jax.modules.inference import ACTIVATION_BYTES, WEIGHT_BYTES
from xlstm_jax.modules.kinds import BLOCKS, Inference
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


class Cost(NamedTuple):
    """What inference computes and moves between memory and cores."""

    flops: float
    bytes: float


def inference_cost(cfg: LMConfig, *, batch_size: int, prompt_len: int, new_tokens: int = 0) -> Cost:
    """Cost of a prompt, and of new tokens that are decoded one at a time after it.

    Conventions of arXiv:2510.02228: weights and activations have 2 bytes and the state of a cell
    has 4; the weights are read once for the prompt and once per new token; only the last token of
    the prompt, and every new token, are scored; the mLSTM cell is counted as "tfla".

    Args:
        batch_size: sequences, all of the same lengths.
        prompt_len: tokens of each prompt; 0: none, decoding starts from the initial state.
        new_tokens: tokens of each sequence after the prompt, each one call of the model.

    Raises:
        ConfigError: an argument is out of range.
        ArgumentError: both lengths are 0.
        UnsupportedError: a block kind of the pattern has no formulas of inference.
    """
    check_range("batch_size", batch_size, "at least 1")
    check_range("prompt_len", prompt_len, "at least 0")
    check_range("new_tokens", new_tokens, "at least 0")
    if not prompt_len and not new_tokens:
        raise ArgumentError("prompt_len and new_tokens must not both be 0; set one of them.")
    D, vocab = cfg.dim, cfg.vocab_size
    calls = new_tokens + (prompt_len > 0)  # each scores one token
    tokens = prompt_len + new_tokens
    total_flops = calls * 2 * D * vocab
    total_bytes = ACTIVATION_BYTES * (tokens * D + calls * (2 * D + vocab))
    weights = D + D * vocab  # the norm before the head, and the head
    for letter, n in collections.Counter(cfg.pattern).items():
        kind, formulas = BLOCKS[letter], _inference(letter)
        parts = [(tokens, formulas.per_token(cfg))]
        parts += [(1, formulas.prefill(cfg, prompt_len))] if prompt_len else []
        parts += [(1, formulas.decode(cfg, prompt_len, new_tokens))] if new_tokens else []
        total_flops += n * sum(times * work.flops for times, work in parts)
        total_bytes += n * sum(times * work.bytes for times, work in parts)
        weights += n * kind.count_params(cfg)
    return Cost(
        float(batch_size * total_flops),
        float(batch_size * total_bytes + calls * WEIGHT_BYTES * weights),
    )


def state_bytes(cfg: LMConfig, batch_size: int, context: int = 0) -> float:
    """Bytes of the state of `batch_size` sequences after `context` tokens.

    Only the caches of attention grow with the context, as they would if they were allocated as
    needed. Cells have 4 bytes per number; caches and the last inputs of convolutions have 2.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedError: a block kind of the pattern has no formulas of inference.
    """
    check_range("batch_size", batch_size, "at least 1")
    check_range("context", context, "at least 0")
    letters = collections.Counter(cfg.pattern).items()
    blocks = sum(n * _inference(letter).state_bytes(cfg, context) for letter, n in letters)
    return float(batch_size * blocks)


def _inference(letter: str) -> Inference:
    formulas = BLOCKS[letter].inference
    if formulas is None:
        raise UnsupportedError(
            f"the block kind {quote(BLOCKS[letter].name)} has no formulas of inference; set "
            f"`inference` of modules.BLOCKS[{letter!r}]."
        )
    return formulas
