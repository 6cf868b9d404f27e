"""Gated feed-forward layers.

Sources: first generation arXiv:2405.04517; large architecture arXiv:2503.13427.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.initializers import small, wang
from xlstm_jax.modules.linear import Dense, fused_dense
from xlstm_jax.modules.options import ACTIVATION_NAMES
from xlstm_jax.ops.activations import silu_gate
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Float


@jax.custom_jvp
def _normal_cdf(x: Array) -> Array:
    return 0.5 * jax.lax.erfc(-x * np.sqrt(0.5).astype(x.dtype))


# By hand: JAX 0.12.0 cannot differentiate erf within a `shard_map` with check_vma=True.
_normal_cdf.defjvps(lambda dx, _, x: dx * jnp.exp(-0.5 * x * x) * (2 * np.pi) ** -0.5)


def gelu(x: Array) -> Array:
    """x times the cumulative normal distribution, exact, as PyTorch's default."""
    return x * _normal_cdf(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.silu,
}

# `options` lists the names, as it must not import this module.
assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


class GatedFeedForward(nn.Module):
    """First generation: down(activation(gate) * up), where one projection yields gate and up.

    Dropout follows the down-projection.
    """

    inner_dim: int  # U
    num_blocks: int = 1
    activation: str = "gelu"
    use_bias: bool = False
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        dim = x.shape[-1]
        up = Dense(2 * self.inner_dim, small(dim), self.use_bias, name="proj_up")(x)
        gate, linear = (constrain(y, "batch", "time", "mlp") for y in jnp.split(up, 2, axis=-1))
        down = Dense(dim, wang(dim, self.num_blocks), self.use_bias, name="proj_down")
        y = down(ACTIVATIONS[self.activation](gate) * linear)
        return nn.Dropout(self.dropout, deterministic=deterministic)(y)


class LargeFeedForward(nn.Module):
    """Large architecture: down(silu(gate) * up), with separate projections for gate and up."""

    inner_dim: int  # U
    num_blocks: int = 1
    use_bias: bool = False

    @on_any_mesh
    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        del deterministic  # accepted as `ResidualBlock` passes it; this layer has no dropout
        dim = x.shape[-1]
        names = "proj_up_gate", "proj_up"
        layers = (Dense(self.inner_dim, small(dim), self.use_bias, name=name) for name in names)
        gate, up = (constrain(y, "batch", "time", "mlp") for y in fused_dense(x, *layers))
        down = Dense(dim, wang(dim, self.num_blocks), self.use_bias, name="proj_down")
        return down(silu_gate(gate, up))


class FeedForward(nn.Module):
    """down(activation(up)), without a gate: the feed-forward layer of early Transformers."""

    inner_dim: int  # U
    num_blocks: int = 1
    activation: str = "gelu"
    use_bias: bool = False

    @on_any_mesh
    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        del deterministic
        dim = x.shape[-1]
        up = Dense(self.inner_dim, small(dim), self.use_bias, name="proj_up")(x)
        up = ACTIVATIONS[self.activation](constrain(up, "batch", "time", "mlp"))
        return Dense(dim, wang(dim, self.num_blocks), self.use_bias, name="proj_down")(up)
