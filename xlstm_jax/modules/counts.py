"""Parameters and FLOPs of one block by formula; conventions and sources as in `xlstm_jax.flops`."""

from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import MLSTMConfig, SLSTMConfig

CHUNK_SIZE = 64  # L where a config leaves the chunk to the op; the study's own
CAUSAL_SHARE = 0.75  # of the pairs in a chunk that tiles of the causal mask leave to compute


def mlstm_params(cfg: LMConfig) -> int:
    D, F, H = cfg.dim, cfg.mlstm.width(cfg.dim), cfg.mlstm.num_heads
    conv = _conv(F, cfg.mlstm, 1)
    qkv = 3 * F * cfg.mlstm.qkv_block_size
    gates = 2 * (3 * F * H + H)
    biases = 2 * F + 3 * F + D if cfg.mlstm.use_bias else 0
    norm_and_skip = D + F + F
    return 3 * D * F + conv + qkv + gates + norm_and_skip + biases


def slstm_params(cfg: LMConfig) -> int:
    D, own = cfg.dim, cfg.slstm
    conv = _conv(D, own, 1)
    gates = 2 * 4 * D * (D // own.num_heads) + 4 * D  # input and recurrent weights, bias
    norms = D + D * own.group_norm_weight
    U = own.ffn_width(D)
    ffn = D + 3 * D * U + (2 * U + D) * own.ffn_bias if U else 0
    return conv + gates + norms + ffn


def large_params(cfg: LMConfig) -> int:
    D, H = cfg.dim, cfg.large.num_heads
    QK, V, U = cfg.large.widths(D)
    linear = D * (2 * QK + V) + 2 * D * V + 3 * D * U
    gates = 2 * D * H + 2 * H
    norms = 2 * D + V
    biases = (2 * QK + 2 * V + D) + (2 * U + D) + norms if cfg.large.use_bias else 0
    return linear + gates + norms + biases


def _conv(features: int, own: MLSTMConfig | SLSTMConfig, per_weight: int) -> int:
    """What a convolution costs: `per_weight` a weight and 1 a bias; parameters or FLOPs."""
    weights = own.conv_width * (features if own.conv_mixing else 1)
    return features * (per_weight * weights + 1) if own.conv_width else 0


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


def mlstm_flops(cfg: LMConfig, count: str) -> float:
    D, F, H = cfg.dim, cfg.mlstm.width(cfg.dim), cfg.mlstm.num_heads
    linear = 2 * D * 2 * F + 2 * F * D + 3 * 2 * F * cfg.mlstm.qkv_block_size
    gates = 2 * (2 * 3 * F * H + H)
    conv = _conv(F, cfg.mlstm, 2)
    elementwise = 5 * F  # two silu, the skip's product and sum, the gating product
    chunk = cfg.mlstm.chunk_size or CHUNK_SIZE
    cell = H / chunk * CELL_FLOPS[count](chunk, F // H, F // H)
    return linear + gates + conv + elementwise + cell


def slstm_flops(cfg: LMConfig, count: str) -> float:
    del count  # there is one way to count an sLSTM step
    D, own = cfg.dim, cfg.slstm
    conv = _conv(D, own, 2) + (D if own.conv_width else 0)  # and silu
    products = 2 * 2 * 4 * D * (D // own.num_heads)  # input and recurrent weights
    # Two sums per gate; log sigmoid and its sum with m, the maximum, two exponents and their exp;
    # tanh and c (3), n (2), sigmoid and h (2).
    pointwise = (2 * 4 + 3 + 4 + 1 + 3 + 2 + 1 + 2) * D
    U = own.ffn_width(D)
    return conv + products + pointwise + 6 * D * U + 2 * U


def large_flops(cfg: LMConfig, count: str) -> float:
    D, H = cfg.dim, cfg.large.num_heads
    QK, V, U = cfg.large.widths(D)
    # Output gate and output projection with the gating; the study counts no soft caps.
    linear = 2 * D * (2 * QK + V + 2 * H) + 4 * D * V + V + 6 * D * U
    chunk = cfg.large.chunk_size or CHUNK_SIZE
    cell = H / chunk * CELL_FLOPS[count](chunk, QK // H, V // H)
    return linear + 2 * U + cell
