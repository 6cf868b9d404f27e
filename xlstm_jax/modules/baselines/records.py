"""Records of the baselines in `BLOCKS`."""

from xlstm_jax.modules.baselines import blocks, counts, inference, options
from xlstm_jax.modules.kinds import BLOCKS, BlockKind, Matrices

_DENSE = Matrices()
_FFN_MATRICES = {r"ffn/(proj_up|proj_up_gate)/kernel": _DENSE}
_FEATURES = r"(A_log|D|dt_bias|share|decay|bonus)"  # parameters per channel or head, not matrices
_CONVOLUTIONS = {
    r"conv_\w+/kernel": (None, None),  # W F
    r"conv_\w+/bias": (None,),
}
_ATTENTION_AXES = {
    r"attention/(q|k|v|output_gate)/kernel": ("embed", "inner"),
    r"attention/(q|k|v|output_gate)/bias": ("inner",),
    r"attention/out_proj/kernel": ("inner", "embed"),
}
_ATTENTION_MATRICES = {
    r"attention/(q|k|v|output_gate|out_proj)/kernel": _DENSE,
    **_FFN_MATRICES,
}
_LSTM_AXES = {
    # Replicated over outputs, as the cell is sharded over heads only.
    r"lstm/proj/kernel": ("embed", None),
    r"lstm/recurrent_kernel": ("heads", "embed", None, None),
    r"lstm/bias": ("heads", None, None),
}
_LSTM_MATRICES = {
    r"lstm/proj/kernel": Matrices(parts=4),  # i, f, z, o
    r"lstm/recurrent_kernel": Matrices("bibo"),  # one per head and gate
}

