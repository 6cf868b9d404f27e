"""How the published implementations lay arrays out, and ours.

Theirs are PyTorch's: (out, in). Layouts only reorder, so they apply to gradients as well.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Ours, with its axes in another order and then in another shape, is theirs.

    The methods take NumPy and JAX arrays of one parameter.
    """

    order: Callable[[range], Sequence[int]]  # from the axes of ours
    reshape: Callable[[Shape], Shape] = lambda shape: shape

    def their_shape(self, ours: Shape) -> Shape:
        return self.reshape(tuple(ours[axis] for axis in self.order(range(len(ours)))))

    def to_theirs(self, ours: Any) -> Any:
        return ours.transpose(self.order(range(ours.ndim))).reshape(self.their_shape(ours.shape))

    def to_ours(self, theirs: Any, shape: Shape) -> Any:
        """`shape` is that of ours."""
        order = self.order(range(len(shape)))
        theirs = theirs.reshape([shape[axis] for axis in order])
        return theirs.transpose([order.index(axis) for axis in range(len(shape))])


LAYOUTS = {
    "same": Layout(lambda axes: axes),
    "transposed": Layout(lambda axes: axes[::-1]),
    "headwise": Layout(lambda _: (0, 2, 1)),  # (groups, out, in) there, (groups, in, out) here
    # One window per feature is stored as (F, 1, W); channels that mix as (F_out, F_in, W).
    "convolution": Layout(
        lambda axes: axes[::-1], lambda shape: (shape[0], 1, shape[1]) if len(shape) == 2 else shape
    ),
    # (H, 4 out, in) there, (H, in, 4, out) here
    "recurrent": Layout(
        lambda _: (0, 2, 3, 1), lambda shape: (shape[0], shape[1] * shape[2], shape[3])
    ),
    # flat, gate by gate, there; (H, 4, K) here
    "gate_biases": Layout(lambda _: (1, 0, 2), lambda shape: (math.prod(shape),)),
}
"""Name in a rule -> how to reorder. The sLSTM's are those of its backend `vanilla`."""
