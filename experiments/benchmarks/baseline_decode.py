"""Time per token and bytes of state of a decoding step, by the length of the context.

The state of a context is filled with random numbers, not by a prefill: its values do not change the
time. Blocks are applied one by one to states that are donated, so that no state is copied.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import measure
from xlstm_jax.modules import BLOCKS, LM, LayerNorm, LMConfig, lm_logits
from xlstm_jax.modules.lm import final_norm
from xlstm_jax.ops.embed import embed

CONTEXTS = tuple(4**n for n in range(3, 9))  # 64 to 65,536
TOKENS = 20  # in a timed call


def with_context(cfg: LMConfig, context: int) -> LMConfig:
    """The model with a cache of this many positions in its blocks with full attention."""
    attention = dataclasses.replace(cfg.attention, cache_size=context)
    return dataclasses.replace(cfg, attention=attention)


def filled_states(cfg: LMConfig, context: int) -> list[Any]:
    """The state of every block after a context, with random values."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):  # positions so far: the cache is full
            return jnp.full(leaf.shape, context - 1, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    blocks = [BLOCKS[letter].block(cfg, parent=None) for letter in cfg.pattern]
    return [jax.tree.map(fill, block.init_state(1)) for block in blocks]


def state_bytes(states: list[Any]) -> int:
    """Bytes of all states."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(states))


def unstacked(cfg: LMConfig, params: Any) -> list[Any]:
    """The parameters of every block, in the order of the pattern."""
    ranks = [cfg.pattern[:n].count(letter) for n, letter in enumerate(cfg.pattern)]
    return [
        jax.tree.map(operator.itemgetter(rank), params["stack"][letter])
        for letter, rank in zip(cfg.pattern, ranks, strict=True)
    ]


def decoder(cfg: LMConfig, params: Any, states: list[Any]) -> Callable[[], jax.Array]:
    """A function that decodes `TOKENS` more tokens greedily and returns the last one."""
    blocks = unstacked(cfg, params)
    shared = {name: tree for name, tree in params.items() if name != "stack"}
    modules = [BLOCKS[letter].block(cfg, parent=None) for letter in cfg.pattern]

    def step(_, carry):
        token, states = carry
        x = embed(token[:, None], shared["token_embedding"]["embedding"])
        if cfg.embedding_norm != "none":
            norm = LayerNorm(cfg.final_norm_eps, use_bias=True, as_offset=False, parent=None)
            x = norm.apply({"params": shared["embedding_norm"]}, x)
        new = []
        for module, block, state in zip(modules, blocks, states, strict=True):
            x, state = module.apply({"params": block}, x, state)
            new.append(state)
        hidden: Any = final_norm(cfg, parent=None).apply({"params": shared["out_norm"]}, x)
        logits = lm_logits(cfg, shared, hidden)[:, 0]
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), new

    # One program for all tokens, so that dispatch takes no time; the loop updates states in place.
    tokens = jax.jit(lambda carry: jax.lax.fori_loop(0, TOKENS, step, carry), donate_argnums=0)
    carry = jnp.zeros(1, jnp.int32), states

    def advance() -> jax.Array:
        nonlocal carry
        carry = tokens(carry)
        return jnp.copy(carry[0])  # the next call donates it

    return advance


def run(name: str, cfg: LMConfig, contexts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A record for every context: seconds of a token, bytes of the state and of the weights."""
    params = LM(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    records = []
    for context in contexts:
        sized = with_context(cfg, context)
        states = filled_states(sized, context)
        size = state_bytes(states)
        advance = decoder(sized, params, states)
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