BLOCKS["l"] = BlockKind(
    name="lstm",
    options=options.LSTMConfig,
    block=blocks.LSTMStackBlock,
    axes=_LSTM_AXES,
    count_params=counts.lstm_params,
    forward_flops=counts.lstm_flops,
    inference=inference.LSTM,
    matrices=_LSTM_MATRICES,
)
BLOCKS["L"] = BlockKind(
    name="lstm",
    options=options.LSTMConfig,
    block=blocks.LSTMBlock,
    axes=_LSTM_AXES,
    count_params=counts.lstm_block_params,
    forward_flops=counts.lstm_block_flops,
    inference=inference.LSTM_BLOCK,
    matrices=_LSTM_MATRICES | {r"ffn/proj_up/kernel": _DENSE},
)
BLOCKS["a"] = BlockKind(
    name="attention",
    options=options.AttentionConfig,
    block=blocks.AttentionBlock,
    axes=_ATTENTION_AXES,
    count_params=lambda cfg: counts.attention_params(cfg, cfg.attention),
    forward_flops=lambda cfg, count: counts.attention_flops(cfg, cfg.attention),
    context_flops=lambda cfg, seq_len, how: counts.context_flops(cfg, cfg.attention, seq_len, how),
    inference=inference.ATTENTION,
    matrices=_ATTENTION_MATRICES,
)
BLOCKS["w"] = BlockKind(
    name="window",
    options=options.WindowConfig,
    block=blocks.WindowBlock,
    axes=_ATTENTION_AXES,
    count_params=lambda cfg: counts.attention_params(cfg, cfg.window),
    forward_flops=lambda cfg, count: counts.attention_flops(cfg, cfg.window),
    context_flops=lambda cfg, seq_len, how: counts.context_flops(cfg, cfg.window, seq_len, how),
    inference=inference.WINDOW,
    matrices=_ATTENTION_MATRICES,
)
BLOCKS["h"] = BlockKind(
    name="hybrid",
    options=options.HybridConfig,
    block=blocks.HybridBlock,
    axes={
        r"hybrid/(q|k|v|output_gate)/kernel": ("embed", "inner"),
        r"hybrid/(input|forget)_gate/kernel": ("embed", "heads"),
        r"hybrid/(input|forget)_gate/bias": (None,),
        r"hybrid/out_proj/kernel": ("inner", "embed"),
    },
    count_params=counts.hybrid_params,
    forward_flops=counts.hybrid_flops,
    context_flops=counts.hybrid_context_flops,
    inference=inference.HYBRID,
    matrices={
        r"hybrid/(q|k|v|output_gate|out_proj)/kernel": _DENSE,
        r"hybrid/(input|forget)_gate/kernel": None,
        **_FFN_MATRICES,
    },
)
BLOCKS["b"] = BlockKind(
    name="mamba",
    options=options.MambaConfig,
    block=blocks.MambaBlock,
    axes={
        r"mamba/(x|gate)/kernel": ("embed", "inner"),
        r"mamba/(x|gate)/bias": ("inner",),
        r"mamba/(dt_down|B|C)/kernel": ("inner", None),
        r"mamba/dt_up/kernel": (None, "inner"),
        r"mamba/dt_up/bias": ("inner",),
        r"mamba/A_log": ("inner", None),
        r"mamba/D": ("inner",),
        r"mamba/out_proj/kernel": ("inner", "embed"),
    },
    count_params=counts.mamba_params,
    forward_flops=counts.mamba_flops,
    inference=inference.MAMBA,
    matrices={
        r"mamba/(x|gate|dt_down|B|C|dt_up|out_proj)/kernel": _DENSE,
        _FEATURES: None,
    },
)
BLOCKS["B"] = BlockKind(
    name="mamba2",
    options=options.Mamba2Config,
    block=blocks.Mamba2Block,
    axes={
        r"mamba2/(x|gate)/kernel": ("embed", "inner"),
        r"mamba2/(x|gate)/bias": ("inner",),
        r"mamba2/(B|C)/kernel": ("embed", None),
        r"mamba2/(B|C)/bias": (None,),
        r"mamba2/dt/kernel": ("embed", "heads"),
        r"mamba2/dt/bias": ("heads",),
        r"mamba2/(dt_bias|A_log|D)": ("heads",),
        r"mamba2/out_proj/kernel": ("inner", "embed"),
        **_CONVOLUTIONS,
    },
    count_params=counts.mamba2_params,
    forward_flops=counts.mamba2_flops,
    inference=inference.MAMBA2,
    matrices={
        r"mamba2/(x|gate|B|C|out_proj)/kernel": _DENSE,
        r"mamba2/dt/kernel": None,
        r"conv_\w+/kernel": None,
        _FEATURES: None,
    },
)
BLOCKS["d"] = BlockKind(
    name="gated_delta",
    options=options.GatedDeltaConfig,
    block=blocks.GatedDeltaBlock,
    axes={
        r"gated_delta/(q|k|v|gate)/kernel": ("embed", "inner"),
        r"gated_delta/(beta|decay)/kernel": ("embed", "heads"),
        r"gated_delta/(dt_bias|A_log)": ("heads",),
        r"gated_delta/out_proj/kernel": ("inner", "embed"),
        **_CONVOLUTIONS,
    },
    count_params=counts.gated_delta_params,
    forward_flops=counts.gated_delta_flops,
    inference=inference.GATED_DELTA,
    matrices={
        r"gated_delta/(q|k|v|gate|out_proj)/kernel": _DENSE,
        r"gated_delta/(beta|decay)/kernel": None,
        r"conv_\w+/kernel": None,
        _FEATURES: None,
        **_FFN_MATRICES,
    },
)
BLOCKS["r"] = BlockKind(
    name="rwkv4",
    options=options.RWKV4Config,
    block=blocks.RWKV4Block,
    axes={
        r"time_mix/(key|value|receptance)/kernel": ("embed", "inner"),
        r"time_mix/(decay|bonus)": ("inner",),
        r"time_mix/out_proj/kernel": ("inner", "embed"),
        r"channel_mix/key/kernel": ("embed", "mlp"),
        r"channel_mix/value/kernel": ("mlp", "embed"),
        r"channel_mix/receptance/kernel": ("embed", None),
        r"mix_\w+/share": (None,),
    },
    count_params=counts.rwkv4_params,
    forward_flops=counts.rwkv4_flops,
    inference=inference.RWKV4,
    matrices={
        r"(time|channel)_mix/(key|value|receptance|out_proj)/kernel": _DENSE,
        _FEATURES: None,
    },
)
