"""How the published implementations lay arrays out, and ours.

Theirs are PyTorch's: (out, in). Functions only reorder, so they apply to gradients as well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """One way an array may lie; both functions take NumPy and JAX arrays of one parameter."""

    to_ours: Callable[[Any, Shape], Any]  # (their array, our shape) -> ours
    to_theirs: Callable[[Any], Any]

    def their_shape(self, ours: Shape) -> Shape:
        """The shape of their array, from that of ours."""
        return jax.eval_shape(self.to_theirs, jax.ShapeDtypeStruct(ours, jnp.float32)).shape


def _convolution_to_ours(a: Any, shape: Shape) -> Any:
    # One window per feature is stored as (F, 1, W); channels that mix as (F_out, F_in, W).
    return a[:, 0].T if len(shape) == 2 else a.transpose(2, 1, 0)


def _convolution_to_theirs(a: Any) -> Any:
    return a.T[:, None] if a.ndim == 2 else a.transpose(2, 1, 0)


def _recurrent_to_ours(a: Any, shape: Shape) -> Any:
    H, K, G, _ = shape
    return a.reshape(H, G, K, K).transpose(0, 3, 1, 2)


def _recurrent_to_theirs(a: Any) -> Any:
    H, K, G, _ = a.shape
    return a.transpose(0, 2, 3, 1).reshape(H, G * K, K)


def _gate_biases_to_ours(a: Any, shape: Shape) -> Any:
    H, G, K = shape
    return a.reshape(G, H, K).transpose(1, 0, 2)


LAYOUTS = {
    "same": Layout(lambda a, _: a, lambda a: a),
    "transposed": Layout(lambda a, _: a.T, lambda a: a.T),
    # (groups, out, in) there, (groups, in, out) here
    "headwise": Layout(lambda a, _: a.transpose(0, 2, 1), lambda a: a.transpose(0, 2, 1)),
    "convolution": Layout(_convolution_to_ours, _convolution_to_theirs),
    # (H, 4 out, in) there, (H, in, 4, out) here
    "recurrent": Layout(_recurrent_to_ours, _recurrent_to_theirs),
    # flat, gate by gate, there; (H, 4, K) here
    "gate_biases": Layout(_gate_biases_to_ours, lambda a: a.transpose(1, 0, 2).reshape(-1)),
}
"""Name in a rule -> what to do. The sLSTM's are those of its backend `vanilla`."""
