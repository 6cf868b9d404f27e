"""Models with outputs other than next-token logits: one per sequence, or one per position.

Their inputs are tokens, or vectors that a linear layer projects. `train.head_losses` has losses
that fit the train step.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.errors import ArgumentError, ConfigError
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.directions import BidirectionalBackbone, Orders, ScanBackbone
from xlstm_jax.modules.initializers import jit_once, small
from xlstm_jax.modules.linear import Dense
from xlstm_jax.modules.lm import Backbone, embed_tokens
from xlstm_jax.modules.stack import only_parameters
from xlstm_jax.ops.documents import document_starts
from xlstm_jax.ops.pool import document_means
from xlstm_jax.typing import Array, Float, Int, Shaped


class _Head(nn.Module):
    cfg: LMConfig  # `vocab_size` and the embedding count for tokens only; the head never does
    num_outputs: int
    in_dim: int | None = None  # C, width of the vectors; None: inputs are tokens
    bidirectional: bool = False  # two backbones of `cfg`, see `BidirectionalBackbone`
    orders: Orders | None = None  # scan orders that the blocks cycle through, see `ScanBackbone`

    def __post_init__(self):
        super().__post_init__()
        if self.bidirectional and self.orders is not None:
            raise ConfigError(
                "bidirectional must be False with orders, which determine the directions, got "
                "True; add the reversed orders to them."
            )

    @nn.nowrap
    def init(self, rngs: Any, x: Array, *args: Any, **options: Any) -> Any:
        """As `nn.Module.init`, but creates the parameters only, in one compiled program."""

        def build(rngs, x):
            with only_parameters():
                return nn.Module.init(self, rngs, x, *args, **options)

        return jit_once(build)(rngs, x)

    def _hidden(
        self, x: Array, segment_ids: Array | None, *, deterministic: bool
    ) -> Float[Array, "B T D"]:
        cfg = self.cfg
        if self.in_dim is None:
            x, _ = embed_tokens(cfg, x, deterministic=deterministic)
        else:
            layer = Dense(cfg.dim, small(cfg.dim), use_bias=True, name="input_proj")
            x = layer(x.astype(cfg.dtype))
        options = dict(deterministic=deterministic)
        if self.orders is not None:
            return ScanBackbone(cfg, self.orders, name="backbone")(x, **options)
        if self.bidirectional:
            return BidirectionalBackbone(cfg, name="backbone")(x, segment_ids, **options)
        reset = None if segment_ids is None else document_starts(segment_ids)
        return Backbone(cfg, name="backbone")(x, None, reset, **options)[0]

    def _check(self, x: Array) -> None:
        ndim, width = (2, "") if self.in_dim is None else (3, f" with C={self.in_dim}")
        if x.ndim != ndim or (self.in_dim is not None and x.shape[-1] != self.in_dim):
            axes = "tokens (B T)" if self.in_dim is None else "vectors (B T C)"
            raise ArgumentError(
                f"x must be {axes}{width}, got shape {x.shape}; in_dim={self.in_dim} of the module "
                "decides, None for tokens."
            )

    def _outputs(self, x: Float[Array, "*batch F"]) -> Float[Array, "*batch outputs"]:
        layer = Dense(self.num_outputs, small(x.shape[-1]), True, upcast=True, name="head")
        return layer(x)


class Classifier(_Head):
    """Logits of a sequence: the mean of its hidden states over valid positions, then linear.

    With two documents in a sequence (`num_documents=2`), whose relation is the class, each is
    encoded by itself and averaged; the head reads both means, their product and difference.
    """

    num_documents: int = 1

    @nn.compact
    def __call__(
        self,
        x: Int[Array, "B T"] | Float[Array, "B T C"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B classes"]:
        """Logits, in float32 or wider.

        Args:
            segment_ids: 1 where a position is valid, 0 where it is padding, at the end; with two
                documents 1 and 2. None: all positions are valid.

        Raises:
            ArgumentError: the inputs have other axes, or two documents have no `segment_ids`.
        """
        self._check(x)
        # Parameters do not depend on the ids, which initialization from inputs alone leaves out.
        has_ids = segment_ids is not None or self.is_initializing()
        if self.num_documents not in (1, 2) or (self.num_documents == 2 and not has_ids):
            raise ArgumentError(
                f"num_documents must be 1, or 2 with segment_ids, got {self.num_documents}; "
                "segment_ids tell the documents apart."
            )
        hidden = self._hidden(x, segment_ids, deterministic=deterministic)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        means = document_means(hidden.astype(state_dtype(hidden)), ids, self.num_documents)
        features = [means[:, n] for n in range(self.num_documents)]
        if len(features) == 2:
            first, second = features
            features += [first * second, first - second]
        return self._outputs(jnp.concatenate(features, axis=-1))


class PositionHead(_Head):
    """Outputs at every position: numbers of a regression, or logits of frames."""

    @nn.compact
    def __call__(
        self,
        x: Int[Array, "B T"] | Float[Array, "B T C"],
        segment_ids: Shaped[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T outputs"]:
        """Outputs in float32 or wider; the state is reset where a document starts.

        Args:
            segment_ids: documents, from 1; 0 is padding, at the end. None: one document.

        Raises:
            ArgumentError: the inputs have other axes.
        """
        self._check(x)
        return self._outputs(self._hidden(x, segment_ids, deterministic=deterministic))
