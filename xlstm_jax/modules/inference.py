"""Cost of inference per block: FLOPs and bytes of prefill and decoding, and the size of the state.

Conventions of arXiv:2510.02228 and of the code beside it. FLOPs: a norm counts 3 per element, a
residual addition 1, the others as in `counts`. Bytes: a product reads its inputs and writes its
outputs, a norm moves its width once, and elementwise functions are fused into their neighbors.
"""

from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.counts import (
    conv_cost,
    prefill_cell_flops,
    recurrent_cell_flops,
    slstm_flops,
)
from xlstm_jax.modules.kinds import Inference, Work

ACTIVATION_BYTES, STATE_BYTES, WEIGHT_BYTES = 2, 4, 2
CHUNK_SIZE = 128  # L of prefill where a config lets the op choose
NORM_AND_RESIDUAL = 4  # FLOPs per element of a sub-layer: 3 of its norm, 1 of its addition


def add(*parts: Work) -> Work:
    """The sum of several costs."""
    return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))


def activations(flops: float, elements: float) -> Work:
    """A cost whose bytes are those of activations that are read or written."""
    return Work(flops, ACTIVATION_BYTES * elements)


def large_ffn(D: int, F: int) -> Work:
    """A gated feed-forward layer with its norm and residual addition, per token."""
    return activations(NORM_AND_RESIDUAL * D + 6 * D * F + 2 * F, D + 3 * (D + F))


def conv_state_bytes(channels: int, width: int) -> float:
    """The last inputs of a convolution."""
    return ACTIVATION_BYTES * channels * max(width - 1, 0)


def sequential(step_flops: float, elements: float, state: float, *, calls: int, T: int) -> Work:
    """T steps of a recurrence in `calls` calls, each of which loads and stores the state.

    Args:
        elements: activations read and written per step.
        state: bytes of the state.
    """
    return add(activations(T * step_flops, T * elements), Work(0, 2 * calls * state))


def mlstm_prefill(H: int, K: int, V: int, chunk_size: int | None, T: int) -> Work:
    """The mLSTM cell over T tokens: one pass computes states of chunks, a second one outputs."""
    L = chunk_size or CHUNK_SIZE
    moved = L * (K + V) + 2 * L + L * (2 * K + V) + 2 * L + L * V
    state = 2 * (K * V + K + 1) + 2 * L  # stored and loaded; maximum and normalizer per position
    num_chunks = H * T / L
    return Work(
        num_chunks * prefill_cell_flops(L, K, V),
        num_chunks * (ACTIVATION_BYTES * moved + STATE_BYTES * state),
    )


def mlstm_decode(H: int, K: int, V: int, T: int) -> Work:
    """T steps of the mLSTM cell."""
    step = activations(recurrent_cell_flops(K, V), 2 * K + V + 2 + V)
    return Work(H * T * step.flops, H * T * step.bytes + 2 * T * mlstm_state_bytes(H, K, V))


def mlstm_state_bytes(H: int, K: int, V: int) -> float:
    """Matrix memory, normalizer and stabilizer."""
    return STATE_BYTES * H * (K * V + K + 1)


def _large_heads(cfg: LMConfig) -> tuple[int, int, int]:
    (QK, V, _), H = cfg.large.widths(cfg.dim), cfg.large.num_heads
    return H, QK // H, V // H


def _large_per_token(cfg: LMConfig) -> Work:
    D, H = cfg.dim, cfg.large.num_heads
    QK, V, F = cfg.large.widths(D)
    # The study counts one of the two gates: 2 D H + 2 H. Output gate, its product, norm of heads.
    linear = 2 * D * (2 * QK + V) + 2 * D * H + 2 * H + 4 * D * V + V + 3 * V
    moved = D + (D + 2 * QK + V) + 2 * (D + H) + (D + V) + V + (D + V)
    ups = 2 if cfg.large.ffn_activation is None else 1  # with the gate of the feed-forward layer
    ffn = activations(
        NORM_AND_RESIDUAL * D + 2 * (ups + 1) * D * F + ups * F, D + (ups + 1) * (D + F)
    )
    return add(activations(NORM_AND_RESIDUAL * D + linear, moved), ffn)


def _mlstm_heads(cfg: LMConfig) -> tuple[int, int, int]:
    H, K = cfg.mlstm.memory_shape(cfg.dim)
    return H, K, K


def _mlstm_prefill(cfg: LMConfig, T: int) -> Work:
    if cfg.mlstm.covariance_update:
        return mlstm_prefill(*_mlstm_heads(cfg), cfg.mlstm.chunk_size, T)
    return _vector_memory(cfg, 1, T)


