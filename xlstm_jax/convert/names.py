"""Parameter names of the published PyTorch implementations and ours, for both directions.

In a PyTorch name, `{}` is the index of a block in the model; our blocks are stacked by letter, in
the order of their indices. Rules for parameters that a model lacks, such as biases, have no effect.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """Name, path and layout of a parameter."""

    torch_name: str
    path: str  # in our tree of parameters
    layout: str  # key of `layouts.LAYOUTS`


_KINDS = {
    "dense": ("kernel", "transposed"),
    "headwise": ("kernel", "headwise"),
    "convolution": ("kernel", "convolution"),
    "embedding": ("embedding", "same"),
    "scale": ("scale", "same"),
    "offset": ("scale_offset", "same"),
}
"""Kind of a module -> our name and the layout of its weight. Biases have the layout "same"."""


def module_rules(prefixes: tuple[str, str], *modules: tuple[str, str, str]) -> tuple[Rule, ...]:
    """Rules for weight and bias of each (PyTorch module, our module, kind)."""
    torch_prefix, prefix = prefixes
    rules = []
    for name, path, kind in modules:
        parameter, layout = _KINDS[kind]
        rules.append(Rule(f"{torch_prefix}{name}.weight", f"{prefix}{path}/{parameter}", layout))
        rules.append(Rule(f"{torch_prefix}{name}.bias", f"{prefix}{path}/bias", "same"))
    return tuple(rules)


# The package `xlstm`, first generation: xLSTMLMModel.
V1_STACK = "xlstm_block_stack."  # names of a bare xLSTMBlockStack lack this prefix
_V1_BLOCK = V1_STACK + "blocks.{}."

V1 = (
    *module_rules(
        ("", ""),
        ("token_embedding", "token_embedding", "embedding"),
        ("lm_head", "lm_head", "dense"),
        (V1_STACK + "post_blocks_norm", "out_norm", "offset"),
    ),
    *module_rules(
        (_V1_BLOCK, "stack/m/"),
        ("xlstm_norm", "xlstm_norm", "offset"),
        ("xlstm.proj_up", "mlstm/proj_up", "dense"),
        ("xlstm.conv1d.conv", "mlstm/conv", "convolution"),
        ("xlstm.q_proj", "mlstm/q_proj", "headwise"),
        ("xlstm.k_proj", "mlstm/k_proj", "headwise"),
        ("xlstm.v_proj", "mlstm/v_proj", "headwise"),
        ("xlstm.mlstm_cell.igate", "mlstm/input_gate", "dense"),
        ("xlstm.mlstm_cell.fgate", "mlstm/forget_gate", "dense"),
        ("xlstm.mlstm_cell.outnorm", "mlstm/out_norm", "offset"),
        ("xlstm.proj_down", "mlstm/proj_down", "dense"),
    ),
    Rule(_V1_BLOCK + "xlstm.learnable_skip", "stack/m/mlstm/learnable_skip", "same"),
    *module_rules(
        (_V1_BLOCK, "stack/s/"),
        ("xlstm_norm", "xlstm_norm", "offset"),
        ("xlstm.conv1d.conv", "slstm/conv", "convolution"),
        # Swapped on purpose: in the package, fgate computes the input gate, igate the forget gate.
        ("xlstm.fgate", "slstm/input_gate", "headwise"),
        ("xlstm.igate", "slstm/forget_gate", "headwise"),
        ("xlstm.zgate", "slstm/cell_input", "headwise"),
        ("xlstm.ogate", "slstm/output_gate", "headwise"),
        ("xlstm.group_norm", "slstm/group_norm", "offset"),
        ("ffn_norm", "ffn_norm", "offset"),
        ("ffn.proj_up", "ffn/proj_up", "dense"),
        ("ffn.proj_down", "ffn/proj_down", "dense"),
    ),
    Rule(
        _V1_BLOCK + "xlstm.slstm_cell._recurrent_kernel_",
        "stack/s/slstm/recurrent_kernel",
        "recurrent",
    ),
    Rule(_V1_BLOCK + "xlstm.slstm_cell._bias_", "stack/s/slstm/bias", "gate_biases"),
)

V1_BARE = tuple(rule._replace(torch_name=rule.torch_name.removeprefix(V1_STACK)) for rule in V1)

# The package `xlstm`, xLSTMLarge, with separate weights.
BACKBONE = "backbone."
LARGE_BLOCK = BACKBONE + "blocks.{}."


def _large(embedding: str) -> tuple[Rule, ...]:
    top = module_rules(
        ("", ""),
        (embedding, "token_embedding", "embedding"),
        ("backbone.out_norm", "out_norm", "scale"),
        ("lm_head", "lm_head", "dense"),
    )
    blocks = module_rules(
        (LARGE_BLOCK, "stack/M/"),
        ("norm_mlstm", "norm_mlstm", "scale"),
        ("mlstm_layer.q", "mlstm/q", "dense"),
        ("mlstm_layer.k", "mlstm/k", "dense"),
        ("mlstm_layer.v", "mlstm/v", "dense"),
        ("mlstm_layer.ogate_preact", "mlstm/output_gate", "dense"),
        ("mlstm_layer.igate_preact", "mlstm/input_gate", "dense"),
        ("mlstm_layer.fgate_preact", "mlstm/forget_gate", "dense"),
        ("mlstm_layer.multihead_norm", "mlstm/multihead_norm", "scale"),
        ("mlstm_layer.out_proj", "mlstm/out_proj", "dense"),
        ("norm_ffn", "norm_ffn", "scale"),
        ("ffn.proj_up_gate", "ffn/proj_up_gate", "dense"),
        ("ffn.proj_up", "ffn/proj_up", "dense"),
        ("ffn.proj_down", "ffn/proj_down", "dense"),
    )
    return *top, *blocks


LARGE = _large("embedding")
HF = _large("backbone.embeddings")  # xLSTMForCausalLM of the package `transformers`

FUSED = {
    "mlstm_layer.qkv_opreact": (
        "mlstm_layer.q",
        "mlstm_layer.k",
        "mlstm_layer.v",
        "mlstm_layer.ogate_preact",
    ),
    "mlstm_layer.ifgate_preact": ("mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"),
    "ffn.proj_up_gate_z": ("ffn.proj_up_gate", "ffn.proj_up"),
}
"""Name of a fused weight -> names of the separate weights that it concatenates."""
