"""Measures what a train step costs with NNX: transforms of Flax, split and merge, and linen.

    python experiments/benchmarks/nnx_step.py --out RESULT.json

The model is so small that the time per step is that of its arguments. All steps compute the same;
they alternate, a few at a time, so that other load affects all alike.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.benchmarks import measure
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.nnx import from_nnx, to_nnx

CFG = LMConfig(
    vocab_size=16,
    dim=16,
    pattern="ms",
    mlstm=MLSTMConfig(num_heads=2),
    slstm=SLSTMConfig(num_heads=2),
)
TOKENS = jnp.ones((1, 1), jnp.int32)
TX = optax.adamw(1e-3)


def loss_of(logits: jax.Array) -> jax.Array:
    """Cross-entropy of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()


def update(model: nnx.Module, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One step of the usual NNX train loop."""
    loss, grads = nnx.value_and_grad(lambda model: loss_of(model(tokens)[0]))(model)
    optimizer.update(model, grads)
    return loss


def nnx_step(*, cached: bool) -> Callable[[], Any]:
    """The step under `nnx.jit`, called with the model or with `nnx.cached_partial`."""
    model = to_nnx(CFG)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    bind = nnx.cached_partial if cached else functools.partial
    step = bind(nnx.jit(update), model, optimizer)
    return lambda: step(TOKENS)


def split_step() -> Callable[[], Any]:
    """The step under `jax.jit`, which merges and splits model and optimizer inside."""
    model = to_nnx(CFG)
    graph, state = nnx.split((model, nnx.Optimizer(model, TX, wrt=nnx.Param)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        nodes = nnx.merge(graph, state)
        loss = update(*nodes, tokens)
        return nnx.state(nodes), loss

    return repeated(step, state)


def linen_step() -> Callable[[], Any]:
    """The step on trees of arrays, without NNX."""
    params = from_nnx(to_nnx(CFG))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        params, moments = state
        apply = lambda params: loss_of(LM(CFG).apply({"params": params}, tokens)[0])  # noqa: E731
        loss, grads = jax.value_and_grad(apply)(params)
        updates, moments = TX.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    return repeated(step, (params, TX.init(params)))


def repeated(step: Callable[..., Any], state: Any) -> Callable[[], Any]:
    """A call without arguments, which continues from the state of the last one."""

    def call():
        nonlocal state
        state, loss = step(state, TOKENS)
        return loss

    return call


STEPS = {
    "linen, jax.jit": linen_step,
    "split and merge in jax.jit": split_step,
    "nnx.jit with nnx.cached_partial": functools.partial(nnx_step, cached=True),
    "nnx.jit": functools.partial(nnx_step, cached=False),
}


def main(args: measure.TimedArguments) -> int:
    """Times all steps and writes one result."""
    timers = {name: functools.partial(measure.seconds, make()) for name, make in STEPS.items()}
    for timer in timers.values():
        timer(3)
    times = measure.interleaved(timers, args.repeats)
    result = {name: measure.summary(times[name]) for name in STEPS}
    for name, record in result.items():
        print(f"{name}: {1e3 * record['median_seconds']:.2f} ms")
    measure.write(args.out, {**measure.run_info("nnx_step"), **result})
    return 0


if __name__ == "__main__":
    measure.run(main, measure.TimedArguments, __doc__)
