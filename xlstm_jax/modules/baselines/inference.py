"""Cost of inference of the baselines; conventions are those of `xlstm_jax.modules.inference`."""

from collections.abc import Callable

from xlstm_jax.modules.baselines import counts
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.inference import (
    ACTIVATION_BYTES,
    NORM_AND_RESIDUAL,
    STATE_BYTES,
    activations,
    add,
    conv_state_bytes,
    large_ffn,
    mlstm_decode,
    mlstm_prefill,
    mlstm_state_bytes,
    sequential,
)
from xlstm_jax.modules.kinds import Inference, Work

TILES = 0.65  # of all pairs of positions: tiles of causal attention that are computed
SOFTMAX = 5  # FLOPs per pair of a query and a key


def _keys_read(S: int, T: int, window: int, num_sinks: int) -> float:
    """Keys that T queries read after S positions: at most `window`, besides the sinks."""
    growing = max(0, min(T, window - S))  # calls that still see everything before them
    return growing * S + growing * (growing - 1) / 2 + (T - growing) * (window + num_sinks)


def attention_prefill(H: int, groups: int, K: int, window: int, num_sinks: int, T: int) -> Work:
    """Attention over a prompt, as the study counts it; a window bounds the keys of a query."""
    seen = min(T, window)
    pairs = TILES * seen**2 + (T - seen) * (window + num_sinks)
    return activations(2 * pairs * H * (2 * K + SOFTMAX / 2), T * 2 * K * (H + groups))


def attention_decode(
    H: int, groups: int, K: int, window: int, num_sinks: int, S: int, T: int
) -> Work:
    """T calls that each write one key and value and read those before; S are in the cache."""
    # The study counts a query's own key in FLOPs, and applies the same factor as in prefill.
    keys = _keys_read(S, T, window, num_sinks)
    flops = 2 * TILES * H * (2 * K + SOFTMAX / 2) * (keys + T)
    return activations(flops, 2 * K * groups * (T + keys))


def attention(options_of: Callable[[LMConfig], AttentionConfig]) -> Inference:
    """The formulas of a Transformer block."""

    def sizes(cfg: LMConfig) -> tuple[int, int, int, int, int]:
        options = options_of(cfg)
        K = options.head_width(cfg.dim)
        return options.num_heads, options.kv_heads, K, options.window_size, options.num_sinks

    def per_token(cfg: LMConfig) -> Work:
        (H, groups, K, *_), D, options = sizes(cfg), cfg.dim, options_of(cfg)
        linear = 2 * D * K * (2 * H + 2 * groups)
        moved = D + (D + H * K + 2 * groups * K) + (D + H * K)
        if options.output_gate:
            linear, moved = linear + 2 * D * H * K + 2 * H * K, moved + D + H * K
        norms = 3 * K * (H + groups) if options.qk_norm else 0
        mixer = activations(NORM_AND_RESIDUAL * D + linear + norms, moved)
        return add(mixer, large_ffn(D, options.ffn_width(D)))

    def state_bytes(cfg: LMConfig, S: int) -> float:
        _, groups, K, window, num_sinks = sizes(cfg)
        return ACTIVATION_BYTES * 2 * K * groups * min(S, window + num_sinks)

    return Inference(
        per_token=per_token,
        prefill=lambda cfg, T: attention_prefill(*sizes(cfg), T),
        decode=lambda cfg, S, T: attention_decode(*sizes(cfg), S, T),
        state_bytes=state_bytes,
    )


def _hybrid_sizes(cfg: LMConfig) -> tuple[int, int, int, int, int]:
    H, options = cfg.hybrid.num_heads, cfg.hybrid
    return H, H, cfg.dim // H, options.window, options.num_sinks


def _hybrid_heads(cfg: LMConfig) -> tuple[int, int, int]:
    H, _, K, _, _ = _hybrid_sizes(cfg)
    return H, K, K


def _hybrid_per_token(cfg: LMConfig) -> Work:
    D, H, F = cfg.dim, cfg.hybrid.num_heads, cfg.hybrid.ffn_width(cfg.dim)
    # 5 D: sum of both outputs, gates; 3 D: norm of heads.
    flops = NORM_AND_RESIDUAL * D + 10 * D * D + 4 * D * H + 5 * D + 3 * D
    return add(activations(flops, D + 4 * D + 2 * (D + H) + 2 * D + D + 2 * D), large_ffn(D, F))


def _hybrid_state(cfg: LMConfig, S: int) -> float:
    H, _, K, window, num_sinks = _hybrid_sizes(cfg)
    cache = ACTIVATION_BYTES * 2 * K * H * min(S, window + num_sinks)
    return mlstm_state_bytes(*_hybrid_heads(cfg)) + cache


