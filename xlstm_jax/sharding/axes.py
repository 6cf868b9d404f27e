"""What each dimension of a parameter is: one table, from its path to the names of its axes.

Parameters are plain arrays, so this table is all there is. Moments and averages of parameters lie
under the same paths with something before them, and match the same rows.
"""

import re
from typing import Any

import jax

LOGICAL_AXES = ("batch", "time", "embed", "inner", "mlp", "heads", "vocab", "layers")
"""embed: model width, where a parameter reads it; inner: heads x head size; mlp: feed-forward."""

_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Rows alone: a table cut along its width as well makes the look-up gather all of it.
    (r"token_embedding/embedding", ("vocab", None)),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(\w*norm|norm_\w+)/(scale|scale_offset|bias)", (None,)),
    (r"m/mlstm/proj_up/kernel", ("embed", "inner")),
    (r"m/mlstm/proj_down/kernel", ("inner", "embed")),
    (r"m/mlstm/[qkv]_proj/kernel", ("inner", None, None)),  # small blocks on a diagonal
    (r"m/mlstm/(proj_up|[qkv]_proj)/bias", ("inner",)),
    (r"m/mlstm/learnable_skip", ("inner",)),
    # Its rows are those of q, k and v one after the other, which no cut of the heads respects.
    (r"m/mlstm/(input|forget)_gate/kernel", (None, "heads")),
    (r"M/mlstm/(input|forget)_gate/kernel", ("embed", "heads")),
    (r"mlstm/(input|forget)_gate/bias", (None,)),
    (r"M/mlstm/(q|k|v|output_gate)/kernel", ("embed", "inner")),
    (r"M/mlstm/(q|k|v|output_gate)/bias", ("inner",)),
    (r"M/mlstm/out_proj/kernel", ("inner", "embed")),
    (r"(out_proj|proj_down)/bias", (None,)),
    (r"s/slstm/(input_gate|forget_gate|cell_input|output_gate)/kernel", ("heads", None, None)),
    (r"s/slstm/recurrent_kernel", ("heads", None, None, None)),
    (r"s/slstm/bias", ("heads", None, None)),
    (r"conv/kernel", (None, None)),
    (r"conv/kernel", (None, None, None)),  # channels mix
    (r"conv/bias", (None,)),
    (r"ffn/(proj_up|proj_up_gate)/kernel", ("embed", "mlp")),
    (r"ffn/(proj_up|proj_up_gate)/bias", ("mlp",)),
    (r"ffn/proj_down/kernel", ("mlp", "embed")),
)
"""The end of a path -> its axes; the first that fits counts. One axis more is `layers`, before."""


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as "stack/m/mlstm/proj_up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """The names of a parameter's axes; None for one that is never cut.

    Raises:
        KeyError: no row of the table fits; whoever adds a parameter adds its row.
    """
    if ndim == 0:  # a count of an optimiser
        return ()
    for pattern, names in _AXES:
        if re.search(rf"(^|/){pattern}$", path) and ndim - len(names) in (0, 1):
            return ("layers",) * (ndim - len(names)) + names
    raise KeyError(f"{path} with {ndim} axes has no row in the table of logical axes.")
