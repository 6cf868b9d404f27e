"""Stacks that read a sequence in more than one order: both directions, or several scan orders."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.initializers import small
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.linear import Dense, fused_dense
from xlstm_jax.modules.lm import Backbone, final_norm
from xlstm_jax.ops.documents import document_starts
from xlstm_jax.typing import Array, Float, Int

Orders = tuple[tuple[int, ...], ...]


class BidirectionalBackbone(nn.Module):
    """Two backbones, one of which reads the sequence from its end, merged by a projection.

    Source: Schuster and Paliwal 1997, "Bidirectional recurrent neural networks".
    """

    cfg: LMConfig  # of each of the two

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Hidden states that depend on all of the document of each position.

        Args:
            segment_ids: documents, from 1; 0 is padding, which must be at the end. None: one
                document and no padding.
        """
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        order = reversed_order(ids)
        hidden = []
        for name, indices in (("forward", None), ("backward", order)):
            reset = None if segment_ids is None else document_starts(in_order(ids, indices))
            backbone = Backbone(self.cfg, name=name)
            h, _ = backbone(in_order(x, indices), None, reset, deterministic=deterministic)
            hidden.append(in_order(h, indices))  # the order is its own inverse
        return fused_dense(hidden, Dense(self.cfg.dim, small(self.cfg.dim), name="merge"))[0]


class ScanBackbone(nn.Module):
    """Blocks that cycle through several scan orders of all positions, and a final norm.

    With two orders, one the reverse of the other, directions alternate from block to block, as in
    Vision-LSTM (Alkin et al. 2024, arXiv:2406.04303). Sequences have no padding.
    """

    cfg: LMConfig
    orders: Orders  # permutations of the positions; block i uses orders[i % len(orders)]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        """Hidden states, in the order of x.

        Raises:
            ArgumentError: an order is not a permutation of the T positions.
        """
        cfg, T = self.cfg, x.shape[1]
        for order in self.orders:
            if sorted(order) != list(range(T)):
                raise ArgumentError(
                    f"orders must be permutations of the {T} positions of x, got {quote(order)}; "
                    f"range({T}) reads from left to right."
                )
        for index, letter in enumerate(cfg.pattern):
            cls: Any = BLOCKS[letter].block
            has_index = "block_index" in getattr(cls, "__dataclass_fields__", {})
            block = cls(cfg, name=f"block_{index}", **({"block_index": index} if has_index else {}))
            order = jnp.asarray(self.orders[index % len(self.orders)])
            y, _ = block(x[:, order], deterministic=deterministic)
            x = y[:, jnp.argsort(order)]
        return x if cfg.final_norm == "none" else final_norm(cfg, name="out_norm")(x)


def reversed_order(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Indices that reverse the tokens of each sequence and leave its padding at the end."""
    length = jnp.sum(segment_ids != 0, axis=1, keepdims=True)
    position = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    return jnp.where(position < length, length - 1 - position, position)


def in_order(x: Array, order: Int[Array, "B T"] | None) -> Array:
    """The positions of x, `B T ...`, in another order for each sequence; None: in theirs."""
    if order is None:
        return x
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