def _recurrence(
    per_token: Callable[[LMConfig], Work],
    step: Callable[[LMConfig], tuple[float, float]],
    cell_state: Callable[[LMConfig], float],
    inputs_state: Callable[[LMConfig], float] = lambda cfg: 0.0,
    prefill: Callable[[LMConfig], tuple[float, int]] | None = None,
) -> Inference:
    """The formulas of a recurrent block.

    Args:
        step: FLOPs of a step, and activations that it reads and writes.
        cell_state: bytes of the state of the cell.
        inputs_state: bytes of the last inputs, of convolutions and mixtures with the token before.
        prefill: FLOPs per token of the form for complete sequences, and the length of its chunks,
            between which the state is stored; None: those of `step`, and one chunk.
    """

    def of_prompt(cfg: LMConfig, T: int) -> Work:
        (flops, elements), chunk = step(cfg), T
        if prefill is not None:
            flops, chunk = prefill(cfg)
        moved = 2 * T / max(chunk, 1) * cell_state(cfg)
        return add(activations(T * flops, T * elements), Work(0, moved))

    def decode(cfg: LMConfig, S: int, T: int) -> Work:
        state = cell_state(cfg) + inputs_state(cfg)
        return sequential(*step(cfg), state, calls=T, T=T)

    return Inference(
        per_token=per_token,
        prefill=of_prompt,
        decode=decode,
        state_bytes=lambda cfg, S: cell_state(cfg) + inputs_state(cfg),
    )


