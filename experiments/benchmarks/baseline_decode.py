"""Time per token and bytes of state of a decoding step, by the length of the context.

The state of a context is filled with random numbers, not by a prefill: its values do not change the
time. Weights are prepared as for generation, and the state is donated.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import measure
from xlstm_jax.generate import prepare_params
from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.modules.stack import unstack_layers

CONTEXTS = tuple(4**n for n in range(3, 9))  # 64 to 65,536
TOKENS = 20  # in a timed call


def with_context(cfg: LMConfig, context: int) -> LMConfig:
    """The model with a cache of this many positions in its blocks with full attention."""
    attention = dataclasses.replace(cfg.attention, cache_size=context)
    return dataclasses.replace(cfg, attention=attention)


def filled_state(cfg: LMConfig, context: int) -> Any:
    """The state of every layer after a context, with random values."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):  # positions so far: the cache is full
            return jnp.full(leaf.shape, context - 1, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    layers = jax.eval_shape(lambda: unstack_layers(cfg.pattern, LM(cfg).init_state(1)))
    return jax.tree.map(fill, layers)


def state_bytes(state: Any) -> int:
    """Bytes of the state of all layers."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def decoder(cfg: LMConfig, variables: Any, state: Any) -> Callable[[], jax.Array]:
    """A function that decodes `TOKENS` more tokens greedily and returns the last one."""
    model = LM(cfg)

    def step(_, carry):
        token, state = carry
        logits, state = model.apply(variables, token[:, None], state=state)
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), state

    # One program for all tokens, so that dispatch takes no time; the loop updates states in place.
    tokens = jax.jit(lambda carry: jax.lax.fori_loop(0, TOKENS, step, carry), donate_argnums=0)
    carry = jnp.zeros(1, jnp.int32), state

    def advance() -> jax.Array:
        nonlocal carry
        carry = tokens(carry)
        return jnp.copy(carry[0])  # the next call donates it

    return advance


def run(name: str, cfg: LMConfig, contexts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A record for every context: seconds of a token, bytes of the state and of the weights."""
    variables = LM(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    variables = prepare_params(LM(cfg), variables)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    records = []
    for context in contexts:
        sized = with_context(cfg, context)
        state = filled_state(sized, context)
        size = state_bytes(state)
        advance = decoder(sized, variables, state)
        measure.seconds(advance, 1)  # compiles
        times = [seconds / TOKENS for seconds in measure.seconds(advance, repeats)]
        record = {"context": context, "state_bytes": size, "weight_bytes": weights}
        records.append(record | measure.summary(times))
        median = records[-1]["median_seconds"]
        print(
            f"{name}, context {context:,}: {1e3 * median:.2f} ms a token, {size:,} bytes",
            flush=True,
        )
    return records
