"""Gates, stabilizers and normalizers of a cell at every position.

The ops do not return them: kernels never store them. They are recomputed by the recurrence, without
the matrix memory, from the arguments of the op.
"""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import log_sigmoid, state_dtype
from xlstm_jax.cells.lstm import recurrent_gates
from xlstm_jax.cells.mlstm import MLSTMState, mlstm_init, mlstm_normalizer, mlstm_step
from xlstm_jax.cells.slstm import SLSTMState, slstm_init, slstm_step
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.ops.flags import FLAG_AXES, Flags
from xlstm_jax.ops.sharded.shard_map import map_shards
from xlstm_jax.typing import Array, Flag, Float


def mlstm_trace(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    o: Float[Array, "B T F"],
    state: MLSTMState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    normalize: bool = True,
    eps: float = 1e-6,
    stabilize: bool = True,
) -> dict[str, Float[Array, "B T H ..."]]:
    """What an mLSTM computes from its gates; arguments as in `ops.mlstm`.

    Returns, each 0 where masked:
        i, f, o: the pre-activations; o, the output gate of the layer, is split into heads.
        log_f_sum: sum of log f since the last reset, or since the first position.
        m: the stabilizer, after the position.
        normalizer: divisor of the read-out, max(|q n|, exp(-m)) + eps, where n is the stored
            normalizer state; 1 without normalization.
    """
    flags, dtype = Flags.of(reset, mask), state_dtype(q, k, i, f)
    options = {"input_gate": input_gate, "forget_gate": forget_gate, "stabilize": stabilize}

    def step(carry, inputs):
        state, log_f_sum = carry
        q, k, i, f = (a.astype(dtype) for a in inputs)
        # Values of width 0: C, which m and n do not depend on, has no elements.
        state, _ = mlstm_step(state, q, k, k[..., :0], i, f, **options)
        log_f_sum = log_f_sum + _log_forget(f, forget_gate)
        norm = mlstm_normalizer(state, q, eps=eps) if normalize else jnp.ones_like(state.m)
        return (state, log_f_sum), jnp.stack([log_f_sum, state.m, norm], axis=1)

    def local(q, k, i, f, state, flags):
        B, _, H, K = q.shape  # of the device's shard
        C, n, m = mlstm_init(B, H, K, 0, dtype)
        if state is not None:
            n, m = (leaf.astype(dtype) for leaf in state)
        carry = vary_like((MLSTMState(C, n, m), jnp.zeros_like(m)), (q, k, i, f, flags))
        return scan_time(step, carry, (q, k, i, f), **flags._asdict())[0]

    arguments = (q, k, i, f, None if state is None else state[1:], flags)
    axes = ("B T H K", "B T H K", "B T H", "B T H", ("B H K", "B H"), FLAG_AXES)
    sizes = {"B": q.shape[0], "H": q.shape[2]}
    trace = map_shards(local, arguments, axes, "B T G H", sizes)
    gates = {"i": i, "f": f, "o": o.reshape(*q.shape[:3], -1)}
    gates = {name: flags.zero_masked(gate) for name, gate in gates.items()}
    return gates | _named(trace, "log_f_sum m normalizer")


def slstm_trace(
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    state: SLSTMState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    forget_gate: str = "sigmoid",
    stabilize: bool = True,
) -> dict[str, Float[Array, "B T H K"]]:
    """What an sLSTM computes from its gates; arguments as in `ops.slstm`.

    Returns, each 0 where masked:
        i, f, z, o: the pre-activations, with the recurrent contribution and the bias.
        log_f_sum, m: as in `mlstm_trace`.
        normalizer: the normalizer state n, by which c is divided.
    """
    flags, dtype = Flags.of(reset, mask), state_dtype(x, r)

    def local(x, r, b, state, flags):
        def step(carry, x):
            state, log_f_sum = carry
            gates = recurrent_gates(state.h, x, r, b)
            state, _ = slstm_step(state, x, r, b, forget_gate=forget_gate, stabilize=stabilize)
            log_f_sum = log_f_sum + _log_forget(gates[1], forget_gate)
            return (state, log_f_sum), jnp.stack([*gates, log_f_sum, state.m, state.n], axis=1)

        B, _, _, H, K = x.shape  # of the device's shard
        state = slstm_init(B, H, K, dtype) if state is None else state
        state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
        carry = vary_like((state, jnp.zeros_like(state.m)), (x, r, b, flags))
        return scan_time(step, carry, x, **flags._asdict())[0]

    state_axes = SLSTMState._make(["B H K"] * 4)
    axes = ("B T G H K", "H K G J", "H G K", state_axes, FLAG_AXES)
    sizes = {"B": x.shape[0], "H": x.shape[3]}
    trace = map_shards(local, (x, r, b, state, flags), axes, "B T G H K", sizes)
    return _named(trace, "i f z o log_f_sum m normalizer")


def _log_forget(f: Array, forget_gate: str) -> Array:
    return f if forget_gate == "exp" else log_sigmoid(f)


def _named(trace: Float[Array, "B T G ..."], names: str) -> dict[str, Array]:
    return {name: trace[:, :, n] for n, name in enumerate(names.split())}
