"""First-generation models of the package `xlstm`: xLSTMLMModel and xLSTMBlockStack.

Source of the layout: the public classes of the package `xlstm`, 2.0.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlstm_jax.convert import mapping, names
from xlstm_jax.convert.fields import MAX_COUNT, Fields
from xlstm_jax.convert.prefixes import unwrapped
from xlstm_jax.convert.tensors import Source, check_num_blocks, from_arrays
from xlstm_jax.errors import quote
from xlstm_jax.modules import options
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.patterns import at
from xlstm_jax.typing import PyTree

ACTIVATIONS = {name.replace("relu2", "relu^2"): name for name in options.ACTIVATION_NAMES}
"""Activation name of the package -> ours."""

KERNEL, BIAS = "slstm_cell._recurrent_kernel_", "slstm_cell._bias_"


def load_v1(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[LMConfig, PyTree]:
    """A first-generation model from its config and its `state_dict`.

    sLSTM weights may be those of the backend `vanilla` or `cuda`. `context_length` does not limit
    our model. Tensors of an xLSTMBlockStack become parameters of `modules.Backbone`. Names may have
    the prefixes of a compiled or wrapped model. Warns if a value is NaN or infinite.

    Args:
        config: an xLSTMLMModelConfig or xLSTMBlockStackConfig as nested dicts.
        tensors: the `state_dict` of the module, as NumPy arrays.

    Raises:
        ConfigError: a field is invalid or not supported.
        WeightsError: tensors are missing, unexpected or misshapen.
    """
    # A state_dict also has causal masks, which are buffers, and the head of a tied model.
    originals = [name for name in tensors if not name.endswith("mlstm_cell.causal_mask")]
    by_name = unwrapped(originals, names.V1, names.V1_STACK)
    tensors = {name: tensors[original] for name, original in by_name.items()}
    bare = any(n.startswith(names.V1_STACK) and names.V1_STACK not in by_name[n] for n in tensors)
    bare = bare and tensors.keys().isdisjoint(("token_embedding.weight", "lm_head.weight"))
    if bare:
        tensors = {name.removeprefix(names.V1_STACK): array for name, array in tensors.items()}
    cfg = config_of(config, bare=bare, source=from_arrays(tensors))
    head, embedding = (tensors.get(f"{part}.weight") for part in ("lm_head", "token_embedding"))
    if cfg.tie_embeddings and head is not None and embedding is not None:
        if np.array_equal(head, embedding):
            del tensors["lm_head.weight"]
    without = ("token_embedding/embedding", "lm_head/kernel") if bare else ()
    source = from_arrays(_as_vanilla(tensors))
    return cfg, mapping.load(cfg, names.V1_BARE if bare else names.V1, source, without)


def config_of(
    config: Mapping[str, Any], *, bare: bool = False, source: Source | None = None
) -> LMConfig:
    """The `LMConfig` equivalent to a first-generation config.

    Args:
        bare: for an xLSTMBlockStackConfig, which has no vocabulary.
        source: weights that bound the sizes.

    Raises:
        ConfigError: a field is invalid or has no equivalent.
    """
    largest = source.longest_axis if source else 0
    fields = Fields(config, "the config", largest or MAX_COUNT)
    dim, num_blocks = fields.size("embedding_dim"), fields.count("num_blocks")
    if source:
        check_num_blocks(fields, num_blocks, source)
    pattern = _pattern(fields, num_blocks)
    bias = fields.flag("bias", default=False)
    has_norm = fields.flag("add_post_blocks_norm", default=True)
    cfg = LMConfig(
        # `Backbone` ignores the vocabulary, but the config needs one.
        vocab_size=1 if bare else fields.size("vocab_size"),
        dim=dim,
        pattern=pattern,
        mlstm=_mlstm(fields, dim, bias=bias) if "m" in pattern else options.MLSTMConfig(),
        slstm=_slstm(fields, dim) if "s" in pattern else options.SLSTMConfig(),
        final_norm="layer" if has_norm else "none",
        tie_embeddings=fields.flag("tie_weights", default=False),
        dropout=float(fields.number("dropout", 0.0)),
        embedding_dropout=fields.flag("add_embedding_dropout", default=False),
    )
    if fields.flag("weight_decay_on_embedding", default=False):
        logging.getLogger(__name__).warning(
            "weight_decay_on_embedding is an option of training: set "
            r"train.decay_pattern='(^|/)(kernel|embedding)$'"
        )
    # Our model has no maximum length, so `context_length` has no effect.
    fields.ignore("vocab_size", "context_length", "_block_map")
    fields.ignore("mlstm_block", "slstm_block")  # of a kind that the model does not use
    fields.warn_unknown()
    return cfg


def _pattern(fields: Fields, num_blocks: int) -> str:
    slstm_at = fields.get("slstm_at", [])
    is_list = isinstance(slstm_at, Sequence) and not isinstance(slstm_at, str)
    # An exact type check, as True is an int too.
    fits = slstm_at == "all" or (is_list and all(type(index) is int for index in slstm_at))
    fields.require("slstm_at", slstm_at, "'all' or a list of block indices", fits=fits)
    # Without mLSTM options, every block is an sLSTM block.
    if slstm_at == "all" or fields.get("mlstm_block", None) is None:
        return "s" * num_blocks
    fits, what = (
        not slstm_at or not fields.is_null("slstm_block"),
        f"given for slstm_at={quote(slstm_at)}",
    )
    fields.require("slstm_block", None, what, "give it or leave slstm_at empty", fits=fits)
    return at(num_blocks, slstm=slstm_at)


def _mlstm(fields: Fields, dim: int, *, bias: bool) -> options.MLSTMConfig:
    layer = _layer(fields, "mlstm_block", "mlstm")
    inner_dim = _width(layer, dim, 2.0)
    layer.ignore("bias", "dropout", "context_length", "embedding_dim")  # set for the model
    layer.ignore("_num_blocks", "_proj_up_dim", "_inner_embedding_dim")
    cfg = options.MLSTMConfig(
        num_heads=layer.size("num_heads", 4),
        inner_dim=inner_dim,
        qkv_block_size=layer.size("qkv_proj_blocksize", 4),
        conv_width=layer.size("conv1d_kernel_size", 4, minimum=0),
        use_bias=bias,
    )
    layer.warn_unknown()
    return cfg


def _slstm(fields: Fields, dim: int) -> options.SLSTMConfig:
    layer = _layer(fields, "slstm_block", "slstm")
    layer.require_equal("function", "slstm", "the nearest is `ops.lstm`, which has no block")
    for name, off in (("gradient_recurrent_cut", False), ("gradient_recurrent_clipval", None)):
        layer.require_equal(
            name, off, "gradients are not truncated or clipped per step; use grad_clip"
        )
    layer.require_equal("forward_clipval", None, "outputs are not clipped")
    layer.require_equal("initial_val", 0.0, "the initial state is zeros; pass a state instead")
    layer.ignore("embedding_dim", "hidden_size", "num_gates", "num_states", "dropout")
    layer.ignore("_block_idx", "_num_blocks", "backend", "batch_size", "internal_input_shape")
    layer.ignore("input_shape", "output_shape", "constants", "enable_automatic_mixed_precision")
    layer.ignore(*(f"dtype{suffix}" for suffix in ("", "_b", "_r", "_w", "_g", "_s", "_a")))
    cfg = options.SLSTMConfig(
        num_heads=layer.size("num_heads", 4),
        conv_width=layer.size("conv1d_kernel_size", 4, minimum=0),
        recurrent_init=layer.get("recurrent_weight_init", "zeros"),
        bias_init=layer.get("bias_init", "powerlaw_blockdependent"),
        group_norm_weight=layer.flag("group_norm_weight", default=True),
        **_feedforward(fields, dim),
    )
    layer.warn_unknown()
    return cfg


def _feedforward(fields: Fields, dim: int) -> dict[str, Any]:
    block = fields.nested("slstm_block")
    if block and block.is_null("feedforward"):
        return {"ffn_dim": 0}
    layer = _layer(fields, "slstm_block", "feedforward")
    layer.require_equal("ff_type", "ffn_gated", "only the gated one is supported")
    width = _width(layer, dim, 1.3)
    layer.require("the width", width, "above 0", "raise proj_factor", fits=width > 0)
    activation = layer.get("act_fn", "gelu")
    what = f"one of {', '.join(ACTIVATIONS)}"
    fits = isinstance(activation, str) and activation in ACTIVATIONS
    layer.require("act_fn", activation, what, "the nearest is gelu", fits=fits)
    layer.ignore("embedding_dim", "_num_blocks", "_proj_up_dim")
    ffn = {
        "ffn_dim": width,
        "ffn_activation": ACTIVATIONS[activation],
        # Separate from bias and dropout of the model.
        "ffn_bias": layer.flag("bias", default=False),
        "ffn_dropout": float(layer.number("dropout", 0.0)),
    }
    layer.warn_unknown()
    return ffn


def _layer(fields: Fields, block: str, name: str) -> Fields:
    block_fields = fields.nested(block) or Fields({}, block)
    layer = block_fields.nested(name)
    block_fields.ignore("mlstm", "slstm", "_num_blocks", "_block_idx")
    if block == "slstm_block":
        block_fields.ignore("feedforward")
    block_fields.warn_unknown()
    return layer or Fields({}, f"{name} of {block}")


def _width(layer: Fields, dim: int, factor: float) -> int:
    factor = layer.positive("proj_factor", factor)
    layer.require_size("proj_factor times the width", dim * factor)
    width = options.first_generation_width(
        dim,
        factor,
        layer.count("round_proj_up_to_multiple_of", 64),
        round_up=layer.flag("round_proj_up_dim_up", default=True),
    )
    layer.require_size("the width by proj_factor", width)
    return width


def _as_vanilla(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts sLSTM weights of the backend `cuda` to those of `vanilla`; names are the same.

    Other layouts are left as they are; `mapping.load` rejects their shapes.
    """
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith(KERNEL)]:
        kernel, bias_name = tensors[name], name.removesuffix(KERNEL) + BIAS
        # cuda: (H, K, 4 K); vanilla: (H, 4 K, K).
        if np.ndim(kernel) != 3 or 4 * kernel.shape[1] != kernel.shape[2]:
            continue
        H, K, _ = kernel.shape
        tensors[name] = kernel.transpose(0, 2, 1)
        if bias_name in tensors and tensors[bias_name].size == 4 * H * K:
            bias = tensors[bias_name].reshape(H, 4, K)
            tensors[bias_name] = bias.transpose(1, 0, 2).reshape(-1)
    return tensors
