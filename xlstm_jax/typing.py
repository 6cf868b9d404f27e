"""Array types and the axis letters used in every signature.

    B batch          D residual width
    T time           F inner (up-projected) width
    S time, as key   G gates; for sLSTM 4, in the order i, f, z, o
    H heads          N chunks in a sequence
    K query/key size L positions in a chunk
    V value size     W convolution window

Rare axes are spelled out: `Float[Array, "B T vocab"]`. The public layout is `B T H K`.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

Flag = Shaped[Array | np.ndarray, "B T"]
"""A reset or a mask: booleans, or numbers, of which nonzero ones are True."""

Size = Any
"""The size of an axis: an integer, or a symbolic size where `jax.export` traces."""

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Flag",
    "Float",
    "Int",
    "PRNGKeyArray",
    "PyTree",
    "Shaped",
    "Size",
]
