"""Calls of the ops that the tests compile, with the shapes of a model's layer."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm_jax import cells, ops

B, H = 4, 8

TRITON_FORWARD = {f"mlstm_{x}" for x in ("chunk_maps", "gates", "states", "h")}
"""Names of the Triton kernels of the mLSTM over chunks; those of a gradient are below."""

TRITON_GRADIENT = TRITON_FORWARD | {
    f"mlstm_{x}" for x in ("gates_backward", "dstates", "dq", "dk", "dv", "gate_grads")
}

COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def mlstm(
    T: int,
    K: int,
    V: int,
    dtype=jnp.bfloat16,
    *,
    flags: bool = False,
    implementation: str = "pallas_tpu",
    **options,
):
    """A call of `ops.mlstm` on outputs of projections, and the shapes of its arguments."""
    state = cells.MLSTMState(shape(B, H, K, V), shape(B, H, K), shape(B, H))
    gates = shape(B, T, H, dtype=dtype)
    qkv = (shape(B, T, H * width, dtype=dtype) for width in (K, K, V))
    args = (*qkv, gates, gates, state)
    if flags:
        args = (*args, shape(B, T, dtype=bool), shape(B, T, dtype=bool))

    def call(q, k, v, i, f, state, reset=None, mask=None):
        q, k, v = (x.reshape(B, T, H, -1) for x in (q, k, v))
        flags = dict(reset=reset, mask=mask)
        h, state = ops.mlstm(
            q, k, v, i, f, state, **flags, implementation=implementation, **options
        )
        return h.reshape(B, T, -1), state

    return call, args


def slstm(
    T: int,
    K: int,
    dtype=jnp.bfloat16,
    *,
    flags: bool = False,
    implementation: str = "pallas_tpu",
    **options,
):
    """A call of `ops.slstm`, and the shapes of its arguments."""
    state = cells.SLSTMState(*(shape(B, H, K) for _ in range(4)))
    args = (shape(B, T, 4, H, K, dtype=dtype), shape(H, K, 4, K), shape(H, 4, K), state)
    if flags:
        args = (*args, shape(B, T, dtype=bool), shape(B, T, dtype=bool))

    def call(x, r, b, state, reset=None, mask=None):
        flags = dict(reset=reset, mask=mask)
        return ops.slstm(x, r, b, state, **flags, implementation=implementation, **options)

    return call, args


def attention(T: int, K: int, dtype=jnp.bfloat16, *, flags: bool = False, **options):
    """A call of `ops.attention` with four heads per key, and the shapes of its arguments."""
    q, kv = shape(B, T, H, K, dtype=dtype), shape(B, T, H // 4, K, dtype=dtype)
    args = (q, kv, kv, shape(B, T, dtype=bool)) if flags else (q, kv, kv)

    def call(q, k, v, reset=None):
        return ops.attention(q, k, v, reset=reset, **options)[0]

    return call, args


def gradient(call):
    """The gradient of a loss on all results of `call`, for all its floating-point arguments."""

    def loss(*args):
        outputs = jax.tree.leaves(call(*args))
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in outputs)

    def compute(*args):
        is_flag = [getattr(a, "dtype", None) == jnp.dtype(bool) for a in args]
        argnums = tuple(n for n, flag in enumerate(is_flag) if not flag)
        return jax.grad(loss, argnums=argnums)(*args)

    return compute


def pullback(call):
    """The gradient of `call` for elementwise cotangents, which need no communication."""

    def compute(*args):
        outputs, vjp = jax.vjp(call, *args)
        return vjp(jax.tree.map(jnp.sin, outputs))

    return compute


def specs(name: str, args):
    """Partition specs: batch sharded over data, heads over tensor."""
    if name == "mlstm":
        qkv_and_gates = [P("data", None, "tensor")] * 5
        return (*qkv_and_gates, type(args[5])(*[P("data", "tensor")] * 3))
    state = type(args[3])(*[P("data", "tensor")] * 4)
    return (P("data", None, None, "tensor"), P("tensor"), P("tensor"), state)


def shardings(mesh: Mesh, name: str, args):
    """`specs` on a mesh."""
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    return jax.tree.map(lambda x: NamedSharding(mesh, x), specs(name, args), is_leaf=is_spec)
