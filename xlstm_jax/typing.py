"""Array types and the axis letters used in every signature.

    B batch          D residual width
    T time           F inner (up-projected) width
    S time, as key   G gates; for sLSTM 4, in the order i, f, z, o
    H heads          N chunks in a sequence
    K query/key size L positions in a chunk
    V value size     W convolution window

Rare axes are spelled out: `Float[Array, "B T vocab"]`. The public layout is `B T H K`.
"""

from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Int", "PRNGKeyArray", "PyTree"]
