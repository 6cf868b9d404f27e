"""Prefill: the model runs over prompts of any lengths in passes of a few fixed widths.

The passes of a prompt depend on its own length only, so that its results do not depend on the other
prompts, bit for bit.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from xlstm_jax.modules.lm import LM, lm_logits
from xlstm_jax.typing import Array, Bool, Float, Int

WIDTHS = (512, 128, 16)
"""Positions in one pass, each a compiled program: few, because compiling takes seconds. The largest
bounds memory."""

State = Any  # of the model


def passes(length: int) -> list[int]:
    """Widths of the passes over a prompt, which do not increase; the last may be partly empty."""
    widths, start = [], 0
    while start < length:
        # The widest pass that is more than half full, else the narrowest.
        wide = [width for width in WIDTHS if width < 2 * (length - start)]
        widths.append(max(wide, default=min(WIDTHS)))
        start += widths[-1]
    return widths


def batches(
    prompts: Sequence[np.ndarray],
) -> Iterator[tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
    """Tokens and mask of every pass over the batch.

    Passes of one width run together, first those of the largest. A prompt without a pass left at
    this width waits: its mask is False throughout.
    """
    plans = [passes(len(prompt)) for prompt in prompts]
    starts = [0] * len(prompts)
    for width in WIDTHS:
        for index in range(max((plan.count(width) for plan in plans), default=0)):
            tokens = np.zeros((len(prompts), width), np.int32)
            mask = np.zeros((len(prompts), width), bool)
            for b, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
                if index < plan.count(width):
                    part = prompt[starts[b] : starts[b] + width]
                    tokens[b, : len(part)], mask[b, : len(part)] = part, True
                    starts[b] += width
            yield tokens, mask


def run(
    model: LM, variables: Any, prompts: Sequence[np.ndarray], state: State
) -> tuple[Float[Array, "B vocab"], State]:
    """The logits after the last token of each prompt, and the state; `state` is donated."""
    logits = jnp.zeros((len(prompts), model.cfg.vocab_size), jnp.float32)
    # On a mesh, the first pass shards the state, and cannot use the memory of the initial one.
    has_mesh = not jax.sharding.get_abstract_mesh().empty
    compiled = _pass if has_mesh else _donating_pass
    for tokens, mask in batches(prompts):
        logits, state = compiled(model, variables, tokens, mask, state, logits)
    return logits, state


def run_pass(
    model: LM,
    variables: Any,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    state: State,
    logits: Float[Array, "B vocab"],
) -> tuple[Float[Array, "B vocab"], State]:
    """The logits after the last token of each sequence, and the state.

    A sequence without tokens in this pass keeps its previous `logits`. The head is applied to one
    position per sequence: the logits of all positions may need more memory than the model.
    """
    hidden, state = model.apply(variables, tokens, state=state, mask=mask, head=False)
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    x = jnp.take_along_axis(replicate_explicit(hidden), last[:, None, None], axis=1)[:, 0]
    new_logits = lm_logits(model.cfg, variables["params"], x)
    logits = jnp.where(mask.any(axis=1)[:, None], replicate_explicit(new_logits), logits)
    return logits, state


_pass = jax.jit(run_pass, static_argnames="model")
_donating_pass = jax.jit(run_pass, static_argnames="model", donate_argnames=("state", "logits"))


def replicate_explicit(x: Array) -> Array:
    """x, replicated over Explicit mesh axes, so that its type does not depend on the rules."""
    has_explicit_axes = bool(jax.sharding.get_abstract_mesh().explicit_axes)
    return jax.sharding.reshard(x, PartitionSpec()) if has_explicit_axes else x
