"""Array layouts of the published PyTorch implementations, and ours.

PyTorch stores a linear map as (out, in). A layout only reorders elements, so it also applies to
gradients.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A permutation of the axes of our array, then a reshape, which give the PyTorch array.

    The methods take NumPy or JAX arrays of one parameter.
    """

    order: Callable[[range], Sequence[int]]  # our axes -> the same in PyTorch's order
    reshape: Callable[[Shape], Shape] = lambda shape: shape  # permuted shape -> PyTorch's

    def torch_shape(self, shape: Shape) -> Shape:
        """The PyTorch shape of a parameter with our `shape`."""
        return self.reshape(tuple(shape[axis] for axis in self.order(range(len(shape)))))

    def to_torch(self, array: Any) -> Any:
        """Our array in the PyTorch layout."""
        permuted = array.transpose(self.order(range(array.ndim)))
        return permuted.reshape(self.torch_shape(array.shape))

    def from_torch(self, array: Any, shape: Shape) -> Any:
        """The inverse of `to_torch`; `shape` is ours."""
        order = self.order(range(len(shape)))
        permuted = array.reshape([shape[axis] for axis in order])
        # order.index inverts the permutation.
        return permuted.transpose([order.index(axis) for axis in range(len(shape))])


LAYOUTS = {
    "same": Layout(lambda axes: axes),
    "transposed": Layout(lambda axes: axes[::-1]),
    "row": Layout(lambda axes: axes, lambda shape: (1, 1, *shape)),  # PyTorch (1, 1, D); ours (D,)
    "headwise": Layout(lambda _: (0, 2, 1)),  # PyTorch (groups, out, in); ours (groups, in, out)
    # Depthwise: PyTorch (F, 1, W), ours (W, F). Mixing: PyTorch (F_out, F_in, W), ours reversed.
    "convolution": Layout(
        lambda axes: axes[::-1], lambda shape: (shape[0], 1, shape[1]) if len(shape) == 2 else shape
    ),
    # PyTorch (H, 4 out, in); ours (H, in, 4, out).
    "recurrent": Layout(
        lambda _: (0, 2, 3, 1), lambda shape: (shape[0], shape[1] * shape[2], shape[3])
    ),
    # PyTorch (4 H K,), gate by gate; ours (H, 4, K).
    "gate_biases": Layout(lambda _: (1, 0, 2), lambda shape: (math.prod(shape),)),
}
"""Name in a rule -> layout. sLSTM layouts are those of its backend `vanilla`."""
