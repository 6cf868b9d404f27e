"""Parameter and FLOP formulas of the baselines; conventions are those of `xlstm_jax.flops`.

FLOPs that depend on the length of the sequence, those of attention, are in `*_context_flops`.
"""

from xlstm_jax.modules.baselines.options import AttentionConfig, HybridConfig
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.counts import CELL_FLOPS, CHUNK_SIZE


def lstm_params(cfg: LMConfig) -> int:
    """Parameters of one LSTM layer."""
    D, H = cfg.dim, cfg.lstm.num_heads
    return 4 * D * D + 4 * D * (D // H) + 4 * D  # input and recurrent weights, bias


def lstm_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one LSTM layer per token."""
    del count
    D, H = cfg.dim, cfg.lstm.num_heads
    # Two sums per gate, three sigmoids, two tanh, and c (3) and h (1).
    return 8 * D * D + 8 * D * (D // H) + (8 + 5 + 4) * D


def lstm_block_params(cfg: LMConfig) -> int:
    """Parameters of one Transformer block with an LSTM instead of attention."""
    D, F = cfg.dim, cfg.lstm.ffn_width(cfg.dim)
    return lstm_params(cfg) + D + (D + 2 * D * F if F else 0)


def lstm_block_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one Transformer block with an LSTM per token."""
    F = cfg.lstm.ffn_width(cfg.dim)
    return lstm_flops(cfg, count) + 4 * cfg.dim * F + F


def attention_params(cfg: LMConfig, options: AttentionConfig) -> int:
    """Parameters of one Transformer block."""
    D, K, F = cfg.dim, options.head_width(cfg.dim), options.ffn_width(cfg.dim)
    queries, keys = options.num_heads * K, options.kv_heads * K
    outputs = queries * (2 if options.output_gate else 1) + 2 * keys
    biases = outputs + D if options.use_bias else 0
    return D * outputs + queries * D + biases + 2 * K * options.qk_norm + 3 * D * F + 2 * D


def attention_flops(cfg: LMConfig, options: AttentionConfig) -> float:
    """Forward FLOPs of one Transformer block per token, without products of pairs of positions."""
    D, K, F = cfg.dim, options.head_width(cfg.dim), options.ffn_width(cfg.dim)
    queries, keys = options.num_heads * K, options.kv_heads * K
    gate = 2 * D * queries + 2 * queries if options.output_gate else 0
    return 2 * D * (2 * queries + 2 * keys) + gate + 6 * D * F + 2 * F


def pair_flops(
    num_heads: int, K: int, window: int, num_sinks: int, seq_len: int, how: str
) -> float:
    """Forward FLOPs per token of scores, softmax and values, as in the scaling study.

    `how` counts the keys that each query sees ("causal"), or all positions ("full").
    """
    if how == "full":
        return num_heads * seq_len * (4 * K + 3)
    seen = min(window, seq_len)
    # Queries before the window is full see half of it; those after it also see the sinks.
    keys = seen - seen**2 / (2 * seq_len) + num_sinks * max(0, 1 - window / seq_len)
    # 5 per key: the study counts 2.5 per pair of positions, seen or not.
    return num_heads * keys * (4 * K + 5)


def context_flops(cfg: LMConfig, options: AttentionConfig, seq_len: int, how: str) -> float:
    """Forward FLOPs of one attention block per token that depend on the length."""
    K = options.head_width(cfg.dim)
    return pair_flops(options.num_heads, K, options.window_size, options.num_sinks, seq_len, how)


def hybrid_params(cfg: LMConfig) -> int:
    """Parameters of one block of mLSTM and window."""
    D, H, F = cfg.dim, cfg.hybrid.num_heads, cfg.hybrid.ffn_width(cfg.dim)
    return 5 * D * D + 2 * D * H + 2 * H + 3 * D * F + 3 * D


def hybrid_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one block of mLSTM and window per token, without those of the window."""
    D, H, F = cfg.dim, cfg.hybrid.num_heads, cfg.hybrid.ffn_width(cfg.dim)
    chunk = cfg.hybrid.chunk_size or CHUNK_SIZE
    cell = H / chunk * CELL_FLOPS[count](chunk, D // H, D // H)
    return 10 * D * D + 4 * D * H + 5 * D + cell + 6 * D * F + 2 * F


def hybrid_context_flops(cfg: LMConfig, seq_len: int, how: str) -> float:
    """Forward FLOPs of the window per token."""
    options: HybridConfig = cfg.hybrid
    K = cfg.dim // options.num_heads
    return pair_flops(options.num_heads, K, options.window, options.num_sinks, seq_len, how)


def mamba_params(cfg: LMConfig) -> int:
    """Parameters of one Mamba block."""
    D, options = cfg.dim, cfg.mamba
    F, K, rank = options.width(D), options.state_dim, options.rank(D)
    conv = F * (options.conv_width + options.conv_bias)
    biases = 2 * F + D if options.use_bias else 0
    # x and gate, step sizes, B and C, A and D, the output, and the norm.
    return 2 * D * F + F * rank + rank * F + F + 2 * F * K + F * K + F + conv + F * D + biases + D


def mamba_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one Mamba block per token."""
    del count
    D, options = cfg.dim, cfg.mamba
    F, K, rank = options.width(D), options.state_dim, options.rank(D)
    linear = 4 * D * F + 4 * F * rank + 4 * F * K + 2 * F * D
    conv = F * (2 * options.conv_width + 1)
    # dt A and its exp, decay times h, input and sum, and a multiply-add of the output: 7 per state.
    return linear + conv + 7 * F * K + 8 * F


def mamba2_params(cfg: LMConfig) -> int:
    """Parameters of one Mamba-2 block."""
    D, options = cfg.dim, cfg.mamba2
    F, H, shared = options.width(D), options.heads(D), options.groups * options.state_dim
    outputs = 2 * F + 2 * shared + H
    conv = (F + 2 * shared) * (options.conv_width + options.conv_bias)
    biases = outputs + D if options.use_bias else 0
    return D * outputs + conv + 3 * H + F + F * D + biases + D


def mamba2_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one Mamba-2 block per token."""
    del count
    D, options = cfg.dim, cfg.mamba2
    F, H, shared = options.width(D), options.heads(D), options.groups * options.state_dim
    linear = 2 * D * (2 * F + 2 * shared + H) + 2 * F * D
    conv = (F + 2 * shared) * (2 * options.conv_width + 1)
    return linear + conv + mamba2_cell_flops(cfg) + 8 * F


def mamba2_cell_flops(cfg: LMConfig) -> float:
    """Forward FLOPs of the cell of one Mamba-2 block per token, in chunks."""
    options, (F, H) = cfg.mamba2, (cfg.mamba2.width(cfg.dim), cfg.mamba2.heads(cfg.dim))
    L, K = options.chunk_size or CHUNK_SIZE, options.state_dim
    # Scores of a group, weights and values of a head, reading and writing the state.
    return options.groups * 2 * L * K + H * 3 * L + 2 * L * F + 4 * K * F


def gated_delta_params(cfg: LMConfig) -> int:
    """Parameters of one gated delta net block, feed-forward layer included."""
    D, options = cfg.dim, cfg.gated_delta
    (K, V), H, F = options.widths(D), options.num_heads, options.ffn_width(D)
    keys, values = options.qk_heads * K, H * V
    conv = (2 * keys + values) * options.conv_width
    projections = D * (2 * keys + 3 * values + 2 * H)
    return projections + conv + 2 * H + V + 3 * D * F + 2 * D


def gated_delta_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one gated delta net block per token."""
    del count
    D, options = cfg.dim, cfg.gated_delta
    (K, V), H, F = options.widths(D), options.num_heads, options.ffn_width(D)
    keys, values = options.qk_heads * K, H * V
    linear = 2 * D * (2 * keys + 3 * values + 2 * H)
    conv = (2 * keys + values) * (2 * options.conv_width + 1)
    return linear + conv + gated_delta_cell_flops(cfg) + 4 * values + 6 * D * F + 2 * F


def gated_delta_cell_flops(cfg: LMConfig) -> float:
    """Forward FLOPs of the cell of one gated delta net block per token, in chunks."""
    (K, V), L = cfg.gated_delta.widths(cfg.dim), cfg.gated_delta.chunk_size or CHUNK_SIZE
    # Per head: two matrices of scores, the triangular system for V + K columns, values, and three
    # products with the state.
    per_head = 4 * L * K + 6 * L + L * (K + V) + 2 * L * V + 6 * K * V
    return cfg.gated_delta.num_heads * per_head


def rwkv4_params(cfg: LMConfig) -> int:
    """Parameters of one RWKV-4 block."""
    D, F, U = cfg.dim, cfg.rwkv4.width(cfg.dim), cfg.rwkv4.ffn_width(cfg.dim)
    norms, mixtures = 4 * D, 5 * D
    return 3 * D * F + F * D + 2 * F + D * U + U * D + D * D + norms + mixtures


def rwkv4_flops(cfg: LMConfig, count: str) -> float:
    """Forward FLOPs of one RWKV-4 block per token."""
    del count
    D, F, U = cfg.dim, cfg.rwkv4.width(cfg.dim), cfg.rwkv4.ffn_width(cfg.dim)
    linear = 2 * D * (3 * F + F + U + U + D)
    # Two maxima, four exponentials, and the sums and products of output and state: 20 per channel.
    return linear + 20 * F + 15 * D + 2 * U
