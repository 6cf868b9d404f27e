"""The config.json of TiRex-2, as the package `tirex-2` 0.4.0 reads it."""

from collections.abc import Mapping
from typing import Any

from xlstm_jax.convert.fields import Fields
from xlstm_jax.modules.tirex.config import TiRexBlockConfig, TiRexConfig

ACTIVATIONS = {
    "SiLU": "swish",
    "ReLU": "relu",
    "GELU": "gelu",
    "SELU": "selu",
    "Sigmoid": "sigmoid",
}
"""Class in `torch.nn` -> our name."""

CELLS = {"bi-mlstm": "mlstm", "bi-slstm": "slstm"}


def tirex_config(fields: Fields, max_blocks: int) -> TiRexConfig:
    """The `TiRexConfig` equivalent to a config, whose weights have `max_blocks` blocks.

    Raises:
        ConfigError: a field is invalid or has no equivalent.
    """
    dim, patch = fields.size("embedding_dim"), fields.size("input_patch_size")
    _require_patches(fields, patch)
    scaler = _section(fields, "scaler_cfg")
    # Of training and of kernels; the postprocessor of the package has constants of its own.
    fields.ignore("dropout", "device", "matmul_precision", "postprocessor_cfg")
    scaler.ignore("dropout")
    cfg = TiRexConfig(
        dim=dim,
        blocks=_blocks(fields, dim, max_blocks),
        patch_size=patch,
        context_len=fields.count("context_len"),
        future_len=fields.count("future_len"),
        quantiles=_quantiles(fields),
        embed_dim=fields.size("input_ff_dim"),
        head_dim=_head_dim(fields, dim),
        activation=_activation(fields),
        normalize_qk=fields.flag("use_qk_norm", default=True),
        final_norm_eps=_final_norm_eps(fields),
        scale_eps=scaler.positive("eps", 1e-8),
        arcsinh=scaler.flag("use_arcsinh", default=False),
        binary_aware=scaler.flag("binaryaware", default=False),
        sign_flip=fields.flag("tta_sign_flip", default=False),
        difference=fields.flag("tta_diff", default=True),
    )
    scaler.warn_unknown()
    fields.warn_unknown()
    return cfg


def _require_patches(fields: Fields, patch: int) -> None:
    """Rejects patches of inputs and outputs that differ or overlap."""
    fields.require_equal("output_patch_size", patch, "it must be input_patch_size")
    tokenizer = _section(fields, "tokenizer_cfg")
    for name in ("input_patch_size", "output_patch_size", "input_patch_stride"):
        tokenizer.require_equal(name, patch, "overlapping patches are not supported")
    tokenizer.warn_unknown()


def _blocks(fields: Fields, dim: int, max_blocks: int) -> tuple[TiRexBlockConfig, ...]:
    stack = _section(fields, "stack_config")
    templates = stack.get("templates")
    stack.require("templates", templates, "a mapping", fits=isinstance(templates, Mapping))
    recipe = stack.get("recipe")
    is_recipe = isinstance(recipe, list) and all(isinstance(name, str) for name in recipe)
    fits = is_recipe and 0 < len(recipe) and set(recipe) <= set(templates)
    stack.require("recipe", recipe, "a list of names in templates, one per block", fits=fits)
    what = f"of at most {max_blocks} names, the number of blocks in the weights"
    stack.require("recipe", recipe, what, fits=len(recipe) <= max_blocks)
    num_blocks = fields.count("num_blocks")
    what = f"{len(recipe)}, the length of recipe"
    fields.require("num_blocks", num_blocks, what, fits=num_blocks == len(recipe))
    by_name = {name: _block(stack, templates, name, dim) for name in sorted(set(recipe))}
    stack.warn_unknown()
    return tuple(by_name[name] for name in recipe)


def _block(stack: Fields, templates: Mapping[str, Any], name: str, dim: int) -> TiRexBlockConfig:
    template = Fields(templates[name], f"templates.{name} of {stack.where}")
    time, variate = _section(template, "time_mixer"), _section(template, "variate_mixer")
    for mixer in (time, variate):
        mixer.require_equal("embedding_dim", dim, "it must be that of the model")
    kind = time.get("model_type")
    fits = isinstance(kind, str) and kind in CELLS
    time.require("model_type", kind, f"one of {', '.join(CELLS)}", fits=fits)
    num_heads = time.size("num_heads", 4)
    slstm_heads = time.size_or("num_slstm_heads", num_heads)
    template.ignore("dropout", "eps", "block_order", "block_idx", "num_blocks")  # without effect
    time.ignore("device", "rnn_backend")
    variate.ignore("use_flex_attention")  # a choice of the kernel
    block = TiRexBlockConfig(
        cell=CELLS[kind],  # pyright: ignore[reportArgumentType]
        num_heads=slstm_heads if CELLS[kind] == "slstm" else num_heads,
        num_variate_heads=variate.size("num_heads", 4),
    )
    for part in (template, time, variate):
        part.warn_unknown()
    return block


def _quantiles(fields: Fields) -> tuple[float, ...]:
    levels = fields.get("quantiles")
    is_list = isinstance(levels, list) and levels
    fits = is_list and all(isinstance(q, (int, float)) and 0 < q < 1 for q in levels)
    fields.require("quantiles", levels, "a list of numbers between 0 and 1", fits=bool(fits))
    return tuple(float(level) for level in levels)


def _head_dim(fields: Fields, dim: int) -> int:
    factor = fields.positive("h_expand")
    fields.require_size("h_expand times embedding_dim", int(dim * factor))
    return int(dim * factor)


def _activation(fields: Fields) -> str:
    name = fields.get("act_func")
    short = name.rsplit(".", 1)[-1] if isinstance(name, str) else None
    what = f"one of {', '.join(ACTIVATIONS)} of torch.nn"
    fields.require("act_func", name, what, "no other one is supported", fits=short in ACTIVATIONS)
    return ACTIVATIONS[str(short)]


def _final_norm_eps(fields: Fields) -> float | None:
    norm = fields.nested("stack_out_norm_config")
    if norm is None:
        return None
    norm.ignore("use_rmsnorm")  # both choices are the same function
    eps = norm.positive("eps", 1e-7)
    norm.warn_unknown()
    return eps


def _section(fields: Fields, name: str) -> Fields:
    """A nested mapping that must exist."""
    section = fields.nested(name)
    fields.require(name, None, "a mapping of fields", "add it", fits=section is not None)
    assert section is not None
    return section
