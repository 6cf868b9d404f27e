"""The gradient of the sLSTM over a sequence as one TPU kernel, from the last step to the first.

A step multiplies its gradients of the gates with the transposed weights, which stay on the chip.
Everything else it needs follows from the gates and from the memory before the step.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.slstm import cost, tpu_forward, tpu_packed
from pallas_kernels.slstm.options import Options


def slstm_backward(
    options: Options,
    gates: jax.Array,
    words: jax.Array,
    seen: tuple[jax.Array, jax.Array, jax.Array],
    dh: jax.Array,
    dlast: jax.Array,
    flags: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Gradients of all steps, in sizes that are multiples of their blocks.

    Args:
        gates: pre-activations with the recurrent part, `T H B 4K` in float32.
        words: transposed recurrent weights, packed, `H terms 2K K`.
        seen: c, n and m as each step sees them, `T H B K` in float32.
        dh: gradient of h after each step, `T H B K` in the dtype of x.
        dlast: gradients of c, n and h after the last step, and rho, `4 H B K` in float32. rho is
            what a loss on the stored m is worth beyond a rescaling of c and n.
        flags: `T B lanes`, or None.

    Returns the gradient of x `T H B 4K` in the dtype of dh, 0 where a step is masked, and those of
    c, n and h before the first step with what is left of rho, `4 H B K`.
    """
    shape = jax.ShapeDtypeStruct
    operands = [("time", gates), ("weights", words), *[("time", x) for x in (*seen, dh)]]
    return tpu_forward.call(
        options,
        _body,
        [*operands, ("state", dlast), ("flags", flags)],
        [("time", shape(gates.shape, dh.dtype)), ("state", shape(dlast.shape, jnp.float32))],
        estimate=cost.backward,
        name="slstm_backward",
        backwards=True,
    )


def _gradients(gates, seen, dh, carry, forget_gate):
    """Gradients of the gates `B 4K`, and of c, n and m's path before a step, from those after it.

    m is a gauge of c and n, so it is held constant here; `rho` follows the path of the maximum from
    the last m back to the input gate that made it.
    """
    c, n, m = seen
    dc, dn, rho = carry
    i, f, z, o = tpu_forward.split_gates(gates)
    log_f = tpu_forward.log_forget(f, forget_gate)
    f_scaled, i_scaled, _, from_old = tpu_forward.scales(i, log_f, n, m)
    z, o = jnp.tanh(z), jax.nn.sigmoid(o)
    inverse = 1.0 / (f_scaled * n + i_scaled)
    ratio = (f_scaled * c + i_scaled * z) * inverse
    weighted = dh * o * inverse
    dc = dc + weighted
    dn = dn - weighted * ratio
    kept = jnp.where(from_old, rho, 0.0)
    di = i_scaled * (dc * z + dn) + (rho - kept)
    df = f_scaled * (dc * c + dn * n) + kept
    if forget_gate == "sigmoid":
        df = df * jax.nn.sigmoid(-f)
    dz = i_scaled * dc * (1.0 - z * z)
    do = dh * ratio * o * (1.0 - o)
    return jnp.concatenate([di, df, dz, do], axis=1), (f_scaled * dc, f_scaled * dn, kept)


def _body(gates, words, c, n, m, dh, dlast, *refs, unroll, forget_gate, flagged):
    flags, (dx, dfirst) = (refs[0], refs[1:]) if flagged else (None, refs)
    steps, heads, _, K = dh.shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        dfirst[...] = dlast[...]

    def retreat(t, head, carry):
        dc, dn, dh_next, rho = carry
        seen = (c[t, head], n[t, head], m[t, head])
        total = dh[t, head].astype(jnp.float32) + dh_next
        dgates, (dc, dn, rho) = _gradients(gates[t, head], seen, total, (dc, dn, rho), forget_gate)
        if flags is not None:
            dgates = jnp.where(tpu_forward.read_flags(flags[t], 4 * K)[1], 0.0, dgates)
        dx[t, head] = dgates.astype(dx.dtype)
        new = (dc, dn, tpu_packed.times(dgates, words[head]), rho)
        if flags is not None:
            reset, masked = tpu_forward.read_flags(flags[t], K)
            # The forget factor is 0 after a reset, so only h is left to be cut off.
            new = (new[0], new[1], jnp.where(reset, 0.0, new[2]), new[3])
            new = [jnp.where(masked, old, leaf) for old, leaf in zip(carry, new, strict=True)]
        return new

    @pl.loop(0, steps // unroll)
    def _(turn):
        carries = [[dfirst[leaf, head] for leaf in range(4)] for head in range(heads)]
        for part in range(unroll):
            t = steps - 1 - (turn * unroll + part)
            carries = [retreat(t, head, carries[head]) for head in range(heads)]
        for head in range(heads):
            for leaf in range(4):
                dfirst[leaf, head] = carries[head][leaf]
