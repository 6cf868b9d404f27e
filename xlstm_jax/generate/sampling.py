"""Sampling of the next token: pure functions of logits and a key, over the last axis.

Filters map logits to logits and set excluded tokens to minus infinity, so that they compose.
`greedy` and every `Sampler` have the signature (logits, key, seen) -> token, which `decode` maps
over the batch.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.config import ConfigError, check_fields, check_range
from xlstm_jax.errors import ArgumentError
from xlstm_jax.typing import Array, Bool, Float, Int, PRNGKeyArray


def temperature(logits: Float[Array, "*B vocab"], value: float) -> Float[Array, "*B vocab"]:
    """Sharpens the distribution below 1 and flattens it above 1; the limit 0 is `greedy`."""
    return logits / value


def top_k(logits: Float[Array, "*B vocab"], k: int) -> Float[Array, "*B vocab"]:
    """Keeps the k most likely tokens, and ties with the last of them."""
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits >= largest[..., -1:], logits, -jnp.inf)


def top_p(logits: Float[Array, "*B vocab"], p: float) -> Float[Array, "*B vocab"]:
    """Keeps the fewest tokens whose total probability reaches p, and ties with the last of them.

    Source: nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    # A token is needed if the more likely ones total less than p; the first one always is.
    needed = jnp.cumsum(probabilities, axis=-1) - probabilities < p
    threshold = jnp.min(descending, axis=-1, keepdims=True, where=needed, initial=jnp.inf)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def min_p(logits: Float[Array, "*B vocab"], p: float) -> Float[Array, "*B vocab"]:
    """Keeps tokens at least p times as likely as the most likely one.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # In log space, which needs no softmax: the normalizer cancels.
    return jnp.where(logits >= largest + math.log(p), logits, -jnp.inf)


def repetition_penalty(
    logits: Float[Array, "*B vocab"], seen: Bool[Array, "*B vocab"], penalty: float
) -> Float[Array, "*B vocab"]:
    """Makes seen tokens less likely: positive logits are divided by the penalty, others multiplied.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, which divides all logits and so makes
    tokens with negative logits more likely.
    """
    lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, lowered, logits)


def first_largest(x: Float[Array, "*B vocab"]) -> Int[Array, "*B"]:
    """The index of the first largest element, as `jnp.argmax`.

    XLA's CPU backend does not vectorize an argmax: 0.27 instead of 0.03 ms for 8 x 8,192 logits
    (AMD EPYC, 2026-11-30).
    """
    vocab_size = x.shape[-1]
    is_smaller = x < jnp.max(x, axis=-1, keepdims=True)  # False for NaN
    index = jnp.arange(vocab_size, dtype=jnp.int32).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.min(jnp.where(is_smaller, vocab_size, index), axis=-1)


def log_probability(
    logits: Float[Array, "*B vocab"], token: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """Log of the probability of a token under the softmax of the logits."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def greedy(
    logits: Float[Array, "*B vocab"],
    key: PRNGKeyArray | None = None,
    seen: Bool[Array, "*B vocab"] | None = None,
) -> Int[Array, "*B"]:
    """The most likely token; `key` and `seen` have no effect."""
    return first_largest(logits)


def check_never(never: tuple[int, ...], vocab_size: int) -> None:
    """Raises ArgumentError unless excluded tokens are in the vocabulary."""
    if never and max(never) >= vocab_size:
        raise ArgumentError(
            f"never must have token ids below {vocab_size}, the size of the vocabulary, got "
            f"{max(never)}; drop it."
        )


MAX_FACTOR = 1e6
"""Largest factor on logits, up or down: beyond it, logits may overflow float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples after applying the filters that are set, in the order of the fields.

    Samplers with equal fields are equal and share compiled programs.
    """

    repetition_penalty: float | None = None  # above 1 discourages tokens seen so far
    never: tuple[int, ...] = ()  # ids of excluded tokens
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        check_fields(self, "", {"at least 1": "top_k", "above 0 and at most 1": "top_p min_p"})
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if value is not None and not 1 / MAX_FACTOR <= value <= MAX_FACTOR:
                raise ConfigError(
                    f"{name} must be from {1 / MAX_FACTOR} to {MAX_FACTOR}, got {value}; leave it "
                    "out to disable it; the limit of temperature 0 is `greedy`, or --temperature 0."
                )
        for token in self.never:
            check_range("never", token, "at least 0", "list token ids")

    def __call__(
        self, logits: Float[Array, "*B vocab"], key: PRNGKeyArray, seen: Bool[Array, "*B vocab"]
    ) -> Int[Array, "*B"]:
        """Samples one token; `seen` marks those in the prompt or generated so far."""
        if self.repetition_penalty is not None:
            logits = repetition_penalty(logits, seen, self.repetition_penalty)
        if self.never:
            check_never(self.never, logits.shape[-1])
            logits = logits.at[..., jnp.array(self.never)].set(-jnp.inf)
        logits = temperature(logits, self.temperature)
        filters: Any = (top_k, self.top_k), (top_p, self.top_p), (min_p, self.min_p)
        for apply_filter, value in filters:
            if value is not None:
                logits = apply_filter(logits, value)
        # The Gumbel trick, as `jax.random.categorical`.
        return first_largest(logits + jax.random.gumbel(key, logits.shape, logits.dtype))
