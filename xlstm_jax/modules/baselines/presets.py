"""Sizes of the models that xLSTM is compared with, by name.

Sources: Llama, Mamba and RWKV-4: arXiv:2405.04517, table of sizes, whose parameter counts they
have; Transformers of the scaling study: arXiv:2510.02228. Mamba-2 and the gated delta net have the
widths of these tables, and the proportions of arXiv:2405.21060 and arXiv:2412.06464.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from xlstm_jax.modules.baselines import options
from xlstm_jax.modules.config import LMConfig

TRANSFORMERS = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "760m": (1536, 24, 16),
    "1.3b": (2048, 24, 16),
    "2.7b": (2560, 32, 32),
}
"""Size -> dim, blocks, heads; RWKV-4 has the same widths and depths."""

MAMBA = {"125m": (768, 24), "350m": (1024, 48), "760m": (1536, 48), "1.3b": (2048, 48)}
MAMBA["2.7b"] = (2560, 64)
"""Size -> dim, blocks."""

GATED_DELTA = {"125m": 3, "350m": 3, "760m": 6, "1.3b": 6, "2.7b": 10}
"""Size -> heads; widths and depths are those of the Transformers."""

SCALING = {
    512: (10, 12, 14, 16),
    640: (10, 13, 14, 16),
    768: (12, 15, 18),
    896: (12, 15, 18, 21, 24),
    1024: (18, 21, 24, 27, 30),
    1152: (24, 27, 30),
    1280: (24, 27, 30),
    1408: (24, 27, 30),
    1536: (24, 27, 30),
    1792: (24, 27, 30),
    2048: (24, 27, 30),
    2304: (24, 27, 30, 33),
    2560: (29, 32, 35),
    4096: (32,),
}
"""Width -> numbers of blocks of the Transformers of the scaling study."""

SCALING_LADDER = ((1536, 24, 16), (2560, 32, 32))
"""Width, blocks, heads of its runs whose heads have other sizes than those of `SCALING`."""

MAX_LENGTH = 16_384
"""Longest sequences of the scaling study."""


def model(vocab_size: int, dim: int, pattern: str, **fields: Any) -> LMConfig:
    """A model with RMS norm at its end, for training in bfloat16."""
    shared: dict[str, Any] = dict(final_norm="rms", dtype="bfloat16", remat="names")
    return LMConfig(vocab_size=vocab_size, dim=dim, pattern=pattern, **shared | fields)


def llama(vocab_size: int, dim: int, num_blocks: int, num_heads: int, **fields: Any) -> LMConfig:
    """A Llama model with as many heads of keys as of queries; `fields` are of `AttentionConfig`."""
    attention = options.AttentionConfig(
        num_heads=num_heads, ffn_dim=options.llama_width(dim), **fields
    )
    return model(vocab_size, dim, "a" * num_blocks, attention=attention, final_norm_eps=1e-6)


def rwkv4(vocab_size: int, dim: int, num_blocks: int) -> LMConfig:
    """An RWKV-4 model; its norms are layer norms with a bias, also after the embedding."""
    norms: dict[str, Any] = dict(
        embedding_norm="layer_scale", final_norm="layer_scale", final_norm_bias=True
    )
    return model(vocab_size, dim, "r" * num_blocks, **norms)


def presets(vocab_size: int) -> dict[str, Callable[[], LMConfig]]:
    """Name -> a function that makes the config."""
    table: dict[str, Callable[[], LMConfig]] = {}
    for size, (dim, blocks, heads) in TRANSFORMERS.items():
        table[f"llama_{size}"] = functools.partial(llama, vocab_size, dim, blocks, heads)
        table[f"rwkv4_{size}"] = functools.partial(rwkv4, vocab_size, dim, blocks)
        delta = options.GatedDeltaConfig(num_heads=GATED_DELTA[size])
        table[f"gated_delta_{size}"] = functools.partial(
            model, vocab_size, dim, "d" * blocks, gated_delta=delta, final_norm_eps=1e-6
        )
    for size, (dim, blocks) in MAMBA.items():
        table[f"mamba_{size}"] = functools.partial(model, vocab_size, dim, "b" * blocks)
        table[f"mamba2_{size}"] = functools.partial(model, vocab_size, dim, "B" * blocks)
    for dim, blocks, heads in (*_scaling_shapes(), *SCALING_LADDER):
        name = f"scaling_llama_d{dim}_l{blocks}_h{heads}"
        shape = (vocab_size, dim, blocks, heads)
        table[name] = functools.partial(llama, *shape, rotary_base=5e5, cache_size=MAX_LENGTH)
    return table


def _scaling_shapes() -> Iterator[tuple[int, int, int]]:
    """Width, blocks and heads of `SCALING`."""
    for dim, depths in SCALING.items():
        for blocks in depths:
            yield dim, blocks, dim // (64 if dim <= 1024 else 128)
