"""Weights of `torch.nn.LSTM`, as a state dict of arrays, to `LSTM` and back. PyTorch is not needed.

PyTorch orders the rows of a matrix by gate as input, forget, cell, output, which is our order
i, f, z, o. It has two biases, of which only the sum counts.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.compat.layers import LSTM
from xlstm_jax.errors import ArgumentError, UnsupportedError, quote
from xlstm_jax.typing import PyTree

_NAME = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)(_reverse)?")


def from_torch(state_dict: Mapping[str, Any]) -> tuple[LSTM, PyTree]:
    """The layer and the parameters of a `torch.nn.LSTM`.

    Args:
        state_dict: name -> array, or anything `numpy.asarray` reads, as a CPU tensor that is
            detached; names are those of PyTorch, such as `weight_ih_l0` and `bias_hh_l1_reverse`.

    Returns the layer, whose sizes are those of the arrays, and `variables["params"]`. What the
    weights do not tell has its default: `layer.clone(batch_first=False, dropout=0.1)` changes it.

    Raises:
        ArgumentError: a name is unknown or missing, or a shape does not fit.
        UnsupportedError: the LSTM has projections.
    """
    names = [_parse(name) for name in state_dict]
    num_layers = 1 + max((index for _, index, _ in names), default=0)
    directions = ("", "_reverse") if any(suffix for *_, suffix in names) else ("",)
    bias = any(kind.startswith("bias") for kind, *_ in names)
    tensors = {name: np.asarray(value) for name, value in state_dict.items()}
    hidden_size = _get(tensors, "weight_hh_l0").shape[-1]
    input_size = _get(tensors, "weight_ih_l0").shape[-1]
    layer = LSTM(input_size, hidden_size, num_layers, bias=bias, bidirectional=len(directions) == 2)
    params = {}
    for index in range(num_layers):
        width = input_size if index == 0 else hidden_size * len(directions)
        for suffix in directions:
            name = f"l{index}{suffix}"
            params[name] = _cell(tensors, name, width, hidden_size, bias=bias)
    return layer, jax.tree.map(jnp.asarray, params)


def to_torch(params: PyTree) -> dict[str, np.ndarray]:
    """The state dict of the `torch.nn.LSTM` with the outputs of an `LSTM` with these parameters.

    Each `bias_hh` is zero. Recurrent weights of several heads become block-diagonal matrices, whose
    other elements PyTorch would train.

    Raises:
        ArgumentError: the parameters are not those of an `LSTM`.
    """
    state_dict = {}
    for name, cell in params.items():
        kernel = cell.get("proj", {}).get("kernel") if isinstance(cell, Mapping) else None
        if kernel is None or "recurrent_kernel" not in cell or not re.match(r"l\d+", name):
            raise ArgumentError(
                f"params must be those of an LSTM, with entries such as l0 and l0_reverse, got "
                f"{quote(name)}; pass variables['params'], or its entry for the layer."
            )
        r = np.asarray(cell["recurrent_kernel"])  # H K 4 K
        F = r.shape[0] * r.shape[1]
        within_heads = np.eye(r.shape[0], dtype=r.dtype)
        recurrent = np.einsum("HKGJ,HP->GHJPK", r, within_heads).reshape(4 * F, F)
        state_dict[f"weight_ih_{name}"] = np.asarray(kernel).T.copy()
        state_dict[f"weight_hh_{name}"] = recurrent
        if "bias" in cell:
            bias = np.asarray(cell["bias"]).transpose(1, 0, 2).reshape(-1)  # H 4 K
            state_dict[f"bias_ih_{name}"] = bias
            state_dict[f"bias_hh_{name}"] = np.zeros_like(bias)
    return state_dict


def _parse(name: str) -> tuple[str, int, str]:
    """Kind, layer and direction of a tensor."""
    if match := _NAME.fullmatch(name):
        kind, part, index, suffix = match.groups()
        return f"{kind}_{part}", int(index), suffix or ""
    if name.startswith("weight_hr_l"):
        raise UnsupportedError(
            f"state_dict must be of an LSTM without projections, got {quote(name)}; train it with "
            "proj_size=0."
        )
    raise ArgumentError(
        f"state_dict must have names such as weight_ih_l0 only, got {quote(name)}; pass the "
        "entries of the LSTM, without the prefix of their module."
    )


def _get(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ArgumentError(
            f"state_dict must have {name}, got only {quote(sorted(tensors))}; pass all entries of "
            "the LSTM."
        )
    return tensors[name]


def _cell(
    tensors: Mapping[str, np.ndarray], name: str, width: int, hidden_size: int, *, bias: bool
) -> dict[str, Any]:
    """The parameters of one cell."""
    F = hidden_size
    shapes = {"weight_ih": (4 * F, width), "weight_hh": (4 * F, F)}
    if bias:
        shapes |= {"bias_ih": (4 * F,), "bias_hh": (4 * F,)}
    arrays = {kind: _get(tensors, f"{kind}_{name}") for kind in shapes}
    for kind, shape in shapes.items():
        if arrays[kind].shape != shape:
            raise ArgumentError(
                f"{kind}_{name} must have the shape {shape}, got {arrays[kind].shape}; all entries "
                "must be of one LSTM."
            )
    params: dict[str, Any] = {"proj": {"kernel": arrays["weight_ih"].T}}
    recurrent = arrays["weight_hh"].reshape(4, F, F)  # 4 K_out K_in
    params["recurrent_kernel"] = recurrent.transpose(2, 0, 1)[None]
    if bias:
        params["bias"] = (arrays["bias_ih"] + arrays["bias_hh"]).reshape(1, 4, F)
    return params
