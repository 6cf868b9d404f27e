"""Parameter and FLOP formulas per block; conventions and sources are those of `xlstm_jax.flops`."""

from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import MLSTMConfig, SLSTMConfig

CHUNK_SIZE = 64  # L where a config lets the op choose; the value in the scaling study
CAUSAL_FRACTION = 0.75  # of the (query, key) pairs of a chunk: tiles not fully masked


def mlstm_params(cfg: LMConfig) -> int:
    """Parameters of one first-generation mLSTM block."""
    D, F, H = cfg.dim, cfg.mlstm.width(cfg.dim), cfg.mlstm.num_heads
    conv = conv_cost(F, cfg.mlstm, 1)
    qkv = 3 * F * cfg.mlstm.qkv_block_size
    # i and f read q, k and v; their biases are not optional.
    gates = 2 * H + 3 * F * H * (cfg.mlstm.input_gate_kernel + cfg.mlstm.forget_gate_kernel)
    biases = 2 * F + 3 * F + D if cfg.mlstm.use_bias else 0
    norm_and_skip = D + F + F  # block norm; norm after the cell; learnable skip
    # 3 D F: an up-projection to 2 F and a down-projection from F.
    return 3 * D * F + conv + qkv + gates + norm_and_skip + biases


def slstm_params(cfg: LMConfig) -> int:
    """Parameters of one first-generation sLSTM block, feed-forward layer included."""
    D, options = cfg.dim, cfg.slstm
    conv = conv_cost(D, options, 1)
    # Input and recurrent weights, bias.
    gates = (1 + options.memory_mixing) * 4 * D * (D // options.num_heads) + 4 * D
    norms = D + D * options.group_norm_weight
    U = options.ffn_width(D)
    # A norm, gate and up-projection in one matrix, and a down-projection.
    ffn = D + 3 * D * U + (2 * U + D) * options.ffn_bias if U else 0
    return conv + gates + norms + ffn


def large_params(cfg: LMConfig) -> int:
    """Parameters of one large-architecture block, feed-forward layer included."""
    D, H = cfg.dim, cfg.large.num_heads
    QK, V, U = cfg.large.widths(D)
    ups = 2 if cfg.large.ffn_activation is None else 1  # with the gate of the feed-forward layer
    linear = D * (2 * QK + V) + 2 * D * V + (ups + 1) * D * U
    gates = 2 * D * H + 2 * H  # i and f, whose biases are not optional
    norms = 2 * D + V  # two block norms, and the norm of the heads
    biases = (2 * QK + 2 * V + D) + (ups * U + D) + norms if cfg.large.use_bias else 0
    return linear + gates + norms + biases


def conv_cost(features: int, options: MLSTMConfig | SLSTMConfig, per_weight: int) -> int:
    """Cost of a convolution with `per_weight` per weight and 1 per bias.

    1 counts parameters; 2, a multiply-add, counts FLOPs.
    """
    weights = options.conv_width * (features if options.conv_mixing else 1)
    return features * (per_weight * weights + 1) if options.conv_width else 0


def first_cell_flops(L: int, K: int, V: int) -> float:
    """The mLSTM cell, per chunk and head, by the first count of the scaling study."""
    states = L * (L + 1) / 2 + 7 * L + 5 + 2 * K * V + 4 * L * K * V + 7 * L * K + 2 * K
    outputs = L * (L + 1) / 2 + 10 * L**2 + 9 * L + 2 * L**2 * (K + V) + 2 * L * V
    return states + outputs


def tfla_cell_flops(L: int, K: int, V: int) -> float:
    """The mLSTM cell, per chunk and head, as computed by tiled flash linear attention (TFLA)."""
    return _tfla_flops(L, K, V, CAUSAL_FRACTION if L > 64 else 1.0)


def prefill_cell_flops(L: int, K: int, V: int) -> float:
    """As `tfla_cell_flops`, with masked tiles skipped at any L, as the study counts prefill."""
    return _tfla_flops(L, K, V, CAUSAL_FRACTION)


def recurrent_cell_flops(K: int, V: int) -> float:
    """One step of the mLSTM cell, per head: gates, matrix memory, normalizer and read-out."""
    return 9 + 4 * K * V + (6 * K + V + 3) + (2 * K * V + K)


def parallel_cell_flops(T: int, K: int, V: int, fraction: float = CAUSAL_FRACTION) -> float:
    """The mLSTM cell in its quadratic form, per sequence and head; `fraction` of pairs counted."""
    gates = T * (T + 1) / 2 + 2 * T + 6 * T**2
    products = 2 * T**2 * K + 2 * T**2 + 2 * T**2 * V
    return gates + fraction * (products + 4 * T**2 + 2 * T)


def _tfla_flops(L: int, K: int, V: int, fraction: float) -> float:
    recurrent = L * (L + 1) / 2 + 6 * L + 5 + 2 * K * V + 2 * L * K * V + 3 * L * K + 2 * K
    intra = fraction * (8 * L**2 + 2 * L + 2 * L**2 * (K + V)) + L * (L + 1) / 2 + 2 * L
    inter = 2 * L * K * V + 3 * L * K
    combine = 2 * L * V + 4 * L
    return recurrent + intra + inter + combine


CELL_FLOPS = {"first": first_cell_flops, "tfla": tfla_cell_flops}
"""Counting convention -> FLOPs of the mLSTM cell per chunk and head, from L, K and V."""


def mlstm_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one first-generation mLSTM block per token."""
    D, F, H = cfg.dim, cfg.mlstm.width(cfg.dim), cfg.mlstm.num_heads
    linear = 2 * D * 2 * F + 2 * F * D + 3 * 2 * F * cfg.mlstm.qkv_block_size
    gates = 2 * H + 6 * F * H * (cfg.mlstm.input_gate_kernel + cfg.mlstm.forget_gate_kernel)
    conv = conv_cost(F, cfg.mlstm, 2)
    elementwise = 5 * F  # two silu, product and sum of the skip, gating product
    chunk = cfg.mlstm.chunk_size or CHUNK_SIZE
    cell = H / chunk * CELL_FLOPS[count](chunk, F // H, F // H)  # per token, as all others
    if not cfg.mlstm.covariance_update:
        cell = 11 * F  # i k; C, n: 3 each; read-out: 2 products, a maximum and a division
    return linear + gates + conv + elementwise + cell


def slstm_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one first-generation sLSTM block per token."""
    del count  # conventions only differ for the mLSTM cell
    D, options = cfg.dim, cfg.slstm
    conv = conv_cost(D, options, 2) + (D if options.conv_width else 0)  # the latter for silu
    # Input and recurrent weights.
    products = (1 + options.memory_mixing) * 2 * 4 * D * (D // options.num_heads)
    # Two sums per gate; log sigmoid and its sum with m, the maximum, two exponents and their exp;
    # tanh and c (3), n (2), sigmoid and h (2).
    pointwise = (2 * 4 + 3 + 4 + 1 + 3 + 2 + 1 + 2) * D
    U = options.ffn_width(D)
    return conv + products + pointwise + 6 * D * U + 2 * U


def large_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one large-architecture block per token."""
    D, H = cfg.dim, cfg.large.num_heads
    QK, V, U = cfg.large.widths(D)
    ups = 2 if cfg.large.ffn_activation is None else 1  # with the gate of the feed-forward layer
    # 4 D V: output gate and output projection; V: the gating. The study does not count soft caps.
    linear = 2 * D * (2 * QK + V + 2 * H) + 4 * D * V + V + 2 * (ups + 1) * D * U
    chunk = cfg.large.chunk_size or CHUNK_SIZE
    cell = H / chunk * CELL_FLOPS[count](chunk, QK // H, V // H)
    return linear + ups * U + cell
