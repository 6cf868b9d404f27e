"""Parameter names of the published implementations and ours, for both directions.

A rule is (their name, our path, the layout of their array: a key of `layouts.LAYOUTS`). In a name,
`{}` is the number of a block in the model; our blocks are grouped by letter, in the order of their
numbers. Rules for parameters that a model does not have, such as biases, do not apply to it.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """One parameter, there and here."""

    theirs: str
    ours: str
    layout: str


def _rules(theirs: str, ours: str, *lines: tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules with the beginnings of their names and of our paths in common.

    A line of two is a projection: its weights, transposed, and its bias.
    """
    full = []
    for name, path, *layout in lines:
        if layout:
            full.append((name, path, *layout))
        else:
            full.append((name + ".weight", path + "/kernel", "transposed"))
            full.append((name + ".bias", path + "/bias", "same"))
    return tuple(Rule(theirs + name, ours + path, layout) for name, path, layout in full)


# The package `xlstm`, first generation: xLSTMLMModel.
V1_STACK = "xlstm_block_stack."  # what the names of a bare xLSTMBlockStack lack
_V1_BLOCK = V1_STACK + "blocks.{}."

V1 = (
    *_rules(
        "",
        "",
        ("token_embedding.weight", "token_embedding/embedding", "same"),
        ("lm_head.weight", "lm_head/kernel", "transposed"),
        (V1_STACK + "post_blocks_norm.weight", "out_norm/scale_offset", "same"),
    ),
    *_rules(
        _V1_BLOCK,
        "stack/m/",
        ("xlstm_norm.weight", "xlstm_norm/scale_offset", "same"),
        ("xlstm.proj_up", "mlstm/proj_up"),
        ("xlstm.conv1d.conv.weight", "mlstm/conv/kernel", "convolution"),
        ("xlstm.conv1d.conv.bias", "mlstm/conv/bias", "same"),
        ("xlstm.q_proj.weight", "mlstm/q_proj/kernel", "headwise"),
        ("xlstm.q_proj.bias", "mlstm/q_proj/bias", "same"),
        ("xlstm.k_proj.weight", "mlstm/k_proj/kernel", "headwise"),
        ("xlstm.k_proj.bias", "mlstm/k_proj/bias", "same"),
        ("xlstm.v_proj.weight", "mlstm/v_proj/kernel", "headwise"),
        ("xlstm.v_proj.bias", "mlstm/v_proj/bias", "same"),
        ("xlstm.mlstm_cell.igate", "mlstm/input_gate"),
        ("xlstm.mlstm_cell.fgate", "mlstm/forget_gate"),
        ("xlstm.mlstm_cell.outnorm.weight", "mlstm/out_norm/scale_offset", "same"),
        ("xlstm.learnable_skip", "mlstm/learnable_skip", "same"),
        ("xlstm.proj_down", "mlstm/proj_down"),
    ),
    *_rules(
        _V1_BLOCK,
        "stack/s/",
        ("xlstm_norm.weight", "xlstm_norm/scale_offset", "same"),
        ("xlstm.conv1d.conv.weight", "slstm/conv/kernel", "convolution"),
        ("xlstm.conv1d.conv.bias", "slstm/conv/bias", "same"),
        # Crosswise: what they name after one gate computes the other.
        ("xlstm.fgate.weight", "slstm/input_gate/kernel", "headwise"),
        ("xlstm.igate.weight", "slstm/forget_gate/kernel", "headwise"),
        ("xlstm.zgate.weight", "slstm/cell_input/kernel", "headwise"),
        ("xlstm.ogate.weight", "slstm/output_gate/kernel", "headwise"),
        ("xlstm.slstm_cell._recurrent_kernel_", "slstm/recurrent_kernel", "recurrent"),
        ("xlstm.slstm_cell._bias_", "slstm/bias", "gate_biases"),
        ("xlstm.group_norm.weight", "slstm/group_norm/scale_offset", "same"),
        ("ffn_norm.weight", "ffn_norm/scale_offset", "same"),
        ("ffn.proj_up", "ffn/proj_up"),
        ("ffn.proj_down", "ffn/proj_down"),
    ),
)

V1_BARE = tuple(rule._replace(theirs=rule.theirs.removeprefix(V1_STACK)) for rule in V1)

# The package `xlstm`, xLSTMLarge, with separate weights.
LARGE_BLOCK = "backbone.blocks.{}."

_LARGE_WITHOUT_EMBEDDING = (
    *_rules(
        "",
        "",
        ("backbone.out_norm.weight", "out_norm/scale", "same"),
        ("backbone.out_norm.bias", "out_norm/bias", "same"),
        ("lm_head.weight", "lm_head/kernel", "transposed"),
    ),
    *_rules(
        LARGE_BLOCK,
        "stack/M/",
        ("norm_mlstm.weight", "norm_mlstm/scale", "same"),
        ("norm_mlstm.bias", "norm_mlstm/bias", "same"),
        ("mlstm_layer.q", "mlstm/q"),
        ("mlstm_layer.k", "mlstm/k"),
        ("mlstm_layer.v", "mlstm/v"),
        ("mlstm_layer.ogate_preact", "mlstm/output_gate"),
        ("mlstm_layer.igate_preact", "mlstm/input_gate"),
        ("mlstm_layer.fgate_preact", "mlstm/forget_gate"),
        ("mlstm_layer.multihead_norm.weight", "mlstm/multihead_norm/scale", "same"),
        ("mlstm_layer.multihead_norm.bias", "mlstm/multihead_norm/bias", "same"),
        ("mlstm_layer.out_proj", "mlstm/out_proj"),
        ("norm_ffn.weight", "norm_ffn/scale", "same"),
        ("norm_ffn.bias", "norm_ffn/bias", "same"),
        ("ffn.proj_up_gate", "ffn/proj_up_gate"),
        ("ffn.proj_up", "ffn/proj_up"),
        ("ffn.proj_down", "ffn/proj_down"),
    ),
)

LARGE = (
    Rule("embedding.weight", "token_embedding/embedding", "same"),
    *_LARGE_WITHOUT_EMBEDDING,
)

# xLSTMForCausalLM of the package `transformers`.
HF = (
    Rule("backbone.embeddings.weight", "token_embedding/embedding", "same"),
    *_LARGE_WITHOUT_EMBEDDING,
)

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
"""With fused weights: one name for rows that lie one after the other -> their separate names."""
