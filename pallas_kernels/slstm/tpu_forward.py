"""The sLSTM over a sequence as one TPU kernel; the weights of a head are fetched once.

Time is the last axis of the grid, and the block of weights does not depend on it. The memory is
carried in the block of the final state, which stays on the chip until its program is through.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tpu
from pallas_kernels.common import NEG
from pallas_kernels.slstm import cost, tpu_packed
from pallas_kernels.slstm.options import MASKED, RESET, Forward, Inputs, Options


def slstm_forward(options: Options, args: Inputs, *, save: bool) -> Forward:
    """All steps, in sizes that are multiples of their blocks.

    Args:
        args: x `T H B 4K`, the gates i, f, z, o one after the other; packed weights `H terms K/2
            4K`; b `H 4K`; c, n, h and m before the first step `4 H B K`; flags `T B lanes`, the
            same in every lane.
        save: also return what the gradient needs.

    Returns h after each step `T H B K` in the dtype of x (also where a step is masked: the h of the
    state), the state after the last step `4 H B K`; with `save` h (in the dtype of x), c, n and m
    as each step sees them, `T H B K`, and if they are saved the gates `T H B 4K` in float32.
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
    operands = [("time", x), ("weights", words), ("bias", b[:, None]), ("state", first)]
    h, last, *saved = call(
        options,
        _body,
        [*operands, ("flags", flags)],
        results,
        estimate=cost.forward,
        name="slstm_forward",
    )
    if not save:
        return Forward(h, last, None, None, None)
    return Forward(h, last, saved[0], tuple(saved[1:4]), saved[4] if options.save_gates else None)


def call(options: Options, body, operands, results, *, estimate, name: str, backwards=False):
    """Results of a kernel over groups of heads, parts of the batch and blocks of time, in order.

    Args:
        operands, results: pairs of a kind and an array or its shape: "time" `T H B width`, "state"
            `4 H B K`, "weights" and "bias" `H ...`, and last of the operands "flags", or None.
        backwards: from the last block of time to the first.
    """
    blocks = options.tile.blocks
    operands = [(kind, x) for kind, x in operands if x is not None]
    T, H, B, width = operands[0][1].shape
    last_block = T // blocks.steps - 1

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
            compiler_params=tpu.compiler_params(tpu.IN_ORDER, options.tile.vmem_bytes),
            cost_estimate=estimate(T * H * B * K, K, gate, (*arrays, *shapes)),
            interpret=options.interpret,
            name=name,
        )(*arrays)
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


def _body(x, words, bias, first, *refs, unroll, forget_gate, flagged):
    flags, (h_out, last, *saved) = (refs[0], refs[1:]) if flagged else (None, refs)
    steps, heads, _, K = h_out.shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        last[...] = first[...]

    def advance(t, head, state):
        reset, masked = (None, None) if flags is None else read_flags(flags[t], K)
        c, n, h, m = state if reset is None else [jnp.where(reset, 0.0, leaf) for leaf in state]
        gates = x[t, head].astype(jnp.float32) + bias[head] + tpu_packed.times(h, words[head])
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
