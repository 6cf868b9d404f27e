"""The sLSTM over a sequence as one TPU kernel, and its gradient as another.

Time is the last axis of the grid. The block of a head's weights does not depend on it, so they are
fetched once. The state is carried in the block of the final state, which stays on the chip until
its program is through. The backward pass goes from the last step to the first: a step multiplies
its gradients of the gates with the transposed weights; everything else it needs follows from the
gates and from the state before the step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tpu
from pallas_kernels.common import NEG
from pallas_kernels.slstm.options import MASKED, RESET, Forward, Inputs, Options


def forward(options: Options, args: Inputs, *, save: bool) -> Forward:
    """`slstm_forward` of unpacked weights."""
    words = tpu.pack_weights(args.r.astype(args.x.dtype))
    return slstm_forward(options, args._replace(r=words), save=save)


def backward(options: Options, gates, r, *rest) -> tuple[jax.Array, ...]:
    """`slstm_backward` of unpacked weights."""
    return slstm_backward(options, gates, tpu.pack_weights(jnp.swapaxes(r, 1, 2)), *rest)


def slstm_forward(options: Options, args: Inputs, *, save: bool) -> Forward:
    """All steps, in sizes that are multiples of their blocks.

    Args:
        args: as `tpu_layout.pad` returns them, but for packed weights `H terms K/2 4K`.
        save: also return what the gradient needs.

    Returns h after each step `T H B K` (also where a step is masked: the h of the state), the state
    after the last step `4 H B K`; with `save` h, c, n and m as each step sees them, `T H B K`, and
    if they are saved the gates `T H B 4K`.
    """
    x, words, b, first, flags = args
    T, H, B, width = x.shape
    shape = jax.ShapeDtypeStruct
    h, float32 = (shape((T, H, B, width // 4), dtype) for dtype in (x.dtype, jnp.float32))
    results = [("time", h), ("state", shape(first.shape, jnp.float32))]
    if save:
        results += [("time", h), *[("time", float32)] * 3]
    if save and options.save_gates:
        results.append(("time", shape(x.shape, jnp.float32)))
    operands = [
        ("time", x),
        ("weights", words),
        ("bias", b[:, None]),
        ("state", first),
        ("flags", flags),
    ]
    h, last, *saved = _call(options, _forward_body, operands, results, name="slstm_forward")
    if not save:
        return Forward(h, last, None, None, None)
    return Forward(h, last, saved[0], tuple(saved[1:4]), saved[4] if options.save_gates else None)


def slstm_backward(options: Options, gates, words, seen, dh, dlast, flags) -> tuple[jax.Array, ...]:
    """Gradients of all steps, in sizes that are multiples of their blocks.

    Args:
        gates, seen: as `slstm_forward` saves them.
        words: transposed recurrent weights, packed, `H terms 2K K`.
        dh: gradient of h after each step, `T H B K`.
        dlast: gradients of c, n and h after the last step, and rho, `4 H B K` in float32. rho is
            what a loss on the stored m is worth beyond a rescaling of c and n.

    Returns the gradient of x `T H B 4K` in the dtype of dh, 0 where a step is masked, and those of
    c, n and h before the first step with what is left of rho, `4 H B K`.
    """
    shape = jax.ShapeDtypeStruct
    operands = [("time", gates), ("weights", words), *[("time", x) for x in (*seen, dh)]]
    operands += [("state", dlast), ("flags", flags)]
    results = [("time", shape(gates.shape, dh.dtype)), ("state", shape(dlast.shape, jnp.float32))]
    return _call(options, _backward_body, operands, results, name="slstm_backward")


def _call(options: Options, body, operands, results, *, name: str) -> tuple[jax.Array, ...]:
    """Results of a kernel over groups of heads, parts of the batch and blocks of time, in order.

    `operands` and `results` are pairs of a kind and an array or its shape: "time" `T H B width`,
    "state" `4 H B K`, "weights" and "bias" `H ...`, and last of the operands "flags", or None.
    """
    blocks = options.tile.blocks
    operands = [(kind, x) for kind, x in operands if x is not None]
    T, H, B, width = operands[0][1].shape
    last_block = T // blocks.steps - 1
    backwards = name == "slstm_backward"

    def spec(kind, x):
        at = lambda t: last_block - t if backwards else t  # noqa: E731
        if kind == "time":
            shape = (blocks.steps, blocks.heads, blocks.rows, x.shape[-1])
            return pl.BlockSpec(shape, lambda h, b, t: (at(t), h, b, 0))
        if kind == "state":
            shape = (4, blocks.heads, blocks.rows, x.shape[-1])
            return pl.BlockSpec(shape, lambda h, b, t: (0, h, b, 0))
        if kind == "flags":
            shape = (blocks.steps, blocks.rows, x.shape[-1])
            return pl.BlockSpec(shape, lambda h, b, t: (at(t), b, 0))
        shape, mode = (blocks.heads, *x.shape[1:]), None
        if kind == "weights":  # one buffer, as they change only with the heads
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
            grid=(H // blocks.heads, B // blocks.rows, T // blocks.steps),
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
    """Of `elements` numbers of h, for XLA's scheduler; `arrays` are each moved once.

    A step of a head multiplies `K` by `K 4K`, forward and backward; what is left is a count of what
    is done to single numbers.
    """
    others, exponentials, sigmoids = (60, 5, 3) if name == "slstm_backward" else (20, 4, 2)
    exponentials += sigmoids if forget_gate == "sigmoid" else 0
    return pl.CostEstimate(
        flops=elements * (8 * K + others),
        transcendentals=elements * exponentials,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
    )


def read_flags(flags: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Whether each element of `B width` is reset and whether it is masked, from `B lanes`."""
    wide = jnp.concatenate([flags] * (width // flags.shape[-1]), axis=1)
    return wide & RESET != 0, wide & MASKED != 0


def log_forget(f: jax.Array, forget_gate: str) -> jax.Array:
    """log of the factor that f becomes."""
    if forget_gate == "exp":
        return f
    return jnp.minimum(f, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(f)))


def scales(i: jax.Array, log_f: jax.Array, n: jax.Array, m: jax.Array) -> tuple[jax.Array, ...]:
    """The factors of old and new memory, the new log-scale, and whether it came from the old one.

    Where nothing is stored yet (n = 0) the old scale does not count.
    """
    kept = jnp.where(n == 0.0, NEG, log_f + m)
    difference = kept - i
    from_old = difference >= 0.0
    # One of the two factors is exp(0).
    smaller = jnp.exp(-jnp.abs(difference))
    f_scaled = jnp.where(from_old, 1.0, smaller)
    i_scaled = jnp.where(from_old, smaller, 1.0)
    return f_scaled, i_scaled, jnp.maximum(kept, i), from_old


def step(gates: jax.Array, c: jax.Array, n: jax.Array, m: jax.Array, forget_gate: str):
    """c, n, h and m after a step, from `B 4K` gates and the memory before."""
    i, f, z, o = split_gates(gates)
    f_scaled, i_scaled, m, _ = scales(i, log_forget(f, forget_gate), n, m)
    c = f_scaled * c + i_scaled * jnp.tanh(z)
    n = f_scaled * n + i_scaled
    # sigmoid(o) c / n with one division; where exp(-o) overflows the quotient is 0, as it should.
    return c, n, c / (n * (1.0 + jnp.exp(-o))), m


def split_gates(gates: jax.Array) -> list[jax.Array]:
    """i, f, z and o out of `B 4K`."""
    K = gates.shape[-1] // 4
    return [gates[..., g * K : (g + 1) * K] for g in range(4)]


def _forward_body(x, words, bias, first, *refs, unroll, forget_gate, flagged):
    flags, (h_out, last, *saved) = (refs[0], refs[1:]) if flagged else (None, refs)
    steps, heads, _, K = h_out.shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        last[...] = first[...]

    def advance(t, head, state):
        reset, masked = (None, None) if flags is None else read_flags(flags[t], K)
        c, n, h, m = state if reset is None else [jnp.where(reset, 0.0, leaf) for leaf in state]
        gates = x[t, head].astype(jnp.float32) + bias[head] + tpu.packed_matmul(h, words[head])
        for ref, value in zip(saved, (h, c, n, m, gates), strict=False):
            ref[t, head] = value.astype(ref.dtype)
        new = step(gates, c, n, m, forget_gate)
        if masked is not None:
            new = [jnp.where(masked, old, leaf) for old, leaf in zip(state, new, strict=True)]
        h_out[t, head] = new[2].astype(h_out.dtype)
        return new

    @pl.loop(0, steps // unroll)
    def _(turn):
        states = [[last[leaf, head] for leaf in range(4)] for head in range(heads)]
        for part in range(unroll):
            t = turn * unroll + part
            states = [advance(t, head, states[head]) for head in range(heads)]
        for head in range(heads):
            for leaf in range(4):
                last[leaf, head] = states[head][leaf]


def _gradients(gates, seen, dh, carry, forget_gate):
    """Gradients of the gates `B 4K`, and of c, n and m's path before a step, from those after it.

    m is a gauge of c and n, so it is held constant here; `rho` follows the path of the maximum from
    the last m back to the input gate that made it.
    """
    c, n, m = seen
    dc, dn, rho = carry
    i, f, z, o = split_gates(gates)
    log_f = log_forget(f, forget_gate)
    f_scaled, i_scaled, _, from_old = scales(i, log_f, n, m)
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


def _backward_body(gates, words, c, n, m, dh, dlast, *refs, unroll, forget_gate, flagged):
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
            dgates = jnp.where(read_flags(flags[t], 4 * K)[1], 0.0, dgates)
        dx[t, head] = dgates.astype(dx.dtype)
        new = (dc, dn, tpu.packed_matmul(dgates, words[head]), rho)
        if flags is not None:
            reset, masked = read_flags(flags[t], K)
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