def _lstm_pointwise(cfg: LMConfig) -> float:
    return 8 * cfg.dim * (cfg.dim // cfg.lstm.num_heads) + 17 * cfg.dim


def _lstm_per_token(cfg: LMConfig) -> Work:
    D = cfg.dim  # no norm and no residual addition
    return activations(8 * D * D, D + 4 * D)


def _lstm_block_per_token(cfg: LMConfig) -> Work:
    D, F = cfg.dim, cfg.lstm.ffn_width(cfg.dim)
    mixer = add(_lstm_per_token(cfg), activations(NORM_AND_RESIDUAL * D, D))
    if F == 0:
        return mixer
    return add(mixer, activations(NORM_AND_RESIDUAL * D + 4 * D * F + F, D + 2 * (D + F)))


def _lstm_step(cfg: LMConfig) -> tuple[float, float]:
    return _lstm_pointwise(cfg), 5 * cfg.dim


def _lstm_state(cfg: LMConfig) -> float:
    return 2 * STATE_BYTES * cfg.dim  # c, h


def _mamba_per_token(cfg: LMConfig) -> Work:
    D, options = cfg.dim, cfg.mamba
    F, K, rank = options.width(D), options.state_dim, options.rank(D)
    flops = counts.mamba_flops(cfg, "tfla") - 7 * F * K + NORM_AND_RESIDUAL * D
    moved = D + (D + 2 * F) + 2 * F + 2 * (F + rank) + 2 * (F + K) + (F + D)
    return activations(flops, moved)


def _mamba_step(cfg: LMConfig) -> tuple[float, float]:
    F, K = cfg.mamba.width(cfg.dim), cfg.mamba.state_dim
    return 7 * F * K, 3 * F + 2 * K  # reads x, step sizes, B and C; writes y


def _mamba_inputs(cfg: LMConfig) -> float:
    return conv_state_bytes(cfg.mamba.width(cfg.dim), cfg.mamba.conv_width)


def _mamba2_sizes(cfg: LMConfig) -> tuple[int, int, int, int]:
    options = cfg.mamba2
    shared = options.groups * options.state_dim
    return options.width(cfg.dim), options.heads(cfg.dim), options.state_dim, shared


def _mamba2_per_token(cfg: LMConfig) -> Work:
    D, (F, H, _, shared) = cfg.dim, _mamba2_sizes(cfg)
    flops = counts.mamba2_flops(cfg, "tfla") - counts.mamba2_cell_flops(cfg)
    norms = NORM_AND_RESIDUAL * D + 3 * F
    channels = F + 2 * shared
    moved = D + (D + F + channels + H) + 2 * channels + F + (F + D)
    return activations(flops + norms, moved)


def _mamba2_step(cfg: LMConfig) -> tuple[float, float]:
    F, H, K, shared = _mamba2_sizes(cfg)
    return 5 * F * K + 3 * H, 2 * F + 2 * shared + H  # decay, outer product, read-out


def _mamba2_prefill(cfg: LMConfig) -> tuple[float, int]:
    return counts.mamba2_cell_flops(cfg), cfg.mamba2.chunk_size or counts.CHUNK_SIZE


def _mamba2_inputs(cfg: LMConfig) -> float:
    F, _, _, shared = _mamba2_sizes(cfg)
    return conv_state_bytes(F + 2 * shared, cfg.mamba2.conv_width)


def _delta_sizes(cfg: LMConfig) -> tuple[int, int, int, int]:
    options = cfg.gated_delta
    return (*options.widths(cfg.dim), options.num_heads, options.qk_heads)


def _delta_per_token(cfg: LMConfig) -> Work:
    D, (K, V, H, groups) = cfg.dim, _delta_sizes(cfg)
    F = cfg.gated_delta.ffn_width(D)
    ffn = 6 * D * F + 2 * F
    mixer = counts.gated_delta_flops(cfg, "tfla") - counts.gated_delta_cell_flops(cfg) - ffn
    keys, values = groups * K, H * V
    channels = 2 * keys + values
    moved = D + (D + channels + values + 2 * H) + 2 * channels + values + (values + D)
    norms = NORM_AND_RESIDUAL * D + 3 * values
    return add(activations(mixer + norms, moved), large_ffn(D, F))


def _delta_step(cfg: LMConfig) -> tuple[float, float]:
    K, V, H, groups = _delta_sizes(cfg)
    # Decay, value of the old key, its difference, outer product and sum, read-out.
    return H * (7 * K * V + 2 * V), 2 * groups * K + 2 * H * V + 2 * H


def _delta_prefill(cfg: LMConfig) -> tuple[float, int]:
    return counts.gated_delta_cell_flops(cfg), cfg.gated_delta.chunk_size or counts.CHUNK_SIZE


def _delta_state(cfg: LMConfig) -> float:
    K, V, H, _ = _delta_sizes(cfg)
    return STATE_BYTES * H * K * V


def _delta_inputs(cfg: LMConfig) -> float:
    K, V, H, groups = _delta_sizes(cfg)
    return conv_state_bytes(2 * groups * K + H * V, cfg.gated_delta.conv_width)


def _rwkv4_per_token(cfg: LMConfig) -> Work:
    D, F, U = cfg.dim, cfg.rwkv4.width(cfg.dim), cfg.rwkv4.ffn_width(cfg.dim)
    flops = counts.rwkv4_flops(cfg, "tfla") - 20 * F + 2 * NORM_AND_RESIDUAL * D
    moved = 2 * D + 3 * (D + F) + (F + D) + (D + U) + (U + D) + 2 * D
    return activations(flops, moved)


def _rwkv4_step(cfg: LMConfig) -> tuple[float, float]:
    F = cfg.rwkv4.width(cfg.dim)
    return 20 * F, 3 * F  # reads k and v, writes the output


ATTENTION = attention(lambda cfg: cfg.attention)
WINDOW = attention(lambda cfg: cfg.window)
HYBRID = Inference(
    per_token=_hybrid_per_token,
    prefill=lambda cfg, T: add(
        mlstm_prefill(*_hybrid_heads(cfg), cfg.hybrid.chunk_size, T),
        attention_prefill(*_hybrid_sizes(cfg), T),
    ),
    decode=lambda cfg, S, T: add(
        mlstm_decode(*_hybrid_heads(cfg), T), attention_decode(*_hybrid_sizes(cfg), S, T)
    ),
    state_bytes=_hybrid_state,
)
LSTM = _recurrence(_lstm_per_token, _lstm_step, _lstm_state)
LSTM_BLOCK = _recurrence(_lstm_block_per_token, _lstm_step, _lstm_state)
MAMBA = _recurrence(
    _mamba_per_token,
    _mamba_step,
    lambda cfg: STATE_BYTES * cfg.mamba.width(cfg.dim) * cfg.mamba.state_dim,
    _mamba_inputs,
)
MAMBA2 = _recurrence(
    _mamba2_per_token,
    _mamba2_step,
    lambda cfg: STATE_BYTES * cfg.mamba2.width(cfg.dim) * cfg.mamba2.state_dim,
    _mamba2_inputs,
    _mamba2_prefill,
)
GATED_DELTA = _recurrence(
    _delta_per_token, _delta_step, _delta_state, _delta_inputs, _delta_prefill
)
RWKV4 = _recurrence(
    _rwkv4_per_token,
    _rwkv4_step,
    lambda cfg: 3 * STATE_BYTES * cfg.rwkv4.width(cfg.dim),
    lambda cfg: conv_state_bytes(2 * cfg.dim, 2),
)
