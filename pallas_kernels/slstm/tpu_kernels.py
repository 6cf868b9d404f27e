"""sLSTM over a sequence: one TPU kernel for the forward pass, one for the backward pass.

Time is the last axis of the grid. The index map of the weights does not depend on it, so a group of
heads fetches them once. The carry lives in the output block of the final state, which stays in VMEM
until the last step. The backward pass runs from the last step to the first: a step multiplies the
gradients of its gates by the transposed weights; everything else is recomputed from the gates and
the state before the step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tpu
from pallas_kernels.common import NEG
from pallas_kernels.slstm.options import MASKED, RESET, Forward, Inputs, Options


def forward(options: Options, args: Inputs, *, save: bool) -> Forward:
    """`slstm_forward` with unpacked weights."""
    packed = tpu.pack_weights(args.r.astype(args.x.dtype))
    return slstm_forward(options, args._replace(r=packed), save=save)


def backward(options: Options, gates, r, *rest) -> tuple[jax.Array, ...]:
    """`slstm_backward` with unpacked weights."""
    return slstm_backward(options, gates, tpu.pack_weights(jnp.swapaxes(r, 1, 2)), *rest)


def slstm_forward(options: Options, args: Inputs, *, save: bool) -> Forward:
    """The forward pass over all steps; sizes are multiples of the block sizes.

    Args:
        args: as `tpu_layout.pad` returns them, except for packed weights `H terms K/2 4K`.
        save: also return the residuals of the backward pass.

    Returns h after each step `T H B K` (that of the carry where a step is masked) and the state
    after the last step `4 H B K`; with `save` also h, c, n and m before each step, `T H B K`, and
    with `options.save_gates` the gates `T H B 4K`.
    """
    x, packed, b, initial, flags = args
    T, H, B, width = x.shape
    shape = jax.ShapeDtypeStruct
    h, float32 = (shape((T, H, B, width // 4), dtype) for dtype in (x.dtype, jnp.float32))
    results = [("time", h), ("state", shape(initial.shape, jnp.float32))]
    if save:
        results += [("time", h), *[("time", float32)] * 3]
    if save and options.save_gates:
        results.append(("time", shape(x.shape, jnp.float32)))
    operands = [
        ("time", x),
        ("weights", packed),
        ("bias", b[:, None]),
        ("state", initial),
        ("flags", flags),
    ]
    h, final, *saved = _call(options, _forward_body, operands, results, name="slstm_forward")
    if not save:
        return Forward(h, final, None, None, None)
    return Forward(h, final, saved[0], tuple(saved[1:4]), saved[4] if options.save_gates else None)


def slstm_backward(
    options: Options, gates, packed, cnm, dh, dfinal, flags
) -> tuple[jax.Array, ...]:
    """The backward pass over all steps; sizes are multiples of the block sizes.

    Args:
        gates, cnm: as `slstm_forward` saves them.
        packed: transposed recurrent weights, packed, `H terms 2K K`.
        dh: gradient of h after each step, `T H B K`.
        dfinal: gradients of c, n and h after the last step, and rho, `4 H B K` in float32. rho is
            the gradient of m at a fixed unscaled state (c e^m, n e^m).

    Returns the gradient of x `T H B 4K` in the dtype of dh, 0 where a step is masked; and dc, dn,
    dh and rho before the first step, `4 H B K`.
    """
    shape = jax.ShapeDtypeStruct
    operands = [("time", gates), ("weights", packed), *[("time", x) for x in (*cnm, dh)]]
    operands += [("state", dfinal), ("flags", flags)]
    results = [("time", shape(gates.shape, dh.dtype)), ("state", shape(dfinal.shape, jnp.float32))]
    return _call(options, _backward_body, operands, results, name="slstm_backward")


def _call(options: Options, body, operands, results, *, name: str) -> tuple[jax.Array, ...]:
    """Calls a kernel on the grid (blocks of heads, of the batch, of time).

    `operands` and `results` are pairs of a kind and an array or its shape: "time" `T H B width`,
    "state" `4 H B K`, "weights" and "bias" `H ...`. The last operand is "flags", maybe None.
    """
    blocks = options.tile.blocks
    operands = [(kind, x) for kind, x in operands if x is not None]
    T, H, B, width = operands[0][1].shape
    last_block = T // blocks.steps - 1
    backwards = name == "slstm_backward"

    def spec(kind, x):
        time_block = lambda t: last_block - t if backwards else t  # noqa: E731
        if kind == "time":
            shape = (blocks.steps, blocks.heads, blocks.sequences, x.shape[-1])
            return pl.BlockSpec(shape, lambda h, b, t: (time_block(t), h, b, 0))
        if kind == "state":
            shape = (4, blocks.heads, blocks.sequences, x.shape[-1])
            return pl.BlockSpec(shape, lambda h, b, t: (0, h, b, 0))
        if kind == "flags":
            shape = (blocks.steps, blocks.sequences, x.shape[-1])
            return pl.BlockSpec(shape, lambda h, b, t: (time_block(t), b, 0))
        shape, mode = (blocks.heads, *x.shape[1:]), None
        if kind == "weights":  # single-buffered: they change only with the heads
            mode = pl.Buffered(1)
        index = lambda h, b, t: (h, *[0] * (x.ndim - 1))  # noqa: E731
        return pl.BlockSpec(shape, index, pipeline_mode=mode)

    arrays, shapes = ([x for _, x in pairs] for pairs in (operands, results))
    flagged = operands[-1][0] == "flags"
    gate, K = options.forget_gate, width // 4
    body = functools.partial(body, unroll=blocks.unroll, forget_gate=gate, flagged=flagged)
    return tuple(
        pl.pallas_call(
            body,
            grid=(H // blocks.heads, B // blocks.sequences, T // blocks.steps),
            in_specs=[spec(*pair) for pair in operands],
            out_specs=[spec(*pair) for pair in results],
            out_shape=shapes,
            compiler_params=tpu.compiler_params(tpu.DIMENSION_SEMANTICS, options.tile.vmem_bytes),
            cost_estimate=cost(name, T * H * B * K, K, gate, (*arrays, *shapes)),
            interpret=options.interpret,
            name=name,
        )(*arrays)
    )


def cost(name: str, elements: int, K: int, forget_gate: str, arrays) -> pl.CostEstimate:
    """The cost of computing `elements` elements of h, for XLA's scheduler.

    A step of a head multiplies `K` by `K 4K`, forward and backward; the rest is elementwise. Each
    array moves once between HBM and VMEM.
    """
    elementwise, exponentials, sigmoids = (60, 5, 3) if name == "slstm_backward" else (20, 4, 2)
    exponentials += sigmoids if forget_gate == "sigmoid" else 0
    return pl.CostEstimate(
        flops=elements * (8 * K + elementwise),
        transcendentals=elements * exponentials,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
    )


def read_flags(flags: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The reset and the masked flags of `B lanes`, broadcast to `B width`."""
    flags = jnp.concatenate([flags] * (width // flags.shape[-1]), axis=1)
    return flags & RESET != 0, flags & MASKED != 0


def log_forget(f: jax.Array, forget_gate: str) -> jax.Array:
    """Log of the forget gate, from its pre-activation f."""
    if forget_gate == "exp":
        return f
    return jnp.minimum(f, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(f)))


def stabilize(i: jax.Array, log_f: jax.Array, n: jax.Array, m: jax.Array) -> tuple[jax.Array, ...]:
    """Stabilized forget and input gates, the new m, and whether m comes from the carry.

    Where nothing has been written yet (n = 0), the old m is ignored.
    """
    log_carry = jnp.where(n == 0.0, -jnp.inf, log_f + m)
    m = jnp.maximum(jnp.maximum(log_carry, i), NEG)  # never -inf, as -inf - -inf is NaN
    return jnp.exp(log_carry - m), jnp.exp(i - m), m, log_carry >= i


def cell_forward(gates: jax.Array, c: jax.Array, n: jax.Array, m: jax.Array, forget_gate: str):
    """c, n, h and m after a step, from the gates `B 4K` and the previous state."""
    i, f, z, o = split_gates(gates)
    f_scaled, i_scaled, m, _ = stabilize(i, log_forget(f, forget_gate), n, m)
    c = f_scaled * c + i_scaled * jnp.tanh(z)
    n = f_scaled * n + i_scaled
    # sigmoid(o) c / n with one division; if exp(-o) overflows, the result is 0, as it should be.
    # n is 0 as long as all input gates were 0; c and h are 0 then.
    return c, n, c / (jnp.where(n == 0.0, 1.0, n) * (1.0 + jnp.exp(-o))), m


def split_gates(gates: jax.Array) -> list[jax.Array]:
    """i, f, z and o from `B 4K`."""
    K = gates.shape[-1] // 4
    return [gates[..., g * K : (g + 1) * K] for g in range(4)]


def _forward_body(x, packed, bias, initial, *refs, unroll, forget_gate, flagged):
    flags, (h_out, carry, *saved) = (refs[0], refs[1:]) if flagged else (None, refs)
    steps, heads, _, K = h_out.shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = initial[...]

    def forward_step(t, head, state):
        reset, masked = (None, None) if flags is None else read_flags(flags[t], K)
        c, n, h, m = state if reset is None else [jnp.where(reset, 0.0, leaf) for leaf in state]
        gates = x[t, head].astype(jnp.float32) + bias[head] + tpu.packed_matmul(h, packed[head])
        # `saved` has no refs without `save`, and none for gates without `save_gates`.
        for ref, value in zip(saved, (h, c, n, m, gates), strict=False):
            ref[t, head] = value.astype(ref.dtype)
        new = cell_forward(gates, c, n, m, forget_gate)
        if masked is not None:
            new = [jnp.where(masked, old, leaf) for old, leaf in zip(state, new, strict=True)]
        h_out[t, head] = new[2].astype(h_out.dtype)
        return new

    @pl.loop(0, steps // unroll)
    def _(iteration):
        states = [[carry[leaf, head] for leaf in range(4)] for head in range(heads)]
        for offset in range(unroll):
            t = iteration * unroll + offset
            # Heads are independent: the scheduler overlaps their chains of dependent operations.
            states = [forward_step(t, head, states[head]) for head in range(heads)]
        for head in range(heads):
            for leaf in range(4):
                carry[leaf, head] = states[head][leaf]


def _cell_backward(gates, cnm, dh, carry, forget_gate):
    """Gradients of the gates `B 4K`, and dc, dn and rho before the step, from those after it.

    m only rescales c and n, so it is treated as a constant here; `rho` follows the maximum from the
    last m back to the input gate that set it.
    """
    c, n, m = cnm
    dc, dn, rho = carry
    i, f, z, o = split_gates(gates)
    log_f = log_forget(f, forget_gate)
    f_scaled, i_scaled, _, from_carry = stabilize(i, log_f, n, m)
    z, o = jnp.tanh(z), jax.nn.sigmoid(o)
    n_after = f_scaled * n + i_scaled
    inverse = 1.0 / jnp.where(n_after == 0.0, 1.0, n_after)
    ratio = (f_scaled * c + i_scaled * z) * inverse
    weighted = dh * o * inverse
    dc = dc + weighted
    dn = dn - weighted * ratio
    rho_carry = jnp.where(from_carry, rho, 0.0)
    di = i_scaled * (dc * z + dn) + (rho - rho_carry)
    df = f_scaled * (dc * c + dn * n) + rho_carry
    if forget_gate == "sigmoid":
        df = df * jax.nn.sigmoid(-f)
    dz = i_scaled * dc * (1.0 - z * z)
    do = dh * ratio * o * (1.0 - o)
    return jnp.concatenate([di, df, dz, do], axis=1), (f_scaled * dc, f_scaled * dn, rho_carry)


def _backward_body(gates, packed, c, n, m, dh, dfinal, *refs, unroll, forget_gate, flagged):
    flags, (dx, dcarry) = (refs[0], refs[1:]) if flagged else (None, refs)
    steps, heads, _, K = dh.shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        dcarry[...] = dfinal[...]

    def backward_step(t, head, carry):
        dc, dn, dh_next, rho = carry
        cnm = (c[t, head], n[t, head], m[t, head])
        dh_total = dh[t, head].astype(jnp.float32) + dh_next
        dgates, (dc, dn, rho) = _cell_backward(
            gates[t, head], cnm, dh_total, (dc, dn, rho), forget_gate
        )
        if flags is not None:
            dgates = jnp.where(read_flags(flags[t], 4 * K)[1], 0.0, dgates)
        dx[t, head] = dgates.astype(dx.dtype)
        new = (dc, dn, tpu.packed_matmul(dgates, packed[head]), rho)
        if flags is not None:
            reset, masked = read_flags(flags[t], K)
            # After a reset the forget gate is 0, so dc and dn are 0 already; dh is not.
            new = (new[0], new[1], jnp.where(reset, 0.0, new[2]), new[3])
            new = [jnp.where(masked, old, leaf) for old, leaf in zip(carry, new, strict=True)]
        return new

    @pl.loop(0, steps // unroll)
    def _(iteration):
        carries = [[dcarry[leaf, head] for leaf in range(4)] for head in range(heads)]
        for offset in range(unroll):
            t = steps - 1 - (iteration * unroll + offset)
            carries = [backward_step(t, head, carries[head]) for head in range(heads)]
        for head in range(heads):
            for leaf in range(4):
                dcarry[leaf, head] = carries[head][leaf]