def _mlstm_decode(cfg: LMConfig, S: int, T: int) -> Work:
    cell = mlstm_decode(*_mlstm_heads(cfg), T)
    if not cfg.mlstm.covariance_update:
        cell = _vector_memory(cfg, T, T)
    return add(cell, Work(0, 2 * T * _mlstm_conv_state(cfg)))


def _vector_memory(cfg: LMConfig, calls: int, T: int) -> Work:
    """T steps of the cell without covariance update: 11 FLOPs per feature, as in `mlstm_flops`."""
    F = cfg.mlstm.width(cfg.dim)  # reads q, k, v and the gates, writes h
    state = mlstm_state_bytes(*_mlstm_heads(cfg))
    return sequential(11 * F, 4 * F + 2 * cfg.mlstm.num_heads, state, calls=calls, T=T)


def _mlstm_per_token(cfg: LMConfig) -> Work:
    D, F, H = cfg.dim, cfg.mlstm.width(cfg.dim), cfg.mlstm.num_heads
    size = cfg.mlstm.qkv_block_size
    gates = cfg.mlstm.input_gate_kernel + cfg.mlstm.forget_gate_kernel  # that have a kernel
    linear = 4 * D * F + 2 * D * F + 6 * F * size + gates * 6 * F * H + 2 * H
    # Two silu, product and sum of the skip, gating product; norm of heads.
    elementwise = 5 * F + 3 * F
    flops = linear + conv_cost(F, cfg.mlstm, 2) + elementwise
    moved = D + (D + 2 * F) + 3 * 2 * F + gates * (3 * F + H) + F + (F + D)
    moved += 2 * F if cfg.mlstm.conv_width else 0
    return activations(NORM_AND_RESIDUAL * D + flops, moved)


def _mlstm_conv_state(cfg: LMConfig) -> float:
    return conv_state_bytes(cfg.mlstm.width(cfg.dim), cfg.mlstm.conv_width)


def _slstm_pointwise(cfg: LMConfig) -> float:
    """FLOPs of a step: recurrent products, and everything elementwise, as in `slstm_flops`."""
    D = cfg.dim
    products = 8 * D * (D // cfg.slstm.num_heads) if cfg.slstm.memory_mixing else 0
    return products + 24 * D


def _slstm_per_token(cfg: LMConfig) -> Work:
    D, options = cfg.dim, cfg.slstm
    F = options.ffn_width(D)
    sublayers = 2 if F else 1
    norms = sublayers * NORM_AND_RESIDUAL * D + 3 * D  # the latter of the heads
    flops = slstm_flops(cfg, "tfla") - _slstm_pointwise(cfg) + norms
    moved = D + (2 * D if options.conv_width else 0) + 4 * 2 * D + D
    ffn = D + (D + 2 * F) + (F + D) if F else 0
    return activations(flops, moved + ffn)


def _slstm_state(cfg: LMConfig) -> float:
    return 4 * STATE_BYTES * cfg.dim  # c, n, h, m


def _slstm_mixing(cfg: LMConfig, calls: int, T: int) -> Work:
    D = cfg.dim  # reads 4 D pre-activations, writes h
    options = dict(calls=calls, T=T)
    return sequential(_slstm_pointwise(cfg), 5 * D, _slstm_state(cfg), **options)


def _slstm_decode(cfg: LMConfig, S: int, T: int) -> Work:
    return add(_slstm_mixing(cfg, T, T), Work(0, 2 * T * _slstm_conv_state(cfg)))


def _slstm_conv_state(cfg: LMConfig) -> float:
    return conv_state_bytes(cfg.dim, cfg.slstm.conv_width)


LARGE = Inference(
    per_token=_large_per_token,
    prefill=lambda cfg, T: mlstm_prefill(*_large_heads(cfg), cfg.large.chunk_size, T),
    decode=lambda cfg, S, T: mlstm_decode(*_large_heads(cfg), T),
    state_bytes=lambda cfg, S: mlstm_state_bytes(*_large_heads(cfg)),
)
MLSTM = Inference(
    per_token=_mlstm_per_token,
    prefill=_mlstm_prefill,
    decode=_mlstm_decode,
    state_bytes=lambda cfg, S: mlstm_state_bytes(*_mlstm_heads(cfg)) + _mlstm_conv_state(cfg),
)
SLSTM = Inference(
    per_token=_slstm_per_token,
    prefill=lambda cfg, T: _slstm_mixing(cfg, 1, T),
    decode=_slstm_decode,
    state_bytes=lambda cfg, S: _slstm_state(cfg) + _slstm_conv_state(cfg),
)
